r"""ReDo: recycle dormant units.

Sokar, Agarwal, Castro and Evci, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", ICML 2023, arXiv 2302.12902.

The score of a unit i of a layer is its share of the layer's mean activity,

.. math:: s_i = \frac{\mathbb E_x |h_i(x)|}{\frac{1}{H} \sum_k \mathbb E_x |h_k(x)|},

and it is dormant where :math:`s_i \le \tau`. Its incoming weights are drawn anew and its outgoing weights become zero, so that the
network computes the same as before for units that were silent.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> network, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(512, 3)
>>> with torch.no_grad():
...     network[0].bias[:2] = -100.0
>>> before = network(x)
>>> [mask.sum().item() for mask in recycle_dormant(network, x, threshold=0.0).values()]
[2]
>>> torch.allclose(network(x), before), sum(mask.sum().item() for mask in dormant_units(network, x).values()) < 2
(True, True)
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.core.taps import Taps
from poise.rl.plasticity.reset import reset_module

Layer = nn.Linear | nn.Conv2d


def dormant_scores(activations: Float[Tensor, "batch units *places"]) -> Float[Tensor, "units"]:
    """Each unit's share of the layer's mean activity; zeros for a layer that is silent altogether.

    Args:
        activations: outputs of the activation function; a channel of a convolution is a unit.

    Source:
        Sokar et al. 2023, definition 3.1.
    """
    kept = activations.detach().abs().transpose(0, 1).flatten(1).mean(1)
    mean = kept.mean()
    return kept / torch.where(mean > 0, mean, 1)


def dormant_units(network: nn.Module, *inputs: Any, threshold: float = 0.1) -> dict[str, Bool[Tensor, "units"]]:
    """Which units are dormant on a batch, by the name of the layer before the activation.

    Args:
        network: any network with ``nn.Sequential`` parts in which Linear or Conv2d layers are followed by ReLU, with or without a
            normalisation in between, and by another such layer.
        inputs: what to call it with.
        threshold: τ; 0 finds the units that are dead.

    Raises:
        ValueError: a negative threshold, or no such layer.
    """
    if threshold < 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    triples = list(_triples(network))
    if not triples:
        raise ValueError(
            "found no Linear or Conv2d layer that a ReLU and another such layer follow in an nn.Sequential"
        )
    with torch.no_grad(), Taps(network, *[activation for _, activation, _ in triples], detach=True, clone=True) as taps:
        network(*inputs)
        return {layer: dormant_scores(taps[activation]) <= threshold for layer, activation, _ in triples}


@torch.no_grad()
def recycle_dormant(
    network: nn.Module,
    *inputs: Any,
    threshold: float = 0.1,
    generator: torch.Generator | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Bool[Tensor, "units"]]:
    """Give dormant units new incoming weights and no outgoing ones, in place.

    Args:
        network: see :func:`dormant_units`.
        inputs: a batch on which to look.
        threshold: see there.
        generator: fixes the new weights; see :func:`~poise.rl.reset_module`.
        optimizer: its moments of the replaced weights become zero.

    Returns:
        Which units were recycled, by layer.

    Raises:
        ValueError: see :func:`dormant_units`; or a layer after the activation whose inputs are no multiple of the units.

    Source:
        Sokar et al. 2023, algorithm 1.
    """
    found = dormant_units(network, *inputs, threshold=threshold)
    for name, dormant in found.items():
        layer = _layer(network, name)
        fresh = reset_module(copy.deepcopy(layer), generator)
        for own, new in zip(layer.parameters(), fresh.parameters(), strict=True):
            _put(own, dormant.view(-1, *[1] * (own.ndim - 1)), new, optimizer)
    for name, _, next_name in _triples(network):  # afterwards: the incoming weights of one are the outgoing of another
        weight, dormant = _layer(network, next_name).weight, found[name]
        columns = weight.shape[1]
        if columns % len(dormant):
            raise ValueError(
                f"layer {next_name!r} has {columns} inputs, no multiple of the {len(dormant)} units of {name!r}"
            )
        outgoing = dormant.repeat_interleave(columns // len(dormant))  # a channel is flattened into many inputs
        _put(weight, outgoing.view(1, -1, *[1] * (weight.ndim - 2)), torch.zeros_like(weight), optimizer)
    return found


def _triples(network: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of each layer, of the activation after it and of the layer after that, inside one Sequential."""
    for prefix, part in network.named_modules():
        if not isinstance(part, nn.Sequential):
            continue
        layer = activation = ""
        for index, child in enumerate(part):
            name = f"{prefix}.{index}".lstrip(".")
            if isinstance(child, Layer):
                if activation:
                    yield layer, activation, name
                layer, activation = name, ""
            elif isinstance(child, nn.ReLU) and layer:
                activation = name


def _layer(network: nn.Module, name: str) -> Layer:
    layer = network.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer


def _put(own: Tensor, where: Tensor, new: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    own.copy_(torch.where(where, new, own))
    if optimizer is not None:
        for moment in optimizer.state.get(own, {}).values():
            if isinstance(moment, Tensor) and moment.shape == own.shape:
                moment.masked_fill_(where, 0)
