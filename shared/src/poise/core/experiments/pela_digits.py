"""PELA on digits: a small transformer that is trained here, compressed, repaired, and fine-tuned on MNIST."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data import Dataset, digits, mnist5k
from poise.core.experiments.pela_problem import Batch, Problem, cosine
from poise.core.experiments.published_images import InMemory, steps_per_epoch, training_batches
from poise.core.lab import Run

if TYPE_CHECKING:
    from poise.core.experiments.pela import Config


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside an identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitTransformer(nn.Module):
    """Grey images of 8 x 8 pixels as 16 tokens."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(F.unfold(images, 2, stride=2).mT) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def digit_problem(config: "Config", run: Run) -> Problem:
    """A transformer trained on digits, the same for all arms of a seed."""
    train, test = digits().split(test=0.2, seed=run.seed)
    images = InMemory.of(train)
    per_pass = steps_per_epoch(images, config.batch)
    transfer = mnist_at_8(config, run)
    teacher = DigitTransformer().to(run.device)
    learn(config, run, teacher, images, config.teacher_passes * per_pass, config.teacher_rate, "teacher")

    def batches(steps: range) -> Iterator[Batch]:
        for x, y in training_batches(images, config.batch, steps, seed=run.seed, device=run.device):
            yield Batch({"images": x}, y)

    def measure(net: nn.Module, name: str) -> dict[str, float]:
        return {"accuracy": accuracy(net, test, run), "transfer": fine_tuned(config, run, net, transfer, name)}

    return Problem(
        teacher=teacher,
        blocks=("blocks.*",),
        skip=("head", "patch_embed"),
        steps=config.passes * per_pass,
        rate=config.learning_rate,
        schedule=cosine(config.passes * per_pass),
        batches=batches,
        task_loss=cross_entropy,
        unseen=lambda: iter([Batch({"images": test.inputs.to(run.device)}, None)]),
        measure=measure,
    )


def cross_entropy(net: nn.Module, batch: Batch, output: Any) -> Tensor:
    assert batch.target is not None
    return F.cross_entropy(output, batch.target)


def mnist_at_8(config: "Config", run: Run) -> tuple[Dataset, Dataset]:
    train, test = mnist5k().split(test=config.transfer_test, seed=run.seed)
    train = train.split(test=config.transfer_train, seed=run.seed).test
    small = [
        replace(part, inputs=F.interpolate(part.inputs, (8, 8), mode="bilinear", antialias=True))
        for part in (train, test)
    ]
    return small[0], small[1]


def learn(config: "Config", run: Run, net: nn.Module, images: InMemory, steps: int, rate: float, name: str) -> None:
    """Ordinary training on labelled images."""
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=config.weight_decay)
    model, optimizer = run.prepare(net, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    batches = None
    for step in run.steps(steps, name=name, net=net, optimizer=optimizer, schedule=schedule):
        batches = batches or training_batches(
            images, config.batch, range(step, steps), seed=run.seed, device=run.device
        )
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            run.log(step, loss=loss)
    net.eval()


def fine_tuned(config: "Config", run: Run, net: nn.Module, data: tuple[Dataset, Dataset], name: str) -> float:
    """Accuracy on MNIST after a copy was fine-tuned."""
    tuned, train = copy.deepcopy(net), InMemory.of(data[0])
    steps = config.transfer_passes * steps_per_epoch(train, config.batch)
    learn(config, run, tuned, train, steps, config.learning_rate, f"transfer_{name}")
    return accuracy(tuned, data[1], run)


@torch.no_grad()
def accuracy(net: nn.Module, data: Dataset, run: Run) -> float:
    net.eval()
    return float((net(data.inputs.to(run.device)).argmax(1).cpu() == data.targets).double().mean())
