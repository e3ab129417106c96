r"""ELR+: two networks that teach each other through averaged weights, and mixup, on top of ELR.

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS
2020, arXiv 2007.00151, section 4.3 and appendix.

The target of an example comes from the *other* network's weight average on the image as it is; the network that learns sees
mixed images x = l x_a + (1 - l) x_b with labels y mixed alike:

.. math:: L = -\frac1B \sum_i \sum_k y_{ik} \log p_{ik} + w(s) \lambda \frac1B \sum_i \log(1 - \langle q_i, p_i \rangle), \qquad
    q = l\,t_a + (1 - l)\,t_b

>>> import torch
>>> trainer = ELRPlusTrainer(lambda: torch.nn.Linear(8, 3), num_examples=100, num_classes=3)
>>> optimizers = [torch.optim.SGD(network.parameters(), lr=0.02) for network in trainer.networks]
>>> inputs, labels, index = torch.randn(4, 8), torch.tensor([0, 2, 1, 0]), torch.tensor([17, 3, 99, 40])
>>> generator = torch.Generator().manual_seed(0)
>>> for student in (0, 1):  # an epoch of one, then an epoch of the other, each with a loader of its own
...     loss = trainer.step(student, optimizers[student], inputs, labels, index, generator)
>>> trainer(inputs).shape  # the mean logits of both weight averages
torch.Size([4, 3])
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from poise.core.functional._numerics import widen
from poise.core.labels.elr import check_settings, checked_logits, elr_regularizer
from poise.core.labels.mixing import Mix, draw_mix
from poise.core.labels.predictions import prediction_memory, remember
from poise.core.labels.soft_targets import soft_cross_entropy, soft_labels
from poise.core.memory.ema import EMA, RampedDecay
from poise.core.memory.samples import SampleBank

Members = Literal["averages", "live", "live_and_average"]
"""Whose logits are averaged for a prediction: both weight averages, both networks, or the first network and the second average."""


def sigmoid_rampup(step: int, length: int) -> float:
    """``exp(-5 (1 - step/length)^2)`` before ``length`` steps, 1 after them, and 1 if ``length`` is 0.

    Source:
        Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    share = min(max(step / length, 0.0), 1.0) if length else 1.0
    return math.exp(-5 * (1 - share) ** 2)


@dataclass(frozen=True)
class RampedUpDecay:
    """``decay * sigmoid_rampup(step + 1, steps)``: the average forgets fast at first, and slower when the weights settle."""

    decay: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {self.decay}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")

    def __call__(self, step: int) -> float:
        return self.decay * sigmoid_rampup(step + 1, self.steps)


