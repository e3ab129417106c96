r"""Monge gap: a map that only fits its target may take detours; does the gap remove them, for the cost of your choice?

Uscidda and Cuturi, The Monge Gap: A Regularizer to Learn All Transport Maps, ICML 2023, arXiv 2302.04953.

    min over T of  Delta(T#mu, nu) + lambda [ E c(x, T(x)) - W_c(mu, T#mu) ]

Presets:

- ``quick``, colour transfer: send the colours of one photograph to those of another, with the squared Euclidean and with the
  Euclidean cost. No optimal map is known; the exact gap on fresh pixels says how far a map is from optimal onto its own image.
- ``known-map``: the target is the image of a photograph's colours under the gradient of a known convex function, and the network
  starts at a wrong map of the same fit, turned by a rotation. Fitting alone has no reason to turn back.
- ``mixtures``: pairs of mixtures with a known optimal map in 2 to 256 dimensions, made on the spot, at the published settings.
- ``paper``: the published pairs of the Wasserstein-2 benchmark.
- ``cells``: drug responses of single cells from an AnnData file, one map for all drugs and doses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from poise.core.data import picture
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.schedule import Piecewise
from poise.ot.benchmark_pairs import BenchmarkPair, RidgePotential, l2_uvp, mixture_pair, read_mixture_pair
from poise.ot.cells import read_cells
from poise.ot.costs.cost import Cost
from poise.ot.costs.norms import Euclidean, SqEuclidean
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.points import sinkhorn_points
from poise.ot.experiments import monge_gap_figures as figures
from poise.ot.maps.conditional import ConditionalMongeMap, DoseContext, JoinedContext, OneHotContext
from poise.ot.maps.estimator import SinkhornLoss
from poise.ot.maps.icnn import ICNN, potential_gradient
from poise.ot.maps.monge_gap import MongeGapLoss
from poise.ot.maps.neural_dual import NeuralDualSolver

ARMS = {
    "baseline": "fitting loss alone (lambda = 0)",
    "monge_gap": "Monge gap for the squared Euclidean cost",
    "strong_gap": "the same with a larger lambda",
    "euclidean": "Monge gap for the Euclidean cost",
    "strong_euclidean": "the same with a larger lambda",
    "icnn_dual": "no gap: the gradient of a convex network trained on the dual (Makkuva et al. 2020)",
}
COSTS: dict[str, Cost] = {"squared": SqEuclidean(), "euclidean": Euclidean()}

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
        learning_rate: of Adam, for the maps.
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
        test_samples: held-out samples of each side for the metrics.
        curve_samples: how many of them the curves use.
        curve_points: times that the curves are measured.
    """

    steps: int = 1_000
    tail_steps: int = 0
    warm_steps: int = 0
    batch: int = 128
    learning_rate: float = 3e-3
    widths: tuple[int, ...] = (64, 64)
    strength: float = 1.0
    strong_strength: float = 5.0
    fitting_epsilon: float = 0.1
    gap_epsilon: float = 0.01
    contexts_per_step: int = 1
    dual_steps: int = 1_000
    dual_inner_steps: int = 5
    dual_learning_rate: float = 1e-3
    dual_widths: tuple[int, ...] = (64, 64)
    test_samples: int = 1_000
    curve_samples: int = 256
    curve_points: int = 20

    @abstractmethod
    def tasks(self, run: Run) -> list[Task]:
        """The data; drawn from ``run.generator``, so the same for every arm."""


@dataclass(frozen=True, kw_only=True)
class ColourTransfer(Study):
    """Colours of one bundled photograph to those of another, RGB in [0, 1]."""

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
        columns = {"drug": self.drug_column, "dose": self.dose_column, "control": self.control_column}
        cells = run.load(partial(read_cells, features=self.features, **columns))
        names = self.drugs or tuple(dict.fromkeys(drug for drug, _ in cells.contexts()))
        source, test_x = self._split(cells.controls(), run)
        tasks = []
        for index, name in enumerate(names):
            for dose in [dose for drug, dose in cells.contexts() if drug == name] or [0.0]:
                target, test_y = self._split(cells.treated(name, dose), run)
                tasks.append(Task(source, target, test_x, test_y, context=torch.tensor([float(index), dose])))
        return tasks

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


# Training


