"""Objects that hold tensors: walk them, convert every tensor in a copy of them, say where two of them differ."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Holder = TypeVar("Holder")


def leaves(holder: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number, string and opaque object in ``holder``, with the path that leads to it.

    Modules give their parameters and buffers; tuples, lists, dicts, dataclass instances and ``functools.partial`` what they hold.
    """
    if isinstance(holder, nn.Module):
        for name, tensor in (*holder.named_parameters(), *holder.named_buffers()):
            yield f"{path}.{name}", tensor
    elif isinstance(holder, functools.partial):
        yield from leaves((holder.func, holder.args, holder.keywords), path)
    elif isinstance(holder, tuple | list):
        for index, item in enumerate(holder):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(holder, dict):
        for key, item in holder.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        for field in dataclasses.fields(holder):
            yield from leaves(getattr(holder, field.name), f"{path}.{field.name}")
    else:
        yield path, holder


def tensors(holder: Any) -> list[Tensor]:
    """The tensors in ``holder``."""
    return [leaf for _, leaf in leaves(holder) if isinstance(leaf, Tensor)]


def floats(holder: Any) -> list[Tensor]:
    """The floating point and complex tensors in ``holder``."""
    return [tensor for tensor in tensors(holder) if tensor.is_floating_point() or tensor.is_complex()]


def converted(
    holder: Holder,
    convert: Callable[[Tensor], Tensor],
    convert_generator: Callable[[torch.Generator], torch.Generator] = torch.Generator.clone_state,
) -> Holder:
    """A deep copy of ``holder`` with each tensor and generator replaced by a converted one; what was shared stays shared."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for _, leaf in leaves(holder):
            if isinstance(leaf, nn.Parameter):
                memo[id(leaf)] = nn.Parameter(convert(leaf), requires_grad=leaf.requires_grad)
            elif isinstance(leaf, Tensor):
                memo[id(leaf)] = convert(leaf).requires_grad_(leaf.requires_grad)
            elif isinstance(leaf, torch.Generator):
                memo[id(leaf)] = convert_generator(leaf)
    return copy.deepcopy(holder, memo)


def cast(holder: Holder, dtype: torch.dtype) -> Holder:
    """A deep copy of ``holder`` with its floating point tensors in ``dtype``, complex ones in the complex type nearest to it."""
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(complex_dtype, copy=True)
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    return converted(holder, convert)


def difference(first: Any, second: Any, *, rtol: float = 0.0, atol: float = 0.0) -> str:
    """Where two holders of the same structure differ first, in words; empty if they agree. NaN equals NaN."""
    ones, others = list(leaves(first)), list(leaves(second))
    if [path for path, _ in ones] != [path for path, _ in others]:
        return f"they hold {[path for path, _ in ones]} and {[path for path, _ in others]}"
    for (path, one), (_, other) in zip(ones, others, strict=True):
        where = path or "the value"
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                return f"{where} is {_kind(one)} and {_kind(other)}"
            if not _close(one, other, rtol, atol):
                return f"{where} differs by up to {(_wide(one) - _wide(other)).abs().max().item():.3g}"
        elif isinstance(one, float) and isinstance(other, float):
            if not (math.isclose(one, other, rel_tol=rtol, abs_tol=atol) or (math.isnan(one) and math.isnan(other))):
                return f"{where} is {one} and {other}"
        elif not isinstance(one, torch.Generator) and (type(one) is not type(other) or one != other):
            return f"{where} is {one!r} and {other!r}"
    return ""


def _close(one: Tensor, other: Tensor, rtol: float, atol: float) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True)
    return torch.equal(one, other)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.double()


def _kind(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
