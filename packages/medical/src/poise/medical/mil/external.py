"""The models of MONAI and torchmil, read in the same form as the models here, without a change to them.

>>> import torch
>>> from monai.networks.nets import MILModel
>>> encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
>>> model = FromMONAI(MILModel(num_classes=2, backbone=encoder, backbone_num_features=8))
>>> reading = model.read(torch.rand(2, 5, 3, 16, 16))
>>> reading.logits.shape, reading.scores.shape
(torch.Size([2, 2]), torch.Size([2, 1, 5]))
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.medical.mil.bags import check_bags
from poise.medical.mil.reading import BagModel, Reading


class FromMONAI(BagModel):
    """A ``monai.networks.nets.MILModel`` whose attention can be read, with masks, which MONAI's own does not take.

    Bags are images ``(bags, instances, channels, height, width)``, or features ``(bags, instances, features)`` of instances that
    went through its backbone before. MONAI's forward does all the computing; hooks, there for the time of a call, note what its
    attention says and hide padding from it and from its transformer. Padding does go through the backbone: with batch normalisation
    that is in training mode, give it bags of one size.

    Args:
        model: in one of the modes ``att``, ``att_trans`` and ``att_trans_pyramid`` (the last takes images only).

    Raises:
        ValueError: the model's mode has no attention.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        mode = getattr(model, "mil_mode", type(model).__name__)
        if mode not in ("att", "att_trans", "att_trans_pyramid"):
            raise ValueError(f"expected a MONAI MILModel in a mode with attention, got {mode!r}")
        self.model = model

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        if bags.ndim not in (3, 5):
            raise ValueError(
                f"expected bags of images (5 dimensions) or of features (3), got shape {tuple(bags.shape)}"
            )
        check_bags(bags.flatten(2), mask)
        model: Any = self.model
        features = bags if bags.ndim == 3 else model(bags, no_head=True)
        scores: list[Tensor] = []
        with hooks(self.model, scores, mask):
            logits = model.calc_head(features)
        return Reading(logits, scores[0].squeeze(-1).unsqueeze(1), streams=(logits,))


class FromTorchmil(BagModel):
    """A ``torchmil.models.ABMIL``, whose single logit becomes two: 0 for the negative class, and that.

    Args:
        model: a model that takes ``(bags, mask, return_att=True)`` and returns a logit and raw scores for each bag.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        check_bags(bags.flatten(2), mask)
        logit, scores = self.model(bags, mask, return_att=True)
        if scores.shape != bags.shape[:2] or logit.shape != bags.shape[:1]:
            raise ValueError(
                f"{type(self.model).__name__} must give one logit per bag and one score per instance, "
                f"got {tuple(logit.shape)} and {tuple(scores.shape)}"
            )
        # The cross-entropy of (0, z) is the binary cross-entropy of z.
        logits = torch.stack([torch.zeros_like(logit), logit], -1)
        return Reading(logits, scores.unsqueeze(1), streams=(logits,))


@contextmanager
def hooks(model: nn.Module, scores: list[Tensor], mask: Tensor | None) -> Iterator[None]:
    """Append the output of ``model.attention`` to ``scores``, and hide padding from it and from every transformer encoder."""

    def note(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        scores.append(output)
        return output if mask is None else output.masked_fill(~mask.unsqueeze(-1), -math.inf)

    def hide(_module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**named, "src_key_padding_mask": None if mask is None else ~mask}

    with ExitStack() as stack:
        stack.callback(model.get_submodule("attention").register_forward_hook(note).remove)
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield
