"""BreaKHis as its publishers pack it: 7,909 micrographs of breast biopsies at four magnifications, benign or malignant.

::

    BreaKHis_v1/histology_slides/breast/benign/SOB/adenosis/SOB_B_A_14-22549AB/100X/SOB_B_A-14-22549AB-100-001.png

Spanhol, Oliveira, Petitjean and Heutte, A Dataset for Breast Cancer Histopathological Image Classification, IEEE Transactions on
Biomedical Engineering 2016.

Images of one patient look alike, so that a split by image measures in part how well a network remembers patients. The default is
split by patient; the published results of SHISRCNet are for a split by image.
"""

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import data

from poise.medical.histopathology.resolution import degrade
from poise.medical.mil.slides import Slide, Slides, split_patients

CLASSES = ("benign", "malignant")
"""Names of the classes by number."""

MAGNIFICATIONS = (40, 100, 200, 400)
"""Magnifications of the objective."""

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}
"""Default share of every part."""

_NAME = re.compile(
    r"(?P<procedure>[A-Z]+)_(?P<class>[BM])_(?P<type>[A-Z]+)-(?P<patient>\d+-(?P<case>\d+)\w*)-(?P<mag>\d+)-(\d+)"
)


@dataclass(frozen=True)
class Micrograph:
    """One image file.

    Attributes:
        path: where it is.
        label: 0 benign, 1 malignant.
        subtype: abbreviation of the tumour's type, ``"A"`` for adenosis.
        patient: year and number of the slide, ``"14-22549AB"``.
        case: the number without letters, ``"22549"``. Slides of one case are never parted by a split by patient.
        magnification: 40, 100, 200 or 400.
    """

    path: Path
    label: int
    subtype: str
    patient: str
    case: str
    magnification: int


class BreaKHisItem(NamedTuple):
    """An image at both resolutions."""

    lr: Float[Tensor, "3 height width"]
    hr: Float[Tensor, "3 rows columns"]
    label: int
    patient: str
    magnification: int


