"""What the SHISRCNet experiment puts in the place of a half of the network."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from poise.medical.histopathology.resolution import enlarge
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
