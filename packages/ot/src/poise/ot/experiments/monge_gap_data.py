"""The data of the Monge gap experiment: what each preset trains and tests on, and its settings."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.core.data import picture
from poise.core.lab import Run
from poise.ot.benchmark_pairs import BenchmarkPair, RidgePotential, mixture_pair, read_mixture_pair
from poise.ot.cells import Cells as PerturbedCells
from poise.ot.cells import read_cells
from poise.ot.maps.icnn import potential_gradient

Sampler = Callable[[int, torch.Generator], Tensor]
Transport = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One source and one target, samplers to train on and fixed samples to test on.

    Attributes:
        source: draws training samples of ``mu``.
        target: draws training samples of ``nu``.
        test_x: held-out samples of ``mu``.
        test_y: held-out samples of ``nu``.
        optimal: the optimal map for the squared Euclidean cost, where known.
        start: a map that training starts from.
        context: what tells the task from others, for a conditional map.
    """

    source: Sampler
    target: Sampler
    test_x: Tensor
    test_y: Tensor
    optimal: Transport | None = None
    start: Transport | None = None
    context: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """What all presets have in common.

    Attributes:
        steps: optimizer steps of a map.
        tail_steps: further steps at a tenth of ``lambda``, where a small bias of the gap is traded for fit.
        warm_steps: regression steps onto ``Task.start`` before.
        batch: samples of each side per step.
        learning_rate: of Adam, for the maps; it decays to 0 along a cosine.
        widths: hidden layers of the map.
        strength: ``lambda`` of ``monge_gap`` and ``euclidean``.
        strong_strength: ``lambda`` of ``strong_gap`` and ``strong_euclidean``.
        fitting_epsilon: regularization of the fitting loss, relative to the mean squared distance of the targets.
        gap_epsilon: regularization of the gap, relative to the mean of its own cost.
        contexts_per_step: tasks that a step averages over, if there are several.
        dual_steps: outer steps of the dual.
        dual_inner_steps: steps on the inverse potential per outer step.
        dual_learning_rate: of Adam, for the potentials.
        dual_widths: hidden layers of the potentials.
        dual_sharpness: how sharply the potentials' activation bends, ``softplus(s z) / s``; on the scale of the data.
        test_samples: held-out samples of each side for the metrics.
        curve_samples: how many of them the curves use.
        curve_points: times that the curves are measured.
    """

    steps: int = 1_000
    tail_steps: int = 0
    warm_steps: int = 0
    batch: int = 128
    learning_rate: float = 1e-2
    widths: tuple[int, ...] = (64, 64)
    strength: float = 1.0
    strong_strength: float = 5.0
    fitting_epsilon: float = 0.1
    gap_epsilon: float = 0.01
    contexts_per_step: int = 1
    dual_steps: int = 1_000
    dual_inner_steps: int = 5
    dual_learning_rate: float = 3e-3
    dual_widths: tuple[int, ...] = (64, 64)
    dual_sharpness: float = 1.0
    test_samples: int = 1_000
    curve_samples: int = 256
    curve_points: int = 20

    @abstractmethod
    def tasks(self, run: Run) -> list[Task]:
        """The data, the same for all arms of a seed: drawn from ``run.generator``."""


@dataclass(frozen=True, kw_only=True)
class ColourTransfer(Study):
    """Colours of one bundled photograph to those of another, RGB in [0, 1]."""

    dual_sharpness: float = 10.0
    source_picture: str = "china"
    target_picture: str = "flower"

    def tasks(self, run: Run) -> list[Task]:
        source, test_x = split(pixels(self.source_picture), self.test_samples, run.generator)
        target, test_y = split(pixels(self.target_picture), self.test_samples, run.generator)
        return [Task(source, target, test_x, test_y)]


@dataclass(frozen=True, kw_only=True)
class KnownMap(Study):
    """Standardised colours and their image under a known gradient of a convex function; the start is a rotated map."""

    warm_steps: int = 300
    tail_steps: int = 300
    source_picture: str = "china"
    ridges: int = 8

    def tasks(self, run: Run) -> list[Task]:
        rows = pixels(self.source_picture)
        rows = (rows - rows.mean(0)) / rows.std(0)
        potential = RidgePotential(rows.shape[1], self.ridges, generator=run.generator)
        optimal = partial(potential_gradient, potential.to(run.device))
        source, test_x = split(rows, self.test_samples, run.generator)
        images = potential_gradient(potential.cpu(), rows)
        target, test_y = split(images, self.test_samples, run.generator)
        potential.to(run.device)
        return [Task(source, target, test_x, test_y, optimal, start=rotated_map(rows, images, run.generator))]


