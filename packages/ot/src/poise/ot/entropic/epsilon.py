r"""The strength of the entropy, in units of the cost.

A number for ε means nothing without the scale of the cost, so it is usually given as a share of the mean cost or of its
standard deviation. In Uscidda and Cuturi's tutorial the gap for :math:`|x-y|` takes its scale from the mean *squared*
distance; which scale the paper's tables use is not known, so both can be named.

>>> import torch
>>> M = torch.tensor([[0.0, 2.0], [4.0, 2.0]])
>>> RelativeEpsilon(0.1).of_matrix(M), RelativeEpsilon(0.1, "std").of_matrix(M)
(tensor(0.2000), tensor(0.1414))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.arrays import full_precision, widen
from poise.ot.costs.cost import BLOCK, Cost


@dataclass(frozen=True)
class RelativeEpsilon:
    """``factor`` times a statistic of the cost, one number per problem and without gradient.

    Args:
        factor: the share.
        statistic: ``"mean"`` or ``"std"`` of the cost over all pairs, weighted by the masses.
        cost: the cost whose statistic it is; ``None`` for the cost of the problem itself.

    Raises:
        ValueError: ``factor`` is not positive, or the statistic is unknown.
    """

    factor: float
    statistic: Literal["mean", "std"] = "mean"
    cost: Cost | None = None

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"the relative epsilon must be positive and finite, got {self.factor}")
        if self.statistic not in ("mean", "std"):
            raise ValueError(f"statistic must be 'mean' or 'std', got {self.statistic!r}")

    @torch.no_grad()
    def of_matrix(
        self, M: Float[Tensor, "*B n m"], a: Float[Tensor, "*B n"] | None = None, b: Float[Tensor, "*B m"] | None = None
    ) -> Float[Tensor, "*B"]:
        """For a stored cost matrix; masses are uniform when left out.

        Raises:
            ValueError: this epsilon is relative to another cost, which a matrix does not know.
        """
        if self.cost is not None:
            raise ValueError(f"an epsilon relative to {self.cost} needs the points, not a cost matrix")
        M = widen(M)
        a, b = _shares(a, M[..., 0]), _shares(b, M[..., 0, :])
        with full_precision(M):
            return self._scaled(
                lambda transform: torch.linalg.vecdot(a, torch.linalg.vecdot(transform(M), b.unsqueeze(-2)))
            )

    @torch.no_grad()
    def of_points(
        self,
        x: Float[Tensor, "*B n d"],
        y: Float[Tensor, "*B m d"],
        cost: Cost,
        a: Float[Tensor, "*B n"] | None = None,
        b: Float[Tensor, "*B m"] | None = None,
    ) -> Float[Tensor, "*B"]:
        """For points and the cost of the problem, in blocks of bounded memory."""
        x, y, cost = widen(x), widen(y), self.cost or cost
        a, b = _shares(a, x[..., 0]), _shares(b, y[..., 0])
        rows = max(1, BLOCK * x.shape[-2] // (x[..., 0].numel() * y.shape[-2]))

        def average(transform: Callable[[Tensor], Tensor]) -> Tensor:
            parts = [
                torch.linalg.vecdot(masses, torch.linalg.vecdot(transform(cost.pairwise(part, y)), b.unsqueeze(-2)))
                for part, masses in zip(x.split(rows, -2), a.split(rows, -1), strict=True)
            ]
            return torch.stack(parts).sum(0)

        with full_precision(x):
            return self._scaled(average)

    def _scaled(self, average: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        mean = average(lambda cost: cost)
        if self.statistic == "mean":
            return self.factor * mean
        return self.factor * average(lambda cost: (cost - mean[..., None, None]).square()).sqrt()


def _shares(masses: Tensor | None, like: Tensor) -> Tensor:
    if masses is None:
        return torch.full_like(like, 1 / like.shape[-1])
    masses = widen(masses)
    return masses / masses.sum(-1, keepdim=True)
