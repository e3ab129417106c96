"""PS-KD for two-stage detectors: the classification head learns from what the last epoch's model says of the same boxes.

The boxes of a training step are drawn anew each time, so no memory can index them; the teacher is the model of the last epoch
(section 4.3 of the PS-KD paper). Everything else of the detector, the box regression and the proposal network, is left alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.labels.ps_kd import progressive_alpha, ps_kd_loss
from poise.core.memory.ema import EMA
from poise.core.names import unwrap


@dataclass
class _Seen:
    """What a training step of a detector went through."""

    images: Tensor | None = None
    pooled: tuple[Any, ...] = ()
    logits: Tensor | None = None
    labels: list[Tensor] = field(default_factory=list)


class PSKDDetector(nn.Module):
    r"""A torchvision detector with region-of-interest heads (Faster, Mask or Keypoint R-CNN), trained with PS-KD.

    In train mode, ``loss_classifier`` is the cross-entropy with :math:`(1 - \alpha_t) y + \alpha_t P_{t-1}`; in the first epoch
    and in evaluation mode nothing is changed.

    Args:
        detector: has ``backbone`` and ``roi_heads`` with ``select_training_samples``, ``box_roi_pool``, ``box_head`` and
            ``box_predictor``, as torchvision's have.
        alpha_T: weight of the past prediction in the last epoch.
        total_epochs: E.

    Attributes:
        detector: the detector; its parameters are those to optimize.
        teacher: the copy of the last epoch.

    Raises:
        TypeError: the detector lacks one of these parts.
        ValueError: ``alpha_T`` is outside [0, 1].
    """

    def __init__(self, detector: nn.Module, alpha_T: float, total_epochs: int) -> None:
        super().__init__()
        progressive_alpha(alpha_T, 0, total_epochs)
        heads = getattr(unwrap(detector), "roi_heads", None)
        parts = ("select_training_samples", "box_roi_pool", "box_head", "box_predictor")
        missing = [part for part in parts if not hasattr(heads, part)]
        if missing or not hasattr(unwrap(detector), "backbone"):
            raise TypeError(
                f"expected a two-stage detector of torchvision, got {type(detector).__name__} without {missing}"
            )
        self.alpha_T, self.total_epochs, self.epoch = alpha_T, total_epochs, 0
        self.detector = detector
        self.teacher = EMA(detector, decay=0.0)

    @property
    def alpha(self) -> float:
        """The weight of the past prediction in the current epoch; 0 while there is none."""
        return progressive_alpha(self.alpha_T, self.epoch, self.total_epochs) if self.teacher.updates else 0.0

    def end_epoch(self) -> None:
        """The detector becomes the teacher, and the weight of the past grows."""
        self.teacher.update(self.detector)
        self.epoch += 1

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As the detector's: a dict of losses in train mode, detections in evaluation mode.

        Raises:
            ValueError: all epochs are over.
        """
        if not self.training or self.alpha == 0:
            return self.detector(images, targets)
        with _watched(unwrap(self.detector)) as seen:
            losses: dict[str, Tensor] = self.detector(images, targets)
        assert seen.logits is not None  # a detector in train mode has classified boxes
        losses["loss_classifier"] = ps_kd_loss(
            seen.logits, torch.cat(seen.labels), self._past(seen).to(seen.logits.device), self.alpha
        )
        return losses

    @torch.no_grad()
    def _past(self, seen: _Seen) -> Float[Tensor, "boxes classes"]:
        """What the teacher says of the boxes that the detector was trained on."""
        teacher: Any = self.teacher.average
        features = teacher.backbone(seen.images)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        heads = teacher.roi_heads
        logits, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, *seen.pooled)))
        return cast(Tensor, logits.softmax(1))

    def get_extra_state(self) -> Tensor:
        """The epoch, as a tensor."""
        return torch.tensor(self.epoch)

    def set_extra_state(self, state: Tensor) -> None:
        self.epoch = int(state)


@contextmanager
def _watched(detector: Any) -> Iterator[_Seen]:
    """Record images, boxes, labels and class logits of the detector's next call."""
    seen, heads = _Seen(), detector.roi_heads
    select: Callable[..., Any] = heads.select_training_samples

    def selecting(*args: Any, **kwargs: Any) -> Any:
        chosen = select(*args, **kwargs)
        seen.labels = chosen[2]  # (boxes, matches, labels, regression targets)
        return chosen

    def images(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.images = inputs[0]

    def boxes(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.pooled = inputs[1:]  # without the features, which are the detector's own

    def logits(module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        seen.logits = outputs[0]

    handles = [
        detector.backbone.register_forward_pre_hook(images),
        heads.box_roi_pool.register_forward_pre_hook(boxes),
        heads.box_predictor.register_forward_hook(logits),
    ]
    heads.select_training_samples = selecting
    try:
        yield seen
    finally:
        del heads.select_training_samples
        for handle in handles:
            handle.remove()
