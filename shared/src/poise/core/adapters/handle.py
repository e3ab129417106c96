r"""All adapters of a model at once: merge, switch off, group, count, save.

>>> import torch
>>> from torch import nn
>>> from poise.core import Adapters, LoRAConfig, apply_lora
>>> model = apply_lora(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), LoRAConfig(r=2))
>>> adapters = Adapters(model)
>>> list(adapters.layers), adapters.count()
(['0', '2'], Count(adapter=84, trainable=84, total=262))
>>> with adapters.disabled():  # the pretrained model
...     reference = model(torch.ones(1, 8))
>>> model = adapters.finish()  # plain layers again, with the adapters in their weights
>>> type(model[0]) is nn.Linear
True
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.delta import Delta
from poise.core.adapters.targets import replace_module
from poise.core.names import plain_modules


class Count(NamedTuple):
    """Numbers of parameters: of the adapter, of everything that is trained, of the whole model."""

    adapter: int
    trainable: int
    total: int


class Adapters:
    """The adapters of one name in a model: a view, which can be made anew at any time.

    Args:
        model: the model, wrapped or not.
        name: of the adapter.

    Raises:
        ValueError: the model has no adapter of this name.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.model, self.name = model, name
        if not self.layers:
            names = sorted({other for layer in adapted_layers(model).values() for other in layer.deltas})
            raise ValueError(f"the model has no adapter {name!r}; it has {names}")

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        """The layers with this adapter, by plain name."""
        return {key: layer for key, layer in adapted_layers(self.model).items() if self.name in layer.deltas}

    @property
    def deltas(self) -> dict[str, Delta]:
        """The deltas by plain name of the layer."""
        return {key: layer[self.name] for key, layer in self.layers.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are trained, by the plain name of the layer and their own."""
        for key, delta in self.deltas.items():
            for own, parameter in delta.named_parameters():
                if parameter.requires_grad:
                    yield f"{key}.{own}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, for the optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def groups(self, by: Literal["matrix", "module", "block"]) -> dict[str, list[nn.Parameter]]:
        """The parameters in groups by name, as penalties on groups want them.

        Args:
            by: every parameter alone; those of a layer; or those of a block: ``blocks.3`` of ``blocks.3.attn.qkv``, the name up to
                its first number, or the whole name if it has none.

        Raises:
            ValueError: an unknown way to group.
        """
        if by not in ("matrix", "module", "block"):
            raise ValueError(f"by must be 'matrix', 'module' or 'block', got {by!r}")
        groups: dict[str, list[nn.Parameter]] = {}
        for layer, delta in self.deltas.items():
            for own, parameter in delta.named_parameters():
                if parameter.requires_grad:
                    key = {"matrix": f"{layer}.{own}", "module": layer, "block": _block(layer)}[by]
                    groups.setdefault(key, []).append(parameter)
        return groups

    def requires_grad_(self, required: bool = True) -> "Adapters":
        """Train the parameters of this adapter, or freeze them.

        Args:
            required: whether they are trained.
        """
        for delta in self.deltas.values():
            for name, parameter in delta.named_parameters():
                parameter.requires_grad_(required and not name.startswith("taken_"))
        return self

    def count(self) -> Count:
        """Numbers of parameters."""
        everything = list(self.model.parameters())
        return Count(
            sum(
                p.numel()
                for delta in self.deltas.values()
                for n, p in delta.named_parameters()
                if not n.startswith("taken_")
            ),
            sum(p.numel() for p in everything if p.requires_grad),
            sum(p.numel() for p in everything),
        )

    def activate(self, *names: str) -> None:
        """Let the adapters of these names count, in every layer that has them, and no others.

        Args:
            names: of adapters; with several, the changes add up.

        Raises:
            ValueError: no layer has an adapter of such a name.
        """
        layers = adapted_layers(self.model).values()
        for name in names:
            if not any(name in layer.deltas for layer in layers):
                raise ValueError(f"the model has no adapter {name!r}")
        for layer in layers:
            layer.activate(*(name for name in names if name in layer.deltas))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what it did before it was adapted; all adapters are off, merged or not."""
        layers = adapted_layers(self.model).values()
        before = [(layer, layer.enabled, layer.merged) for layer in layers]
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled, merged in before:
                layer.enabled = enabled
                if merged:
                    layer.merge()

    def merge(self) -> None:
        """Put all active adapters into the weights; the layers cost what they did before."""
        for layer in adapted_layers(self.model).values():
            layer.merge()

    def unmerge(self) -> None:
        """Restore the weights bit by bit."""
        for layer in adapted_layers(self.model).values():
            layer.unmerge()

    def finish(self) -> nn.Module:
        """Put all active adapters into the weights for good, and the plain layers in their places. Returns the model."""
        for layer in adapted_layers(self.model).values():
            self._replace(layer, layer.plain())
        return self.model

    def remove(self) -> nn.Module:
        """Take this adapter away; a layer without adapters is plain again, and trained if it was before. Returns the model.

        What lies outside the adapted layers and was frozen when the adapter was attached stays frozen.
        """
        for layer in self.layers.values():
            layer.unmerge()
            layer.remove(self.name)
            if not layer.deltas:
                self._replace(layer, layer.released())
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the adapter alone, detached, by the plain name of the layer and their own."""
        return {
            f"{key}.{own}": tensor.detach()
            for key, delta in self.deltas.items()
            for own, tensor in delta.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of :meth:`state_dict`, of a model with the same pretrained weights.

        Where a delta took a part of the weight, the part that it takes now is exchanged for the one in the state.

        Args:
            state: the tensors.

        Raises:
            ValueError: names the tensors that are missing, not expected, or of another shape. Nothing was changed then.
            RuntimeError: the model is merged.
        """
        check_state(state, {key: tensor.shape for key, tensor in self.state_dict().items()})
        for key, layer in self.layers.items():
            own = {name: state[f"{key}.{name}"] for name in layer[self.name].state_dict()}
            layer.exchange(self.name, own)

    def _replace(self, layer: AdaptedLayer, plain: nn.Module) -> None:
        if layer is self.model:
            self.model = plain
        else:
            replace_module(self.model, layer, plain)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers that have adapters, by plain name, each once.

    Args:
        model: any model, wrapped or not.
    """
    names: dict[AdaptedLayer, str] = {}
    for name, module in plain_modules(model).items():
        if isinstance(module, AdaptedLayer):
            names.setdefault(module, name)
    return {name: layer for layer, name in names.items()}


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Compare names and shapes.

    Args:
        state: what was loaded.
        expected: what the model has.

    Raises:
        ValueError: they differ; names every difference.
    """
    faults = [f"{key} is not in the file" for key in expected if key not in state]
    faults += [f"{key} is not in the model" for key in state if key not in expected]
    faults += [
        f"{key} has shape {tuple(tensor.shape)}, the model {tuple(expected[key])}"
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key]
    ]
    if faults:
        raise ValueError("the adapter does not match the model: " + "; ".join(faults))


def _block(name: str) -> str:
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name
