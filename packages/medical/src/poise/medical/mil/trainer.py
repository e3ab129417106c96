"""Training on bags as the authors of AEM do it: one bag per step, half a cosine of the learning rate, the best epoch kept.

>>> import torch
>>> from torch.utils.data import DataLoader
>>> from poise.medical import ABMIL, AttentionEntropyLoss, Bag, collate_bags
>>> bags = [Bag(torch.randn(10 + i, 16), label=i % 2) for i in range(8)]
>>> trainer = MILTrainer(ABMIL(16, 32, 2), AttentionEntropyLoss(0.1), epochs=2)
>>> loader = DataLoader(bags, batch_size=1, shuffle=True, collate_fn=collate_bags)
>>> history = trainer.fit(loader, validation=loader)
>>> len(history), sorted(history[0])
(2, ['accuracy', 'entropy', 'loss', 'macro_auc', 'macro_f1'])
"""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from poise.core.penalty import Penalty
from poise.core.schedule import Cosine
from poise.medical.mil.aem import AttentionEntropyLoss, attention_entropy
from poise.medical.mil.bags import BagBatch, Subsample
from poise.medical.mil.reading import BagModel


class BagMetrics(NamedTuple):
    """Quality of predictions, from 0 to 1; means over the classes that occur.

    Attributes:
        accuracy: share of right predictions.
        macro_f1: F1 score.
        macro_auc: area under the receiver operating characteristic of each class against the others.
    """

    accuracy: float
    macro_f1: float
    macro_auc: float

    @property
    def selection(self) -> float:
        """What the best epoch is chosen by."""
        return self.macro_f1 + self.macro_auc


def bag_metrics(logits: Float[Tensor, "bags classes"], labels: Int[Tensor, "bags"]) -> BagMetrics:
    """Accuracy, macro F1 and macro AUC (by torchmetrics).

    Raises:
        ValueError: the labels or the logits hold one class only, for which there is no AUC, or a logit is NaN.
    """
    from torchmetrics.functional.classification import multiclass_auroc, multiclass_f1_score

    present = labels.unique()
    if len(present) < 2:
        raise ValueError(f"the AUC needs bags of at least two classes, got only class {present.tolist()}")
    if logits.shape[1] < 2:
        raise ValueError(f"logits must be of at least two classes, got shape {tuple(logits.shape)}")
    if logits.isnan().any():
        raise ValueError(f"logits must be numbers, got NaN for {int(logits.isnan().any(1).sum())} bags")
    classes = logits.shape[1]
    predicted, probabilities = logits.argmax(1), logits.float().softmax(1)
    f1 = multiclass_f1_score(predicted, labels, num_classes=classes, average="none")[present].mean()
    auc = multiclass_auroc(probabilities, labels, num_classes=classes, average="none")[present].mean()
    return BagMetrics(float((predicted == labels).float().mean()), float(f1), float(auc))


class MILTrainer:
    """Adam with decoupled weight decay, its learning rate set anew at every step, and the checkpoint of the best epoch.

    Args:
        model: any model here, or a wrapped one.
        penalty: of the scores and the mask; ``None`` trains the bag loss alone.
        lr: learning rate of the first step.
        min_lr: learning rate that the half cosine ends at.
        weight_decay: of AdamW.
        epochs: passes over the training bags.
        rho: share of the instances kept by :class:`Subsample` in training.
        generator: where subsampling draws from.

    Raises:
        ValueError: ``rho`` is out of range or ``epochs`` is below 1.

    Source:
        Zhang et al., arXiv 2406.15303, and the authors' code.
    """

    def __init__(
        self,
        model: BagModel,
        penalty: Penalty | None = None,
        *,
        lr: float = 1e-4,
        min_lr: float = 0.0,
        weight_decay: float = 1e-5,
        epochs: int = 50,
        rho: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.model, self.epochs, self.lr, self.min_lr = model, epochs, lr, min_lr
        self.penalty = AttentionEntropyLoss(0.0) if penalty is None else penalty
        self.subsample = Subsample(rho, generator)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)

    def fit(self, train: DataLoader[BagBatch], validation: Iterable[BagBatch] | None = None) -> list[dict[str, float]]:
        """Train, and leave the model as it was after its best epoch on the validation bags (the last one without them).

        Args:
            train: a loader of batches, with a length; shuffle it.
            validation: bags to choose the epoch by: largest macro F1 plus macro AUC.

        Returns:
            For every epoch the mean training loss, and on the validation bags their metrics and the mean entropy of attention
            relative to even.

        Raises:
            ValueError: no training batch.
            FloatingPointError: the loss is not finite.
        """
        if not len(train):
            raise ValueError("no training batch: the loader is empty")
        rate = Cosine(self.lr, self.min_lr, self.epochs * len(train))
        history: list[dict[str, float]] = []
        best, state = -math.inf, self.model.state_dict()
        for epoch in range(self.epochs):
            losses = []
            for index, batch in enumerate(train):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(epoch * len(train) + index)
                losses.append(self.step(batch.to(self.device)))
            record = {"loss": float(torch.stack(losses).mean())}
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(f"the loss is {record['loss']} in epoch {epoch}")
            if validation is not None:
                metrics, entropy = self.evaluate(validation)
                record |= {**metrics._asdict(), "entropy": entropy}
                if metrics.selection > best:
                    best, state = metrics.selection, copy.deepcopy(self.model.state_dict())
            history.append(record)
        self.model.load_state_dict(state)
        return history

    def step(self, batch: BagBatch) -> Tensor:
        """One update on a batch; returns its loss."""
        self.model.train()
        features, mask = self.subsample(batch.features, batch.mask)
        reading = self.model.read(features, mask)
        loss = reading.loss(batch.labels) + self.penalty(reading.scores, mask)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.penalty.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, bags: Iterable[BagBatch]) -> tuple[BagMetrics, float]:
        """Metrics of whole bags, without subsampling, and their mean entropy relative to even attention."""
        self.model.eval()
        logits, labels, entropies = [], [], []
        for batch in bags:
            batch = batch.to(self.device)
            reading = self.model.read(batch.features, batch.mask)
            logits.append(reading.logits)
            labels.append(batch.labels)
            entropies.append(attention_entropy(reading.scores, batch.mask, normalize=True).mean(1))
        return bag_metrics(torch.cat(logits), torch.cat(labels)), float(torch.cat(entropies).mean())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
