r"""Total variation of signals, images and volumes.

>>> import torch
>>> step = torch.zeros(1, 1, 4, 6)
>>> step[..., 3:] = 2.0
>>> total_variation(step).item()  # height of the jump times the length of the edge
8.0
>>> total_variation(step, spacing=0.5).item()
4.0
"""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from poise.core.functional._numerics import safe_sqrt, widen


def total_variation(
    x: Float[Tensor, "batch channels *spatial"],
    kind: Literal["isotropic", "anisotropic", "vectorial"] = "isotropic",
    spacing: float | Sequence[float] = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, "..."]:
    r"""The integral of the gradient's magnitude, which smooths noise away and keeps edges.

    With forward differences :math:`D_d x = (x_{i + e_d} - x_i) / h_d`, 0 at the far border, and cells of volume
    :math:`\prod_d h_d`, every sample has

    .. math::
        \prod_d h_d \sum_{c, i} \sqrt{\sum_d (D_d x_{c,i})^2} \;\text{(isotropic)}, \qquad
        \prod_d h_d \sum_{c, i} \sum_d |D_d x_{c,i}| \;\text{(anisotropic)}, \qquad
        \prod_d h_d \sum_i \sqrt{\sum_{c, d} (D_d x_{c,i})^2} \;\text{(vectorial)}

    The vectorial form couples the channels, so that the edges of a colour image stay in one place. A spacing of
    one over the size makes the value independent of the resolution.

    Args:
        x: one to three spatial dimensions.
        kind: how differences along the dimensions (and channels) are combined.
        spacing: grid step h, one for all spatial dimensions or one for each.
        reduction: over the samples of the batch; ``"none"`` keeps them.

    Returns:
        A scalar, or one value per sample. The gradient is 0 where ``x`` is constant.

    Raises:
        ValueError: not one to three spatial dimensions, no entries, an unknown ``kind`` or ``reduction``, or a
            spacing that is not positive or not one per dimension.
        TypeError: ``x`` is not floating-point.

    Source:
        Rudin, Osher and Fatemi, "Nonlinear Total Variation Based Noise Removal Algorithms", Physica D 1992; vectorial: Bresson and
        Chan, "Fast Dual Minimization of the Vectorial Total Variation Norm", Inverse Problems and Imaging 2008.
    """
    if kind not in ("isotropic", "anisotropic", "vectorial"):
        raise ValueError(f"kind must be 'isotropic', 'anisotropic' or 'vectorial', got {kind!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"x must have shape (batch, channels, ...) with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    steps = _steps(spacing, x.ndim - 2)
    wide = widen(x, "x")
    quotients = [torch.diff(wide, dim=dim) / step for dim, step in enumerate(steps, start=2)]
    if kind == "anisotropic":
        per_sample = torch.stack([quotient.abs().flatten(1).sum(1) for quotient in quotients]).sum(0)
    else:
        square = _sum_on_grid([quotient.square() for quotient in quotients])
        per_sample = safe_sqrt(square.sum(1) if kind == "vectorial" else square).flatten(1).sum(1)
    variation = math.prod(steps) * per_sample
    if reduction == "none":
        return variation
    return variation.mean() if reduction == "mean" else variation.sum()


def _sum_on_grid(terms: Sequence[Tensor]) -> Tensor:
    """Sum of terms that each lack the last plane of their own spatial dimension; the missing planes count as 0."""
    dims = len(terms)
    # F.pad counts pairs (before, after) from the last dimension back.
    padded = [F.pad(term, [0, 0] * (dims - 1 - index) + [0, 1]) for index, term in enumerate(terms)]
    return reduce(add, padded)


def _steps(spacing: float | Sequence[float], dims: int) -> tuple[float, ...]:
    steps = (spacing,) * dims if isinstance(spacing, int | float) else tuple(spacing)
    if len(steps) != dims:
        raise ValueError(f"spacing must have one entry per spatial dimension, got {len(steps)} for {dims}")
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing must be positive, got {spacing}")
    return tuple(float(step) for step in steps)
