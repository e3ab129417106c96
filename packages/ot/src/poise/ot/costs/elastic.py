r"""Elastic costs: a quadratic plus a regularizer that makes displacements sparse.

Cuturi, Klein and Ablin, "Monge, Bregman and Occam: Interpretable Optimal Transport in High-Dimensions with
Feature-Sparse Maps", ICML 2023, arXiv 2302.04065.

.. math:: h(z) = \tfrac{\rho}{2}|z|^2 + \lambda\, r(z), \qquad
          \nabla h^*(w) = \operatorname{prox}_{(\lambda/\rho)\, r}(w/\rho),

so a structured map moves only the coordinates that the proximal operator leaves alive.

>>> import torch
>>> cost = ElasticCost(L1(), lam=1.0, rho=2.0)
>>> cost.grad_h_star(torch.tensor([[4.0, 0.5]]))
tensor([[1.5000, 0.0000]])
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.arrays import widen
from poise.ot.costs.cost import TranslationCost, blockwise
from poise.ot.costs.norms import SqEuclidean


@runtime_checkable
class Regularizer(Protocol):
    """The function ``r`` of an elastic cost: value, value on all differences, proximal operator."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """``r(z)``: (..., d) gives (...)."""
        ...

    def pairwise(self, x: Tensor, y: Tensor, /) -> Tensor:
        """``r(x_i - y_j)`` for all pairs."""
        ...

    def prox(self, z: Tensor, tau: float, /) -> Tensor:
        """``argmin_w |w - z|^2 / 2 + tau r(w)``."""
        ...


@dataclass(frozen=True)
class L1:
    """``|z|_1``."""

    def __call__(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return z.abs().sum(-1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return torch.cdist(x, y, p=1.0)

    def prox(self, z: Float[Tensor, "*batch d"], tau: float) -> Float[Tensor, "*batch d"]:
        """Soft thresholding at ``tau``."""
        return z.sign() * (z.abs() - tau).clamp_min(0)


@dataclass(frozen=True)
class STVS:
    r"""Soft thresholding with vanishing shrinkage: as sparse as L1, but large displacements are hardly shrunk.

    .. math:: r(z) = \gamma^2 \sum_k \big(u_k - \tfrac12 e^{-2u_k} + \tfrac12\big), \quad
              u_k = \operatorname{asinh}\frac{|z_k|}{2\gamma}, \qquad r'(z_k) = \gamma e^{-u_k} \operatorname{sign} z_k.

    Args:
        gamma: the threshold of the proximal operator at ``tau`` = 1.
        prox_form: ``"exact"``, or ``"ott"`` for OTT's ``z - (tau gamma)^2 / z``, which agrees at ``tau`` = 1 only.

    Source:
        Schreck et al., A shrinkage-thresholding Metropolis adjusted Langevin algorithm for Bayesian variable selection,
        2015, lemma 2.1.
    """

    gamma: float = 1.0
    prox_form: str = "exact"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        if self.prox_form not in ("exact", "ott"):
            raise ValueError(f"prox_form must be 'exact' or 'ott', got {self.prox_form!r}")

    def __call__(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return self._value(z.abs()).sum(-1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return blockwise(self, x, y)

    def prox(self, z: Float[Tensor, "*batch d"], tau: float) -> Float[Tensor, "*batch d"]:
        """The global minimiser, for every ``tau`` > 0 (for ``tau`` > 2 the problem is not convex and ``prox`` jumps)."""
        size, threshold = z.abs(), tau * self.gamma
        if self.prox_form == "ott":
            alive = size > threshold
            return torch.where(alive, z - threshold**2 / torch.where(alive, z, 1.0), 0.0)
        # A stationary point w = gamma (E - 1/E) > 0 solves E^2 - (|z|/gamma) E + tau - 1 = 0, E = e^u >= 1.
        discriminant = (size / self.gamma).square() - 4 * (tau - 1)
        real = discriminant > 0
        root = (size / self.gamma + torch.where(real, discriminant, 1.0).sqrt()) / 2
        alive = real & (root > 1)
        root = torch.where(alive, root, 2.0)
        w = self.gamma * (root - 1 / root)
        if tau > 2:  # 0 is a local minimiser too, and may be the better one
            alive = alive & ((w - size).square() / 2 + tau * self._value(w) < size.square() / 2)
        return torch.where(alive, z.sign() * w, 0.0)

    def _value(self, size: Tensor) -> Tensor:
        u = torch.asinh(size / (2 * self.gamma))
        return self.gamma**2 * (u - torch.expm1(-2 * u) / 2)


@dataclass(frozen=True)
class KOverlap:
    r"""Half the squared k-overlap (k-support) norm: the tightest convex bound of :math:`|z|^2/2` on k-sparse vectors.

    .. math:: r(z) = \tfrac12 \min_{\theta \in (0, 1]^d,\ \sum\theta \le k} \sum_i z_i^2/\theta_i
                   = \tfrac12 \Big(\sum_{i < k-s} |z|_{(i)}^2 + \tfrac{1}{s+1}\big(\sum_{i \ge k-s} |z|_{(i)}\big)^2\Big)

    with the sizes in decreasing order and the smallest s for which the last of the first sum exceeds the mean of the
    second. k = 1 gives :math:`|z|_1^2/2`, k = d gives :math:`|z|^2/2`.

    Args:
        k: how many coordinates move without extra charge, at most d.

    Source:
        Argyriou, Foygel and Srebro, "Sparse Prediction with the k-Support Norm", NeurIPS 2012, proposition 2.1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def __call__(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        self._check_dimension(z)
        size = z.abs().sort(-1, descending=True).values
        tails = (
            size.flip(-1).cumsum(-1).flip(-1)[..., : self.k].flip(-1)
        )  # sum of all from the (k - s)-th, s = 0, 1, ...
        means = tails / torch.arange(1, self.k + 1, dtype=z.dtype, device=z.device)
        before = torch.nn.functional.pad(size[..., : self.k - 1], (1, 0), value=torch.inf).flip(-1)
        s = (before > means).byte().argmax(-1, keepdim=True)  # argmax returns the first of several
        heads = torch.nn.functional.pad(size[..., : self.k - 1].square().cumsum(-1), (1, 0)).flip(-1)
        return ((heads + tails * means).gather(-1, s) / 2).squeeze(-1)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        return blockwise(self, x, y)

    def prox(self, z: Float[Tensor, "*batch d"], tau: float) -> Float[Tensor, "*batch d"]:
        r"""``z theta / (theta + tau)``, ``theta = clip(alpha |z| - tau, 0, 1)``, ``alpha`` such that theta sums to k.

        The sum grows with ``alpha`` and bends where a coordinate leaves 0 or reaches 1; the bends are sorted, the last one
        at which the sum is below k is found, and on the linear piece behind it ``alpha`` has a closed form. With at most k
        coordinates other than 0, theta is 1.
        """
        self._check_dimension(z)
        smallest = torch.finfo(z.dtype).tiny ** (1 / 3)  # taken for 0; squares of reciprocals must be finite
        size = z.abs().clamp_min(smallest)
        order = size.sort(-1, descending=True).values
        sums = torch.nn.functional.pad(order.cumsum(-1), (1, 0))
        leaves, reaches = tau / order.detach(), (1 + tau) / order.detach()
        bends = torch.cat([leaves, reaches], -1).sort(-1).values
        positive = torch.searchsorted(leaves, bends, right=True)
        full = torch.searchsorted(reaches, bends, right=True)
        slopes = sums.detach().gather(-1, positive) - sums.detach().gather(-1, full)
        totals = full + bends * slopes - tau * (positive - full).to(z.dtype)
        # Where the sum stays at k for a while, rounding decides which of several right values of alpha is found.
        below = totals < self.k * (1 - 8 * torch.finfo(z.dtype).eps)
        last = (below * torch.arange(below.shape[-1], device=z.device)).amax(-1, keepdim=True)
        positive, full = positive.gather(-1, last), full.gather(-1, last)
        slope = sums.gather(-1, positive) - sums.gather(-1, full)
        sparse = (size > smallest).sum(-1, keepdim=True) <= self.k
        bent = (positive > full) & ~sparse
        alpha = (self.k - full + tau * (positive - full).to(z.dtype)) / torch.where(bent, slope, 1.0)
        theta = (torch.where(bent, alpha, bends.gather(-1, last)) * size - tau).clamp(0, 1)
        theta = torch.where(sparse, 1.0, theta)
        return z * theta / (theta + tau)

    def _check_dimension(self, z: Tensor) -> None:
        if self.k > z.shape[-1]:
            raise ValueError(f"k must be at most the dimension {z.shape[-1]}, got {self.k}")


@dataclass(frozen=True)
class ElasticCost(TranslationCost):
    """``rho / 2 |x - y|^2 + lam * reg(x - y)``.

    Args:
        reg: :class:`L1`, :class:`STVS`, :class:`KOverlap`, or any other :class:`Regularizer`.
        lam: weight of the regularizer.
        rho: weight of the quadratic. With STVS ``h`` is convex for ``lam <= 2 rho``.

    Raises:
        ValueError: ``lam`` is negative or ``rho`` is not positive.
    """

    reg: Regularizer = field(default_factory=L1)
    lam: float = 1.0
    rho: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lam >= 0 and self.rho > 0):
            raise ValueError(f"expected lam >= 0 and rho > 0, got lam={self.lam}, rho={self.rho}")

    def h(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return self.rho / 2 * z.square().sum(-1) + self.lam * self.reg(z)

    def grad_h_star(self, w: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``prox_{(lam / rho) reg}(w / rho)``."""
        return self.reg.prox(w / self.rho, self.lam / self.rho)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        x, y = widen(x), widen(y)
        return self.rho / 2 * SqEuclidean().pairwise(x, y) + self.lam * self.reg.pairwise(x, y)
