"""What the AEM experiment measures on test bags."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from poise.medical.experiments.aem_data import Bags
from poise.medical.mil.aem import attention_entropy
from poise.medical.mil.bags import collate_bags
from poise.medical.mil.reading import BagModel
from poise.medical.mil.trainer import bag_metrics


@torch.no_grad()
def evaluate(
    model: BagModel, bags: Bags, device: torch.device, truth: Tensor | None = None, at_once: int = 1 << 20
) -> dict[str, float]:
    """Quality of the prediction in percent, its negative log-likelihood, and where attention goes.

    Args:
        model: what to measure, on whole bags.
        bags: on which.
        device: where.
        truth: which instances make their bags positive: then the AUC of attention for finding them is measured too.
        at_once: numbers that a padded batch may hold.
    """
    model.eval()
    logits, labels, entropy, largest, found = [], [], [], [], []
    for start, stop in batches(bags, at_once):
        batch = collate_bags([bags[index] for index in range(start, stop)]).to(device)
        reading = model.read(batch.features, batch.mask)
        weights = reading.weights(batch.mask)
        logits.append(reading.logits)
        labels.append(batch.labels)
        entropy.append(attention_entropy(reading.scores, batch.mask, normalize=True).mean(1))
        largest.append(weights.amax(2).mean(1))
        if truth is not None:
            positive = batch.labels == 1
            found.append(ranking(weights.mean(1)[positive], truth[start:stop].to(device)[positive]))
    answers, right = torch.cat(logits), torch.cat(labels)
    metrics = bag_metrics(answers, right)
    measured = {
        "auc": 100 * metrics.macro_auc,
        "accuracy": 100 * metrics.accuracy,
        "macro_f1": 100 * metrics.macro_f1,
        "nll": float(cross_entropy(answers, right)),
        "entropy": float(torch.cat(entropy).mean()),
        "largest_weight": float(torch.cat(largest).mean()),
    }
    return measured | ({"attention_auc": 100 * float(torch.cat(found).mean())} if found else {})


def batches(bags: Bags, at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges of bags to pad together: as many of the size of the first as fit, so that slides come one by one."""
    first = bags[0].features.numel()
    count = max(1, at_once // first)
    for start in range(0, len(bags), count):
        yield start, min(start + count, len(bags))


def ranking(weights: Tensor, truth: Tensor) -> Tensor:
    """For each bag the share of pairs of a telling and another instance in which the telling one has more attention."""
    difference = weights.unsqueeze(2) - weights.unsqueeze(1)
    won = (difference > 0) + 0.5 * (difference == 0)
    pairs = truth.unsqueeze(2) & ~truth.unsqueeze(1)
    return (won * pairs).sum((1, 2)) / pairs.sum((1, 2))


def correlation(history: Mapping[str, Tensor], first: int = 5) -> float:
    """Spearman's correlation of test entropy and test AUC over the epochs from ``first`` on; 0 if one of them stands still."""
    ranks = torch.stack([average_ranks(history[name][first - 1 :]) for name in ("entropy", "auc")])
    stands_still = (ranks == ranks[:, :1]).all(1).any()
    return 0.0 if stands_still else float(torch.corrcoef(ranks)[0, 1])


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from small to large; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2
