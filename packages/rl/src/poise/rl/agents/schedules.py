"""Schedules as strings, as configuration files of DrQ-v2 and its successors have them.

>>> schedule("linear(1.0, 0.1, 100000)", 50_000)
0.55
>>> schedule("step_linear(1.0, 0.5, 1000, 0.1, 100000)", 1_000)
0.5
>>> schedule("0.2", 7)
0.2
"""

import re
from functools import lru_cache

from poise.core.schedule import Constant, Linear, Schedule

EASY, MEDIUM, HARD = "linear(1.0,0.1,100000)", "linear(1.0,0.1,500000)", "linear(1.0,0.1,2000000)"
"""The published schedules of the exploration noise, by the difficulty of the task."""


def schedule(expr: str | float, step: int) -> float:
    r"""The value of a schedule at an agent step.

    ``linear(a, b, T)`` is :math:`(1 - m) a + m b` with :math:`m = \mathrm{clip}(t/T, 0, 1)`; ``step_linear(a, b, T, c, S)`` goes on
    from b to c over the S steps after T; a number is itself.

    Args:
        expr: the schedule.
        step: t, in steps of the agent, not in frames of the environment.

    Raises:
        ValueError: another expression, or a length below 1.

    Source:
        Yarats et al. 2022, released code.
    """
    return _parse(str(expr))(step)


@lru_cache(maxsize=64)
def _parse(expr: str) -> Schedule:
    try:
        return Constant(float(expr))
    except ValueError:
        pass
    match = re.fullmatch(r"(linear|step_linear)\(([^()]*)\)", expr.strip())
    try:
        numbers = [float(number) for number in match[2].split(",")] if match else []
    except ValueError:
        numbers = []
    if match and match[1] == "linear" and len(numbers) == 3:
        start, end, length = numbers
        return Linear(start, end, steps=_steps(length, expr))
    if match and match[1] == "step_linear" and len(numbers) == 5:
        start, middle, first, end, second = numbers
        before = Linear(start, middle, steps=_steps(first, expr))
        after = Linear(middle, end, steps=_steps(second, expr), delay=before.steps)
        return lambda step: before(step) if step <= before.steps else after(step)
    raise ValueError(
        f"expected 'linear(start, end, steps)', 'step_linear(start, middle, steps, end, steps)' or a number, got {expr!r}"
    )


def _steps(number: float, expr: str) -> int:
    if number < 1 or number != int(number):
        raise ValueError(f"the length of a schedule is a whole number of steps from 1 on, got {number} in {expr!r}")
    return int(number)
