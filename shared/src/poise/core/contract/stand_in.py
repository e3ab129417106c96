"""A device that no machine has, to find code that hard-codes one without needing an accelerator.

A tensor on the stand-in device computes with ordinary CPU numbers, but it reports a device of its own and refuses to meet tensors
that were left on the CPU, as a CUDA tensor would. Unlike fake tensors it holds values, so that branches on the data and
``torch.autograd.grad`` inside the method work.

>>> import torch
>>> with StandIn() as device:
...     x = torch.ones(3, device=device)
...     y = 2 * x
...     y + torch.ones(3)
Traceback (most recent call last):
...
poise.core.contract.stand_in.DeviceMixError: aten.add.Tensor mixes a tensor on 'lazy:0' with one of shape (3,) on 'cpu'
>>> back_on_cpu(y)
tensor([2., 2., 2.])
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

# PyTorch keeps this device type for a backend that it does not ship; autograd asks it neither for streams nor for a context.
DEVICE = torch.device("lazy", 0)

# Operations that take tensors of two devices, on CUDA as well: copies, and indexing with indices that stayed on the CPU.
_aten = torch.ops.aten
_MIXERS = (
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)
_MADE_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class DeviceMixError(RuntimeError):
    """An operation met tensors of two devices."""


class StandIn:
    """Context in which :data:`DEVICE` exists; tensors get there by ``.to(device)`` or by being created there."""

    def __enter__(self) -> torch.device:
        with ExitStack() as stack:
            stack.enter_context(patch.object(torch.autocast, "__init__", _autocast_of_the_cpu))
            # where torch.utils.checkpoint looks for random states of the device
            stack.enter_context(patch.object(torch, DEVICE.type, torch.cpu, create=True))
            stack.enter_context(_FromData())
            stack.enter_context(_Everywhere())
            self._contexts = stack.pop_all()
        return DEVICE

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)


_autocast_init = torch.autocast.__init__


def _autocast_of_the_cpu(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    """PyTorch has no autocast for the device type behind the stand-in, but ``enabled=False`` is right for any device."""
    _autocast_init(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class _Elsewhere(Tensor):
    """A tensor on the stand-in device; ``numbers`` holds what it stands for."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_Elsewhere":
        outer = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        outer.numbers = inner
        return outer

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl
    __torch_dispatch__: ClassVar[Any] = classmethod(
        lambda cls, func, types, args=(), kwargs=None: _run(func, args, kwargs or {})
    )


class _Everywhere(TorchDispatchMode):
    """Routes every operation, also those that create tensors, through the device check."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Creates tensors from Python numbers on the CPU and then moves them, because PyTorch fills them below the dispatcher."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _MADE_FROM_DATA:
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if func is Tensor.new_tensor:
            device = args[0].device if device is None else device
            args, kwargs = args[1:], {"dtype": args[0].dtype, **kwargs}
            func = torch.tensor
        elif device is None and args and isinstance(args[0], _Elsewhere):
            device = DEVICE
        if device is None or torch.device(device).type != DEVICE.type:
            return func(*args, **{**kwargs, "device": device})
        if isinstance(args[0], Tensor):
            return args[0].to(device=DEVICE, dtype=kwargs.get("dtype"))
        # as_tensor knows no requires_grad, so it is set at the end for all of them
        requires_grad = kwargs.pop("requires_grad", False)
        return func(*args, **{**kwargs, "device": None}).to(DEVICE).requires_grad_(requires_grad)


def back_on_cpu(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that may be on the stand-in device, without its history."""
    detached = tensor.detach()
    return detached.numbers if isinstance(detached, _Elsewhere) else detached


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere)]
    device = kwargs.get("device")
    goes_elsewhere = len(here) < len(tensors) if device is None else torch.device(device).type == DEVICE.type
    if not goes_elsewhere and len(here) == len(tensors):
        return func(*args, **kwargs)
    if func not in _MIXERS and len(here) < len(tensors):
        # a scalar tensor on the CPU may meet CUDA tensors too
        for stray in (tensor for tensor in here if tensor.dim() > 0):
            raise DeviceMixError(
                f"{func} mixes a tensor on {str(DEVICE)!r} with one of shape {tuple(stray.shape)} on {str(stray.device)!r}"
            )
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if goes_elsewhere else device}
    inner_args, inner_kwargs = tree_map_only(_Elsewhere, lambda tensor: tensor.numbers, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if func is _aten.copy_.default:
        return args[0]
    if not goes_elsewhere:
        return result
    outer = tree_map_only(
        Tensor, lambda tensor: tensor if isinstance(tensor, _Elsewhere) else _Elsewhere(tensor), result
    )
    return return_and_correct_aliasing(func, args, kwargs, outer)
