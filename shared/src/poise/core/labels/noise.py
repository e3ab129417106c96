"""Label noise as published, so that rates in tables mean what they meant there.

>>> import torch
>>> labels = torch.arange(10).repeat(100)
>>> generator = torch.Generator().manual_seed(0)
>>> noisy = symmetric_noise(labels, 0.5, 10, generator)
>>> 0.4 < (noisy != labels).float().mean().item() < 0.5  # the draw includes the true label
True
>>> pairs = asymmetric_noise(labels, 0.4, confusions(CIFAR10_CONFUSIONS, 10), generator)
>>> sorted(set(pairs[labels == 9].tolist())), (pairs != labels).sum().item()  # trucks become automobiles
([1, 9], 200)
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

CIFAR10_CONFUSIONS: Mapping[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""Truck to automobile, bird to airplane, cat to dog and back, deer to horse (Patrini et al., CVPR 2017)."""


def symmetric_noise(
    labels: Int[Tensor, " examples"],
    rate: float,
    num_classes: int,
    generator: torch.Generator,
    *,
    include_true: bool = True,
) -> Int[Tensor, " examples"]:
    """Draw a new label uniformly for a fixed share of the examples, chosen at random.

    Args:
        labels: the true labels.
        rate: share of the examples that get a new label, in [0, 1] (rounded up to a number of examples).
        num_classes: K.
        generator: where the draws come from.
        include_true: whether the new label may be the true one. It may in ELR and much of the literature, so that only a share
            ``rate * (K - 1) / K`` of the labels is wrong; without, ``rate`` is the share of wrong labels.

    Raises:
        ValueError: ``rate`` is outside [0, 1], or a label outside 0..K-1.
    """
    _check(labels, rate, num_classes)
    count = len(labels)
    place = torch.randperm(count, generator=generator, device=generator.device)
    chosen = (place < rate * count).to(labels.device)
    drawn = torch.randint(
        0 if include_true else 1, num_classes, (count,), generator=generator, device=generator.device
    ).to(labels)
    new = drawn if include_true else (labels + drawn) % num_classes
    return torch.where(chosen, new, labels)


def asymmetric_noise(
    labels: Int[Tensor, " examples"], rate: float, successor: Int[Tensor, " classes"], generator: torch.Generator
) -> Int[Tensor, " examples"]:
    """Replace a fixed share of the labels of each class by the class it is confused with.

    Args:
        labels: the true labels.
        rate: share of each class, in [0, 1] (rounded up to a number of examples).
        successor: for each class the one that takes its place, see :func:`confusions` and :func:`next_in_group`; a class that is
            its own successor stays.
        generator: where the draws come from.

    Raises:
        ValueError: ``rate`` is outside [0, 1], or a label or successor is no class.
    """
    num_classes = len(successor)
    _check(labels, rate, num_classes)
    _check(successor, rate, num_classes)
    shuffled = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=num_classes)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(shuffled)
    place[by_class] = torch.arange(len(labels), device=labels.device) - starts[labels[by_class]]
    return torch.where(place < rate * sizes[labels], successor.to(labels)[labels], labels)


def confusions(pairs: Mapping[int, int], num_classes: int) -> Int[Tensor, " classes"]:
    """The successor of every class from the pairs that are confused; the others are their own."""
    return torch.tensor([pairs.get(label, label) for label in range(num_classes)])


def next_in_group(num_classes: int, group: int = 5) -> Int[Tensor, " classes"]:
    """Each class is confused with the next in its group of consecutive classes, the last with the first: CIFAR-100, groups of 5.

    Raises:
        ValueError: the groups do not divide the classes.
    """
    if group < 1 or num_classes % group:
        raise ValueError(f"groups of {group} must divide the {num_classes} classes")
    classes = torch.arange(num_classes)
    return classes // group * group + (classes + 1) % group


def _check(labels: Tensor, rate: float, num_classes: int) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
