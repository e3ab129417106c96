"""Choice of the device a program runs on.

>>> pick_device("cpu")
device(type='cpu')
"""

import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called ``name``, if this machine has it.

    Args:
        name: ``"auto"`` (the first CUDA device if there is one, the CPU otherwise), ``"cpu"``, ``"cuda"`` (the
            current CUDA device), ``"cuda:1"``, or any other device that PyTorch knows (``"mps"``, ``"xpu"``).

    Raises:
        ValueError: there is no such device here; the message says which there are.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:1' or the like, got {name!r}") from error
    if device.type == "cuda":
        return _cuda(device)
    if device.type not in ("cpu", "meta") and not _has_accelerator(device.type):
        raise ValueError(f"device {str(device)!r} was asked for, but PyTorch sees none here; there is {_present()}")
    return device


def _cuda(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        reason = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        raise ValueError(f"device {str(device)!r} was asked for, but {reason}; there is {_present()}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} was asked for, but there is {_present()}")
    return torch.device("cuda", index)


def _has_accelerator(kind: str) -> bool:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type == kind


def _present() -> str:
    names = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *names])
