"""The module form of a regularizer: a weighted scalar to add to the loss.

>>> import torch
>>> class L2(Penalty):
...     def penalty(self, weights: torch.Tensor) -> torch.Tensor:
...         return weights.square().sum()
>>> decay = L2(weight=0.1)
>>> loss = decay(torch.ones(3))
>>> round(loss.item(), 4), decay.value.item()
(0.3, 3.0)
"""

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from numbers import Real
from operator import add
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from poise.core.schedule import Constant, Schedule


class Penalty(nn.Module):
    """Base of all penalties. A subclass writes :meth:`penalty`, the unweighted scalar, and nothing else.

    ``forward`` returns ``weight * penalty(...)``, in float32 if the penalty is of a half type, so that adding it to a loss
    costs no precision. With weight 0 the penalty is not computed at all, and the zero returned has no gradient.

    Args:
        weight: a non-negative number, or a schedule ``step -> weight`` advanced by :meth:`step`.

    Attributes:
        value: the last unweighted value, detached, for logging; ``None`` before the first call and after a call at
            weight 0.

    Raises:
        TypeError: ``weight`` is neither a number nor callable.
        ValueError: the weight is negative, infinite or NaN.
    """

    value: Tensor | None

    def __init__(self, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self._step = 0
        self.value = None
        self.weight = weight

    @property
    def weight(self) -> float:
        """The weight at the current step. Assign a number or a schedule to replace it."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Schedule) -> None:
        if isinstance(weight, bool) or not (isinstance(weight, Real) or callable(weight)):
            raise TypeError(f"weight must be a number or a schedule, got {type(weight).__name__}")
        self._schedule = weight if callable(weight) else Constant(float(weight))
        self._go_to(self._step)

    def step(self) -> None:
        """Advance the schedule; call it once per optimizer step.

        Raises:
            ValueError: the schedule gives a weight that is negative, infinite or NaN.
        """
        self._go_to(self._step + 1)

    def _go_to(self, step: int) -> None:
        # The schedule is evaluated here and not in forward, where torch.compile would compile anew for every step.
        weight = float(self._schedule(step))
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative, got {weight} at step {step}")
        self._step, self._weight = step, weight

    def penalty(self, *args: Any, **kwargs: Any) -> Tensor:
        """The unweighted scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define penalty()")

    @final
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted scalar to add to the loss."""
        weight = self.weight
        if weight == 0:
            self.value = None
            return _zero_like((args, kwargs, self))
        value = self.penalty(*args, **kwargs)
        value = value.to(_wide(value))
        self.value = value.detach()
        return weight * value

    def get_extra_state(self) -> Tensor:
        """The step, as a tensor: safetensors and all that walks over a state dict expects tensors."""
        return torch.tensor(self._step)

    def set_extra_state(self, state: Tensor) -> None:
        self._go_to(int(state))

    def extra_repr(self) -> str:
        return f"weight={self._weight if isinstance(self._schedule, Constant) else self._schedule}"


class Penalties(nn.Module):
    """Several penalties as one, with named terms.

    Each term takes its own arguments: ``penalties(gap=(x, t), norm={"weights": w})`` passes a tuple as positional
    arguments, a dict as keyword arguments and anything else as the only argument.

    >>> class L2(Penalty):
    ...     def penalty(self, weights: torch.Tensor) -> torch.Tensor:
    ...         return weights.square().sum()
    >>> both = Penalties(encoder=L2(weight=0.5), decoder=L2(weight=2.0))
    >>> both(encoder=torch.ones(2), decoder={"weights": torch.ones(3)}).item()
    7.0
    >>> {name: value.item() for name, value in both.values.items()}
    {'encoder': 2.0, 'decoder': 3.0}

    Args:
        terms: penalties by name.

    Attributes:
        values: the last unweighted value of each term that was computed, for logging.

    Raises:
        ValueError: no term is given.
        TypeError: a term is not a :class:`Penalty`.
    """

    def __init__(self, **terms: Penalty) -> None:
        super().__init__()
        if not terms:
            raise ValueError("give at least one named penalty")
        for name, term in terms.items():
            if not isinstance(term, Penalty):
                raise TypeError(f"term {name!r} must be a Penalty, got {type(term).__name__}")
        self.terms = nn.ModuleDict(terms)

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: term.value for name, term in self._penalties() if term.value is not None}

    def step(self) -> None:
        """Advance the schedule of every term."""
        for _, term in self._penalties():
            term.step()

    def forward(self, **inputs: Any) -> Tensor:
        """The weighted sum of all terms.

        Raises:
            ValueError: the names given are not the names of the terms.
        """
        if inputs.keys() != self.terms.keys():
            raise ValueError(f"expected inputs for the terms {sorted(self.terms)}, got {sorted(inputs)}")
        # Added one by one, not stacked: a term of weight 0 that found no tensor has its zero on the CPU.
        return reduce(add, [_call(term, inputs[name]) for name, term in self._penalties()])

    def _penalties(self) -> list[tuple[str, Penalty]]:
        return cast(list[tuple[str, Penalty]], list(self.terms.items()))


def _call(term: Penalty, given: Any) -> Tensor:
    if isinstance(given, tuple):
        return term(*given)
    if isinstance(given, dict):
        return term(**given)
    return term(given)


def _zero_like(given: Any) -> Tensor:
    """The zero that a penalty of the first floating-point tensor in ``given``, however nested, would have been."""
    for tensor in _tensors(given):
        if tensor.is_floating_point():
            return tensor.new_zeros((), dtype=_wide(tensor))
    return torch.zeros(())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, nn.Module):
        yield from given.parameters()
        yield from given.buffers()
    elif isinstance(given, Mapping):
        for value in given.values():
            yield from _tensors(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _tensors(value)
