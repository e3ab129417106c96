r"""The loss that trains both halves of SHISRCNet at once."""

import math

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from poise.core.functional import focal_loss, nt_xent
from poise.medical.histopathology.shisrcnet.network import SHISRCOutput


class SHISRCLoss(nn.Module):
    r"""Restoration, classification of both views, and their agreement.

    .. math::
        L = w_{sr} \, |\hat y - y|_1 + w_{cls} \, \tfrac12 (\mathrm{focal}(\hat t, t) + \mathrm{focal}(\hat t_{hr}, t))
            + w_{con} \, \mathrm{NTXent}(v, v_{hr})

    The focal loss reads the logits and the contrastive one the features. Without a high-resolution branch the classification term is
    that of the super-resolved images, and there is no contrastive one. A term of weight 0 is not computed.

    Args:
        w_sr: weight of the mean absolute difference.
        w_cls: weight of the focal losses.
        w_con: weight of NT-Xent.
        gamma: of the focal loss.
        temperature: of NT-Xent.

    Raises:
        ValueError: a weight is negative or not finite.

    Source:
        Xie et al., MICCAI 2023, total loss; weights and gamma as in the authors' release.
    """

    def __init__(
        self, w_sr: float = 0.6, w_cls: float = 0.3, w_con: float = 0.1, gamma: float = 5.0, temperature: float = 2.0
    ) -> None:
        super().__init__()
        for name, weight in (("w_sr", w_sr), ("w_cls", w_cls), ("w_con", w_con)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {weight}")
        self.w_sr, self.w_cls, self.w_con = w_sr, w_cls, w_con
        self.gamma, self.temperature = gamma, temperature

    def forward(
        self, output: SHISRCOutput, hr: Float[Tensor, "batch_hr 3 _ _"], labels: Int[Tensor, " batch"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms without their weights, and under ``loss`` their weighted sum.

        Args:
            output: of :class:`SHISRCNet`.
            hr: high-resolution images, the target of restoration.
            labels: classes of the images.

        Returns:
            ``loss``, and of ``sr``, ``classification`` and ``contrastive`` those that were computed.

        Raises:
            ValueError: ``hr`` and the super-resolved images differ in size, or the labels do not fit the logits.
        """
        if output.logits.ndim != 2 or labels.shape != output.logits.shape[:1]:
            raise ValueError(
                f"labels must be one per row of logits (batch, classes), got shapes {tuple(labels.shape)} and "
                f"{tuple(output.logits.shape)}"
            )
        if output.sr.shape != hr.shape:
            raise ValueError(
                f"hr must have the size of the super-resolved images {tuple(output.sr.shape)}, got {tuple(hr.shape)}"
            )
        loss, terms = output.sr.new_zeros(()), {}
        if self.w_sr:
            terms["sr"] = l1_loss(output.sr, hr)
            loss = loss + self.w_sr * terms["sr"]
        if self.w_cls:
            terms["classification"] = self._classification(output, labels)
            loss = loss + self.w_cls * terms["classification"]
        if self.w_con and output.hr_features is not None:
            terms["contrastive"] = nt_xent(output.features, output.hr_features, self.temperature)
            loss = loss + self.w_con * terms["contrastive"]
        return {"loss": loss, **terms}

    def _classification(self, output: SHISRCOutput, labels: Tensor) -> Tensor:
        ours = focal_loss(output.logits, labels, self.gamma)
        if output.hr_logits is None:
            return ours
        return 0.5 * (ours + focal_loss(output.hr_logits, labels, self.gamma))

    def extra_repr(self) -> str:
        return f"w_sr={self.w_sr}, w_cls={self.w_cls}, w_con={self.w_con}, gamma={self.gamma}, temperature={self.temperature}"