@dataclass(frozen=True, kw_only=True)
class Mixtures(Study):
    """Generated pairs of mixtures with a known optimal map, at the settings of the published benchmark.

    Attributes:
        dim: the dimension.
    """

    dim: int = 32
    steps: int = 10_000
    batch: int = 1_024
    learning_rate: float = 1e-3
    widths: tuple[int, ...] = (128, 64, 64)
    dual_steps: int = 20_000
    dual_inner_steps: int = 10
    dual_learning_rate: float = 1e-4
    dual_widths: tuple[int, ...] = (64, 64, 64, 64)
    test_samples: int = 4_096

    def pair(self, run: Run) -> BenchmarkPair:
        """The pair."""
        return mixture_pair(self.dim, generator=run.generator)

    def tasks(self, run: Run) -> list[Task]:
        pair = self.pair(run).to(run.device)
        source, target = pair.sample_source, pair.sample_target
        test = self.test_samples
        return [Task(source, target, source(test, run.generator), target(test, run.generator), optimal=pair)]


@dataclass(frozen=True, kw_only=True)
class PublishedMixtures(Mixtures):
    """The pairs of Korotin et al.'s benchmark, read from a clone of its repository."""

    def pair(self, run: Run) -> BenchmarkPair:
        return run.load(partial(read_mixture_pair, dim=self.dim))


@dataclass(frozen=True, kw_only=True)
class Cells(Study):
    """Control cells to treated cells, one conditional map for all drugs and doses that are asked for.

    Attributes:
        features: matrix of the file, ``X`` or for example ``obsm/X_pca``.
        drug_column: column of the drugs.
        dose_column: column of the doses; ``None`` for a data set without.
        control_column: column that marks the controls, or their name among the drugs.
        drugs: the drugs to learn; all if empty.
        test_share: share of the cells of each condition that is held out.
    """

    steps: int = 10_000
    batch: int = 512
    learning_rate: float = 1e-3
    widths: tuple[int, ...] = (128, 64, 64)
    contexts_per_step: int = 4
    dual_steps: int = 20_000
    dual_inner_steps: int = 10
    dual_learning_rate: float = 1e-4
    dual_widths: tuple[int, ...] = (64, 64, 64, 64)
    features: str = "X"
    drug_column: str = "drug"
    dose_column: str | None = "dose"
    control_column: str = "control"
    drugs: tuple[str, ...] = ()
    test_share: float = 0.2

    def tasks(self, run: Run) -> list[Task]:
        cells, contexts = run.load(self._read)
        classes = list(dict.fromkeys(drug for drug, _ in contexts))
        source, test_x = self._split(cells.controls(), run)
        tasks = []
        for drug, dose in contexts:
            target, test_y = self._split(cells.treated(drug, dose), run)
            context = torch.tensor([float(classes.index(drug)), dose], device=run.device)
            tasks.append(Task(source, target, test_x, test_y, context=context))
        return tasks

    def _read(self, path: Path) -> tuple[PerturbedCells, list[tuple[str, float]]]:
        """An AnnData file with the columns drug, dose and control."""
        columns: dict[str, Any] = {"drug": self.drug_column, "dose": self.dose_column, "control": self.control_column}
        cells = read_cells(path, features=self.features, **columns)
        contexts = [context for context in cells.contexts() if not self.drugs or context[0] in self.drugs]
        absent = set(self.drugs) - {drug for drug, _ in contexts}
        if absent:
            raise ValueError(f"no cell got {', '.join(sorted(absent))}")
        return cells, contexts

    def _split(self, rows: Tensor, run: Run) -> tuple[Sampler, Tensor]:
        return split(rows, max(2, min(self.test_samples, round(self.test_share * len(rows)))), run.generator)


def pixels(name: str) -> Tensor:
    """The pixels of a bundled photograph, ``(n, 3)``."""
    return picture(name).rgb().flatten(1).T.contiguous()


def split(rows: Tensor, test: int, generator: torch.Generator) -> tuple[Sampler, Tensor]:
    """A sampler of most rows, and the others."""
    if not 0 < test < len(rows):
        raise ValueError(f"{test} of {len(rows)} samples cannot be held out")
    order = torch.randperm(len(rows), generator=generator)
    kept = rows[order[test:]]

    def sampler(count: int, generator: torch.Generator) -> Tensor:
        return kept[torch.randint(len(kept), (count,), generator=generator)]

    return sampler, rows[order[:test]]


def rotated_map(x: Tensor, y: Tensor, generator: torch.Generator) -> Transport:
    """An affine map that gives ``x`` the mean and covariance of ``y``, turned by a random rotation on the way."""
    rotation, upper = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator))
    rotation = rotation * upper.diagonal().sign()
    rotation[:, 0] *= torch.linalg.det(rotation)  # a proper rotation
    whitening, colouring = torch.linalg.cholesky(x.T.cov()), torch.linalg.cholesky(y.T.cov())
    matrix = colouring @ rotation @ torch.linalg.inv(whitening)
    offset = y.mean(0) - matrix @ x.mean(0)
    return lambda points: points @ matrix.T.to(points.device) + offset.to(points.device)
