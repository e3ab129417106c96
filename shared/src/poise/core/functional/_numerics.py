"""What the primitives share: wide accumulation, a square root and a quotient without NaN gradients at zero."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def widen(x: Tensor, name: str) -> Tensor:
    """``x`` in a dtype to accumulate in: float32 for the half types, its own otherwise.

    Raises:
        TypeError: ``x`` is not a real floating-point tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {x.dtype}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from narrowing the matrix products inside: a Gram matrix in bfloat16 cannot tell 1 from 1.003."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def safe_sqrt(x: Float[Tensor, "*shape"], floor: float | Tensor = 0.0) -> Float[Tensor, "*shape"]:
    """``sqrt(x)`` where ``x > floor``; elsewhere 0, with a gradient of 0 of every order.

    The square root is taken of 1 where it is not wanted: ``where`` alone would let the infinite slope at 0 through
    as 0 * inf.
    """
    positive = x > floor
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def safe_ratio(numerator: Float[Tensor, "..."], denominator: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``numerator / denominator`` where the denominator is positive; elsewhere 0, with gradient 0."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)
