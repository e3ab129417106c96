"""What a model predicted for each training example, kept for the next time the example is seen."""

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.memory.samples import SampleBank


def prediction_memory(num_examples: int, shape: int | tuple[int, ...], memory: SampleBank | None) -> SampleBank:
    """A bank of one distribution per example: the given one, checked, or a new one in float32.

    Raises:
        ValueError: the given bank is of another size.
    """
    if memory is None:
        return SampleBank(num_examples, shape)
    expected = (shape,) if isinstance(shape, int) else shape
    if len(memory) != num_examples or memory.shape != expected:
        raise ValueError(
            f"memory must hold {num_examples} rows of shape {expected}, got {len(memory)} of shape {memory.shape}"
        )
    return memory


def remember(
    memory: SampleBank, index: Tensor, probs: Float[Tensor, "batch ..."], momentum: float = 0.0
) -> Float[Tensor, "batch ..."]:
    """Move the memory towards new predictions, and return its rows; nothing that is not finite gets in.

    On the CPU such a prediction is an error. On an accelerator, where to look would be to wait, its row stays as it is: a step
    that a gradient scaler skips because of an overflow leaves no trace.

    Args:
        memory: one row per training example.
        index: of the examples in the data set.
        probs: their predictions.
        momentum: weight of the old row.

    Raises:
        ValueError: a prediction is not finite (on the CPU); the index or the shape does not fit the memory.
        TypeError: the index is not integer.
    """
    if probs.device.type == "cpu":
        if not probs.isfinite().all():
            raise ValueError("the logits give predictions that are not finite (NaN or infinite logits)")
    else:
        finite = probs.isfinite().flatten(1).all(1).view(-1, *[1] * (probs.dim() - 1))
        probs = torch.where(finite, probs, memory.read(index).to(probs))
    return memory.update(index, probs, momentum)
