"""A labelled set that fits in memory, and its deterministic splits.

>>> import torch
>>> rows, labels = torch.rand(6, 2), torch.tensor([0, 1] * 3)
>>> ants = Dataset("ants", rows, labels, ("worker", "queen"), licence="CC0-1.0", source="made up")
>>> train, test = ants.split(test=2)
>>> len(train), test.targets.sort().values.tolist()
(4, [0, 1])
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from poise.core.gpu.seeds import derive_generator


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets, row by row.

    Attributes:
        name: what it is called.
        inputs: float32 ``(rows, ...)``. Images are ``(rows, channels, height, width)`` in [0, 1].
        targets: class indices, int64 ``(rows,)``; or numbers to predict, float32 ``(rows,)``, when there are no
            classes.
        classes: name of every class, by index; empty for regression.
        features: name and unit of every column of a table; empty for images.
        licence: licence of the data, as its source states it.
        source: where the data come from, and the package that ships them.

    Raises:
        ValueError: the lengths differ, or a target has no class.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    licence: str
    source: str
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets")
        if self.classes and len(self):
            least, most = int(self.targets.min()), int(self.targets.max())
            if not 0 <= least <= most < len(self.classes):
                raise ValueError(f"{self.name}: targets must lie in 0..{len(self.classes) - 1}, got {least} to {most}")

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, rows: Tensor) -> "Dataset":
        """The given rows (a mask, or indices), with the same classes."""
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])

    def split(self, test: float | int = 0.2, *, seed: int = 0) -> "Split":
        """Part the rows at random, each class in the same proportion (to less than one row).

        Args:
            test: how many rows are for testing: a number (int), or a share between 0 and 1 (float).
            seed: the same seed gives the same split on every machine.

        Raises:
            ValueError: a part would be empty.
        """
        count = round(test * len(self)) if isinstance(test, float) else test
        if not 0 < count < len(self):
            raise ValueError(f"test must leave rows on both sides of {len(self)}, got {test}")
        groups = self._groups()
        exact = torch.bincount(groups).double() * count / len(self)
        held_out = exact.floor()
        largest_remainders = torch.argsort(held_out - exact, stable=True)[: count - int(held_out.sum())]
        held_out[largest_remainders] += 1
        chosen = self._rank(seed) < held_out[groups]
        return Split(self.subset(~chosen), self.subset(chosen))

    def few_shot(self, per_class: int, *, seed: int = 0) -> "Split":
        """Exactly ``per_class`` random rows of every class for training, and all others for testing.

        Args:
            per_class: rows of each class.
            seed: the same seed gives the same rows on every machine; a larger ``per_class`` adds to them.

        Raises:
            ValueError: a class has too few rows, or there are no classes.
        """
        counts = torch.bincount(self.targets, minlength=len(self.classes)) if self.classes else torch.zeros(1)
        if not 0 < per_class <= int(counts.min()):
            raise ValueError(
                f"{self.name} has {counts.int().tolist()} rows per class, too few to take {per_class} of each"
            )
        chosen = self._rank(seed) < per_class
        return Split(self.subset(chosen), self.subset(~chosen))

    def _groups(self) -> Int[Tensor, "rows"]:
        """The class of every row; one class of all in regression."""
        return self.targets if self.classes else torch.zeros(len(self), dtype=torch.int64)

    def _rank(self, seed: int) -> Int[Tensor, "rows"]:
        """Place of every row in a random order of its class."""
        groups = self._groups()
        shuffled = torch.randperm(len(self), generator=derive_generator(seed, "split"))
        by_class = shuffled[torch.argsort(groups[shuffled], stable=True)]
        sizes = torch.bincount(groups)
        rank = torch.empty_like(groups)
        rank[by_class] = torch.arange(len(self)) - (sizes.cumsum(0) - sizes)[groups[by_class]]
        return rank


class Split(NamedTuple):
    """Rows to learn from, and rows to judge by."""

    train: Dataset
    test: Dataset
