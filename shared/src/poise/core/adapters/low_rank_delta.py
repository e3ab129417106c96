r"""Deltas of low rank, on Linear layers and convolutions.

.. math:: \Delta = U \, \mathrm{diag}(g) \, V, \qquad U \in R^{m \times r}, \quad g \in R^r, \quad V \in R^{r \times n}

The product is never formed in the forward pass. The kernels of a convolution are flattened to a matrix; V is then a convolution with
r output channels and the geometry of the layer, and U one with kernels of size 1. In a grouped convolution all groups share V.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.delta import Delta
from poise.core.adapters.targets import layer_kind, weight_matrix


class Factors(NamedTuple):
    """``up`` (outputs, rank), ``gain`` (one number, or one per rank), ``down`` (rank, inputs): a delta is up diag(gain) down."""

    up: Float[Tensor, "outputs rank"]
    gain: Float[Tensor, "rank"] | float
    down: Float[Tensor, "rank inputs"]

    def product(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return (self.up.to(wide) * self.gain) @ self.down.to(wide)


class LowRankDelta(Delta):
    """Base of the deltas of low rank. A subclass makes its parameters and writes :meth:`factors`.

    Args:
        layer: the layer to adapt.
        rank: r, from 1 to the smaller side of the weight as a matrix.
        scale: of the product.
        dropout: probability that an entry of the adapter's input is dropped in training.
        rows: start and stop of the outputs that are adapted, as of the query in a fused projection; all by default.

    Attributes:
        taken_up: for :meth:`taken`, frozen; None if nothing is taken.
        taken_down: likewise.

    Raises:
        TypeError: not a layer that can be adapted, or its weight is not of a floating-point type.
        ValueError: the rank, the dropout or the rows are out of range.
    """

    taken_up: nn.Parameter | None
    taken_down: nn.Parameter | None

    def __init__(
        self, layer: nn.Module, rank: int, scale: float = 1.0, dropout: float = 0.0, rows: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        matrix = weight_matrix(layer)
        if not matrix.is_floating_point():
            raise TypeError(f"weight must be floating-point, got {matrix.dtype}")
        outputs, inputs = matrix.shape
        start, stop = rows or (0, outputs)
        if not 0 <= start < stop <= outputs:
            raise ValueError(f"rows must be start and stop within 0..{outputs}, got {rows}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(stop - start, inputs):
            raise ValueError(
                f"r must lie in 1..{min(stop - start, inputs)} for a weight of {stop - start} x {inputs}, got {rank}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if rows is not None and layer_kind(layer) == "conv2d":
            raise ValueError("rows of a convolution cannot be chosen: adapt the whole layer")
        self.rank, self.scale, self.dropout, self.rows = rank, scale, dropout, rows
        self.outputs, self.taken_scale = outputs, 1.0
        self.register_parameter("taken_up", None)
        self.register_parameter("taken_down", None)

    def factors(self) -> Factors:
        """The factors of the change, of the chosen rows only."""
        raise NotImplementedError(f"{type(self).__name__} must define factors()")

    @property
    def takes(self) -> bool:
        """See :attr:`Delta.takes`."""
        return self.taken_up is not None

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """See :meth:`Delta.forward`."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self._add(x, y, layer, self.factors())

    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """See :meth:`Delta.matrix`."""
        return self._all_rows(self.factors().product().mT).mT

    def taken(self) -> Float[Tensor, "outputs inputs"]:
        """See :meth:`Delta.taken`."""
        return self._all_rows(self._taken().product().mT).mT

    def give_back(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """See :meth:`Delta.give_back`."""
        return self._add(x, y, layer, self._taken())

    @torch.no_grad()
    def misfit(self, pretrained: Float[Tensor, "outputs inputs"]) -> float:
        """See :meth:`Delta.misfit`.

        It is the relative distance of what was taken, over its scale, from the projection of the weight on its row space.
        """
        if self.taken_up is None or self.taken_down is None:
            return 0.0
        rows = pretrained if self.rows is None else pretrained[slice(*self.rows)]
        wide = rows.dtype
        basis = torch.linalg.qr(self.taken_down.to(wide).mT).Q
        taken = self.taken_up.to(wide) @ (self.taken_down.to(wide) @ basis) / self.taken_scale
        return float((rows @ basis - taken).norm() / taken.norm())

    def settings(self) -> dict[str, Any]:
        """See :meth:`Delta.settings`."""
        rows = None if self.rows is None else list(self.rows)
        return {
            "rank": self.rank,
            "scale": self.scale,
            "dropout": self.dropout,
            "rows": rows,
            "takes": self.taken_scale,
        }

    @classmethod
    def restored(cls, layer: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LowRankDelta":
        """See :meth:`Delta.restored`; nothing is decomposed."""
        rows = settings["rows"]
        delta = cls.blank(layer, settings["rank"], settings["scale"], settings["dropout"], rows and (rows[0], rows[1]))
        matrix = weight_matrix(layer)
        if "taken_up" in tensors and "taken_down" in tensors:
            delta.take(tensors["taken_up"], tensors["taken_down"], settings["takes"])
        expected = {name: tensor.shape for name, tensor in delta.state_dict().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if expected != found:
            faults = [
                f"{key} {tuple(found.get(key, ()))}, expected {tuple(expected.get(key, ()))}"
                for key in expected | found
            ]
            raise ValueError("tensors of other shapes than the layer asks for: " + ", ".join(faults))
        for name, parameter in delta.named_parameters():
            parameter.data = tensors[name].to(matrix.device)
        return delta

    @classmethod
    def blank(
        cls, layer: nn.Module, rank: int, scale: float, dropout: float, rows: tuple[int, int] | None
    ) -> "LowRankDelta":
        """A delta whose parameters have the right shapes and no values yet, and which takes nothing.

        Args:
            layer: the layer.
            rank: r.
            scale: of the product.
            dropout: of the adapter's input.
            rows: start and stop of the outputs.
        """
        raise NotImplementedError(f"{cls.__name__} must define blank() to be loaded")

    def take(self, up: Float[Tensor, "outputs rank"], down: Float[Tensor, "rank inputs"], scale: float = 1.0) -> None:
        """Remember what is taken.

        Args:
            up: left factor, of the chosen rows.
            down: right factor.
            scale: the multiple of the weight's own triplets that is taken.
        """
        self.taken_scale = scale
        self.taken_up = nn.Parameter(up.detach().clone(), requires_grad=False)
        self.taken_down = nn.Parameter(down.detach().clone(), requires_grad=False)

    def change(self) -> Factors:
        """The factors of what has changed since the pretrained weight: twice the rank if a part of it was taken."""
        factors = self.factors()
        up, down = factors.up * factors.gain, factors.down
        if self.takes:
            taken = self._taken()
            up, down = torch.cat((up, -taken.up), 1), torch.cat((down, taken.down))
        return Factors(up, 1.0, down)

    def _taken(self) -> Factors:
        if self.taken_up is None or self.taken_down is None:
            raise RuntimeError("nothing was taken from the weight")
        return Factors(self.taken_up, 1.0, self.taken_down)

    def _all_rows(self, columns: Tensor) -> Tensor:
        """Zeros for the outputs that are not adapted, which are the last axis here."""
        if self.rows is None:
            return columns
        start, stop = self.rows
        return F.pad(columns, (start, self.outputs - stop))

    def _add(self, x: Tensor, y: Tensor, layer: nn.Module, factors: Factors) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return y + _convolve(x.to(factors.down.dtype), layer, factors).to(y.dtype)
        hidden = F.linear(x.to(factors.down.dtype), factors.down)
        if not (isinstance(factors.gain, float) and factors.gain == 1.0):
            hidden = hidden * factors.gain
        return y + self._all_rows(F.linear(hidden, factors.up)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}" + (f", dropout={self.dropout}" if self.dropout else "")


def _convolve(x: Tensor, layer: nn.Conv2d, factors: Factors) -> Tensor:
    padding: str | int | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    down = factors.down.view(-1, layer.in_channels // layer.groups, *layer.kernel_size)
    single = x.dim() == 3
    x = x.unsqueeze(0) if single else x
    batch = len(x)
    groups = x.reshape(batch * layer.groups, -1, *x.shape[-2:])
    hidden = F.conv2d(groups, down, None, layer.stride, cast(str, padding), layer.dilation)
    gain = factors.gain if isinstance(factors.gain, float) else factors.gain.view(-1, 1, 1)
    hidden = (hidden * gain).reshape(batch, -1, *hidden.shape[-2:])
    out = F.conv2d(hidden, factors.up[:, :, None, None], groups=layer.groups)
    return out.squeeze(0) if single else out


def adapter_dtype(layer: nn.Module) -> torch.dtype:
    """float32 for a layer of a half type, its own otherwise.

    Args:
        layer: a layer that can be adapted.
    """
    return torch.promote_types(weight_matrix(layer).dtype, torch.float32)
