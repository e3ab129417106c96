"""Figures of the BEER experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "return": "return",
    "rank": "rank of the representation (δ = 0.01)",
    "cosine": "cosine of successive representations",
    "target_cosine": "cosine with the next state's, slow copy",
    "bound": "Bellman bound on that cosine",
    "excess": "mean excess over the bound",
    "own_excess": "mean excess, one network at both ends",
    "above_bound": "share of samples above the bound",
    "head_norm": "norm of the head's weight",
}

NAMES = {
    "baseline": "no regularizer",
    "beer": r"BEER, $\beta = 10^{-3}$ (published)",
    "beer_x100": r"BEER, $\beta = 0.1$",
    "strong_beer": r"BEER, $\beta = 1000$",
    "infer": "InFeR",
    "dr3": "DR3",
    "unbounded": "cosine penalised without the bound",
}
"""The arms in words."""

COLOURS = {
    "baseline": "#222222",
    "beer": "#e69f00",
    "beer_x100": "#cc79a7",
    "strong_beer": "#d55e00",
    "infer": "#009e73",
    "dr3": "#56b4e9",
    "unbounded": "#0072b2",
}

STYLES = {"beer": "--", "beer_x100": ":", "infer": "-.", "dr3": (0, (5, 1, 1, 1)), "unbounded": (0, (6, 2))}
"""Of lines that lie on others."""

STORY = ("target_cosine", "bound", "excess", "rank")
"""What the loss compares, what is left of it, and what that does to the representation."""


def story(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """The cosine, its Bellman bound, the excess and the rank over the updates, of all arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8.2), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, STORY, strict=True):
        _plot(axes, arms, name)
        axes.set_title(LABELS[name], fontsize=12)
        axes.set_xlabel("updates", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False, fontsize=12, handlelength=3)
    return figure


def curves(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Every measure over the updates."""
    from matplotlib.figure import Figure

    names = [name for name in LABELS if any(name in measured for measured in arms.values())]
    figure = Figure(figsize=(12, 3.1 * -(-len(names) // 3)), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), 3, index + 1)
        _plot(axes, arms, name)
        axes.set_title(LABELS[name], fontsize=11)
        axes.set_xlabel("updates", fontsize=11)
        if index == 0:
            axes.legend(fontsize=11)
    return figure


def values(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """The critic's values against the Monte-Carlo returns from the same states."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * min(4, len(arms)), 3.4 * -(-len(arms) // 4)), layout="constrained")
    for index, (arm, measured) in enumerate(arms.items()):
        axes = figure.add_subplot(-(-len(arms) // 4), min(4, len(arms)), index + 1)
        exact, estimated = measured["returns"].numpy(), measured["values"].numpy()
        axes.plot(exact, exact, color="0.7", linewidth=1)
        axes.scatter(exact, estimated, s=5, color=COLOURS[arm])
        axes.set_title(f"{NAMES[arm]}\nmean |error| {abs(estimated - exact).mean():.2f}", fontsize=11)
        axes.set_xlabel("Monte-Carlo return", fontsize=11)
        axes.set_ylabel("value", fontsize=11)
    return figure


def _plot(axes: "Axes", arms: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    for arm, measured in arms.items():
        (line,) = axes.plot(measured["step"].numpy(), measured[name].numpy(), color=COLOURS[arm], label=NAMES[arm])
        line.set(linewidth=2, linestyle=STYLES.get(arm, "-"))
    if name in ("excess", "own_excess"):
        axes.set_yscale("symlog", linthresh=1e-5)
