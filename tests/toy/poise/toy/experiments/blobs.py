"""Two clouds of points and everything a run has to keep: several loops, shuffling, dropout, Adam, a schedule, plain tensors."""

import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from numpy.random import mtrand
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from poise.core import Penalty
from poise.core.lab import Claim, Experiment, Run
from poise.core.schedule import Linear


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        steps: steps of the second loop; the first has half as many.
        rate: learning rate.
        widths: widths of the hidden layers.
        loss: which loss to minimise.
        explode_at: the step whose loss is NaN; -1 for none.
        pause: seconds that a step waits, to leave time for killing it.
        published: read the points from ``--data``.
    """

    steps: int = 12
    rate: float = 0.01
    widths: tuple[int, ...] = (8,)
    loss: Literal["logistic", "squared"] = "logistic"
    explode_at: int = -1
    pause: float = 0.0
    published: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


class Decay(Penalty):
    """The squared norm of all weights."""

    def penalty(self, model: nn.Module) -> Tensor:
        return torch.stack([weight.square().sum() for weight in model.parameters()]).sum()


def read_points(folder: Path) -> tuple[Tensor, Tensor]:
    """Points and labels from points.txt, three numbers to a line."""
    rows = torch.tensor(
        [[float(cell) for cell in line.split()] for line in (folder / "points.txt").read_text().splitlines()]
    )
    if rows.dim() != 2 or rows.shape[1] != 3:
        raise ValueError(f"points.txt must hold three numbers to a line, got shape {tuple(rows.shape)}")
    return rows[:, :2], rows[:, 2]


def make_points(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(64).remainder(2).float()
    return torch.randn(64, 2, generator=generator) + labels[:, None], labels


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    x, y = run.load(read_points) if config.published else make_points(run.generator)
    sizes = (2, *config.widths)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2))]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.rate)
    penalty = Decay(Linear(0.0, 0.1, steps=10) if arm == "decay" else 0.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=run.generator)
    model, optimizer = run.prepare(model, optimizer)
    noise = {"total": torch.zeros(()), "last": torch.zeros(2)}

    for phase, count in (("warmup", config.steps // 2), ("train", config.steps)):
        for step in run.steps(count, name=phase, model=model, optimizer=optimizer, penalty=penalty, noise=noise):
            model.train()
            total = torch.zeros((), device=run.device)
            for inputs, labels in loader:
                inputs, labels = run.shard(inputs.to(run.device)), run.shard(labels.to(run.device))
                loss = fit(config, model(inputs).squeeze(-1), labels) + penalty(model)
                optimizer.zero_grad()
                run.backward(loss)
                optimizer.step()
                total += loss.detach() / len(loader)
            penalty.step()
            noise["last"] = torch.tensor([random.random(), mtrand.random_sample()])
            noise["total"] += noise["last"].sum()
            time.sleep(config.pause)
            run.log(step, loss=total / 0 * 0 if step == config.explode_at else total, weight=penalty.weight)

    run.save("weights", **model.state_dict())
    model.eval()
    with torch.no_grad():
        right = ((model(x.to(run.device)).squeeze(-1) > 0) == y.to(run.device).bool()).float().mean()
    return {"accuracy": right.item(), "norm": Decay()(model).item(), "noise": noise["total"].item()}


def fit(config: Config, scores: Tensor, labels: Tensor) -> Tensor:
    if config.loss == "logistic":
        return nn.functional.binary_cross_entropy_with_logits(scores, labels)
    return nn.functional.mse_loss(scores, labels)


EXPERIMENT = Experiment(
    method="toy/blobs",
    presets={"quick": Config(), "paper": Config(steps=20, published=True)},
    arms={"baseline": "no penalty", "decay": "with the penalty"},
    run=run,
    claims=(
        Claim(metric="norm", arm="decay", direction="lower", kind="mechanism", source="section 1"),
        Claim(metric="accuracy", arm="decay", direction="higher", kind="outcome", margin=0.9, source="section 2"),
    ),
)
