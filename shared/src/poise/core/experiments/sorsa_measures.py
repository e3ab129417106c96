"""What the SORSA experiment measures of the weights, and its figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.adapters.singular_change import singular_change
from poise.core.adapters.sorsa import sorsa_deltas
from poise.core.adapters.sorsa_penalty import sorsa_penalty
from poise.core.adapters.svd import truncated_svd
from poise.core.adapters.targets import find_targets, weight_matrix
from poise.core.experiments.line_ends import name_line_ends
from poise.core.names import plain_modules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights = dict[str, Float[Tensor, "outputs inputs"]]


def original_weights(model: nn.Module, targets: tuple[str, ...]) -> Weights:
    """Copies of the weights that will be tuned, as matrices."""
    return {name: weight_matrix(layer).detach().clone() for name, layer in find_targets(model, targets).items()}


def effective_weights(model: nn.Module, names: Weights) -> Weights:
    """The weights that the layers of these names compute with now, as matrices."""
    modules = plain_modules(model)
    return {name: weight_matrix(modules[name]).detach() for name in names}


def mean_change(before: Weights, after: Weights, rank: int) -> tuple[float, float]:
    """Change of singular values and directions (:func:`~poise.core.adapters.singular_change.singular_change`), mean over layers."""
    changes = [singular_change(before[name], after[name], rank, "hungarian") for name in before]
    return (
        float(torch.stack([change.sigma for change in changes]).mean()),
        float(torch.stack([change.direction for change in changes]).mean()),
    )


def at_equal_loss(history: Float[Tensor, "points 3"], loss: float) -> tuple[float, float]:
    """Change of values and of directions where the training loss first falls to a level, or at the end if it never does.

    Args:
        history: loss on the probe, change of singular values, change of directions; one row per time.
        loss: the level.
    """
    below = torch.nonzero(history[:, 0] <= loss).flatten()
    index = int(below[0]) if len(below) else len(history) - 1
    if not len(below) or index == 0:
        return float(history[index, 1]), float(history[index, 2])
    before, after = history[index - 1], history[index]
    share = (before[0] - loss) / (before[0] - after[0])
    crossing = before + share * (after - before)
    return float(crossing[1]), float(crossing[2])


@torch.no_grad()
def triplet_metrics(model: nn.Module, singular_values: Mapping[str, Tensor]) -> dict[str, float]:
    """What became of the trained triplets.

    The penalty, how far the lengths of the vectors are from 1, how much S changed, and the condition number of the principal part.

    Args:
        model: the tuned network.
        singular_values: S at the start, by layer.
    """
    deltas = sorsa_deltas(model)
    spread, moved, condition = [], [], []
    for name, delta in deltas.items():
        lengths = torch.cat((delta.u.norm(dim=0), delta.v.norm(dim=1)))
        spread.append((lengths - 1).abs().mean())
        moved.append((delta.s - singular_values[name]).norm() / singular_values[name].norm())
        values = truncated_svd(delta.matrix(), delta.rank).s
        condition.append(values[0] / values[-1])
    return {
        "penalty": float(sorsa_penalty(model)),
        "norm_spread": float(torch.stack(spread).mean()),
        "scale_change": float(torch.stack(moved).mean()),
        "condition": float(torch.stack(condition).log().mean().exp()),
    }


STORY = {
    "baseline": ("LoRA", "#1f2937", 2.6),
    "pissa": ("PiSSA", "#059669", 2.6),
    "sorsa_unregularized": ("SORSA, γ = 0", "#7aa2f2", 1.6),
    "sorsa": ("SORSA", "#2563eb", 2.6),
    "sorsa_strong": ("SORSA, 10 γ", "#7aa2f2", 1.6),
    "full": ("all weights", "#d97706", 2.6),
}
"""The arms of the first figure: name, colour and width of the line."""


def curves(losses: Mapping[str, Tensor], histories: Mapping[str, Tensor], every: int, smooth: int = 20) -> "Figure":
    """Training loss as a running mean and, below, how far the singular values have moved, over the steps.

    Args:
        losses: of each arm, one per step.
        histories: loss on the probe, change of singular values, change of directions of each arm; none if they were not measured.
        every: steps between two rows of a history.
        smooth: steps of the running mean.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.6, 6.4 if histories else 3.6), layout="constrained")
    panels = figure.subplots(2 if histories else 1, 1, sharex=True, squeeze=False)[:, 0]
    for arm in STORY:
        if arm in losses:
            window = min(smooth, len(losses[arm]))
            means = losses[arm].unfold(0, window, 1).mean(-1)
            _line(panels[0], arm, torch.arange(window, len(losses[arm]) + 1), means)
        if arm in histories:
            steps = every * torch.arange(1, len(histories[arm]) + 1)
            _line(panels[1], arm, steps, histories[arm][:, 1])
    titles = f"training loss, mean of the last {smooth} steps", "change of the singular values"
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=14, loc="left")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.tick_params(labelsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(x=0)
        name_line_ends(axes, {arm: name for arm, (name, _, _) in STORY.items()}, fontsize=13)
    panels[-1].set_xlabel("training step", fontsize=13)
    return figure


def _line(axes: "Axes", arm: str, steps: Tensor, values: Tensor) -> None:
    _, colour, width = STORY[arm]
    axes.plot(steps, values, label=arm, color=colour, linewidth=width)


def changes(histories: Mapping[str, Tensor], names: Mapping[str, str]) -> "Figure":
    """Change of singular values against change of directions while training, one line per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.subplots()
    for arm, history in histories.items():
        axes.plot(history[:, 2], history[:, 1], marker=".", label=names[arm])
    axes.set_xlabel("change of directions", fontsize=12)
    axes.set_ylabel("change of singular values", fontsize=12)
    axes.legend(fontsize=11)
    return figure
