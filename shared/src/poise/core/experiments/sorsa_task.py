"""What a kind of data has to say for itself in the SORSA experiment, and what the arms train."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from poise.core.adapters.lora import Init, LoRAConfig, apply_lora
from poise.core.adapters.sorsa import SorsaConfig, apply_sorsa
from poise.core.adapters.svd import SVDMethod
from poise.core.lab import Run


@dataclass(frozen=True, eq=False)
class Task:
    """A pretrained network, what it is tuned on, and how it is judged.

    Attributes:
        model: the network, on its device.
        targets: the layers that are adapted, as patterns of names.
        head: modules that are trained in every arm.
        batches: the training batches of a range of steps, of this process.
        loss: of the network on a batch.
        judge: accuracy and the like of the tuned network.
        probe: the training loss on a fixed part of the training data, to compare arms at equal loss; or None.
    """

    model: nn.Module
    targets: tuple[str, ...]
    head: tuple[str, ...]
    batches: Callable[[range], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    judge: Callable[[nn.Module], dict[str, float]]
    probe: Callable[[nn.Module], float] | None = None


def adapt(task: Task, arm: str, rank: int, svd: SVDMethod, run: Run) -> nn.Module:
    """The network of an arm, with what is not trained frozen."""
    if arm == "full":
        return task.model
    if arm in ("baseline", "pissa"):
        init: Init = "standard" if arm == "baseline" else "pissa" if svd == "exact" else "pissa_randomized"
        return apply_lora(
            task.model,
            LoRAConfig(r=rank, target_modules=task.targets, init=init, train_modules=task.head),
            generator=run.generator if run.device.type == "cpu" else None,
        )
    return apply_sorsa(
        task.model,
        SorsaConfig(r=rank, target_modules=task.targets, svd=svd, train_modules=task.head),
        generator=run.generator if run.device.type == "cpu" else None,
    )
