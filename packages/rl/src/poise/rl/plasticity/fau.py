r"""The fraction of active units (FAU): how much of a network still responds, read during a forward pass that happens anyway.

.. math:: \Phi_M = \frac{\#\{\text{activations of } M \text{ above } 0\}}{\#\{\text{activations of } M\}}

over all samples and all units of all ReLU outputs of a module M together, every pixel of a convolution's output being a unit: a layer
counts by its number of units.

Ma et al., "Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages", ICLR 2024, arXiv 2310.07418.

>>> import torch
>>> from torch import nn
>>> critic = nn.Sequential(nn.Linear(4, 64), nn.ReLU(inplace=True), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
>>> monitor = FAUMonitor({"critic": critic})
>>> with monitor.counting("critic"):
...     loss = critic(torch.randn(256, 4)).mean()
>>> loss.backward()
>>> sorted(monitor.fractions()), sorted(monitor.layers())
(['critic'], ['critic.1', 'critic.3'])
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from poise.core.names import match_modules, plain_modules
from poise.core.taps import Taps


class FAUMonitor:
    """Counts active units of chosen modules, in the forward passes of a ``counting`` block and in no others.

    Outside of such a block nothing is hooked and nothing costs anything. Counts stay on the device of the activations, where nothing
    waits for them, until you turn a fraction into a number. Copies of the modules are not counted. Works with in-place activations.
    What gradient checkpointing computes again is not counted twice.

    Args:
        modules: what to watch, by a name of your choice; a module alone gets the name ``"model"``.
        layers: names or patterns (:mod:`poise.core.names`) of the layers that count inside of each module, for networks whose
            activations have types of their own; by default all those of ``activation_types``.
        activation_types: modules whose outputs count. LayerNorm, Tanh and other outputs without a dead side should not.

    Raises:
        ValueError: no module, or one without such a layer (functional activations cannot be seen), or ``layers`` of unknown modules.

    Source:
        Ma et al. 2024, definition of FAU.
    """

    def __init__(
        self,
        modules: nn.Module | Mapping[str, nn.Module],
        *,
        layers: Mapping[str, Sequence[str]] | None = None,
        activation_types: tuple[type[nn.Module], ...] = (nn.ReLU,),
    ) -> None:
        watched = {"model": modules} if isinstance(modules, nn.Module) else dict(modules)
        if not watched:
            raise ValueError("give at least one module to watch")
        if unknown := set(layers or {}) - set(watched):
            raise ValueError(f"layers of {sorted(unknown)} were given, the modules are {sorted(watched)}")
        self._counters: dict[str, dict[str, _Counter]] = {}
        self._taps: dict[str, list[Taps]] = {}
        for name, module in watched.items():
            chosen = (
                list(match_modules(module, *layers[name]))
                if layers is not None and name in layers
                else [layer for layer, part in plain_modules(module).items() if isinstance(part, activation_types)]
            )
            if not chosen:
                kinds = ", ".join(kind.__name__ for kind in activation_types)
                raise ValueError(f"module {name!r} has no layer of type {kinds}: name its activations with `layers`")
            self._counters[name] = {layer: _Counter() for layer in chosen}
            self._taps[name] = [Taps(module, layer, select=counter) for layer, counter in self._counters[name].items()]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that are watched."""
        return tuple(self._counters)

    @contextmanager
    def counting(self, *names: str) -> Iterator[None]:
        """Count the forward passes in this block, of the modules named (of all, if none is).

        Raises:
            KeyError: no such module is watched.
        """
        for name in names:
            if name not in self._taps:
                raise KeyError(f"no module {name!r} is watched; there are {list(self.names)}")
        with ExitStack() as stack:
            for name in names or self.names:
                for taps in self._taps[name]:
                    stack.enter_context(taps)
            yield

    def fractions(self) -> dict[str, Tensor]:
        """The fraction of each module that ran since the last :meth:`clear`, as float64 scalars."""
        return {
            name: torch.stack([counter.active for counter in counters.values()]).sum().double()
            / sum(counter.total for counter in counters.values())
            for name, counters in self._ran()
        }

    def layers(self) -> dict[str, Tensor]:
        """The fraction of each layer that ran since the last :meth:`clear`, by module and layer: ``critic.q1.1``."""
        return {
            f"{name}.{layer}".rstrip("."): counter.active.double() / counter.total
            for name, counters in self._ran()
            for layer, counter in counters.items()
        }

    def clear(self) -> None:
        """Begin again at zero."""
        for counters in self._counters.values():
            for counter in counters.values():
                counter.clear()

    def _ran(self) -> "list[tuple[str, dict[str, _Counter]]]":
        found = []
        for name, counters in self._counters.items():
            ran = {layer: counter for layer, counter in counters.items() if counter.total}
            if ran:
                found.append((name, ran))
        return found


class _Counter:
    """What a tap selects of a layer's output: nothing but how many of its numbers are positive."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.active = torch.zeros((), dtype=torch.int64)
        self.total = 0

    def __call__(self, output: Tensor) -> Tensor:
        positive = torch.count_nonzero(output.detach() > 0)
        # by assignment, so that a number read before stays what it was
        self.active = positive if self.total == 0 else self.active + positive
        self.total += output.numel()
        return positive
