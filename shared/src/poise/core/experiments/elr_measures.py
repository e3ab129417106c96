"""What the ELR experiment measures after every epoch, and its figure."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.core.experiments.noisy_labels import all_logits, percent
from poise.core.experiments.published_images import ImageSplit
from poise.core.lab import Run
from poise.core.labels.elr import elr_regularizer
from poise.core.memory.samples import SampleBank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Progress:
    """What is measured after every epoch.

    Attributes:
        history: per quantity its values, one per epoch: test accuracy, share of the wrong labels that are predicted (memorized) and
            share whose true class is remembered, both in percent, and the mean inner product of the two parts of ELR's logit gradient
            over wrong labels, over right labels, and of the latter the part of those that are remembered.
    """

    NAMES = ("accuracy", "memorized", "recalled", "on_wrong", "on_right", "on_remembered")

    def __init__(self, epochs: int) -> None:
        self.history = {name: torch.zeros(epochs, dtype=torch.float64) for name in self.NAMES}

    @torch.no_grad()
    def measure(
        self,
        epoch: int,
        predict: Callable[[Tensor], Tensor],
        memory: SampleBank,
        split: ImageSplit,
        labels: Tensor,
        lam: float,
        run: Run,
    ) -> None:
        wrong = labels != split.train.labels
        logits = all_logits(predict, split.train, run.device)
        target = memory.read(torch.arange(len(labels))).float().cpu()
        products = gradient_products(logits, labels, target, lam)
        found = {
            "accuracy": percent(all_logits(predict, split.test, run.device).argmax(1) == split.test.labels),
            "memorized": percent((logits.argmax(1) == labels)[wrong]),
            "recalled": percent((target.argmax(1) == split.train.labels)[wrong]),
            "on_wrong": products[wrong].mean().item(),
            "on_right": products[~wrong].mean().item(),
            "on_remembered": products[~wrong & (target.argmax(1) == labels)].sum().item() / (~wrong).sum().item(),
        }
        for name, value in found.items():
            self.history[name][epoch] = value

    def at(self, epoch: int) -> dict[str, float]:
        return {name: float(values[epoch]) for name, values in self.history.items()}


@torch.enable_grad()
def gradient_products(logits: Tensor, labels: Tensor, target: Tensor, lam: float) -> Tensor:
    """For each example the inner product of the gradients, with respect to its logits, of the cross-entropy and of lambda R."""
    logits = logits.detach().requires_grad_()
    probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    losses = F.cross_entropy(logits, labels, reduction="sum"), lam * elr_regularizer(probs, target, "sum")
    ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    return (ours * theirs).sum(1)


def epochs_figure(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Test accuracy, memorized wrong labels, and cancelling of gradients over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = {
        "accuracy": "test accuracy, %",
        "memorized": "wrong labels memorized, %",
        "on_wrong": "gradients on wrong labels,\ninner product",
    }
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm, history in histories.items():
            axes.plot(range(1, len(history[name]) + 1), history[name], label=arm)
        axes.set(xlabel="epoch", title=title)
    figure.axes[0].legend(frameon=False)
    figure.axes[2].axhline(0, color="0.7", linewidth=0.8)
    return figure
