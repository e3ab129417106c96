r"""Random shift: every image moves by its own few pixels, edges repeated.

Yarats, Fergus, Lazaric and Pinto, "Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement Learning", ICLR 2022,
arXiv 2107.09645 (DrQ-v2).

Pad an image by p pixels that repeat its edge, and crop it back at an offset :math:`(d_x, d_y) \sim U\{0, \dots, 2p\}^2`. DrQ-v2 does
this by bilinear interpolation at a shifted grid; since shifts are whole pixels, the result is a crop, and here it is read as one. All
channels of an image, the frames of a stack among them, move together.

>>> import torch
>>> image = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
>>> RandomShiftsAug(pad=1)(image, shift=torch.tensor([[2, 1]]))[0, 0].tolist()  # one pixel to the left
[[1, 2, 2], [4, 5, 5], [7, 8, 8]]
"""

from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

Images = Shaped[Tensor, "batch channels height width"]
Shifts = Int64[Tensor, "batch 2"]


class RandomShiftsAug(nn.Module):
    """Shifts each image by up to ``pad`` pixels. Images keep their type: bytes may stay bytes.

    Args:
        pad: greatest shift in each direction.

    Raises:
        ValueError: ``pad`` is negative.

    Source:
        Yarats et al. 2022, section 3.1, image augmentation.
    """

    def __init__(self, pad: int = 4) -> None:
        super().__init__()
        if pad < 0:
            raise ValueError(f"pad must not be negative, got {pad}")
        self.pad = pad

    def forward(
        self,
        images: Shaped[Tensor, "..."],
        shift: Shaped[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Images:
        """The shifted images.

        Args:
            images: (batch, channels, height, width), of any type.
            shift: the offsets :math:`(d_x, d_y)` themselves, (batch, 2), each from 0 to 2 ``pad``; (pad, pad) moves nothing.
            generator: where to draw them otherwise; ``None`` is PyTorch's global CPU generator.

        Raises:
            ValueError: images not of four axes, or offsets of another shape.
        """
        if images.ndim != 4:
            raise ValueError(f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}")
        if shift is None:
            shift = self.draw(len(images), generator).to(images.device, non_blocking=True)
        return shift_images(images, shift, self.pad)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Shifts:
        """Offsets for ``count`` images, uniform over the :math:`(2p + 1)^2` of them."""
        where = "cpu" if generator is None else generator.device
        return torch.randint(2 * self.pad + 1, (count, 2), generator=generator, device=where)

    def extra_repr(self) -> str:
        return f"pad={self.pad}"


def shift_images(images: Images, shift: Shaped[Tensor, "..."], pad: int) -> Images:
    """The crop at ``shift`` of images padded by ``pad``, read in one gather without padding anything.

    Args:
        images: (batch, channels, height, width).
        shift: offsets :math:`(d_x, d_y)`, (batch, 2), from 0 to 2 ``pad``.
        pad: pixels of padding.

    Raises:
        ValueError: offsets of another shape.
    """
    count, channels, height, width = images.shape
    columns, rows = _checked(shift, count).long().unbind(1)
    y = (torch.arange(height, device=images.device) + (rows - pad).unsqueeze(1)).clamp(0, height - 1)
    x = (torch.arange(width, device=images.device) + (columns - pad).unsqueeze(1)).clamp(0, width - 1)
    pixel = (y.unsqueeze(2) * width + x.unsqueeze(1)).view(count, 1, height * width)
    flat = images.reshape(count, channels, height * width)
    return flat.gather(2, pixel.expand(-1, channels, -1)).view(images.shape)


def shift_images_by_grid(images: Tensor, shift: Shaped[Tensor, "..."], pad: int) -> Tensor:
    """The same by bilinear interpolation, as DrQ-v2 has it: up to rounding, and many times slower.

    Kept as the reference that :func:`shift_images` is tested and timed against. Square floating-point images.

    Raises:
        ValueError: images that are not square, or offsets of another shape.
    """
    count, _, height, width = images.shape
    if height != width:
        raise ValueError(f"this form takes square images, got {height} x {width}")
    padded = functional.pad(images, (pad, pad, pad, pad), "replicate")
    size = height + 2 * pad
    options: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, **options)[:height]
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    moved = grid + _checked(shift, count).to(images.dtype).view(count, 1, 1, 2) * (2 / size)
    return functional.grid_sample(padded, moved, padding_mode="zeros", align_corners=False)


def _checked(shift: Tensor, count: int) -> Tensor:
    if tuple(shift.shape) != (count, 2):
        raise ValueError(f"shift must have shape ({count}, 2), got {tuple(shift.shape)}")
    return shift
