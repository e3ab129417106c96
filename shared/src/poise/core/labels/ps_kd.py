r"""Progressive self-knowledge distillation (PS-KD): soften labels with the model's own predictions of the last epoch.

Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, arXiv 2006.12000.

.. math:: \tilde y_t = (1 - \alpha_t)\, y + \alpha_t P_{t-1}(x), \qquad \alpha_t = \alpha_T\, t / T, \qquad
    L = -\frac1B \sum_i \sum_k \tilde y_{ik} \log softmax(z_i)_k

with y the label, P_{t-1}(x) what the model predicted when it saw the example last, and t = 1..T the epoch. An example that has become
more certain since then gets less gradient, one that stays hard keeps it. Confidences come out better calibrated.

>>> import torch
>>> model = torch.nn.Linear(8, 3)
>>> criterion = PSKDLoss(num_examples=100, num_classes=3, alpha_T=0.8, total_epochs=4)
>>> inputs, labels, index = torch.randn(4, 8), torch.tensor([0, 2, 1, 0]), torch.tensor([17, 3, 99, 40])
>>> for epoch in range(4):
...     criterion.set_epoch(epoch)
...     loss = criterion(model(inputs), labels, index)  # index: of each example in the data set
>>> criterion.alpha, torch.allclose(criterion.soft_targets(labels, index).sum(1), torch.ones(4))
(0.8, True)

Where examples have no index (the boxes of a detector, the words of a translation) the teacher is a copy of the model of the last
epoch, :class:`~poise.core.labels.ps_kd_teacher.PreviousModelTeacher`, and :func:`ps_kd_loss` takes its predictions.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.functional._numerics import widen
from poise.core.labels.mixing import Mix
from poise.core.labels.predictions import prediction_memory, remember
from poise.core.labels.soft_targets import Reduction, soft_cross_entropy, soft_labels
from poise.core.memory.samples import SampleBank

Growth = Literal["linear", "constant"]


def progressive_alpha(alpha_T: float, epoch: int, total_epochs: int, schedule: Growth = "linear") -> float:
    r"""The weight of the past prediction in an epoch, :math:`\alpha_T (e + 1) / E`.

    Args:
        alpha_T: weight in the last epoch, in [0, 1].
        epoch: e, from 0.
        total_epochs: E.
        schedule: ``"constant"`` for :math:`\alpha_T` throughout, the ablation.

    Raises:
        ValueError: ``alpha_T`` is outside [0, 1], or the epoch outside 0..E-1.

    Source:
        eq. 7 of the paper, which counts epochs from 1.
    """
    if not 0 <= alpha_T <= 1:
        raise ValueError(f"alpha_T must lie in [0, 1], got {alpha_T}")
    if not 0 <= epoch < total_epochs:
        raise ValueError(f"epoch must lie in 0..{total_epochs - 1}, got {epoch}")
    return alpha_T * (epoch + 1) / total_epochs if schedule == "linear" else alpha_T


def ps_kd_loss(
    logits: Float[Tensor, "..."],
    labels: Int[Tensor, "..."],
    past: Float[Tensor, "..."] | None,
    alpha: float,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    dim: int = 1,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy with :math:`(1 - \alpha) y + \alpha P`, in any layout.

    Args:
        logits: for example (batch, K), (batch, K, height, width) or, with ``dim=-1``, (batch, time, K).
        labels: class indices, of the shape of ``logits`` without ``dim``.
        past: P, probabilities of the shape of ``logits``; ``None`` if there are none yet, for plain cross-entropy.
        alpha: weight of the past, in [0, 1].
        label_smoothing: of the labels.
        ignore_index: the label of positions that do not count, such as padding.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the positions that count, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or a loss for each position; float32 for half types.

    Raises:
        ValueError: ``alpha`` is outside [0, 1], or shapes do not fit.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    logits = widen(logits, "logits")
    if labels.shape != (*logits.shape[:dim], *logits.shape[dim:][1:]):
        raise ValueError(f"labels must have the shape of the logits without dim {dim}, got {tuple(labels.shape)}")
    if past is None or alpha == 0:
        return F.cross_entropy(
            logits.movedim(dim, 1),
            labels,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    if past.shape != logits.shape:
        raise ValueError(f"past must have the shape of the logits, {tuple(logits.shape)}, got {tuple(past.shape)}")
    counts = labels != ignore_index
    hard = soft_labels(
        labels.masked_fill(~counts, -1), logits.shape[dim], smoothing=label_smoothing, dim=dim, dtype=logits.dtype
    )
    target = _blend(hard, past.detach().to(logits.dtype), alpha)
    return soft_cross_entropy(logits, target, mask=counts, dim=dim, reduction=reduction)


class PSKDLoss(nn.Module):
    r"""Takes the place of ``F.cross_entropy``; remembers the model's prediction for each training example.

    The prediction that is remembered is the one the loss was computed from, of the augmented image and in train mode, before the
    optimizer step. Until an example has been seen, and throughout the first epoch, its target is its label. In evaluation mode the
    memory is only read.

    Mixed images (mixup, CutMix; see :class:`~poise.core.labels.mixing.Mix`) get the targets of their parts, mixed alike. They say
    little about either part, so they are not remembered, unless ``update_mixed`` is ``"own_row"``; if *all* batches are
    mixed and none is remembered, there is no distillation. Other regularizers are untouched.

    Args:
        num_examples: size of the training set.
        num_classes: K, or the shape of one prediction with the classes first, (K, height, width).
        alpha_T: weight of the past prediction in the last epoch: 0.8 on CIFAR-100, 0.3 on ImageNet.
        total_epochs: E.
        schedule: growth of the weight, see :func:`progressive_alpha`.
        label_smoothing: of the labels, before the past prediction is added.
        ignore_index: the label of positions that do not count, in predictions of more than K numbers.
        update_mixed: what a mixed batch leaves in the memory: nothing (``"skip"``), or its predictions in the rows of the
            first parts (``"own_row"``).
        memory: where predictions are kept; by default in float32 on the device of this module. For a large data set give a
            ``SampleBank(num_examples, num_classes, storage=...)``: half precision, a file, or the largest entries only.

    Attributes:
        memory: the predictions, a :class:`~poise.core.memory.samples.SampleBank`, part of the ``state_dict``, as is the epoch.
        epoch: set by :meth:`set_epoch`; 0 at first.

    Raises:
        ValueError: a hyperparameter is out of range, or the memory is of another size.
    """

    def __init__(
        self,
        num_examples: int,
        num_classes: int | tuple[int, ...],
        alpha_T: float,
        total_epochs: int,
        *,
        schedule: Growth = "linear",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        update_mixed: Literal["skip", "own_row"] = "skip",
        memory: SampleBank | None = None,
    ) -> None:
        super().__init__()
        self.alpha_T, self.total_epochs, self.schedule = alpha_T, total_epochs, schedule
        self.label_smoothing, self.ignore_index, self.update_mixed = label_smoothing, ignore_index, update_mixed
        self.memory = prediction_memory(num_examples, num_classes, memory)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0.

        Raises:
            ValueError: the epoch is outside 0..E-1.
        """
        self.alpha = progressive_alpha(self.alpha_T, epoch, self.total_epochs, self.schedule)
        self.epoch = epoch

    def soft_targets(
        self, labels: Tensor, index: Tensor, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch classes ..."]:
        r"""The targets :math:`(1 - \alpha_t) y + \alpha_t P_{t-1}` of examples in the current epoch.

        Args:
            labels: class indices (batch, ...), or distributions (batch, K, ...).
            index: (batch,) integers, the number of each example in the data set.
            dtype: of the targets.

        Raises:
            ValueError: the labels have another width, or an index is out of range.
            TypeError: the index is not integer.
        """
        hard = self._hard(labels, dtype)
        if self._without_past:
            return hard
        seen = self.memory.seen(index).to(hard.device).view(-1, *[1] * (hard.dim() - 1))
        past = torch.where(seen, self.memory.read(index).to(hard), hard)
        return _blend(hard, past, self.alpha)

    def forward(
        self,
        logits: Float[Tensor, "batch _ ..."],
        labels: Tensor,
        index: Tensor,
        *,
        mix: Mix | None = None,
        update: bool = True,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: z, (batch, K, ...).
            labels: class indices (batch, ...), or distributions (batch, K, ...), of the images before they are mixed.
            index: (batch,) integers, the number of each example in the data set, not in the batch.
            mix: how the images that gave the logits were mixed; ``None`` if they were not.
            update: remember the predictions, if in train mode.

        Returns:
            A scalar, float32 for half types.

        Raises:
            ValueError: shapes do not fit, an index is out of range, or (on the CPU) the logits are not finite.
            TypeError: the index is not integer.
        """
        logits = widen(logits, "logits")
        if logits.shape[1:] != self.memory.shape:
            raise ValueError(f"logits must have shape (batch, *{self.memory.shape}), got {tuple(logits.shape)}")
        if labels.shape not in ((len(logits), *logits.shape[2:]), logits.shape):
            raise ValueError(
                f"labels do not fit logits of shape {tuple(logits.shape)}, got shape {tuple(labels.shape)}"
            )
        if index.shape != logits.shape[:1]:
            raise ValueError(f"index must have shape ({len(logits)},), one entry per example, got {tuple(index.shape)}")
        loss = self._loss(logits, labels, index, mix)
        if self.training and update and (mix is None or self.update_mixed == "own_row"):
            remember(self.memory, index, logits.detach().softmax(1))
        return loss

    def _loss(self, logits: Tensor, labels: Tensor, index: Tensor, mix: Mix | None) -> Tensor:
        if mix is None and self._without_past:
            return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)
        target = self.soft_targets(labels, index, dtype=logits.dtype)
        counts = None if labels.is_floating_point() else labels != self.ignore_index
        if mix is not None:
            target = mix(target)
            counts = None if counts is None else counts | counts[mix.partner.to(counts.device)]
        return soft_cross_entropy(logits, target, mask=counts)

    @property
    def _without_past(self) -> bool:
        return self.epoch == 0 or self.alpha == 0

    def _hard(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """The labels as distributions; zeros where they are to be ignored."""
        classes, smoothing = self.memory.shape[0], self.label_smoothing
        if labels.is_floating_point():
            if labels.shape[1:] != self.memory.shape:
                raise ValueError(f"labels must have shape (batch, *{self.memory.shape}), got {tuple(labels.shape)}")
            return (1 - smoothing) * labels.to(dtype) + smoothing / classes
        ignored = labels == self.ignore_index
        return soft_labels(labels.masked_fill(ignored, -1), classes, smoothing=smoothing, dtype=dtype)

    def get_extra_state(self) -> Tensor:
        """The epoch, as a tensor: safetensors and all that walks over a state dict expects tensors."""
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Tensor) -> None:
        self.set_epoch(int(state))

    def extra_repr(self) -> str:
        return f"alpha_T={self.alpha_T}, total_epochs={self.total_epochs}, schedule={self.schedule!r}"


def _blend(hard: Tensor, past: Tensor, alpha: float) -> Tensor:
    return (1 - alpha) * hard + alpha * past
