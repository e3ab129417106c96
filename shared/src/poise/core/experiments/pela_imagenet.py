"""PELA on ImageNet: a pretrained transformer of timm, images in one folder per class, and the settings of the released scripts.

The released recipe also draws RandAugment, colour jitter and random erasing; here images are cropped, mirrored, and mixed.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.core.experiments.pela_problem import Batch, Problem, cosine
from poise.core.experiments.published_images import (
    evaluation_batches,
    read_image_folders,
    steps_per_epoch,
    training_batches,
)
from poise.core.gpu import derive_generator
from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.labels.soft_targets import soft_cross_entropy, soft_labels

if TYPE_CHECKING:
    from poise.core.experiments.pela import Config

MEASURED = 2_000
"""Validation images on which features are compared."""


def imagenet_problem(config: "Config", run: Run) -> Problem:
    """The pretrained network and ImageNet."""
    images = run.load(partial(read_image_folders, size=config.size))
    classes = len(images.train.classes)
    teacher = load_network(config, classes).to(run.device)
    mean, deviation = (torch.tensor(settings(teacher)[key], device=run.device).view(3, 1, 1) for key in ("mean", "std"))
    per_pass = steps_per_epoch(images.train, config.batch)
    steps = config.passes * per_pass

    def batches(wanted: range) -> Iterator[Batch]:
        drawn = training_batches(
            images.train,
            config.batch,
            wanted,
            seed=run.seed,
            device=run.device,
            workers=config.workers,
            rank=run.rank,
            world=run.world,
        )
        for step, (x, y) in zip(wanted, drawn, strict=True):
            target = soft_labels(y, classes, smoothing=config.smoothing)
            generator = derive_generator(run.seed, "mix", step, run.rank)
            x, target = mixed((x - mean) / deviation, target, config.mixup, config.cutmix, generator)
            yield Batch({"x": x}, target)

    def unseen(count: int | None = MEASURED) -> Iterator[Batch]:
        for x, y in evaluation_batches(images.test, min(config.batch, 128), run.device, count):
            yield Batch({"x": (x - mean) / deviation}, y)

    @torch.no_grad()
    def measure(net: nn.Module, name: str) -> dict[str, float]:
        net.eval()
        right = [(net(**batch.inputs).argmax(1) == batch.target).double() for batch in unseen(None)]
        return {"accuracy": float(torch.cat(right).mean())}

    warmup = config.warmup * per_pass
    return Problem(
        teacher=teacher,
        blocks=("layers.*.blocks.*",) if hasattr(teacher, "layers") else ("blocks.*",),
        skip=("head", *config.skip),
        steps=steps,
        rate=config.learning_rate * config.batch / 512,
        schedule=cosine(
            steps, warmup, config.warmup_rate / config.learning_rate, config.least_rate / config.learning_rate
        ),
        batches=batches,
        task_loss=mixed_cross_entropy,
        unseen=unseen,
        measure=measure,
    )


def load_network(config: "Config", classes: int) -> nn.Module:
    """The network of timm with its pretrained weights, from a file or, without one, from where timm finds them.

    Raises:
        BadInput: timm is not installed, or the weights are of another network or for another number of classes.
    """
    try:
        import timm
    except ImportError as error:
        raise BadInput("this preset needs timm, which is not installed: pip install timm") from error
    of_file = {} if config.checkpoint is None else {"file": str(config.checkpoint), "num_classes": classes}
    try:
        network: nn.Module = timm.create_model(
            config.network,
            pretrained=True,
            pretrained_cfg_overlay=of_file,
            num_classes=classes,
            img_size=config.size,
            drop_path_rate=config.drop_path,
        )
    except (RuntimeError, FileNotFoundError) as error:
        raise BadInput(f"the weights of {config.network} for {classes} classes cannot be loaded: {error}") from error
    if settings(network)["num_classes"] != classes:
        raise BadInput(
            f"--data has {classes} classes, and {config.network} was trained on {settings(network)['num_classes']}: "
            "give weights for these classes with --set checkpoint=FILE"
        )
    return network


def settings(network: nn.Module) -> Any:
    """What timm knows about the pretrained weights: classes, mean and deviation of the channels."""
    return network.pretrained_cfg


def mixed(x: Tensor, target: Tensor, mixup: float, cutmix: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix of a batch with itself in reverse order, each half of the time where both are on.

    Source:
        Touvron et al., "Training data-efficient image transformers", ICML 2021, table 9.
    """
    cut, at = torch.rand(2, generator=generator).tolist()
    use_cutmix = cutmix > 0 and (mixup == 0 or cut < 0.5)
    alpha = cutmix if use_cutmix else mixup
    if alpha == 0:
        return x, target
    draws = np.random.default_rng(int(at * 2**53))  # torch draws no Beta variable from a generator of one's own
    share = float(draws.beta(alpha, alpha))
    if use_cutmix:
        x, share = with_box_of_partner(x, share, draws)
    else:
        x = share * x + (1 - share) * x.flip(0)
    return x, share * target + (1 - share) * target.flip(0)


def with_box_of_partner(x: Tensor, share: float, draws: np.random.Generator) -> tuple[Tensor, float]:
    """A box of about ``1 - share`` of the area from the partner, and the exact share that is left."""
    side = (1 - share) ** 0.5
    (top, bottom), (left, right) = (box_edges(size, int(size * side), draws) for size in x.shape[-2:])
    x, partner = x.clone(), x.flip(0)
    x[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / x[0, 0].numel()


def box_edges(size: int, length: int, draws: np.random.Generator) -> tuple[int, int]:
    """Where a box of this length begins and ends, cut off at the edges of the image."""
    middle = int(draws.integers(size))
    return max(0, middle - length // 2), min(size, middle + length // 2)


def mixed_cross_entropy(net: nn.Module, batch: Batch, output: Any) -> Tensor:
    assert batch.target is not None
    return soft_cross_entropy(output, batch.target)
