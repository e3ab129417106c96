"""Schedules of a penalty's weight: small immutable functions of the step, ``schedule(step) -> float``.

>>> ramp = Linear(0.0, 2.0, steps=100)
>>> ramp(0), ramp(50), ramp(1_000)
(0.0, 1.0, 2.0)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]
"""Any function of the step count; the classes below are the usual ones."""


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


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
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step - self.delay, self.steps)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` on half a cosine period over ``steps`` steps after ``delay`` steps, then constant."""

    start: float
    end: float
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        eased = (1 - math.cos(math.pi * _progress(step - self.delay, self.steps))) / 2
        return self.start + (self.end - self.start) * eased


@dataclass(frozen=True)
class GaussianRamp:
    """The Gaussian ramp-up ``end * exp(-5 (1 - t)^2)``, t from 0 to 1 over ``steps`` (Laine and Aila 2017, section 3)."""

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
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)
