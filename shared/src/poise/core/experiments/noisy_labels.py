"""What experiments on labels share: the noise of a preset, and training batches that say which examples they hold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from poise.core.experiments.published_images import Images, InMemory, evaluation_batches, training_batches
from poise.core.gpu import derive_generator
from poise.core.lab import Run
from poise.core.labels.noise import CIFAR10_CONFUSIONS, asymmetric_noise, confusions, next_in_group, symmetric_noise

Noise = Literal["symmetric", "asymmetric"]

Batches = Iterator[tuple[Tensor, Tensor]]
"""Images, and their numbers in the training set."""


def noisy(
    labels: Int[Tensor, " examples"], classes: int, noise: Noise, rate: float, seed: int
) -> Int[Tensor, " examples"]:
    """Labels with noise: redrawn uniformly (the true label included), or confused as is usual for CIFAR-10 and CIFAR-100."""
    generator = derive_generator(seed, "noise")
    if noise == "symmetric":
        return symmetric_noise(labels, rate, classes, generator)
    successor = confusions(CIFAR10_CONFUSIONS, 10) if classes == 10 else next_in_group(classes)
    return asymmetric_noise(labels, rate, successor, generator)


def part(images: InMemory, rows: Int[Tensor, " rows"]) -> InMemory:
    """Some of the images."""
    return replace(images, pixels=images.pixels[rows], labels=images.labels[rows])


@dataclass(frozen=True, eq=False)
class Numbered:
    """Images with their numbers for labels: a batch then says which examples it holds."""

    images: Images

    @property
    def labels(self) -> Int[Tensor, " images"]:
        return torch.arange(len(self.images.labels))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    def read(self, rows: Sequence[int], augment: torch.Generator | None = None) -> Float[Tensor, "batch c h w"]:
        return self.images.read(rows, augment)


def indexed_batches(images: Images, batch: int, steps: range, run: Run) -> Batches:
    """Augmented images and their numbers in the data set, for these steps."""
    return training_batches(
        Numbered(images), batch, steps, seed=run.seed, device=run.device, rank=run.rank, world=run.world
    )


@torch.no_grad()
def all_logits(
    predict: Callable[[Tensor], Tensor], images: Images, device: torch.device, batch: int = 500
) -> Float[Tensor, "examples classes"]:
    """The outputs for all images, as they are, in order, on the CPU."""
    return torch.cat([predict(inputs).float().cpu() for inputs, _ in evaluation_batches(images, batch, device)])


def predictor(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model in evaluation mode."""
    return partial(_evaluated, model)


def _evaluated(model: nn.Module, inputs: Tensor) -> Tensor:
    was_training = model.training
    logits: Tensor = model.eval()(inputs)
    model.train(was_training)
    return logits


def percent(right: Tensor) -> float:
    """Share of true entries in percent; 0 of none."""
    return 100 * right.double().mean().item() if len(right) else 0.0
