r"""Make a convolution (nearly) an isometry: stable gradients, decorrelated features, a Lipschitz bound.

Achour, Malgouyres and Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR 2022
(arXiv 2108.05623), on the regularizer of Wang et al., "Orthogonal Convolutional Neural Networks", CVPR 2020
(arXiv 1911.12207).

.. math:: L_{orth}(K) = \|\mathrm{conv}(K, K, \text{padding } P, \text{stride } S) - I_{r0}\|_F^2 - \max(0, M - C S^2),
   \quad P = \lfloor (k - 1) / S \rfloor S

with :math:`I_{r0}` the identity between output channels at zero shift. It is 0 exactly for orthogonal layers, and for every
size N of the output :math:`\|\mathcal{K}\mathcal{K}^\top - I\|_F^2 = N^2 L_{orth}`, 𝒦 being the layer as a matrix.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2))
>>> orthogonality = OrthogonalRegularizer(model, weight=0.1)
>>> loss = model(torch.randn(4, 3, 16, 16)).square().mean() + orthogonality()
>>> loss.backward()
>>> [layer.regime for layer in orthogonality.report().values()]
['columns', 'rows']
>>> conv_orth_loss(orthogonal_conv_init_(torch.empty(16, 3, 3, 3))).item() < 1e-10
True

The loss is a sum of small Gram matrices: over the frequencies of the smallest circle on which kernels do not meet themselves, or
over the shifts at which taps meet, whichever takes fewer multiplications (:mod:`poise.core.weights.conv_gram`).
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from poise.core.functional import orthonormality
from poise.core.functional._numerics import safe_sqrt, widen
from poise.core.names import match_modules, plain_modules, unwrap
from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.core.weights.conv_geometry import ConvGeometry, Size
from poise.core.weights.conv_gram import gram_residual

Regime = Literal["auto", "rows", "columns"]
Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OrthogonalityWarning(UserWarning):
    """A layer cannot be orthogonal, whatever its weights."""


def conv_orth_loss(
    weight: Tensor,
    stride: Size = 1,
    *,
    regime: Regime = "auto",
    squared: bool = True,
    dilation: Size = 1,
    groups: int = 1,
) -> Float[Tensor, ""]:
    r"""Squared distance of a convolution from orthogonality, per place of its output: :math:`L_{orth}`.

    .. math:: L_{orth} = \|\mathrm{conv}(K, K, P, S) - I_{r0}\|_F^2 - \max(0, M - C S^d)
       = \frac{1}{n^d} \sum_f \|\hat K_f \hat K_f^* - I\|_F^2 - \max(0, M - C S^d)

    with :math:`\hat K_f` the M x C S^d matrix of the layer at frequency f on a circle of :math:`n = 2 P / S + 1` places. Of the
    two Gram matrices, of rows and of columns, the smaller one is formed: their residuals differ by a constant.

    Args:
        weight: kernel ``(M, C / groups, k, ...)`` of a Conv1d, Conv2d or Conv3d. That of a transposed convolution is the kernel
            of its adjoint, which is orthogonal if and only if the layer is.
        stride: S, for all axes or per axis.
        regime: whose orthonormality is measured: of the ``"rows"`` of the layer's matrix or of its ``"columns"``; by default of
            those that can be orthonormal, the rows if M <= C S^d. The form of Wang et al. is ``"rows"``, always.
        squared: give the square. Its root has no gradient at 0 and is not proportional to the layer's residual.
        dilation: for all axes or per axis.
        groups: number of blocks that the layer consists of; their losses add up.

    Returns:
        A number not below 0, for half types in float32.

    Raises:
        TypeError: a kernel that is not floating-point.
        ValueError: sizes that do not fit each other, or an unknown regime.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, definition of L_orth and the theorem on its Frobenius norm (here read from right
        to left); Wang et al., CVPR 2020, eq. 6.
    """
    if regime not in ("auto", "rows", "columns"):
        raise ValueError(f"regime must be 'auto', 'rows' or 'columns', got {regime!r}")
    geometry = ConvGeometry.of(weight, stride, dilation, groups)
    rows, columns, reached = geometry.out_channels, geometry.columns, geometry.reached
    # ||A A^* - I||^2 = ||A^* A - I||^2 + rows - columns; columns that are zero count as they are, each for 1.
    beyond = {"auto": max(0, rows - columns), "rows": 0, "columns": rows - columns}[regime]
    constant = groups * (max(0, rows - reached) - beyond)
    square = gram_residual(widen(weight, "weight"), geometry)
    if constant:
        square = square + constant
    if squared:
        return square
    noise = 8 * torch.finfo(square.dtype).eps * min(rows, reached) * groups
    return safe_sqrt(square, floor=noise**2)


def kernel_orth_loss(weight: Tensor, *, squared: bool = True) -> Float[Tensor, ""]:
    r"""Squared distance of a reshaped kernel from orthonormal rows, or columns if there are fewer of them.

    :math:`\|W W^\top - I\|_F^2` or :math:`\|W^\top W - I\|_F^2` of the kernel as a matrix W with a row per output. For a Linear
    layer and a convolution with k = S = 1 this is :math:`L_{orth}`. For larger kernels it says nothing about the layer: it is
    neither necessary nor sufficient that W be orthogonal; use :func:`conv_orth_loss`.

    Args:
        weight: ``(outputs, ...)``, at least a matrix.
        squared: give the square.

    Raises:
        TypeError: not floating-point.
        ValueError: fewer than two dimensions.

    Source:
        Wang et al., CVPR 2020, section 3.3 (kernel orthogonality).
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    if weight.dim() < 2:
        raise ValueError(f"weight must have shape (outputs, ...), got {tuple(weight.shape)}")
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    return orthonormality(matrix, along="rows" if rows <= columns else "columns", squared=squared)


