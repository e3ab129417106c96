r"""Functions that compand: bounded, odd, increasing, steepest at zero, with their inverses.

>>> import torch
>>> v = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, 1e30])
>>> w = compand(v, a=2.0, b=1.0)
>>> [round(x, 4) for x in w.tolist()]
[-3.1416, -1.5708, 0.0, 1.5708, 3.1416]
>>> compand_inverse(w[1:4], a=2.0, b=1.0).tolist()
[-1.0, 0.0, 1.0]
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["arctan", "tanh", "softsign", "erf"]


class Shape(NamedTuple):
    """An odd, increasing function g with a limit: ``psi(v) = a g(v / b)``."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    limit: float


def _softsign_inverse(u: Tensor) -> Tensor:
    return u / (1 - u.abs())


SHAPES: dict[str, Shape] = {
    "arctan": Shape(torch.atan, lambda r: 1 / (1 + r * r), torch.tan, math.pi / 2),
    "tanh": Shape(torch.tanh, lambda r: 1 - torch.tanh(r).square(), torch.atanh, 1.0),
    "softsign": Shape(lambda r: r / (1 + r.abs()), lambda r: (1 + r.abs()) ** -2, _softsign_inverse, 1.0),
    "erf": Shape(torch.erf, lambda r: 2 / math.sqrt(math.pi) * torch.exp(-r * r), torch.erfinv, 1.0),
}
"""The function of the paper first; the others share its properties."""


def compand(
    v: Float[Tensor, "..."], a: float | Tensor, b: float | Tensor, kind: Kind = "arctan"
) -> Float[Tensor, "..."]:
    r"""The weight that a trained tensor stands for, elementwise: :math:`\psi(v) = a\, g(v / b)`, by default :math:`a \arctan(v / b)`.

    Below its bound for every v, infinite ones included, with gradients that are never NaN. Nothing but v, a and b is kept for the
    backward pass.

    Args:
        v: trained values of any shape.
        a: positive scale of the weights, a number or a tensor that broadcasts to v.
        b: positive scale of the trained values, likewise.
        kind: g: ``"arctan"`` (bound :math:`a \pi / 2`), ``"tanh"``, ``"softsign"`` (r / (1 + |r|)) or ``"erf"`` (bound a).

    Raises:
        ValueError: an unknown kind, or a number a or b that is not positive.
        TypeError: v is not floating-point.

    Source: Cakaj, Mehnert and Yang, IJCNN 2023, the reparameterization function.
    """
    shape_of(kind)
    if not v.is_floating_point():
        raise TypeError(f"v must be a floating-point tensor, got {v.dtype}")
    scale_a, scale_b = (_positive(name, value, v) for name, value in (("a", a), ("b", b)))
    companded: Tensor = _Compand.apply(v, scale_a, scale_b, kind)
    return companded


def compand_inverse(
    w: Float[Tensor, "..."], a: float | Tensor, b: float | Tensor, kind: Kind = "arctan"
) -> Float[Tensor, "..."]:
    r"""The trained values that stand for given weights: :math:`\psi^{-1}(w) = b\, g^{-1}(w / a)`, by default :math:`b \tan(w / a)`.

    Args:
        w: weights of any shape, each below the bound.
        a: as for :func:`compand`.
        b: as for :func:`compand`.
        kind: as for :func:`compand`.

    Raises:
        ValueError: a weight is not below the bound, so that no value stands for it; an unknown kind, or a number a or b that is
            not positive.
        TypeError: w is not floating-point.
    """
    shape = shape_of(kind)
    if not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor, got {w.dtype}")
    scale_a, scale_b = (_positive(name, value, w) for name, value in (("a", a), ("b", b)))
    u = w / scale_a
    if u.numel() and not bool((u.abs() < shape.limit).all()):
        raise ValueError(
            f"w must stay below {shape.limit:.4g} a in magnitude, where {kind} has its limit, got |w| / a up to "
            f"{float(u.detach().abs().max()):.4g}: choose a larger a"
        )
    return scale_b * shape.inverse(u)


class _Compand(torch.autograd.Function):
    """``a g(v / b)`` with gradients that stay finite where v / b is not.

    Autograd's own would multiply the slope 0 at infinity by infinity. This also keeps no intermediate result.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
        return a * _saturating(v / b, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        v, a, b, ctx.kind = inputs
        ctx.save_for_backward(v, a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        v, a, b = ctx.saved_tensors
        ratio = _bounded(v / b)
        to_v = gradient * (SHAPES[ctx.kind].slope(ratio) * (a / b))
        to_a = (gradient * _saturating(ratio, ctx.kind)).sum_to_size(a.shape) if ctx.needs_input_grad[1] else None
        to_b = -(to_v * ratio).sum_to_size(b.shape) if ctx.needs_input_grad[2] else None
        return to_v, to_a, to_b, None


def _bounded(ratio: Tensor) -> Tensor:
    """Values so large that every function is flat there, instead of larger ones."""
    return ratio.clamp(-1 / torch.finfo(ratio.dtype).eps, 1 / torch.finfo(ratio.dtype).eps)


def _saturating(ratio: Tensor, kind: str) -> Tensor:
    """``g(ratio)``, below its limit also after rounding."""
    shape = SHAPES[kind]
    most = shape.limit * (1 - 4 * torch.finfo(ratio.dtype).eps)
    return shape.value(_bounded(ratio)).clamp(-most, most)


def shape_of(kind: str) -> Shape:
    if kind not in SHAPES:
        raise ValueError(f"kind must be one of {', '.join(SHAPES)}, got {kind!r}")
    return SHAPES[kind]


def _positive(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A scale as a tensor; tensors are trusted, because looking at their numbers would wait for the device."""
    if isinstance(value, Tensor):
        return value
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
