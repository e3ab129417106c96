"""Which classes are being memorised: a trigger for each, that stays.

>>> import torch
>>> detector = MemorizationDetector(num_classes=3, total_epochs=30)
>>> t = torch.arange(30)
>>> fast, slow = 0.9 * (1 - torch.exp(-(t**0.8) / 2)), 0.9 * (1 - torch.exp(-(t**0.9) / 6))
>>> for epoch in range(30):
...     triggered = detector.update(torch.tensor([0.99, fast[epoch], slow[epoch]]))
>>> triggered.tolist(), detector.trigger_epochs.tolist()  # background is never asked
([False, True, True], [-1, 8, 19])
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from poise.medical.segmentation.adele.curve import Curve, memorization_epoch


class MemorizationDetector:
    """Follows the training IoU of every class and says which of them are being memorised.

    Each foreground class is judged by its own curve (:func:`memorization_epoch`); one that was triggered stays so. Background
    (class 0) has no trigger: where a foreground class shrinks it grows, and correction always allows it.

    Args:
        num_classes: C, with background.
        total_epochs: T, the length of the training.
        r: share of its slope that a curve has to lose.
        skip_flat: leave out a flat start of the curve (the medical setting).
        interval: epochs between two values of the IoU.

    Attributes:
        triggered: (C,) bool, on the CPU.
        trigger_epochs: (C,) integers, finished epochs minus one when each class was triggered; -1 before.

    Raises:
        ValueError: fewer than two classes, or a setting out of range.

    Source:
        Liu et al. 2022, section 3; when the decision is taken from the authors' code.
    """

    triggered: Tensor
    trigger_epochs: Tensor

    def __init__(
        self, num_classes: int, total_epochs: int, r: float = 0.9, *, skip_flat: bool = True, interval: float = 1.0
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (background and one class), got {num_classes}")
        memorization_epoch([], total_epochs, r, interval=interval)  # refuses settings that are out of range
        self.num_classes, self.total_epochs, self.r = num_classes, total_epochs, r
        self.skip_flat, self.interval = skip_flat, interval
        self._history: list[list[float]] = []
        self.triggered = torch.zeros(num_classes, dtype=torch.bool)
        self.trigger_epochs = torch.full((num_classes,), -1)

    @property
    def history(self) -> Tensor:
        """(values, C) float64, the training IoU so far."""
        return torch.tensor(self._history, dtype=torch.float64).reshape(-1, self.num_classes)

    def record(self, iou_per_class: Curve) -> None:
        """Append one value for each class.

        Args:
            iou_per_class: (C,) from 0 to 1, of the training predictions with the labels, pooled over all pixels.

        Raises:
            ValueError: not C values, or one that is not finite or not in [0, 1].
        """
        values = torch.as_tensor(iou_per_class, dtype=torch.float64).tolist()
        if not isinstance(values, list) or len(values) != self.num_classes:
            raise ValueError(f"iou_per_class must hold one value for each of {self.num_classes} classes, got {values}")
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"iou_per_class must be finite and lie in [0, 1], got {values}")
        self._history.append(values)

    def decide(self, epoch: int) -> Bool[Tensor, " classes"]:
        """Trigger every class whose memorisation epoch is ``epoch`` or earlier.

        Args:
            epoch: finished epochs minus one.

        Returns:
            (C,) which classes are triggered so far.
        """
        curves = self.history
        for index in range(1, self.num_classes):
            if not self.triggered[index]:
                due = self._memorization_epoch(curves[:, index])
                if due is not None and epoch >= due:
                    self.triggered[index], self.trigger_epochs[index] = True, epoch
        return self.triggered.clone()

    def update(self, iou_per_class: Curve) -> Bool[Tensor, " classes"]:
        """:meth:`record` the IoU of an epoch, then :meth:`decide`; arguments, result and errors as there."""
        self.record(iou_per_class)
        return self.decide(len(self._history) - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to resume from."""
        return {
            "history": self.history,
            "triggered": self.triggered.clone(),
            "trigger_epochs": self.trigger_epochs.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: it is that of a detector for another number of classes.
        """
        if state["triggered"].shape != (self.num_classes,):
            raise ValueError(f"state is that of {len(state['triggered'])} classes, the detector has {self.num_classes}")
        self._history = state["history"].tolist()
        self.triggered, self.trigger_epochs = state["triggered"].clone(), state["trigger_epochs"].clone()

    def _memorization_epoch(self, curve: Tensor) -> int | None:
        return memorization_epoch(curve, self.total_epochs, self.r, self.skip_flat, self.interval)
