r"""The orthonormal regularizer of SORSA: its value, its gradient in closed form, and the two ways to apply it.

.. math:: R = \frac1M \sum_{i=1}^{M} \| A_i A_i^\top - I \|_F, \qquad
          \nabla_{A_i} R = \frac{2}{M} \frac{(A_i A_i^\top - I) A_i}{\| A_i A_i^\top - I \|_F}

>>> import torch
>>> rotation = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).Q
>>> orthonormal_penalty(rotation, "cols").item(), round(orthonormal_penalty(2 * rotation, "cols").item(), 3)
(0.0, 5.196)
"""

from collections.abc import Iterator
from typing import Literal, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.adapters.sorsa import SorsaDelta
from poise.core.functional._numerics import safe_ratio
from poise.core.functional.spectral import orthonormality
from poise.core.penalty import Penalty
from poise.core.schedule import Schedule

Mode = Literal["loss", "decoupled"]


class SingularFactors(Protocol):
    """A module with trained singular triplets that is not a :class:`~poise.core.SorsaDelta`, such as the layer for peft."""

    def singular_factors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """U, S and V of every adapter."""


def orthonormal_penalty(
    matrix: Float[Tensor, "*batch rows columns"], dim: Literal["rows", "cols"] | str, squared: bool = False
) -> Float[Tensor, "*batch"]:
    r"""The distance of the rows or the columns from being orthonormal, :math:`\|A A^\top - I\|_F`.

    At orthonormality the gradient of the plain norm has unit length in the direction of rounding noise; here both are exactly zero
    where the residual is rounding noise.

    Args:
        matrix: one matrix, or a batch of one shape.
        dim: which vectors; ``"rows"`` of :math:`V_p^\top`, ``"cols"`` of :math:`U_p`.
        squared: give the squared norm, which is smooth.

    Raises:
        ValueError: ``dim`` is unknown, or ``matrix`` has fewer than two dimensions.
        TypeError: ``matrix`` is not of a floating-point type.

    Source:
        Cao 2024, section 4; the norm is not squared in the released code.
    """
    if dim not in ("rows", "cols"):
        raise ValueError(f"dim must be 'rows' or 'cols', got {dim!r}")
    return orthonormality(matrix, along="rows" if dim == "rows" else "columns", squared=squared)


def sorsa_penalty(model: nn.Module, squared: bool = False) -> Float[Tensor, ""]:
    """The mean over all trained U and V of their distance from orthonormal; depth does not change its size.

    Args:
        model: a model with SORSA layers, of :func:`~poise.core.apply_sorsa` or of peft.
        squared: of the squared distances.

    Raises:
        ValueError: the model has no SORSA layers.

    Source:
        Cao 2024, section 4; the mean over matrices is that of the released code.
    """
    groups = list(_stacks(model))
    # One batched product for all matrices of a shape.
    terms = [
        orthonormal_penalty(torch.stack([_rows(*factor) for factor in group]), "rows", squared) for group in groups
    ]
    return torch.cat(terms).sum() / sum(map(len, groups))


