"""The images of the SHISRCNet experiment: tiles of one histology picture, and BreaKHis."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.core.data import Dataset, histology, histology_tiles, photograph_crops
from poise.core.experiments.published_images import Images
from poise.medical.histopathology.breakhis import BreaKHis, mirrored

LEFT, GAP = 0.5, 32 / 512
"""Share of the picture's width that trains, and share between that and what tests: one tile."""

SHOWN = ((0, 300), (200, 340), (330, 380))
"""Upper left corners of the regions that figures show, all of them in the part that tests."""


@dataclass(frozen=True, eq=False)
class Tissue:
    """Images at high resolution to train on, to choose the epoch by, and to test on.

    Attributes:
        train: training images.
        test: test images.
        validation: ``None`` where the last epoch counts.
        textures: images without a class that super-resolution warms up on.
        shown: test images for figures.
        patients: whose each test image is, where that is known.
        magnifications: of each test image, where that is known.
    """

    train: Images
    test: Images
    shown: Float[Tensor, "images 3 height width"]
    validation: Images | None = None
    textures: Images | None = None
    patients: tuple[str, ...] = ()
    magnifications: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Tiles:
    """Images of one size in memory, mirrored at random for training.

    Attributes:
        pixels: the images in [0, 1].
        labels: their classes.
        classes: names of the classes.
    """

    pixels: Float[Tensor, "images 3 height width"]
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "Tiles":
        """A bundled set."""
        return cls(dataset.inputs, dataset.targets, dataset.classes)

    def read(
        self, rows: Sequence[int], augment: torch.Generator | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        images = self.pixels[torch.as_tensor(rows)]
        return images if augment is None else mirrored(images, augment)


@cache
def picture_tissue(size: int, crops: int, seed: int) -> Tissue:
    """Tiles of the histology picture, rough or smooth; low resolution hides which.

    Args:
        size: side of the tiles.
        crops: random crops to warm up on, from the left half of the histology picture and as many from that of a retina, every
            second one of which is its green channel alone.
        seed: of the crops.
    """
    split = histology_tiles(size, label="texture", left=LEFT, gap=GAP)
    names = ("histology", "retina")
    drawn, _ = photograph_crops(size, train=crops, test=1, names=names, left=LEFT, gap=GAP, seed=seed)
    textures = drawn.inputs.clone()
    textures[crops::2] = textures[crops::2, 1:2]
    pixels = histology().pixels
    shown = torch.stack([pixels[:, top : top + 96, left : left + 96] for top, left in SHOWN])
    return Tissue(
        train=Tiles.of(split.train),
        test=Tiles.of(split.test),
        shown=shown,
        textures=Tiles(textures, torch.zeros(len(textures), dtype=torch.int64), ("texture",)),
    )


def breakhis_tissue(
    folder: Path, magnification: int | None, split: str, scale: int, hr_size: int, seed: int, cache_folder: Path | None
) -> Tissue:
    """BreaKHis_v1, as its publishers pack it."""
    train, validation, test = (
        BreaKHis(folder, magnification, split, part, scale=scale, hr_size=hr_size, seed=seed, cache=cache_folder)
        for part in ("train", "val", "test")
    )
    return Tissue(
        train=train,
        test=test,
        validation=validation,
        shown=test.read(range(min(3, len(test)))),
        patients=tuple(test.patients),
        magnifications=tuple(image.magnification for image in test.images),
    )
