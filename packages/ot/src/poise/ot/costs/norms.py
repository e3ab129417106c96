r"""Costs that are powers of norms: :math:`|z|^2`, :math:`|z|`, :math:`|z|^p`, :math:`|z|_p^p/p` and :math:`|z|_p^2/2`.

The factors are part of the definitions in use (OTT, Uscidda and Cuturi 2023): ``SqEuclidean`` has none, ``PNormP`` has 1/p,
``SqPNorm`` has 1/2, so that with 1/p + 1/q = 1 the conjugates of the last two are the same costs for q.

>>> import torch
>>> w = torch.tensor([[3.0, -4.0]])
>>> SqEuclidean().grad_h_star(w), SqPNorm(2.0).grad_h_star(w)
(tensor([[ 1.5000, -2.0000]]), tensor([[ 3., -4.]]))
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.arrays import full_precision, widen
from poise.ot.costs.cost import TranslationCost


@dataclass(frozen=True)
class SqEuclidean(TranslationCost):
    """``|x - y|^2``."""

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return z.square().sum(-1)

    def grad_h_star(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``w / 2``."""
        return w / 2

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        """``|x_i|^2 + |y_j|^2 - 2 <x_i, y_j>`` in one product, about the mean of ``y`` so that data far from 0 keep digits."""
        centre = widen(y.detach()).mean(-2, keepdim=True)
        x_centred, y_centred = widen(x) - centre, widen(y) - centre
        squares_x, squares_y = (points.square().sum(-1, keepdim=True) for points in (x_centred, y_centred))
        left = torch.cat([-2 * x_centred, squares_x, torch.ones_like(squares_x)], -1)
        right = torch.cat([y_centred, torch.ones_like(squares_y), squares_y], -1)
        with full_precision(left):
            return (left @ right.mT).relu_()


@dataclass(frozen=True)
class Euclidean(TranslationCost):
    """``|x - y|``, with gradient 0 where the points meet. Not strictly convex: it has no ``grad_h_star``."""

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return torch.linalg.vector_norm(z, dim=-1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        """``|x_i - y_j|`` from the differences: the square root of a cancelled sum of squares would be wrong near 0."""
        return _distances(x, y, 2.0)


@dataclass(frozen=True)
class EuclideanP(TranslationCost):
    """``|x - y|^p`` with p >= 1; ``grad_h_star`` for p > 1."""

    p: float

    def __post_init__(self) -> None:
        _check_exponent(self.p)

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return torch.linalg.vector_norm(z, dim=-1).pow(self.p)

    def grad_h_star(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``(|w| / p)^(1 / (p - 1))`` along ``w``, 0 at 0."""
        _conjugate_exponent(self)
        norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        return _signed_power(norm / self.p, 1 / (self.p - 1)) * (w / _positive(norm))

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return _distances(x, y, 2.0).pow(self.p)


@dataclass(frozen=True)
class PNormP(TranslationCost):
    """``|x - y|_p^p / p`` with p >= 1; ``grad_h_star`` for p > 1."""

    p: float

    def __post_init__(self) -> None:
        _check_exponent(self.p)

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return z.abs().pow(self.p).sum(-1) / self.p

    def grad_h_star(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``sign(w) |w|^(q - 1)`` coordinate by coordinate."""
        return _signed_power(w, _conjugate_exponent(self) - 1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return _distances(x, y, self.p).pow(self.p) / self.p


@dataclass(frozen=True)
class SqPNorm(TranslationCost):
    """``|x - y|_p^2 / 2`` with p >= 1; ``grad_h_star`` for p > 1."""

    p: float

    def __post_init__(self) -> None:
        _check_exponent(self.p)

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return torch.linalg.vector_norm(z, ord=self.p, dim=-1).square() / 2

    def grad_h_star(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``|w|_q^(2 - q) sign(w) |w|^(q - 1)``, 0 at 0."""
        q = _conjugate_exponent(self)
        norm = torch.linalg.vector_norm(w, ord=q, dim=-1, keepdim=True)
        return norm * _signed_power(w / _positive(norm), q - 1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return _distances(x, y, self.p).square() / 2


def _distances(x: Tensor, y: Tensor, p: float) -> Tensor:
    """All p-norms of differences, exact near 0 and with gradient 0 at 0."""
    return torch.cdist(widen(x), widen(y), p=p, compute_mode="donot_use_mm_for_euclid_dist")


def _check_exponent(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p must lie in [1, inf), got {p}")


def _conjugate_exponent(cost: EuclideanP | PNormP | SqPNorm) -> float:
    if cost.p == 1:
        raise ValueError(f"{cost} is not strictly convex: the gradient of its conjugate does not exist")
    return cost.p / (cost.p - 1)


def _positive(norm: Tensor) -> Tensor:
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _signed_power(w: Tensor, exponent: float) -> Tensor:
    """``sign(w) |w|^exponent`` with derivative 0 at 0, where the true one is infinite for exponents below 1."""
    zero = w == 0
    return torch.where(zero, 0.0, w.sign() * torch.where(zero, 1.0, w.abs()).pow(exponent))