@torch.no_grad()
def orthogonal_conv_init_(
    weight: Tensor,
    stride: Size = 1,
    *,
    dilation: Size = 1,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a kernel in place so that its layer is orthogonal, :math:`L_{orth} = 0`.

    A random orthogonal matrix of M rows stands in a block of min(k, S) taps per axis, which never meets itself shifted by the
    stride, and zeros elsewhere. With stride 1 that is one tap, in the middle: the delta-orthogonal initialization.

    Args:
        weight: kernel ``(M, C / groups, k, ...)``.
        stride: S, for all axes or per axis.
        dilation: for all axes or per axis.
        groups: number of blocks that the layer consists of, filled independently.
        generator: of the random matrix.

    Returns:
        ``weight``.

    Raises:
        ValueError: as for :func:`conv_orth_loss`, or no layer of these sizes is orthogonal.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, the construction in the proof of existence.
    """
    geometry = ConvGeometry.of(weight, stride, dilation, groups)
    if obstacle := geometry.obstacle():
        raise ValueError(f"no orthogonal convolution: {obstacle}")
    block = [
        slice(start := (k - phase) // 2, start + phase)
        for k, phase in zip(geometry.kernel_size, geometry.phases, strict=True)
    ]
    weight.zero_()
    for part in weight.chunk(groups):
        target = part[(slice(None), slice(None), *block)]
        matrix = torch.empty(target.shape[0], target[0].numel(), dtype=torch.float64, device=weight.device)
        target.copy_(nn.init.orthogonal_(matrix, generator=generator).view_as(target))
    return weight


@dataclass(frozen=True)
class LayerOrthogonality:
    """What is known about a layer.

    Attributes:
        loss: its L_orth.
        regime: which vectors of its matrix are compared, ``"rows"`` or ``"columns"``.
        shape: of its kernel.
        obstacle: why it cannot be orthogonal; None if it can.
        circular: whether its boundaries are the ones that the theory is about, so that loss 0 makes it an isometry.
    """

    loss: float
    regime: Literal["rows", "columns"]
    shape: tuple[int, ...]
    obstacle: str | None
    circular: bool


class OrthogonalRegularizer(Penalty):
    r""":math:`\lambda \sum_l c_l L_{orth}(K_l)` over the convolutions of a model, with :math:`c_l = 1` unless asked for.

    ``orthogonality()`` in the training loop reads the current weights, also those that are parametrized. The layers stay the
    model's own: they are neither parameters nor state of the penalty. A copy of it has layers of its own, unless it is copied
    together with the model.

    Args:
        model: any module, wrapped or not.
        weight: λ, a number or a schedule.
        reduction: ``"sum"`` over layers as in the paper, or their ``"mean"``.
        skip: names or patterns of layers to leave out, see :mod:`poise.core.names`. Wang et al. leave out the RGB stem.
        factors: c by name or pattern, for a weight of their own for some layers; where several match, the last one counts.
        types: which layers are regularized; add ``nn.Linear`` to include dense layers.
        padding_modes: leave out convolutions with other boundaries than these, as PyTorch names them; by default none. Only a
            ``"circular"`` convolution with loss 0 is an isometry; with others it is one up to what happens at the border.
        squared: sum squared distances, as in the paper. Wang et al. sum the distances themselves.

    Raises:
        ValueError: no layer is left, a pattern in ``skip`` matches nothing or one in ``factors`` no layer that is left, a factor
            that is not positive, or an unknown reduction.
        TypeError: ``types`` names something else than convolutions and Linear.

    Warns:
        OrthogonalityWarning: a layer cannot be orthogonal. It is driven as near as possible; leave it out with ``skip``.

    Source:
        Achour, Malgouyres and Mamalet, JMLR 2022, section on the regularization of networks.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float | Schedule = 1.0,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        skip: Iterable[str] = (),
        factors: Mapping[str, float] = MappingProxyType({}),
        types: Iterable[type[nn.Module]] = Convolutions,
        padding_modes: Iterable[str] | None = None,
        squared: bool = True,
    ) -> None:
        super().__init__(weight)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction, self.squared = reduction, squared
        # A plain dict: registered, the layers would be in the penalty's state and follow its to() and requires_grad_().
        self.layers: Mapping[str, nn.Module] = dict(_chosen(model, tuple(skip), tuple(types), padding_modes))
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no layer to regularize: none is left of the types asked for")
        self.factors: Mapping[str, float] = dict.fromkeys(self.layers, 1.0) | _factors(model, self.layers, factors)
        for name, layer in self.layers.items():
            kernel, sizes = _kernel(layer)
            if obstacle := ConvGeometry.of(kernel, **sizes).obstacle():
                warnings.warn(f"{name}: no orthogonal convolution: {obstacle}", OrthogonalityWarning, stacklevel=2)

    def penalty(self) -> Float[Tensor, ""]:
        """The sum or mean over layers."""
        kernels = [(*_kernel(layer), self.factors[name]) for name, layer in self.layers.items()]
        losses = torch.stack(
            [c * conv_orth_loss(kernel, squared=self.squared, **sizes) for kernel, sizes, c in kernels]
        )
        return losses.sum() if self.reduction == "sum" else losses.mean()

    @torch.no_grad()
    def report(self) -> dict[str, LayerOrthogonality]:
        """What is known about each layer, by its name."""
        report = {}
        for name, layer in self.layers.items():
            kernel, sizes = _kernel(layer)
            geometry = ConvGeometry.of(kernel, **sizes)
            report[name] = LayerOrthogonality(
                loss=float(conv_orth_loss(kernel, **sizes)),
                regime=geometry.regime,
                shape=tuple(kernel.shape),
                obstacle=geometry.obstacle(),
                circular=getattr(layer, "padding_mode", "circular") == "circular",
            )
        return report

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}, layers={list(self.layers)}"