class SorsaRegularizer(Penalty):
    r"""The penalty in a training loop, called without arguments. Two ways to apply the step :math:`\gamma \nabla R`:

    - ``mode="loss"``, as released: :math:`\frac{\gamma}{\eta_0} R` is added to the loss, so that plain gradient descent at the peak
      learning rate :math:`\eta_0` makes the step. It follows a learning rate schedule, and Adam rescales it with the rest.
    - ``mode="decoupled"``, as written in the paper: :meth:`step`, called after ``optimizer.step()``, subtracts
      :math:`\gamma \nabla R` itself, whatever the optimizer does; calling the regularizer gives zero.

    The same loop serves both: ``loss + regularizer()``, ``optimizer.step()``, ``regularizer.step()``. With gradient accumulation add it
    to the loss of one micro-batch only, as it is (not divided by their number): the penalty counts once per optimizer step.

    Args:
        model: a model with SORSA layers; it is not part of this module's state.
        gamma: :math:`\gamma`, the size of the regularizer's own step, or a schedule of it; 4e-4 in the paper.
        mode: ``"loss"`` or ``"decoupled"``.
        lr: :math:`\eta_0`, the highest learning rate; required in the mode ``"loss"``, and only there.
        squared: of the squared distances.

    Attributes:
        value: in the mode ``"loss"``, R over the learning rate at the last call.

    Raises:
        ValueError: the model has no SORSA layers, the mode is unknown, or ``lr`` is missing, not positive, or given without use.
        TypeError: gamma is neither a number nor a schedule.

    Source:
        Cao 2024, section 4, the update rule.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float | Schedule,
        mode: Mode | str = "loss",
        lr: float | None = None,
        squared: bool = False,
    ) -> None:
        super().__init__(gamma)
        if mode not in ("loss", "decoupled"):
            raise ValueError(f"mode must be 'loss' or 'decoupled', got {mode!r}")
        if mode == "loss" and not (lr is not None and lr > 0):
            raise ValueError(f"the mode 'loss' needs a positive lr, the highest learning rate, got {lr}")
        if mode == "decoupled" and lr is not None:
            raise ValueError("the mode 'decoupled' does not use lr: leave it out")
        list(_stacks(model))  # says if there is nothing to regularize
        self._model = (model,)  # in a tuple, so that it is not part of this module
        self.mode, self.lr, self.squared = mode, lr, squared

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model[0]

    def penalty(self) -> Tensor:
        """R over the learning rate, or zero in the mode ``"decoupled"``."""
        if self.lr is None:
            first = next(_stacks(self.model))[0][0]
            return first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))
        return sorsa_penalty(self.model, self.squared) / self.lr

    def step(self) -> None:
        """In the mode ``"decoupled"`` take the regularizer's step; in both advance the schedule. Call it after ``optimizer.step()``."""
        if self.mode == "decoupled" and self.weight > 0:
            descend_(self.model, self.weight, self.squared)
        super().step()


@torch.no_grad()
def descend_(model: nn.Module, gamma: float, squared: bool = False) -> None:
    r"""Subtract :math:`\gamma \nabla R` from every U and V, in place, by the closed form of the gradient.

    Args:
        model: a model with SORSA layers.
        gamma: size of the step.
        squared: of the squared distances.
    """
    groups = list(_stacks(model))
    count = sum(map(len, groups))
    for group in groups:
        rows = torch.stack([_rows(*factor) for factor in group])
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        residual = wide @ wide.mT
        residual.diagonal(dim1=-2, dim2=-1).sub_(1)
        if not squared:
            norms = orthonormality(wide, along="rows").view(-1, 1, 1)
            residual = torch.where(norms > 0, 0.5 * safe_ratio(residual, norms), 0.0)
        updates = (residual @ wide).mul_(4 * gamma / count).to(rows.dtype)
        for (factor, side), update in zip(group, updates, strict=True):
            factor.sub_(update if side == "rows" else update.mT)


def _rows(factor: Tensor, side: str) -> Tensor:
    return factor if side == "rows" else factor.mT


def _stacks(model: nn.Module) -> Iterator[list[tuple[Tensor, str]]]:
    """All U and V, in groups of one shape as rows, with the side on which their vectors are."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[tuple[Tensor, str]]] = {}
    for factor, side in _factors(model):
        shape = _rows(factor, side).shape
        groups.setdefault((shape, factor.dtype, factor.device), []).append((factor, side))
    if not groups:
        raise ValueError("the model has no SORSA layers: call apply_sorsa first")
    yield from groups.values()


def _factors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    for module in model.modules():
        triplets: list[tuple[Tensor, Tensor, Tensor]] = []
        if isinstance(module, SorsaDelta):
            triplets = [(module.u, module.s, module.v)]
        elif hasattr(type(module), "singular_factors"):  # isinstance with a protocol is slow for models of many modules
            triplets = cast(SingularFactors, module).singular_factors()
        for u, _, v in triplets:
            yield u, "cols"
            yield v, "rows"
