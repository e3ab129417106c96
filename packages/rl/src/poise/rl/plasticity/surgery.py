"""Changes of an ``nn.Sequential`` that are said to keep plasticity: layer norm, spectral norm, CReLU.

Each takes a perceptron and gives a new one of the same layers, to be applied before training; agents take them as
``heads=with_layer_norm``.

>>> from torch import nn
>>> head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
>>> [type(layer).__name__ for layer in with_layer_norm(head)]
['Linear', 'LayerNorm', 'ReLU', 'Linear']
>>> [str(layer) for layer in with_crelu(head)][1:]
['CReLU()', 'Linear(in_features=16, out_features=1, bias=True)']
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class CReLU(nn.ReLU):
    """Concatenated ReLU, ``[relu(x), relu(-x)]`` along the last axis: whatever the input, one half responds.

    It is a kind of ``nn.ReLU``, so that its units count in the fraction of active units: that fraction is one half by construction.

    Source:
        Shang et al., arXiv 1603.05201; against the loss of plasticity: Abbas et al., arXiv 2303.07507.
    """

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch two_d"]:
        return torch.cat([x, -x], dim=-1).relu_()

    def extra_repr(self) -> str:
        return ""


def with_layer_norm(network: nn.Sequential) -> nn.Sequential:
    """A LayerNorm between each linear layer and its ReLU.

    Raises:
        ValueError: no linear layer that a ReLU follows.

    Source:
        Ba, Kiros and Hinton, arXiv 1607.06450; against the loss of plasticity: Lyle et al., arXiv 2303.01486.
    """
    layers: list[nn.Module] = []
    for layer in network:
        before = layers[-1] if layers else None
        if isinstance(layer, nn.ReLU) and isinstance(before, nn.Linear):
            layers.append(nn.LayerNorm(before.out_features, **_like(before)))
        layers.append(layer)
    return _changed(network, layers)


def with_spectral_norm(network: nn.Sequential) -> nn.Sequential:
    """Every hidden linear layer divided by its largest singular value; the last layer is left as it is.

    Raises:
        ValueError: no hidden linear layer.

    Source:
        Miyato et al., arXiv 1802.05957; in reinforcement learning: Gogianu et al., arXiv 2105.05246.
    """
    hidden = {layer for layer, activation in _pairs(network) if isinstance(activation, nn.ReLU)}
    return _changed(
        network,
        [parametrizations.spectral_norm(layer) if layer in hidden else layer for layer in network],
        bool(hidden),
    )


def with_crelu(network: nn.Sequential) -> nn.Sequential:
    """Every ReLU after a linear layer a :class:`CReLU`, and the linear layer after it, new, twice as wide on its input side.

    Raises:
        ValueError: no linear layer that a ReLU follows.
    """
    layers: list[nn.Module] = []
    doubled = False
    for layer in network:
        if isinstance(layer, nn.ReLU) and layers and isinstance(layers[-1], nn.Linear):
            layers.append(CReLU())
            doubled = True
        elif isinstance(layer, nn.Linear) and doubled:
            bias = layer.bias is not None
            layers.append(nn.Linear(2 * layer.in_features, layer.out_features, bias=bias, **_like(layer)))
            doubled = False
        else:
            layers.append(layer)
    return _changed(network, layers)


def _pairs(network: nn.Sequential) -> list[tuple[nn.Module, nn.Module]]:
    layers = list(network)
    return [(one, two) for one, two in pairwise(layers) if isinstance(one, nn.Linear)]


def _like(layer: nn.Linear) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _changed(network: nn.Sequential, layers: list[nn.Module], changed: bool | None = None) -> nn.Sequential:
    if changed is None:
        changed = [type(layer) for layer in layers] != [type(layer) for layer in network]
    if not changed:
        raise ValueError(f"found no linear layer that an nn.ReLU follows in {network}")
    return nn.Sequential(*layers)
