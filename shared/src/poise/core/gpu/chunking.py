"""Bounded memory: a function of many rows, evaluated a chunk of rows at a time, in smaller chunks when memory runs out.

>>> import torch
>>> points, centres = torch.randn(1_000, 3), torch.randn(50, 3)
>>> distance, index = chunked_map(lambda p: torch.cdist(p, centres).min(dim=1), points, chunk=128)
>>> distance.shape, index.dtype
(torch.Size([1000]), torch.int64)
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def chunked_map(
    fn: Callable[..., Result],
    *tensors: Tensor,
    chunk: int | None = None,
    dim: int = 0,
    recompute: bool = False,
) -> Result:
    """``fn(*tensors)``, computed a chunk at a time.

    The tensors are cut along ``dim``, and the results are joined along it: right for every ``fn`` that treats the
    slices along ``dim`` independently, and does not draw random numbers. When memory runs out, on the GPU or on the
    host, the chunk is halved, as often as needed; finished chunks are kept.

    Args:
        fn: takes one slice of every tensor, returns a tensor or a tuple of tensors (named tuples come back as plain
            ones).
        tensors: what to cut, with the same length along ``dim``.
        chunk: longest slice; ``None`` tries everything at once.
        dim: the dimension that is cut, of the arguments and of the results.
        recompute: in the backward pass, compute each chunk again instead of keeping its intermediate results, so that
            memory stays bounded under autograd too.

    Returns:
        The same as ``fn(*tensors)``, gradients included.

    Raises:
        ValueError: no tensor, lengths that differ, or a chunk below 1.
    """
    lengths = {tensor.shape[dim] for tensor in tensors}
    if len(lengths) != 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"tensors must have one common length along dim {dim}, got shapes {shapes}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    def evaluate(start: int, length: int) -> Any:
        slices = [tensor.narrow(dim, start, length) for tensor in tensors]
        return checkpoint(fn, *slices, use_reentrant=False) if recompute else fn(*slices)

    (total,) = lengths
    results = list(backing_off(evaluate, total, chunk or max(total, 1)))
    if isinstance(results[0], Tensor):
        return cast(Result, _join(results, dim))
    return cast(Result, tuple(_join(parts, dim) for parts in zip(*results, strict=True)))


def backing_off(evaluate: Callable[[int, int], Any], total: int, chunk: int) -> Iterator[Any]:
    """``evaluate(start, length)`` over ``0..total`` in order, in stretches that are halved whenever memory runs out.

    Args:
        evaluate: computes one stretch. It may be called again, for a shorter stretch, after it failed.
        total: how much there is; 0 makes one call of length 0.
        chunk: longest stretch, at least 1.

    Yields:
        The results in order; none is kept here once it was handed over.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: memory does not suffice for a stretch of length 1.
    """
    start = 0
    while True:
        length = min(chunk, total - start)
        try:
            result = evaluate(start, length)
        except (RuntimeError, MemoryError) as error:
            if length <= 1 or not is_out_of_memory(error):
                raise
            chunk = (length + 1) // 2
        else:
            yield result
            del result
            start += length
            if start >= total:
                return
            continue
        _release()  # here and not in the handler: until that ends, the traceback keeps the failed call's tensors alive


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator, in one of its libraries, or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _join(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