def _chosen(
    model: nn.Module,
    skip: tuple[str, ...],
    types: tuple[type[nn.Module], ...],
    padding_modes: Iterable[str] | None,
) -> Iterator[tuple[str, nn.Module]]:
    """The layers to regularize, each once, by plain name."""
    for kind in types:
        if not issubclass(kind, _ConvNd | nn.Linear):
            raise TypeError(f"types must name convolutions or nn.Linear, got {kind.__name__}")
    seen = {unwrap(module) for module in match_modules(model, *skip).values()} if skip else set()
    modes = None if padding_modes is None else frozenset(padding_modes)
    for name, wrapped in plain_modules(model).items():
        module = unwrap(wrapped)
        if not isinstance(module, types) or module in seen:
            continue
        if modes is None or getattr(module, "padding_mode", "circular") in modes:
            seen.add(module)
            yield name, module


def _factors(model: nn.Module, layers: Mapping[str, nn.Module], asked: Mapping[str, float]) -> dict[str, float]:
    """The factors of the layers that a pattern matches."""
    found: dict[str, float] = {}
    for pattern, factor in asked.items():
        matched = match_modules(model, pattern).keys() & layers.keys()
        if not matched:
            raise ValueError(f"factors: {pattern!r} matches none of the regularized layers {list(layers)}")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"factors must be positive, to leave a layer out there is skip; got {factor} for {pattern!r}"
            )
        found |= dict.fromkeys(matched, factor)
    return found


def _kernel(layer: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """The kernel of a layer as a convolution's, and its sizes."""
    if isinstance(layer, nn.Linear):
        return layer.weight.unsqueeze(-1), {}
    assert isinstance(layer, _ConvNd)
    return layer.weight, {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
