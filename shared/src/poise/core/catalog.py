"""The record that describes a method, and what poise.core itself offers. Imports no torch, so that ``poise list`` is instant."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["penalty", "loss", "solver", "layer", "parametrization", "optimizer", "adapter", "training", "network"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a reader needs to choose a method, and what the command line and the docs need to find it.

    Attributes:
        slug: the method's name on the command line, ``monge-gap`` in ``ot/monge-gap``.
        package: the member that holds it, ``ot``; ``core`` for poise.core.
        title: its name in the literature.
        kind: what a user holds in hand.
        problem: the problem it solves, as its user would say it ("learn a transport map for a cost of my choice").
        summary: one sentence, what it does about that.
        formula: LaTeX without delimiters.
        usage: a few lines of Python that run as they are.
        api: dotted names of the public objects, most important first.
        presets: names of the experiment's presets, ``quick`` first.
        arms: names of the experiment's arms, ``baseline`` first.
        paper: authors, title, venue, year, in one line.
        url: where the paper is.
        bibtex: the BibTeX entry.
        tags: words people search for.
    """

    slug: str
    package: str
    title: str
    kind: Kind
    problem: str
    summary: str
    formula: str
    usage: str
    api: tuple[str, ...]
    presets: tuple[str, ...]
    arms: tuple[str, ...]
    paper: str
    url: str
    bibtex: str
    tags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The full name, ``ot/monge-gap``."""
        return f"{self.package}/{self.slug}"

    @property
    def experiment(self) -> str:
        """The module whose ``EXPERIMENT`` shows the method at work."""
        return f"poise.{self.package}.experiments.{self.slug.replace('-', '_')}"


METHODS: tuple[Method, ...] = (
    Method(
        slug="elr",
        package="core",
        title="Early-learning regularization (ELR, ELR+)",
        kind="loss",
        problem="Train a classifier when many training labels are wrong.",
        summary=(
            "A running average of the model's own predictions for each example remembers what it knew before it began to memorise, "
            "and a term that pulls it there cancels the gradient of wrong labels."
        ),
        formula=(
            r"L = \frac1B \sum_i CE(z_i, y_i) + \lambda \frac1B \sum_i \log(1 - \langle p_i, t_i \rangle), \qquad "
            r"t_i \leftarrow \beta t_i + (1 - \beta) p_i"
        ),
        usage="""
import torch
from torch.utils.data import DataLoader, TensorDataset
from poise.core import ELRLoss, IndexedDataset, detect_label_errors

x, y = torch.randn(200, 8), torch.randint(3, (200,))
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
criterion = ELRLoss(num_examples=len(x), num_classes=3, lam=3.0, beta=0.7)

for inputs, labels, index in DataLoader(IndexedDataset(TensorDataset(x, y)), batch_size=50, shuffle=True):
    loss = criterion(model(inputs), labels, index)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

suspect, corrected = detect_label_errors(criterion.memory, y)
""",
        api=(
            "poise.core.ELRLoss",
            "poise.core.elr_regularizer",
            "poise.core.detect_label_errors",
            "poise.core.ELRPlusTrainer",
            "poise.core.ELRPlusLoss",
            "poise.core.WeightAverage",
            "poise.core.sigmoid_rampup",
            "poise.core.symmetric_noise",
            "poise.core.asymmetric_noise",
            "poise.core.IndexedDataset",
        ),
        presets=("quick", "paper", "cifar10-asymmetric", "cifar100"),
        arms=("baseline", "dropout", "target_loss", "elr", "elr_plus"),
        paper=(
            "S. Liu, J. Niles-Weed, N. Razavian, C. Fernandez-Granda, Early-Learning Regularization Prevents Memorization of Noisy "
            "Labels, NeurIPS 2020"
        ),
        url="https://arxiv.org/abs/2007.00151",
        bibtex=r"""
@inproceedings{liu2020early,
  title     = {Early-Learning Regularization Prevents Memorization of Noisy Labels},
  author    = {Liu, Sheng and Niles-Weed, Jonathan and Razavian, Narges and Fernandez-Granda, Carlos},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {33},
  year      = {2020},
}
""",
        tags=("noisy labels", "memorization", "label errors", "mixup", "weight averaging", "classification"),
    ),
)
