r"""The exponential moving average of a model's weights, as a model.

    a <- d a + (1 - d) w     after every optimizer step, a = w at the start, d a number or a schedule of the update count.

>>> import torch
>>> from torch import nn
>>> model = nn.Linear(2, 1)
>>> ema = EMA(model, decay=0.99)
>>> with torch.no_grad():
...     _ = model.weight.add_(1.0)
>>> ema.update(model)
>>> round((model.weight - ema.average.weight).mean().item(), 4)
0.99
>>> with ema.swapped(model):
...     prediction = model(torch.ones(1, 2))  # that of the average
>>> torch.equal(prediction, ema(torch.ones(1, 2)))
True
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.core.names import plain_tensors, unwrap
from poise.core.schedule import Constant, Schedule

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Tensors of the average and of the model, by name."""


@dataclass(frozen=True)
class RampedDecay:
    """``min(decay, 1 - 1/(step + 1))``: the plain mean of all weights so far, until that would be slower than ``decay``.

    Without a ramp the start weighs ``decay**step``, for a long time more than anything learnt (Tarvainen and Valpola 2017).
    At step 0 the average becomes the current weights.

    Raises:
        ValueError: when called, of a step before 0.
    """

    decay: float

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return min(self.decay, 1 - 1 / (step + 1))


