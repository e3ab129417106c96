"""Tiny files in the formats of published image sets, for the tests of all experiments that read them."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def write_cifar(folder: Path, images: int) -> None:
    """CIFAR with so many images per file, in the layout that the name of the folder stands for."""
    folder.mkdir()
    random = np.random.default_rng(0)
    classes = 100 if "100" in folder.name else 10
    names = ["train", "test"] if classes == 100 else [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    labels_of = {name: random.integers(classes, size=images, dtype=np.uint8) for name in names}
    titles = [f"class{number}" for number in range(classes)]
    for name, labels in labels_of.items():
        pixels = random.integers(256, size=(images, 3072), dtype=np.uint8)
        if folder.name.endswith("-bin"):
            np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
        else:
            key = b"fine_labels" if classes == 100 else b"labels"
            (folder / name).write_bytes(pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2))
    if folder.name.endswith("-bin"):
        (folder / "batches.meta.txt").write_text("\n".join(titles) + "\n\n")
    else:
        file, key = ("meta", b"fine_label_names") if classes == 100 else ("batches.meta", b"label_names")
        (folder / file).write_bytes(pickle.dumps({key: [title.encode() for title in titles]}, protocol=2))


def write_image_folders(folder: Path, classes: int = 2, images: int = 2, size: tuple[int, int] = (300, 400)) -> None:
    """ImageNet's layout: a folder per class for each split."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(images):
                pixels = random.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.JPEG")


@pytest.fixture(name="write_cifar")
def _write_cifar() -> Callable[[Path, int], None]:
    return write_cifar


@pytest.fixture(name="write_image_folders")
def _write_image_folders() -> Callable[..., None]:
    return write_image_folders
