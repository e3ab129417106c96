r"""Regularizers of a transport plan's columns: negentropy, squared norm, and squared norm under a cardinality constraint.

Blondel, Seguy and Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018, arXiv 1710.06276; Liu, Puigcerver and Blondel,
"Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466.

Every solver of this folder is built from two questions, asked of each column x of a matrix and answered with the value and its
gradient, which is the maximiser:

.. math::

    \delta(x) = \sup_{t \ge 0} \langle t, x\rangle - \Omega(t), \qquad
    \max{}_b(x) = \sup_{y \in \triangle} \langle y, x\rangle - \tfrac1b \Omega(b y)

>>> import torch
>>> from poise.ot import SparsityConstrained
>>> regularizer = SparsityConstrained(k=1, gamma=2.0)
>>> value, gradient = regularizer.conjugate(torch.tensor([[1.0, -1.0], [3.0, -2.0]]))
>>> value, gradient
(tensor([2.2500, 0.0000]), tensor([[0.0000, 0.0000],
        [1.5000, 0.0000]]))
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from poise.ot.sparse.projection import check_cardinality, project_sorted, wide

SUPPORT = 64
"""Entries of a column looked at first when it is projected on the whole simplex; all of them only if that many are positive."""


@dataclass(frozen=True)
class Entries:
    """Columns of a plan by their entries, one column per row: ``values[..., j, :]`` at the places ``index[..., j, :]``.

    Attributes:
        values: the entries.
        index: their places in the column; ``None`` for all of them in order.
        size: the length of a column.
    """

    values: Float[Tensor, "*batch n s"]
    index: Int[Tensor, "*batch n s"] | None
    size: int

    @staticmethod
    def joined(parts: Sequence["Entries"]) -> "Entries":
        """Groups of columns, one after the other; of one kind, and padded with zeros to the widest."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.values.shape[-1] for part in parts)
        values = torch.cat([widen(part.values, width) for part in parts], dim=-2)
        places = [widen(part.index, width) for part in parts if part.index is not None]
        return Entries(values, torch.cat(places, dim=-2) if places else None, parts[0].size)

    def column_sums(self) -> Float[Tensor, "*batch n"]:
        return self.values.sum(-1)

    def row_sums(self) -> Float[Tensor, "*batch m"]:
        if self.index is None:
            return self.values.sum(-2)
        zeros = self.values.new_zeros((*self.values.shape[:-2], self.size))
        return zeros.scatter_add(-1, self.index.flatten(-2), self.values.flatten(-2))

    def scaled(self, factor: Float[Tensor, "*batch n"]) -> "Entries":
        return Entries(self.values * factor[..., None], self.index, self.size)

    def select(self, keep: Int[Tensor, " kept"] | Bool[Tensor, " all"]) -> "Entries":
        """The plans at the places ``keep`` of the batch, numbers or a mask."""
        return Entries(self.values[keep], None if self.index is None else self.index[keep], self.size)

    def dense(self) -> Float[Tensor, "*batch n m"]:
        if self.index is None:
            return self.values
        zeros = self.values.new_zeros((*self.values.shape[:-1], self.size))
        return zeros.scatter_add(-1, self.index, self.values)


