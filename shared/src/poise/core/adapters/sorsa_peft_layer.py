"""The layer that stands for SORSA in models of peft. Imported only when such a model is built, for peft takes seconds to import."""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.svd import truncated_svd
from poise.core.adapters.targets import as_weight, layer_kind, weight_matrix
from poise.core.functional._numerics import widen


class SorsaLoraLinear(LoraLinear):
    r"""A layer of peft whose adapter is :math:`c\, U\, \mathrm{diag}(S)\, V^\top`: ``lora_B``, ``lora_S`` and ``lora_A``.

    Args:
        base_layer: Linear or ``Conv1D``.
        adapter_name: of the first adapter.
        config: peft's.
        r: rank.
        lora_alpha: c is this over r.
        kwargs: what peft gives its layers.
    """

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_S")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: float = 1, **kwargs: Any
    ) -> None:
        conv1d = layer_kind(base_layer) == "conv1d"
        config.fan_in_fan_out = conv1d
        super().__init__(
            base_layer, adapter_name, config, r, cast(int, lora_alpha), is_target_conv_1d_layer=conv1d, **kwargs
        )

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter and take its triplets out of the weight, as peft calls it."""
        if not hasattr(self, "lora_S"):
            self.lora_S = nn.ParameterDict()
            self.taken_up, self.taken_down = nn.ParameterDict(), nn.ParameterDict()
        super().update_layer(adapter_name, r, lora_alpha=cast(int, lora_alpha), config=config, **kwargs)
        base = self.get_base_layer()
        weight = weight_matrix(base)
        if weight.is_meta:
            return
        u, s, vh = truncated_svd(weight, r)
        up, down = self._factors(adapter_name)
        scale = self.scaling[adapter_name]
        with torch.no_grad():
            up.copy_(u)
            down.copy_(vh)
            self.lora_S[adapter_name] = nn.Parameter(s.to(up.dtype))
            self.taken_up[adapter_name] = nn.Parameter(u * (scale * s), requires_grad=False)
            self.taken_down[adapter_name] = nn.Parameter(vh, requires_grad=False)
            parameter = cast(nn.Parameter, base.weight)
            parameter.copy_(widen(parameter, "weight") - as_weight(base, (u * (scale * s)) @ vh))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def singular_factors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """U, S and V of the active adapters, for the regularizer."""
        return [
            (self._factors(name)[0], self.lora_S[name], self._factors(name)[1])
            for name in self.active_adapters
            if name in self.lora_S
        ]

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """U and V."""
        return cast(nn.Linear, self.lora_B[adapter]).weight, cast(nn.Linear, self.lora_A[adapter]).weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's part of the weight."""
        up, down = self._factors(adapter)
        matrix = (widen(up, "weight") * (self.scaling[adapter] * self.lora_S[adapter])) @ widen(down, "weight")
        return as_weight(self.get_base_layer(), matrix).to(up.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output; with the adapters disabled, that of the pretrained layer."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.merged:
            return result
        for name in self.lora_S:
            up, down = self._factors(name)
            if self.disable_adapters or name not in self.active_adapters:
                hidden = F.linear(x.to(self.taken_down[name].dtype), self.taken_down[name])
                result = result + F.linear(hidden, self.taken_up[name]).to(result.dtype)
            else:
                hidden = self.lora_dropout[name](x.to(down.dtype)) @ down.mT * (self.scaling[name] * self.lora_S[name])
                result = result + F.linear(hidden, up).to(result.dtype)
        return result
