r"""Keep a module frozen, and prove that it stayed so.

>>> import torch
>>> from torch import nn
>>> encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
>>> model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(4, 2))
>>> with FrozenGuard(encoder):
...     model.train()(torch.randn(8, 3, 3, 3)).sum().backward()
>>> encoder[1].num_batches_tracked.item(), encoder[0].weight.grad, model[2].weight.grad.shape
(0, None, torch.Size([2, 4]))
"""

import copy
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 2**20  # elements hashed at a time
_MIX = -7046029254386353131  # 2^64 over the golden ratio, as a signed integer


class FrozenGuard:
    """Freezes modules on entry; on exit, raises if they changed, then restores what it found.

    While frozen, the modules stay in evaluation mode even when ``train()`` is called on them or on a module around them,
    and their parameters take no gradient. Gradients still flow *through* them to their inputs; add ``torch.no_grad()``
    where they should not. Unchanged means bit for bit, buffers included: the contents are hashed on entry and on exit,
    so that no copy is held and even writes through ``.data`` are seen.

    It is a context manager; :meth:`freeze`, :meth:`check` and :meth:`release` do the same in separate steps. To freeze
    only the batch normalisation of a network, pass those modules.

    Args:
        modules: what to freeze, each with everything inside.

    Raises:
        ValueError: no module is given.
    """

    def __init__(self, *modules: nn.Module) -> None:
        if not modules:
            raise ValueError("give at least one module to freeze")
        self.modules = modules
        self._training: list[tuple[nn.Module, bool]] = []
        self._required: list[tuple[nn.Parameter, bool]] = []
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, tuple[int, int] | None] = {}

    def freeze(self) -> "FrozenGuard":
        """Freeze the modules and remember their contents.

        Raises:
            RuntimeError: they are frozen already, by this guard or another.
        """
        inside = dict.fromkeys(module for root in self.modules for module in root.modules())
        if any(isinstance(module.__dict__.get("train"), _StayInEval) for module in inside):
            raise RuntimeError("the module is frozen already: release the other guard first")
        self._training = [(module, module.training) for module in inside]
        self._required = [(weight, weight.requires_grad) for _, weight in self._parameters()]
        for module in inside:
            module.eval()
            module.__dict__["train"] = _StayInEval(module)
        for weight, _ in self._required:
            weight.requires_grad_(False)
        self._gradients = {name: _stamp(weight) for name, weight in self._parameters()}
        self._before = {name: _fingerprint(tensor) for name, tensor in self._tensors()}
        return self

    def check(self) -> None:
        """Raise unless everything is as it was when frozen.

        Raises:
            RuntimeError: names what changed, received a gradient, requires one again, or left evaluation mode; or the
                modules are not frozen.
        """
        if not self._training:
            raise RuntimeError("the modules are not frozen: call freeze() or use the guard as a context manager")
        tensors = dict(self._tensors())
        found = {
            "changed": [
                name
                for name in tensors.keys() & self._before.keys()
                if not torch.equal(_fingerprint(tensors[name]).cpu(), self._before[name].cpu())
            ],
            "were added or removed": list(tensors.keys() ^ self._before.keys()),
            "received a gradient": [
                name for name, weight in self._parameters() if _stamp(weight) != self._gradients.get(name)
            ],
            "require a gradient again": [name for name, weight in self._parameters() if weight.requires_grad],
            "left evaluation mode": [type(module).__name__ for module, _ in self._training if module.training],
        }
        faults = [f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names]
        if faults:
            raise RuntimeError("frozen module violated: " + "; ".join(faults))

    def release(self) -> None:
        """Give the modules back the modes and the ``requires_grad`` that they came with."""
        for module, training in self._training:
            del module.__dict__["train"]
            module.training = training
        for weight, required in self._required:
            weight.requires_grad_(required)
        self._training, self._required = [], []

    def __enter__(self) -> "FrozenGuard":
        return self.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.check()
        finally:
            self.release()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self._named():
            yield from module.named_parameters(prefix)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters()
        for prefix, module in self._named():
            yield from module.named_buffers(prefix)

    def _named(self) -> Iterator[tuple[str, nn.Module]]:
        for number, module in enumerate(self.modules):
            yield str(number) if len(self.modules) > 1 else "", module


class _StayInEval:
    """Stands in for the ``train`` method of a frozen module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Train":
        return _Train(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> "tuple[type[_Train], tuple[nn.Module]]":
        return _Train, (self.module,)


class _Train:
    """What a copy of a frozen module has in that place: the method of its class. The copy is not frozen."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, mode)


def _stamp(weight: nn.Parameter) -> tuple[int, int] | None:
    """Identifies the gradient that a parameter holds and its last change."""
    return None if weight.grad is None else (id(weight.grad), weight.grad._version)


def _fingerprint(tensor: Tensor) -> Tensor:
    r"""The checksum \sum_i r_i b_i mod 2^64 of the contents b_i as integers, r_i odd: no change of one b_i goes unseen."""
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        index = torch.arange(number * _CHUNK, number * _CHUNK + chunk.numel(), device=bits.device)
        total += (chunk.long() * (index * _MIX | 1)).sum()
    return total
