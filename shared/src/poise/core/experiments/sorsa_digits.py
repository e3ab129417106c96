"""SORSA on digits: a small network that learned digits lying on their side learns to read them upright."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data import mnist5k
from poise.core.experiments.sorsa_task import Task
from poise.core.gpu import derive_generator
from poise.core.lab import Run


def digits_task(run: Run, *, pretraining: int, test: int, batch: int) -> Task:
    """A perceptron that has learned digits turned by a quarter, and the digits upright."""
    train, held_out = mnist5k().split(test=test, seed=run.seed)
    inputs, targets = train.inputs.to(run.device), train.targets.to(run.device)
    unseen, answers = held_out.inputs.to(run.device), held_out.targets.to(run.device)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    model = nn.Sequential(nn.Flatten(), *layers).to(run.device)

    def batches(steps: range, name: str = "batch") -> Iterator[tuple[Tensor, Tensor]]:
        for step in steps:
            rows = torch.randint(len(inputs), (batch,), generator=derive_generator(run.seed, name, step))
            yield inputs[run.shard(rows)], targets[run.shard(rows)]

    def loss(net: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(given[0]), given[1])

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in run.steps(pretraining, name="pretraining", model=model, optimizer=optimizer):
        images, labels = next(batches(range(step, step + 1), "pretraining"))
        value = loss(model, (images.rot90(1, (2, 3)), labels))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 100 == 0:
            run.log(step, loss=value)

    @torch.no_grad()
    def judge(net: nn.Module) -> dict[str, float]:
        return {"accuracy": float((net(unseen).argmax(1) == answers).double().mean())}

    @torch.no_grad()
    def probe(net: nn.Module) -> float:
        return float(F.cross_entropy(net(inputs), targets))

    return Task(model, ("1", "3"), (), batches, loss, judge, probe)
