"""Rates of recognition: of images, and of the patients whose images they are."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def image_accuracy(predicted: Int[Tensor, " images"], labels: Int[Tensor, " images"]) -> float:
    """Share of images whose class was predicted.

    Raises:
        ValueError: there is no image.
    """
    if not len(labels):
        raise ValueError("there is no image to judge by")
    return float((predicted == labels).double().mean())


def patient_accuracy(
    predicted: Int[Tensor, " images"], labels: Int[Tensor, " images"], patients: Sequence[str]
) -> float:
    r"""Patient recognition rate: the mean over patients of the share of their images that were recognized.

    .. math:: \frac1P \sum_{p=1}^P \frac{\text{images of } p \text{ whose class was predicted}}{\text{images of } p}

    Every patient counts the same, however many images there are.

    >>> patient_accuracy(torch.tensor([1, 1, 0]), torch.tensor([1, 1, 1]), ["ann", "ann", "bob"])
    0.5

    Args:
        predicted: classes.
        labels: true classes.
        patients: whose image it is.

    Raises:
        ValueError: the lengths differ, or there is no image.

    Source:
        Spanhol, Oliveira, Petitjean and Heutte, A Dataset for Breast Cancer Histopathological Image Classification, IEEE Transactions
        on Biomedical Engineering 2016, eq. 1 and 2.
    """
    if not len(predicted) == len(labels) == len(patients):
        raise ValueError(
            f"there must be a class and a patient for each prediction, got {len(predicted)}, {len(labels)} and {len(patients)}"
        )
    if not patients:
        raise ValueError("there is no image to judge by")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(patients))}
    which = torch.tensor([numbers[name] for name in patients], device=labels.device)
    right = torch.zeros(len(numbers), dtype=torch.float64, device=labels.device)
    right.index_add_(0, which, (predicted == labels).double())
    return float((right / which.bincount(minlength=len(numbers))).mean())
