"""What a kind of data has to say for itself in the PELA experiment."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from poise.core.schedule import Cosine, Linear


class Batch(NamedTuple):
    """Inputs of the networks by keyword, and what the task wants of them."""

    inputs: Mapping[str, Tensor]
    target: Tensor | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A pretrained network, what it is trained on in the intermediate stage, and how its small copies are judged.

    Attributes:
        teacher: the network, on its device.
        blocks: names of the modules whose outputs are distilled.
        skip: names of the layers that stay dense.
        steps: of the intermediate stage.
        rate: the learning rate at its highest.
        schedule: the share of it that is used at a step.
        batches: the training batches of these steps.
        task_loss: of a network, a batch, and what the network returned for it.
        unseen: batches to measure the features on.
        measure: accuracy and the like of a network; the name goes to the loops that it runs.
    """

    teacher: nn.Module
    blocks: tuple[str, ...]
    skip: tuple[str, ...]
    steps: int
    rate: float
    schedule: Callable[[int], float]
    batches: Callable[[range], Iterator[Batch]]
    task_loss: Callable[[nn.Module, Batch, Any], Tensor]
    unseen: Callable[[], Iterator[Batch]]
    measure: Callable[[nn.Module, str], dict[str, float]]


def cosine(steps: int, warmup: int = 0, start: float = 0.0, end: float = 0.0) -> Callable[[int], float]:
    """Half a cosine from 1 to ``end``, after a rise from ``start`` over the warm-up, as shares of the highest learning rate."""
    rise, fall = Linear(start, 1.0, max(1, warmup)), Cosine(1.0, end, max(1, steps - warmup), delay=warmup)
    return lambda step: rise(step) if step < warmup else fall(step)
