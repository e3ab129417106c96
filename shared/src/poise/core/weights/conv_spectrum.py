r"""The exact singular values of a convolution, without ever building its matrix.

Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019 (arXiv 1805.10408): on circular signals
the Fourier transform block-diagonalises the layer, so that its singular values are those of one M x C S^d matrix per
frequency, the transform of the kernel's S^d phases there.

>>> import torch
>>> from torch import nn
>>> layer = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular").double()
>>> values = conv_singular_values(layer.weight, input_size=32, stride=2)
>>> values.shape, torch.allclose(values, torch.linalg.svdvals(conv_as_matrix(layer, 32)))
(torch.Size([2048]), True)

The kernel is transformed by a product with the few frequencies and taps, not by the FFT of a zero-padded signal: the
frequencies can then be computed in stretches that fit into memory. For a layer with other boundaries (zeros), the values
are those of its circular counterpart.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from poise.core.functional._numerics import full_precision, singular_values, widen
from poise.core.gpu.chunking import chunked_map
from poise.core.weights.conv_geometry import ConvGeometry, Size, per_axis

_ENTRIES = 2**23  # complex numbers that the matrices at the frequencies computed at a time may have together


def conv_singular_values(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    *,
    dilation: Size = 1,
    groups: int = 1,
) -> Float[Tensor, " values"]:
    r"""All singular values of a convolution on circular signals, in descending order.

    Differentiable. Real kernels have equal spectra at opposite frequencies, so that about half of them are computed.

    Args:
        weight: kernel ``(M, C / groups, k, ...)`` of a Conv1d, Conv2d or Conv3d.
        input_size: values per axis, SN.
        stride: S per axis.
        dilation: per axis.
        groups: number of blocks that the layer consists of.

    Returns:
        ``groups * min(M / groups, C / groups * S^d) * N^d`` values, structural zeros included.

    Raises:
        TypeError: a kernel that is not floating-point.
        ValueError: sizes that do not fit each other, an input that is no multiple of the stride or smaller than the kernel.

    Source:
        Sedghi, Gupta and Long, ICLR 2019, theorem 6; strides by the polyphase split.
    """
    geometry = ConvGeometry.of(weight, stride, dilation, groups)
    places = places_of(geometry, input_size)
    kernel = geometry.polyphase(widen(weight, "weight"))
    *others, last = places
    counts = zip((*others, last // 2 + 1), places, geometry.spread, strict=True)
    frequencies = [spread / place * _up_to(count, kernel) for count, place, spread in counts]
    chunk = max(1, _ENTRIES // math.prod(kernel.shape[:3]))
    with full_precision(kernel):
        values = chunked_map(
            lambda part: singular_values(symbol(kernel, part)), angles(frequencies, kernel.shape[3:]), chunk=chunk
        )
    # The opposites of all but the first and the middle frequency of the last axis were left out.
    values = values.unflatten(0, (-1, last // 2 + 1))
    values = torch.cat((values, values[:, 1 : (last + 1) // 2]), dim=1).flatten()
    structural = groups * min(geometry.out_channels, geometry.columns) * math.prod(places) - len(values)
    return torch.cat((values.sort(descending=True).values, values.new_zeros(structural)))


def orth_residuals(
    weight: Tensor,
    input_size: Size,
    stride: Size = 1,
    *,
    dilation: Size = 1,
    groups: int = 1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""How far a convolution on circular signals is from orthogonal, in the Frobenius and in the spectral norm.

    :math:`\mathrm{err} = \|\mathcal{K}\mathcal{K}^\top - I\|` where the rows can be orthonormal (M <= C S^d), else
    :math:`\|\mathcal{K}^\top\mathcal{K} - I\|`. From SN >= 2k - 1 on, :math:`\mathrm{err}_F^2 = N^d L_{orth}` and
    :math:`\mathrm{err}_s^2 \le \alpha L_{orth}` for every N (:attr:`ConvGeometry.alpha
    <poise.core.weights.conv_geometry.ConvGeometry.alpha>`); and
    :math:`(1 - \mathrm{err}_s) \|x\|^2 \le \|\mathcal{K}x\|^2 \le (1 + \mathrm{err}_s) \|x\|^2` for all x in the columns'
    case, for all x orthogonal to the kernel of the layer in the rows' case.

    Args, raises: those of :func:`conv_singular_values`.

    Returns:
        ``err_F`` and ``err_s``.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, definition of the residuals and the theorems on their scalability.
    """
    squares = conv_singular_values(weight, input_size, stride, dilation=dilation, groups=groups).square()
    return (squares - 1).norm(), (squares - 1).abs().max()


