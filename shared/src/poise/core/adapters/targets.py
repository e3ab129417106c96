r"""Choose layers by name and kind, read and replace them.

A pattern is one of

- ``"all-linear"``: every Linear and ``Conv1D`` layer, without output embeddings and layers with tied weights; the query, key and
  value projections of ``nn.MultiheadAttention`` are one parameter and no layer, so they are never among them;
- a name or its end after a dot, ``"query"`` or ``"attention.query"``, as in ``target_modules`` of Hugging Face peft;
- a glob on the same, where ``*`` stands for any part of one component and ``**`` for any number of components: ``"blocks.*.mlp.fc?"``;
- a compiled regular expression, matched with the whole name;
- a function of the name and the module.

>>> from torch import nn
>>> model = nn.ModuleDict({"attn": nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)})
>>> list(find_targets(model, "all-linear", exclude="head")), list(find_targets(model, ["query"]))
(['attn.query', 'attn.key'], ['attn.query'])
>>> find_targets(model, "quarry")
Traceback (most recent call last):
    ...
ValueError: no layer matches 'quarry'; names like it: ['query']
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from poise.core.names import match_modules, plain_modules, unwrap

Kind = Literal["linear", "conv1d", "conv2d"]
"""Linear, the ``Conv1D`` of Hugging Face transformers (a Linear layer that stores the transpose), and Conv2d."""

Pattern = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]

ALL_LINEAR = "all-linear"


class AdaptedModule(nn.Module):
    """Base of what stands in the place of a layer that carries adapters.

    Attributes:
        base: the layer.
    """

    base: nn.Module


def layer_kind(module: nn.Module) -> Kind | None:
    """Which kind of layer that can be adapted a module is; None for every other module.

    Args:
        module: any module; subclasses count as what they derive from, and an adapted layer as the layer. transformers is not imported.
    """
    if isinstance(module, AdaptedModule):
        return layer_kind(module.base)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d) and not isinstance(module, nn.ConvTranspose2d):
        return "conv2d"
    if any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf"):
        return "conv1d"
    return None


def find_targets(
    model: nn.Module,
    include: Patterns = ALL_LINEAR,
    exclude: Patterns = (),
    *,
    types: tuple[type[nn.Module], ...] | None = None,
    tied: Literal["raise", "allow"] = "raise",
) -> dict[str, nn.Module]:
    """The layers to adapt by plain name, in the model's order. A layer that occurs under several names is given once.

    Args:
        model: any model, wrapped or not.
        include: which layers, see the module's text. The model itself is never chosen, nor what is inside an adapted layer.
        exclude: which of them to leave out; a pattern may match nothing.
        types: restrict the choice to these types of layers.
        tied: whether a layer that shares its weight with another module, chosen by name, is an error.

    Raises:
        ValueError: a pattern of ``include`` matches no layer, nothing is left, or a chosen layer has a tied or quantised weight.
        TypeError: a pattern is none of the kinds above.
    """
    everything = plain_modules(model)
    adapted = tuple(f"{name}." for name, module in everything.items() if isinstance(module, AdaptedModule))
    named = {name: module for name, module in everything.items() if name and not name.startswith(adapted)}
    shared = tied_layers(model)
    outputs = _output_embeddings(model)
    chosen: set[str] = set()
    for pattern in _listed(include):
        if isinstance(pattern, str) and pattern == ALL_LINEAR:
            chosen |= {
                name
                for name, module in named.items()
                if layer_kind(module) in ("linear", "conv1d") and name not in shared and module is not outputs
            }
            continue
        found = _matching(model, named, pattern)
        layers = {name for name in found if layer_kind(named[name]) is not None}
        if not found:
            raise ValueError(f"no layer matches {_shown(pattern)}; names like it: {_close(pattern, named)}")
        if not layers:
            kinds = sorted({type(named[name]).__name__ for name in found})
            raise ValueError(
                f"{_shown(pattern)} matches only {', '.join(kinds)}, expected Linear, Conv2d or Conv1D layers"
            )
        chosen |= layers
    for pattern in _listed(exclude):
        if isinstance(pattern, str) and pattern == ALL_LINEAR:
            raise ValueError(f"exclude names single layers, got {ALL_LINEAR!r}")
        chosen -= _matching(model, named, pattern)
    names: dict[nn.Module, str] = {}
    for name, module in named.items():
        if name in chosen and (types is None or isinstance(module, types)):
            names.setdefault(module, name)
    targets = {name: module for module, name in names.items()}
    if not targets:
        raise ValueError(f"no layer is left to adapt of those that match {_shown(include)}")
    for name, module in targets.items():
        if tied == "raise" and name in shared:
            raise ValueError(
                f"the weight of {name!r} is shared with {', '.join(map(repr, shared[name]))}: exclude it, or untie it"
            )
        _check_weight(name, module)
    return targets


def tied_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layers whose weight belongs to another module too: by plain name, the names of the others' tensors.

    Args:
        model: any model. One module under several names is no tie.
    """
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    seen: set[nn.Module] = set()
    for name, module in plain_modules(model).items():
        if module in seen:
            continue
        seen.add(module)
        for tensor_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((f"{name}.{tensor_name}".lstrip("."), module))
    tied: dict[str, tuple[str, ...]] = {}
    for holders in owners.values():
        for name, module in holders if len(holders) > 1 else ():
            if layer_kind(module) is not None and name.endswith(".weight"):
                tied[name.removesuffix(".weight")] = tuple(other for other, _ in holders if other != name)
    return tied


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, wherever the model holds it.

    Args:
        model: the model around it.
        old: a module inside the model.
        new: what takes its place.

    Raises:
        ValueError: ``old`` is the model itself or not inside it.
    """
    holders = [
        (parent, child)
        for parent in list(model.modules())
        for child, module in parent._modules.items()
        if module is old and parent is not new
    ]
    if not holders:
        raise ValueError(f"the {type(old).__name__} to replace is not inside the model, or is the model itself")
    for parent, child in holders:
        setattr(parent, child, new)


def weight_matrix(module: nn.Module) -> Shaped[Tensor, "outputs inputs"]:
    """The weight of a layer as a matrix with a row per output; a view. Kernels of a convolution are flattened.

    Args:
        module: a layer that can be adapted.

    Raises:
        TypeError: it is of another kind.
    """
    kind = layer_kind(module)
    if kind is None:
        raise TypeError(f"module must be a Linear, Conv2d or Conv1D layer, got {type(module).__name__}")
    weight = cast(Tensor, module.weight)
    return weight.mT if kind == "conv1d" else weight.flatten(1)


def as_weight(module: nn.Module, matrix: Float[Tensor, "outputs inputs"]) -> Tensor:
    """A matrix with a row per output in the layout of the layer's weight.

    Args:
        module: a layer that can be adapted.
        matrix: as :func:`weight_matrix` gives it.
    """
    return matrix.mT if layer_kind(module) == "conv1d" else matrix.view_as(cast(Tensor, module.weight))


def _listed(patterns: Patterns) -> Iterator[Pattern]:
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        yield patterns
        return
    yield from patterns


def _matching(model: nn.Module, named: dict[str, nn.Module], pattern: Pattern) -> set[str]:
    if isinstance(pattern, re.Pattern):
        return {name for name in named if pattern.fullmatch(name)}
    if callable(pattern):
        return {name for name, module in named.items() if pattern(name, module)}
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is a string, a compiled regular expression or a function, got {pattern!r}")
    try:
        return set(match_modules(model, f"**.{pattern}")) & named.keys()
    except ValueError:  # nothing matches
        return set()


def _close(pattern: Pattern, named: dict[str, nn.Module]) -> list[str]:
    """Ends of the names of layers, as long as the pattern, that are like it."""
    text = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
    parts = text.count(".") + 1
    layers = [name for name, module in named.items() if layer_kind(module) is not None]
    ends = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in layers))
    return difflib.get_close_matches(text, ends, n=5, cutoff=0.4) or ends[:5]


def _shown(patterns: Patterns) -> str:
    return ", ".join(
        repr(pattern.pattern)
        if isinstance(pattern, re.Pattern)
        else repr(pattern)
        if isinstance(pattern, str)
        else getattr(pattern, "__name__", repr(pattern))
        for pattern in _listed(patterns)
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits of the vocabulary, if this is a model of transformers."""
    getter = getattr(unwrap(model), "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _check_weight(name: str, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name!r} has a weight of {weight.dtype}, expected an unquantised floating-point weight")
