r"""Read and write the LoRA checkpoints of Hugging Face peft: ``adapter_model.safetensors`` and ``adapter_config.json``.

peft itself is not needed. An adapter that took a part of the pretrained weight (SORSA, PiSSA) is written as the LoRA of twice the rank
that changes the *pretrained* weight as it does, so that anything that reads LoRA can use it.

>>> import tempfile
>>> import torch
>>> from torch import nn
>>> from poise.core import SorsaConfig, apply_sorsa
>>> model = apply_sorsa(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SorsaConfig(r=2, target_modules="1"))
>>> folder = tempfile.mkdtemp()
>>> save_peft_lora(model, folder)
>>> adapters = load_peft_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), folder)
>>> adapters.deltas["1"].rank
4
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.core.adapters.attach import attach_adapters
from poise.core.adapters.handle import Adapters
from poise.core.adapters.lora import LoRADelta
from poise.core.adapters.low_rank_delta import LowRankDelta
from poise.core.adapters.targets import layer_kind, weight_matrix
from poise.core.names import plain_modules

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

_UNSUPPORTED = {
    "use_dora": "a DoRA adapter changes magnitudes too",
    "modules_to_save": "whole modules are stored with it",
    "lora_bias": "it trains biases",
    "trainable_token_indices": "it trains embeddings",
    "target_parameters": "it adapts bare parameters",
}
"""Settings that must be off, with the reason."""

_RESIDUAL = ("pissa", "pissa_niter_")


def save_peft_lora(
    model: nn.Module, folder: Path | str, name: str = "default", *, base_model: str | None = None
) -> None:
    """Write an adapter of low rank so that ``PeftModel.from_pretrained(pretrained_model, folder)`` loads it.

    Args:
        model: the model.
        folder: is made if it does not exist.
        name: of the adapter.
        base_model: name or path of the pretrained model, for the readers of the checkpoint.

    Raises:
        ValueError: the model has no such adapter, or peft cannot express it: rows of a layer, a grouped convolution.
        TypeError: a delta is not of low rank.
    """
    adapters = Adapters(model, name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropouts = set()
    kinds = set()
    for key, layer in adapters.layers.items():
        delta = layer[name]
        if not isinstance(delta, LowRankDelta):
            raise TypeError(f"{key}: {type(delta).__name__} is not of low rank, so it is no LoRA")
        a, b, alpha = _as_lora(key, delta, layer.base)
        tensors[f"{PREFIX}{key}.lora_A.weight"], tensors[f"{PREFIX}{key}.lora_B.weight"] = a, b
        ranks[key], alphas[key] = len(a), alpha
        dropouts.add(delta.dropout)
        kinds.add(layer_kind(layer.base))
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(key): value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(key): value for key, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": kinds == {"conv1d"},
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path / TENSORS), metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_peft_lora(
    model: nn.Module, folder: Path | str, name: str = "default", *, train_base: bool = False
) -> Adapters:
    """Attach a LoRA that peft saved.

    Args:
        model: the pretrained model.
        folder: of the checkpoint.
        name: for the adapter.
        train_base: keep training what was trained; by default all but adapters is frozen.

    Returns:
        The handle of the adapter.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: it is no plain LoRA, with the reason, or it does not match the model: names every layer that does not.
    """
    path = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"there is no {file} in {path}")
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    _check_config(config)
    pairs = _pairs(load_file(path / TENSORS))
    modules = plain_modules(model)
    faults = [f"{key}: {fault}" for key, pair in pairs.items() if (fault := _fault(modules.get(key), *pair))]
    if faults:
        raise ValueError(f"{path} does not match the model: " + "; ".join(faults))

    def build(key: str, layer: nn.Module) -> LoRADelta:
        a, b = pairs[key]
        rank = len(a)
        alpha = float(_setting(config, "alpha_pattern", key, config.get("lora_alpha", rank)))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        delta = LoRADelta(
            layer,
            rank,
            scale * rank,
            config.get("lora_dropout", 0.0),
            init="pissa" if str(config.get("init_lora_weights")).startswith(_RESIDUAL) else "standard",
            dtype=a.dtype,
        )
        with torch.no_grad():
            delta.a.copy_(a.flatten(1))
            delta.b.copy_(b.flatten(1))
        return delta

    return attach_adapters(model, build, lambda key, _: key in pairs, name=name, train_base=train_base)


def _as_lora(key: str, delta: LowRankDelta, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha in peft's shapes."""
    if delta.rows is not None:
        raise ValueError(f"{key}: peft adapts whole layers, this adapter has rows {delta.rows}")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise ValueError(f"{key}: peft has another form of adapters for grouped convolutions")
    if isinstance(delta, LoRADelta) and not delta.takes:
        a, b, alpha = delta.a.detach(), delta.b.detach(), delta.scale * delta.rank
    else:
        change = delta.change()
        a, b, alpha = change.down.detach(), change.up.detach(), float(len(change.down))
    if isinstance(layer, nn.Conv2d):
        a, b = a.view(len(a), layer.in_channels, *layer.kernel_size), b[:, :, None, None]
    return a.contiguous().cpu(), b.contiguous().cpu(), alpha


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"expected a checkpoint of the type LORA, got {config.get('peft_type')!r}")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise ValueError(f"this checkpoint is no plain LoRA: {reason} ({key})")
    if config.get("bias", "none") != "none":
        raise ValueError(f"this checkpoint is no plain LoRA: it trains biases (bias={config['bias']!r})")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal") and not start.startswith(_RESIDUAL):
        raise ValueError(
            f"init_lora_weights={start!r} changes the pretrained weight in a way that cannot be repeated here: "
            "save it with path_initial_model_for_weight_conversion"
        )


def _pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            raise ValueError(f"this checkpoint is no plain LoRA: it has a tensor {key!r}")
        found.setdefault(match[1], {})[match[2]] = tensor
    single = [key for key, parts in found.items() if parts.keys() != {"A", "B"}]
    if single:
        raise ValueError(f"A or B is missing for {', '.join(single)}")
    return {key: (parts["A"], parts["B"]) for key, parts in found.items()}


def _fault(module: nn.Module | None, a: Tensor, b: Tensor) -> str:
    if module is None:
        return "there is no such layer in the model"
    if layer_kind(module) is None:
        return f"it is a {type(module).__name__} in the model"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "peft has another form of adapters for grouped convolutions"
    expected, found = tuple(weight_matrix(module).shape), (len(b), a[0].numel())
    if expected == found:
        return ""
    return f"its weight is {found[0]} x {found[1]} in the checkpoint, {expected[0]} x {expected[1]} in the model"


def _setting(config: dict[str, Any], pattern: str, key: str, default: Any) -> Any:
    """What a pattern of peft says about a layer: the first of its keys, a regular expression, that matches the end of the name."""
    for expression, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default
