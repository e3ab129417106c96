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
from typing import Any, final

import torch
from torch import Tensor, nn

from poise.core.schedule import Schedule


class Penalty(nn.Module):
    """Base of all penalties. A subclass writes :meth:`penalty`, the unweighted scalar, and nothing else.

    ``forward`` returns ``weight * penalty(...)``. With weight 0 the penalty is not computed at all.

    Args:
        weight: a non-negative number, or a schedule ``step -> weight`` advanced by :meth:`step`.

    Attributes:
        value: the last unweighted value, detached, for logging; ``None`` before the first call and after a call at weight 0.

    Raises:
        TypeError: ``weight`` is neither a number nor callable.
        ValueError: the weight is negative, infinite or NaN.
    """

    value: Tensor | None

    def __init__(self, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        if isinstance(weight, bool) or not (isinstance(weight, int | float) or callable(weight)):
            raise TypeError(f"weight must be a number or a schedule, got {type(weight).__name__}")
        self._weight = weight
        self._step = 0
        self.value = None
        _ = self.weight  # a bad number is reported here, not in the middle of training

    @property
    def weight(self) -> float:
        """The weight at the current step."""
        weight = float(self._weight(self._step) if callable(self._weight) else self._weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and not negative, got {weight} at step {self._step}")
        return weight

    def step(self) -> None:
        """Advance the schedule; call it once per optimizer step."""
        self._step += 1

    def penalty(self, *args: Any, **kwargs: Any) -> Tensor:
        """The unweighted scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define penalty()")

    @final
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted scalar to add to the loss."""
        weight = self.weight
        if weight == 0:
            self.value = None
            return _zero_like(args, kwargs, self)
        value = self.penalty(*args, **kwargs)
        self.value = value.detach()
        return weight * value

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._step = int(state["step"])

    def extra_repr(self) -> str:
        return f"weight={self._weight}"


class Penalties(nn.Module):
    """Several penalties as one, with named terms.

    Each term takes its own arguments: ``penalties(gap=(x, t), norm={"weights": w})`` passes a tuple as positional arguments, a
    dict as keyword arguments and anything else as the only argument.

    Args:
        terms: penalties by name.

    Attributes:
        values: the last unweighted value of each term that was computed, for logging.
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
        return {name: term.value for name, term in self.terms.items() if term.value is not None}  # type: ignore[misc]

    def step(self) -> None:
        """Advance the schedule of every term."""
        for term in self.terms.values():
            term.step()  # type: ignore[operator]

    def forward(self, **inputs: Any) -> Tensor:
        """The weighted sum of all terms.

        Raises:
            ValueError: the names given are not the names of the terms.
        """
        if inputs.keys() != self.terms.keys():
            raise ValueError(f"expected inputs for the terms {sorted(self.terms)}, got {sorted(inputs)}")
        return torch.stack([_call(term, inputs[name]) for name, term in self.terms.items()]).sum()


def _call(term: nn.Module, given: Any) -> Tensor:
    if isinstance(given, tuple):
        return term(*given)
    if isinstance(given, dict):
        return term(**given)
    return term(given)


def _zero_like(args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module) -> Tensor:
    """A zero of the dtype and device that the penalty would have had."""
    candidates = (*args, *kwargs.values(), *module.parameters(), *module.buffers())
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.is_floating_point():
            return candidate.new_zeros(())
        if isinstance(candidate, nn.Module):
            for parameter in candidate.parameters():
                return parameter.new_zeros(())
    return torch.zeros(())
