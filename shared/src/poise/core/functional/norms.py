r"""Norms and sparsity measures of vectors, groups and gates.

>>> import torch
>>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
>>> l1(weight).item(), squared_l2(weight).item(), l2(weight, dim=1).tolist()
(7.0, 25.0, [5.0, 0.0])
>>> group_lasso([weight[0], weight[1]]).item()
5.0
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.functional._numerics import safe_ratio, safe_sqrt, widen

Dim = int | tuple[int, ...] | None
"""One dimension, several, or all of them."""


def l1(x: Float[Tensor, "..."], dim: Dim = None) -> Float[Tensor, "..."]:
    r"""Sum of magnitudes, :math:`\sum_i |x_i|`. The gradient at 0 is 0.

    Args:
        x: values of any shape.
        dim: what to sum over; everything by default.

    Returns:
        The norm, of the shape of ``x`` without ``dim``.

    Raises:
        TypeError: ``x`` is not floating-point.

    Source:
        the lasso, Tibshirani, "Regression Shrinkage and Selection via the Lasso", JRSS B 1996, eq. 1.
    """
    return widen(x, "x").abs().sum(dim)


def squared_l2(x: Float[Tensor, "..."], dim: Dim = None) -> Float[Tensor, "..."]:
    r"""Sum of squares, :math:`\sum_i x_i^2`, without the factor 1/2 of weight decay.

    Args:
        x: values of any shape.
        dim: what to sum over; everything by default.

    Returns:
        The squared norm, of the shape of ``x`` without ``dim``.

    Raises:
        TypeError: ``x`` is not floating-point.

    Source:
        ridge regression, Hoerl and Kennard, Technometrics 1970.
    """
    return widen(x, "x").square().sum(dim)


def l2(x: Float[Tensor, "..."], dim: Dim = None) -> Float[Tensor, "..."]:
    r"""The Euclidean (Frobenius) norm :math:`\sqrt{\sum_i x_i^2}`, not squared, with gradient 0 at 0.

    Args:
        x: values of any shape.
        dim: what to sum over; everything by default.

    Returns:
        The norm, of the shape of ``x`` without ``dim``.

    Raises:
        TypeError: ``x`` is not floating-point.
    """
    return safe_sqrt(squared_l2(x, dim))


def group_norms(groups: Sequence[Tensor | Sequence[Tensor]]) -> Float[Tensor, " groups"]:
    r"""The Euclidean norm of every group, :math:`\sqrt{\sum_{x \in g} \|x\|_F^2}`.

    Args:
        groups: each group is a tensor, or several tensors of any shapes that vanish together.

    Returns:
        One norm per group, in the order given.

    Raises:
        ValueError: there is no group, or a group is empty.
        TypeError: a tensor is not floating-point.
    """
    if not groups:
        raise ValueError("groups must hold at least one group")
    squares = []
    for index, group in enumerate(groups):
        members = [group] if isinstance(group, Tensor) else list(group)
        if not members:
            raise ValueError(f"group {index} holds no tensor")
        squares.append(torch.stack([squared_l2(member) for member in members]).sum())
    return safe_sqrt(torch.stack(squares))


def group_lasso(
    groups: Sequence[Tensor | Sequence[Tensor]], weights: Sequence[float] | None = None
) -> Float[Tensor, ""]:
    r"""Sum of the norms of groups, :math:`\sum_g w_g \|x_g\|_2`, which sends whole groups to zero.

    Args:
        groups: each group is a tensor, or several tensors of any shapes that vanish together.
        weights: one factor per group; ``sqrt(number of entries)`` is the choice of Yuan and Lin. 1 by default.

    Returns:
        The weighted sum; its gradient on a group that is zero is 0.

    Raises:
        ValueError: there is no group, a group is empty, or ``weights`` does not fit.
        TypeError: a tensor is not floating-point.

    Source:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006, eq. 2.1.
    """
    norms = group_norms(groups)
    if weights is None:
        return norms.sum()
    if len(weights) != len(groups):
        raise ValueError(f"weights must have one entry per group, got {len(weights)} for {len(groups)} groups")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    return (norms * norms.new_tensor(weights)).sum()


def hoyer_sparsity(x: Float[Tensor, "..."], dim: Dim = None) -> Float[Tensor, "..."]:
    r"""How sparse a vector is, from 0 (all magnitudes equal) to 1 (one nonzero entry), whatever its scale:

    .. math:: \frac{\sqrt n - \|x\|_1 / \|x\|_2}{\sqrt n - 1}

    Args:
        x: values of any shape.
        dim: the dimensions that make up one vector; everything by default.

    Returns:
        The sparsity of every vector. The zero vector, where it is undefined, gives 0 with gradient 0.

    Raises:
        ValueError: a vector has fewer than two entries.
        TypeError: ``x`` is not floating-point.

    Source:
        Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 2004, section 3.1.
    """
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    size = math.prod(x.shape[index] for index in dims)
    if size < 2:
        raise ValueError(
            f"sparsity needs vectors of at least 2 entries, got {size} along dim {dim} of {tuple(x.shape)}"
        )
    norm = l2(x, dim)
    sparsity = (math.sqrt(size) - safe_ratio(l1(x, dim), norm)) / (math.sqrt(size) - 1)
    return torch.where(norm <= 0, 0.0, sparsity)


def hoyer_square(x: Float[Tensor, "..."], dim: Dim = None) -> Float[Tensor, "..."]:
    r"""A penalty that is a smooth count of the nonzero entries, whatever their scale: :math:`\|x\|_1^2 / \|x\|_2^2`.

    Args:
        x: values of any shape.
        dim: the dimensions that make up one vector; everything by default.

    Returns:
        A number from 1 (one nonzero entry) to n (all magnitudes equal); 0 with gradient 0 for the zero vector.

    Raises:
        TypeError: ``x`` is not floating-point.

    Source:
        the Hoyer-Square regularizer of Yang, Wen and Li, "DeepHoyer: Learning Sparser Neural Network with Differentiable
        Scale-Invariant Sparsity Measures", ICLR 2020.
    """
    return safe_ratio(l1(x, dim).square(), squared_l2(x, dim))


def polarization(scales: Float[Tensor, "..."], t: float = 1.0, order: Literal[1, 2] = 1) -> Float[Tensor, ""]:
    r"""Push scales to two poles, zero and one common level, instead of shrinking them all:

    .. math:: t \|\gamma\|_1 - \|\gamma - \bar\gamma \mathbf 1\|_p^p, \qquad \bar\gamma = \mathrm{mean}(\gamma)

    Concatenate the scales of all layers first: the mean is over all of them, and the gradient flows through it. The
    penalty has no lower bound, so the paper clamps every scale to [0, a] after each step.

    Args:
        scales: scale factors of any shape, as a rule of batch normalisation.
        t: weight of the magnitudes against the spread; the larger, the more scales end at zero.
        order: p, 1 as published; 2 is the smooth variant of the authors' code.

    Returns:
        A scalar, which may be negative.

    Raises:
        ValueError: ``order`` is neither 1 nor 2, or ``scales`` is empty.
        TypeError: ``scales`` is not floating-point.

    Source:
        Zhuang et al., "Neuron-level Structured Pruning using Polarization Regularizer", NeurIPS 2020, section 3.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if scales.numel() == 0:
        raise ValueError("scales must not be empty")
    wide = widen(scales, "scales")
    deviations = wide - wide.mean()
    return t * l1(wide) - (l1(deviations) if order == 1 else squared_l2(deviations))


def consensus(gates: Float[Tensor, "batch units"]) -> Float[Tensor, ""]:
    r"""How far the gates of a batch are from agreeing on every unit:

    .. math:: \frac 1 U \sum_u m_u (1 - m_u), \qquad m_u = \frac 1 B \sum_b g_{bu}

    0 exactly when each gate is open for all inputs or closed for all; 1/4 when each is open for half of them. It
    looks at the mean over the batch: a gate that is sure of itself but depends on the input is penalised in full.

    Args:
        gates: openness in [0, 1]; concatenate the units of all layers.

    Returns:
        A scalar in [0, 1/4].

    Raises:
        ValueError: ``gates`` is not a matrix with entries.
        TypeError: ``gates`` is not floating-point.

    Source:
        "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training", arXiv 2302.10798.
    """
    if gates.ndim != 2 or gates.numel() == 0:
        raise ValueError(f"gates must be a matrix (batch, units) with entries, got shape {tuple(gates.shape)}")
    mean = widen(gates, "gates").mean(0)
    return (mean * (1 - mean)).mean()