class BreaKHis(data.Dataset[BreaKHisItem]):
    """One part of BreaKHis.

    Images are read as red, green and blue, channels first, rows before columns (the authors' release reads blue, green and red and
    exchanges rows and columns), and resized to squares.

    Args:
        root: the folder ``BreaKHis_v1``, or one above or below it on the way to the classes.
        magnification: 40, 100, 200 or 400; ``None`` for all.
        split: ``"patient"``, no case is in two parts; or ``"image"``, as published: patients are in all of them.
        part: one of the ``shares``.
        scale: of low resolution.
        hr_size: height and width of high resolution; the scale must divide it.
        shares: share of cases (of images) for each part; they sum to 1. The published split by image is 5,557 to 2,352.
        seed: of the split.
        folds: the publishers' file of a fold, ``dsfold1.txt``, with lines ``file|magnification|fold|part``; it replaces ``shares``.
        cache: a folder for resized images; reading them is several times faster than reading the originals.

    Attributes:
        images: the micrographs of this part.

    Raises:
        FileNotFoundError: there are no classes below ``root``.
        ValueError: an unknown magnification, or one that a class does not have; an unknown split or part, or an empty one; a file
            whose name contradicts its folder; with ``split="patient"``, folds that share a patient; a scale that does not divide
            ``hr_size``.
    """

    def __init__(
        self,
        root: Path | str,
        magnification: int | None = None,
        split: Literal["patient", "image"] | str = "patient",
        part: str = "train",
        *,
        scale: int = 2,
        hr_size: int = 384,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        folds: Path | str | None = None,
        cache: Path | str | None = None,
    ) -> None:
        if magnification is not None and magnification not in MAGNIFICATIONS:
            raise ValueError(f"magnification must be one of {MAGNIFICATIONS} or None, got {magnification}")
        if split not in ("patient", "image"):
            raise ValueError(f"split must be 'patient' or 'image', got {split!r}")
        if scale < 1 or hr_size < 1 or hr_size % scale:
            raise ValueError(f"scale must divide hr_size, got {scale} and {hr_size}")
        self._folder = _breast(Path(root))
        self.scale, self.hr_size = scale, hr_size
        self._cache = None if cache is None else Path(cache)
        found = _micrographs(self._folder, magnification)
        parts = _parts(found, split, SHARES if shares is None else shares, seed, None if folds is None else Path(folds))
        self.images = tuple(image for image in found if parts.get(image.path.name) == part)
        if not self.images:
            raise ValueError(f"no image is in the part {part!r}, only in {sorted(set(parts.values()))}")

    @cached_property
    def labels(self) -> Int[Tensor, " images"]:
        """The class of every image."""
        return torch.tensor([image.label for image in self.images])

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every class."""
        return CLASSES

    @property
    def patients(self) -> list[str]:
        """The patient of every image."""
        return [image.patient for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> BreaKHisItem:
        image, hr = self.images[index], self.read([index])
        return BreaKHisItem(degrade(hr, self.scale)[0], hr[0], image.label, image.patient, image.magnification)

    def read(
        self, rows: Sequence[int], augment: torch.Generator | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The images of these numbers at high resolution, in [0, 1]; with a generator each is mirrored at random, both ways."""
        with ThreadPoolExecutor(4) as pool:
            images = torch.stack(list(pool.map(self._pixels, [self.images[row].path for row in rows])))
        return images if augment is None else mirrored(images, augment)

    def _pixels(self, path: Path) -> Float[Tensor, "3 height width"]:
        from PIL import Image

        stored = None
        if self._cache is not None:
            stored = self._cache / str(self.hr_size) / path.relative_to(self._folder)
        with Image.open(stored if stored is not None and stored.is_file() else path) as opened:
            picture = opened.convert("RGB")
        if picture.size != (self.hr_size, self.hr_size):
            picture = picture.resize((self.hr_size, self.hr_size), Image.Resampling.BICUBIC)
        if stored is not None and not stored.is_file():
            stored.parent.mkdir(parents=True, exist_ok=True)
            # Several workers may write the same image: each writes a file of its own, and the last one stays.
            number, temporary = tempfile.mkstemp(dir=stored.parent, suffix=".png")
            with os.fdopen(number, "wb") as file:
                picture.save(file, format="png")
            os.replace(temporary, stored)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def mirrored(
    images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Each image mirrored at random, upside down and left to right: tissue has no upper side."""
    for dim in (2, 3):
        turn = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(turn, images.flip(dim), images)
    return images


def _breast(root: Path) -> Path:
    """The folder that holds the folders of the classes."""
    below = ("", "breast", "histology_slides/breast", "BreaKHis_v1/histology_slides/breast")
    for folder in (root / name for name in below):
        if all((folder / name).is_dir() for name in CLASSES):
            return folder
    raise FileNotFoundError(f"expected BreaKHis_v1/histology_slides/breast with the folders {CLASSES} in {root}")


def _micrographs(folder: Path, magnification: int | None) -> list[Micrograph]:
    wanted = "*X" if magnification is None else f"{magnification}X"
    found = []
    for label, name in enumerate(CLASSES):
        files = sorted((folder / name).glob(f"SOB/*/*/{wanted}/*.png"))
        if not files:
            there = sorted({path.name for path in (folder / name).glob("SOB/*/*/*X")})
            raise ValueError(f"no image of class {name!r} in a folder {wanted} of {folder}; there are {there}")
        found += [_micrograph(path, label) for path in files]
    return found


def _micrograph(path: Path, label: int) -> Micrograph:
    named = _NAME.fullmatch(path.stem)
    if named is None:
        raise ValueError(f"{path.name} is not a name like SOB_B_A-14-22549AB-100-001.png")
    if "BM".index(named["class"]) != label or f"{named['mag']}X" != path.parent.name:
        raise ValueError(f"the name of {path.name} contradicts its folder {CLASSES[label]} .. {path.parent.name}")
    return Micrograph(path, label, named["type"], named["patient"], named["case"], int(named["mag"]))


def _parts(
    images: Sequence[Micrograph], split: str, shares: Mapping[str, float], seed: int, folds: Path | None
) -> dict[str, str]:
    """The part of every image, by the name of its file."""
    listed = {} if folds is None else _fold(folds)
    slides = Slides(
        tuple(
            # In a split by image every image is a patient of its own.
            Slide(image.path.name, image.label, image.case if split == "patient" else image.path.name, part)
            for image in images
            if (part := listed.get(image.path.name, "")) or folds is None
        ),
        CLASSES,
    )
    if folds is None:
        slides = split_patients(slides, shares, seed)
    return {slide.id: slide.split for slide in slides}


def _fold(path: Path) -> dict[str, str]:
    rows = [line.split("|") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or any(len(row) != 4 for row in rows):
        raise ValueError(f"{path.name} must have lines file|magnification|fold|part")
    return {row[0].strip(): row[3].strip() for row in rows}
