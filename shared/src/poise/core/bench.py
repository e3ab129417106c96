"""Fair timing of a method against the plain step and against its peers, as ratios.

Calls that are compared run alternately in one process, so that a machine that slows down, slows all of them down.

>>> import torch
>>> x = torch.randn(256, 256)
>>> record = case("256 x 256", plain=lambda: x.sum(), method=lambda: torch.linalg.svdvals(x).sum(), repeats=3)
>>> record["ratio"] > 1
True
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from poise.core.gpu.memory import peak_memory as peak_memory

Call = Callable[[], Any]


class Case(TypedDict):
    """Cost of a step without and with the method: milliseconds, ``method / plain``, MB (``None`` when not measured)."""

    name: str
    plain_ms: float
    method_ms: float
    ratio: float
    plain_mb: float | None
    method_mb: float | None


class Peer(TypedDict):
    """Our time against another library's: ``speedup`` is theirs over ours, ``agreement`` a relative difference."""

    peer: str
    version: str
    case: str
    ours_ms: float
    peer_ms: float
    speedup: float
    agreement: float


def interleave(
    calls: Mapping[str, Call], *, repeats: int = 7, warmup: int = 2, least_ms: float = 1.0
) -> dict[str, float]:
    """Median milliseconds of each call, measured in turns.

    Every round times each call once, in an order that reverses from round to round so that no call always follows the
    same one. A call shorter than ``least_ms`` is repeated inside one measurement. The clock is read after the GPU has
    finished. JAX calls must block on their result themselves.

    Args:
        calls: functions without arguments by name.
        repeats: rounds; the median over them is returned.
        warmup: calls of each function before the first round, at least 1.
        least_ms: least length of one measurement, in milliseconds.

    Raises:
        ValueError: nothing to time, or ``repeats`` or ``warmup`` below 1.
    """
    if not calls or repeats < 1 or warmup < 1:
        raise ValueError(f"expected calls, repeats >= 1 and warmup >= 1, got {len(calls)}, {repeats} and {warmup}")
    numbers = {}
    for name, call in calls.items():
        once = min(_milliseconds(call, 1) for _ in range(warmup))
        numbers[name] = max(1, round(least_ms / max(once, 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one of the calls would be charged to it
    try:
        for turn in range(repeats):
            for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
                times[name].append(_milliseconds(calls[name], numbers[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def case(name: str, plain: Call, method: Call, *, repeats: int = 7, warmup: int = 2, memory: bool = True) -> Case:
    """The record of one case: the same step without and with the method.

    Args:
        name: what is computed, with sizes: ``"ResNet-18, batch 64"``.
        plain: one step without the method.
        method: the same step with it.
        repeats: rounds of :func:`interleave`.
        warmup: calls of each before the first round.
        memory: whether to measure peak memory too (one more call of each; see :func:`peak_memory`).
    """
    times = interleave({"plain": plain, "method": method}, repeats=repeats, warmup=warmup)
    return Case(
        name=name,
        plain_ms=times["plain"],
        method_ms=times["method"],
        ratio=times["method"] / times["plain"],
        plain_mb=peak_memory(plain) if memory else None,
        method_mb=peak_memory(method) if memory else None,
    )


def relative_difference(ours: Any, theirs: Any) -> float:
    """``||ours - theirs|| / ||theirs||`` in float64 (the plain norm of the difference where ``theirs`` is zero).

    Args:
        ours: a tensor, array, number, or a nested list of numbers.
        theirs: the same, of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _float64(ours), _float64(theirs)
    if a.shape != b.shape:
        raise ValueError(f"results must have the same shape to be compared, got {a.shape} and {b.shape}")
    return float(np.linalg.norm((a - b).ravel()) / (np.linalg.norm(b.ravel()) or 1.0))


def peer(
    name: str,
    version: str,
    case: str,
    ours: Call,
    theirs: Call,
    *,
    agreement: float | Callable[[Any, Any], float] = relative_difference,
    repeats: int = 7,
    warmup: int = 2,
) -> Peer:
    """The record of one comparison with another library on the same task.

    Args:
        name: the library: ``"POT"``.
        version: its version, as ``importlib.metadata.version`` gives it.
        case: what is computed, with sizes.
        ours: the task with poise.
        theirs: the task with the peer.
        agreement: relative difference between the two results: a number measured by the caller, or a function of the
            results of ``ours()`` and ``theirs()``.
        repeats: rounds of :func:`interleave`.
        warmup: calls of each before the first round.
    """
    difference = agreement(ours(), theirs()) if callable(agreement) else agreement
    times = interleave({"ours": ours, "theirs": theirs}, repeats=repeats, warmup=warmup)
    return Peer(
        peer=name,
        version=version,
        case=case,
        ours_ms=times["ours"],
        peer_ms=times["theirs"],
        speedup=times["theirs"] / times["ours"],
        agreement=float(difference),
    )


def _float64(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64)
    return np.asarray(value, dtype=np.float64)


def _milliseconds(call: Call, number: int) -> float:
    """Mean milliseconds of ``number`` calls in a row."""
    _finish()
    start = time.perf_counter()
    for _ in range(number):
        call()
    _finish()
    return (time.perf_counter() - start) * 1e3 / number


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
