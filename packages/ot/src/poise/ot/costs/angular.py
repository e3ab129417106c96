"""Costs between directions: cosine and the geodesic distance on the unit sphere.

>>> import torch
>>> east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
>>> Cosine().pairwise(east, north).item(), round(SphereGeodesic().pairwise(east, north).item(), 4)
(1.0, 1.5708)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.arrays import full_precision, widen


@dataclass(frozen=True)
class Cosine:
    """``1 - <x, y> / (|x| |y| + ridge)``.

    Args:
        ridge: keeps the quotient finite at a zero vector; 1e-8 is OTT's value.
    """

    ridge: float = 1e-8

    def elementwise(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        x, y = widen(x), widen(y)
        norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
        return 1 - (x * y).sum(-1) / (norms + self.ridge)

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        x, y = widen(x), widen(y)
        norms_x = torch.linalg.vector_norm(x, dim=-1).unsqueeze(-1)
        norms_y = torch.linalg.vector_norm(y, dim=-1).unsqueeze(-2)
        with full_precision(x):
            return 1 - x @ y.mT / (norms_x * norms_y + self.ridge)


@dataclass(frozen=True)
class SphereGeodesic:
    """``arccos <x, y>`` for unit vectors, the length of the shorter arc; not OTT's ``Arccos``, which is another kernel.

    The inputs are taken to be unit vectors: divide by the norm first (``SphereMap`` does), then gradients with respect to
    what was divided are tangent to the sphere. Inner products are kept one rounding away from -1 and 1, where the slope
    of arccos is infinite: coinciding points get gradient 0 and a distance of 5e-4 in float32, 2e-8 in float64.
    """

    def elementwise(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        return self._arc((widen(x) * widen(y)).sum(-1))

    def pairwise(self, x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        with full_precision(x):
            return self._arc(widen(x) @ widen(y).mT)

    def _arc(self, cosine: Tensor) -> Tensor:
        margin = torch.finfo(cosine.dtype).eps
        return torch.arccos(cosine.clamp(-1 + margin, 1 - margin))