class ColumnRegularizer(ABC):
    r"""What a regularizer of columns answers; ``gamma`` is its strength :math:`\gamma > 0`.

    The public methods take and give matrices (..., m, n) whose columns they treat one by one; half precision is computed, and
    answered, in float32. The solvers use the forms with ``entries``, in which a column is a contiguous row.
    """

    gamma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma must be positive and finite, got {self.gamma}")

    def conjugate(
        self, X: Float[Tensor, "*batch m n"]
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m n"]]:
        r""":math:`\delta` of every column of ``X`` and its gradient."""
        value, entries = self.conjugate_entries(wide(X.mT))
        return value, entries.dense().mT

    def max_op(
        self, X: Float[Tensor, "*batch m n"], b: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch m n"]]:
        r""":math:`\max_{b_j}` of every column of ``X`` and its gradient, a point of the simplex."""
        value, entries = self.max_entries(wide(X.mT), wide(b))
        return value, entries.dense().mT

    @abstractmethod
    def value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        r""":math:`\Omega` of every column of ``T``."""

    @abstractmethod
    def relaxed_value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        r"""The biconjugate of :math:`\Omega` at every column of ``T``: what the dual problem really minimises."""

    @abstractmethod
    def conjugate_entries(self, x: Float[Tensor, "*batch n m"]) -> tuple[Float[Tensor, "*batch n"], Entries]:
        """:meth:`conjugate` for columns stored as rows."""

    @abstractmethod
    def max_entries(
        self, x: Float[Tensor, "*batch n m"], b: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        """:meth:`max_op` for columns stored as rows."""

    @abstractmethod
    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""The derivative of :math:`\Omega` at a positive entry ``t``."""


@dataclass(frozen=True)
class NegEntropy(ColumnRegularizer):
    r"""Negentropy :math:`\Omega(t) = \gamma \sum_i t_i \log t_i`: dense plans, the regularizer of Sinkhorn's algorithm.

    Args:
        gamma: the strength.
    """

    gamma: float = 1.0

    def value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        return self.gamma * torch.special.xlogy(T, T).sum(-2)

    def relaxed_value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        return self.value(T)

    def conjugate_entries(self, x: Float[Tensor, "*batch n m"]) -> tuple[Float[Tensor, "*batch n"], Entries]:
        t = torch.exp(x / self.gamma - 1)
        return self.gamma * t.sum(-1), Entries(t, None, x.shape[-1])

    def max_entries(
        self, x: Float[Tensor, "*batch n m"], b: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        scaled = x / self.gamma
        total = scaled.logsumexp(-1)
        y = torch.exp(scaled - total[..., None])
        return self.gamma * (total - b.log()), Entries(y, None, x.shape[-1])

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.gamma * (1 + t.log())


@dataclass(frozen=True)
class SquaredL2(ColumnRegularizer):
    r"""Squared norm :math:`\Omega(t) = \frac\gamma2 \|t\|^2`: sparse plans without a cap (quadratically regularised transport).

    Args:
        gamma: the strength.
    """

    gamma: float = 1.0

    def value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        return self.gamma / 2 * T.square().sum(-2)

    def relaxed_value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        return self.value(T)

    def conjugate_entries(self, x: Float[Tensor, "*batch n m"]) -> tuple[Float[Tensor, "*batch n"], Entries]:
        t = x.clamp_min(0) / self.gamma
        return self.gamma / 2 * t.square().sum(-1), Entries(t, None, x.shape[-1])

    def max_entries(
        self, x: Float[Tensor, "*batch n m"], b: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        size = x.shape[-1]
        value, entries = _projected(*x.topk(min(SUPPORT, size), dim=-1), size, b, self.gamma)
        if size > SUPPORT and bool((entries.values[..., -1] > 0).any()):
            value, entries = _projected(*x.sort(dim=-1, descending=True), size, b, self.gamma)
        return value, entries

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.gamma * t


@dataclass(frozen=True)
class SparsityConstrained(ColumnRegularizer):
    r"""Squared norm with at most k nonzeros: :math:`\Omega(t) = \frac\gamma2 \|t\|^2` if :math:`\|t\|_0 \le k`, else infinite.

    ``k = 1`` is unregularised transport (up to the constant :math:`\frac\gamma2\|b\|^2`), large ``k`` is :class:`SquaredL2`. Its
    biconjugate is half the squared k-support norm (Argyriou, Foygel and Srebro, NeurIPS 2012).

    Args:
        k: the most nonzeros per column, at least 1; more than a column's length means no limit.
        gamma: the strength.

    Raises:
        TypeError: ``k`` is not an integer.
        ValueError: ``k`` is below 1 or ``gamma`` is not positive and finite.
    """

    k: int
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cardinality(self.k)

    def value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        squares = self.gamma / 2 * T.square().sum(-2)
        return torch.where(T.count_nonzero(dim=-2) <= self.k, squares, torch.inf)

    def relaxed_value(self, T: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch n"]:
        k = min(self.k, T.shape[-2])
        largest = T.topk(k, dim=-2).values.mT
        # With the k - r - 1 largest entries apart, the others share the r + 1 places left; Proposition 2.1 of Argyriou et al. The
        # right r is the cheapest one for which no entry of the rest takes more than a place of its own.
        head = largest.square().cumsum(-1) - largest.square()
        tail = T.sum(-2)[..., None] - (largest.cumsum(-1) - largest)
        places = torch.arange(k, 0, -1, dtype=T.dtype, device=T.device)
        slack = 8 * torch.finfo(T.dtype).eps * tail[..., :1].abs()  # rounding of the sums
        shared = torch.where(largest * places <= tail + slack, head + tail.square() / places, torch.inf)
        return self.gamma / 2 * shared.amin(-1)

    def conjugate_entries(self, x: Float[Tensor, "*batch n m"]) -> tuple[Float[Tensor, "*batch n"], Entries]:
        return self.conjugate_of_largest(*x.topk(min(self.k, x.shape[-1]), dim=-1), x.shape[-1])

    def max_entries(
        self, x: Float[Tensor, "*batch n m"], b: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        return self.max_of_largest(*x.topk(min(self.k, x.shape[-1]), dim=-1), x.shape[-1], b)

    def conjugate_of_largest(
        self, largest: Float[Tensor, "*batch n k"], index: Int[Tensor, "*batch n k"], size: int
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        """:meth:`conjugate_entries` for columns of ``size`` entries of which the k largest are known."""
        t = largest.clamp_min(0) / self.gamma
        return self.gamma / 2 * t.square().sum(-1), Entries(t, index, size)

    def max_of_largest(
        self,
        largest: Float[Tensor, "*batch n k"],
        index: Int[Tensor, "*batch n k"],
        size: int,
        b: Float[Tensor, "*batch n"],
    ) -> tuple[Float[Tensor, "*batch n"], Entries]:
        """:meth:`max_entries` for columns of ``size`` entries of which the k largest are known, in falling order."""
        return _projected(largest, index, size, b, self.gamma)

    def derivative(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.gamma * t


def _projected(
    largest: Float[Tensor, "*batch n k"],
    index: Int[Tensor, "*batch n k"],
    size: int,
    b: Float[Tensor, "*batch n"],
    gamma: float,
) -> tuple[Float[Tensor, "*batch n"], Entries]:
    scale = (gamma * b)[..., None]
    y = project_sorted(largest / scale)  # the argument is x / (gamma b); the plan's column will be b y
    inner = (y * largest).sum(-1)
    return inner - scale[..., 0] / 2 * y.square().sum(-1), Entries(y, index, size)


def widen(entries: Shaped[Tensor, "*batch c"], width: int) -> Shaped[Tensor, "*batch w"]:
    """``entries`` padded with zeros to ``width``."""
    return nn.functional.pad(entries, (0, width - entries.shape[-1]))
