"""SORSA on text: MiniLM, a pretrained sentence encoder, learns to tell the modules of NumPy and SciPy by their docstrings."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data import docstring_corpus
from poise.core.experiments.pela_text import chunks, load_encoder, pooled
from poise.core.experiments.sorsa_task import Task
from poise.core.gpu import derive_generator
from poise.core.lab import Run

Batch = tuple[dict[str, Tensor], Tensor]

TARGETS = ("attention.self.query", "attention.self.key", "attention.self.value", "output.dense", "intermediate.dense")
"""All projections of attention and MLP of a BERT encoder."""

HEAD_SCALE = 20.0
"""Vectors of length 1 are scaled by this before the head, so that its logits can differ at the learning rates of adapters."""


class Classifier(nn.Module):
    """The encoder and a linear head on its sentence vector."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**inputs).last_hidden_state
        return self.head(HEAD_SCALE * pooled(states, inputs["attention_mask"]))


def text_task(run: Run, *, train: int, test: int, tokens: int, batch: int) -> Task:
    """The encoder with a new head, and the docstrings; the same split and head for all arms of a seed."""
    encoder, tokenize = load_encoder(tokens, run.device)
    split = docstring_corpus().split(train=train, test=test, seed=run.seed)
    torch.manual_seed(run.seed)  # the same head, whatever the encoder drew when it was loaded
    model = Classifier(encoder, 384, len(split.train.classes)).to(run.device)

    def inputs_of(texts: Sequence[str], targets: Tensor) -> Batch:
        return tokenize(texts), targets.to(run.device)

    def batches(steps: range) -> Iterator[Batch]:
        for step in steps:
            generator = derive_generator(run.seed, "texts", step)
            rows = run.shard(torch.randperm(len(split.train), generator=generator)[:batch])
            yield inputs_of([split.train.texts[row] for row in rows.tolist()], split.train.targets[rows])

    def loss(net: nn.Module, given: Batch) -> Tensor:
        return F.cross_entropy(net(given[0]), given[1])

    @torch.no_grad()
    def judge(net: nn.Module) -> dict[str, float]:
        found = torch.cat([net(tokenize(part)).argmax(1).cpu() for part in chunks(split.test.texts)])
        return {"accuracy": float((found == split.test.targets).double().mean())}

    return Task(model, TARGETS, ("head",), batches, loss, judge)
