"""What arms of the SHISRCNet experiment put in the place of a half of the network, or of its loss."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, normalize

from poise.core.functional import focal_loss
from poise.medical.histopathology.resolution import enlarge
from poise.medical.histopathology.shisrcnet.losses import SHISRCLoss
from poise.medical.histopathology.shisrcnet.network import SHISRCOutput
from poise.medical.mil.tiles import EfficientNetLite0


class Bicubic(nn.Module):
    """Enlargement without learning."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, lr: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch 3 _ _"]:
        return enlarge(lr, self.scale)


class PretrainedStages(nn.Module):
    """The stages of a frozen ImageNet EfficientNet-Lite0 up to a quarter of the size, and a 1x1 convolution that learns.

    Gradients pass through the frozen stages to the images. Later stages do not keep the texture of tiles of 32 x 32.

    Args:
        channels: of the output.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        network = EfficientNetLite0().network  # comes frozen
        self.stages = nn.Sequential(network.conv_stem, network.bn1, network.blocks[:2])
        self.project = nn.Conv2d(24, channels, 1)

    def train(self, mode: bool = True) -> "PretrainedStages":
        """The frozen stages stay in evaluation mode."""
        super().train(mode)
        self.stages.eval()
        return self

    def forward(self, images: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch channels _ _"]:
        return cast(Tensor, self.project(self.stages((images - 0.5) / 0.5)))


def released_loss(criterion: SHISRCLoss, output: SHISRCOutput, hr: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss as the authors' release wires it: features where logits belong, and the other way round.

    The focal loss takes the features for scores of as many classes. The contrastive term reads the logits of one view; no pair in it
    is positive, and every image draws towards the first of the others.
    """
    assert output.hr_features is not None, "this arm has a second view"
    sr = l1_loss(output.sr, hr)
    views = (output.features, output.hr_features)
    classification = torch.stack([focal_loss(view, labels, criterion.gamma) for view in views]).mean()
    directions = normalize(output.logits)
    count = len(directions)
    others = ~torch.eye(count, dtype=torch.bool, device=directions.device)
    similarity = (directions @ directions.T)[others].view(count, count - 1) / criterion.temperature
    contrastive = cross_entropy(similarity, torch.zeros_like(labels))
    loss = criterion.w_sr * sr + criterion.w_cls * classification + criterion.w_con * contrastive
    return {"loss": loss, "sr": sr, "classification": classification, "contrastive": contrastive}
