"""Cost of PS-KD in a training step: ResNet-18 on small images, and an ImageNet-sized memory, whole and compressed.

The plain step is cross-entropy with label smoothing; both steps include forward, backward and the optimizer. The peers compute the
same numbers: the cross-entropy with probabilities of PyTorch, and the calibration error of torchmetrics.
"""

from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.bench import Case, Peer, case, peer
from poise.core.experiments.resnets import resnet
from poise.core.labels.calibration import expected_calibration_error
from poise.core.labels.ps_kd import PSKDLoss
from poise.core.labels.soft_targets import soft_cross_entropy
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, Storage, TopKRows

IMAGENET = 1_281_167

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def smoothed(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def ps_kd(examples: int, classes: int, storage: Storage) -> PSKDLoss:
    """In the middle of training."""
    loss = PSKDLoss(examples, classes, 0.8, 300, memory=SampleBank(examples, classes, storage=storage))
    loss.set_epoch(150)
    return loss


def step(network: nn.Module, loss: Loss, examples: int, classes: int, batch: int, size: int) -> Callable[[], None]:
    """A training step, each time with other examples."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    indices = cycle(torch.randint(examples, (16, batch), generator=generator))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def run() -> None:
        value = loss(network(images), labels, next(indices))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return run


def cases() -> list[Case]:
    """Sizes that users have."""
    small, large = resnet(18, 100, "small"), resnet(18, 1000, "large")
    cifar = (50_000, 100, 32, 32)
    imagenet = (IMAGENET, 1000, 16, 224)
    found = [
        case(
            "ResNet-18, 32 x 32, batch 32, memory 50,000 x 100 float32",
            step(small, smoothed, *cifar),
            step(small, ps_kd(50_000, 100, DenseRows()), *cifar),
            repeats=9,
        )
    ]
    for name, storage in (("float16", DenseRows(torch.float16)), ("16 largest", TopKRows(16))):
        loss = ps_kd(IMAGENET, 1000, storage)
        found.append(
            case(
                f"ResNet-18, 224 x 224, batch 16, memory {IMAGENET:,} x 1000 {name} ({loss.memory.nbytes / 2**20:.0f} MB)",
                step(large, smoothed, *imagenet),
                step(large, loss, *imagenet),
                repeats=7,
            )
        )
    return found


def peers() -> list[Peer]:
    """The same numbers from other libraries."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    logits, targets = (torch.randn(256, 1000, generator=generator) for _ in range(2))
    targets = targets.softmax(1)
    probs = torch.randn(50_000, 100, generator=generator).softmax(1)
    labels = torch.randint(100, (50_000,), generator=generator)
    return [
        peer(
            "torch cross_entropy",
            version("torch"),
            "soft targets, 256 x 1000",
            lambda: soft_cross_entropy(logits, targets),
            lambda: F.cross_entropy(logits, targets),
        ),
        peer(
            "torchmetrics calibration_error",
            version("torchmetrics"),
            "50,000 x 100, 10 bins",
            lambda: expected_calibration_error(probs, labels),
            lambda: multiclass_calibration_error(probs, labels, num_classes=100, n_bins=10, norm="l1"),
        ),
    ]


def bench() -> dict[str, Any]:
    """The record of docs/results/core/ps-kd.bench.json."""
    return {"method": "core/ps-kd", "cases": cases(), "peers": peers()}
