r"""Early-learning regularization (ELR): train on wrong labels without memorising them.

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS
2020, arXiv 2007.00151.

Early in training a network predicts the true class of many examples whose label is wrong; later it learns the wrong label by
heart. A running average t_i of the predictions p_i for each example remembers the early phase, and

.. math:: L = \frac1B \sum_i CE(z_i, y_i) + \lambda \frac1B \sum_i \log(1 - \langle p_i, t_i \rangle), \qquad
    t_i \leftarrow \beta t_i + (1 - \beta) p_i

pulls the model towards it: for an example with a wrong label the gradient of the second term cancels that of the first, for one
with a right label it adds to it.

>>> import torch
>>> model = torch.nn.Linear(8, 3)
>>> criterion = ELRLoss(num_examples=100, num_classes=3, lam=3.0, beta=0.7)
>>> inputs, labels, index = torch.randn(4, 8), torch.tensor([0, 2, 1, 0]), torch.tensor([17, 3, 99, 40])
>>> loss = criterion(model(inputs), labels, index)  # index: of each example in the data set
>>> loss.backward()
>>> errors = detect_label_errors(criterion.memory, torch.zeros(100, dtype=torch.long))
>>> errors.suspect.sum().item() <= 4  # only examples that were seen can be suspects
True
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.functional._numerics import widen
from poise.core.labels.predictions import prediction_memory, remember
from poise.core.labels.soft_targets import Reduction, reduced
from poise.core.memory.samples import SampleBank


def elr_regularizer(
    probs: Float[Tensor, "batch _"], target: Float[Tensor, "batch _"], reduction: Reduction = "mean"
) -> Float[Tensor, "..."]:
    r"""The regularizer :math:`R_i = \log(1 - \langle p_i, t_i \rangle)`, at most 0; smaller means closer to the target.

    Its gradient with respect to logit k is :math:`p_k \sum_j (t_j - t_k) p_j / (1 - \langle p, t \rangle)`. No gradient flows
    into the target.

    Args:
        probs: p, away from 1 (ELR clamps at 1e-4 from it): log 0 is infinite.
        target: t, of which the rows sum to at most 1.
        reduction: ``"mean"`` over the batch, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or one value for each row; float32 for half types.

    Raises:
        ValueError: the shapes differ, or the mean of no row is asked for.

    Source:
        eq. 6 of the paper.
    """
    if probs.shape != target.shape:
        raise ValueError(f"target must have the shape of probs, got {tuple(target.shape)} and {tuple(probs.shape)}")
    probs = widen(probs, "probs")
    return reduced(torch.log1p(-(probs * target.detach().to(probs.dtype)).sum(1)), reduction)


class ELRLoss(nn.Module):
    r"""Cross-entropy plus ELR; takes the place of ``F.cross_entropy``.

    The order of one step is that of the authors: the memory is updated with the current prediction before the loss is
    computed, so that at an example's first visit its target is :math:`(1 - \beta) p`. In evaluation mode the memory is only read.

    Args:
        num_examples: size of the training set.
        num_classes: K.
        lam: :math:`\lambda`, at least 0. It needs tuning: 1 to 7 in the paper.
        beta: :math:`\beta` in [0, 1), weight of the old target.
        clamp: probabilities are kept this far from 0 and 1, which bounds the regularizer's gradient.
        memory: where targets are kept; by default in float32 on the device of this module. For a large data set give a
            ``SampleBank(num_examples, num_classes, storage=...)``: half precision, a file, or the largest entries only.

    Attributes:
        memory: the targets, a :class:`~poise.core.memory.samples.SampleBank`, part of the ``state_dict``.
        regularizer: the last value of the regularizer without :math:`\lambda`, detached, for logging; ``None`` at first.

    Raises:
        ValueError: ``lam`` is negative, ``beta`` outside [0, 1), ``clamp`` outside [0, 0.5), or the memory is of another size.
    """

    regularizer: Tensor | None

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        lam: float = 3.0,
        beta: float = 0.7,
        *,
        clamp: float = 1e-4,
        memory: SampleBank | None = None,
    ) -> None:
        super().__init__()
        check_settings(lam, beta, clamp)
        self.lam, self.beta, self.clamp = lam, beta, clamp
        self.memory = prediction_memory(num_examples, num_classes, memory)
        self.regularizer = None

    def forward(
        self,
        logits: Float[Tensor, "batch _"],
        labels: Int[Tensor, " batch"] | Float[Tensor, "batch _"],
        index: Tensor,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: z, before the softmax.
            labels: class indices, or one distribution for each example.
            index: (batch,) integers, the number of each example in the data set, not in the batch. Of an example that occurs
                twice in a batch, the last prediction counts.

        Returns:
            A scalar, float32 for half types.

        Raises:
            ValueError: shapes do not fit, an index is out of range, or (on the CPU) the logits are not finite.
            TypeError: the index is not integer.
        """
        logits = checked_logits(logits, labels, self.memory)
        probs = logits.softmax(1).clamp(self.clamp, 1 - self.clamp)
        target = self._target(index, probs.detach())
        value = elr_regularizer(probs, target)
        self.regularizer = value.detach()
        return F.cross_entropy(logits, labels) + self.lam * value

    def _target(self, index: Tensor, probs: Tensor) -> Tensor:
        if not self.training:
            return self.memory.read(index).to(probs)
        return remember(self.memory, index, probs / probs.sum(1, keepdim=True), self.beta)

    def extra_repr(self) -> str:
        return f"lam={self.lam}, beta={self.beta}, clamp={self.clamp}"


class LabelErrors(NamedTuple):
    """Which labels look wrong, and what they should be."""

    suspect: Bool[Tensor, " examples"]
    corrected: Int[Tensor, " examples"]


@torch.no_grad()
def detect_label_errors(memory: SampleBank, labels: Int[Tensor, " examples"], *, chunk: int = 65_536) -> LabelErrors:
    """Compare each label with the class that the memory holds for the example.

    Args:
        memory: of predictions, such as ``criterion.memory`` after training.
        labels: the given label of every example.
        chunk: examples looked at together; a compressed memory is expanded only so far.

    Returns:
        Suspects are the examples whose most probable remembered class is not their label; the remembered class is the
        correction. Examples that were never seen keep their label.

    Raises:
        ValueError: there is not one label for each row of the memory.
    """
    if len(labels) != len(memory):
        raise ValueError(f"expected a label for each of the {len(memory)} rows of the memory, got {len(labels)}")
    parts = torch.arange(len(labels), device=memory.written.device).split(chunk)
    predicted = torch.cat([memory.read(index).argmax(1) for index in parts]).to(labels)
    corrected = torch.where(memory.written.to(labels.device), predicted, labels)
    return LabelErrors(corrected != labels, corrected)


def check_settings(lam: float, beta: float, clamp: float) -> None:
    """What ELR and ELR+ ask of their hyperparameters."""
    if not lam >= 0:
        raise ValueError(f"lam must not be negative, got {lam}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    if not 0 <= clamp < 0.5:
        raise ValueError(f"clamp must lie in [0, 0.5), got {clamp}")


def checked_logits(logits: Tensor, labels: Tensor, memory: SampleBank) -> Tensor:
    """The logits in the dtype to compute in, if they fit the memory and the labels fit them."""
    if logits.shape[1:] != memory.shape:
        raise ValueError(f"logits must have shape (batch, {memory.shape[0]}), got {tuple(logits.shape)}")
    if labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(f"labels must have shape ({len(logits)},) or {tuple(logits.shape)}, got {tuple(labels.shape)}")
    return widen(logits, "logits")
