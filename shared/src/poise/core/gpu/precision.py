"""Mixed precision in one object: when to cast, and whether gradients need scaling.

>>> import torch
>>> precision = pick_precision("cpu", "bfloat16")
>>> with precision.autocast():
...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
torch.bfloat16
>>> pick_precision("cpu").dtype
torch.float32
"""

from dataclasses import dataclass

import torch

NAMES = ("auto", "float32", "bfloat16", "float16")
"""What :func:`pick_precision` knows."""


@dataclass(frozen=True)
class Precision:
    """What :func:`pick_precision` chose.

    Attributes:
        device: the kind of device it is for.
        dtype: the type that matrix products and convolutions compute in; parameters and losses stay float32.
    """

    device: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """A context for the forward pass and the loss; does nothing for float32."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device, dtype=self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, which float16 needs against underflow; for the other types it does nothing."""
        return torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)


def pick_precision(device: torch.device | str, name: str = "auto") -> Precision:
    """The precision called ``name`` on ``device``.

    Args:
        device: where the model runs.
        name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 on CUDA devices that compute in it,
            float16 on older ones, and float32 elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"precision must be one of {', '.join(NAMES)}, got {name!r}")
    device = torch.device(device)
    if name != "auto":
        return Precision(device.type, getattr(torch, name))
    if device.type != "cuda":
        return Precision(device.type, torch.float32)
    native = torch.cuda.get_device_capability(device) >= (8, 0)  # emulated, and slow, before Ampere
    return Precision(device.type, torch.bfloat16 if native else torch.float16)
