r"""Save and load an adapter alone: its tensors and a header that says what they belong to, in one safetensors file.

>>> import copy, tempfile
>>> from pathlib import Path
>>> import torch
>>> from torch import nn
>>> from poise.core import SorsaConfig, apply_sorsa
>>> pretrained = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
>>> model = apply_sorsa(copy.deepcopy(pretrained), SorsaConfig(r=2))
>>> file = Path(tempfile.mkdtemp()) / "adapter.safetensors"
>>> save_adapter(model, file)
>>> adapters = load_adapter(pretrained, file)  # onto the pretrained model; nothing is decomposed again
>>> list(adapters.layers), torch.equal(adapters.deltas["0"].u, model[0]["default"].u)
(['0', '2'], True)
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.attach import attach_adapters
from poise.core.adapters.delta import Delta
from poise.core.adapters.handle import Adapters, adapted_layers
from poise.core.adapters.lora import LoRADelta
from poise.core.adapters.sorsa import SorsaDelta
from poise.core.adapters.targets import layer_kind, weight_matrix
from poise.core.functional._numerics import widen
from poise.core.names import plain_modules

KINDS: Mapping[str, type[Delta]] = MappingProxyType({"lora": LoRADelta, "sorsa": SorsaDelta})
"""Classes of deltas by the name that files have for them."""

VERSION = 1

_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.05}
"""Greatest relative distance of what was taken from the weight, which a half type has rounded."""


def save_adapter(
    model: nn.Module, path: Path | str, name: str = "default", *, kinds: Mapping[str, type[Delta]] = KINDS
) -> None:
    """Write an adapter to a safetensors file: trained factors and, where a part of the weight was taken, that part.

    Args:
        model: the model, merged or not.
        path: of the file.
        name: of the adapter.
        kinds: classes of deltas by name; give your own with ``KINDS | {"name": Class}``.

    Raises:
        ValueError: the model has no such adapter.
        TypeError: a delta is of none of these classes.
    """
    adapters = Adapters(model, name)
    names = {kind: key for key, kind in kinds.items()}
    layers = {}
    for key, delta in adapters.deltas.items():
        if type(delta) not in names:
            raise TypeError(f"{key}: {type(delta).__name__} is not among the kinds {sorted(kinds)}")
        layers[key] = {"kind": names[type(delta)], **delta.settings()}
    header = {"version": VERSION, "name": name, "layers": layers}
    tensors = {key: tensor.contiguous().cpu() for key, tensor in adapters.state_dict().items()}
    save_file(tensors, str(path), metadata={"poise": json.dumps(header)})


def load_adapter(
    model: nn.Module,
    path: Path | str,
    name: str | None = None,
    *,
    train_base: bool = False,
    kinds: Mapping[str, type[Delta]] = KINDS,
) -> Adapters:
    """Attach the adapter of a file to the pretrained model that it was trained on, or load it into the adapter of that name.

    Args:
        model: the model. If something does not fit, it stays as it was.
        path: of the file.
        name: for the adapter; that in the file by default.
        train_base: keep training what was trained; by default all but adapters is frozen.
        kinds: classes of deltas by name.

    Returns:
        The handle of the adapter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter file, or it does not match the model: names every layer that is missing, is of another kind or
            size, or has another pretrained weight.
        RuntimeError: the model is merged.
    """
    header, tensors = read_adapter(path)
    layers: dict[str, dict[str, Any]] = header["layers"]
    own = {key: {n.removeprefix(f"{key}."): t for n, t in tensors.items() if n.startswith(f"{key}.")} for key in layers}
    name = name or header["name"]
    modules = plain_modules(model)
    faults: list[str] = []
    deltas: dict[str, Delta] = {}
    for key, settings in layers.items():
        with _collected(faults, key):
            deltas[key] = _restored(modules.get(key), settings, own[key], kinds, name)
    if faults:
        raise ValueError(f"{path} does not match the model: " + "; ".join(faults))
    if any(name in layer.deltas for layer in adapted_layers(model).values()):
        adapters = Adapters(model, name)
        adapters.load_state_dict(tensors)
        return adapters
    return attach_adapters(
        model, lambda key, _: deltas[key], lambda key, _: key in layers, name=name, train_base=train_base
    )


def read_adapter(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an adapter file.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter file of a version that is known.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("poise")
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    header = json.loads(text) if text is not None else {}
    if header.get("version") != VERSION:
        raise ValueError(f"{path} is not an adapter file of version {VERSION}; its header is {header or 'missing'}")
    return header, tensors


@contextmanager
def _collected(faults: list[str], key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        faults.append(f"{key}: {error}")


def _restored(
    module: nn.Module | None,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, type[Delta]],
    name: str,
) -> Delta:
    if module is None:
        raise ValueError("there is no such layer in the model")
    if layer_kind(module) is None:
        raise ValueError(f"it is a {type(module).__name__} in the model")
    if settings["kind"] not in kinds:
        raise ValueError(f"its adapter is of the kind {settings['kind']!r}, known are {sorted(kinds)}")
    layer = module.base if isinstance(module, AdaptedLayer) else module
    kind = kinds[settings["kind"]]
    if isinstance(module, AdaptedLayer) and name in module.deltas and type(module[name]) is not kind:
        raise ValueError(f"its adapter {name!r} is a {type(module[name]).__name__} in the model")
    delta = kind.restored(layer, settings, tensors)
    matrix = weight_matrix(layer)
    pretrained = module.pretrained() if isinstance(module, AdaptedLayer) else widen(matrix.detach(), "weight")
    if delta.misfit(pretrained) > _TOLERANCE.get(matrix.dtype, 1e-3):
        raise ValueError("its pretrained weight is another than the one that the adapter was trained on")
    return delta
