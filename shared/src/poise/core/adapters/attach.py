"""Attach adapters to the layers of a model."""

from collections.abc import Callable

from torch import nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.delta import Delta
from poise.core.adapters.handle import Adapters, adapted_layers
from poise.core.adapters.targets import ALL_LINEAR, Patterns, find_targets, replace_module
from poise.core.names import match_modules


def attach_adapters(
    model: nn.Module,
    build: Callable[[str, nn.Module], Delta],
    include: Patterns = ALL_LINEAR,
    exclude: Patterns = (),
    *,
    name: str = "default",
    train_base: bool = False,
    train: tuple[str, ...] = (),
) -> Adapters:
    """Give every chosen layer of a model a delta, in place. If anything is wrong the model stays as it was.

    Args:
        model: any model; layers that have adapters already get another one.
        build: makes the delta of a layer from its plain name and the layer.
        include: which layers, see :mod:`poise.core.adapters.targets`.
        exclude: which of them to leave out.
        name: of the adapter.
        train_base: keep training what was trained. By default everything but adapters and ``train`` is frozen.
        train: names or globs of modules that stay trainable, such as a new head.

    Returns:
        The handle of the new adapter.

    Raises:
        ValueError: as for :func:`~poise.core.find_targets`, a layer has a delta of this name, ``train`` matches nothing, or the
            delta does not fit the layer.
    """
    targets = find_targets(model, include, exclude)
    for target, module in targets.items():
        if isinstance(module, AdaptedLayer):
            if module.merged:
                raise RuntimeError(f"{target!r} is merged: unmerge it to add an adapter")
            if name in module.deltas:
                raise ValueError(f"{target!r} has an adapter {name!r} already: choose another name")
    stays = (
        [parameter for part in match_modules(model, *train).values() for parameter in part.parameters()]
        if train
        else []
    )
    layers = {target: module.base if isinstance(module, AdaptedLayer) else module for target, module in targets.items()}
    deltas = {target: _built(build, target, layer) for target, layer in layers.items()}
    wrapped = {
        target: module if isinstance(module, AdaptedLayer) else AdaptedLayer(module)
        for target, module in targets.items()
    }
    if not train_base:
        _freeze(model, stays)
    for target, module in targets.items():
        if module is not wrapped[target]:
            replace_module(model, module, wrapped[target])
        wrapped[target].add(name, deltas[target])
    return Adapters(model, name)


def _built(build: Callable[[str, nn.Module], Delta], name: str, layer: nn.Module) -> Delta:
    try:
        return build(name, layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _freeze(model: nn.Module, stays: list[nn.Parameter]) -> None:
    adapters = [p for layer in adapted_layers(model).values() for p in layer.deltas.parameters()]
    kept = {id(parameter) for parameter in (*stays, *adapters)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
