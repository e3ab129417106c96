"""Cost of ELR in a training step: ResNet-18 on small images, and an ImageNet-sized memory, whole and compressed.

The plain step is cross-entropy; both steps include forward, backward and the optimizer. ``cleanlab`` finds label errors from
predictions too, after training and with cross-validation; it is no peer of the loss.
"""

from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.bench import Case, Peer, case, peer, relative_difference
from poise.core.experiments.resnets import resnet
from poise.core.labels.elr import ELRLoss
from poise.core.labels.elr_plus import WeightAverage
from poise.core.labels.mixing import Mix
from poise.core.labels.soft_targets import soft_labels
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, Storage, TopKRows

IMAGENET = 1_281_167

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def step(network: nn.Module, loss: Loss, examples: int, classes: int, batch: int, size: int) -> Callable[[], None]:
    """A training step, each time with other examples."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    indices = cycle(torch.randint(examples, (16, batch), generator=generator))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        value = loss(network(images), labels, next(indices))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return run


def elr(examples: int, classes: int, storage: Storage) -> ELRLoss:
    return ELRLoss(examples, classes, memory=SampleBank(examples, classes, storage=storage))


def cases() -> list[Case]:
    """Sizes that users have."""
    small, large = resnet(18, 100, "small"), resnet(18, 1000, "large")
    cifar = (50_000, 100, 32, 32)
    imagenet = (IMAGENET, 1000, 16, 224)
    found = [
        case(
            "ResNet-18, 32 x 32, batch 32, memory 50,000 x 100 float32",
            step(small, plain, *cifar),
            step(small, elr(50_000, 100, DenseRows()), *cifar),
            repeats=9,
        )
    ]
    for name, storage in (("float16", DenseRows(torch.float16)), ("16 largest", TopKRows(16))):
        memory = elr(IMAGENET, 1000, storage)
        found.append(
            case(
                f"ResNet-18, 224 x 224, batch 16, memory {IMAGENET:,} x 1000 {name} ({memory.memory.nbytes / 2**20:.0f} MB)",
                step(large, plain, *imagenet),
                step(large, memory, *imagenet),
                repeats=7,
            )
        )
    return found


def peers() -> list[Peer]:
    """PyTorch's average of weights, and torchvision's mixup; both compute the same numbers."""
    from torchvision.transforms.v2 import MixUp

    model = resnet(18, 100, "small")
    ours = WeightAverage(model, 0.997, 0)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    theirs.update_parameters(model)  # its first update copies the model, which ours does when it is made
    for _ in range(5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        ours.update(model)
        theirs.update_parameters(model)

    mixup = MixUp(num_classes=100, alpha=1.0)  # mixes each image with the one before it
    images, labels = torch.rand(128, 3, 32, 32), torch.randint(100, (128,))
    mixed, soft = mixup(images, labels)
    partner = torch.arange(128).roll(1)
    distinct = labels != labels[partner]
    share = soft.gather(1, labels[:, None])[distinct].mean().item()
    mix = Mix(partner, share)

    return [
        peer(
            "torch AveragedModel",
            version("torch"),
            "average of the weights of ResNet-18",
            lambda: ours.update(model),
            lambda: theirs.update_parameters(model),
            agreement=relative_difference(weights(ours.average), weights(theirs.module)),
        ),
        peer(
            "torchvision MixUp",
            version("torchvision"),
            "128 x 3 x 32 x 32 and labels",
            lambda: (mix(images), mix(soft_labels(labels, 100))),
            lambda: mixup(images, labels),
            agreement=relative_difference(mix(images), mixed),
        ),
    ]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def bench() -> dict[str, Any]:
    """The record of docs/results/core/elr.bench.json."""
    return {"method": "core/elr", "cases": cases(), "peers": peers()}
