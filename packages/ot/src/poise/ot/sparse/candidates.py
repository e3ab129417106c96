r"""The k largest entries of every column of :math:`\alpha_i - c_{ij}`, again and again for an alpha that moves a little each time.

Solvers ask for them hundreds of times, and they seldom change. A scan of all entries keeps more than k per column and the smallest
value kept, a bound on all that were left out. While alpha moves, none of those can gain more than the largest rise of alpha, so the
answer comes from the few entries kept for as long as that bound stays below the k-th of them, exactly. Only then is a problem scanned
again, which is one evaluation in ten or fewer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEPT_PER_PLACE, KEPT = 3, 24
"""Entries of a column that a scan keeps: so many times k, and at least so many."""
TILE, LARGE_TILE = 1 << 18, 1 << 27
"""Entries looked at together: on a processor as many as its cache holds, on other devices as many as memory easily does."""


@dataclass
class _Scan:
    """What is kept of every column, and what was seen of alpha then; ``floor`` bounds the entries that were not kept."""

    index: Int[Tensor, "batch n c"]
    cost: Float[Tensor, "batch n c"]
    floor: Float[Tensor, "batch n"]
    seen: Float[Tensor, "batch m"]

    def rows(self, keep: Int[Tensor, " kept"]) -> "_Scan":
        return _Scan(*(getattr(self, field.name)[keep] for field in fields(self)))

    def put(self, rows: Int[Tensor, " some"], scan: "_Scan") -> None:
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(scan, field.name)


class LargestEntries:
    """The largest entries of the columns of a batch of cost matrices, under a potential of the rows.

    Args:
        cost: costs, one column per row (batch, n, m).
        k: how many entries of a column are asked for.
    """

    def __init__(self, cost: Float[Tensor, "batch n m"], k: int) -> None:
        self.cost, self.k = cost, min(k, cost.shape[-1])
        self._scan: _Scan | None = None

    def __call__(self, alpha: Float[Tensor, "batch m"]) -> tuple[Float[Tensor, "batch n k"], Int[Tensor, "batch n k"]]:
        """The k largest entries of every column in falling order, and their rows."""
        if self._scan is None:
            self._scan = self._look(alpha, self.cost)
        largest, index = self._pick(alpha)
        if self._scan.index.shape[-1] < self.cost.shape[-1]:
            rise = (alpha - self._scan.seen).amax(-1, keepdim=True)
            stale = (self._scan.floor + rise > largest[..., -1]).any(-1).nonzero()[:, 0]
            if stale.numel() > 0:
                everything = stale.numel() == len(self.cost)
                self._scan.put(stale, self._look(alpha[stale], self.cost if everything else self.cost[stale]))
                largest, index = self._pick(alpha)
        return largest, index

    def select(self, keep: Int[Tensor, " kept"]) -> "LargestEntries":
        """The same for the problems at the places ``keep``."""
        part = LargestEntries(self.cost[keep], self.k)
        part._scan = None if self._scan is None else self._scan.rows(keep)
        return part

    def _pick(self, alpha: Float[Tensor, "batch m"]) -> tuple[Tensor, Tensor]:
        assert self._scan is not None
        x = alpha.gather(-1, self._scan.index.flatten(1)).view_as(self._scan.cost) - self._scan.cost
        largest, place = x.topk(self.k, dim=-1)
        return largest, self._scan.index.gather(-1, place)

    def _look(self, alpha: Float[Tensor, "batch m"], cost: Float[Tensor, "batch n m"]) -> _Scan:
        kept = min(cost.shape[-1], max(KEPT, KEPT_PER_PLACE * self.k))
        parts = [(alpha[:, None, :] - cost[:, tile]).topk(kept, dim=-1) for tile in tiles(cost)]
        index = torch.cat([part.indices for part in parts], dim=1)
        floor = torch.cat([part.values[..., -1] for part in parts], dim=1)
        return _Scan(index, cost.gather(-1, index), floor, alpha.clone())


def tiles(cost: Float[Tensor, "batch n m"]) -> Iterator[slice]:
    """The columns in groups, so that no second matrix of the size of the costs is ever made."""
    tile = TILE if cost.device.type == "cpu" else LARGE_TILE
    count = max(1, tile // max(1, cost[:, 0].numel()))
    return (slice(start, start + count) for start in range(0, cost.shape[1], count))