class EMA(nn.Module):
    """Holds ``average``, a copy of the model whose weights follow the model's; calling the EMA calls it.

    Put it into the checkpoint like any module (weights and the count of updates are in its ``state_dict``). Its mode is its
    own: ``average`` starts in evaluation mode and ``train()`` on a module around it does not change that. Weights of half
    types are averaged in float32, in which steps of (1 - d) survive, and rounded for use.

    Args:
        model: what to follow; wrappers (DistributedDataParallel, ``torch.compile``) are looked through.
        decay: d in [0, 1], or a schedule such as :class:`RampedDecay` or ``Linear(0.996, 1.0, steps)``, evaluated at
            ``updates``. 0 copies the model (the teacher "of the last epoch", updated once per epoch); 1 changes nothing.
        buffers: what happens to buffers such as batch-norm statistics: ``"copy"`` the model's, ``"average"`` the floating
            ones and copy the rest, or ``"keep"`` the average's own (let it run in train mode, or use
            :func:`~poise.core.memory.batchnorm.recalibrate_batchnorm`).
        average: a module to use instead of a copy, of possibly different structure; what it has in common with the model by
            name follows the model and the rest stays. Its values are its start.
        rename: from the model's names to those of ``average``, where they differ (adapters rename what they wrap).

    Attributes:
        average: the averaged model; its parameters require no gradient.
        updates: how often :meth:`update` was called.

    Raises:
        ValueError: ``decay`` is outside [0, 1], ``buffers`` is none of the three, ``average`` has no name in common with the
            model, or tensors of the same name differ in shape.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule = 0.999,
        *,
        buffers: Literal["copy", "average", "keep"] | str = "copy",
        average: nn.Module | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        if buffers not in ("copy", "average", "keep"):
            raise ValueError(f"buffers must be 'copy', 'average' or 'keep', got {buffers!r}")
        self._decay: Schedule = decay if callable(decay) else Constant(decay)
        self._buffer_rule = buffers
        self._partial = average is not None
        self._rename = rename
        self._swapped = False
        self.updates = 0
        self.average = (copy.deepcopy(unwrap(model)).eval() if average is None else average).requires_grad_(False)
        _ = self.decay  # a bad number is reported here, not in the middle of training
        weights, statistics = self._pairs(model)
        self._exact = nn.Module()  # half types in full precision
        for name, (ours, _) in (weights | statistics).items():
            if ours.is_floating_point() and ours.itemsize < 4:
                self._exact.register_buffer(name.replace(".", "/"), ours.detach().float())

    @property
    def decay(self) -> float:
        """d at the next update."""
        decay = float(self._decay(self.updates))
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay} at update {self.updates}")
        return decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model; call it after every optimizer step.

        Raises:
            ValueError: the decay has left [0, 1], or the model has no longer the structure it had.
            RuntimeError: the weights are swapped.
        """
        if self._swapped:
            raise RuntimeError("the average holds the model's weights: update it outside of swapped()")
        weights, statistics = self._pairs(model)
        averaged = weights | statistics if self._buffer_rule == "average" else weights
        self._blend({name: pair for name, pair in averaged.items() if pair[0].is_floating_point()})
        if self._buffer_rule != "keep":
            for ours, theirs in statistics.values():
                if self._buffer_rule == "copy" or not ours.is_floating_point():
                    ours.copy_(theirs)
        self.updates += 1

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within this context the model has the averaged weights and buffers, and ``average`` the model's.

        The contents are exchanged in place, so optimizers, wrappers and compiled code see the same parameters before,
        within and after; no second copy is held. They are exchanged back after an exception too.

        Raises:
            ValueError: the model has not the structure it had, or not the dtypes of the average.
            RuntimeError: the weights are swapped already.
        """
        if self._swapped:
            raise RuntimeError("the weights are swapped already")
        weights, statistics = self._pairs(model)
        pairs = weights | statistics
        for name, (ours, theirs) in pairs.items():
            if ours.dtype != theirs.dtype:
                raise ValueError(f"{name} is {theirs.dtype} in the model and {ours.dtype} in the average")
        _exchange(pairs)
        self._swapped = True
        try:
            yield model
        finally:
            _exchange(pairs)
            self._swapped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``average(*args, **kwargs)``."""
        return self.average(*args, **kwargs)

    def train(self, mode: bool = True) -> "EMA":
        """Sets the mode of this object only; that of the average is ``ema.average.train()``."""
        self.training = mode
        return self

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])

    def extra_repr(self) -> str:
        return f"decay={self._decay}, buffers={self._buffer_rule!r}"

    def _blend(self, pairs: Pairs) -> None:
        exact = {name.replace("/", "."): buffer for name, buffer in self._exact.named_buffers()}
        targets = [exact.get(name, ours) for name, (ours, _) in pairs.items()]
        sources = [theirs.to(target) for target, (_, theirs) in zip(targets, pairs.values(), strict=True)]
        # lerp is exact at both ends: d = 1 keeps and d = 0 copies, bit for bit
        torch._foreach_lerp_(targets, sources, 1 - self.decay)
        for name, target in exact.items():
            if name in pairs:
                pairs[name][0].copy_(target)

    def _pairs(self, model: nn.Module) -> tuple[Pairs, Pairs]:
        """Parameters and buffers of the average with those of the model of the same name.

        Looked up anew for each update: a parameter may have been replaced since the last.
        """
        ours, theirs = plain_tensors(self.average), plain_tensors(model)
        weights, statistics = self._match(ours[0], theirs[0]), self._match(ours[1], theirs[1])
        if not weights:
            raise ValueError("the average and the model have no parameter name in common: pass rename")
        return weights, statistics

    def _match(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Pairs:
        if self._rename is not None:
            theirs = {self._rename(name): tensor for name, tensor in theirs.items()}
        different = ours.keys() ^ theirs.keys()
        if different and not self._partial:
            raise ValueError(
                f"the model no longer has the structure of its average; they differ in {sorted(different)}"
            )
        pairs = {name: (tensor, theirs[name]) for name, tensor in ours.items() if name in theirs}
        for name, (a, b) in pairs.items():
            if a.shape != b.shape:
                raise ValueError(f"{name} has shape {tuple(b.shape)} in the model and {tuple(a.shape)} in the average")
        return pairs


@torch.no_grad()
def _exchange(pairs: Pairs) -> None:
    for ours, theirs in pairs.values():
        held = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(held)
