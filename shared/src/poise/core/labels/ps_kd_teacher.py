"""PS-KD with the model of the last epoch as teacher, and a trainer that runs it with either back end.

>>> import torch
>>> model = torch.nn.Linear(8, 3)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> trainer = PSKDTrainer(model, optimizer, num_classes=3, alpha_T=0.8, total_epochs=2)
>>> loader = [(torch.randn(4, 8), torch.tensor([0, 2, 1, 0]))]
>>> losses = [trainer.train_epoch(loader) for _ in range(2)]
>>> trainer.finished
True
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from poise.core.labels.ps_kd import PSKDLoss, progressive_alpha, ps_kd_loss
from poise.core.memory.ema import EMA
from poise.core.memory.samples import SampleBank


class PreviousModelTeacher(nn.Module):
    """A frozen copy of the model as it was when :meth:`update` was called last.

    It stands in for the memory where predictions cannot be indexed by example, and costs one forward pass without gradient. It
    predicts in evaluation mode and for the input it is given, while a memory holds what the model predicted in train mode for
    another augmentation.

    Args:
        model: the model that learns; copied with its buffers.
        dim: the dimension of the classes in its output.
    """

    def __init__(self, model: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.copy = EMA(model, decay=0.0)

    @property
    def ready(self) -> bool:
        """Whether there is a past."""
        return self.copy.updates > 0

    def update(self, model: nn.Module) -> None:
        """Become a copy of the model; at the end of each epoch."""
        self.copy.update(model)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "..."] | None:
        """The probabilities that the past model gives; ``None`` in the first epoch, as :func:`ps_kd_loss` expects it.

        Raises:
            ValueError: the model's answer has no axis ``dim``.
        """
        if not self.ready:
            return None
        logits: Tensor = self.copy(*args, **kwargs)
        if not -logits.ndim <= self.dim < logits.ndim:
            raise ValueError(
                f"the model must give logits with classes along axis {self.dim}, got {tuple(logits.shape)}"
            )
        return logits.softmax(self.dim)


class PSKDTrainer:
    """Runs epochs of PS-KD. Save :meth:`state_dict` at any step, and training continues as if it had not stopped.

    Args:
        model: takes the inputs of a batch (several, if they are a tuple) and returns logits.
        optimizer: of the model.
        num_classes: K, or the shape of one prediction with the classes first.
        alpha_T: weight of the past prediction in the last epoch.
        total_epochs: E.
        num_examples: size of the training set, for the memory of predictions: batches are (inputs, labels, index). Without it the
            teacher is the model of the last epoch, and batches are (inputs, labels).
        scheduler: stepped after each epoch.
        memory: see :class:`~poise.core.labels.ps_kd.PSKDLoss`.
        label_smoothing: of the labels.
        ignore_index: the label of positions that do not count: padding, in translation.
        dim: the dimension of the classes in the output; -1 for tokens (batch, time, K).
        backward: computes the gradients; that of accelerate or of a gradient scaler may go here.

    Raises:
        ValueError: a hyperparameter is out of range, or a memory is to hold predictions with the classes in another dimension than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_classes: int | tuple[int, ...],
        alpha_T: float,
        total_epochs: int,
        num_examples: int | None = None,
        scheduler: LRScheduler | None = None,
        memory: SampleBank | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        dim: int = 1,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        progressive_alpha(alpha_T, 0, total_epochs)  # a bad setting is reported here
        if num_examples is not None and dim != 1:
            raise ValueError(f"a memory holds predictions with the classes in dimension 1, got dim={dim}")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.alpha_T, self.total_epochs, self.epoch = alpha_T, total_epochs, 0
        self.criterion = self.teacher = None
        if num_examples is None:
            self.teacher = PreviousModelTeacher(model, dim)
        else:
            self.criterion = PSKDLoss(
                num_examples,
                num_classes,
                alpha_T,
                total_epochs,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
                memory=memory,
            )
        self._label_smoothing, self._ignore_index, self._dim = label_smoothing, ignore_index, dim
        self._backward = backward

    @property
    def alpha(self) -> float:
        """The weight of the past prediction in the current epoch."""
        return progressive_alpha(self.alpha_T, self.epoch, self.total_epochs)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.total_epochs

    def loss(self, inputs: Any, labels: Tensor, index: Tensor | None = None) -> Float[Tensor, ""]:
        """The loss of a batch in the current epoch.

        Raises:
            ValueError: training is finished; there is a memory but no index, or the other way round; or shapes do not fit.
        """
        if (index is None) != (self.criterion is None):
            raise ValueError("batches are (inputs, labels, index) with a memory, and (inputs, labels) without")
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        logits: Tensor = self.model(*arguments)
        if self.criterion is not None and index is not None:
            self.criterion.set_epoch(self.epoch)
            loss: Tensor = self.criterion(logits, labels, index)
            return loss
        assert self.teacher is not None
        return ps_kd_loss(
            logits,
            labels,
            self.teacher(*arguments),
            self.alpha,
            label_smoothing=self._label_smoothing,
            ignore_index=self._ignore_index,
            dim=self._dim,
        )

    def step(self, inputs: Any, labels: Tensor, index: Tensor | None = None) -> Float[Tensor, ""]:
        """One optimizer step; arguments and errors as :meth:`loss`, which it returns, detached."""
        loss = self.loss(inputs, labels, index)
        self.optimizer.zero_grad()
        self._backward(loss)
        self.optimizer.step()
        return loss.detach()

    def end_epoch(self) -> None:
        """Go to the next epoch: the model becomes the teacher, the weight of the past grows."""
        if self.teacher is not None:
            self.teacher.update(self.model)
        if self.scheduler is not None:
            self.scheduler.step()
        self.epoch += 1

    def train_epoch(self, loader: Iterable[Any]) -> Float[Tensor, ""]:
        """All steps of an epoch and its end.

        Args:
            loader: batches (inputs, labels, index), or (inputs, labels) without a memory.

        Returns:
            The mean loss.

        Raises:
            ValueError: there is no batch; and as :meth:`loss`.
        """
        self.model.train()
        losses = [self.step(*batch) for batch in loader]
        if not losses:
            raise ValueError("the loader gave no batch")
        self.end_epoch()
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule, past predictions, and the epoch."""
        return {"epoch": self.epoch} | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a state."""
        self.epoch = state["epoch"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "criterion": self.criterion,
            "teacher": self.teacher,
        }
        return {name: part for name, part in parts.items() if part is not None}
