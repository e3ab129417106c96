"""Cost of companded weights in a training step, and against other reparametrizations.

Peers: the same formula as an ordinary parametrization, whose gradient autograd derives (``a * atan(v / b)``), and PyTorch's own
``weight_norm``. All of them leave the function of the network as it is, so that the outputs can be compared.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from poise.core.bench import Case, Peer, case, peer
from poise.core.experiments.resnets import resnet
from poise.core.weights.companding import WeightCompander
from poise.core.weights.weight_compander import apply_weight_compander


class Unfused(nn.Module):
    """The formula, left to autograd."""

    def __init__(self, compander: WeightCompander) -> None:
        super().__init__()
        self.compander = compander

    def forward(self, v: Tensor) -> Tensor:
        a, b = self.compander.a, self.compander.b
        return a * torch.atan(v / b)

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.compander.right_inverse(w)


def companded(net: nn.Module, learnable: bool = True) -> nn.Module:
    return apply_weight_compander(copy.deepcopy(net), learnable=learnable)


def unfused(layer: nn.Module, learnable: bool) -> nn.Module:
    weight = layer.get_parameter("weight").detach()
    compander = WeightCompander(scale := 4 * weight.square().mean().sqrt(), scale, learnable=learnable)
    return parametrize.register_parametrization(copy.deepcopy(layer), "weight", Unfused(compander))


def norm(layer: nn.Module, learnable: bool) -> nn.Module:
    normed = parametrizations.weight_norm(copy.deepcopy(layer))
    normed.get_parameter("parametrizations.weight.original0").requires_grad_(learnable)
    return normed


def step(net: nn.Module, inputs: Tensor) -> Tensor:
    """Forward and backward; the output."""
    net.zero_grad()
    output = net(inputs)
    F.mse_loss(output, torch.zeros_like(output)).backward()
    return output.detach()


def training_step(name: str, net: nn.Module, inputs: Tensor, repeats: int = 7) -> Case:
    method = companded(net)
    return case(name, plain=lambda: step(net, inputs), method=lambda: step(method, inputs), repeats=repeats)


def against(name: str, other: Callable[[nn.Module, bool], nn.Module], layer: nn.Module, learnable: bool) -> Peer:
    inputs = torch.randn(1, 256, 4, 4)
    ours, theirs = companded(layer, learnable), other(layer, learnable)
    scales = "learned" if learnable else "fixed"
    return peer(
        name,
        torch.__version__,
        f"forward and backward, convolution 256 -> 256, 3 x 3, on 4 x 4, batch 1, {scales} scales",
        ours=lambda: step(ours, inputs),
        theirs=lambda: step(theirs, inputs),
    )


def bench() -> dict[str, Any]:
    """The record of docs/results/core/weight-compander.bench.json."""
    torch.manual_seed(0)
    layer, small, large = nn.Conv2d(256, 256, 3, padding=1), torch.randn(8, 256, 8, 8), torch.randn(64, 256, 8, 8)
    images = torch.rand(32, 3, 32, 32)
    return {
        "method": "core/weight-compander",
        "cases": [
            training_step("convolution 256 -> 256, 3 x 3, on 8 x 8, batch 8", layer, small),
            training_step("convolution 256 -> 256, 3 x 3, on 8 x 8, batch 64", layer, large),
            training_step("ResNet-18, 32 x 32, batch 32", resnet(18, 10, "small"), images, repeats=3),
        ],
        "peers": [
            against(name, compand, layer, learnable)
            for learnable in (False, True)
            for name, compand in (("parametrization without a fused gradient", unfused), ("weight_norm", norm))
        ],
    }
