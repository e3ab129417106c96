"""What a ground cost is, and the costs ``h(x - y)`` among them.

A solver asks a cost for all pairs and for matching pairs; anything with these two methods is a cost (:class:`Cost`). The
costs here take points of half precision too and give float32 then. Most
are a function of the difference (:class:`TranslationCost`), and where ``h`` is strictly convex the optimal map has the
form ``T(x) = x - grad h*(grad f(x))`` (Gangbo and McCann 1996), so such a cost has ``grad_h_star`` too.

>>> import torch
>>> class Huber(TranslationCost):
...     def h(self, z):
...         return torch.nn.functional.huber_loss(z, torch.zeros_like(z), reduction="none").sum(-1)
>>> x, y = torch.zeros(2, 3), torch.ones(4, 3)
>>> Huber().pairwise(x, y).shape, Huber().elementwise(x, y[:2])
(torch.Size([2, 4]), tensor([1.5000, 1.5000]))
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from poise.ot.arrays import widen

BLOCK = 1 << 22
"""Entries of the largest temporary of :func:`blockwise`; a few tens of megabytes, so that it stays near the cache."""


@runtime_checkable
class Cost(Protocol):
    """A ground cost between points of R^d."""

    def pairwise(self, x: Tensor, y: Tensor, /) -> Tensor:
        """``c(x_i, y_j)`` for all pairs: (n, d) and (m, d) give (n, m), with an optional batch dimension in front."""
        ...

    def elementwise(self, x: Tensor, y: Tensor, /) -> Tensor:
        """``c(x_i, y_i)`` for matching points: (..., d) and (..., d) give (...)."""
        ...


class TranslationCost(ABC):
    """A cost ``c(x, y) = h(x - y)``; a subclass writes ``h`` and, if it knows a faster way, ``pairwise``."""

    @abstractmethod
    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The cost of the displacement ``z``."""

    def elementwise(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """``h(x_i - y_i)`` for matching points."""
        return self.h(widen(x) - widen(y))

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        """``h(x_i - y_j)`` for all pairs, in blocks of bounded memory."""
        return blockwise(self.h, widen(x), widen(y))


def blockwise(
    h: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]
) -> Float[Tensor, "*batch n m"]:
    """``h(x_i - y_j)`` for all pairs without holding all differences, neither now nor for the backward pass.

    Rows are taken a few at a time so that a block of differences has at most ``BLOCK`` entries; each block is computed
    again when its gradient is asked for.
    """

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        return h(rows.unsqueeze(-2) - columns.unsqueeze(-3))

    rows = max(1, BLOCK // max(1, y.numel()))
    if rows >= x.shape[-2]:
        return block(x, y)
    parts = x.split(rows, dim=-2)
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)):
        return torch.cat([block(part, y) for part in parts], dim=-2)
    return torch.cat(
        [checkpoint(block, part, y, use_reentrant=False, preserve_rng_state=False) for part in parts], dim=-2
    )
