r"""Correction of masks: confident predictions replace the labels of classes that are being memorised.

>>> import torch
>>> labels = torch.tensor([[[1, 1, 0, 2]]])
>>> probs = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.1, 0.9, 0.0], [0.1, 0.9, 0.0]]).T.reshape(1, 3, 1, 4)
>>> triggered = torch.tensor([False, True, False])
>>> correct_labels(labels, probs, triggered, tau_fg=0.7, tau_bg=0.7).tolist()  # class 2 has not been triggered
[[[0, 1, 1, 2]]]
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from poise.medical.segmentation.adele.checks import check_labels, check_probabilities, check_spatial

Array = TypeVar("Array", Tensor, npt.NDArray[np.integer])

IGNORE = 255


class Prediction(NamedTuple):
    """What a correction needs to know of the probabilities p of a batch of images.

    Attributes:
        label: (B, *S) the class of largest probability.
        foreground: (B, *S) :math:`\\max_{j \\ge 1} p_j`.
        background: (B, *S) :math:`p_0`.
    """

    label: Integer[Tensor, "..."]
    foreground: Float[Tensor, "..."]
    background: Float[Tensor, "..."]

    @staticmethod
    def of(probs: Float[Tensor, "..."]) -> "Prediction":
        """Summary of probabilities (B, C, *S), of at most 255 classes; labels are uint8."""
        classes, objects = probs.shape[1], probs[:, 1:]
        foreground, background = objects.amax(1), probs[:, 0]
        # argmax along a dimension that is not the last is many times slower on a CPU than these passes. The first of equals wins.
        ranks = torch.arange(classes - 1, 0, -1, dtype=torch.uint8, device=probs.device)
        first = (objects == foreground.unsqueeze(1)) * ranks.view(-1, *[1] * (probs.ndim - 2))
        label = torch.where(foreground > background, classes - first.amax(1), 0)
        return Prediction(label, foreground, background)


@dataclass(frozen=True)
class Correction:
    """How labels are corrected; the defaults are those of the medical experiments.

    Attributes:
        tau_fg: confidence that a foreground class must exceed.
        tau_bg: the same for background.
        class_constraint: only classes that the image's label has already, and background, may appear.
        rule: ``"both"``: label and prediction must be background or a triggered class. ``"single"``: only the prediction.
        ignore_shrunk: label 255 (ignore) where a labelled pixel is predicted as background, however confident.
        background_images: correct images whose label is all background too; to them the class constraint does not apply.
        drop_vanishing: leave an image alone that would lose more than half of its foreground and become more than 95 % background.

    Raises:
        ValueError: ``rule`` is unknown or a threshold negative.
    """

    tau_fg: float = 0.7
    tau_bg: float = 0.7
    class_constraint: bool = True
    rule: str = "both"
    ignore_shrunk: bool = False
    background_images: bool = False
    drop_vanishing: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("both", "single"):
            raise ValueError(f"rule must be 'both' or 'single', got {self.rule!r}")
        if not (self.tau_fg >= 0 and self.tau_bg >= 0):
            raise ValueError(f"tau_fg and tau_bg must not be negative, got {self.tau_fg} and {self.tau_bg}")

    def __call__(self, labels: Tensor, prediction: Prediction, triggered: Bool[Tensor, " classes"]) -> Tensor:
        """Corrected labels (B, *S), in the dtype of ``labels``; of labels and predictions that are known to be in range."""
        allowed = triggered.to(labels.device).clone()
        if not allowed[1:].any():
            return labels.clone()
        allowed[0] = True
        shape, flat = labels.shape, labels.flatten(1).long()
        predicted = prediction.label.flatten(1).long()
        present = _present(flat, len(allowed))

        touched = (present & allowed)[:, 1:].any(1)
        unlabelled = ~present[:, 1:].any(1)
        if self.background_images:
            touched |= unlabelled
        possible = allowed.expand_as(present)
        if self.class_constraint:
            free = unlabelled if self.background_images else torch.zeros_like(unlabelled)
            with_background = present.clone()
            with_background[:, 0] = True
            possible = possible & (with_background | free[:, None])

        confident = (prediction.foreground > self.tau_fg) | (prediction.background > self.tau_bg)
        replace = confident.flatten(1) & possible.gather(1, predicted)
        if self.rule == "both":
            corrigible = torch.cat([allowed, allowed.new_zeros(IGNORE + 1 - len(allowed))])
            replace &= corrigible.take(flat)
        corrected = torch.where(replace, predicted, flat)
        if self.ignore_shrunk:
            corrected = corrected.masked_fill((flat != 0) & (predicted == 0), IGNORE)
        if self.drop_vanishing:
            left = (corrected != 0).sum(1)
            touched &= (left >= 0.5 * (flat != 0).sum(1)) | ((corrected == 0).sum(1) <= 0.95 * flat.shape[1])
        return torch.where(touched[:, None], corrected, flat).to(labels.dtype).view(shape)


MEDICAL = Correction()
"""SegTHOR in the authors' code. The paper says 0.8 for both thresholds."""

