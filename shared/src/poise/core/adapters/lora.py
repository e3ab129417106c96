r"""Low-rank adaptation, the baseline of every other adapter: train :math:`\Delta = \frac{\alpha}{r} B A` with the weight frozen.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685; with the start of Meng, Wang and Zhang,
"PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", NeurIPS 2024, arXiv 2404.02948:

.. math:: A = \Sigma_r^{1/2} V_r^\top, \qquad B = U_r \Sigma_r^{1/2}, \qquad W_{base} = W - B A

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> before = model(torch.ones(1, 8))
>>> model = apply_lora(model, LoRAConfig(r=4, target_modules="0", init="pissa"))
>>> torch.allclose(model(torch.ones(1, 8)), before, atol=1e-6)
True
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
96
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from poise.core.adapters.attach import attach_adapters
from poise.core.adapters.low_rank_delta import Factors, LowRankDelta, adapter_dtype
from poise.core.adapters.svd import truncated_svd
from poise.core.adapters.targets import ALL_LINEAR, Patterns, weight_matrix

Init = Literal["standard", "pissa", "pissa_randomized"]


class LoRADelta(LowRankDelta):
    r"""The change :math:`\frac{\alpha}{r} B A` of one weight.

    Args:
        layer: the layer to adapt.
        rank: r.
        alpha: :math:`\alpha`; r by default, for a scale of 1.
        dropout: of the adapter's input.
        init: ``"standard"`` (A Kaiming-uniform with a = sqrt(5), B zero), ``"pissa"``, or ``"pissa_randomized"``, the same by the
            randomized decomposition.
        rows: start and stop of the outputs that are adapted.
        dtype: of A and B; float32 for layers of half types, that of the layer otherwise.
        generator: of the draws, on the device of the layer.

    Attributes:
        a: A (rank, inputs).
        b: B (outputs, rank).
        scale: :math:`\alpha / r`.

    Raises:
        ValueError: an argument is out of range or ``init`` is unknown.
        TypeError: not a layer that can be adapted.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        init: Init | str = "standard",
        rows: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(layer, rank, check_scale(alpha, rank), dropout, rows)
        if init not in ("standard", "pissa", "pissa_randomized"):
            raise ValueError(f"init must be 'standard', 'pissa' or 'pissa_randomized', got {init!r}")
        dtype = dtype or adapter_dtype(layer)
        matrix = weight_matrix(layer).detach()
        matrix = matrix if rows is None else matrix[slice(*rows)]
        outputs, inputs = matrix.shape
        if init == "standard":
            a = torch.empty(rank, inputs, dtype=dtype, device=matrix.device)
            # U(-1/sqrt(n), 1/sqrt(n)), which is Kaiming's with a = sqrt(5)
            nn.init.uniform_(a, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
            b = torch.zeros(outputs, rank, dtype=dtype, device=matrix.device)
        else:
            svd = "exact" if init == "pissa" else "randomized"
            u, s, vh = truncated_svd(matrix, rank, svd, generator=generator)
            root = (s / self.scale).sqrt()
            a, b = (root.unsqueeze(1) * vh).to(dtype), (u * root).to(dtype)
            self.take(self.scale * b, a)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def factors(self) -> Factors:
        """B, the scale, and A."""
        return Factors(self.b, self.scale, self.a)

    @classmethod
    def blank(
        cls, layer: nn.Module, rank: int, scale: float, dropout: float, rows: tuple[int, int] | None
    ) -> "LoRADelta":
        """See :meth:`LowRankDelta.blank`."""
        return cls(layer, rank, scale * rank, dropout, rows=rows)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get which adapter.

    Attributes:
        r: rank.
        alpha: the change is scaled by alpha / r; by 1 if None.
        target_modules: which layers, see :mod:`poise.core.adapters.targets`.
        exclude_modules: which of them to leave out.
        dropout: of the adapter's input.
        init: see :class:`LoRADelta`.
        rows: start and stop of the outputs that are adapted, as of the query in a fused projection.
        adapter_dtype: of the factors; by default float32 for layers of half types and that of the layer otherwise.
        train_base: keep training what was trained.
        train_modules: names or globs of modules that stay trainable, such as a new head.
    """

    r: int = 8
    alpha: float | None = None
    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns = ()
    dropout: float = 0.0
    init: Init = "standard"
    rows: tuple[int, int] | None = None
    adapter_dtype: torch.dtype | None = None
    train_base: bool = False
    train_modules: tuple[str, ...] = ()


def apply_lora(
    model: nn.Module, config: LoRAConfig, *, name: str = "default", generator: torch.Generator | None = None
) -> nn.Module:
    """Give the chosen layers low-rank adapters, in place, and freeze the rest.

    Args:
        model: any model.
        config: which layers get which adapter.
        name: of the adapter; a second one with another name adds up with the first.
        generator: of the draws, on the device of the model.

    Returns:
        The model.

    Raises:
        ValueError: no layer is chosen, or a setting does not fit one.
    """

    def build(_: str, layer: nn.Module) -> LoRADelta:
        return LoRADelta(
            layer,
            config.r,
            config.alpha,
            config.dropout,
            init=config.init,
            rows=config.rows,
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


def check_scale(alpha: float | None, rank: int) -> float:
    """The scale alpha / r, or 1 without alpha.

    Args:
        alpha: positive and finite, or None.
        rank: r.

    Raises:
        ValueError: alpha is not positive.
    """
    if alpha is None:
        return 1.0
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    return alpha / rank
