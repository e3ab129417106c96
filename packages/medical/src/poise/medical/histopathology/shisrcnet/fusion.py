"""Cross-scale fusion: details of a large feature map and context of a small one, into one vector per image."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from poise.medical.histopathology.shisrcnet.blocks import (
    check_batch,
    global_average,
    pooled_conv_bn_relu,
    weigh_branches,
)


class CSFBlock(nn.Module):
    r"""Fuse a feature map with one of half its size.

    .. math::
        l' = \mathrm{ReLU}(\mathrm{BN}(\mathrm{upconv}(l))), \quad z = g_2(g_1(\mathrm{GAP}(h + l'))), \quad
        w = \mathrm{softmax}(s_1(z), s_2(z)), \quad \mathrm{out} = w_1 \odot h + w_2 \odot l'

    with h the larger map, upconv a transposed 2x2 convolution of stride 2, and g_1 (to ``hidden`` channels), g_2, s_1, s_2 each a 1x1
    convolution with batch normalization and ReLU.

    Args:
        channels: of both maps and of the output.
        hidden: of the vector in between.

    Source:
        Xie et al., MICCAI 2023, CF module.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.squeeze = nn.Sequential(pooled_conv_bn_relu(channels, hidden), pooled_conv_bn_relu(hidden, channels))
        self.scorers = nn.ModuleList(pooled_conv_bn_relu(channels, channels) for _ in range(2))

    def forward(
        self,
        high: Float[Tensor, "batch channels height width"],
        low: Float[Tensor, "batch_low channels_low rows columns"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map, of the size of the larger one.

        Args:
            high: the larger map.
            low: the smaller map. Where twice its size is not that of ``high``, it is resized bilinearly after it was enlarged.

        Raises:
            ValueError: the maps differ in batch or channels, or have no pixels; in training also a batch of one image.
        """
        if high.shape[:2] != low.shape[:2]:
            raise ValueError(
                f"both maps must have the same batch and channels, got {tuple(high.shape)} and {tuple(low.shape)}"
            )
        if not (high.shape[2:].numel() and low.shape[2:].numel()):
            raise ValueError(f"both maps must have pixels, got {tuple(high.shape)} and {tuple(low.shape)}")
        check_batch(self, high)
        up = self.up(low)
        if up.shape[2:] != high.shape[2:]:
            up = interpolate(up, size=high.shape[2:], mode="bilinear")
        z = self.squeeze(global_average(high + up))
        return weigh_branches((high, up), [scorer(z) for scorer in self.scorers])


class CrossScalePyramid(nn.Module):
    r"""One vector from a feature map f at three scales.

    .. math:: f_1, f_2, f_3 = \mathrm{pool}(f), \mathrm{pool}(f_1), \mathrm{pool}(f_2), \quad
        f_2' = \mathrm{CSF}(f_2, f_3), \quad f_1' = \mathrm{CSF}(f_1, f_2'), \quad
        v = [\mathrm{GAP} f_3, \mathrm{GAP} f_2', \mathrm{GAP} f_1']

    with a 3x3 max pooling of stride 2.

    Args:
        channels: of the map.
        hidden: of the fusion.

    Attributes:
        out_features: three times ``channels``.

    Source:
        Xie et al., MICCAI 2023, CF module.
    """

    def __init__(self, channels: int = 128, hidden: int = 32) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.fuse2, self.fuse1 = CSFBlock(channels, hidden), CSFBlock(channels, hidden)
        self.out_features = 3 * channels

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The concatenated means of the three scales, the smallest first.

        Raises:
            ValueError: the map has no channels or no pixels.
        """
        if 0 in features.shape[1:]:
            raise ValueError(f"features must have channels and pixels, got shape {tuple(features.shape)}")
        f1 = self.pool(features)
        f2 = self.pool(f1)
        f3 = self.pool(f2)
        fused2 = self.fuse2(f2, f3)
        fused1 = self.fuse1(f1, fused2)
        return torch.cat([cast(Tensor, global_average(scale)).flatten(1) for scale in (f3, fused2, fused1)], 1)
