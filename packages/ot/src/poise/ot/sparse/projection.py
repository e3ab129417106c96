r"""Project vectors onto the part of the simplex that has at most k nonzeros.

.. math::

    P_k(v) = \arg\min_{y \ge 0,\ \sum_i y_i = z,\ \|y\|_0 \le k} \|y - v\|^2

The set is not convex, yet the projection is exact: keep the k largest entries of ``v`` and project that k-vector on the simplex.

Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML 2013, arXiv 1206.1529.

>>> import torch
>>> from poise.ot import sparse_simplex_projection
>>> sparse_simplex_projection(torch.tensor([0.5, 0.25, 1.0, 0.25]), k=2)
tensor([0.2500, 0.0000, 0.7500, 0.0000])
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sparse_simplex_projection(v: Tensor, k: int, z: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    r"""The nearest point to ``v`` with non-negative entries that sum to ``z``, at most ``k`` of them nonzero.

    Differentiable in ``v`` and ``z``; the Jacobian is that of the face the projection lands on,
    :math:`\mathrm{diag}(s) - s s^\top / |s|` with ``s`` the indicator of the support. With ``k`` at least the length it is the
    projection onto the whole simplex.

    Args:
        v: floating-point tensor of any shape; projected along ``dim``. Half precision is computed in float32.
        k: the most nonzeros, at least 1; more than the length of ``dim`` means no limit.
        z: the sum, positive: a number, or a tensor that broadcasts against ``v`` without ``dim``.
        dim: the dimension to project along.

    Returns:
        The projections, shaped like ``v``.

    Raises:
        TypeError: ``v`` is not floating-point.
        ValueError: ``v`` has no entry along ``dim``, ``k`` is below 1, or ``z`` is a number that is not positive and finite, or a
            tensor whose shape does not fit.

    Source:
        Kyrillidis et al. 2013, section 3 (GSSP); the threshold is that of Duchi et al., ICML 2008, figure 1.
    """
    if not v.is_floating_point():
        raise TypeError(f"v must be floating-point, got {v.dtype}")
    check_cardinality(k)
    columns = wide(v.movedim(dim, -1))
    if columns.shape[-1] == 0:
        raise ValueError(f"v must have entries along dim {dim}, got shape {tuple(v.shape)}")
    values, index = project_largest(columns, k, _totals(z, columns))
    projected = torch.zeros_like(columns).scatter(-1, index, values)
    return projected.movedim(-1, dim).to(v.dtype)


def project_largest(
    v: Float[Tensor, "*batch n"], k: int, z: float | Float[Tensor, "*batch 1"] = 1.0
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """:func:`sparse_simplex_projection` along the last dimension, as the k largest entries in falling order and where they are."""
    largest, index = v.topk(min(k, v.shape[-1]), dim=-1)
    return project_sorted(largest, z), index


def project_sorted(
    largest: Float[Tensor, "*batch k"], z: float | Float[Tensor, "*batch 1"] = 1.0
) -> Float[Tensor, "*batch k"]:
    """The projection on the simplex of vectors whose entries are in falling order."""
    excess = largest.cumsum(-1) - z
    count = torch.arange(1, largest.shape[-1] + 1, dtype=largest.dtype, device=largest.device)
    # Duchi et al.: the last count for which this holds
    support = (largest * count > excess).sum(-1, keepdim=True).clamp_min(1)
    threshold = excess.gather(-1, support - 1) / support
    return (largest - threshold).clamp_min(0)


def check_cardinality(k: int) -> None:
    """Raise unless ``k`` is an integer of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def wide(x: Tensor) -> Tensor:
    """``x`` in the precision to compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _totals(z: float | Tensor, columns: Float[Tensor, "*batch n"]) -> float | Tensor:
    if not isinstance(z, Tensor):
        if not (math.isfinite(z) and z > 0):
            raise ValueError(f"z must be positive and finite, got {z}")
        return z
    try:
        return z.to(columns.dtype).expand(columns.shape[:-1]).unsqueeze(-1)
    except RuntimeError as error:
        raise ValueError(f"z must broadcast against {tuple(columns.shape[:-1])}, got shape {tuple(z.shape)}") from error
