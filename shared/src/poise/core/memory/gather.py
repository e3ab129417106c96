"""Rows of all processes, so that what every process remembers is the same."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(*columns: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Concatenate each column over the processes in the order of their ranks; without a process group, return them as given.

    Processes may hold different numbers of rows, as they do in the last batch of an epoch. No gradient flows.

    Args:
        columns: tensors with the same number of rows (first dimension), on a device that the group communicates on.
        group: the processes, ``None`` for all.

    Returns:
        As many tensors, the same on every process.

    Raises:
        ValueError: a column has no rows, or the columns differ in their number.
    """
    if any(column.ndim == 0 for column in columns):
        raise ValueError(f"columns must have rows, got shapes {[tuple(column.shape) for column in columns]}")
    counts = {column.shape[0] for column in columns}
    if len(counts) != 1:
        raise ValueError(f"columns must have the same number of rows, got {[column.shape[0] for column in columns]}")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return columns
    (count,) = counts
    size = torch.tensor([count], device=columns[0].device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    held = torch.cat(sizes).tolist()
    return tuple(_gather(column.detach(), held, group) for column in columns)


def _gather(column: Tensor, held: list[int], group: dist.ProcessGroup | None) -> Tensor:
    padded = column.new_zeros((max(held), *column.shape[1:]))  # collectives need equal shapes
    padded[: column.shape[0]] = column
    parts = [torch.empty_like(padded) for _ in held]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, held, strict=True)])
