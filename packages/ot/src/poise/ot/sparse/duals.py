"""The two dual problems as functions to minimise, one row of variables per problem; values and gradients in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.ot.sparse.candidates import LargestEntries, tiles
from poise.ot.sparse.regularizers import ColumnRegularizer, Entries, SparsityConstrained


@dataclass
class SemiDual:
    """The negated semi-dual of a batch of problems as a function of ``alpha``; its gradient is the surplus of the rows.

    Attributes:
        a: row masses.
        b: column masses.
        cost: costs, one column per row.
        reg: the regularizer.
        largest: where a cap looks for the largest entries; made from the rest.
    """

    a: Float[Tensor, "batch m"]
    b: Float[Tensor, "batch n"]
    cost: Float[Tensor, "batch n m"]
    reg: ColumnRegularizer
    largest: LargestEntries | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.largest = self.largest or _largest(self.cost, self.reg)

    def __call__(self, alpha: Float[Tensor, "batch m"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch m"]]:
        value, y = self._best(alpha)
        surplus = y.scaled(self.b).row_sums() - self.a
        return (value * self.b).sum(-1) - (alpha * self.a).sum(-1), surplus

    def entries(self, alpha: Float[Tensor, "batch m"]) -> Entries:
        """The plan of ``alpha``; its column sums are exact."""
        return self._best(alpha)[1].scaled(self.b)

    def select(self, keep: Int[Tensor, " kept"]) -> "SemiDual":
        return SemiDual(*_kept(self, keep))

    def _best(self, alpha: Float[Tensor, "batch m"]) -> tuple[Float[Tensor, "batch n"], Entries]:
        if self.largest is not None and isinstance(self.reg, SparsityConstrained):
            return self.reg.max_of_largest(*self.largest(alpha), self.cost.shape[-1], self.b)
        return _joined(
            self.reg.max_entries(alpha[:, None, :] - self.cost[:, tile], self.b[:, tile]) for tile in tiles(self.cost)
        )


@dataclass
class Dual:
    """The negated dual of a batch of problems as a function of ``[alpha, beta]``; its gradient is the surplus of both.

    Attributes:
        a: row masses.
        b: column masses.
        cost: costs, one column per row.
        reg: the regularizer.
        largest: where a cap looks for the largest entries; made from the rest.
    """

    a: Float[Tensor, "batch m"]
    b: Float[Tensor, "batch n"]
    cost: Float[Tensor, "batch n m"]
    reg: ColumnRegularizer
    largest: LargestEntries | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.largest = self.largest or _largest(self.cost, self.reg)

    def __call__(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"]]:
        value, plan = self._best(p)
        surplus = torch.cat([plan.row_sums() - self.a, plan.column_sums() - self.b], dim=-1)
        return value.sum(-1) - (p * torch.cat([self.a, self.b], dim=-1)).sum(-1), surplus

    def entries(self, p: Float[Tensor, "batch d"]) -> Entries:
        """The plan of ``[alpha, beta]``."""
        return self._best(p)[1]

    def select(self, keep: Int[Tensor, " kept"]) -> "Dual":
        return Dual(*_kept(self, keep))

    def _best(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, "batch n"], Entries]:
        alpha, beta = p.split([self.a.shape[-1], self.b.shape[-1]], dim=-1)
        if self.largest is not None and isinstance(self.reg, SparsityConstrained):
            values, index = self.largest(alpha)  # which they are does not depend on beta
            return self.reg.conjugate_of_largest(values + beta[..., None], index, self.cost.shape[-1])
        return _joined(
            self.reg.conjugate_entries(alpha[:, None, :] + beta[:, tile, None] - self.cost[:, tile])
            for tile in tiles(self.cost)
        )


def _largest(cost: Float[Tensor, "batch n m"], reg: ColumnRegularizer) -> LargestEntries | None:
    return LargestEntries(cost, reg.k) if isinstance(reg, SparsityConstrained) else None


def _kept(
    dual: SemiDual | Dual, keep: Int[Tensor, " kept"]
) -> tuple[Tensor, Tensor, Tensor, ColumnRegularizer, LargestEntries | None]:
    """The parts of the problems at the places ``keep``."""
    largest = None if dual.largest is None else dual.largest.select(keep)
    cost = dual.cost[keep] if largest is None else largest.cost
    return dual.a[keep], dual.b[keep], cost, dual.reg, largest


def _joined(parts: Iterator[tuple[Tensor, Entries]]) -> tuple[Float[Tensor, "batch n"], Entries]:
    """The answers for groups of columns as one; those with fewer entries are padded with zeros."""
    values, entries = zip(*parts, strict=True)
    return torch.cat(values, dim=-1), Entries.joined(entries)


def capped_plan(entries: Entries) -> Float[Tensor, "batch m n"]:
    """The plan as a matrix."""
    return entries.dense().mT.contiguous()


def column_potentials(
    entries: Entries, alpha: Float[Tensor, "batch m"], cost: Float[Tensor, "batch n m"], reg: ColumnRegularizer
) -> Float[Tensor, "batch n"]:
    """The best ``beta`` for ``alpha``: where a column has mass, alpha_i + beta_j - c_ij is the derivative of the regularizer."""
    largest, place = entries.values.max(dim=-1, keepdim=True)
    row = place if entries.index is None else entries.index.gather(-1, place)
    x = alpha.gather(-1, row.squeeze(-1)) - cost.gather(-1, row).squeeze(-1)
    return reg.derivative(largest.squeeze(-1)) - x
