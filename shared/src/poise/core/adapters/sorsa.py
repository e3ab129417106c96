r"""Fine-tune the leading singular triplets of every weight, and keep the singular vectors orthonormal.

Yang Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
arXiv 2409.00055, 2024.

.. math:: W = W_{res} + c\, U_p\, \mathrm{diag}(S_p)\, V_p^\top, \qquad
          R = \frac1M \sum_{i=1}^{M} \| A_i A_i^\top - I \|_F \quad \text{over all } A_i \in \{U_p^\top, V_p^\top\}

The triplets of the r largest singular values are trained, the residual :math:`W_{res}` is frozen. The output is that of the pretrained
layer at first. The penalty R leaves changes of scale to :math:`S_p`; it changes conditioning, not what can be represented.

>>> import torch
>>> from torch import nn
>>> from poise.core import SorsaRegularizer
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> model = apply_sorsa(model, SorsaConfig(r=2))
>>> regularizer = SorsaRegularizer(model, gamma=4e-4, lr=3e-3)
>>> optimizer = torch.optim.AdamW(sorsa_parameters(model), lr=3e-3, weight_decay=0.0)
>>> loss = model(torch.ones(4, 8)).square().mean() + regularizer()
>>> loss.backward()
>>> optimizer.step()
>>> regularizer.step()
>>> model = merge_sorsa(model)  # plain layers, nothing left to pay for at inference
>>> type(model[0]) is nn.Linear
True
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.attach import attach_adapters
from poise.core.adapters.handle import Adapters, adapted_layers
from poise.core.adapters.lora import check_scale
from poise.core.adapters.low_rank_delta import Factors, LowRankDelta, adapter_dtype
from poise.core.adapters.svd import SVDMethod, Triplets, truncated_svd
from poise.core.adapters.targets import ALL_LINEAR, Patterns, weight_matrix


class SorsaDelta(LowRankDelta):
    r"""The trained triplets :math:`c\, U\, \mathrm{diag}(S)\, V^\top` of one weight.

    Args:
        layer: the layer to adapt.
        rank: r.
        alpha: for a scale :math:`c = \alpha / r`; 1 by default.
        dropout: of the adapter's input.
        svd: ``"exact"``, or ``"randomized"`` for large layers.
        dtype: of the factors; float32 for layers of half types, that of the layer otherwise.
        generator: of the randomized decomposition, on the device of the layer.
        triplets: U, S and V, if they are known already.

    Attributes:
        u: (outputs, rank), the columns orthonormal at first.
        s: (rank,), positive and descending at first.
        v: :math:`V^\top` (rank, inputs), the rows orthonormal at first.
        scale: c.

    Raises:
        ValueError: an argument is out of range.
        TypeError: not a layer that can be adapted.

    Source:
        Cao 2024, section 4; that the decomposition is made in at least float32 is a correction of the released code.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        svd: SVDMethod | str = "exact",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        triplets: Triplets | None = None,
    ) -> None:
        super().__init__(layer, rank, check_scale(alpha, rank), dropout)
        dtype = dtype or adapter_dtype(layer)
        triplets = triplets or truncated_svd(weight_matrix(layer), rank, svd, generator=generator)
        u, s, vh = (part.to(dtype) for part in triplets)
        self.u, self.s, self.v = nn.Parameter(u.contiguous()), nn.Parameter(s), nn.Parameter(vh.contiguous())
        self.take(u * (self.scale * s), vh, self.scale)

    def factors(self) -> Factors:
        """U, c S and V."""
        return Factors(self.u, self.s if self.scale == 1.0 else self.scale * self.s, self.v)

    @classmethod
    def blank(
        cls, layer: nn.Module, rank: int, scale: float, dropout: float, rows: tuple[int, int] | None
    ) -> "SorsaDelta":
        """See :meth:`LowRankDelta.blank`; the triplets of all outputs are trained."""
        if rows is not None:
            raise ValueError(f"SORSA adapts all outputs of a layer, got rows {rows}")
        outputs, inputs = weight_matrix(layer).shape
        triplets = Triplets(torch.zeros(outputs, rank), torch.zeros(rank), torch.zeros(rank, inputs))
        return cls(layer, rank, scale * rank, dropout, triplets=triplets)


