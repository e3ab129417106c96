"""The super-resolution half: the skeleton of SRResNet with multi-features extraction blocks.

>>> import torch
>>> upscale = SRResNetMFE(4, width=8, blocks=1)
>>> upscale(torch.rand(1, 3, 9, 7)).shape
torch.Size([1, 3, 36, 28])
"""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from poise.medical.histopathology.shisrcnet.blocks import MFEBlock

SCALES = (2, 4, 8)
"""Factors of super-resolution."""


class SRResNetMFE(nn.Module):
    """Enlarge an image by learnt detail: features at low resolution, then a pixel shuffle per doubling.

    The output is not clamped to [0, 1]; clamp it before it is stored or judged.

    Args:
        scale: 2, 4 or 8.
        width: channels throughout.
        blocks: number of :class:`MFEBlock`.
        score_norm: of each block; the published 733,120, 880,832 and 1,028,544 parameters (x2, x4, x8) include it.
        bicubic_skip: learn the difference to the bicubic enlargement instead of the image; not in the paper, useful when training is
            short.

    Raises:
        ValueError: an unknown scale, or fewer than one block.

    Source:
        Xie et al., MICCAI 2023, SR module; Ledig et al., CVPR 2017, arXiv 1609.04802, for the skeleton.
    """

    def __init__(
        self, scale: int, width: int = 64, blocks: int = 3, *, score_norm: bool = False, bicubic_skip: bool = False
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {scale}")
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.scale, self.bicubic_skip = scale, bicubic_skip
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            *(MFEBlock(width, score_norm=score_norm) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        doublings = [
            layer
            for _ in range(round(math.log2(scale)))
            for layer in (nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.LeakyReLU(0.1))
        ]
        self.up = nn.Sequential(
            *doublings,
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 3, 3, padding=1, bias=False),
        )

    def features(self, lr: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels height width"]:
        """What is known at low resolution, before it is enlarged."""
        shallow = self.head(lr)
        return shallow + self.body(shallow)

    def forward(self, lr: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        """The image at ``scale`` times its height and width.

        Args:
            lr: low-resolution images, red, green and blue in [0, 1].

        Raises:
            ValueError: there are no images, or they have no pixels.
        """
        if lr.numel() == 0:
            raise ValueError(f"lr must hold images with pixels, got shape {tuple(lr.shape)}")
        sr = self.up(self.features(lr))
        return sr + interpolate(lr, scale_factor=self.scale, mode="bicubic") if self.bicubic_skip else sr
