"""Batches from loaders of any kind, for the estimators' ``fit``."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def cycled(loader: Iterable[Any]) -> Iterator[Tensor]:
    """The loader's batches for ever: a tensor as it is, of a tuple or list (``TensorDataset``) the first entry.

    The loader is asked for a new pass whenever it ends, so that a shuffling loader shuffles again.

    Raises:
        ValueError: a pass yields nothing.
        TypeError: a batch is neither a tensor nor a sequence that starts with one.
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            first = batch[0] if isinstance(batch, list | tuple) and batch else batch
            if not isinstance(first, Tensor):
                raise TypeError(f"a batch must be a tensor or a tuple that starts with one, got {type(batch).__name__}")
            yield first
        if empty:
            raise ValueError(
                "the loader yields no batch (an iterator can be passed through once only: give the loader itself)"
            )


def to_module(batches: Iterator[Tensor], module: nn.Module) -> Iterator[Tensor]:
    """The batches on the device and in the dtype of the module's parameters."""
    like = next(module.parameters(), None)
    return batches if like is None else (batch.to(like) for batch in batches)
