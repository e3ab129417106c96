r"""Sparse optimal transport: does a cap on the nonzeros of every column cost much, and does a larger cap make the problem easier?

Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466.

    min over T of  <T, C> + sum_j gamma/2 |t_j|^2    such that  T 1 = a,  T^T 1 = b,  |t_j|_0 <= k

Presets:

- ``quick``, colour transfer: transport the palette of one bundled photograph to that of another, unregularised, entropic, quadratic,
  and with at most 1, 2, 4 and 16 colours per colour.
- ``routing``: a mixture-of-experts layer on handwritten digits, whose experts choose tokens by a sparse plan, against routers in use.
- ``paper``: the layer of the published vision transformers, on ImageNet.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poise.core.data import picture
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.ot.experiments import sparse_ot_figures as figures
from poise.ot.experiments.sparse_ot_routing import ROUTERS, PaperRouting, Routing, compare_routers, run_routing
from poise.ot.sparse.recovery import recover_plan
from poise.ot.sparse.regularizers import ColumnRegularizer, NegEntropy, SparsityConstrained, SquaredL2
from poise.ot.sparse.sparse_ot import solve_semi_dual

PLANS = {
    "baseline": "unregularised transport, an exact linear program",
    "kl": "entropic regularisation: every colour goes everywhere",
    "l2": "quadratic regularisation: sparse, without a cap",
    "k1": "at most 1 colour per column",
    "k2": "at most 2 colours per column",
    "k4": "at most 4 colours per column",
    "k16": "at most 16 colours per column",
}


@dataclass(frozen=True)
class ColourTransfer:
    """Palettes of two bundled photographs, squared Euclidean cost in RGB in [0, 1].

    Attributes:
        source_picture: whose colours move.
        target_picture: where they go.
        colours: size of both palettes, by k-means.
        palette_pixels: pixels that k-means sees.
        gamma: strength of the quadratic term.
        kl_gamma: strength of the entropic one.
        smoothness_steps: steps of Adam after which the smoothness measurement gives up.
        smoothness_rate: its learning rate.
        smoothness_gap: how near the optimal dual value it must come.
    """

    source_picture: str = "china"
    target_picture: str = "flower"
    colours: int = 96
    palette_pixels: int = 4_000
    gamma: float = 1.0
    kl_gamma: float = 0.01
    smoothness_steps: int = 4_000
    smoothness_rate: float = 1e-2
    smoothness_gap: float = 1e-4


@dataclass(frozen=True)
class Problem:
    """Palettes (colours, 3), their histograms, and squared distances."""

    source: Tensor
    target: Tensor
    a: Tensor
    b: Tensor
    cost: Tensor


# Data


def palettes(config: ColourTransfer, run: Run) -> Problem:
    """Both palettes, the same for all arms of a seed."""
    source, a = palette(config, config.source_picture, run)
    target, b = palette(config, config.target_picture, run)
    return Problem(source, target, a, b, torch.cdist(source, target).square())


def palette(config: ColourTransfer, name: str, run: Run) -> tuple[Tensor, Tensor]:
    """Cluster centres of random pixels, from dark to bright, and the share of each."""
    from sklearn.cluster import KMeans

    pixels = picture(name).rgb().flatten(1).T.double()
    sample = pixels[torch.randperm(len(pixels), generator=run.generator)[: config.palette_pixels]].numpy()
    found = KMeans(config.colours, n_init=1, random_state=run.seed).fit(sample)
    counts = np.bincount(found.labels_, minlength=config.colours) + 1e-9
    dark_to_bright = found.cluster_centers_.sum(1).argsort()
    return torch.from_numpy(found.cluster_centers_[dark_to_bright]), torch.from_numpy(
        (counts / counts.sum())[dark_to_bright]
    )


# Solving


def regularizer(config: ColourTransfer, arm: str) -> ColumnRegularizer:
    """The regularizer of an arm other than the baseline."""
    if arm == "kl":
        return NegEntropy(config.kl_gamma)
    return SquaredL2(config.gamma) if arm == "l2" else SparsityConstrained(int(arm.removeprefix("k")), config.gamma)


def run_colours(config: ColourTransfer, arm: str, run: Run) -> dict[str, float]:
    """Solve the arm's problem and recolour the photograph with its plan."""
    problem = palettes(config, run)
    if arm == "baseline":
        plan = recovered = exact_plan(problem)
        metrics = {"dual_value": float((plan * problem.cost).sum())}
    else:
        reg = regularizer(config, arm)
        result = solve_semi_dual(problem.a, problem.b, problem.cost, reg)
        plan, recovered = result.plan, recover_plan(result)
        metrics = {"dual_value": float(result.value)}
        metrics |= against_neighbours(config, arm, problem, plan, float(result.value))
        steps, curve = steps_to_optimum(config, reg, problem, float(result.value))
        metrics["smoothness_steps"] = float(steps)
        run.save("curve", gap=curve)
        for step in range(0, len(curve), 20):
            run.log(step, value_gap=curve[step])
    metrics |= describe(problem, plan) | {
        f"recovered_{key}": value for key, value in describe(problem, recovered).items()
    }

    recoloured = recolour(problem, recovered, picture(config.source_picture).rgb())
    run.save("result", plan=plan, recovered=recovered, picture=recoloured)
    run.figure("plan", figures.plan(PLANS[arm], problem.source, problem.target, plan))
    return metrics


