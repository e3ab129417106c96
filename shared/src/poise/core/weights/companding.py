r"""Functions that compand: bounded, odd, increasing, steepest at zero, with their inverses; as a parametrization of one tensor.

>>> import torch
>>> from torch import nn
>>> from torch.nn.utils import parametrize
>>> v = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, 1e30])
>>> w = compand(v, a=2.0, b=1.0)
>>> [round(x, 4) for x in w.tolist()]
[-3.1416, -1.5708, 0.0, 1.5708, 3.1416]
>>> compand_inverse(w[1:4], a=2.0, b=1.0).tolist()
[-1.0, 0.0, 1.0]
>>> layer = nn.Linear(4, 3)
>>> layer = parametrize.register_parametrization(layer, "weight", WeightCompander(a=1.0, b=0.5))
>>> bool((layer.weight.abs() < torch.pi / 2).all())
True
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["arctan", "tanh", "softsign", "erf"]


class Shape(NamedTuple):
    """An odd, increasing function g with a limit: ``psi(v) = a g(v / b)``.

    Attributes:
        value_: ``g(r)``, in the place of r.
        flatness_: the reciprocal of the slope, ``1 / g'(r)``, in the place of r; infinite where g is flat to rounding.
        inverse: of g.
        limit: of g at infinity.
    """

    value_: Callable[[Tensor], Tensor]
    flatness_: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    limit: float


SHAPES: dict[str, Shape] = {
    "arctan": Shape(
        value_=torch.atan_,
        flatness_=lambda r: r.square_().add_(1),
        inverse=torch.tan,
        limit=math.pi / 2,
    ),
    "tanh": Shape(
        value_=torch.tanh_,
        flatness_=lambda r: r.cosh().square(),
        inverse=torch.atanh,
        limit=1.0,
    ),
    "softsign": Shape(
        value_=lambda r: 1 / (1 / r + r.sign()),  # r / (1 + |r|), and 1 at infinity
        flatness_=lambda r: (1 + r.abs()).square(),
        inverse=lambda u: u / (1 - u.abs()),
        limit=1.0,
    ),
    "erf": Shape(
        value_=torch.erf_,
        flatness_=lambda r: math.sqrt(math.pi) / 2 * r.square().exp(),
        inverse=torch.erfinv,
        limit=1.0,
    ),
}
"""The function of the paper first; the others share its properties."""


def compand(
    v: Float[Tensor, "..."], a: float | Tensor, b: float | Tensor, kind: Kind = "arctan"
) -> Float[Tensor, "..."]:
    r"""The weight that a trained tensor stands for, elementwise: :math:`\psi(v) = a\, g(v / b)`, by default :math:`a \arctan(v / b)`.

    Below its bound for every v, infinite ones included, with gradients that are never NaN; differentiable to any order in reverse
    mode. What is kept for the backward pass exists anyway: v, and w, with which the gradient needs no second arctangent.

    Args:
        v: trained values of any shape.
        a: positive scale of the weights, a number or a tensor that broadcasts to v.
        b: positive scale of the trained values, likewise.
        kind: g: ``"arctan"`` (bound :math:`a \pi / 2`), ``"tanh"``, ``"softsign"`` (r / (1 + |r|)) or ``"erf"`` (bound a).

    Raises:
        ValueError: an unknown kind, a number a or b that is not positive, or a tensor that does not broadcast to v.
        TypeError: v is not floating-point.

    Source:
        Cakaj, Mehnert and Yang, IJCNN 2023, the reparameterization function.
    """
    shape_of(kind)
    if not v.is_floating_point():
        raise TypeError(f"v must be floating-point, got {v.dtype}")
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
        ValueError: a weight is not below the bound, so that no value stands for it; else as for :func:`compand`.
        TypeError: w is not floating-point.
    """
    shape = shape_of(kind)
    if not w.is_floating_point():
        raise TypeError(f"w must be floating-point, got {w.dtype}")
    scale_a, scale_b = (_positive(name, value, w) for name, value in (("a", a), ("b", b)))
    u = w / scale_a
    if u.numel() and not bool((u.abs() < shape.limit).all()):
        raise ValueError(
            f"w must stay below {shape.limit:.4g} a in magnitude, where {kind} has its limit, got |w| / a up to "
            f"{float(u.detach().abs().max()):.4g}: choose a larger a"
        )
    return scale_b * shape.inverse(u)


