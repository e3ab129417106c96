r"""Penalties and measures of a matrix through its singular values, and orthonormality.

All take a batch of matrices ``(*batch, rows, columns)`` and give one value per matrix.

>>> import torch
>>> matrix = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)).requires_grad_()
>>> nuclear_norm(matrix).item()
4.0
>>> torch.autograd.grad(nuclear_norm(matrix), matrix)[0].diagonal().abs().tolist()
[1.0, 1.0, 0.0]
>>> round(stable_rank(matrix).item(), 4), round(effective_rank(matrix).item(), 4)
(1.1111, 1.7548)
>>> orthonormality(torch.eye(2, 3), along="rows").item()
0.0
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.functional._numerics import full_precision, safe_ratio, safe_sqrt, singular_values, widen


def nuclear_norm(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""Sum of the singular values, :math:`\|A\|_* = \sum_i \sigma_i`, the convex envelope of the rank.

    Its gradient is :math:`U_r V_r^\top` over the triplets with :math:`\sigma_i > \epsilon \max(m, n)\, \sigma_1`:
    the subgradient of least norm. It is 0 for the zero matrix and leaves the null space of a rank-deficient one
    alone, where the completion of U and V is arbitrary.

    Args:
        matrix: one matrix or a batch.

    Returns:
        One norm per matrix.

    Raises:
        ValueError: fewer than two dimensions, or entries that are not finite.
        TypeError: ``matrix`` is not floating-point.

    Source:
        Fazel, "Matrix Rank Minimization with Applications", 2002; subdifferential: Watson, Linear Algebra Appl. 1992.
    """
    return _singular_values(matrix).sum(-1)


def stable_rank(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""A rank that small perturbations cannot change much, :math:`\|A\|_F^2 / \|A\|_2^2 \le \mathrm{rank}(A)`.

    Args:
        matrix: one matrix or a batch.

    Returns:
        A number from 1 to min(rows, columns) per matrix; 0 with gradient 0 for the zero matrix.

    Raises:
        ValueError: fewer than two dimensions, or entries that are not finite.
        TypeError: ``matrix`` is not floating-point.

    Source:
        Rudelson and Vershynin, "Sampling from Large Matrices", J. ACM 2007, section 1 ("numerical rank").
    """
    values = _singular_values(matrix)
    return safe_ratio(values, values[..., :1]).square().sum(-1)


def effective_rank(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""The number of directions that carry the spectrum.

    .. math:: \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i / \sum_j \sigma_j

    Rows as they are: subtract their mean first to measure features around their mean. Singular values that are zero
    to rounding count as zero, with gradient 0 (the true slope there is infinite).

    Args:
        matrix: one matrix or a batch.

    Returns:
        A number from 1 to the rank per matrix; 0 with gradient 0 for the zero matrix.

    Raises:
        ValueError: fewer than two dimensions, or entries that are not finite.
        TypeError: ``matrix`` is not floating-point.

    Source:
        Roy and Vetterli, "The Effective Rank: a Measure of Effective Dimensionality", EUSIPCO 2007, definition 1.
    """
    values = _singular_values(matrix)
    shares = safe_ratio(values, values.sum(-1, keepdim=True))
    positive = shares > 0
    entropy = -(shares * torch.where(positive, shares, 1.0).log()).sum(-1)
    return torch.where(positive.any(-1), entropy.exp(), 0.0)


def orthonormality(
    matrix: Float[Tensor, "*batch rows columns"], along: Literal["rows", "columns"], squared: bool = False
) -> Float[Tensor, "*batch"]:
    r"""Distance from orthonormality: :math:`\|A A^\top - I\|_F` of the rows, :math:`\|A^\top A - I\|_F` of the columns.

    The unsquared form has a gradient of constant size right up to its minimum, where rounding noise would become a
    step in a random direction. A residual of less than :math:`8 \epsilon` per vector, as an SVD or QR leaves it,
    therefore counts as zero, and so does its gradient. The squared form is smooth. More vectors than they have entries
    cannot be orthonormal: the least value is then the square root of the excess.

    Args:
        matrix: one matrix or a batch.
        along: which vectors should be orthonormal.
        squared: give the squared Frobenius norm.

    Returns:
        One residual per matrix.

    Raises:
        ValueError: fewer than two dimensions, or ``along`` is neither of the two.
        TypeError: ``matrix`` is not floating-point.

    Source:
        Bansal, Chen and Wang, "Can We Gain More from Orthogonality Regularizations", NeurIPS 2018, eq. 1; unsquared: Cao, "SORSA",
        arXiv 2409.00055.
    """
    if along not in ("rows", "columns"):
        raise ValueError(f"along must be 'rows' or 'columns', got {along!r}")
    _check_matrix(matrix)
    vectors = widen(matrix, "matrix")
    if along == "columns":
        vectors = vectors.mT
    count, length = vectors.shape[-2:]
    # ||A A^T - I||^2 = ||A^T A - I||^2 + rows - columns: the smaller of the two products is enough.
    if count > length:
        vectors = vectors.mT
    with full_precision(vectors):
        residual = vectors @ vectors.mT - torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    square = residual.square().sum((-2, -1)) + max(count - length, 0)
    noise = 8 * torch.finfo(vectors.dtype).eps * count
    return square if squared else safe_sqrt(square, floor=noise**2)


def _singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order; those that are zero to rounding are zero, with gradient zero."""
    _check_matrix(matrix)
    wide = widen(matrix, "matrix")
    values = singular_values(wide)
    noise = torch.finfo(wide.dtype).eps * max(wide.shape[-2:])  # relative, as in torch.linalg.matrix_rank
    return torch.where(values > noise * values[..., :1], values, 0.0)


def _check_matrix(matrix: Tensor) -> None:
    if matrix.ndim < 2:
        raise ValueError(f"matrix must have shape (*batch, rows, columns), got {tuple(matrix.shape)}")
