r"""Monge gap: a map that only fits its target may take detours; does the gap remove them, for the cost of your choice?

Uscidda and Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML 2023, arXiv 2302.04953.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.core.data import picture
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.schedule import Piecewise
from poise.ot.benchmark_pairs import l2_uvp
from poise.ot.costs.cost import Cost
from poise.ot.costs.norms import Euclidean, SqEuclidean
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.points import sinkhorn_points
from poise.ot.experiments import monge_gap_figures as figures
from poise.ot.experiments.monge_gap_data import (
    Cells,
    ColourTransfer,
    KnownMap,
    Mixtures,
    PublishedMixtures,
    Sampler,
    Study,
    Task,
    Transport,
    pixels,
)
from poise.ot.maps.conditional import ConditionalMongeMap, DoseContext, JoinedContext, OneHotContext
from poise.ot.maps.estimator import SinkhornLoss
from poise.ot.maps.icnn import ICNN
from poise.ot.maps.monge_gap import MongeGapLoss
from poise.ot.maps.neural_dual import NeuralDualSolver

ARMS = {
    "baseline": "fitting loss alone (lambda = 0)",
    "monge_gap": "Monge gap for the squared Euclidean cost",
    "strong_gap": "Monge gap for the squared Euclidean cost, larger lambda",
    "euclidean": "Monge gap for the Euclidean cost",
    "strong_euclidean": "Monge gap for the Euclidean cost, larger lambda",
    "icnn_dual": "no gap: the gradient of a convex network trained on the dual (Makkuva et al. 2020)",
}
COSTS: dict[str, Cost] = {"squared": SqEuclidean(), "euclidean": Euclidean()}


# Training


def train_map(
    config: Study, arm: str, run: Run, tasks: Sequence[Task], curves: dict[str, Tensor]
) -> Callable[[Task], Transport]:
    """Fit a network with the arm's cost and ``lambda``."""
    net = map_network(config, tasks)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps + config.tail_steps)
    net, optimizer = run.prepare(net.to(run.device), optimizer)
    fitting_loss = SinkhornLoss(RelativeEpsilon(config.fitting_epsilon))
    cost = COSTS["euclidean" if "euclidean" in arm else "squared"]
    strong = dict.fromkeys(("strong_gap", "strong_euclidean"), config.strong_strength)
    strength = {"baseline": 0.0, **strong}.get(arm, config.strength)
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


def train_dual(
    config: Study, run: Run, tasks: Sequence[Task], curves: dict[str, Tensor]
) -> Callable[[Task], Transport]:
    """A pair of convex potentials per task; every process of a distributed run does the same."""
    adam = partial(torch.optim.Adam, lr=config.dual_learning_rate, betas=(0.5, 0.9))
    bend = partial(functional.softplus, beta=config.dual_sharpness)

    def potential() -> ICNN:
        return ICNN(tasks[0].test_x.shape[1], config.dual_widths, activation=bend).to(run.device)

    steps = config.dual_inner_steps
    solvers = [NeuralDualSolver(potential(), potential(), optimizer=adam, inner_steps=steps) for _ in tasks]
    optimizers = [optimizer for solver in solvers for optimizer in (solver.optimizer_f, solver.optimizer_g)]
    decays = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.dual_steps) for optimizer in optimizers]
    state = {f"solver_{index}": solver for index, solver in enumerate(solvers)}
    state |= {f"decay_{index}": decay for index, decay in enumerate(decays)}
    for step in run.steps(config.dual_steps, name="train", curves=curves, **state):
        index = int(torch.randint(len(tasks), (), generator=run.generator))
        task, solver = tasks[index], solvers[index]
        x = task.source(config.batch, run.generator).to(run.device)
        inner = (task.target(config.batch, run.generator).to(run.device) for _ in range(steps + 1))
        loss = solver.update(x, next(inner), inner=inner)
        for decay in decays:
            decay.step()
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
    config: Study,
    run: Run,
    curves: dict[str, Tensor],
    point: int,
    step: int,
    loss: Tensor,
    transport: Transport,
    task: Task,
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


def compare(config: Study, results: Mapping[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    if isinstance(config, ColourTransfer):
        source, target = (picture(name).rgb() for name in (config.source_picture, config.target_picture))
        run.figure("pictures", figures.pictures(source, target, results))
        run.figure("recoloured", figures.recoloured(results))
    else:
        run.figure("maps", figures.maps(results))
    run.figure("metrics", figures.metrics(results))


# Claims

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
