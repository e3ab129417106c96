r"""What is plasticity? The loss that a network still reaches on targets it has never seen, in a fixed number of steps.

Targets are values of random networks of the same kind on the same inputs, normalised, so that a fresh network does the same task. The
network is first shifted to mean zero on the inputs: learning away an offset is no matter of plasticity.

Lyle, Rowland and Dabney, "Understanding and Preventing Capacity Loss in Reinforcement Learning", ICLR 2022, arXiv 2204.09560; heavy
priming: Nikishin et al., ICML 2022, arXiv 2205.07802, as used by Ma et al., ICLR 2024, arXiv 2310.07418.

>>> import torch
>>> from torch import nn
>>> network = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
>>> dead = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
>>> _ = nn.init.constant_(dead[0].bias, -100.0)
>>> inputs, generator = (torch.randn(200, 3),), torch.Generator().manual_seed(0)
>>> bool(target_fitting_loss(network, inputs, seed=0, targets=2).mean() < target_fitting_loss(dead, inputs, seed=0, targets=2).mean())
True
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.gpu import derive_generator
from poise.rl.plasticity.reset import reset_module
from poise.rl.replay.batch import Batch


@runtime_checkable
class Learner(Protocol):
    """An agent that learns from batches at a step of its own clock."""

    def update(self, batch: Batch, step: int = 0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One update."""


def heavy_priming(
    agent: Learner,
    sample: Callable[[torch.Generator], Batch],
    updates: int = 100_000,
    *,
    generator: torch.Generator,
    step: int = 0,
) -> dict[str, Tensor]:
    """Train long on few transitions, before training goes on: the strongest test of what that does to plasticity.

    Args:
        agent: trained in place.
        sample: draws a batch; the published study draws from the first 2,000 transitions.
        updates: how many.
        generator: of the batches and of the updates.
        step: the agent step that the agent is told.

    Returns:
        The metrics of the last update.

    Raises:
        ValueError: ``updates`` is below 1.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, got {updates}")
    for _ in range(updates):
        metrics = agent.update(sample(generator), step, generator)
    return metrics


def target_fitting_loss(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    seed: int,
    template: nn.Module | None = None,
    targets: int = 10,
    steps: int = 200,
    batch: int = 32,
    learning_rate: float = 1e-3,
) -> Float[Tensor, "targets"]:
    r"""Mean squared error after ``steps`` steps of Adam, from the network as it is, for each of several random targets.

    1 is the error of predicting the mean. Trained are copies; ``network`` is left as it is, and its frozen parameters stay frozen.

    Args:
        network: gives one number per row, or a tuple of such, each of which is to be fitted.
        inputs: its arguments, each with the same number of rows.
        seed: targets and batches follow from it, the same ones for every network.
        template: whose freshly initialised copies are the targets; ``None`` is ``network``. Give the original of an injected one.
        targets: how many.
        steps: of Adam for each.
        batch: rows per step.
        learning_rate: of Adam.

    Returns:
        The error on all inputs for each target.

    Raises:
        ValueError: no inputs, inputs of different lengths, or a number out of range.
    """
    rows = {len(each) for each in inputs}
    if len(rows) != 1 or min(targets, steps, batch) < 1 or learning_rate <= 0:
        raise ValueError(
            "expected inputs of one length, at least one target, step and row per batch, and learning_rate > 0, got "
            f"lengths {sorted(rows)}, {targets}, {steps}, {batch} and {learning_rate}"
        )
    (count,) = rows
    with torch.no_grad():
        offset = [part.mean() for part in _outputs(network(*inputs))]
    losses = []
    for target in range(targets):
        generator = derive_generator(seed, "target", target)
        goal = _random_values(template if template is not None else network, inputs, generator)
        student = copy.deepcopy(network)
        optimizer = torch.optim.Adam(
            [each for each in student.parameters() if each.requires_grad], learning_rate, fused=True
        )
        for _ in range(steps):
            row = torch.randint(count, (batch,), generator=generator).to(goal.device)
            loss = _error(student(*(each[row] for each in inputs)), offset, goal[row])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(_error(student(*inputs), offset, goal))
    return torch.stack(losses)


@torch.no_grad()
def _random_values(template: nn.Module, inputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The first output of a fresh network on the inputs, with mean 0 and variance 1."""
    values = _outputs(reset_module(copy.deepcopy(template), generator)(*inputs))[0]
    return (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)


def _error(result: Any, offset: Sequence[Tensor], goal: Tensor) -> Tensor:
    parts = [(each - shift - goal).square().mean() for each, shift in zip(_outputs(result), offset, strict=True)]
    return torch.stack(parts).mean()


def _outputs(result: Any) -> list[Tensor]:
    return [each.flatten() for each in (result if isinstance(result, tuple | list) else (result,))]