def exact_plan(problem: Problem) -> Tensor:
    """The unregularised plan."""
    import ot

    return torch.from_numpy(ot.emd(*(each.numpy() for each in (problem.a, problem.b, problem.cost))))


# Measuring


def against_neighbours(
    config: ColourTransfer, arm: str, problem: Problem, plan: Tensor, value: float
) -> dict[str, float]:
    """How an arm keeps its cap, and what ties the ends of the scale to unregularised and to quadratic transport."""
    if arm == "l2":
        support = int((plan > 0).sum(0).max())
        capped = solve_semi_dual(problem.a, problem.b, problem.cost, SparsityConstrained(support, config.gamma)).plan
        return {"distance_at_its_support": float((capped - plan).abs().sum())}
    if arm == "kl":
        return {}
    metrics = {"cap_excess": cap_excess(plan, int(arm.removeprefix("k")))}
    if arm == "k1":
        least = float((exact_plan(problem) * problem.cost).sum())
        metrics["closed_form_gap"] = abs(value - least - config.gamma / 2 * float(problem.b.square().sum()))
    return metrics


def cap_excess(plan: Tensor, k: int) -> float:
    """By how many entries the fullest column exceeds its cap; negative or 0 for a plan that keeps it."""
    return float((plan > 0).sum(0).max()) - k


def describe(problem: Problem, plan: Tensor) -> dict[str, float]:
    """Cost, sparsity and feasibility of a plan."""
    nonzeros = (plan > 0).sum(0).double()
    return {
        "cost": float((plan * problem.cost).sum()),
        "nonzeros_mean": float(nonzeros.mean()),
        "nonzeros_max": float(nonzeros.max()),
        "row_error": float((plan.sum(1) - problem.a).abs().sum()),
    }


def steps_to_optimum(
    config: ColourTransfer, reg: ColumnRegularizer, problem: Problem, optimum: float
) -> tuple[int, Tensor]:
    """How many steps one fixed method, Adam on the semi-dual from zero, needs to come near the optimal value.

    The paper's argument for a larger k is that the semi-dual becomes smoother; this is what smoothness is worth to a user.
    """
    alpha = torch.zeros_like(problem.a, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=config.smoothness_rate)
    gaps = []
    for step in range(config.smoothness_steps):
        with torch.no_grad():
            value, y = reg.max_op(alpha[:, None] - problem.cost, problem.b)
            semi_dual = alpha @ problem.a - value @ problem.b
            alpha.grad = y @ problem.b - problem.a  # of the negative, which Adam minimises
        gaps.append(optimum - semi_dual)
        if gaps[-1] <= config.smoothness_gap:
            return step, torch.stack(gaps)
        adam.step()
    return config.smoothness_steps, torch.stack(gaps)


