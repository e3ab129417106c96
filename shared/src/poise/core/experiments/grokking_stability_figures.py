"""Figures of the grokking stability experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "collapsed": "share of collapsed samples",
    "gradient_norm": "norm of the gradient",
}

COLOURS = {
    "baseline": "#222222",
    "perp_grad": "#d1495b",
    "perp_grad_unscaled": "#edae49",
    "stablemax": "#00798c",
    "softmax_float16": "#9d8df1",
    "softmax_float64": "#66a182",
    "weight_decay": "#7a9cc6",
    "l1": "#b08968",
    "small_output": "#c38d9e",
    "squared_error": "#8d99ae",
}


def curves(title: str, every: int, values: Mapping[str, Tensor]) -> "Figure":
    """What happens in one arm."""
    figure = _figure(10, 5)
    steps = [index * every for index in range(len(values["margin"]))]
    for index, name in enumerate(LABELS):
        axes = figure.add_subplot(2, 3, index + 1)
        axes.plot(steps, values[name].numpy())
        if name == "test_accuracy":
            axes.plot(steps, values["train_accuracy"].numpy(), color="0.6", linestyle="--", label="training")
            axes.legend(fontsize=7)
        _finish(axes, name)
    figure.suptitle(title, fontsize=10)
    return figure


def grokking(steps: int, results: Mapping[str, ArmResult]) -> "Figure":
    """All arms: above what they learn by the common number of steps, below what becomes of the gradient."""
    figure = _figure(12, 6.4)
    loaded = {name: result.load("curves") for name, result in results.items()}
    for index, name in enumerate(LABELS):
        axes = figure.add_subplot(2, 3, index + 1)
        for arm, values in loaded.items():
            strong = arm in ("baseline", "perp_grad", "stablemax")
            axes.plot(
                values["step"].numpy(),
                values[name].numpy(),
                color=COLOURS[arm],
                linewidth=1.8 if strong else 0.9,
                zorder=3 if strong else 2,
                label=arm,
            )
        if index < 3:
            axes.set_xlim(0, steps)
        _finish(axes, name)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def tables(results: Mapping[str, ArmResult]) -> "Figure":
    """The whole table of the operation as each network knows it: memorised entries are scattered, a learned rule fills it."""
    columns = min(5, len(results))
    rows = -(-len(results) // columns)
    figure = _figure(2.4 * columns, 2.7 * rows)
    for index, (arm, result) in enumerate(results.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        known = result.load("table")["right"].numpy()
        axes.imshow(known, cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        axes.set_title(f"{arm}: {known.mean():.0%}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _finish(axes: "Axes", name: str) -> None:
    axes.set_title(LABELS[name], fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    if name in ("margin", "gradient_norm"):
        axes.set_yscale("log")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