def train_map(config: Study, arm: str, run: Run, tasks: Sequence[Task], curves: dict[str, Tensor]) -> Callable[[Task], Transport]:
    """Fit a network with the arm's cost and ``lambda``."""
    net = map_network(config, tasks)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps + config.tail_steps)
    net, optimizer = run.prepare(net.to(run.device), optimizer)
    fitting_loss = SinkhornLoss(RelativeEpsilon(config.fitting_epsilon))
    cost = COSTS["euclidean" if "euclidean" in arm else "squared"]
    strength = 0.0 if arm == "baseline" else config.strong_strength if arm.startswith("strong") else config.strength
    schedule = Piecewise((config.steps,), (strength, strength / 10))
    gap = MongeGapLoss(cost, relative_epsilon=config.gap_epsilon, weight=schedule)

    def transport(task: Task) -> Transport:
        return net if task.context is None else lambda x: net(x, task.context)

    state = {"net": net, "optimizer": optimizer, "decay": decay, "gap": gap, "curves": curves}
    for step in run.steps(config.warm_steps, name="warm", **state):
        loss = torch.stack([regression(config, run, transport(task), task) for task in tasks]).mean()
        descend(run, loss, optimizer)
        if step % 50 == 0:
            run.log(step, loss=loss)

    for step in run.steps(config.steps + config.tail_steps, name="train", **state):
        losses = []
        for task in drawn(tasks, config.contexts_per_step, run.generator):
            x, y = (batch(run, sampler, config.batch) for sampler in (task.source, task.target))
            t = transport(task)(x)
            losses.append(fitting_loss(t, y) + gap(x, t))
        loss = torch.stack(losses).mean()
        descend(run, loss, optimizer)
        decay.step()
        gap.step()
        for point in due(step, config.steps + config.tail_steps, config.curve_points):
            measure(config, run, curves, point, step, loss, transport(tasks[0]), tasks[0])
    return transport


def train_dual(config: Study, run: Run, tasks: Sequence[Task], curves: dict[str, Tensor]) -> Callable[[Task], Transport]:
    """A pair of convex potentials per task; every process of a distributed run does the same."""
    adam = partial(torch.optim.Adam, lr=config.dual_learning_rate, betas=(0.5, 0.9))
    dim = tasks[0].test_x.shape[1]
    solvers = [
        NeuralDualSolver(
            *(ICNN(dim, config.dual_widths).to(run.device) for _ in range(2)),
            optimizer=adam,
            inner_steps=config.dual_inner_steps,
        )
        for _ in tasks
    ]
    state = {f"solver_{index}": solver for index, solver in enumerate(solvers)}
    for step in run.steps(config.dual_steps, name="train", curves=curves, **state):
        index = int(torch.randint(len(tasks), (), generator=run.generator))
        task, solver = tasks[index], solvers[index]
        x = task.source(config.batch, run.generator).to(run.device)
        inner = (task.target(config.batch, run.generator).to(run.device) for _ in range(config.dual_inner_steps + 1))
        loss = solver.update(x, next(inner), inner=inner)
        for point in due(step, config.dual_steps, config.curve_points):
            measure(config, run, curves, point, step, loss, solvers[0].transform, tasks[0])
    return lambda task: next(solver.transform for other, solver in zip(tasks, solvers, strict=True) if other is task)


def map_network(config: Study, tasks: Sequence[Task]) -> nn.Module:
    """A perceptron that outputs the image itself, not a displacement; with an encoder if the tasks have contexts."""
    dim, context = tasks[0].test_x.shape[1], tasks[0].context
    if context is None:
        return perceptron(dim, config.widths, dim)
    contexts = torch.stack([task.context for task in tasks if task.context is not None])
    classes, largest = int(contexts[:, 0].max()) + 1, float(contexts[:, 1].max())
    encoder = JoinedContext([OneHotContext(classes), DoseContext(largest or 1.0)], sizes=(1, 1))
    return ConditionalMongeMap(perceptron(dim + encoder.width, config.widths, dim), encoder)


