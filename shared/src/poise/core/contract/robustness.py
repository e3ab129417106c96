"""What a public call must obey when it is given something else than it hopes for: the changes of a valid call, and their laws.

:func:`stands` changes a valid call in one of the :data:`CHANGES` and demands that it answers as the change's law says, or refuses: by
a ``ValueError`` or ``TypeError`` that poise raises itself, never by an error that happens to come out of PyTorch or numpy on the way.
The workspace's ``tests/test_public_names.py`` draws the changes for every public name of every member.

>>> import torch
>>> from poise.core.testing import Sample, randn
>>> spread = Sample(name="spread", build=lambda: lambda x: x.var(), inputs=lambda generator: (randn(generator, 4),))
>>> stands(spread, "strided", torch.float64, seed=0)
>>> stands(spread, "resized", torch.float64, seed=0, size=0)
Traceback (most recent call last):
...
poise.core.contract.laws.BrokenLawError: spread, resized: the result has an entry that is not a number
"""

import copy
import math
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor

from poise.core.contract.laws import Arguments, BrokenLawError, Call, case, with_gradients
from poise.core.contract.objects import difference, leaves, tensors
from poise.core.testing import Sample

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Tolerance of the comparison between layouts, relative and absolute: sums may run in another order."""

HUGE = {torch.float64: 1e30, torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 1e2}
"""Factors that make numbers huge, but not their squares infinite."""

REFUSED = object()
"""Stands for the answer of a call that refused."""


@dataclass(frozen=True)
class Change:
    """One way to change a valid call.

    Attributes:
        apply: makes the changed arguments; ``None`` if there is nothing in these to change so.
        law: raises BrokenLawError, given the sample, the answer and the arguments that were changed.
        gradients: whether gradients are taken, and fall under the law.
    """

    apply: Callable[[Arguments, random.Random, int], Arguments | None]
    law: Callable[[str, Any], None]
    gradients: bool = False


def stands(sample: Sample, change: str, dtype: torch.dtype, *, seed: int, size: int = 2) -> None:
    """The call, changed, answers as the law of the change says, or refuses with an error of poise.

    Args:
        sample: the valid call.
        change: one of :data:`CHANGES`.
        dtype: of the floating point tensors.
        seed: chooses which tensor, which entry, which axis.
        size: what ``"resized"`` makes out of a size.

    Raises:
        BrokenLawError: the call answers wrongly, or fails in an undocumented way.
    """
    rule = CHANGES[change]
    function, arguments = case(sample, dtype)
    changed = rule.apply(arguments, random.Random(seed), size)
    if changed is None:
        return
    where = f"{sample.name}, {change}"
    answer = _answer(where, sample, function, changed, gradients=rule.gradients)
    if answer is REFUSED:
        return
    rule.law(where, answer)
    if change == "strided":
        expected = _answer(where, sample, function, arguments)
        if found := difference(expected, answer, rtol=TOLERANCE[dtype], atol=max(TOLERANCE[dtype], sample.atol)):
            raise BrokenLawError(f"{where}: the answer depends on the layout of the tensors in memory: {found}")


def _answer(where: str, sample: Sample, function: Call, arguments: Arguments, *, gradients: bool = False) -> Any:
    """The result, with its gradients if asked for; :data:`REFUSED` if poise refuses."""
    function, arguments = copy.deepcopy((function, arguments))
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return with_gradients(sample, function, arguments) if gradients else function(*arguments)
    except (ValueError, TypeError) as error:
        if not (_of_poise(error) or _of_a_layer(error)):
            raise BrokenLawError(f"{where}: not poise refuses, but what it calls: {error}") from error
        return REFUSED
    except Exception as error:
        if _of_a_layer(error):
            return REFUSED
        raise BrokenLawError(f"{where}: {type(error).__name__}: {error}") from error


def _of_poise(error: Exception) -> bool:
    """Whether a ``raise`` statement of poise made the error, or the check of a signature that stands for one in tests."""
    if isinstance(error, jaxtyping.TypeCheckError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "/poise/" in frame.filename and (frame.line or "").startswith("raise")


def _of_a_layer(error: Exception) -> bool:
    """Whether a layer of PyTorch itself says that what it is given does not fit it, as it would without poise around it."""
    frames = traceback.extract_tb(error.__traceback__)
    called = [Path(frame.filename) for frame in frames if not frame.filename.endswith(("functional.py", "_tensor.py"))]
    return called[-1].parent.name == "modules" and called[-1].name not in ("module.py", "container.py")


def _is_a_number(where: str, answer: Any) -> None:
    """No entry is NaN."""
    if any(_has_nan(leaf) for _, leaf in leaves(answer)):
        raise BrokenLawError(f"{where}: the result has an entry that is not a number")


def _is_not_silent(where: str, answer: Any) -> None:
    """What is not a number in the input shows in the answer."""
    numbers = [leaf for _, leaf in leaves(answer) if _is_real(leaf)]
    if numbers and not any(_has_nan(leaf) for leaf in numbers):
        raise BrokenLawError(f"{where}: an input that is not a number vanishes in an answer of ordinary numbers")


def _is_any(where: str, answer: Any) -> None:
    """An answer is all that is asked for."""


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, float) or (isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()))


def _has_nan(leaf: Any) -> bool:
    return _is_real(leaf) and (bool(leaf.isnan().any()) if isinstance(leaf, Tensor) else math.isnan(leaf))


def _unchanged(arguments: Arguments, chance: random.Random, size: int) -> Arguments:
    return arguments


def _of_one(
    change: Callable[[Tensor, random.Random], Tensor | None], fits: Callable[[Tensor], bool] = torch.is_floating_point
) -> Callable[[Arguments, random.Random, int], Arguments | None]:
    """Changes one of the tensors that fit."""

    def apply(arguments: Arguments, chance: random.Random, size: int) -> Arguments | None:
        candidates = [tensor for tensor in _given(arguments) if fits(tensor)]
        if not candidates:
            return None
        chosen = chance.choice(candidates)
        with torch.no_grad():
            changed = change(chosen.detach(), chance)
        return None if changed is None else copy.deepcopy(arguments, {id(chosen): changed})

    return apply


def _of_all(change: Callable[[Tensor], Tensor]) -> Callable[[Arguments, random.Random, int], Arguments]:
    """Changes every tensor."""
    return lambda arguments, chance, size: copy.deepcopy(
        arguments, {id(tensor): change(tensor.detach()) for tensor in _given(arguments)}
    )


def _given(arguments: Arguments) -> list[Tensor]:
    """The tensors among the arguments, without those of modules."""
    modules = {
        id(tensor)
        for argument in arguments
        if isinstance(argument, torch.nn.Module)
        for tensor in (*argument.parameters(), *argument.buffers())
    }
    return [tensor for tensor in tensors(arguments) if id(tensor) not in modules]


def _poisoned(value: float) -> Callable[[Tensor, random.Random], Tensor | None]:
    """One entry replaced."""

    def change(tensor: Tensor, chance: random.Random) -> Tensor | None:
        if tensor.numel() == 0:
            return None
        changed = tensor.clone().contiguous()
        changed.view(-1)[chance.randrange(tensor.numel())] = value
        return changed

    return change


def _resized(arguments: Arguments, chance: random.Random, size: int) -> Arguments | None:
    """One size made another one everywhere, as a batch of another size would."""
    sizes = sorted({length for tensor in _given(arguments) for length in tensor.shape})
    if not sizes:
        return None
    old = chance.choice(sizes)

    def change(tensor: Tensor) -> Tensor:
        for dim, length in enumerate(tensor.shape):
            if length == old:
                tensor = tensor.index_select(dim, torch.arange(size) % max(old, 1))
        numbers = tensor.dtype not in (torch.bool, torch.uint8) and not tensor.is_floating_point()
        return tensor % size if numbers and size < old and size > 0 else tensor  # a class or row number stays one

    return _of_all(change)(arguments, chance, size)


def _strided(tensor: Tensor) -> Tensor:
    """The same numbers: every second entry of a larger tensor, its axes in reverse order."""
    if tensor.dim() == 0:
        return tensor
    reverse = tuple(reversed(range(tensor.dim())))
    wide = tensor.permute(reverse).repeat_interleave(2, dim=-1).contiguous()
    return wide[..., ::2].permute(reverse)


def _expanded(tensor: Tensor, chance: random.Random) -> Tensor | None:
    """All rows are one row in memory."""
    return tensor[:1].expand_as(tensor) if tensor.dim() and len(tensor) else None


def _reranked(tensor: Tensor, chance: random.Random) -> Tensor | None:
    """One axis more, or one less."""
    if tensor.dim() and tensor.numel() and chance.random() < 0.5:
        return tensor.select(chance.randrange(tensor.dim()), 0)
    return tensor.unsqueeze(chance.randrange(tensor.dim() + 1))


def _shortened(tensor: Tensor, chance: random.Random) -> Tensor | None:
    """Without its last entry along one axis."""
    if not tensor.dim():
        return None
    dim = chance.randrange(tensor.dim())
    return tensor.narrow(dim, 0, max(tensor.shape[dim] - 1, 0))


def _retyped(tensor: Tensor, chance: random.Random) -> Tensor:
    """Integers in the place of real numbers, and the other way round."""
    return tensor.long() if tensor.is_floating_point() else tensor.double()


def _misnumbered(arguments: Arguments, chance: random.Random, size: int) -> Arguments | None:
    """One number among the arguments replaced by an unlikely one."""
    places = [place for place, argument in enumerate(arguments) if type(argument) in (int, float)]
    if not places:
        return None
    place = chance.choice(places)
    unlikely = (math.nan, math.inf, -1.0, 0.0) if type(arguments[place]) is float else (0, -1, 9)
    return (*arguments[:place], chance.choice(unlikely), *arguments[place + 1 :])


CHANGES: dict[str, Change] = {
    "none": Change(_unchanged, _is_a_number, gradients=True),
    "zeros": Change(_of_one(lambda tensor, chance: torch.zeros_like(tensor)), _is_a_number, gradients=True),
    "equal": Change(_of_one(lambda tensor, chance: torch.full_like(tensor, 0.5)), _is_a_number, gradients=True),
    "tiny": Change(_of_one(lambda tensor, chance: tensor * 1e-30), _is_a_number, gradients=True),
    "resized": Change(_resized, _is_a_number, gradients=True),
    "huge": Change(_of_one(lambda tensor, chance: tensor * HUGE[tensor.dtype]), _is_a_number),
    "nan": Change(_of_one(_poisoned(math.nan)), _is_not_silent),
    "infinite": Change(_of_one(_poisoned(math.inf)), _is_any),
    "strided": Change(_of_all(_strided), _is_any),
    "expanded": Change(_of_one(_expanded), _is_a_number),
    "empty": Change(_of_one(lambda tensor, chance: tensor[:0] if tensor.dim() else None, torch.is_tensor), _is_any),
    "shortened": Change(_of_one(_shortened, torch.is_tensor), _is_any),
    "reranked": Change(_of_one(_reranked, torch.is_tensor), _is_any),
    "retyped": Change(_of_one(_retyped, torch.is_tensor), _is_any),
    "misnumbered": Change(_misnumbered, _is_any),
}
"""The changes by name."""
