"""Masks as a hurried annotator draws them: every organ too small, or every organ too large.

>>> import numpy as np
>>> mask = np.zeros((64, 64), dtype=np.uint8)
>>> mask[20:40, 20:40] = 1
>>> [int(under_over_segment(mask, 2, mode).sum()) for mode in ("under", "over")], int(mask.sum())
([289, 484], 400)
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from poise.medical.segmentation.adele.checks import check_labels

Mask = TypeVar("Mask", Tensor, npt.NDArray[np.integer])

SEGTHOR_ORDER = (1, 3, 4, 2)
"""Oesophagus, trachea and aorta before the heart, so that small organs keep their place when masks grow."""


def under_over_segment(
    mask: Mask,
    iterations: int,
    mode: str,
    order: Sequence[int] | None = SEGTHOR_ORDER,
    target_pixels: int = 1000,
) -> Mask:
    """Erode or dilate every class of a mask, relative to its size.

    Class by class the mask is resized (cubic) so that the class has about ``target_pixels`` pixels, eroded or dilated with a 3 x 3
    square, and resized back. Erosion leaves background; dilation takes background only.

    Args:
        mask: (H, W) classes, 0 is background, 255 ignored; a tensor or an array. It is not changed.
        iterations: of the erosion or dilation.
        mode: ``"under"`` or ``"over"``.
        order: classes in turn; ``None`` takes those of the mask in ascending order. Others stay.
        target_pixels: pixels of a class while it is eroded or dilated.

    Returns:
        A mask like ``mask``.

    Raises:
        TypeError: the mask is not of integers.
        ValueError: it is not two-dimensional or holds a negative label, the mode is unknown, or a number is below 1.

    Source:
        Liu et al. 2022, appendix (SegTHOR); the procedure from the authors' code.
    """
    if mode not in ("under", "over"):
        raise ValueError(f"mode must be 'under' or 'over', got {mode!r}")
    if iterations < 1 or target_pixels < 1:
        raise ValueError(f"iterations and target_pixels must be at least 1, got {iterations} and {target_pixels}")
    labels = torch.from_numpy(np.ascontiguousarray(mask)) if isinstance(mask, np.ndarray) else mask
    if labels.ndim != 2:
        raise ValueError(f"mask must be (height, width), got {tuple(labels.shape)}")
    check_labels(labels, 255, 255, "mask")
    drawn = labels.clone()
    for label in labels.unique().tolist() if order is None else order:
        region = drawn == label
        if label in (0, 255) or not region.any():
            continue
        changed = _redrawn(region, iterations, mode, target_pixels)
        if mode == "under":
            drawn[changed != region] = 0  # resizing alone can move a pixel across the edge, which counts as lost too
        else:
            drawn[changed & (drawn == 0)] = label
    return drawn.numpy() if isinstance(mask, np.ndarray) else drawn


def random_under_over(
    mask: Mask,
    generator: torch.Generator,
    iterations: tuple[int, int] = (2, 4),
    order: Sequence[int] | None = SEGTHOR_ORDER,
    target_pixels: int = 1000,
) -> Mask:
    """A mask drawn too small or too large, by a fair coin, with a random number of iterations.

    Args:
        mask: as for :func:`under_over_segment`.
        generator: what is drawn from.
        iterations: least and largest number.
        order: as there.
        target_pixels: as there.

    Returns:
        A mask like ``mask``.

    Raises:
        ValueError: as there; or ``iterations`` are not in ascending order.
    """
    if iterations[0] > iterations[1]:
        raise ValueError(f"iterations must be a least and a largest number, got {iterations}")
    mode: str = "over" if torch.rand((), generator=generator) < 0.5 else "under"
    count = int(torch.randint(iterations[0], iterations[1] + 1, (), generator=generator))
    return under_over_segment(mask, count, mode, order, target_pixels)


def _redrawn(region: Bool[Tensor, "h w"], iterations: int, mode: str, target_pixels: int) -> Bool[Tensor, "h w"]:
    height, width = region.shape
    ratio = (target_pixels / int(region.sum())) ** 0.5
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    resized = _resized(region, size).float()[None, None]
    for _ in range(iterations):
        # The frame counts as background when dilating and as foreground when eroding.
        resized = F.max_pool2d(resized, 3, 1, 1) if mode == "over" else -F.max_pool2d(-resized, 3, 1, 1)
    return _resized(resized[0, 0] > 0.5, (height, width))


def _resized(region: Bool[Tensor, "h w"], size: tuple[int, int]) -> Bool[Tensor, "_ _"]:
    """Cubic interpolation of a picture of zeros and ones, rounded."""
    cubic = F.interpolate(region[None, None].float(), size, mode="bicubic", align_corners=False)
    return cubic[0, 0] > 0.5