class WeightAverage(EMA):
    """The average of a network's weights that serves as teacher of the other network.

    Parameters are averaged and buffers are not: batch normalisation has the statistics of what the average itself sees, for which it
    starts in train mode.

    Args:
        model: what to follow.
        decay: largest weight of the old average; 0.997 on CIFAR, 0.9999 on Clothing1M.
        rampup_steps: length of the decay's ramp, 40,000 on CIFAR; ``None`` for the plain mean of all weights until that would be
            slower than ``decay``, as on Clothing1M and WebVision.

    Raises:
        ValueError: ``decay`` is outside [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float = 0.997, rampup_steps: int | None = 40_000) -> None:
        schedule = RampedDecay(decay) if rampup_steps is None else RampedUpDecay(decay, rampup_steps)
        super().__init__(model, schedule, buffers="keep")
        self.average.train()


class ELRPlusLoss(nn.Module):
    r"""The loss of one of the two networks of ELR+.

    Args:
        num_examples: size of the training set.
        num_classes: K.
        lam: :math:`\lambda`, at least 0.
        beta: :math:`\beta` in [0, 1), weight of the old target.
        ramp_steps: S, steps over which the regularizer's weight w(s) rises; 0 for none, 40,000 on CIFAR-100.
        clamp: the student's probabilities are kept this far from 0 and 1. Those of the teacher are not.
        refine_labels: multiply the labels by the target and normalise them before the cross-entropy. The paper does not
            mention it; the released code does it when there are 100 classes.
        memory: where targets are kept, see :class:`~poise.core.labels.elr.ELRLoss`.

    Attributes:
        memory: the targets, part of the ``state_dict``.

    Raises:
        ValueError: a hyperparameter is out of range, or the memory is of another size.
    """

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        lam: float = 3.0,
        beta: float = 0.7,
        *,
        ramp_steps: int = 0,
        clamp: float = 1e-4,
        refine_labels: bool = False,
        memory: SampleBank | None = None,
    ) -> None:
        super().__init__()
        check_settings(lam, beta, clamp)
        if ramp_steps < 0:
            raise ValueError(f"ramp_steps must not be negative, got {ramp_steps}")
        self.lam, self.beta, self.clamp = lam, beta, clamp
        self.ramp_steps, self.refine_labels = ramp_steps, refine_labels
        self.memory = prediction_memory(num_examples, num_classes, memory)

    def update_targets(
        self, index: Tensor, teacher_logits: Float[Tensor, "batch _"], mix: Mix | None = None
    ) -> Float[Tensor, "batch _"]:
        """Update the memory with the teacher's prediction for the images as they are, and return the targets q of the mixed ones.

        Args:
            index: (batch,) integers, the number of each example in the data set.
            teacher_logits: of the other network's average.
            mix: how the student's images are mixed; ``None`` if they are not.

        Raises:
            ValueError: shapes do not fit, an index is out of range, or (on the CPU) the logits are not finite.
        """
        if teacher_logits.shape[1:] != self.memory.shape:
            raise ValueError(
                f"teacher_logits must have shape (batch, {self.memory.shape[0]}), got {tuple(teacher_logits.shape)}"
            )
        probs = widen(teacher_logits.detach(), "teacher_logits").softmax(1)
        target = remember(self.memory, index, probs, self.beta)
        return target if mix is None else mix(target)

    def forward(
        self,
        logits: Float[Tensor, "batch _"],
        labels: Float[Tensor, "batch _"],
        target: Float[Tensor, "batch _"],
        step: int = 0,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: of the student, for the mixed images.
            labels: the mixed labels, a distribution for each image.
            target: q, from :meth:`update_targets`.
            step: steps of this student so far.

        Returns:
            A scalar, float32 for half types.

        Raises:
            ValueError: shapes do not fit.
        """
        logits = checked_logits(logits, labels, self.memory)
        probs = logits.softmax(1).clamp(self.clamp, 1 - self.clamp)
        value = elr_regularizer(probs, target)
        if self.refine_labels:
            labels = _refined(labels, target)
        return soft_cross_entropy(logits, labels) + sigmoid_rampup(step, self.ramp_steps) * self.lam * value

    def extra_repr(self) -> str:
        return (
            f"lam={self.lam}, beta={self.beta}, ramp_steps={self.ramp_steps}, clamp={self.clamp}, "
            f"refine_labels={self.refine_labels}"
        )


