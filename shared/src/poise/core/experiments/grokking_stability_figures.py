"""Figures of the grokking stability experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from poise.core.experiments.line_ends import name_line_ends
from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

CURVES = (
    "train_accuracy",
    "test_accuracy",
    "nlm_cosine",
    "weight_norm",
    "margin",
    "gradient_norm",
    "collapsed",
    "zero_loss",
    "fidelity",
)
"""What is measured along the way."""

LABELS = {
    "test_accuracy": "test accuracy",
    "nlm_cosine": "cosine of −g and w, raw gradient",
    "weight_norm": "norm of the weights",
    "margin": "mean margin of the top logit",
    "collapsed": "share of samples whose softmax collapses",
    "gradient_norm": "norm of the gradient",
}

NAMES = {
    "baseline": "AdamW",
    "perp_grad": "perpGrad",
    "perp_grad_unscaled": "perpGrad, unscaled",
    "stablemax": "StableMax",
    "softmax_float16": "float16",
    "softmax_float64": "float64",
    "weight_decay": "weight decay",
    "l1": "L1 penalty",
    "small_output": "small output",
    "squared_error": "squared error",
}
"""What the figures call the arms."""

STORY = ("baseline", "stablemax", "perp_grad")
"""The arms that are compared at a glance."""

COLOURS = {
    "baseline": "#222222",
    "perp_grad": "#d1495b",
    "perp_grad_unscaled": "#edae49",
    "stablemax": "#00798c",
    "softmax_float16": "#9d8df1",
    "softmax_float64": "#66a182",
    "weight_decay": "#4361ee",
    "l1": "#a0522d",
    "small_output": "#c38d9e",
    "squared_error": "#8a817c",
}


def curves(title: str, every: int, values: Mapping[str, Tensor]) -> "Figure":
    """What happens in one arm."""
    figure = _figure(12, 6)
    steps = [index * every for index in range(len(values["margin"]))]
    for index, name in enumerate(LABELS):
        axes = figure.add_subplot(2, 3, index + 1)
        axes.plot(steps, values[name].numpy())
        if name == "test_accuracy":
            axes.plot(steps, values["train_accuracy"].numpy(), color="0.6", linestyle="--", label="training")
            axes.legend(fontsize=11)
        _finish(axes, name)
    figure.suptitle(title, fontsize=12)
    return figure


def grokking(steps: int, results: Mapping[str, ArmResult]) -> "Figure":
    """What the networks answer for every pair, above the test accuracy over the common number of steps."""
    shown = [arm for arm in STORY if arm in results] or list(results)[:3]
    tables = {arm: results[arm].load("table") for arm in shown if results[arm].has("table")}
    figure = _figure(7.6, 6.6 if tables else 3.2)
    parts = figure.subfigures(2 if tables else 1, 1, height_ratios=[1.25, 1] if tables else None, squeeze=False)[:, 0]
    _tables(parts[0], tables)
    axes = parts[-1].add_subplot()
    for arm in shown:
        values = results[arm].load("curves")
        upto = values["step"] <= steps
        accuracy = 100 * values["test_accuracy"][upto].numpy()
        width = 5.5 if arm == "baseline" else 2.8  # seen even where another line covers it
        axes.plot(values["step"][upto].numpy(), accuracy, color=COLOURS[arm], linewidth=width, label=arm)
    axes.set_title("accuracy outside the training set, %", fontsize=14, loc="left")
    axes.set_xlabel("training step", fontsize=13)
    axes.set_xlim(0, steps)
    axes.set_ylim(-4, 104)
    axes.set_yticks((0, 25, 50, 75, 100))
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    name_line_ends(axes, NAMES, fontsize=14)
    return figure


def courses(steps: int, results: Mapping[str, ArmResult]) -> "Figure":
    """What is measured along the way in all arms: above up to the common number of steps, below to the end."""
    figure = _figure(12, 6.6)
    for index, name in enumerate(LABELS):
        axes = figure.add_subplot(2, 3, index + 1)
        for arm, result in results.items():
            values = result.load("curves")
            strong = arm in STORY
            (line,) = axes.plot(values["step"].numpy(), values[name].numpy(), color=COLOURS[arm], label=NAMES[arm])
            line.set(linewidth=2.2 if strong else 1.0, zorder=3 if strong else 2)
        if index < 3:
            axes.set_xlim(0, steps)
        _finish(axes, name)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=11)
    return figure


def _tables(part: "SubFigure", tables: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The table of the operation as a network answers it, a colour of the wheel for each residue: a learnt sum gives stripes."""
    if tables:
        part.suptitle("answers to all pairs (a, b) after training, a colour for each residue", fontsize=14)
    for index, (arm, table) in enumerate(tables.items()):
        axes = part.add_subplot(1, len(tables), index + 1)
        axes.imshow(table["answers"].numpy(), cmap="twilight", interpolation="nearest")
        right = table["right"]
        axes.set_title(f"{NAMES[arm]}\n{int(right.sum())} of {right.numel()} right", fontsize=15)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("b", fontsize=13)
        if not index:
            axes.set_ylabel("a", fontsize=13, rotation=0, labelpad=10)


def _finish(axes: "Axes", name: str) -> None:
    axes.set_title(LABELS[name], fontsize=12)
    axes.set_xlabel("step", fontsize=11)
    axes.tick_params(labelsize=11)
    if name in ("margin", "gradient_norm"):
        axes.set_yscale("log")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
