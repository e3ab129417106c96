"""What the primitives share: wide accumulation, a square root and a quotient without NaN gradients at zero."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Inexact
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


def singular_values(matrix: Inexact[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch values"]:
    """``torch.linalg.svdvals``, with an error that a caller can name.

    Raises:
        ValueError: the decomposition fails, as it does on entries that are not finite.
    """
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"no singular values of a matrix of shape {tuple(matrix.shape)}: {error}") from error


def safe_sqrt(x: Float[Tensor, "*shape"], floor: float | Tensor = 0.0) -> Float[Tensor, "*shape"]:
    """``sqrt(x)`` where ``x > floor``; where it is not, 0 with a gradient of 0 of every order. NaN stays NaN.

    The square root is taken of 1 where it is not wanted: ``where`` alone would let the infinite slope at 0 through
    as 0 * inf.
    """
    low = x <= floor
    return torch.where(low, 0.0, torch.where(low, 1.0, x).sqrt())


def safe_ratio(numerator: Float[Tensor, "..."], denominator: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``numerator / denominator`` where the denominator is positive; where it is not, 0 with gradient 0. NaN stays NaN."""
    low = denominator <= 0
    return torch.where(low, 0.0, numerator / torch.where(low, 1.0, denominator))
