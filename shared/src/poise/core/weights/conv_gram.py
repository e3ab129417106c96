r"""The residual of a convolution's Gram matrix, :math:`\|\mathrm{conv}(K, K, P, S) - I_{r0}\|_F^2`, in the fewest multiplications.

Two ways give the same number. In space, a product of overlapping taps for every shift at which taps meet; opposite shifts give
transposed matrices, so that half of them are enough. At frequencies, the theorem on the Frobenius norm read from right to left: the
residual of the layer on the smallest circle on which kernels do not meet themselves, divided by its size, where the layer
falls into one matrix per frequency. Large kernels are faster there, strided ones in space.

>>> import torch
>>> weight = torch.eye(3).view(3, 3, 1, 1)
>>> gram_residual(weight, ConvGeometry.of(weight)).item()
0.0
"""

import math
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.functional import orthonormality
from poise.core.functional._numerics import full_precision
from poise.core.weights.conv_geometry import ConvGeometry
from poise.core.weights.conv_spectrum import angles, transform


def gram_residual(weight: Float[Tensor, "out ins *kernel"], geometry: ConvGeometry) -> Float[Tensor, ""]:
    r"""Squared residual per place of the Gram matrix of the rows, or of the columns in reach if they are fewer; over all groups.

    Args:
        weight: a kernel as PyTorch keeps it, float32 or float64.
        geometry: its sizes.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, definition of L_orth and the theorem on its Frobenius norm.
    """
    transposed = geometry.out_channels > geometry.reached
    if transposed:
        kernel, lattice = geometry.polyphase(weight).transpose(1, 2), (1,) * len(geometry.kernel_size)
    else:
        kernel = weight.reshape(-1, geometry.out_channels, geometry.in_channels, *geometry.kernel_size)
        lattice = geometry.lattice
    taps = kernel.shape[3:]
    if all(k <= s for k, s in zip(taps, lattice, strict=True)):  # no taps meet but at zero shift
        return orthonormality(kernel.flatten(2), along="rows", squared=True).sum()
    if _products_in_space(taps, lattice) <= _products_at_frequencies(taps, lattice):
        return _residual_in_space(kernel, lattice)
    return _residual_at_frequencies(kernel if transposed else geometry.polyphase(weight))


def _products_in_space(taps: tuple[int, ...], lattice: tuple[int, ...]) -> float:
    """Products of taps: all that overlap, and half of them but those at zero shift."""
    overlaps = [sum(k - abs(d) for d in _multiples(k, s)) for k, s in zip(taps, lattice, strict=True)]
    return (math.prod(overlaps) + math.prod(taps)) / 2


def _products_at_frequencies(taps: tuple[int, ...], lattice: tuple[int, ...]) -> float:
    """Three real products for each phase at half of the frequencies."""
    phases = math.prod(min(k, s) for k, s in zip(taps, lattice, strict=True))
    circle = math.prod(2 * -(-k // s) - 1 for k, s in zip(taps, lattice, strict=True))
    return 3 * phases * (circle + 1) / 2


def _multiples(taps: int, step: int) -> range:
    """The shifts at which two kernels overlap."""
    most = (taps - 1) // step * step
    return range(-most, most + 1, step)


def _overlap(taps: tuple[int, ...], shift: tuple[int, ...]) -> tuple[slice, ...]:
    """The taps that meet others when the kernel is shifted."""
    axes = (slice(max(0, d), k + min(0, d)) for d, k in zip(shift, taps, strict=True))
    return (slice(None), slice(None), slice(None), *axes)


def _residual_in_space(
    kernel: Float[Tensor, "groups rows columns *taps"], lattice: tuple[int, ...]
) -> Float[Tensor, ""]:
    taps = kernel.shape[3:]
    shifts = list(product(*(_multiples(k, s) for k, s in zip(taps, lattice, strict=True))))
    half = shifts[len(shifts) // 2 :]  # from zero shift on
    eye = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device)
    squares = []
    with full_precision(kernel):
        for shift in half:
            here, there = (kernel[_overlap(taps, one)].flatten(2) for one in (shift, tuple(-d for d in shift)))
            gram = here @ there.mT
            squares.append(2 * _square(gram) if any(shift) else _square(gram - eye))
    return torch.stack(squares).sum()


def _residual_at_frequencies(kernel: Float[Tensor, "groups rows columns *taps"]) -> Float[Tensor, ""]:
    r""":math:`\sum_g \frac{1}{n} \sum_f \|\hat K_f \hat K_f^* - I\|_F^2` over the n frequencies of the smallest circle on which the
    theorem holds, :math:`n = \prod_i (2 t_i - 1)` for t taps; the kernel is one of stride 1."""
    taps = kernel.shape[3:]
    circle = [2 * size - 1 for size in taps]
    frequencies = [
        torch.arange(1 - size, size, dtype=kernel.dtype, device=kernel.device) / n
        for size, n in zip(taps, circle, strict=True)
    ]
    # From the lowest to the highest: at the opposite of a frequency a real kernel has the conjugate matrix, so that the first half
    # of them is enough. The last of that half is frequency 0.
    half = angles(frequencies, taps)[: (math.prod(circle) + 1) // 2]
    with full_precision(kernel):
        parts = transform(kernel, half).flatten(0, 1)
        real, imaginary = parts.unbind(-2)
        both = parts.flatten(-2)
        gram = both @ both.mT - torch.eye(both.shape[-2], dtype=both.dtype, device=both.device)
        cross = imaginary @ real.mT
        cross = cross - cross.mT
        square = 2 * (_square(gram) + _square(cross)) - _square(gram[-len(kernel) :])  # frequency 0 is its own opposite
    return square / math.prod(circle)


def _square(x: Tensor) -> Tensor:
    """The sum of squares, as a product that keeps no squares for the backward pass."""
    flat = x.flatten()
    return flat.dot(flat)
