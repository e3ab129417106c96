r"""The most recent features of a training run, first in, first out.

>>> import torch
>>> bank = FeatureBank(4, features=torch.zeros(2), label=torch.zeros((), dtype=torch.long))
>>> for step in range(3):
...     bank.push(features=torch.full((2, 2), float(step)), label=torch.tensor([step, step + 10]))
>>> len(bank), bank["label"].tolist()
(4, [1, 11, 2, 12])

Several columns share one bank when their rows belong together, such as the features of two encoders and the label.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.core.memory.gather import gather_rows


class FeatureBank(nn.Module):
    """A ring buffer of rows, part of the checkpoint of whatever module holds it. No gradient enters or leaves.

    ``bank[name]`` is a copy of the rows held, the oldest first: later pushes do not change it, so that it may be part of a
    graph that is differentiated after them. The columns in the order of storage are the buffers of the same names; the
    next row goes to position ``position``.

    Args:
        size: rows held at most.
        synchronize: with ``torch.distributed``, push the rows of all processes in the order of their ranks, so that all
            banks agree. Without, each process keeps its own.
        group: the processes, ``None`` for all.
        rows: for each column an example row; its shape, dtype and device are those of the column.

    Raises:
        ValueError: ``size`` is below 1, or there is no column.
    """

    def __init__(
        self,
        size: int,
        /,
        *,
        synchronize: bool = True,
        group: dist.ProcessGroup | None = None,
        **rows: Tensor,
    ) -> None:
        super().__init__()
        if size < 1 or not rows:
            raise ValueError(f"a bank needs a size of at least 1 and a column, got {size} and {sorted(rows)}")
        self.size = size
        self.position = 0
        self.synchronize = synchronize
        self._filled = 0
        self._group = group
        for name, row in rows.items():
            self.register_buffer(name, row.new_zeros((size, *row.shape)))

    def __len__(self) -> int:
        return self._filled

    def __getitem__(self, name: str) -> Tensor:
        """A copy of a column, the oldest row first: (len(bank), *row).

        Raises:
            KeyError: there is no such column.
        """
        if name not in self._buffers:
            raise KeyError(f"no column {name!r}; there are {sorted(self._buffers)}")
        column = self.get_buffer(name)
        if self._filled < self.size:
            return column[: self._filled].clone()
        return torch.cat([column[self.position :], column[: self.position]])

    @torch.no_grad()
    def push(self, **columns: Tensor) -> None:
        """Append a batch; the oldest rows make room. Of a batch larger than the bank, the last rows are kept.

        Args:
            columns: for each column its rows (batch, *row), of any dtype of the same kind and on any device (one that the
                processes communicate on when there are several).

        Raises:
            ValueError: columns are missing or unknown, or shapes do not fit.
        """
        if columns.keys() != self._buffers.keys():
            raise ValueError(f"expected the columns {sorted(self._buffers)}, got {sorted(columns)}")
        for name, column in columns.items():
            row = self.get_buffer(name).shape[1:]
            if column.shape[1:] != row or column.ndim == 0:
                raise ValueError(f"{name} must be a batch of rows of shape {tuple(row)}, got {tuple(column.shape)}")
        rows = tuple(columns.values())
        if self.synchronize:
            rows = gather_rows(*rows, group=self._group)
        elif len({column.shape[0] for column in rows}) != 1:
            raise ValueError(f"columns must have the same number of rows, got {[len(column) for column in rows]}")
        count = rows[0].shape[0]
        start, kept = self.position + max(0, count - self.size), min(count, self.size)
        for name, column in zip(columns, rows, strict=True):
            buffer = self.get_buffer(name)
            where = torch.arange(start, start + kept, device=buffer.device) % self.size
            buffer[where] = column[count - kept :].to(buffer)
        self.position = (self.position + count) % self.size
        self._filled = min(self.size, self._filled + count)

    def get_extra_state(self) -> dict[str, int]:
        return {"position": self.position, "filled": self._filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.position, self._filled = int(state["position"]), int(state["filled"])

    def extra_repr(self) -> str:
        columns = {name: tuple(buffer.shape[1:]) for name, buffer in self.named_buffers()}
        return f"{self.size}, {columns}"
