"""Checkpoints of a loop: every stateful object, every random number generator and the place in the metric log, written atomically.

Loading unpickles nothing but tensors and plain containers (``weights_only=True``).
"""

import io
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor

from poise.core.lab.atomic import replacing
from poise.core.lab.errors import RunFailed


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` so that ``path`` is at every moment a complete checkpoint."""
    buffer = io.BytesIO()  # torch.save to a file would hide the reason when the disk is full
    torch.save(dict(state), buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        RunFailed: the file is damaged, or holds something other than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, BadZipFile, pickle.UnpicklingError) as error:
        raise RunFailed(
            f"the checkpoint {path} is damaged or cannot be read ({type(error).__name__}); nothing was overwritten. "
            "Delete that file to begin its loop again, or restore it from a copy"
        ) from error


def capture(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The state of named objects: anything with ``state_dict``, a tensor, or a mapping of tensors."""
    return {name: _state(name, value) for name, value in objects.items()}


def restore(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Bring named objects back to a captured state; tensors in place."""
    for name, value in objects.items():
        state = states[name]
        if isinstance(value, Tensor):
            _copy(value, state)
        elif hasattr(value, "load_state_dict"):
            value.load_state_dict(state)
        else:
            for key, tensor in value.items():
                _copy(tensor, state[key])


def capture_rng(generator: torch.Generator) -> dict[str, Any]:
    """Every random state that a training loop can draw from."""
    numpy = mtrand.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generator": generator.get_state(),
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": numpy["state"]["pos"],
            "gauss": [numpy["has_gauss"], numpy["gauss"]],
        },
    }


def restore_rng(state: Mapping[str, Any], generator: torch.Generator) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["generator"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    mtrand.set_state(("MT19937", numpy["keys"].numpy().astype(np.uint32), numpy["position"], *numpy["gauss"]))


def _state(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values()):
        return {key: item.detach().cpu().clone() for key, item in value.items()}
    raise TypeError(
        f"cannot checkpoint {name!r}: expected an object with state_dict, a tensor or a dict of tensors, got {type(value).__name__}"
    )


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)
