"""Refuse what cannot be a label or a probability, and say what it was."""

import torch
from torch import Tensor

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far from 1 probabilities of a half type may sum; 1e-3 for the others."""


def check_labels(labels: Tensor, num_classes: int, ignore_index: int | None = 255, name: str = "labels") -> None:
    """Every label is a class, 0..num_classes-1, or ``ignore_index``.

    Raises:
        TypeError: they are not integers.
        ValueError: one is out of range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integer classes, got {labels.dtype}")
    wrong = (labels >= num_classes) | (labels < 0)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        values = labels[wrong].unique().tolist()
        ignored = "" if ignore_index is None else f", or {ignore_index} to ignore a pixel"
        raise ValueError(f"{name} must be classes 0..{num_classes - 1}{ignored}; got {values}")


def check_probabilities(probs: Tensor) -> None:
    """``probs`` (B, C, ...) are finite, not negative, and sum to 1 over the classes.

    Raises:
        TypeError: they are not floating-point.
        ValueError: they are anything else.
    """
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating-point, got {probs.dtype}")
    if not probs.numel():
        return
    least = probs.amin()  # NaN if there is one
    if not least >= 0:
        raise ValueError(f"probs must be finite and not negative, got {least:g}")
    sums = probs.sum(1, dtype=torch.promote_types(probs.dtype, torch.float32))
    off = (sums - 1).abs().max()
    if off > TOLERANCE.get(probs.dtype, 1e-3):
        raise ValueError(
            f"probs must sum to 1 over the classes (dimension 1); a sum is off by {off:g}. Are these logits?"
        )


def check_spatial(labels: Tensor, probs: Tensor) -> None:
    """``labels`` (B, *S) lie on the pixels of ``probs`` (B, C, *S), two or three-dimensional.

    Raises:
        ValueError: they do not.
    """
    if probs.ndim not in (4, 5) or probs.shape[1] < 2:
        raise ValueError(
            f"probs must be (batch, classes, height, width) or (batch, classes, depth, height, width) with at least two classes, "
            f"got {tuple(probs.shape)}"
        )
    if labels.shape != (probs.shape[0], *probs.shape[2:]):
        raise ValueError(
            f"labels must have the shape {(probs.shape[0], *probs.shape[2:])} of the predictions' pixels, got {tuple(labels.shape)}"
        )