def perceptron(inputs: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.GELU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def batch(run: Run, sampler: Sampler, count: int) -> Tensor:
    """A batch of this process."""
    return run.shard(sampler(count * run.world, run.generator)).to(run.device)


def regression(config: Study, run: Run, transport: Transport, task: Task) -> Tensor:
    x = batch(run, task.source, config.batch)
    assert task.start is not None, "a study with warm steps gives every task a start"
    return (transport(x) - task.start(x)).square().sum(-1).mean()


def descend(run: Run, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    run.backward(loss)
    optimizer.step()


def drawn(tasks: Sequence[Task], count: int, generator: torch.Generator) -> list[Task]:
    """Some of the tasks; all of them if there are no more than asked for."""
    if len(tasks) <= count:
        return list(tasks)
    return [tasks[index] for index in torch.randperm(len(tasks), generator=generator)[:count].tolist()]


# Measuring


def due(step: int, steps: int, points: int) -> Iterator[int]:
    """The point of the curve that is measured at this step, if any: evenly spaced, the last step included."""
    point = (step + 1) * points // steps
    if point > step * points // steps:
        yield point - 1


@torch.no_grad()
def measure(
    config: Study, run: Run, curves: dict[str, Tensor], point: int, step: int, loss: Tensor, transport: Transport, task: Task
) -> None:
    """Note the loss, the divergence and the exact gaps on a few held-out samples."""
    metrics = evaluate(transport, task, config.curve_samples, run.device)
    for name in figures.CURVES:
        curves[name][point] = metrics[name]
    curves["step"][point] = step + 1
    run.log(step, loss=loss, **metrics)


@torch.no_grad()
def evaluate(transport: Transport, task: Task, samples: int, device: torch.device) -> dict[str, float]:
    """Fit, exact gaps and, where the optimal map is known, the error of a map on held-out samples."""
    x, y = (rows[:samples].to(device) for rows in (task.test_x, task.test_y))
    t = transport(x)
    metrics = {
        "divergence": float(SinkhornLoss(solver=partial(sinkhorn_points, tol=1e-5))(t, y)),
        "mean_error": float((t.mean(0) - y.mean(0)).norm()),
    }
    for name, cost in COSTS.items():
        displacement, least = exact_costs(cost, x, t)
        metrics |= {f"{name}_displacement": displacement, f"{name}_cost": least}
        metrics[f"{name}_gap"] = max(displacement - least, 1e-9)  # positive, for ratios: rounding may leave -1e-17
    if task.optimal is not None:
        metrics["uvp"] = float(l2_uvp(t, task.optimal(x)))
    return metrics


def exact_costs(cost: Cost, x: Tensor, t: Tensor) -> tuple[float, float]:
    """``E c(x, T(x))`` and the exact ``W_c(x, T(x))`` of two samples of equal size, an assignment problem."""
    from scipy.optimize import linear_sum_assignment

    matrix = cost.pairwise(x.double(), t.double()).cpu().numpy()
    rows, columns = linear_sum_assignment(matrix)
    return float(matrix.diagonal().mean()), float(matrix[rows, columns].mean())


def run(config: Study, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    tasks = config.tasks(run)
    curves = {name: torch.zeros(config.curve_points, dtype=torch.float64) for name in ("step", *figures.CURVES)}
    if arm == "icnn_dual":
        transport = train_dual(config, run, tasks, curves)
    else:
        transport = train_map(config, arm, run, tasks, curves)

    each = [evaluate(transport(task), task, config.test_samples, run.device) for task in tasks]
    first, its_map = tasks[0], transport(tasks[0])
    with torch.no_grad():
        images = its_map(first.test_x.to(run.device)).cpu()
        clouds = {"x": first.test_x.cpu(), "t": images, "y": first.test_y.cpu()}
        if first.optimal is not None:
            clouds["optimal"] = first.optimal(first.test_x.to(run.device)).cpu()
        if isinstance(config, ColourTransfer):
            photograph = picture(config.source_picture).rgb()
            recoloured = its_map(pixels(config.source_picture).to(run.device)).cpu()
            run.save("picture", picture=recoloured.T.reshape(photograph.shape).clamp(0, 1))
    run.save("clouds", **clouds)
    run.figure("displacements", figures.displacements(ARMS[arm], clouds, colours=isinstance(config, ColourTransfer)))
    run.figure("curves", figures.curves(ARMS[arm], curves))
    return {name: sum(metrics[name] for metrics in each) / len(each) for name in each[0]}


def compare(config: Study, results: dict[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    run.figure("metrics", figures.metrics(results))
    if isinstance(config, ColourTransfer):
        source, target = (picture(name).rgb() for name in (config.source_picture, config.target_picture))
        run.figure("pictures", figures.pictures(source, target, results, ARMS))
    else:
        run.figure("maps", figures.maps(results, ARMS))


PAPER = "Uscidda and Cuturi 2023"

EXPERIMENT = Experiment(
    method="ot/monge-gap",
    presets={
        "quick": ColourTransfer(),
        "known-map": KnownMap(),
        "mixtures": Mixtures(),
        "paper": PublishedMixtures(),
        "cells": Cells(),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=(
        Claim(
            metric="squared_gap",
            arm="monge_gap",
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=10.0,
            source=f"{PAPER}: the regularizer is the gap; at lambda = 1 the exact gap is at least 10 times smaller",
        ),
        Claim(
            metric="squared_gap",
            arm="strong_gap",
            versus="monge_gap",
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=1.0,
            source=f"{PAPER}: a larger lambda gives a smaller gap",
        ),
        Claim(
            metric="euclidean_gap",
            arm="euclidean",
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=3.0,
            source=f"{PAPER}: the same for the Euclidean cost, which convex networks cannot serve; at least 3 times smaller",
        ),
        Claim(
            metric="euclidean_gap",
            arm="strong_euclidean",
            versus="euclidean",
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=1.0,
            source=f"{PAPER}: a larger lambda gives a smaller gap",
        ),
        Claim(
            metric="divergence",
            arm="monge_gap",
            direction="lower",
            kind="outcome",
            scale="ratio",
            margin=0.5,
            source=f"{PAPER}: optimality is not paid for with fit",
            note="Holds while the divergence is less than twice that of the fitting loss alone.",
            presets=("quick", "known-map"),
        ),
        Claim(
            metric="uvp",
            arm="monge_gap",
            direction="lower",
            kind="outcome",
            scale="ratio",
            margin=3.0,
            source=f"{PAPER}, abstract: the gap recovers optimal maps that fitting alone does not",
            presets=("known-map",),
        ),
        Claim(
            metric="uvp",
            arm="monge_gap",
            versus="icnn_dual",
            direction="lower",
            kind="outcome",
            scale="ratio",
            margin=1.0,
            source=f"{PAPER}, abstract: competitive with or better than maps from convex networks",
            note="The squared Euclidean cost and a smooth convex potential are the home ground of convex networks.",
            presets=("known-map",),
        ),
    ),
)
