r"""SHISRCNet: classify what a low-resolution scanner sees, by way of the image that a better one would have seen.

Xie, Li, Wang, Zhang, Chen, Shen and Wu, "SHISRCNet: Super-resolution And Classification Network For Low-resolution Breast Cancer
Histopathology Image", MICCAI 2023, arXiv 2306.14119.

A network G enlarges the image, a classifier C reads the result, and both train together, so that G restores what the decision needs.
High-resolution images enter in training only: as the target of G, and as a second view for C:

.. math::
    L = w_{sr} \, |G(x) - y|_1 + w_{cls} \, \tfrac12 \big( \mathrm{focal}(C(G(x)), t) + \mathrm{focal}(C(y), t) \big)
        + w_{con} \, \mathrm{NTXent}\big( v(G(x)), v(y) \big)

for a low-resolution image x, the same y at high resolution, its class t and features v of the classifier, with weights 0.6, 0.3
and 0.1.

>>> import torch
>>> from poise.medical import SHISRCLoss, SHISRCNet, degrade
>>> model, criterion = SHISRCNet(scale=2, num_classes=2), SHISRCLoss()
>>> hr, labels = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
>>> lr = degrade(hr, scale=2)
>>> terms = criterion(model(lr, hr), hr, labels)
>>> terms["loss"].backward()
>>> sorted(terms)
['classification', 'contrastive', 'loss', 'sr']
>>> output = model.eval()(lr)  # without the high-resolution image
>>> output.sr.shape, output.logits.shape
(torch.Size([2, 3, 64, 64]), torch.Size([2, 2]))

Research code: nothing here is meant for, or was tested for, clinical use.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.medical.histopathology.shisrcnet.classifier import ClassifierCF
from poise.medical.histopathology.shisrcnet.super_resolution import SRResNetMFE


@dataclass(frozen=True)
class SHISRCOutput:
    """What :class:`SHISRCNet` gives.

    Attributes:
        sr: super-resolved images, not clamped to [0, 1].
        logits: of the super-resolved images: the prediction.
        features: their features.
        hr_logits: of the high-resolution images, if they were given.
        hr_features: their features.
    """

    sr: Float[Tensor, "batch 3 height width"]
    logits: Float[Tensor, "batch classes"]
    features: Float[Tensor, "batch features"]
    hr_logits: Float[Tensor, "batch classes"] | None = None
    hr_features: Float[Tensor, "batch features"] | None = None


class SHISRCNet(nn.Module):
    """Super-resolution and classification in one network.

    Args:
        scale: of super-resolution: 2, 4 or 8.
        num_classes: number of classes.
        upscaler: a network from low to high resolution in the place of :class:`SRResNetMFE`.
        classifier: any network from images to ``(features, logits)`` in the place of :class:`ClassifierCF`; see
            :class:`WithFeatures` for those of timm and MONAI. Then ``num_classes`` is its own affair.
        detach_sr: cut the gradient between the two halves, so that each trains alone (for comparison).
        joint_batch: in training, classify super-resolved and high-resolution images in one batch: one call, and batch statistics of
            both. By default each has its own.

    Raises:
        ValueError: an unknown scale.

    Source:
        Xie et al., MICCAI 2023.
    """

    def __init__(
        self,
        scale: int,
        num_classes: int = 2,
        *,
        upscaler: nn.Module | None = None,
        classifier: nn.Module | None = None,
        detach_sr: bool = False,
        joint_batch: bool = False,
    ) -> None:
        super().__init__()
        self.upscaler = SRResNetMFE(scale) if upscaler is None else upscaler
        self.classifier = ClassifierCF(num_classes) if classifier is None else classifier
        self.scale, self.detach_sr, self.joint_batch = scale, detach_sr, joint_batch

    def forward(
        self, lr: Float[Tensor, "batch 3 _ _"], hr: Float[Tensor, "batch_hr 3 _ _"] | None = None
    ) -> SHISRCOutput:
        """Enlarge and classify.

        Args:
            lr: low-resolution images in [0, 1].
            hr: the same images at high resolution; in training only. They change neither ``sr`` nor, unless ``joint_batch``,
                ``logits``.

        Raises:
            ValueError: ``hr`` is not ``scale`` times as large as ``lr``; with a classifier that normalizes over the batch also, in
                training, a batch of one image.
        """
        batch, channels, height, width = lr.shape
        size = (batch, channels, self.scale * height, self.scale * width)
        if hr is not None and hr.shape != size:
            raise ValueError(
                f"hr must be {self.scale} times as large as lr: expected {size} for {tuple(lr.shape)}, got {tuple(hr.shape)}"
            )
        sr = self.upscaler(lr)
        seen = sr.detach() if self.detach_sr else sr
        if hr is None:
            features, logits = self.classifier(seen)
            return SHISRCOutput(sr, logits, features)
        if self.joint_batch:
            both_features, both_logits = self.classifier(torch.cat([seen, hr]))
            (features, hr_features), (logits, hr_logits) = both_features.chunk(2), both_logits.chunk(2)
        else:
            features, logits = self.classifier(seen)
            hr_features, hr_logits = self.classifier(hr)
        return SHISRCOutput(sr, logits, features, hr_logits, hr_features)
