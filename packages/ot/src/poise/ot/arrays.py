"""NumPy and torch at the door of the functional solvers: POT's users pass what they have and get the same kind back.

NumPy arrays become CPU tensors that share their memory (:func:`as_tensors`), the solver works on tensors only, and results
go back to NumPy (:func:`like`). Bad histograms and costs are reported here, in the words of the caller's arguments.

>>> import numpy as np
>>> a, b, M = np.full(2, 0.5), np.full(3, 1 / 3), np.ones((2, 3))
>>> tensors = as_tensors(a, b, M)
>>> check_histograms(*tensors)
>>> type(like(tensors[2].sum(), M)).__name__
'ndarray'
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import overload

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray
"""What a functional solver takes: a torch tensor, or a NumPy array, and then it answers in NumPy."""


def as_tensors(*arrays: Array) -> list[Tensor]:
    """The arguments as tensors, NumPy arrays without a copy where their layout allows it.

    Args:
        arrays: floating-point tensors or NumPy arrays, all of the same kind, dtype and device.

    Raises:
        TypeError: something is neither, is not floating-point, or kinds or dtypes are mixed.
        ValueError: devices are mixed, or an entry is NaN or infinite.
    """
    tensors = [_as_tensor(array, place) for place, array in enumerate(arrays)]
    kinds = {"torch" if isinstance(array, Tensor) else "numpy" for array in arrays}
    if len(kinds) > 1:
        raise TypeError("expected torch tensors only or NumPy arrays only, got both")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise TypeError(f"expected one dtype, got {_names(tensor.dtype for tensor in tensors)}")
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"expected one device, got {_names(tensor.device for tensor in tensors)}")
    check_finite(*tensors)
    return tensors


@overload
def like(tensor: Tensor, reference: Tensor) -> Tensor: ...
@overload
def like(tensor: Tensor, reference: np.ndarray) -> np.ndarray: ...
def like(tensor: Tensor, reference: Array) -> Array:
    """``tensor`` itself if ``reference`` is a tensor, else the same numbers as a NumPy array."""
    return tensor if isinstance(reference, Tensor) else tensor.detach().cpu().numpy()


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which all solvers compute; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from narrowing matrix products on the tensor's device: costs and plans need all their digits."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def check_finite(*tensors: Tensor) -> None:
    """One pass and one synchronisation over all tensors: a sum is finite only if every term is.

    Raises:
        ValueError: an entry is NaN or infinite; says which argument and how many.
    """
    total = torch.stack([widen(tensor.detach()).sum() for tensor in tensors]).sum()
    if torch.isfinite(total):
        return
    for place, tensor in enumerate(tensors):  # the sum may have overflowed: look at the entries before accusing anyone
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"argument {place + 1} of shape {tuple(tensor.shape)} has {bad} entries that are NaN or infinite"
            )


def check_histograms(a: Tensor, b: Tensor, M: Tensor, *, positive: bool = False) -> None:
    """Check that ``(a, b, M)`` is an optimal transport problem.

    Args:
        a: source masses (n,) or (B, n).
        b: target masses (m,) or (B, m).
        M: cost matrix (n, m) or (B, n, m).
        positive: refuse empty bins too.

    Raises:
        ValueError: shapes do not fit; an entry is NaN or infinite; a mass is negative, or zero if ``positive``; a total is
            zero; or the totals of ``a`` and ``b`` differ by more than the rounding of a sum.
    """
    if M.ndim not in (2, 3):
        raise ValueError(f"M must be (n, m) or (B, n, m), got {tuple(M.shape)}")
    expected = (M.shape[:-1], M.shape[:-2] + M.shape[-1:])
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"a cost M of shape {tuple(M.shape)} needs a of shape {tuple(expected[0])} and b of shape "
            f"{tuple(expected[1])}, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if M.numel() == 0:
        raise ValueError(f"M must not be empty, got shape {tuple(M.shape)}")
    check_finite(a, b, M)
    check_masses(a, b, positive=positive)


def check_masses(a: Tensor, b: Tensor, *, positive: bool = False) -> None:
    """The part of :func:`check_histograms` that concerns the masses alone, whatever they are attached to.

    Raises:
        ValueError: a mass is negative or NaN, or zero if ``positive``; a total is zero; or the totals differ.
    """
    a, b = a.detach(), b.detach()
    for name, mass in (("a", a), ("b", b)):
        least = float(mass.min())
        if not least >= 0 or (positive and least == 0):
            raise ValueError(f"{name} must hold {'positive' if positive else 'non-negative'} masses, got {least:.6g}")
        if float(mass.sum(-1).min()) == 0:
            raise ValueError(f"{name} must have a positive total mass, got 0")
    total_a, total_b = widen(a).sum(-1), widen(b).sum(-1)
    # rounded masses do not add up exactly: 4e-2 in bfloat16, 1e-2 in float16, 2e-5 in float32, which float64 often comes from
    tolerance = max(torch.finfo(dtype).eps for dtype in (a.dtype, b.dtype, torch.float32)) ** (2 / 3)
    worst = int(((total_a - total_b).abs() / total_a).argmax())
    mass_a, mass_b = float(total_a.reshape(-1)[worst]), float(total_b.reshape(-1)[worst])
    if abs(mass_a - mass_b) > tolerance * mass_a:
        raise ValueError(f"a and b must have the same total mass, got {mass_a:.8g} and {mass_b:.8g}")


def _as_tensor(array: Array, place: int) -> Tensor:
    if isinstance(array, np.ndarray):
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"argument {place + 1} must be floating-point, got a NumPy array of {array.dtype}")
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if not isinstance(array, Tensor):
        raise TypeError(f"argument {place + 1} must be a torch tensor or a NumPy array, got {type(array).__name__}")
    if not array.is_floating_point():
        raise TypeError(f"argument {place + 1} must be floating-point, got a tensor of {array.dtype}")
    return array


def _names(things: Iterable[object]) -> str:
    return ", ".join(str(thing).removeprefix("torch.") for thing in things)
