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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from poise.core.names import match_modules, plain_modules, unwrap
from poise.core.weights.companding import Kind, WeightCompander, shape_of

Scale = float | Literal["auto"] | Callable[[Tensor], float | Tensor]
"""A number, a rule that is left to this module, or a function of a layer's weights."""


def apply_weight_compander(
    model: nn.Module,
    *,
    a: Scale = "auto",
    b: Scale = "auto",
    steepness: float = 1.0,
    learnable: bool = True,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    keep_function: bool = True,
    per_channel: bool = False,
    kind: Kind = "arctan",
) -> nn.Module:
    r"""Compand the weights of a model, in place: each gets its own a and b. What is no such weight stays as it is.

    The parameter objects stay the same ones and hold the trained values v from now on; a and b are new ones, which an optimizer made
    before does not know.

    Args:
        model: any module; DistributedDataParallel comes afterwards.
        a: initial scale of the weights: a number, or a function of a layer's weights. ``"auto"``: four times their root mean square,
            or more where the largest of them would come too close to the bound.
        b: initial scale of the trained values, likewise; ``"auto"``: a / ``steepness``.
        steepness: a / b, the slope at zero: with 1, only large weights are slowed; above, weights near zero are driven away from it.
        learnable: train a and b.
        include: names or patterns of modules, see :mod:`poise.core.names`. By default, and among those that a pattern matches, every
            Linear, convolution and MultiheadAttention is taken; a module of any other type if it is named in full, for its ``weight``.
        exclude: names or patterns of modules to leave out.
        keep_function: start at the trained values that stand for the present weights, so that the network computes what it did. Else
            the present weights become the trained values, and the network's scale changes by about a / b per layer.
        per_channel: one a and b for each output channel; ``"auto"`` then looks at the channel's own weights.
        kind: see :func:`~poise.core.weights.companding.compand`.

    Returns:
        ``model``.

    Raises:
        ValueError: no weight is left, one is parametrized already, one belongs to several modules, or one is too large for a given a;
            a steepness that is not positive, or next to a b; learned scales inside DistributedDataParallel, which would not
            synchronize them. The model is then as it was.

    Source:
        Cakaj, Mehnert and Yang, IJCNN 2023; the initial scales are a choice made here.
    """
    if steepness <= 0 or (steepness != 1 and b != "auto"):
        raise ValueError(f"steepness must be positive, and goes with b='auto', got {steepness} and b={b}")
    if learnable and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "compand the model before DistributedDataParallel, which does not synchronize a and b otherwise"
        )
    chosen = list(_weights(model, include, tuple(exclude)))
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no weight to compand: none is left of the modules asked for")
    _check_owners(model, chosen)
    limit = shape_of(kind).limit
    companders = []
    for weight in chosen:
        scale_a = _automatic(weight, limit, per_channel) if a == "auto" else _given(a, weight, per_channel)
        scale_b = scale_a / steepness if b == "auto" else _given(b, weight, per_channel)
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
        bound: what the weights stay below, the largest of them if there is one per channel.
        largest: largest magnitude of a weight.
        near_zero: share of weights below the threshold in magnitude.
        saturated: share of weights above 95 % of their bound.
    """

    a: float | list[float]
    b: float | list[float]
    bound: float
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
            bound=float(compander.bound.max()),
            largest=float(magnitude.max()),
            near_zero=float((magnitude < near_zero).float().mean()),
            saturated=float((magnitude > 0.95 * compander.bound).float().mean()),
        )
    return report


class _Weight(NamedTuple):
    """A tensor to compand; ``channels`` is its axis of output channels."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor
    channels: int


def _weights(model: nn.Module, include: Iterable[str] | None, exclude: tuple[str, ...]) -> Iterator[_Weight]:
    """The tensors of the modules asked for, each module once."""
    named = plain_modules(model) if include is None else match_modules(model, *(patterns := tuple(include)))
    in_full = frozenset() if include is None else frozenset(patterns)
    seen = {unwrap(module) for module in match_modules(model, *exclude).values()} if exclude else set()
    for name, wrapped in named.items():
        module = unwrap(wrapped)
        if module in seen or not (name in in_full or isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention)):
            continue
        seen.add(module)
        projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for attribute in projections if isinstance(module, nn.MultiheadAttention) else ("weight",):
            tensor = getattr(module, attribute, None)
            if isinstance(tensor, Tensor):
                channels = 1 if isinstance(module, _ConvTransposeNd) else 0
                yield _Weight(f"{name}.{attribute}".lstrip("."), module, attribute, tensor, channels)


def _check_owners(model: nn.Module, chosen: list[_Weight]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{attribute}".lstrip("."))
    for weight in chosen:
        if parametrize.is_parametrized(weight.module, weight.attribute):
            raise ValueError(f"{weight.name} is parametrized already: remove that first")
        if id(weight.tensor) not in owners:
            raise ValueError(f"{weight.name} is no parameter, so that nothing would train it")
        if len(names := owners[id(weight.tensor)]) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tensor, which would be companded for one of them only: exclude it"
            )


def _automatic(weight: _Weight, limit: float, per_channel: bool) -> Tensor:
    """Four times the root mean square, but so much that the largest weight stays below five sixths of the bound.

    A tensor of zeros, as residual branches often start with, has the scale of a usual initialization.
    """
    values = weight.tensor.detach()
    rest = tuple(axis for axis in range(values.dim()) if not (per_channel and axis == weight.channels))
    size = values.square().mean(rest, keepdim=per_channel).sqrt()
    size = torch.where(size > 0, size, (values.numel() / values.shape[weight.channels]) ** -0.5)
    return torch.maximum(4 * size, 1.2 / limit * values.abs().amax(rest, keepdim=per_channel))


def _given(scale: Scale, weight: _Weight, per_channel: bool) -> Tensor:
    """A scale that was asked for, for each channel if there is one for each."""
    values = weight.tensor.detach()
    value = torch.as_tensor(scale(values) if callable(scale) else scale)
    if not per_channel:
        return value
    one_each = [size if axis == weight.channels else 1 for axis, size in enumerate(values.shape)]
    return value.expand(torch.broadcast_shapes(value.shape, one_each)).clone()


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
    for name, wrapped in plain_modules(model).items():
        module = unwrap(wrapped)
        if not parametrize.is_parametrized(module):
            continue
        parametrizations = module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        for attribute, chain in parametrizations.items():
            for compander in chain.children():
                if isinstance(compander, WeightCompander):
                    yield f"{name}.{attribute}".lstrip("."), module, attribute, compander
