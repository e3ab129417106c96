"""Cost of SHISRCNet: of its super-resolution against plain residual blocks of equal width, of a joint step against the classifier
alone, of the order of memory, and of its two losses against other libraries and against the plain formula.

uv run python tools/bench.py medical/shisrcnet
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

from poise.core.bench import Case, Peer, case, peer
from poise.medical import MFEBlock, SHISRCLoss, SHISRCNet, SRResNetMFE, degrade, focal_loss

WIDTH = 64


class Residual(nn.Module):
    """The block of SRResNet: two convolutions of 3x3 with batch normalization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def srresnet(scale: int, blocks: int = 3) -> SRResNetMFE:
    """The same skeleton with residual blocks."""
    network = SRResNetMFE(scale, WIDTH, blocks)
    for index in range(blocks):
        network.body[index] = Residual(WIDTH)
    return network


def gradient_step(module: nn.Module, x: Tensor, target: Tensor | None = None) -> Callable[[], Tensor]:
    """Forward and backward."""

    def step() -> Tensor:
        module.zero_grad()
        output = module(x)
        loss = output.square().mean() if target is None else l1_loss(output, target)
        loss.backward()
        return loss.detach()

    return step


def block_against_residual(side: int = 96, batch: int = 2) -> Case:
    """One block and the other: four dilated convolutions and a projection against two convolutions."""
    torch.manual_seed(0)
    x = torch.randn(batch, WIDTH, side, side)
    name = f"one block, {batch} maps of {WIDTH} x {side} x {side}: MFE against residual"
    return case(name, gradient_step(Residual(WIDTH), x), gradient_step(MFEBlock(WIDTH), x))


def network_against_srresnet(scale: int = 2, side: int = 96, batch: int = 2) -> Case:
    """Both networks with their convolutions at high resolution, which the blocks share."""
    torch.manual_seed(0)
    hr = torch.rand(batch, 3, scale * side, scale * side)
    lr = degrade(hr, scale)
    plain, ours = srresnet(scale), SRResNetMFE(scale, WIDTH)
    name = f"x{scale} super-resolution step, {batch} images of {side} x {side}, three blocks of {WIDTH}: MFE against residual"
    return case(name, gradient_step(plain, lr, hr), gradient_step(ours, lr, hr))


def training_step(
    model: SHISRCNet, images: Tensor, second: Tensor | None, hr: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """Forward, backward and a step of Adam."""
    criterion, optimizer = SHISRCLoss(), torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> Tensor:
        loss = criterion(model(images, second), hr, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def joint_against_classifier(scale: int = 2, hr_size: int = 128, batch: int = 4) -> Case:
    """What joint training adds to a classifier of high-resolution images."""
    torch.manual_seed(0)
    hr, labels = torch.rand(batch, 3, hr_size, hr_size), torch.arange(batch) % 2
    alone, joint = SHISRCNet(1, upscaler=nn.Identity()), SHISRCNet(scale)
    name = (
        f"training step, {batch} images of {hr_size} x {hr_size} from 1/{scale}: SHISRCNet against its classifier alone"
    )
    return case(
        name,
        training_step(alone, hr, None, hr, labels),
        training_step(joint, degrade(hr, scale), hr, hr, labels),
    )


def channels_last(scale: int = 2, hr_size: int = 128, batch: int = 4) -> Case:
    """The same joint step with channels last in memory, against channels first."""
    steps = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        hr = torch.rand(batch, 3, hr_size, hr_size).contiguous(memory_format=memory_format)
        labels = torch.arange(batch) % 2
        model = SHISRCNet(scale).to(memory_format=memory_format)
        steps.append(training_step(model, degrade(hr, scale), hr, hr, labels))
    return case(f"joint step, {batch} images of {hr_size} x {hr_size}: channels last against channels first", *steps)


def views_in_one_batch(scale: int = 2, hr_size: int = 128, batch: int = 4) -> Case:
    """Both views through the classifier in one call, against one call each."""
    torch.manual_seed(0)
    hr, labels = torch.rand(batch, 3, hr_size, hr_size), torch.arange(batch) % 2
    separate, joint = SHISRCNet(scale), SHISRCNet(scale, joint_batch=True)
    lr = degrade(hr, scale)
    name = f"joint step, {batch} images of {hr_size} x {hr_size}: both views in one batch against one batch each"
    return case(name, training_step(separate, lr, hr, hr, labels), training_step(joint, lr, hr, hr, labels))


def focal_against_cross_entropy(count: int = 4_096, classes: int = 100) -> Case:
    """Loss and gradient."""
    torch.manual_seed(0)
    logits, labels = torch.randn(count, classes, requires_grad=True), torch.arange(count) % classes
    name = f"focal loss and gradient against cross-entropy, {count:,} x {classes}"
    return case(
        name,
        lambda: torch.autograd.grad(cross_entropy(logits, labels), logits),
        lambda: torch.autograd.grad(focal_loss(logits, labels, 5.0), logits),
        memory=False,
    )


def against_monai(count: int = 4_096, classes: int = 100) -> Peer:
    """Loss and gradient of the softmax form."""
    from monai.losses import FocalLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(count, classes, requires_grad=True), torch.arange(count) % classes
    theirs = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=5.0)

    def ours_gradient() -> Tensor:
        return torch.autograd.grad(focal_loss(logits, labels, 5.0), logits)[0]

    def their_gradient() -> Tensor:
        # its mean is over the classes as well
        return torch.autograd.grad(classes * theirs(logits, labels[:, None]), logits)[0]

    name = f"focal loss with softmax, gradient, {count:,} x {classes}"
    return peer("MONAI", version("monai"), name, ours_gradient, their_gradient)


def bench() -> dict[str, Any]:
    """All cases."""
    return {
        "method": "medical/shisrcnet",
        "cases": [
            block_against_residual(),
            network_against_srresnet(),
            joint_against_classifier(),
            channels_last(),
            views_in_one_batch(),
            focal_against_cross_entropy(),
        ],
        "peers": [against_monai()],
    }
