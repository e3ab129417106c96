"""Cost of the orthogonality penalty in a training step, and against other ways to compute the same numbers.

Peers: the correlation of the kernel with itself in space, as released with Wang et al. 2020 (with the padding that the theory
needs); their older form by the layer's response to unit images; the singular values by NumPy as published by Sedghi et al.
2019; and those of the explicit matrix.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core import OrthogonalRegularizer, conv_as_matrix, conv_orth_loss, conv_singular_values
from poise.core.bench import Case, Peer, case, peer
from poise.core.experiments.resnets import resnet

KERNELS = (
    (32, 32, 3, 1),
    (64, 64, 3, 1),
    (128, 64, 3, 2),
    (256, 256, 3, 1),
    (256, 64, 3, 1),
    (64, 64, 5, 1),
    (64, 64, 7, 1),
    (64, 3, 7, 2),
)
"""M, C, k, S: layers of residual networks, and large kernels."""


def small_network() -> Case:
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(32, 32, 3), nn.Flatten(), nn.LazyLinear(10))
    return training_step("four convolutions, 28 x 28, batch 64", net, torch.rand(64, 1, 28, 28))


def residual_network() -> Case:
    net = resnet(18, 10, "small")
    skip = ("stem.0", "stages.*.0.shortcut.0")  # as Wang et al. do
    return training_step("ResNet-18, 32 x 32, batch 128", net, torch.rand(128, 3, 32, 32), skip, repeats=3)


def training_step(name: str, net: nn.Module, images: Tensor, skip: tuple[str, ...] = (), repeats: int = 7) -> Case:
    labels = torch.randint(10, (len(images),))
    net(images)  # gives lazy layers their shape
    penalty = OrthogonalRegularizer(net, weight=0.1, skip=skip)

    def step(with_penalty: bool) -> None:
        net.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        (loss + penalty() if with_penalty else loss).backward()

    warmup = 2 if repeats > 3 else 1
    return case(name, plain=lambda: step(False), method=lambda: step(True), repeats=repeats, warmup=warmup)


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss, weight)[0]


def kernel(rows: int, channels: int, taps: int) -> Tensor:
    weight = torch.randn(rows, channels, taps, taps) / (channels * taps**2) ** 0.5
    return weight.requires_grad_()


def correlation_in_space(rows: int, channels: int, taps: int, stride: int) -> Peer:
    weight = kernel(rows, channels, taps)
    padding = (taps - 1) // stride * stride
    middle = padding // stride

    def theirs() -> Tensor:
        correlation = F.conv2d(weight, weight, stride=stride, padding=padding)
        target = torch.zeros_like(correlation)
        target[:, :, middle, middle] = torch.eye(rows)
        return gradient((correlation - target).square().sum(), weight)

    return peer(
        "self-convolution (Wang et al. 2020)",
        torch.__version__,
        f"loss and gradient, {rows} x {channels} x {taps} x {taps}, stride {stride}",
        ours=lambda: gradient(conv_orth_loss(weight, stride), weight),
        theirs=theirs,
        repeats=5,
    )


def unit_images(rows: int = 64, channels: int = 64, taps: int = 3) -> Peer:
    weight = kernel(rows, channels, taps)
    size = 2 * taps - 1
    images = torch.eye(channels * size**2).view(-1, channels, size, size)
    middle = torch.arange(channels) * size**2 + size**2 // 2

    def theirs() -> Tensor:
        responses = F.conv2d(images, weight).flatten(1)
        residual = responses[middle] @ responses.T - torch.eye(len(images))[middle]
        return gradient(residual.square().sum(), weight)

    return peer(
        "unit images (Wang et al. 2020)",
        torch.__version__,
        f"loss of the columns and gradient, {rows} x {channels} x {taps} x {taps}",
        ours=lambda: gradient(conv_orth_loss(weight, regime="columns"), weight),
        theirs=theirs,
        repeats=3,
    )


def fourier_by_numpy(rows: int = 64, channels: int = 64, taps: int = 3, size: int = 32) -> Peer:
    weight = kernel(rows, channels, taps).detach().double()
    array = weight.permute(2, 3, 0, 1).numpy()

    def theirs() -> np.ndarray:
        values = np.linalg.svd(np.fft.fft2(array, (size, size), axes=(0, 1)), compute_uv=False)
        return np.sort(values.ravel())[::-1]

    return peer(
        "NumPy, FFT (Sedghi et al. 2019)",
        np.__version__,
        f"singular values, {rows} x {channels} x {taps} x {taps} on {size} x {size}",
        ours=lambda: conv_singular_values(weight, size),
        theirs=theirs,
        repeats=3,
    )


def explicit_matrix(rows: int = 16, channels: int = 8, taps: int = 3, size: int = 12) -> Peer:
    layer = nn.Conv2d(channels, rows, taps, padding=1, padding_mode="circular", bias=False).double()
    return peer(
        "explicit matrix, torch.linalg.svdvals",
        torch.__version__,
        f"singular values, {rows} x {channels} x {taps} x {taps} on {size} x {size}",
        ours=lambda: conv_singular_values(layer.weight.detach(), size),
        theirs=lambda: torch.linalg.svdvals(conv_as_matrix(layer, size).detach()),
        repeats=3,
    )


def bench() -> dict[str, Any]:
    """The record of docs/results/core/orthogonal-conv.bench.json."""
    torch.manual_seed(0)
    return {
        "method": "core/orthogonal-conv",
        "cases": [small_network(), residual_network()],
        "peers": [
            *(correlation_in_space(*size) for size in KERNELS),
            unit_images(),
            fourier_by_numpy(),
            explicit_matrix(),
        ],
    }
