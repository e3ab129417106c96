"""The classification half, and how any other network takes its place."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from poise.core.taps import Taps
from poise.medical.histopathology.shisrcnet.blocks import check_batch
from poise.medical.histopathology.shisrcnet.fusion import CrossScalePyramid
from poise.medical.histopathology.shisrcnet.selective_kernel import SKNet26


@runtime_checkable
class Classifier(Protocol):
    """What SHISRCNet trains on super-resolved images: a module that gives ``(features, logits)``, in this order."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], /
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]: ...


class ClassifierCF(nn.Module):
    """Classification with cross-scale fusion: a backbone, its pyramid, and a head of two layers.

    Args:
        num_classes: number of classes.
        backbone: gives a map of ``channels`` channels; by default :class:`SKNet26`, with which there are 615,778 parameters for two
            classes.
        channels: of the backbone's map.
        hidden: of the fusion.
        dropout: of the head.

    Raises:
        ValueError: fewer than one class.

    Source:
        Xie et al., MICCAI 2023, CF module.
    """

    def __init__(
        self,
        num_classes: int = 2,
        backbone: nn.Module | None = None,
        *,
        channels: int = 128,
        hidden: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.backbone = SKNet26() if backbone is None else backbone
        self.pyramid = CrossScalePyramid(channels, hidden)
        self.head = nn.Sequential(
            nn.Linear(self.pyramid.out_features, 256), nn.Dropout(dropout), nn.ReLU(), nn.Linear(256, num_classes)
        )

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features, which the contrastive term compares, and logits.

        Raises:
            ValueError: in training, a batch of one image.
        """
        check_batch(self, images)
        features = self.pyramid(self.backbone(images))
        return features, self.head(features)


class WithFeatures(nn.Module):
    """Any classifier that ends in a linear layer, giving the input of that layer beside the logits.

    >>> import torch
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> features, logits = WithFeatures(network, "3")(torch.rand(4, 3, 2, 2))
    >>> features.shape, logits.shape
    (torch.Size([4, 5]), torch.Size([4, 2]))

    Args:
        network: images to logits, for example of timm or MONAI.
        head: name of its last layer: ``"classifier"`` or ``"fc"`` for many of timm, ``"class_layers.out"`` for DenseNets of MONAI.

    Raises:
        ValueError: there is no module of that name, or several match.
    """

    def __init__(self, network: nn.Module, head: str) -> None:
        super().__init__()
        self.network = network
        names = Taps(network, head).names
        if len(names) != 1:
            raise ValueError(f"head must name one layer, {head!r} matches {names}")
        (self.head,) = names

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits."""
        with Taps(self.network, self.head, at="input") as taps:
            logits = self.network(images)
            return taps[self.head], logits