PASCAL = Correction(tau_fg=0.8, tau_bg=0.8, rule="single", background_images=True, drop_vanishing=True)
"""PASCAL VOC in the authors' code."""


def correct_labels(
    labels: Array,
    probs: Tensor | npt.NDArray[np.floating],
    triggered: Tensor | npt.NDArray[np.bool_],
    tau_fg: float = 0.7,
    tau_bg: float = 0.7,
    class_constraint: bool = True,
    rule: str = "both",
    ignore_shrunk: bool = False,
    *,
    background_images: bool = False,
    drop_vanishing: bool = False,
) -> Array:
    r"""Labels in which confident predictions have replaced those of triggered classes.

    A pixel of label l, probabilities p and prediction :math:`k = \arg\max p` becomes k if and only if

    .. math:: (\max_{j \ge 1} p_j > \tau_{fg} \text{ or } p_0 > \tau_{bg}), \qquad l \in S_0, \qquad k \in S_0

    for the triggered classes S and :math:`S_0 = S \cup \{0\}`, and, with the class constraint, k is 0 or in the image's label.
    Images whose label has no triggered class are left alone. Doing the same again changes nothing more.

    Args:
        labels: (B, H, W) or (B, D, H, W) classes 0..C-1, or 255 to ignore; a tensor or an array.
        probs: (B, C, *S) probabilities; a tensor or an array.
        triggered: (C,) boolean, the classes S. The entry of background makes no difference.
        tau_fg: see :class:`Correction`, as for the others.
        tau_bg: the confidence that background must exceed; 1 or more: never.
        class_constraint: whether new classes are kept out of an image.
        rule: ``"both"`` as above; ``"single"`` does not ask for :math:`l \in S_0` (PASCAL VOC).
        ignore_shrunk: label 255 where a foreground pixel is predicted as background; whether its class is triggered or not.
        background_images: correct images whose label is all background too.
        drop_vanishing: leave alone images whose foreground would all but vanish.

    Returns:
        The corrected labels, like ``labels``, which are not changed.

    Raises:
        TypeError: labels are not integers, ``probs`` not floating-point, or ``triggered`` not boolean.
        ValueError: a label is out of range, ``probs`` hold NaN or do not sum to 1, the shapes do not fit, or a setting is out of range.

    Source:
        Liu et al. 2022, section 3 and appendix; the class constraint, "single" and the last three from the authors' code.
    """
    how = Correction(tau_fg, tau_bg, class_constraint, rule, ignore_shrunk, background_images, drop_vanishing)
    tensors = [torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in (labels, probs, triggered)]
    current, p, which = cast(list[Tensor], tensors)
    check_spatial(current, p)
    check_triggered(which, p.shape[1])
    check_labels(current, p.shape[1])
    check_probabilities(p)
    corrected = how(current, Prediction.of(p), which)
    return corrected.numpy() if isinstance(labels, np.ndarray) else corrected


def check_triggered(triggered: Tensor, num_classes: int) -> None:
    """Raises TypeError or ValueError unless ``triggered`` is one bool for each class."""
    if triggered.dtype != torch.bool:
        raise TypeError(f"triggered must be boolean, got {triggered.dtype}")
    if triggered.shape != (num_classes,):
        raise ValueError(
            f"triggered must have one entry for each of {num_classes} classes, got {tuple(triggered.shape)}"
        )


def _present(flat: Tensor, num_classes: int) -> Tensor:
    """(B, C) whether each image's label has each class."""
    found = torch.zeros(len(flat), IGNORE + 1, dtype=torch.bool, device=flat.device)
    return found.scatter_(1, flat, True)[:, :num_classes]
