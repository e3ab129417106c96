"""The two dual problems as functions to minimise, one row of variables per problem; values and gradients in one pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.ot.sparse.regularizers import ColumnRegularizer, Entries


@dataclass(frozen=True)
class SemiDual:
    """The negated semi-dual of a batch of problems as a function of ``alpha``; its gradient is the surplus of the rows.

    Attributes:
        a: row masses.
        b: column masses.
        cost: costs, one column per row.
        reg: the regularizer.
    """

    a: Float[Tensor, "batch m"]
    b: Float[Tensor, "batch n"]
    cost: Float[Tensor, "batch n m"]
    reg: ColumnRegularizer

    def __call__(self, alpha: Float[Tensor, "batch m"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch m"]]:
        value, y = self.reg.max_entries(alpha[:, None, :] - self.cost, self.b)
        surplus = y.scaled(self.b).row_sums() - self.a
        return (value * self.b).sum(-1) - (alpha * self.a).sum(-1), surplus

    def entries(self, alpha: Float[Tensor, "batch m"]) -> Entries:
        """The plan of ``alpha``; its column sums are exact."""
        return self.reg.max_entries(alpha[:, None, :] - self.cost, self.b)[1].scaled(self.b)

    def select(self, keep: Int[Tensor, " kept"]) -> "SemiDual":
        return SemiDual(self.a[keep], self.b[keep], self.cost[keep], self.reg)


@dataclass(frozen=True)
class Dual:
    """The negated dual of a batch of problems as a function of ``[alpha, beta]``; its gradient is the surplus of both.

    Attributes:
        a: row masses.
        b: column masses.
        cost: costs, one column per row.
        reg: the regularizer.
    """

    a: Float[Tensor, "batch m"]
    b: Float[Tensor, "batch n"]
    cost: Float[Tensor, "batch n m"]
    reg: ColumnRegularizer

    def __call__(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"]]:
        value, plan = self.reg.conjugate_entries(self._slack(p))
        surplus = torch.cat([plan.row_sums() - self.a, plan.column_sums() - self.b], dim=-1)
        return value.sum(-1) - (p * torch.cat([self.a, self.b], dim=-1)).sum(-1), surplus

    def entries(self, p: Float[Tensor, "batch d"]) -> Entries:
        """The plan of ``[alpha, beta]``."""
        return self.reg.conjugate_entries(self._slack(p))[1]

    def select(self, keep: Int[Tensor, " kept"]) -> "Dual":
        return Dual(self.a[keep], self.b[keep], self.cost[keep], self.reg)

    def _slack(self, p: Float[Tensor, "batch d"]) -> Float[Tensor, "batch n m"]:
        alpha, beta = p.split([self.a.shape[-1], self.b.shape[-1]], dim=-1)
        return alpha[:, None, :] + beta[:, :, None] - self.cost


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
