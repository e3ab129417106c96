r"""A regularizer without a term in the loss: every weight passes through a bounded function that is steepest at zero.

Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023
(arXiv 2306.16993).

.. math:: w = \psi(v) = a \arctan(v / b), \qquad |w| < a \pi / 2, \qquad \psi'(v) = \frac{a b}{b^2 + v^2}

The network computes with w, the optimizer owns v. A gradient step moves w by :math:`\psi'(v)^2` times what it would have moved:
large weights freeze, so that none dominates; with a > b small ones move by up to :math:`(a / b)^2` times as much, so that they leave
zero and take part.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
>>> x, before = torch.ones(1, 8), model(torch.ones(1, 8))
>>> model = apply_weight_compander(model)
>>> torch.allclose(model(x), before, atol=1e-6)  # the network computes what it did
True
>>> groups = weight_compander_param_groups(model, lr=0.1, weight_decay=5e-4, lr_ab=0.01)
>>> optimizer = torch.optim.SGD(groups, momentum=0.9)
>>> model(x).square().sum().backward()
>>> optimizer.step()
>>> model = remove_weight_compander(model)  # plain weights again, at no cost
>>> type(model[0]) is nn.Linear
True

Weight decay acts on v, as every term does that an optimizer applies to its parameters; for a term in w, add it to the loss. A weight
that is used several times in a forward pass is computed once inside ``torch.nn.utils.parametrize.cached()``.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from poise.core.names import match_modules, plain_modules
from poise.core.weights.companding import SHAPES, Kind, compand, compand_inverse, shape_of


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

    Source: Cakaj, Mehnert and Yang, IJCNN 2023; that a and b are per tensor and kept positive by the exponential is a choice made here.
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
            raise ValueError(f"eps must lie between 0 and 1, got {eps}")
        self.kind, self.learnable, self.eps = kind, learnable, eps
        for name, value in (("a", a), ("b", b)):
            scale = torch.as_tensor(
                value, dtype=value.dtype if isinstance(value, Tensor) else torch.get_default_dtype()
            )
            if not bool(((scale > eps) & (scale < 1 / eps)).all()):
                raise ValueError(f"{name} must lie between eps = {eps:g} and 1 / eps, got {scale.tolist()}")
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


def apply_weight_compander(
    model: nn.Module,
    *,
    a: float | Literal["auto"] = "auto",
    b: float | Literal["auto"] = "auto",
    steepness: float = 1.0,
    learnable: bool = True,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    keep_function: bool = True,
    per_channel: bool = False,
    kind: Kind = "arctan",
) -> nn.Module:
    r"""Compand the weights of a model, in place: each gets its own a and b. What is no such weight stays as it is.

    The parameter objects stay the same ones, and hold the trained values v from now on, so that an optimizer made before goes on.

    Args:
        model: any module, wrapped or not.
        a: initial scale of the weights. ``"auto"``: four times the root mean square of the layer's weights, or more where its largest
            weight would come too close to the bound.
        b: initial scale of the trained values; ``"auto"``: a / ``steepness``.
        steepness: a / b, the slope at zero: with 1, only large weights are slowed; above, weights near zero are driven away from it.
        learnable: train a and b.
        include: names or patterns of the modules, see :mod:`poise.core.names`; by default every Linear, convolution and
            MultiheadAttention. Modules of any type are taken if they are named, for their ``weight``.
        exclude: names or patterns of modules to leave out.
        keep_function: start at the trained values that stand for the present weights, so that the network computes what it did. Else
            the present weights become the trained values, and the network's scale changes by about a / b per layer.
        per_channel: one a and b for each output channel, each from the channel's own weights.
        kind: see :func:`compand`.

    Returns:
        ``model``.

    Raises:
        ValueError: no weight is left, one is companded already, one belongs to several modules, or one is too large for a given a.

    Source: Cakaj, Mehnert and Yang, IJCNN 2023; the initial scales are a choice made here.
    """
    if steepness <= 0:
        raise ValueError(f"steepness must be positive, got {steepness}")
    chosen = list(_weights(model, include, tuple(exclude)))
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no weight to compand: none is left of the modules asked for")
    _check_owners(model, chosen)
    companders = []
    for weight in chosen:
        scale_a = _auto_scale(weight.tensor.detach(), SHAPES[kind].limit, per_channel) if a == "auto" else a
        scale_b = scale_a / steepness if b == "auto" else b
        compander = WeightCompander(scale_a, scale_b, learnable=learnable, kind=kind).to(weight.tensor)
        companders.append((weight, compander, _start(weight, compander, keep_function)))
    for weight, compander, start in companders:  # nothing was changed before all of them turned out to be possible
        with torch.no_grad():
            weight.tensor.zero_()  # the inverse that registering takes is that of zero
            parametrize.register_parametrization(weight.module, weight.attribute, compander)
            weight.tensor.copy_(start)
    return model


def remove_weight_compander(model: nn.Module) -> nn.Module:
    """Make the companded weights plain parameters again, in place: the network computes the same, at no cost.

    Other parametrizations of the same weight are removed with it.

    Returns:
        ``model``.

    Raises:
        ValueError: there is none.
    """
    found = list(_companded(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no companded weight")
    for _, module, attribute, _ in found:
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return model


def weight_compander_param_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_ab: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: all parameters but a and b, then a and b, which must not decay.

    Args:
        model: a companded model.
        lr: learning rate of the first group.
        weight_decay: of the first group, where it acts on the trained values v and on all that is not companded.
        lr_ab: learning rate of a and b; ``lr`` by default.

    Raises:
        ValueError: the model has no companded weight.
    """
    found = list(_companded(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no companded weight")
    scales = {id(scale): scale for _, _, _, compander in found for scale in compander.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in scales]
    groups = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if scales:
        groups.append({"params": list(scales.values()), "lr": lr if lr_ab is None else lr_ab, "weight_decay": 0.0})
    return groups


@dataclass(frozen=True)
class CompandedWeight:
    """What a companded weight is like.

    Attributes:
        a: scale of the weights, a list if there is one per channel.
        b: scale of the trained values, likewise.
        largest: largest magnitude of a weight.
        near_zero: share of weights below the threshold in magnitude.
        saturated: share of weights above 95 % of their bound.
    """

    a: float | list[float]
    b: float | list[float]
    largest: float
    near_zero: float
    saturated: float


@torch.no_grad()
def compander_report(model: nn.Module, near_zero: float = 0.01) -> dict[str, CompandedWeight]:
    """What the companded weights are like, by name.

    Args:
        model: a companded model.
        near_zero: magnitude below which a weight counts as near zero.
    """
    report = {}
    for name, module, attribute, compander in _companded(model):
        magnitude = getattr(module, attribute).abs()
        a, b = (scale.flatten().tolist() for scale in (compander.a, compander.b))
        report[name] = CompandedWeight(
            a=a if len(a) > 1 else a[0],
            b=b if len(b) > 1 else b[0],
            largest=float(magnitude.max()),
            near_zero=float((magnitude < near_zero).double().mean()),
            saturated=float((magnitude > 0.95 * compander.bound).double().mean()),
        )
    return report


class _Weight(NamedTuple):
    """A tensor to compand."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor


def _weights(model: nn.Module, include: Iterable[str] | None, exclude: tuple[str, ...]) -> Iterator[_Weight]:
    """The tensors of the modules asked for, each module once."""
    if include is None:
        kinds = (nn.Linear, _ConvNd, nn.MultiheadAttention)
        named = plain_modules(model)
        modules = {name: named[name] for name in named if isinstance(named[name], kinds)}
    else:
        modules = match_modules(model, *include)
    seen = set(match_modules(model, *exclude).values()) if exclude else set()
    for name, module in modules.items():
        if module in seen:
            continue
        seen.add(module)
        projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for attribute in projections if isinstance(module, nn.MultiheadAttention) else ("weight",):
            tensor = getattr(module, attribute, None)
            if isinstance(tensor, Tensor):
                yield _Weight(f"{name}.{attribute}".lstrip("."), module, attribute, tensor)


def _check_owners(model: nn.Module, chosen: list[_Weight]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{attribute}".lstrip("."))
    for weight in chosen:
        if parametrize.is_parametrized(weight.module, weight.attribute):
            raise ValueError(f"{weight.name} is parametrized already: remove that first")
        if len(names := owners[id(weight.tensor)]) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tensor, which would be companded for one of them only: exclude it"
            )


def _auto_scale(weight: Tensor, limit: float, per_channel: bool) -> Tensor:
    """Four times the root mean square, but so much that the largest weight stays below five sixths of the bound.

    A tensor of zeros, as residual branches often start with, has the scale of a usual initialization.
    """
    rest = tuple(range(1, weight.dim())) if per_channel else tuple(range(weight.dim()))
    size = weight.square().mean(rest, keepdim=per_channel).sqrt()
    size = torch.where(size > 0, size, weight[0].numel() ** -0.5)
    return torch.maximum(4 * size, 1.2 / limit * weight.abs().amax(rest, keepdim=per_channel))


def _start(weight: _Weight, compander: WeightCompander, keep_function: bool) -> Tensor:
    """The first trained values."""
    if not keep_function:
        return weight.tensor.detach().clone()
    try:
        return compander.right_inverse(weight.tensor.detach()).detach()
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from error


def _companded(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightCompander]]:
    """Name, module, attribute and reparametrization of every companded weight."""
    for name, module in plain_modules(model).items():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations = module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        for attribute, chain in parametrizations.items():
            for compander in chain.children():
                if isinstance(compander, WeightCompander):
                    yield f"{name}.{attribute}".lstrip("."), module, attribute, compander
