"""Batches on the device before they are asked for.

>>> import torch
>>> loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=4)
>>> [batch.tolist() for batch in prefetch(loader, "cpu")]
[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]]
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def prefetch(loader: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    """Iterate over ``loader`` with every tensor of every batch on ``device``.

    On CUDA the next batch is copied from pinned memory on a stream of its own while the current one is computed with.
    Elsewhere batches are moved when their turn comes.

    Args:
        loader: gives batches: tensors, or tuples, lists and dicts of tensors, nested as you like; what is no tensor
            stays as it is. ``DataLoader(pin_memory=True)`` pins in a thread of its own; unpinned batches are pinned
            here.
        device: where the batches are wanted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _on_side_stream(loader, device)
    return (_each_tensor(batch, lambda tensor: tensor.to(device)) for batch in loader)


def _on_side_stream(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    side = torch.cuda.Stream(device)
    copying: deque[tuple[Any, torch.cuda.Event]] = deque()

    def start(batch: Any) -> None:
        with torch.cuda.stream(side):
            copying.append((_each_tensor(batch, copied), side.record_event()))

    def copied(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        return pinned.to(device, non_blocking=True)

    def finish() -> Any:
        batch, done = copying.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(done)  # of this copy only: the next one is already under way

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # else the allocator could give its memory to a later copy too early
            return tensor

        return _each_tensor(batch, used)

    for batch in loader:
        start(batch)
        if len(copying) > 1:
            yield finish()
    while copying:
        yield finish()


def _each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with ``change`` applied to every tensor in it, containers kept."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)  # keeps the class, such as Hugging Face's BatchEncoding
        changed.update({key: _each_tensor(value, change) for key, value in batch.items()})
        return changed
    if isinstance(batch, Mapping):
        return {key: _each_tensor(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each_tensor(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_each_tensor(value, change) for value in batch)
    return batch
