r"""The sizes of a convolution, and what they allow: which kind of orthogonality, whether it exists, how close one can get.

A layer with M output and C input channels, a kernel of k taps and stride S per axis, on circular signals of SN values per
axis, is a matrix 𝒦 with M rows and C S^d columns for each of N^d places (d axes). It is orthogonal when its rows are
orthonormal (M <= C S^d), or else its columns.

>>> ConvGeometry(64, 32, (3, 3), stride=(2, 2)).obstacle() is None
True
>>> orthogonal_exists(out_channels=64, in_channels=32, kernel_size=1, stride=2)
False
>>> print(orthogonal_obstacle(out_channels=64, in_channels=32, kernel_size=1, stride=2))
64 orthonormal rows need at least as many input values in reach, but a kernel of (1, 1) with stride (2, 2) reaches 32 x 1 = 32
"""

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Size = int | tuple[int, ...]
Boundary = Literal["circular", "valid", "same"]


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of one group of a convolution; those of the others are equal.

    Attributes:
        out_channels: M, of the group.
        in_channels: C, of the group.
        kernel_size: taps per axis; the axes may differ.
        stride: per axis.
        dilation: per axis.

    Raises:
        ValueError: a size below 1, or not one per axis.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.kernel_size)
        if not self.dilation:
            object.__setattr__(self, "dilation", (1,) * axes)
        for name, sizes in (("stride", self.stride), ("dilation", self.dilation)):
            if len(sizes) != axes:
                raise ValueError(f"{name} must have one entry for each of the {axes} axes, got {sizes}")
        for name in ("out_channels", "in_channels", "kernel_size", "stride", "dilation"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @classmethod
    def of(cls, weight: Tensor, stride: Size = 1, dilation: Size = 1, groups: int = 1) -> "ConvGeometry":
        """The geometry of a kernel ``(M, C / groups, k, ...)`` as PyTorch's convolutions keep it.

        Raises:
            TypeError: the kernel is not floating-point.
            ValueError: it has no axis, or the sizes do not fit it.
        """
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating-point, got {weight.dtype}")
        if weight.dim() < 3:
            raise ValueError(f"weight must have shape (out, in / groups, *kernel), got {tuple(weight.shape)}")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {groups}")
        axes = weight.dim() - 2
        out_channels, in_channels, *kernel_size = weight.shape
        return cls(
            out_channels // groups, in_channels, tuple(kernel_size), per_axis(stride, axes), per_axis(dilation, axes)
        )

    # What the layer is as a matrix

    @property
    def lattice(self) -> tuple[int, ...]:
        """Distance in taps at which two taps can meet; without dilation, the stride.

        Two places of the output are multiples of S apart, two taps of the dilation, so taps meet at multiples of S / gcd(S, dilation).
        """
        return tuple(s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))

    @property
    def spread(self) -> tuple[int, ...]:
        """How many places of the output apart two taps are that meet next, 1 without dilation."""
        return tuple(d // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))

    @property
    def phases(self) -> tuple[int, ...]:
        """How many of the S input values per place and axis the kernel reaches, ``min(k, S)`` without dilation."""
        return tuple(min(k, s) for k, s in zip(self.kernel_size, self.lattice, strict=True))

    @property
    def columns(self) -> int:
        """Input values per place, C S^d."""
        return self.in_channels * math.prod(self.stride)

    @property
    def reached(self) -> int:
        """Those that the kernel reaches, the number of columns that are not zero."""
        return self.in_channels * math.prod(self.phases)

    @property
    def regime(self) -> Literal["rows", "columns"]:
        """Which vectors of the layer's matrix can be orthonormal: the rows if M <= C S^d, else the columns."""
        return "rows" if self.out_channels <= self.columns else "columns"

    # What the sizes allow

    def obstacle(self, padding_mode: Boundary = "circular") -> str | None:
        """Why no layer of these sizes is orthogonal; None if one is. See :func:`orthogonal_exists`."""
        rows, kernel, stride = self.out_channels, self.kernel_size, self.stride
        if padding_mode not in ("circular", "valid", "same"):
            raise ValueError(f"padding_mode must be 'circular', 'valid' or 'same', got {padding_mode!r}")
        if padding_mode == "same":
            if any(s > 1 for s in stride):
                raise ValueError(f"padding_mode 'same' is for stride 1, as in PyTorch, got stride {stride}")
            if any(k > 1 for k in kernel):
                return (
                    f"with zeros around the input only a kernel of {kernel} that is zero outside its centre is orthogonal: "
                    "rows at the border lose taps and must keep norm 1"
                )
        if self.regime == "rows" and rows > self.reached:
            return (
                f"{rows} orthonormal rows need at least as many input values in reach, but a kernel of {kernel} with stride "
                f"{stride} reaches {self.in_channels} x {math.prod(self.phases)} = {self.reached}"
            )
        if self.regime == "columns" and self.reached < self.columns:
            return (
                f"orthonormal columns need a kernel that reaches every input value, but one of {kernel} with stride {stride} "
                f"reaches {self.reached} of {self.columns}"
            )
        tiles = kernel == stride and all(k == 1 or d == 1 for k, d in zip(kernel, self.dilation, strict=True))
        if padding_mode == "valid" and self.regime == "columns" and not tiles:
            return (
                f"without padding, orthonormal columns need windows that tile the input, but a kernel of {kernel} with stride "
                f"{stride} sees the values at the border less often than the others"
            )
        return None

    @property
    def least_loss(self) -> int:
        """The least value of L_orth, 0 where an orthogonal layer exists on circular signals.

        By rank: 𝒦𝒦^T has M rows per place and a rank of at most ``reached``.
        """
        return max(0, self.out_channels - self.reached) - max(0, self.out_channels - self.columns)

    @property
    def least_input(self) -> tuple[int, ...]:
        """Input size from which the theorems hold, 2k - 1 per axis: below, a kernel meets itself around the circle."""
        return tuple(2 * d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    @property
    def alpha(self) -> int:
        """The constant of ``err_s^2 <= alpha L_orth``, the same for all input sizes from :attr:`least_input` on."""
        if self.regime == "rows":
            shifts = [2 * ((k - 1) // s) + 1 for k, s in zip(self.kernel_size, self.lattice, strict=True)]
            return self.out_channels * math.prod(shifts)
        return self.in_channels * math.prod(2 * k - 1 for k in self.kernel_size)

    # The kernel as one of stride 1

    def polyphase(self, weight: Float[Tensor, "out ins *kernel"]) -> Float[Tensor, "groups rows reached *taps"]:
        """The kernel of the same layer with stride 1, whose input channels are the ``reached`` values per place.

        Axis by axis, tap ``t S + r`` becomes tap t of phase r. With dilation the taps lie :attr:`spread` places apart, and
        the phases are shifted against each other, which changes neither the singular values nor L_orth.
        """
        if all(phase == 1 for phase in self.phases):
            return weight.reshape(-1, self.out_channels, self.in_channels, *self.kernel_size)
        axes = len(self.kernel_size)
        blocks = [-(-k // phase) for k, phase in zip(self.kernel_size, self.phases, strict=True)]  # rounded up
        missing = [block * phase - k for block, phase, k in zip(blocks, self.phases, self.kernel_size, strict=True)]
        if any(missing):
            weight = F.pad(weight, [amount for size in reversed(missing) for amount in (0, size)])
        split = [size for block, phase in zip(blocks, self.phases, strict=True) for size in (block, phase)]
        parts = weight.reshape(-1, self.in_channels, *split)
        order = [0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)]  # out, in, phases, taps
        return parts.permute(order).reshape(-1, self.out_channels, self.reached, *blocks)


def orthogonal_exists(
    out_channels: int,
    in_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding_mode: Boundary = "circular",
    *,
    dilation: Size = 1,
) -> bool:
    r"""Whether a convolution of these sizes can be orthogonal.

    On circular signals of at least k values: with M <= C S^d orthonormal rows exist if and only if :math:`M \le C k^d`; with
    M >= C S^d orthonormal columns exist if and only if :math:`S \le k`. For sizes that differ between axes both are
    special cases of counting the input values that the kernel reaches, :math:`C \prod_i \min(k_i, S_i)`.

    ``"valid"`` (no padding): rows as on circular signals, whose rows include them; columns only if the windows tile the input,
    k = S. ``"same"`` (zeros, stride 1): only if k = 1, because a larger kernel must be zero outside its centre and is then one
    of size 1.

    Args:
        out_channels: M; of a grouped convolution, that of one group.
        in_channels: C; of a grouped convolution, that of one group.
        kernel_size: k per axis. A number stands for all axes: two, unless another size says how many.
        stride: S, likewise.
        padding_mode: what surrounds the signal.
        dilation: likewise.

    Raises:
        ValueError: a size below 1, sizes for different numbers of axes, ``"same"`` with a stride, or an unknown boundary.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, theorem on the existence of orthogonal convolutional layers and the propositions
        on the other boundaries; other boundaries with a stride, unequal axes and dilation by the same counting.
    """
    return orthogonal_obstacle(out_channels, in_channels, kernel_size, stride, padding_mode, dilation=dilation) is None


def orthogonal_obstacle(
    out_channels: int,
    in_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding_mode: Boundary = "circular",
    *,
    dilation: Size = 1,
) -> str | None:
    """Why a convolution of these sizes cannot be orthogonal, in one sentence; None if it can.

    Arguments, errors and source are those of :func:`orthogonal_exists`.
    """
    axes = max((len(size) for size in (kernel_size, stride, dilation) if isinstance(size, tuple)), default=2)
    kernel_size, stride, dilation = (per_axis(size, axes) for size in (kernel_size, stride, dilation))
    return ConvGeometry(out_channels, in_channels, kernel_size, stride, dilation).obstacle(padding_mode)


def per_axis(size: Size, axes: int) -> tuple[int, ...]:
    """One size per axis."""
    return (size,) * axes if isinstance(size, int) else tuple(size)
