r"""The leading singular triplets of a matrix, exactly or from random draws.

>>> import torch
>>> matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> u, s, vh = truncated_svd(matrix, 5)
>>> u.shape, bool((s[:-1] >= s[1:]).all()), torch.allclose(u.mT @ matrix @ vh.mT, torch.diag(s))
(torch.Size([40, 5]), True, True)
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.functional._numerics import full_precision, widen

SVDMethod = Literal["exact", "randomized"]

OVERSAMPLING, POWER_ITERATIONS = 8, 4
"""Of the randomized method: draws above the rank, and products with the matrix and its transpose that sharpen the spectrum."""

WELL_CONDITIONED = 1e-5
"""Least ratio of the singular values for which the Gram matrix in double precision gives vectors exact to single precision."""


class Triplets(NamedTuple):
    """``u`` (rows, rank) and ``vh`` (rank, columns) with orthonormal columns and rows, ``s`` (rank,) in descending order."""

    u: Float[Tensor, "rows rank"]
    s: Float[Tensor, "rank"]
    vh: Float[Tensor, "rank columns"]


@torch.no_grad()
def truncated_svd(
    matrix: Float[Tensor, "rows columns"],
    rank: int,
    method: SVDMethod | str = "exact",
    *,
    generator: torch.Generator | None = None,
) -> Triplets:
    r"""The ``rank`` largest singular values and their vectors, in float32, or float64 for a float64 matrix.

    Signs are fixed: the entry of largest magnitude of every left vector is positive. So the result is the same on every machine to
    rounding, wherever the singular values are apart.

    Args:
        matrix: what to decompose; half types are widened first.
        rank: from 1 to the smaller side.
        method: ``"exact"``, or ``"randomized"``: within the image of rank + 8 random vectors after 4 power iterations, many times
            faster where the rank is much less than the smaller side.
        generator: of the draws, on the device of the matrix.

    Raises:
        TypeError: the matrix is not of a floating-point type.
        ValueError: the rank is out of range, an entry is not finite, or the method is unknown.

    Source:
        randomized: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank must lie in 1..{min(matrix.shape)} for a matrix of shape {tuple(matrix.shape)}, got {rank}"
        )
    if method not in ("exact", "randomized"):
        raise ValueError(f"svd must be 'exact' or 'randomized', got {method!r}")
    wide = widen(matrix.detach(), "matrix")
    if not bool(wide.isfinite().all()):
        raise ValueError("the matrix to decompose has entries that are not finite")
    with full_precision(wide):
        found = _exact(wide, rank) if method == "exact" else _randomized(wide, rank, generator)
    largest = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(wide.dtype)
    return Triplets(found.u * signs, found.s, found.vh * signs.mT)


def _exact(matrix: Tensor, rank: int) -> Triplets:
    """In single precision through the Gram matrix of the shorter side in double precision, where that is as exact and faster."""
    if matrix.dtype == torch.float64:
        return _thin(matrix, rank)
    turned = matrix.shape[0] > matrix.shape[1]
    double = (matrix.mT if turned else matrix).double()
    squares, vectors = torch.linalg.eigh(double @ double.mT)
    s = squares[-rank:].flip(0).clamp_min(0).sqrt()
    if not bool(s[-1] > WELL_CONDITIONED * s[0]):
        return _thin(matrix, rank)
    left = vectors[:, -rank:].flip(1)
    right = (left.mT @ double) / s.unsqueeze(1)
    u, vh = (right.mT, left.mT) if turned else (left, right)
    return Triplets(u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype))


def _thin(matrix: Tensor, rank: int) -> Triplets:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return Triplets(u[:, :rank], s[:rank], vh[:rank])


def _randomized(matrix: Tensor, rank: int, generator: torch.Generator | None) -> Triplets:
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    draws = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype, device=matrix.device)
    image = torch.linalg.qr(matrix @ draws).Q
    for _ in range(POWER_ITERATIONS):
        image = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ image).Q).Q
    small = _exact(image.mT @ matrix, rank)
    return Triplets(image @ small.u, small.s, small.vh)
