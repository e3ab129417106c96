"""Plain names of modules and their tensors, and patterns of module names.

A plain name is that of ``named_modules()`` without the components that wrappers add: ``module.`` of
DistributedDataParallel, ``_orig_mod.`` of ``torch.compile``, those of FSDP and of checkpoint wrappers. In a pattern, ``*``
stands for any part of one dotted component, ``?`` for one letter and ``**`` for any number of components.

>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
>>> list(match_modules(model, "1.*")), list(match_modules(model, "**.1", "0"))
(['1.0', '1.1'], ['1', '1.1', '0'])
"""

import difflib
import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_HIDDEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def match_modules(model: nn.Module, *patterns: str) -> dict[str, nn.Module]:
    """The modules of ``model`` whose plain name matches, by plain name, in the order of the patterns.

    Args:
        model: any module, wrapped or not.
        patterns: see the module's text; ``""`` is the model itself.

    Raises:
        ValueError: there is no pattern, or one matches no module.
    """
    if not patterns:
        raise ValueError("give at least one name or pattern of modules")
    named = plain_modules(model)
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        expression = _expression(pattern)
        found = {name: module for name, module in named.items() if expression.fullmatch(name)}
        if not found:
            close = difflib.get_close_matches(pattern, named, n=5, cutoff=0.3)
            raise ValueError(f"no module matches {pattern!r}; names like it: {close}")
        chosen |= found
    return chosen


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by plain name. Of a wrapper and what it wraps, which share a name, the wrapper is returned.

    Args:
        model: any module, wrapped or not; its own name is ``""``.
    """
    outermost: dict[str, nn.Module] = {}
    for name, module in _walk(model):
        outermost.setdefault(name, module)
    return outermost


def plain_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The parameters and the buffers by plain name; a tensor that is shared between modules occurs once.

    Args:
        model: any module, wrapped or not.
    """
    parameters: dict[nn.Parameter, str] = {}
    buffers: dict[Tensor, str] = {}
    for prefix, module in _walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            parameters.setdefault(parameter, _join(prefix, name))
        for name, buffer in module.named_buffers(recurse=False):
            buffers.setdefault(buffer, _join(prefix, name))
    return {name: tensor for tensor, name in parameters.items()}, {name: tensor for tensor, name in buffers.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """What is inside DistributedDataParallel and ``torch.compile`` wrappers around a whole model.

    Args:
        model: any module, wrapped or not.
    """
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names, made plain."""
    plain = {"": ""}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if name:
            wrapper = child in _HIDDEN or (child == "module" and isinstance(modules[parent], DistributedDataParallel))
            plain[name] = plain[parent] if wrapper else _join(plain[parent], child)
        yield plain[name], module


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _expression(pattern: str) -> re.Pattern[str]:
    *parts, last = pattern.split(".")
    component = {"*": "[^.]*", "?": "[^.]"}

    def translate(part: str) -> str:
        return "".join(component.get(letter, re.escape(letter)) for letter in part)

    before = "".join(r"(?:[^.]+\.)*" if part == "**" else translate(part) + r"\." for part in parts)
    return re.compile(before + (r"[^.]+(?:\.[^.]+)*" if last == "**" else translate(last)))
