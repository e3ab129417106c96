"""Published image formats are read as they are, and batches depend on the step and the seed alone."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from poise.core.data import digits
from poise.core.experiments.published_images import (
    InMemory,
    evaluation_batches,
    read_cifar,
    read_image_folders,
    steps_per_epoch,
    training_batches,
)
from poise.core.experiments.resnets import resnet

CPU = torch.device("cpu")


def table(rows: int, seed: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(256, size=(rows, 3072), dtype=np.uint8), random.integers(10, size=rows).tolist()


def pickled(file: Path, **content: object) -> None:
    file.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2))


def cifar10(folder: Path, python: bool) -> None:
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    classes = [f"class{number}" for number in range(10)]
    for seed, name in enumerate(names):
        pixels, labels = table(3, seed)
        if python:
            pickled(folder / name, data=pixels, labels=labels)
        else:
            np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
    if python:
        pickled(folder / "batches.meta", label_names=[name.encode() for name in classes])
    else:
        (folder / "batches.meta.txt").write_text("\n".join(classes) + "\n\n")


def cifar100(folder: Path, python: bool) -> None:
    folder.mkdir()
    for seed, name in enumerate(("train", "test")):
        pixels, labels = table(3, seed)
        if python:
            pickled(folder / name, data=pixels, fine_labels=labels, coarse_labels=[0] * 3)
        else:
            two = np.array([[0, label] for label in labels], np.uint8)
            np.concatenate([two, pixels], axis=1).tofile(folder / f"{name}.bin")
    if python:
        pickled(folder / "meta", fine_label_names=[b"apple", b"bear"])
    else:
        (folder / "fine_label_names.txt").write_text("apple\nbear\n")


@pytest.mark.parametrize(
    ("name", "write", "python", "train"),
    [
        ("cifar-10-batches-py", cifar10, True, 15),
        ("cifar-10-batches-bin", cifar10, False, 15),
        ("cifar-100-python", cifar100, True, 3),
        ("cifar-100-binary", cifar100, False, 3),
    ],
)
def test_cifar_is_read_in_every_published_layout(
    name: str, write: Callable[[Path, bool], None], python: bool, train: int, tmp_path: Path
) -> None:
    write(tmp_path / name, python)
    for folder in (tmp_path, tmp_path / name):
        split = read_cifar(folder)
        assert len(split.train.labels) == train
        pixels, labels = table(3, 0)
        assert split.train.labels[:3].tolist() == labels
        expected = torch.tensor(pixels.reshape(3, 3, 32, 32)).float() / 255
        torch.testing.assert_close(split.train.read([0, 1, 2]), expected)
    assert split.train.classes[0] in ("class0", "apple")


def test_data_files_cannot_run_code(tmp_path: Path) -> None:
    cifar10(tmp_path / "cifar-10-batches-py", python=True)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"builtins\.print is not allowed"):
        read_cifar(tmp_path)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected one of the folders cifar-10-batches-py"):
        read_cifar(tmp_path)
    cifar10(tmp_path / "cifar-10-batches-bin", python=False)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a binary file of CIFAR: 3 bytes"):
        read_cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of images per class"):
        read_image_folders(tmp_path)


def folders(folder: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / part / name).mkdir(parents=True)
            for number, mode in enumerate(("RGB", "L")):
                pixels = random.integers(256, size=(40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / part / name / f"{number}.JPEG")


def test_image_folders_are_read(tmp_path: Path) -> None:
    folders(tmp_path)
    split = read_image_folders(tmp_path, size=32)
    assert split.train.classes == ("ant", "bee")
    assert split.train.labels.tolist() == [0, 0, 1, 1]
    images = split.test.read([0, 3])
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images, split.test.read([0, 3]))
    augmented = [split.train.read([0, 0], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    torch.testing.assert_close(augmented[0], augmented[1])
    assert not torch.equal(augmented[0], augmented[2])
    assert not torch.equal(augmented[0][0], augmented[0][1])
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(ValueError, match=r"different classes: \['bee', 'wasp'\]"):
        read_image_folders(tmp_path)


def test_batches_depend_on_step_and_seed_alone() -> None:
    images = InMemory.of(digits())
    assert steps_per_epoch(images, 500) == 3
    every = list(training_batches(images, 500, range(7), seed=0, device=CPU))
    later = list(training_batches(images, 500, range(4, 7), seed=0, device=CPU))
    for (x, y), (expected_x, expected_y) in zip(later, every[4:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    assert not torch.equal(every[0][1], every[3][1])
    shares = [list(training_batches(images, 500, range(1), seed=0, device=CPU, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack([shares[0][0][1], shares[1][0][1]], dim=1).flatten(), every[0][1])
    with pytest.raises(ValueError, match="a batch of 2000"):
        steps_per_epoch(images, 2_000)


def test_an_epoch_shows_every_image_once() -> None:
    images = InMemory.of(digits().subset(torch.arange(60)))
    shown = torch.cat([x for x, _ in training_batches(images, 20, range(3), seed=1, device=CPU)])
    assert torch.equal(shown.flatten(1).sum(1).sort().values, images.pixels.flatten(1).sum(1).sort().values)
    assert torch.equal(torch.cat([y for _, y in evaluation_batches(images, 25, CPU)]), images.labels)


def test_images_in_memory_are_shifted_and_mirrored() -> None:
    pixels = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    pixels[0, 0, 4, 4] = 255
    images = InMemory(pixels, torch.zeros(1, dtype=torch.int64), ("dot",), shift=2)
    found = images.read([0] * 200, torch.Generator().manual_seed(0))
    assert torch.equal(found.sum((1, 2, 3)), torch.ones(200))
    _, _, rows, columns = found.nonzero(as_tuple=True)
    for places in (rows, columns):
        assert (places.min(), places.max()) == (2, 6)


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (34, 21_282_122), (50, 23_520_842)])
def test_residual_networks_have_the_published_sizes(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        net = resnet(depth, 10, "small")
        assert sum(parameter.numel() for parameter in net.parameters()) == parameters
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert resnet(depth, 1000, "large")(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
