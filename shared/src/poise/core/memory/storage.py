r"""How a bank stores its rows: exactly, in half precision, in a file, or only the large entries.

What 1,281,167 rows of 1,000 classes take (the training set of ImageNet), and the error made:

| storage | bytes | error |
|---|---|---|
| ``DenseRows()`` | 5.1 GB | none (float32) |
| ``DenseRows(torch.float16)`` | 2.6 GB | 2^-11 relative, 2^-25 below 6e-5 |
| ``DenseRows(torch.float16, file=...)`` | 2.6 GB on disk, in memory only what is in use | the same |
| ``TopKRows(16)`` | 88 MB | see :class:`TopKRows` |
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class Storage(Protocol):
    """Turns rows into tensors that are kept, and back. Has no state of its own."""

    def allocate(self, samples: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """The tensors that represent ``samples`` rows of zeros."""
        ...

    def read(self, tensors: dict[str, Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rows at ``index``."""
        ...

    def write(self, tensors: dict[str, Tensor], index: Tensor, rows: Tensor) -> None:
        """Replace the rows at ``index``; equal indices come with equal rows."""
        ...


@dataclass(frozen=True)
class DenseRows:
    """Every entry, in a dtype of your choice.

    Args:
        dtype: of the stored entries. Half types are read as float32.
        file: keep the entries in this file, mapped into memory, instead of in memory. It is created, or emptied if it has
            exactly the size needed. Under ``torch.distributed`` each process adds its rank to the name, because each
            keeps its own bank. Such a bank stays on the CPU.
    """

    dtype: torch.dtype = torch.float32
    file: str | Path | None = None

    def allocate(self, samples: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """One tensor (samples, *shape).

        Raises:
            ValueError: the file exists and does not have the size needed, or ``device`` is not the CPU.
        """
        if self.file is None:
            return {"rows": torch.zeros((samples, *shape), dtype=self.dtype, device=device)}
        if device.type != "cpu":
            raise ValueError(f"a bank in a file stays on the CPU, got device {str(device)!r}")
        path = Path(self.file)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            path = path.with_name(f"{path.name}.rank{dist.get_rank()}")
        entries = samples * prod(shape)
        size = entries * self.dtype.itemsize
        if path.exists() and path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, a bank of this size {size}: remove it first")
        with path.open("wb") as file:
            file.truncate(size)  # zeros that take no space until they are written
        return {"rows": torch.from_file(str(path), shared=True, size=entries, dtype=self.dtype).view(samples, *shape)}

    def read(self, tensors: dict[str, Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rows at ``index``, in float32 if they are stored in less."""
        rows = tensors["rows"][index]
        return rows.float() if rows.is_floating_point() and rows.itemsize < 4 else rows

    def write(self, tensors: dict[str, Tensor], index: Tensor, rows: Tensor) -> None:
        """Replace the rows at ``index``."""
        tensors["rows"][index] = rows.to(tensors["rows"].dtype)


@dataclass(frozen=True)
class TopKRows:
    r"""The k largest entries of each row and the sum of the others, for rows of non-negative numbers such as probabilities.

    A row p of K entries comes back as

        p~_j = p_j (rounded) for the k largest j,     p~_j = (\sum_{i not among them} p_i) / (K - k) for the others.

    Kept entries err by the rounding (2^-11 relative for float16). Of the others, each errs by at most the (k+1)-th largest
    entry and all together, in absolute value, by at most twice their sum; they also take up the rounding of the kept ones, so
    that the sum of the row errs by 2^-11 at most, and by nothing unless the others are smaller than that. Under
    ``SampleBank.update`` with momentum b the errors of successive updates add up to at most 1 / (1 - b) times one of them.

    Args:
        k: entries kept.
        dtype: of the kept entries.

    Raises:
        ValueError: k is below 1.
    """

    k: int
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def allocate(self, samples: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Values (samples, k), their classes (samples, k) and the rest (samples,).

        Raises:
            ValueError: rows are not vectors of more than k entries.
        """
        if len(shape) != 1 or shape[0] <= self.k:
            raise ValueError(
                f"TopKRows({self.k}) stores vectors of more than {self.k} entries, got rows of shape {shape}"
            )
        integers = torch.int16 if shape[0] <= 2**15 else torch.int32
        classes = torch.arange(self.k, dtype=integers, device=device).repeat(samples, 1)  # distinct, as read needs them
        return {
            "values": torch.zeros((samples, self.k), dtype=self.dtype, device=device),
            "classes": classes,
            "rest": torch.zeros(samples, device=device),
        }

    def read(self, tensors: dict[str, Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rows at ``index`` in float32."""
        spread = tensors["rest"][index, None].float() / (shape[0] - self.k)
        classes = tensors["classes"][index].long()
        return spread.expand(-1, *shape).scatter(1, classes, tensors["values"][index].float())

    def write(self, tensors: dict[str, Tensor], index: Tensor, rows: Tensor) -> None:
        """Replace the rows at ``index``."""
        rows = rows.float()
        values, classes = rows.topk(self.k, dim=1)
        values = values.to(tensors["values"].dtype)
        rest = (rows.sum(1) - values.float().sum(1)).clamp(min=0)
        for name, value in (("values", values), ("classes", classes), ("rest", rest)):
            tensors[name][index] = value.to(tensors[name].dtype)
