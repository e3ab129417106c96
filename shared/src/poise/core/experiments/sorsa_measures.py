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
from poise.core.names import plain_modules

if TYPE_CHECKING:
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


def curves(losses: Mapping[str, Tensor], names: Mapping[str, str], smooth: int = 20) -> "Figure":
    """Training loss of every arm, as a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    for arm, values in losses.items():
        window = min(smooth, len(values))
        means = values.unfold(0, window, 1).mean(-1)
        axes.plot(torch.arange(len(means)) + window // 2, means, label=names[arm])
    axes.set(xlabel="step", ylabel=f"training loss, mean of {smooth} steps", yscale="log")
    axes.legend(fontsize=7)
    return figure


def changes(histories: Mapping[str, Tensor], names: Mapping[str, str]) -> "Figure":
    """Change of singular values against change of directions while training, one line per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    for arm, history in histories.items():
        axes.plot(history[:, 2], history[:, 1], marker=".", label=names[arm])
    axes.set(xlabel="change of directions", ylabel="change of singular values")
    axes.legend(fontsize=7)
    return figure
