"""Functions that a compiler is to leave alone: loops whose length depends on data, hooks, searches.

>>> @eager
... def half_until_small(x: float) -> float:
...     while x > 1:
...         x /= 2
...     return x
>>> half_until_small(12.0)
0.75
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, without its price where nothing is compiled.

    The decorator of torch imports the compiler, which takes as long as torch itself. This one waits until something else has.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    # what the compiler looks for before it traces into a function
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return call
