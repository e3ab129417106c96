"""SegTHOR: thoracic CT with masks of oesophagus, heart, trachea and aorta, in slices.

Lambert, Petitjean, Dubray and Kuan, SegTHOR: Segmentation of Thoracic Organs at Risk in CT images, IPTA 2020. The data are had from
the challenge's organisers; the layout is theirs: ``Patient_01/Patient_01.nii.gz`` and ``Patient_01/GT.nii.gz``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from poise.medical.segmentation.adele.checks import check_labels
from poise.medical.segmentation.nifti import read_nifti

CLASSES = ("background", "oesophagus", "heart", "trachea", "aorta")

# The authors of ADELE list patient 27 for validation and for testing; here it is in validation alone.
VALIDATION = (21, 23, 27, 29, 37)
TEST = (8, 32, 34, 35)
TRAIN = tuple(number for number in range(1, 41) if number not in VALIDATION + TEST)
PATIENTS = {
    part: tuple(f"Patient_{number:02d}" for number in numbers)
    for part, numbers in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
}
"""Patients of each part."""


class SegTHORSlices(Dataset[tuple[Tensor, Tensor, int]]):
    """Axial slices that show an organ, of some patients.

    Images are resized bilinearly, masks to the nearest pixel, and every image is standardised by its own mean and deviation, as in the
    authors' code of ADELE. All slices are kept in memory, 3 bytes a pixel.

    Args:
        folder: with a folder ``Patient_XX`` for each patient.
        patients: their names; see :data:`PATIENTS`. Keep a patient in one part only.
        size: side of the slices.

    Attributes:
        labels: (N, size, size) uint8, the masks as published.
        patients: name of the patient of each slice.

    Raises:
        FileNotFoundError: a patient's volume or mask is missing.
        ValueError: volume and mask differ in size, a label is out of range, a file is damaged, or no slice shows an organ.
    """

    labels: Tensor
    patients: list[str]

    def __init__(self, folder: str | Path, patients: Sequence[str], size: int = 256) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        images, labels, self.patients = [], [], []
        for patient in patients:
            image, label = _slices(Path(folder) / patient, size)
            images.append(image)
            labels.append(label)
            self.patients += [patient] * len(label)
        if not self.patients:
            raise ValueError(f"no slice of {list(patients)} in {folder} shows an organ")
        self._images, self.labels = torch.cat(images), torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int | Tensor) -> Float[Tensor, "*batch 1 size size"]:
        """One slice (1, size, size), or a batch of them, standardised."""
        pixels = self._images[index].float()
        mean, deviation = pixels.mean((-2, -1), keepdim=True), pixels.std((-2, -1), keepdim=True)
        return ((pixels - mean) / deviation.clamp_min(1e-6)).unsqueeze(-3)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 size size"], Integer[Tensor, "size size"], int]:
        """Image, mask as published (int64) and place in the data set."""
        return self.image(index), self.labels[index].long(), index


def _slices(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Images (n, size, size) int16 and masks uint8 of the slices of one patient that show an organ."""
    volume, mask = folder / f"{folder.name}.nii.gz", folder / "GT.nii.gz"
    for path in (volume, mask):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; expected Patient_XX/Patient_XX.nii.gz and Patient_XX/GT.nii.gz"
            )
    pixels, labels = read_nifti(volume), read_nifti(mask)
    if pixels.ndim != 3 or pixels.shape != labels.shape:
        raise ValueError(
            f"{folder}: the volume is {pixels.shape}, its mask {labels.shape}; expected the same (X, Y, Z)"
        )
    masks = torch.from_numpy(np.ascontiguousarray(labels.T)).long()  # (Z, Y, X): rows of a picture are y
    check_labels(masks, len(CLASSES), None, f"labels of {mask}")
    shown = (masks != 0).flatten(1).any(1)
    images = torch.from_numpy(np.ascontiguousarray(pixels.T).astype(np.float32))[shown]
    images = F.interpolate(images[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    small = F.interpolate(masks[shown][:, None].float(), (size, size), mode="nearest")[:, 0]
    return images.round().to(torch.int16), small.to(torch.uint8)
