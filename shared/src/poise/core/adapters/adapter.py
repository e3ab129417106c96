r"""One layer and what adapters add to its weight.

.. math:: W = W_{base} + \sum_{i\ \mathrm{active}} \Delta_i

A :class:`Delta` is the change :math:`\Delta` of one weight with its own parameters; an :class:`AdaptedLayer` stands in the place of a
layer, owns it, and adds the deltas that are active. :class:`~poise.core.Adapters` handles all layers of a model at once.

>>> import torch
>>> from torch import nn
>>> from poise.core import LoRADelta
>>> layer = AdaptedLayer(nn.Linear(8, 4))
>>> layer.add("default", LoRADelta(layer.base, rank=2))
>>> _ = nn.init.normal_(layer.deltas["default"].b)
>>> x = torch.ones(3, 8)
>>> y = layer(x)
>>> layer.merge()  # one matrix product again, until unmerge() restores the weight bit by bit
>>> torch.allclose(layer(x), y, atol=1e-6), layer.merged
(True, True)
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.adapters.delta import Delta
from poise.core.adapters.targets import AdaptedModule, as_weight, layer_kind, weight_matrix
from poise.core.functional._numerics import full_precision, widen


class AdaptedLayer(AdaptedModule):
    """A Linear, Conv2d or ``Conv1D`` layer with named deltas, of which any number are active and add up.

    ``weight`` is the weight it computes with, differentiable, so that code which reads the weight of a layer (as
    ``nn.MultiheadAttention`` does) sees the deltas; any other attribute it lacks is that of the layer. Its ``state_dict`` is that of
    the unmerged layer whether or not it is merged, and loading one keeps it merged if it was.

    Args:
        base: the layer.

    Attributes:
        base: the layer; while merged, with the merged weight.
        deltas: the deltas by name.
        active: names of those that count.
        enabled: if false, the layer computes what it did before it was adapted.

    Raises:
        TypeError: ``base`` is of another kind.
    """

    original: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if layer_kind(base) is None or isinstance(base, AdaptedModule):
            raise TypeError(f"base must be a Linear, Conv2d or Conv1D layer, got {type(base).__name__}")
        self.base = base
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.required = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        self.register_buffer("original", None, persistent=False)
        self.register_state_dict_post_hook(_unmerged_state)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self.train(base.training)

    @property
    def merged(self) -> bool:
        """Whether the deltas are in the weight of the layer."""
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the active deltas."""
        y = self.base(x)
        if self.original is None:
            for name, delta in self.items():
                if self.enabled and name in self.active:
                    y = delta(x, y, self.base)
                elif delta.takes:
                    y = delta.give_back(x, y, self.base)
        return cast(Tensor, y)

    def items(self) -> Iterator[tuple[str, Delta]]:
        """The deltas by name."""
        for name, delta in self.deltas.items():
            yield name, cast(Delta, delta)

    def add(self, name: str, delta: Delta) -> None:
        """Put another delta to those of the layer, and make it active.

        Args:
            name: of the delta; no dots.
            delta: made for this layer. What it takes is subtracted from the weight.

        Raises:
            ValueError: the name is taken or has a dot, or the shapes differ.
            RuntimeError: the layer is merged.
        """
        self._require_unmerged("add a delta")
        if name in self.deltas or "." in name or not name:
            raise ValueError(f"name must be new and without dots, got {name!r}; the layer has {list(self.deltas)}")
        with torch.no_grad():
            change, weight = delta.matrix(), weight_matrix(self.base)
        if change.shape != weight.shape:
            raise ValueError(
                f"the delta is for a weight of shape {tuple(change.shape)}, the layer has {tuple(weight.shape)}"
            )
        if delta.takes:
            self._shift(-delta.taken())
        self.deltas[name] = delta.train(self.training)
        self.active += (name,)

    def remove(self, name: str) -> Delta:
        """Take a delta away; what it had taken is added to the weight again, exact to rounding.

        Args:
            name: of the delta.

        Raises:
            ValueError: there is none of this name.
            RuntimeError: the layer is merged.
        """
        self._require_unmerged("remove a delta")
        delta = self[name]
        if delta.takes:
            self._shift(delta.taken())
        del self.deltas[name]
        self.active = tuple(other for other in self.active if other != name)
        return delta

    def exchange(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load the state of a delta; where it had taken another part of the weight, that is given back for the new one.

        Args:
            name: of the delta.
            state: as its ``state_dict``.

        Raises:
            ValueError: there is none of this name.
            RuntimeError: the layer is merged.
        """
        self._require_unmerged("load a delta")
        delta = self[name]
        mine = delta.state_dict()
        # Giving back and taking again rounds the weight: only where there is something to exchange.
        if not delta.takes or all(
            torch.equal(mine[key], state[key].to(mine[key])) for key in mine if key.startswith("taken_")
        ):
            delta.load_state_dict(state)
            return
        self._shift(delta.taken())
        delta.load_state_dict(state)
        self._shift(-delta.taken())

    def activate(self, *names: str) -> None:
        """Let these deltas count and no others.

        Args:
            names: any number of the names.

        Raises:
            ValueError: there is none of such a name.
            RuntimeError: the layer is merged.
        """
        self._require_unmerged("choose other deltas")
        for name in names:
            self[name]
        self.active = tuple(name for name in self.deltas if name in names)

    def __getitem__(self, name: str) -> Delta:
        if name not in self.deltas:
            raise ValueError(f"there is no delta {name!r}; the layer has {list(self.deltas)}")
        return cast(Delta, self.deltas[name])

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active deltas into the weight; :meth:`unmerge` restores it bit by bit from a copy. Does nothing when merged.

        Raises:
            RuntimeError: the layer is switched off.
        """
        if self.merged:
            return
        if not self.enabled:
            raise RuntimeError("the layer is switched off: merge outside of disabled()")
        weight = self._weight()
        total = self._total()
        original = weight.detach().clone()
        if total is not None:
            self._shift(total)
        self.original = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight that the layer had before :meth:`merge`. Does nothing when not merged."""
        if self.original is not None:
            self._weight().copy_(self.original)
            self.original = None

    def plain(self) -> nn.Module:
        """The layer alone, with the active deltas in its weight and ``requires_grad`` as it was before it was adapted."""
        self.merge()
        self.original = None
        return self.released()

    def released(self) -> nn.Module:
        """The layer with ``requires_grad`` as it was before it was adapted."""
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self.required.get(name, True))
        return self.base

    @torch.no_grad()
    def pretrained(self) -> Float[Tensor, "outputs inputs"]:
        """The weight before the layer was adapted, as a matrix in at least float32; exact to rounding."""
        weight = self._weight() if self.original is None else self.original
        matrix = widen(weight.mT if layer_kind(self.base) == "conv1d" else weight.flatten(1), "weight")
        return matrix + sum(delta.taken() for _, delta in self.items() if delta.takes)

    def delta_weight(self) -> Tensor:
        """What the active deltas add to the weight of ``base`` (before merging), in the layout of the weight."""
        total = self._total()
        return torch.zeros_like(self._weight()) if total is None else as_weight(self.base, total)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, differentiable."""
        total = None if self.merged else self._total()
        weight = self._weight()
        return weight if total is None else (widen(weight, "weight") + as_weight(self.base, total)).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return cast(Tensor | None, self.base.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "base" not in modules or name.startswith("_"):
                raise
            return getattr(modules["base"], name)

    def extra_repr(self) -> str:
        return (
            f"active={list(self.active)}" + ("" if self.enabled else ", disabled") + (", merged" if self.merged else "")
        )

    def _weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.base.weight)

    def _total(self) -> Tensor | None:
        """What the layer computes with besides the weight of its base."""
        parts = []
        with full_precision(self._weight()):
            for name, delta in self.items():
                if self.enabled and name in self.active:
                    parts.append(delta.matrix())
                elif delta.takes:
                    parts.append(delta.taken())
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] if parts else None

    @torch.no_grad()
    def _shift(self, change: Tensor) -> None:
        """Add to the weight, rounding once."""
        weight = self._weight()
        weight.copy_(widen(weight, "weight") + as_weight(self.base, change.to(weight.device)))

    def _require_unmerged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"the layer is merged: unmerge it to {what}")


def _unmerged_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Mapping[str, Any]) -> None:
    assert isinstance(module, AdaptedLayer)
    if module.original is not None:
        state[f"{prefix}base.weight"] = module.original


def _before_loading(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, AdaptedLayer)
    module.__dict__["merge_again"] = module.merged
    module.unmerge()


def _after_loading(module: nn.Module, _: Any) -> None:
    assert isinstance(module, AdaptedLayer)
    if module.__dict__.pop("merge_again", False):
        module.merge()
