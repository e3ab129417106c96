"""Training with ADELE as the authors do it, for medical images and for PASCAL VOC.

>>> import torch
>>> images, masks = torch.randn(6, 1, 16, 16), torch.randint(0, 3, (6, 16, 16))
>>> model = torch.nn.Conv2d(1, 3, 3, padding=1)
>>> trainer = AdeleTrainer(
...     model,
...     torch.optim.SGD(model.parameters(), 0.01, momentum=0.99),
...     LabelStore(masks, num_classes=3),
...     MemorizationDetector(num_classes=3, total_epochs=2),
... )
>>> for epoch in range(2):
...     for index in torch.randperm(6).split(3):
...         loss = trainer.step(images[index], index)
...     report = trainer.end_epoch()
>>> report.iou.shape, report.changed
(torch.Size([3]), 0)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from poise.medical.segmentation.adele.consistency import AdeleLoss
from poise.medical.segmentation.adele.correction import MEDICAL, Correction, Prediction
from poise.medical.segmentation.adele.detector import MemorizationDetector
from poise.medical.segmentation.adele.iou import StreamingIoU
from poise.medical.segmentation.adele.label_store import LabelStore
from poise.medical.segmentation.adele.multiscale import (
    EVALUATION_SCALES,
    SCALES,
    multiscale_forward,
    multiscale_probabilities,
)

Refine = Callable[[Tensor, Tensor], Tensor]
"""From probabilities (B, C, *S) and images (B, channels, *S) to better probabilities, a conditional random field for example."""


class Epoch(NamedTuple):
    """What an epoch brought.

    Attributes:
        iou: (C,) training IoU with the labels that the detector looks at.
        triggered: (C,) classes that are being memorised.
        corrected: (C,) classes whose labels were corrected after this epoch.
        changed: number of pixels whose label changed.
    """

    iou: Tensor
    triggered: Tensor
    corrected: Tensor
    changed: int


class CorrectionSchedule:
    """Which triggered classes are corrected after which epoch.

    A class is corrected when it is triggered; then after every ``every``-th epoch, or never again.

    Args:
        num_classes: C.
        every: epochs; 1 corrects after every epoch, ``None`` once.

    Raises:
        ValueError: ``every`` is below 1.

    Source:
        The authors' code, where it is 10 for medical images and 1 for PASCAL VOC.
    """

    def __init__(self, num_classes: int, every: int | None = 10) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None to correct once, got {every}")
        self.every = every
        self.done = torch.zeros(num_classes, dtype=torch.bool)

    def due(self, triggered: Tensor, finished: int) -> Tensor:
        """(C,) the classes to correct now that ``finished`` epochs are over; they count as corrected.

        Args:
            triggered: (C,) the classes that are being memorised.
            finished: number of finished epochs.
        """
        if self.every is not None and finished % self.every == 0:
            self.done = torch.zeros_like(self.done)
        due = triggered & ~self.done
        self.done = self.done | due
        return due

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to resume from."""
        return {"done": self.done.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``."""
        self.done = state["done"].clone()


class AdeleTrainer:
    """Steps, and what comes between two epochs: detection and correction.

    The medical setting is the default: labels in use decide, predictions are those of the training step, in training mode, and labels
    are corrected from where they are. For PASCAL VOC, use ``loss=AdeleLoss(learn_weights=True, average=False)``,
    ``correction=PASCAL``, ``correct_every=1``, ``judged_by="original"``, ``reinitialize=True``, a detector with
    ``skip_flat=False``, and give :meth:`end_epoch` the images to predict.

    Images that are augmented geometrically do not lie on the stored masks: then read masks and augment both together, give them to
    :meth:`step` as ``labels``, and give :meth:`end_epoch` the images as they are.

    Args:
        model: from (B, channels, *S) to logits (B, C, *S'), on the device to train on.
        optimizer: of the parameters of the model, and of ``loss`` if it has any.
        store: the masks, with every image's at its index.
        detector: which classes are being memorised.
        loss: :class:`AdeleLoss`, or any function of the logits of all scales and the labels; ``None`` is ``AdeleLoss()``.
        correction: how labels are corrected; ``None`` never corrects.
        correct_every: epochs between corrections of a class; ``None`` corrects once.
        judged_by: whether the detector sees the IoU with the labels in use (``"current"``) or as given (``"original"``).
        reinitialize: start every correction from the labels as given instead of those in use.
        scales: of the image in training; the prediction is that at the scale closest to 1.
        divisor: of the sides of scaled images.
        refine: applied to the predictions that correct labels.
        refine_from: number of finished epochs from which it is.

    Attributes:
        epoch: number of finished epochs.

    Raises:
        ValueError: ``judged_by`` is unknown, or store and detector differ in the number of classes.

    Source:
        Liu et al. 2022, section 3, and the authors' code.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        store: LabelStore,
        detector: MemorizationDetector,
        *,
        loss: Callable[[list[Tensor], Tensor], Tensor] | None = None,
        correction: Correction | None = MEDICAL,
        correct_every: int | None = 10,
        judged_by: str = "current",
        reinitialize: bool = False,
        scales: tuple[float, ...] = SCALES,
        divisor: int = 1,
        refine: Refine | None = None,
        refine_from: int = 9,
    ) -> None:
        if judged_by not in ("current", "original"):
            raise ValueError(f"judged_by must be 'current' or 'original', got {judged_by!r}")
        if store.num_classes != detector.num_classes:
            raise ValueError(f"store has {store.num_classes} classes, the detector {detector.num_classes}")
        self.model, self.optimizer, self.store, self.detector = model, optimizer, store, detector
        self.loss = AdeleLoss(scales=len(scales)).to(self.device) if loss is None else loss
        self.correction, self.judged_by, self.reinitialize = correction, judged_by, reinitialize
        self.scales, self.divisor = scales, divisor
        self._nearest = min(range(len(scales)), key=lambda place: abs(scales[place] - 1))
        self.refine, self.refine_from = refine, refine_from
        self.schedule = CorrectionSchedule(store.num_classes, correct_every)
        self.iou = StreamingIoU(store.num_classes).to(self.device)
        self.epoch = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(
        self,
        images: Float[Tensor, "..."],
        index: Integer[Tensor, " batch"],
        labels: Integer[Tensor, "..."] | None = None,
        original: Integer[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """One update, and its predictions kept for the end of the epoch.

        Args:
            images: (B, channels, *S).
            index: (B,) their places in the store.
            labels: (B, *S) masks in use that were augmented together with the images. Then predictions are not kept.
            original: (B, *S) masks as given, augmented the same; for a detector that looks at these.

        Returns:
            The loss, detached.

        Raises:
            ValueError: images and labels differ in size, or ``original`` is missing.
        """
        self.model.train()
        stored = labels is None
        if labels is None:
            labels, original = self.store.read(index), self.store.read_original(index)
        elif original is None and self.judged_by == "original":
            raise ValueError("the detector looks at the original labels: give them augmented like the labels")
        if labels.shape[1:] != images.shape[2:]:
            raise ValueError(f"images are {tuple(images.shape[2:])}, their labels {tuple(labels.shape[1:])}")
        images, labels = images.to(self.device), labels.to(self.device)
        logits = multiscale_forward(self.model, images, self.scales, self.divisor)
        loss = self.loss(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        probabilities = logits[self._nearest].detach().softmax(1)
        if stored:
            self.store.remember(index, self._refined(probabilities, images))
        judge = original if original is not None and self.judged_by == "original" else labels
        self.iou.update(Prediction.of(probabilities).label, judge.to(self.device))
        return loss.detach()

    def record(self) -> Tensor:
        """Hand the IoU since the last call to the detector; for a detector whose ``interval`` is a part of an epoch."""
        iou = self.iou.compute()
        self.iou.reset()
        self.detector.record(iou)
        return iou

    def end_epoch(self, images: Iterable[tuple[Tensor, Tensor]] | None = None, **evaluation: Any) -> Epoch:
        """Decide which classes are being memorised, and correct those that are due.

        Args:
            images: batches (images, index) to predict in evaluation mode before labels are corrected, all of one size each. By default
                corrections use the predictions of the training steps.
            evaluation: settings of :meth:`predict`.

        Returns:
            What the epoch brought.

        Raises:
            ValueError: no step was taken, or :meth:`record` not called, since the last epoch.
        """
        if self.iou.counts.any():
            self.record()
        history = self.detector.history
        if not len(history):
            raise ValueError("no IoU was recorded: take steps before the epoch ends")
        triggered = self.detector.decide(self.epoch)
        self.epoch += 1
        corrected, changed = torch.zeros_like(triggered), 0
        if self.correction is not None:
            corrected = self.schedule.due(triggered, self.epoch)
        if self.correction is not None and corrected.any():
            if images is not None:
                self.predict(images, **evaluation)
            if self.reinitialize:
                self.store.reset()
            changed = self.store.correct(triggered if self.reinitialize else corrected, self.correction)
        return Epoch(history[-1], triggered, corrected, changed)

    def predict(
        self,
        images: Iterable[tuple[Tensor, Tensor]],
        scales: tuple[float, ...] = EVALUATION_SCALES,
        flip: bool = True,
        temperature: float = 1.0,
    ) -> None:
        """Remember predictions in evaluation mode, averaged over scales and mirror images.

        Args:
            images: batches (images, index), all of one size each.
            scales: of the images.
            flip: whether mirror images count too.
            temperature: of the softmax; 3 for PASCAL VOC.
        """
        for batch, index in images:
            batch = batch.to(self.device)
            probabilities = multiscale_probabilities(self.model, batch, scales, flip, temperature, self.divisor)
            self.store.remember(index, self._refined(probabilities, batch))

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, to resume from."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        return {**state, "epoch": torch.tensor(self.epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch = int(state["epoch"])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "store": self.store, "detector": self.detector}
        parts |= {"schedule": self.schedule, "iou": self.iou}
        return parts | ({"loss": self.loss} if isinstance(self.loss, nn.Module) else {})

    def _refined(self, probabilities: Tensor, images: Tensor) -> Tensor:
        if self.refine is None or self.epoch < self.refine_from:
            return probabilities
        return self.refine(probabilities, images)
