"""Schedules of a penalty's weight: small immutable functions of the step, ``schedule(step) -> float``.

>>> ramp = Linear(0.0, 2.0, steps=100)
>>> ramp(0), ramp(50), ramp(1_000)
(0.0, 1.0, 2.0)
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]
"""Any function of the step count; the classes below are the usual ones."""


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` on a straight line over ``steps`` steps after ``delay`` steps, then constant."""

    start: float
    end: float
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.delay)

    def __call__(self, step: int) -> float:
        return _between(self.start, self.end, _progress(step - self.delay, self.steps))


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` on half a cosine period over ``steps`` steps after ``delay`` steps, then constant."""

    start: float
    end: float
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.delay)

    def __call__(self, step: int) -> float:
        eased = (1 - math.cos(math.pi * _progress(step - self.delay, self.steps))) / 2
        return _between(self.start, self.end, eased)


@dataclass(frozen=True)
class GaussianRamp:
    """The Gaussian ramp-up ``end * exp(-5 (1 - t)^2)``, t from 0 to 1 over ``steps``; it starts at ``0.0067 * end``.

    Source:
        Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017, section 2.1 and appendix A.
    """

    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        return self.end * math.exp(-5.0 * (1.0 - _progress(step, self.steps)) ** 2)


@dataclass(frozen=True)
class Exponential:
    """``start * decay**step``, never below ``floor``."""

    start: float
    decay: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")
        if self.floor > self.start:
            raise ValueError(f"floor must not be above start, got {self.floor} and {self.start}")

    def __call__(self, step: int) -> float:
        return max(self.floor, self.start * self.decay**step)


@dataclass(frozen=True)
class Piecewise:
    """Constant pieces: ``values[i]`` from step ``boundaries[i - 1]`` on (``values[0]`` from the start)."""

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values must have one entry more than boundaries, got {len(self.values)} and {len(self.boundaries)}"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"boundaries must increase, got {self.boundaries}")

    def __call__(self, step: int) -> float:
        return self.values[bisect_right(self.boundaries, step)]


def _check_steps(steps: int, delay: int = 0) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if delay < 0:
        raise ValueError(f"delay must not be negative, got {delay}")


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _between(start: float, end: float, share: float) -> float:
    """Exactly ``start`` at 0 and ``end`` at 1, and never below zero by rounding between two weights that are not."""
    return (1 - share) * start + share * end
