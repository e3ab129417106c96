"""One network at several sizes of the image, its logits brought back to the image.

>>> import torch
>>> model = torch.nn.Conv2d(1, 3, 3, padding=1)
>>> image = torch.randn(2, 1, 20, 30)
>>> [tuple(logits.shape) for logits in multiscale_forward(model, image)]
[(2, 3, 20, 30), (2, 3, 20, 30), (2, 3, 20, 30)]
>>> torch.equal(multiscale_forward(model, image, scales=(1.0,))[0], model(image))
True
>>> probabilities = multiscale_probabilities(model, image, flip=True)
>>> bool((probabilities.sum(1) - 1).abs().max() < 1e-5)
True
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Network = Callable[[Tensor], Tensor]

SCALES = (0.7, 1.0, 1.5)
"""Sizes of the image in training."""

EVALUATION_SCALES = (0.75, 1.0, 1.5)
"""Sizes that predictions for PASCAL VOC are averaged over."""

_MODES = {4: "bilinear", 5: "trilinear"}


def multiscale_forward(
    model: Network, x: Float[Tensor, "..."], scales: Sequence[float] = SCALES, divisor: int = 1
) -> list[Float[Tensor, "..."]]:
    """Logits of the image at every scale, each resized to the image; linear, corners aligned.

    The side of a scaled image is the whole part of ``scale * side``. Networks that halve the image a number of times, such as
    ``monai.networks.nets.UNet``, may need sides that ``divisor`` divides: they are then rounded to the next multiple.
    Costs 0.49 + 1 + 2.25 = 3.7 forward passes of a picture, 0.34 + 1 + 3.4 = 4.7 of a volume.

    Args:
        model: any network from (B, channels, *S) to logits (B, C, *S'), 2-D or 3-D.
        x: images (B, channels, H, W) or volumes (B, channels, D, H, W).
        scales: sizes; 1 takes the image as it is.
        divisor: of the sides of scaled images.

    Returns:
        For each scale logits (B, C, *S).

    Raises:
        ValueError: ``x`` is neither 2-D nor 3-D or is empty, there is no scale or one that is not positive, or ``divisor`` is
            below 1.

    Source:
        Liu et al. 2022, section 3 (multiscale consistency).
    """
    if x.ndim not in _MODES or 0 in x.shape:
        raise ValueError(
            "x must be (batch, channels, height, width) or (batch, channels, depth, height, width), none of them 0, "
            f"got {tuple(x.shape)}"
        )
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive numbers, at least one, got {tuple(scales)}")
    if divisor < 1:
        raise ValueError(f"divisor must be at least 1, got {divisor}")
    size = x.shape[2:]
    return [_resize(model(_resize(x, _scaled(size, scale, divisor))), size) for scale in scales]


@torch.no_grad()
def multiscale_probabilities(
    model: Network,
    x: Float[Tensor, "..."],
    scales: Sequence[float] = EVALUATION_SCALES,
    flip: bool = False,
    temperature: float = 1.0,
    divisor: int = 1,
) -> Float[Tensor, "..."]:
    """Softmax of the mean logits over scales, and over mirror images; of a module in evaluation mode.

    Args:
        model: as for :func:`multiscale_forward`; a module is put back into the mode it was in.
        x: images (B, channels, *S).
        scales: sizes of the image.
        flip: average over left and right too.
        temperature: the mean logits are divided by it; 3 for PASCAL VOC.
        divisor: of the sides of scaled images.

    Returns:
        Probabilities (B, C, *S) without gradient.

    Raises:
        ValueError: as :func:`multiscale_forward`; or ``temperature`` is not positive.

    Source:
        The authors' code for PASCAL VOC.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with _evaluating(model):
        logits = torch.stack(multiscale_forward(model, x, scales, divisor)).mean(0)
        if flip:
            mirrored = torch.stack(multiscale_forward(model, x.flip(-1), scales, divisor)).mean(0)
            logits = (logits + mirrored.flip(-1)) / 2
    return (logits / temperature).softmax(1)


def _scaled(size: Sequence[int], scale: float, divisor: int) -> tuple[int, ...]:
    if scale == 1:
        return tuple(size)
    # 0.7 * 10 is 6.999... in floating point
    sides = [int(scale * side + 1e-6) for side in size]
    return tuple(max(divisor, round(side / divisor) * divisor) if divisor > 1 else max(side, 1) for side in sides)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode=_MODES[x.ndim], align_corners=True)


def _evaluating(model: Network) -> AbstractContextManager[object]:
    return _EvaluationMode(model) if isinstance(model, nn.Module) else nullcontext()


class _EvaluationMode:
    """Puts every part of a module into evaluation mode, and back into the mode that it was in."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training