class WeightCompander(nn.Module):
    r"""The reparametrization of one tensor, for ``torch.nn.utils.parametrize``, with its own a and b.

    Both are kept as logarithms, so that they stay positive whatever an optimizer does to them.

    Args:
        a: initial scale of the weights: a number for the whole tensor, or a tensor that broadcasts to it (one entry per channel).
        b: initial scale of the trained values, likewise.
        learnable: train a and b, as in the paper's extension; else they are buffers.
        kind: see :func:`compand`.
        eps: least value of a and b; they stay below 1 / eps.

    Raises:
        ValueError: a or b is not between eps and 1 / eps, eps is not between 0 and 1, or an unknown kind.

    Source:
        Cakaj, Mehnert and Yang, IJCNN 2023; that a and b are per tensor and kept positive by the exponential is a choice made here.
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        a: float | Tensor = 1.0,
        b: float | Tensor = 1.0,
        *,
        learnable: bool = True,
        kind: Kind = "arctan",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        shape_of(kind)
        if not 0 < eps < 1:
            raise ValueError(f"eps must lie in (0, 1), got {eps}")
        self.kind, self.learnable, self.eps = kind, learnable, eps
        for name, value in (("a", a), ("b", b)):
            scale = torch.as_tensor(value)
            if not bool(((scale > eps) & (scale < 1 / eps)).all()):
                raise ValueError(f"{name} must lie in [eps, 1 / eps] with eps = {eps:g}, got {scale.tolist()}")
            log = (scale.detach() - eps).log()
            if learnable:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    @property
    def a(self) -> Tensor:
        """Scale of the weights, at present."""
        return self._scale(self.log_a)

    @property
    def b(self) -> Tensor:
        """Scale of the trained values, at present."""
        return self._scale(self.log_b)

    @property
    def bound(self) -> Tensor:
        """What all weights stay below in magnitude, a pi / 2 for arctan."""
        return self.a * SHAPES[self.kind].limit

    def forward(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weights."""
        return compand(v, self.a, self.b, self.kind)

    def right_inverse(self, w: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The trained values of given weights; used when a weight is assigned.

        Raises:
            ValueError: a weight is not below the bound.
        """
        return compand_inverse(w, self.a, self.b, self.kind)

    def _scale(self, log: Tensor) -> Tensor:
        return self.eps + log.clamp(max=-math.log(self.eps)).exp()

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, learnable={self.learnable}"


class _Compand(torch.autograd.Function):
    """``a g(v / b)``, evaluated once: the gradient with respect to a needs ``g(v / b)`` again, which is ``w / a``.

    In place where there is a tensor to spare: for a few weights per layer, fresh memory costs more time than arithmetic.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
        most = SHAPES[kind].limit * (1 - 4 * torch.finfo(v.dtype).eps)  # below the limit also after rounding
        return F.hardtanh_(SHAPES[kind].value_(v / b), -most, most) * a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        v, a, b, ctx.kind = inputs
        ctx.save_for_backward(v, a, b, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        v, a, b, w = ctx.saved_tensors
        to_v = gradient / SHAPES[ctx.kind].flatness_(v / b) * (a / b)
        to_a = _summed(gradient, w, a.shape) / a if ctx.needs_input_grad[1] else None
        # An infinite v has a gradient of 0, and 0 times it is to be 0.
        to_b = -_summed(to_v, _finite(v), b.shape) / b if ctx.needs_input_grad[2] else None
        return to_v, to_a, to_b, None


def _summed(x: Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    """The product, summed to a shape; of one number, without the product in between."""
    if math.prod(shape) == 1 and x.dtype in (torch.float32, torch.float64):
        return x.flatten().dot(y.flatten()).view(shape)
    return (x * y).sum_to_size(shape)


def _finite(v: Tensor) -> Tensor:
    most = torch.finfo(v.dtype).max
    return v.clamp(-most, most)


def shape_of(kind: str) -> Shape:
    if kind not in SHAPES:
        raise ValueError(f"kind must be one of {', '.join(SHAPES)}, got {kind!r}")
    return SHAPES[kind]


def _positive(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A scale as a tensor; the numbers in one are trusted, because looking at them would wait for the device."""
    if isinstance(value, Tensor):
        if torch.broadcast_shapes(value.shape, like.shape) != like.shape:
            raise ValueError(f"{name} must broadcast to {tuple(like.shape)}, got shape {tuple(value.shape)}")
        return value
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return like.new_tensor(value)