def conv_as_matrix(module: nn.Module, input_size: Size) -> Float[Tensor, "outputs inputs"]:
    """The matrix of a convolution as it is, with its own boundaries and without its bias; for small sizes and tests.

    Column by column: the response of the layer to each unit signal. Memory grows with the fourth power of the size.

    Args:
        module: a Conv1d, Conv2d or Conv3d, or one of the transposed ones.
        input_size: values per axis.

    Raises:
        TypeError: ``module`` is not a convolution.
        ValueError: a size is not positive.
    """
    if not isinstance(module, _ConvNd):
        raise TypeError(f"module must be a convolution, got {type(module).__name__}")
    size = per_axis(input_size, module.weight.dim() - 2)
    if min(size) < 1:
        raise ValueError(f"input_size must be positive, got {input_size}")
    count = module.in_channels * math.prod(size)
    units = torch.eye(count, dtype=module.weight.dtype, device=module.weight.device)
    signals = units.view(count, module.in_channels, *size)
    return (module(signals) - module(torch.zeros_like(signals[:1]))).flatten(1).T


def symbol(
    kernel: Float[Tensor, "groups rows columns *taps"], angle: Float[Tensor, "frequencies all_taps"]
) -> Complex[Tensor, "frequencies groups rows columns"]:
    r"""The layer's matrix at each frequency, :math:`\sum_t K_t\, e^{-2 \pi i \langle f, t \rangle}`.

    Args:
        kernel: of stride 1, as :meth:`ConvGeometry.polyphase
            <poise.core.weights.conv_geometry.ConvGeometry.polyphase>` gives it.
        angle: of :func:`angles`.
    """
    real, imaginary = transform(kernel, angle).unbind(-2)
    return torch.complex(real, -imaginary)


def transform(
    kernel: Float[Tensor, "groups rows columns *taps"], angle: Float[Tensor, "frequencies all_taps"]
) -> Float[Tensor, "frequencies groups rows 2 columns"]:
    """Real part and negative imaginary part of :func:`symbol`, side by side.

    In this order of the factors the product needs no copy of the kernel, and gives ``(rows, 2 columns)`` matrices whose rows are
    contiguous. To be called out of reach of autocast.
    """
    waves = torch.stack((angle.cos(), angle.sin()), dim=1)
    parts = waves.flatten(0, 1) @ kernel.flatten(3).mT
    return parts.unflatten(2, waves.shape[:2]).permute(2, 0, 1, 3, 4)


def angles(frequencies: Sequence[Float[Tensor, "_"]], taps: Sequence[int]) -> Float[Tensor, "frequencies all_taps"]:
    r"""The angle :math:`2 \pi \langle f, t \rangle` of each frequency at each tap.

    Args:
        frequencies: per axis, in cycles per tap; all combinations are taken, the last axis fastest.
        taps: number of taps per axis.
    """

    def both(before: Tensor, axis: Tensor) -> Tensor:
        return (before[:, None, :, None] + axis[None, :, None, :]).flatten(2).flatten(0, 1)

    return reduce(
        both, [2 * torch.pi * torch.outer(f, _up_to(size, f)) for f, size in zip(frequencies, taps, strict=True)]
    )


def _up_to(count: int, like: Tensor) -> Float[Tensor, "count"]:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def places_of(geometry: ConvGeometry, input_size: Size) -> tuple[int, ...]:
    """Output places N per axis.

    Raises:
        ValueError: the input is not a multiple of the stride, or smaller than the kernel.
    """
    sizes = per_axis(input_size, len(geometry.kernel_size))
    if len(sizes) != len(geometry.kernel_size):
        raise ValueError(
            f"input_size must have one entry for each of the {len(geometry.kernel_size)} axes, got {sizes}"
        )
    for size, k, s, d in zip(sizes, geometry.kernel_size, geometry.stride, geometry.dilation, strict=True):
        if size % s:
            raise ValueError(f"input_size must be a multiple of the stride {geometry.stride}, got {sizes}")
        if size < d * (k - 1) + 1:
            raise ValueError(f"input_size must not be below the kernel's extent, {d * (k - 1) + 1} here, got {sizes}")
    return tuple(size // s for size, s in zip(sizes, geometry.stride, strict=True))
