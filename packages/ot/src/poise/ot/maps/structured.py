r"""Networks whose outputs have the form that the theory of optimal maps asks for.

For a cost ``c(x, y) = h(x - y)`` with strictly convex ``h`` the optimal map is ``T(x) = x - grad h*(grad f(x))`` for some potential
``f``; on the sphere with the geodesic cost images stay on the sphere. A structured map writes that form into the network:

- :class:`StructuredMap`: ``T(x) = x - grad h*(F(x))`` with a vector field ``F`` that :class:`ConservativePenalty` keeps close to a
  gradient field,
- :class:`SphereMap`: ``T(x) = F(x) / |F(x)|``.

Uscidda and Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML 2023, arXiv 2302.04953.

>>> import torch
>>> from poise.ot import ConservativePenalty, SqEuclidean, StructuredMap
>>> field = torch.nn.Linear(2, 2)
>>> transport = StructuredMap(SqEuclidean(), field)
>>> conservative = ConservativePenalty(field, weight=0.1)
>>> x = torch.randn(16, 2)
>>> transport(x).shape, conservative(x, generator=torch.Generator().manual_seed(0)).shape
(torch.Size([16, 2]), torch.Size([]))
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule


@runtime_checkable
class InvertibleCost(Protocol):
    """A cost ``h(x - y)`` with a strictly convex ``h``: the gradient of the conjugate inverts that of ``h``."""

    def grad_h_star(self, w: Tensor, /) -> Tensor:
        """The gradient of the conjugate of ``h``, point by point."""
        ...


class StructuredMap(nn.Module):
    r"""``T(x) = x - grad h*(F(x))``, the form of every optimal map for the cost ``h(x - y)``.

    ``T`` is c-optimal when ``F`` is the gradient of a c-concave potential. The Monge gap asks for that as a whole;
    :class:`ConservativePenalty` asks for its local part, that ``F`` be a gradient field at all.

    Args:
        cost: a cost with ``grad_h_star``: ``SqEuclidean``, ``PNormP``, ``SqPNorm``, ``ElasticCost``.
        net: the field ``F``, maps ``(..., d)`` to ``(..., d)``.

    Raises:
        TypeError: ``cost`` has no ``grad_h_star``.
        ValueError: in the forward pass, when ``net`` does not keep the shape.

    Source:
        Uscidda and Cuturi 2023, structured Monge maps.
    """

    def __init__(self, cost: InvertibleCost, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not isinstance(cost, InvertibleCost):
            raise TypeError(
                f"cost must be h(x - y) with a strictly convex h and offer grad_h_star, got {type(cost).__name__}"
            )
        self.cost = cost
        self.net = net

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x - self.cost.grad_h_star(_field(self.net, x))


class SphereMap(nn.Module):
    r"""``T(x) = F(x) / |F(x)|``, a map into the unit sphere; its Jacobian is tangent to the sphere at ``T(x)``.

    Args:
        net: the field ``F``, maps ``(..., d)`` to ``(..., d)``. Where it vanishes the direction is undefined and ``T`` is 0.
        eps: the norm below which the division is by ``eps``, so that values and gradients stay finite.

    Source:
        Uscidda and Cuturi 2023, maps on the sphere.
    """

    def __init__(self, net: Callable[[Tensor], Tensor], eps: float = 1e-6) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.net = net
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return nn.functional.normalize(_field(self.net, x), dim=-1, eps=self.eps)


class ConservativePenalty(Penalty):
    r"""Distance of a vector field from being a gradient field: the mean of ``|J_F(x) - J_F(x)^T|^2``.

    Estimated by Hutchinson's trick with Rademacher probes: ``E_v |J v - J^T v|^2 = |J - J^T|_F^2``. One probe costs a backward
    pass and one through it for the whole batch, whatever the dimension.

    Args:
        field: ``F``, maps ``(..., d)`` to ``(..., d)`` row by row: layers that mix samples (batch normalisation in training mode)
            have no Jacobian per sample. A module becomes part of the penalty.
        weight: a number or a schedule.
        probes: number of probes per sample when none are given.

    Source:
        Uscidda and Cuturi 2023, the regularizer that accompanies structured maps.
    """

    def __init__(self, field: Callable[[Tensor], Tensor], weight: float | Schedule = 1.0, *, probes: int = 1) -> None:
        super().__init__(weight)
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        self.field = field
        self.probes = probes

    def penalty(
        self, x: Float[Tensor, "*batch d"], probes: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """The estimate at the points ``x``.

        Args:
            x: where to measure, ``(..., d)``.
            probes: the draw of ``v``, ``(k, ..., d)``; drawn when left out.
            generator: where to draw the probes from, on its own device; the default generator when left out.

        Raises:
            ValueError: ``x`` is empty, ``probes`` has no draw or not the shape of ``x`` after its first axis, or the field does not
                keep the shape.
            TypeError: ``probes`` are of another type than ``x``.
        """
        if x.numel() == 0:
            raise ValueError(f"x must hold points, got shape {tuple(x.shape)}")
        if probes is None:
            probes = rademacher((self.probes, *x.shape), like=x, generator=generator)
        if probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape or len(probes) == 0:
            raise ValueError(f"probes must have shape (k, {', '.join(map(str, x.shape))}), got {tuple(probes.shape)}")
        if probes.dtype != x.dtype:
            raise TypeError(f"probes must be of the type of x, {x.dtype}, got {probes.dtype}")
        forward, backward = self._products(x.repeat(len(probes), *[1] * x.ndim), probes.detach())
        skew = forward - backward
        precise = skew.float() if skew.dtype in (torch.float16, torch.bfloat16) else skew
        return precise.square().sum(-1).mean().to(x.dtype)

    def _products(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``J v`` and ``J^T v``; the former as the derivative of ``<J^T u, v>`` in ``u``, so that reverse mode is enough."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            u = v.clone().requires_grad_()
            value = _field(self.field, x) + 0 * x  # a constant field has a Jacobian too
            (backward,) = torch.autograd.grad(value, x, u, create_graph=True)
            (forward,) = torch.autograd.grad(backward, u, v, create_graph=differentiable)
        return forward, backward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, probes={self.probes}"


def rademacher(shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent signs, +1 or -1 with equal probability, of the dtype and on the device of ``like``.

    Args:
        shape: shape of the result.
        like: gives dtype and device.
        generator: where to draw from; a generator of another device draws there, so that a CPU seed means the same everywhere.
    """
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, shape, generator=generator, device=device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def _field(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = net(x)
    if value.shape != x.shape:
        raise ValueError(f"the field must keep the shape of its input, got {tuple(x.shape)} -> {tuple(value.shape)}")
    return value