def recolour(problem: Problem, plan: Tensor, photograph: Tensor) -> Tensor:
    """Move every pixel as its palette colour moves: to the barycentre of where the plan sends it."""
    pixels = photograph.flatten(1).T.double()
    nearest = torch.cat([torch.cdist(part, problem.source).argmin(1) for part in pixels.split(20_000)])
    moved = plan @ problem.target / plan.sum(1, keepdim=True)
    shift = moved - problem.source
    return (pixels + shift[nearest]).clamp(0, 1).T.reshape(photograph.shape).float()


def run(config: ColourTransfer | Routing, arm: str, run: Run) -> dict[str, float]:
    """Run one arm of either study."""
    if isinstance(config, Routing):
        return run_routing(config, arm, run)
    return run_colours(config, arm, run)


def compare(config: ColourTransfer | Routing, results: Mapping[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    if isinstance(config, Routing):
        compare_routers(results, run)
        return
    source, target = (picture(name).rgb() for name in (config.source_picture, config.target_picture))
    run.figure("colour_transfer", figures.colour_transfer(source, target, results))
    run.figure("smoothness", figures.smoothness(results, PLANS))


# Claims

PAPER = "Liu, Puigcerver and Blondel 2023"


def keeps_its_cap(arm: str) -> Claim:
    """No column has more nonzeros than allowed."""
    return Claim(
        metric="cap_excess",
        arm=arm,
        versus=None,
        direction="lower",
        kind="mechanism",
        source=f"{PAPER}, section 3: every column has at most k nonzeros",
    )


def looser_is_cheaper(arm: str, versus: str) -> Claim:
    """The value of a looser cap is lower."""
    return Claim(
        metric="dual_value",
        arm=arm,
        versus=versus,
        direction="lower",
        kind="mechanism",
        source=f"{PAPER}, section 3: the optimal value does not increase with k",
    )


EXPERIMENT = Experiment(
    method="ot/sparse-ot",
    presets={"quick": ColourTransfer(), "routing": Routing(), "paper": PaperRouting()},
    arms=PLANS | ROUTERS,
    only={
        "quick": tuple(PLANS),
        "routing": tuple(ROUTERS),
        "paper": tuple(ROUTERS),
    },
    run=run,
    compare=compare,
    claims=(
        keeps_its_cap("k1"),
        keeps_its_cap("k2"),
        keeps_its_cap("k4"),
        keeps_its_cap("k16"),
        looser_is_cheaper("k2", "k1"),
        looser_is_cheaper("k4", "k2"),
        Claim(
            metric="closed_form_gap",
            arm="k1",
            versus=None,
            direction="lower",
            margin=1e-6,
            kind="mechanism",
            source=f"{PAPER}, section 3: k = 1 is unregularised transport plus gamma/2 |b|^2",
        ),
        Claim(
            metric="distance_at_its_support",
            arm="l2",
            versus=None,
            direction="lower",
            margin=1e-5,
            kind="mechanism",
            source=f"{PAPER}, section 3: a cap at the support of the quadratic plan changes nothing",
        ),
        Claim(
            metric="recovered_row_error",
            arm="k2",
            versus=None,
            direction="lower",
            margin=1e-3,
            kind="mechanism",
            source="both marginals can be recovered from the optimal potentials",
            note="The recovered plan may exceed the cap where entries tie.",
        ),
        Claim(
            metric="smoothness_steps",
            arm="k16",
            versus="k1",
            direction="lower",
            kind="outcome",
            scale="ratio",
            margin=1.0,
            source=f"{PAPER}, abstract: a larger k is smoother and converges faster",
            note="At k = 1 the steps allowed do not suffice, so the factor is a lower bound.",
        ),
        Claim(
            metric="max_load",
            arm="sparse",
            versus=None,
            direction="lower",
            margin=1.0,
            kind="mechanism",
            source=f"{PAPER}, mixture-of-experts routing: no expert gets more tokens than its capacity, without an auxiliary loss",
            presets=("routing",),
        ),
        Claim(
            metric="accuracy",
            arm="sparse",
            versus="balanced",
            direction="higher",
            margin=-0.01,
            kind="outcome",
            source=f"{PAPER}, mixture-of-experts experiments: matches or slightly beats routers with a balancing loss",
            note="Holds while the accuracy is less than one percentage point below.",
            presets=("routing",),
        ),
    ),
)