class ELRPlusTrainer(nn.Module):
    """Two networks, their averages and their memories; everything of ELR+ except loaders and optimizers.

    Args:
        make_network: makes a network; called twice, and the two should start differently.
        num_examples: size of the training set.
        num_classes: K.
        lam: see :class:`ELRPlusLoss`, as ``beta``, ``ramp_steps`` and ``refine_labels``.
        beta: see ``lam``.
        ramp_steps: see ``lam``.
        refine_labels: see ``lam``.
        alpha: of the mixup; 0 for none.
        decay: see :class:`WeightAverage`, as ``decay_ramp_steps``.
        decay_ramp_steps: see ``decay``.
        make_memory: makes a memory, called twice; ``None`` for float32 on the device of this module.

    Attributes:
        networks: the two networks.
        averages: the average of each.
        criteria: the loss of each.
    """

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        num_examples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        ramp_steps: int = 0,
        refine_labels: bool = False,
        alpha: float = 1.0,
        decay: float = 0.997,
        decay_ramp_steps: int | None = 40_000,
        make_memory: Callable[[], SampleBank] | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.num_classes = alpha, num_classes
        self.networks = nn.ModuleList(make_network() for _ in range(2))
        self.averages = nn.ModuleList(WeightAverage(network, decay, decay_ramp_steps) for network in self.networks)
        self.criteria = nn.ModuleList(
            ELRPlusLoss(
                num_examples,
                num_classes,
                lam,
                beta,
                ramp_steps=ramp_steps,
                refine_labels=refine_labels,
                memory=None if make_memory is None else make_memory(),
            )
            for _ in range(2)
        )

    def steps(self, student: int) -> int:
        """Steps that a network has made."""
        return self._average(student).updates

    def loss(
        self,
        student: int,
        inputs: Float[Tensor, "batch ..."],
        labels: Int[Tensor, " batch"],
        index: Tensor,
        mix: Mix | None,
    ) -> Float[Tensor, ""]:
        """The loss of network ``student``, 0 or 1, on a batch; the other one's average is the teacher.

        Args:
            student: which network learns.
            inputs: the images as they are.
            labels: given, perhaps wrong.
            index: (batch,) integers, the number of each example in the data set.
            mix: how the images are mixed; ``None`` for not at all.

        Raises:
            ValueError: see :class:`ELRPlusLoss`.
        """
        criterion = cast(ELRPlusLoss, self.criteria[student])
        with torch.no_grad():
            teacher_logits = self.averages[1 - student](inputs)
        target = criterion.update_targets(index, teacher_logits, mix)
        soft = soft_labels(labels, self.num_classes, dtype=target.dtype)
        if mix is not None:
            inputs, soft = mix(inputs), mix(soft)
        loss: Tensor = criterion(self.networks[student](inputs), soft, target, self.steps(student))
        return loss

    def update_average(self, student: int) -> None:
        """Move the average of a network towards its weights; after each optimizer step."""
        self._average(student).update(self.networks[student])

    def step(
        self,
        student: int,
        optimizer: torch.optim.Optimizer,
        inputs: Float[Tensor, "batch ..."],
        labels: Int[Tensor, " batch"],
        index: Tensor,
        generator: torch.Generator,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> Float[Tensor, ""]:
        """One optimizer step of network ``student``: mix, loss, gradient, step, average.

        Args:
            student: see :meth:`loss`, as ``inputs``, ``labels`` and ``index``.
            optimizer: of that network.
            inputs: see ``student``.
            labels: see ``student``.
            index: see ``student``.
            generator: the draws of the mixup.
            backward: computes the gradients; that of accelerate or of a gradient scaler may go here.

        Returns:
            The loss, detached.
        """
        mix = draw_mix(len(labels), self.alpha, generator) if self.alpha else None
        loss = self.loss(student, inputs, labels, index, mix)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        self.update_average(student)
        return loss.detach()

    @torch.no_grad()
    def forward(
        self, inputs: Float[Tensor, "batch ..."], members: Members = "averages"
    ) -> Float[Tensor, "batch classes"]:
        """The mean of the logits of two networks in evaluation mode.

        Args:
            inputs: a batch.
            members: which two. The released code takes the first network with the second average when there are two GPUs, and both
                networks when there is one; neither is in the paper.
        """
        first = self.networks[0] if members != "averages" else self._average(0).average
        second = self.networks[1] if members == "live" else self._average(1).average
        modes = [(module, module.training) for member in (first, second) for module in member.modules()]
        logits = [member.eval()(inputs) for member in (first, second)]
        for module, training in modes:
            module.training = training
        return (logits[0] + logits[1]) / 2

    def _average(self, student: int) -> WeightAverage:
        return cast(WeightAverage, self.averages[student])


def _refined(labels: Tensor, target: Tensor) -> Tensor:
    """The labels, weighted by the target; as they are where the two have no class in common."""
    weighted = labels * target
    total = weighted.sum(1, keepdim=True)
    return torch.where(total > 0, weighted / total.clamp(min=torch.finfo(total.dtype).tiny), labels)
