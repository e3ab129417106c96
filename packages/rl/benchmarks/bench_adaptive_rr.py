"""Cost of measuring the fraction of active units in an update of DrQ-v2, and of random shifts read as a crop.

The update itself has no peer: facebookresearch/drqv2 is not on PyPI. Its form of the augmentation, bilinear sampling of a shifted grid,
is written out in :func:`poise.rl.augment.random_shifts.shift_images_by_grid`, which the crop is timed against.

uv run python tools/bench.py rl/adaptive-rr
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from poise.core.bench import Case, Peer, case, peer
from poise.rl import Batch, DrQV2Agent, NStepReplayBuffer
from poise.rl.augment.random_shifts import shift_images, shift_images_by_grid

PIXELS, ACTION = Box(0, 255, (9, 84, 84), np.uint8), Box(-1, 1, (6,))


def batch_of(size: int) -> Batch:
    """Random transitions of the published sizes."""
    generator = torch.Generator().manual_seed(0)

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, (size, 9, 84, 84), generator=generator, dtype=torch.uint8)

    return Batch(
        pixels(),
        2 * torch.rand(size, 6, generator=generator) - 1,
        torch.randn(size, generator=generator),
        torch.full((size,), 0.97),
        pixels(),
        torch.zeros(size, dtype=torch.bool),
        torch.arange(size),
    )


def updater(batch: Batch, monitor: tuple[str, ...]) -> Callable[[], float]:
    """An update whose fractions of active units are summed as tensors, as the controller does."""
    torch.manual_seed(0)
    agent, generator = DrQV2Agent(PIXELS, ACTION, monitor=monitor), torch.Generator().manual_seed(0)

    def update() -> float:
        metrics = agent.update(batch, 0, generator)
        return float(metrics["td_loss"])

    return update


def monitoring(size: int, monitor: tuple[str, ...]) -> Case:
    """An update at the published widths without and with the monitor."""
    batch = batch_of(size)
    name = f"DrQ-v2 update, batch {size}, 84 x 84, FAU of {' and '.join(monitor)}"
    return case(name, updater(batch, ()), updater(batch, monitor), repeats=5, warmup=1)


def replay() -> Case:
    """256 transitions of three stacked frames: gathered from stacks kept whole, and from the newest frames alone."""
    rng = np.random.default_rng(0)
    stacks, frames = (
        NStepReplayBuffer(2_000, PIXELS, ACTION, frame_stack=stack, sampling="uniform") for stack in (1, 3)
    )
    for step in range(1_000):
        observation = rng.integers(0, 256, PIXELS.shape, dtype=np.uint8)
        for buffer in (stacks, frames):
            buffer.add(observation, np.zeros(6), 0.0, observation, terminated=False, truncated=step % 500 == 499)
    generator = torch.Generator().manual_seed(0)
    return case(
        "replay, 256 transitions of 3 x 84 x 84 frames: whole stacks (plain) and newest frames only",
        lambda: stacks.sample(256, generator),
        lambda: frames.sample(256, generator),
    )


def augmentation(size: int) -> Peer:
    """Random shifts of a batch of bytes, ready for the encoder in floating point."""
    pixels = batch_of(size).observation
    shift = torch.randint(9, (size, 2), generator=torch.Generator().manual_seed(0))
    return peer(
        "drqv2 augmentation, grid_sample form",
        torch.__version__,
        f"random shift by up to 4 pixels of {size} x 9 x 84 x 84",
        lambda: shift_images(pixels, shift, 4).float(),
        lambda: shift_images_by_grid(pixels.float(), shift, 4),
    )


def bench() -> dict[str, Any]:
    """All cases."""
    return {
        "method": "rl/adaptive-rr",
        "cases": [
            monitoring(256, ("critic",)),
            monitoring(256, ("encoder", "actor", "critic")),
            replay(),
        ],
        "peers": [augmentation(256)],
    }
