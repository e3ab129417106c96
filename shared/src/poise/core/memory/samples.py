r"""A value for every training sample, addressed by its index in the data set.

>>> import torch
>>> bank = SampleBank(50_000, 10)
>>> index, probabilities = torch.tensor([7, 41_000]), torch.full((2, 10), 0.1)
>>> target = bank.update(index, probabilities, momentum=0.7)  # t <- 0.7 t + 0.3 p, the target of ELR
>>> [round(value, 4) for value in target.sum(1).tolist()], bank.seen(torch.tensor([7, 8])).tolist()
([0.3, 0.3], [True, False])

The loader must yield the index of each sample in the data set, which survives shuffling and distribution; positions in a
batch or in a subset do not. With ``torch.distributed``, what one process writes, all processes write: (index, row) pairs are
gathered in the order of the ranks, so that every process holds the same bank and it does not matter which process gets
a sample in the next epoch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from poise.core.memory.gather import gather_rows
from poise.core.memory.storage import DenseRows, Storage


class SampleBank(nn.Module):
    """One row per sample, zero until it is written; part of the checkpoint of whatever module holds it.

    Where an index occurs several times in one call, the last row counts (the last of the highest rank), on every device.
    Nothing here takes part in autograd.

    Args:
        samples: number of samples in the data set.
        shape: of one row: a number of classes, or a shape such as (height, width).
        storage: how rows are stored, see :mod:`poise.core.memory.storage`.
        device: where the bank stays whatever happens to the module that holds it; ``None``: it starts on the CPU and moves
            along. Conversions such as ``half()`` never touch the bank.
        synchronize: gather what all processes write. Without, each process keeps what it wrote.
        group: the processes, ``None`` for all.

    Attributes:
        written: (samples,) bool, which samples have been written.

    Raises:
        ValueError: ``samples`` or the shape is not positive, or the storage cannot hold such rows.
    """

    written: Bool[Tensor, " samples"]

    def __init__(
        self,
        samples: int,
        shape: int | tuple[int, ...],
        *,
        storage: Storage | None = None,
        device: torch.device | str | None = None,
        synchronize: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if samples < 1 or any(size < 1 for size in self.shape):
            raise ValueError(f"samples and shape must be positive, got {samples} and {self.shape}")
        self.storage: Storage = DenseRows() if storage is None else storage
        self.synchronize = synchronize
        self._group = group
        self._stays = device is not None or (isinstance(self.storage, DenseRows) and self.storage.file is not None)
        where = torch.device("cpu" if device is None else device)
        self._names = []
        for name, tensor in self.storage.allocate(samples, self.shape, where).items():
            self.register_buffer(name, tensor)
            self._names.append(name)
        self.register_buffer("written", torch.zeros(samples, dtype=torch.bool, device=where))

    def __len__(self) -> int:
        return self.written.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the bank takes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def read(self, index: Tensor) -> Shaped[Tensor, "batch ..."]:
        """The rows (batch, *shape) of the samples at ``index``, a copy, on the bank's device.

        Args:
            index: (batch,) integers in 0..samples-1, on any device.

        Raises:
            TypeError: the index is not integer.
            ValueError: it is not one-dimensional, or out of range (on an accelerator the device itself reports that).
        """
        return self.storage.read(self._tensors(), self._located(index), self.shape)

    def seen(self, index: Tensor) -> Bool[Tensor, " batch"]:
        """Whether each sample at ``index`` has been written; arguments and errors as :meth:`read`."""
        return self.written[self._located(index)]

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replace the rows of the samples at ``index``.

        Args:
            index: (batch,) as in :meth:`read`.
            rows: (batch, *shape), on any device; on one that the processes communicate on when there are several.

        Raises:
            TypeError, ValueError: as :meth:`read`; or the rows do not have the shape (batch, *shape).
        """
        index, rows = self._gathered(index, rows)
        self.storage.write(self._tensors(), index, rows)
        self.written[index] = True

    @torch.no_grad()
    def update(self, index: Tensor, rows: Tensor, momentum: float) -> Shaped[Tensor, "batch ..."]:
        """Move the rows at ``index`` towards new ones, ``momentum * old + (1 - momentum) * new``, and return them as stored.

        Args:
            index: (batch,) as in :meth:`read`.
            rows: (batch, *shape) floating, as in :meth:`write`.
            momentum: in [0, 1]; 0 replaces.

        Returns:
            The rows at ``index`` after the update, (batch, *shape), with dtype and device of ``rows``, without gradient.

        Raises:
            TypeError, ValueError: as :meth:`write`; or ``momentum`` is outside [0, 1], or the rows are not floating.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if not rows.is_floating_point():
            raise TypeError(f"rows must be floating-point to be averaged, got {rows.dtype}")
        where, new = self._gathered(index, rows)
        old = self.storage.read(self._tensors(), where, self.shape)
        self.storage.write(self._tensors(), where, momentum * old + (1 - momentum) * new.to(old.dtype))
        self.written[where] = True
        return self.read(index).to(rows)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._names}

    def _located(self, index: Tensor) -> Tensor:
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"index must be integer, got {index.dtype}")
        if index.ndim != 1:
            raise ValueError(f"index must have shape (batch,), got {tuple(index.shape)}")
        if index.device.type == "cpu" and index.numel() and not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(f"index must lie in 0..{len(self) - 1}, got {int(index.min())} to {int(index.max())}")
        return index.to(self.written.device, torch.long)

    def _gathered(self, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and rows of all processes, checked, on the bank's device; equal indices have equal rows, the last."""
        self._located(index)
        if rows.shape != (*index.shape, *self.shape):
            raise ValueError(f"rows must have shape {(*index.shape, *self.shape)}, got {tuple(rows.shape)}")
        rows = rows.detach()
        if self.synchronize:
            index, rows = gather_rows(index.to(rows.device), rows, group=self._group)
        index, rows = index.to(self.written.device, torch.long), rows.to(self.written.device)
        order = index.argsort(stable=True)
        ordered = index[order]
        last = order[torch.searchsorted(ordered, ordered, right=True) - 1]
        return ordered, rows[last]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampleBank":
        """Follow moves between devices, unless told to stay, and no conversion."""
        if not self._stays:
            device = fn(torch.empty(0, device=self.written.device)).device
            for name, buffer in self.named_buffers():
                setattr(self, name, buffer.to(device))
        return self

    def extra_repr(self) -> str:
        return f"{len(self)}, {self.shape}, storage={self.storage}"
