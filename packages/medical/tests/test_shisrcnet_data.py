"""BreaKHis in its published layout, degradation, and what restored images and predictions are judged by."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from poise.medical import (
    BreaKHis,
    SHISRCLoss,
    SHISRCNet,
    SRResNetMFE,
    degrade,
    enlarge,
    evaluate_sr,
    image_accuracy,
    patient_accuracy,
)

TYPES = {
    "benign": {"adenosis": "A", "fibroadenoma": "F"},
    "malignant": {"ductal_carcinoma": "DC", "mucinous_carcinoma": "MC"},
}


def write_breakhis(root, slides=3, images=2, magnifications=(40, 100), size=(70, 46)):
    """Tiny files where the publishers put theirs."""
    number = 22_549
    rng = np.random.default_rng(0)
    for name, types in TYPES.items():
        for folder, short in types.items():
            for index in range(slides):
                letters = "AB" if index % 2 else "CD"  # two slides of one case
                number += index % 2 == 0
                slide = f"SOB_{name[0].upper()}_{short}"
                for magnification in magnifications:
                    place = root / "BreaKHis_v1" / "histology_slides" / "breast" / name / "SOB" / folder
                    place = place / f"{slide}_14-{number}{letters}" / f"{magnification}X"
                    place.mkdir(parents=True)
                    for sequence in range(1, images + 1):
                        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                        file = f"{slide}-14-{number}{letters}-{magnification}-{sequence:03d}.png"
                        Image.fromarray(pixels).save(place / file)
    return root


@pytest.fixture(name="root")
def _root(tmp_path):
    return write_breakhis(tmp_path)


SHARES = {"train": 0.5, "test": 0.5}


# The data set


def test_every_image_is_found_with_what_its_name_says(root):
    everything = BreaKHis(root, split="image", part="all", shares={"all": 1.0}, hr_size=16)
    assert len(everything) == 2 * 2 * 3 * 2 * 2
    first = everything.images[0]
    assert (first.label, first.subtype, first.magnification) == (0, "A", 100)
    assert first.patient.startswith("14-225")
    assert first.case == first.patient[3:8]
    assert everything.labels.tolist().count(0) == len(everything) // 2
    assert everything.classes == ("benign", "malignant")
    only = BreaKHis(root, 40, split="image", part="all", shares={"all": 1.0}, hr_size=16)
    assert {image.magnification for image in only.images} == {40}
    assert len(only) == len(everything) // 2


@pytest.mark.parametrize("below", ["", "BreaKHis_v1", "BreaKHis_v1/histology_slides/breast"])
def test_any_folder_on_the_way_to_the_classes_will_do(root, below):
    assert len(BreaKHis(root / below, 40, hr_size=16)) > 0


@pytest.mark.parametrize("seed", range(5))
def test_by_default_no_case_is_in_two_parts(root, seed):
    parts = [
        BreaKHis(root, part=part, shares={"train": 0.5, "val": 0.25, "test": 0.25}, seed=seed, hr_size=16)
        for part in ("train", "val", "test")
    ]
    cases = [{image.case for image in part.images} for part in parts]
    assert not cases[0] & cases[1] | cases[0] & cases[2] | cases[1] & cases[2]
    assert sum(len(part) for part in parts) == 48
    again = BreaKHis(root, part="train", shares={"train": 0.5, "val": 0.25, "test": 0.25}, seed=seed, hr_size=16)
    assert again.images == parts[0].images


def test_two_slides_of_one_case_stay_together_and_are_two_patients(root):
    both = {
        image.patient
        for part in ("train", "test")
        for image in BreaKHis(root, part=part, shares=SHARES, hr_size=16).images
    }
    cases = {patient[3:8] for patient in both}
    assert len(both) == 12
    assert len(cases) == 8


def test_split_by_image_has_patients_on_both_sides(root):
    train, test = (BreaKHis(root, split="image", part=part, shares=SHARES, hr_size=16) for part in ("train", "test"))
    assert len(train) == len(test)
    assert set(train.patients) & set(test.patients)


def test_images_are_red_green_blue_rows_before_columns(tmp_path):
    write_breakhis(tmp_path, slides=2, images=1, magnifications=(40,))
    first = sorted(tmp_path.rglob("*.png"))[0]
    pixels = np.zeros((46, 70, 3), dtype=np.uint8)
    pixels[:10, :, 0] = 255  # a red stripe along the upper edge
    Image.fromarray(pixels).save(first)
    images = BreaKHis(tmp_path, split="image", part="all", shares={"all": 1.0}, hr_size=46)
    index = next(index for index, image in enumerate(images.images) if image.path == first)
    hr = images[index].hr
    assert hr.shape == (3, 46, 46)
    assert hr[0, :8].min() > 0.9
    assert hr[0, 12:].max() == 0
    assert hr[1:].max() == 0


def test_low_resolution_is_the_reduced_image(root):
    images = BreaKHis(root, 40, hr_size=32, scale=4)
    item = images[0]
    assert item.lr.shape == (3, 8, 8)
    torch.testing.assert_close(item.lr[None], degrade(item.hr[None], 4))
    assert (item.label, item.patient, item.magnification) == (
        images.images[0].label,
        images.images[0].patient,
        images.images[0].magnification,
    )


def test_images_of_any_size_become_squares(tmp_path):
    write_breakhis(tmp_path, slides=2, images=1, magnifications=(40,))
    Image.fromarray(np.zeros((40, 70, 3), dtype=np.uint8)).save(sorted(tmp_path.rglob("*.png"))[0])
    images = BreaKHis(tmp_path, split="image", part="all", shares={"all": 1.0}, hr_size=24)
    assert images.read(range(len(images))).shape == (len(images), 3, 24, 24)


def test_cached_images_are_the_same_and_are_not_read_again(root, tmp_path):
    plain = BreaKHis(root, 40, hr_size=24).read([0, 1])
    cached = BreaKHis(root, 40, hr_size=24, cache=tmp_path / "cache")
    assert torch.equal(cached.read([0, 1]), plain)
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 2
    os.remove(cached.images[0].path)
    assert torch.equal(cached.read([0, 1]), plain)


def test_augmentation_mirrors_and_depends_on_the_generator_alone(root):
    images = BreaKHis(root, 40, hr_size=16)
    rows = list(range(4))
    plain = images.read(rows)
    first, second = (images.read(rows, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    for image, mirrored in zip(plain, first, strict=True):
        choices = [image, image.flip(1), image.flip(2), image.flip(1, 2)]
        assert any(torch.equal(mirrored, choice) for choice in choices)


def fold(root, path, parts):
    """A file of the publishers' protocol: the part of every image."""
    files = sorted(root.rglob("*.png"))
    path.write_text("".join(f"{file.name}|{file.stem.split('-')[3]}|1|{parts(file)}\n" for file in files))
    return path


