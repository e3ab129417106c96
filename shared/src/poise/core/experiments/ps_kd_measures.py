"""What the PS-KD experiment measures of gradients, and its figure."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.core.experiments.noisy_labels import percent
from poise.core.labels.ps_kd import ps_kd_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Gradients:
    """The logit gradients of PS-KD and of cross-entropy for every training example, at the same weights and the same input.

    Attributes:
        of: by name one number for each example: the L1 norms ``ps_kd`` and ``plain``, ``doubt`` = 1 - p_gt now and ``doubt_before`` =
            1 - P_gt in the last epoch, and ``expected`` = 1 - a (1 - P_gt) / (1 - p_gt), the ratio of the norms by the paper, NaN where
            it does not apply: p_k < a P_k for a wrong class k.
    """

    def __init__(self, examples: int) -> None:
        names = ("ps_kd", "plain", "doubt", "doubt_before", "expected")
        self.of = {name: torch.full((examples,), math.nan, dtype=torch.float64) for name in names}

    def measure(self, logits: Tensor, labels: Tensor, past: Tensor, alpha: float, index: Tensor) -> None:
        """Take down a batch of the middle epoch."""
        logits, labels, past = logits.detach().cpu().double(), labels.cpu(), past.cpu().double()
        past, probs = past / past.sum(1, keepdim=True), logits.softmax(1)
        right = F.one_hot(labels, logits.shape[1]).bool()
        doubt, before = (rows.masked_fill(right, 0).sum(1) for rows in (probs, past))  # without cancellation
        applies = ((probs >= alpha * past) | right).all(1)
        found = {
            "ps_kd": gradient_norms(logits, labels, past, alpha),
            "plain": gradient_norms(logits, labels, past, 0.0),
            "doubt": doubt,
            "doubt_before": before,
            "expected": torch.where(applies, 1 - alpha * before / doubt, math.nan),
        }
        for name, values in found.items():
            self.of[name][index.cpu()] = values

    def summary(self) -> dict[str, float]:
        """Over the examples that were seen:

        - ``gradient_ratio_error``: largest distance of the ratio of the norms from what the paper derives, where that applies;
          ``gradient_ratio_covered`` is the share of such examples in percent.
        - ``gradient_gain_correlation``: Spearman correlation of the ratio with the gain in confidence p_gt - P_gt.
        - ``hard_share_gain``: what the hardest quarter holds of the summed norms, minus its share under cross-entropy.
        """
        seen = self.of["plain"] > 0
        ours, plain, doubt, before, expected = (values[seen] for values in self.of.values())
        ratio = ours / plain
        applies = expected.isfinite()
        error = torch.where(applies, (ratio - expected).abs(), 0.0)
        hardest = doubt.argsort(descending=True)[: len(doubt) // 4]
        shares = [norms[hardest].sum() / norms.sum() for norms in (ours, plain)]
        return {
            "gradient_ratio_error": error.max().item(),
            "gradient_ratio_covered": percent(applies),
            "gradient_gain_correlation": spearman(ratio, before - doubt),
            "hard_share_gain": (shares[0] - shares[1]).item(),
        }


@torch.enable_grad()
def gradient_norms(logits: Tensor, labels: Tensor, past: Tensor, alpha: float) -> Tensor:
    """The L1 norm of each example's logit gradient."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ps_kd_loss(logits, labels, past, alpha, reduction="sum"), logits)
    return gradient.abs().sum(1)


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def reliability_figure(predictions: Mapping[str, tuple[Tensor, Tensor]]) -> "Figure":
    """Accuracy by confidence, and the error rate among the most confident predictions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    reliability, risk = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for arm, (probs, labels) in predictions.items():
        confidence, predicted = probs.max(1)
        right, bins = (predicted == labels).double(), (10 * confidence).ceil().long().clamp(1, 10)
        filled = [number for number in range(1, 11) if (bins == number).any()]
        points = [(confidence[bins == number].mean(), right[bins == number].mean()) for number in filled]
        reliability.plot(*zip(*points, strict=True), marker="o", markersize=3, label=arm)
        errors = (1 - right)[confidence.argsort(descending=True)]
        coverage = torch.arange(1, len(errors) + 1) / len(errors)
        risk.plot(coverage, 100 * errors.cumsum(0) / torch.arange(1, len(errors) + 1))
    reliability.set(xlabel="confidence", ylabel="accuracy", title="reliability")
    reliability.legend(frameon=False)
    risk.set(xlabel="coverage", ylabel="errors, %", title="risk among the most confident")
    return figure