class SorsaLinear(AdaptedLayer):
    """A Linear layer (or Conv2d or ``Conv1D``) with SORSA, as :func:`apply_sorsa` makes of the layers of a model.

    >>> layer = SorsaLinear(nn.Linear(8, 4), r=2)
    >>> x = torch.ones(3, 8)
    >>> y = layer(x)
    >>> layer.merge()
    >>> torch.allclose(layer(x), y, atol=1e-6), layer.merged
    (True, True)

    Args:
        base: the layer; it is frozen, and its weight becomes the residual.
        r: rank.
        alpha: for a scale of alpha / r; 1 by default.
        dropout: of the adapter's input.
        svd: ``"exact"`` or ``"randomized"``.
        adapter_dtype: of the factors; float32 for layers of half types, that of the layer otherwise.
        generator: of the randomized decomposition.

    Raises:
        ValueError: an argument is out of range.
        TypeError: not a layer that can be adapted.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        svd: SVDMethod | str = "exact",
        adapter_dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        delta = SorsaDelta(base, r, alpha, dropout, svd=svd, dtype=adapter_dtype, generator=generator)
        base.requires_grad_(False)
        self.add("default", delta)

    @property
    def triplets(self) -> SorsaDelta:
        """The trained factors."""
        return cast(SorsaDelta, self["default"])


@dataclass(frozen=True)
class SorsaConfig:
    """Which layers get which triplets.

    Attributes:
        r: rank; 128 in the paper.
        target_modules: which layers, see :mod:`poise.core.adapters.targets`. The paper takes all projections of attention and MLP.
        exclude_modules: which of them to leave out.
        alpha: the triplets are scaled by alpha / r; by 1 if None, as in the paper.
        dropout: of the adapter's input.
        svd: ``"exact"``, or ``"randomized"`` for large layers.
        adapter_dtype: of the factors; by default float32 for layers of half types and that of the layer otherwise.
        train_base: keep training what was trained.
        train_modules: names or globs of modules that stay trainable, such as a new head.
    """

    r: int = 128
    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns = ()
    alpha: float | None = None
    dropout: float = 0.0
    svd: SVDMethod = "exact"
    adapter_dtype: torch.dtype | None = None
    train_base: bool = False
    train_modules: tuple[str, ...] = ()


def apply_sorsa(
    model: nn.Module, config: SorsaConfig, *, name: str = "default", generator: torch.Generator | None = None
) -> nn.Module:
    """Split the chosen weights into trained triplets and a frozen residual, in place, and freeze the rest of the model.

    Args:
        model: any model.
        config: which layers get which triplets.
        name: of the adapter.
        generator: of the randomized decomposition, on the device of the model.

    Returns:
        The model.

    Raises:
        ValueError: no layer is chosen, a layer is smaller than the rank, or a setting is out of range. The model is unchanged then.
    """

    def build(_: str, layer: nn.Module) -> SorsaDelta:
        return SorsaDelta(
            layer,
            config.r,
            config.alpha,
            config.dropout,
            svd=config.svd,
            dtype=config.adapter_dtype,
            generator=generator,
        )

    attach_adapters(
        model,
        build,
        config.target_modules,
        config.exclude_modules,
        name=name,
        train_base=config.train_base,
        train=config.train_modules,
    )
    return model


def sorsa_deltas(model: nn.Module) -> dict[str, SorsaDelta]:
    """The triplets of all layers by plain name, or by plain name and name of the adapter if that is not ``"default"``.

    Args:
        model: any model, also a single :class:`SorsaLinear`.
    """
    return {
        ".".join(part for part in (key, name if name != "default" else "") if part): delta
        for key, layer in adapted_layers(model).items()
        for name, delta in layer.items()
        if isinstance(delta, SorsaDelta)
    }


def sorsa_parameters(model: nn.Module) -> list[nn.Parameter]:
    """U, S and V of all layers, for the optimizer; without weight decay, which would shrink the weights towards the residual.

    Args:
        model: a model that :func:`apply_sorsa` adapted.

    Raises:
        ValueError: the model has none.
    """
    found = [parameter for delta in sorsa_deltas(model).values() for parameter in (delta.u, delta.s, delta.v)]
    if not found:
        raise ValueError("the model has no SORSA layers: call apply_sorsa first")
    return found


def merge_sorsa(model: nn.Module, name: str = "default") -> nn.Module:
    """Put the triplets into the weights for good and the plain layers in their places.

    Args:
        model: a model that :func:`apply_sorsa` adapted.
        name: of the adapter.

    Returns:
        The model, without adapters.

    Raises:
        ValueError: the model has no such adapter.
    """
    return Adapters(model, name).finish()