def test_folds_of_the_publishers_are_read(root, tmp_path):
    slides = sorted({file.parent.parent.name[:-2] for file in root.rglob("*.png")})
    held_out = set(slides[::2])
    path = fold(
        root, tmp_path / "dsfold1.txt", lambda file: "test" if file.parent.parent.name[:-2] in held_out else "train"
    )
    train, test = (BreaKHis(root, part=part, folds=path, hr_size=16) for part in ("train", "test"))
    assert len(train) + len(test) == 48
    assert {image.path.parent.parent.name[:-2] for image in test.images} == held_out


def test_folds_that_share_a_patient_are_refused_in_a_split_by_patient(root, tmp_path):
    path = fold(root, tmp_path / "dsfold1.txt", lambda file: "test" if file.stem.endswith("1") else "train")
    with pytest.raises(ValueError, match="patient leakage"):
        BreaKHis(root, folds=path, hr_size=16)
    assert len(BreaKHis(root, split="image", folds=path, hr_size=16)) == 24


def test_two_slides_of_one_case_in_two_parts_are_leakage_too(root, tmp_path):
    path = fold(root, tmp_path / "dsfold1.txt", lambda file: "test" if "AB" in file.stem else "train")
    with pytest.raises(ValueError, match="patient leakage"):
        BreaKHis(root, folds=path, hr_size=16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"magnification": 50}, ValueError, "magnification must be one of"),
        (
            {"magnification": 400},
            ValueError,
            r"no image of class 'benign' in a folder 400X .*there are \['100X', '40X'\]",
        ),
        ({"split": "slide"}, ValueError, "split must be 'patient' or 'image'"),
        ({"part": "holdout"}, ValueError, "no image is in the part 'holdout'"),
        ({"scale": 4, "hr_size": 30}, ValueError, "scale must divide hr_size, got 4 and 30"),
        ({"shares": {"train": 0.5}}, ValueError, "shares must be positive and sum to 1"),
    ],
)
def test_bad_arguments_are_refused(root, arguments, error, message):
    with pytest.raises(error, match=message):
        BreaKHis(root, **arguments)


def test_what_is_not_breakhis_is_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected BreaKHis_v1/histology_slides/breast"):
        BreaKHis(tmp_path / "elsewhere")
    first = sorted(root.rglob("*.png"))[0]
    first.rename(first.with_name("tissue.png"))
    with pytest.raises(ValueError, match=r"tissue\.png is not a name like"):
        BreaKHis(root)
    (first.parent / "tissue.png").rename(first.with_name(first.name.replace("-100-", "-40-")))
    with pytest.raises(ValueError, match=r"contradicts its folder benign \.\. 100X"):
        BreaKHis(root)


def test_an_empty_fold_is_refused(root, tmp_path):
    (tmp_path / "dsfold1.txt").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"dsfold1\.txt must have lines"):
        BreaKHis(root, folds=tmp_path / "dsfold1.txt")


def test_a_loader_trains_the_network(root):
    loader = DataLoader(BreaKHis(root, 40, hr_size=32), batch_size=4, drop_last=True)
    model, criterion = SHISRCNet(2, upscaler=SRResNetMFE(2, width=4, blocks=1)), SHISRCLoss()
    batch = next(iter(loader))
    criterion(model(batch.lr, batch.hr), batch.hr, batch.label)["loss"].backward()
    assert len(batch.patient) == 4


# Resolution


def smooth(*shape):
    rows = torch.linspace(0, 3, shape[-2])[:, None] + torch.linspace(0, 2, shape[-1])
    return (0.5 + 0.4 * torch.sin(rows)).expand(shape).contiguous()


def test_reducing_and_enlarging_a_smooth_image_changes_little():
    image = smooth(1, 3, 64, 48)
    assert (enlarge(degrade(image, 2), 2) - image)[..., 4:-4, 4:-4].abs().max() < 5e-3


def test_reduction_does_not_alias():
    checkers = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    reduced = degrade(checkers.float().expand(1, 3, 32, 32), 4)
    assert (reduced[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.02


@given(st.integers(0, 1_000), st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_images_stay_between_zero_and_one(seed, scale):
    image = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    reduced = degrade(image, scale)
    assert 0 <= reduced.min() <= reduced.max() <= 1
    assert 0 <= enlarge(reduced, scale).min() <= enlarge(reduced, scale).max() <= 1


@pytest.mark.parametrize("scale", [0, 3, 5])
def test_a_scale_that_does_not_divide_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale must divide height and width, got {scale} for 32 x 32"):
        degrade(torch.zeros(1, 3, 32, 32), scale)


# Judging images


def pairs():
    generator = torch.Generator().manual_seed(0)
    for count in (3, 2):
        hr = torch.rand(count, 3, 24, 32, generator=generator)
        yield degrade(hr, 2), hr


def test_psnr_and_ssim_are_those_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    found = evaluate_sr(partial(enlarge, scale=2), pairs())
    psnr, ssim = [], []
    for lr, hr in pairs():
        for restored, true in zip(enlarge(lr, 2), hr, strict=True):
            a, b = (x.double().numpy() for x in (true, restored))
            psnr.append(peak_signal_noise_ratio(a, b, data_range=1))
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            ssim.append(structural_similarity(a, b, data_range=1, channel_axis=0, **options))
    assert found.images == 5
    assert found.psnr == pytest.approx(np.mean(psnr), rel=1e-5)
    assert found.ssim == pytest.approx(np.mean(ssim), rel=1e-4)


def test_restored_images_are_clamped_unless_asked_otherwise():
    def too_bright(lr):
        return enlarge(lr, 2) + 0.5

    bounded, unbounded = evaluate_sr(too_bright, pairs()), evaluate_sr(too_bright, pairs(), clamp=False)
    assert bounded.psnr > unbounded.psnr
    assert bounded.l1 == unbounded.l1


def test_a_perfect_image_has_ssim_one():
    assert evaluate_sr(lambda hr: hr, [(hr, hr) for _, hr in pairs()]).ssim == pytest.approx(1)


def test_a_network_is_judged_in_evaluation_mode_and_keeps_its_own():
    network = SRResNetMFE(2, width=4, blocks=1)
    before = network.body[0].project[1].running_mean.clone()
    first, second = evaluate_sr(network, pairs()), evaluate_sr(network, pairs())
    assert first == second
    assert network.training
    assert torch.equal(network.body[0].project[1].running_mean, before)


def test_images_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"differ in size: \(3, 3, 12, 16\) and \(3, 3, 24, 32\)"):
        evaluate_sr(lambda lr: lr, pairs())
    with pytest.raises(ValueError, match="at least 11 pixels"):
        evaluate_sr(lambda hr: hr, [(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))])
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate_sr(lambda lr: lr, [])


# Judging predictions


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_patients_count_alike_however_many_images_they_have(images):
    labels = torch.ones(len(images), dtype=torch.int64)
    predicted = torch.tensor([int(right) for right, _ in images])
    patients = [name for _, name in images]
    shares = [np.mean([right for right, owner in images if owner == name]) for name in set(patients)]
    assert patient_accuracy(predicted, labels, patients) == pytest.approx(np.mean(shares))
    assert patient_accuracy(predicted, labels, ["one"] * len(images)) == pytest.approx(
        image_accuracy(predicted, labels)
    )


def test_predictions_that_cannot_be_judged_are_refused():
    two = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="got 2, 2 and 1"):
        patient_accuracy(two, two, ["ann"])
    with pytest.raises(ValueError, match="no image"):
        patient_accuracy(two[:0], two[:0], [])
    with pytest.raises(ValueError, match="no image"):
        image_accuracy(two[:0], two[:0])
