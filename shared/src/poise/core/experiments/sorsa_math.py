"""SORSA as published: a causal language model learns MetaMathQA, and solves the problems of GSM-8K and MATH.

The folder given with ``--data`` holds

- ``model/``: the model and its tokenizer as ``save_pretrained`` writes them (Llama-2-7B, Mistral-7B, Gemma-7B, ...);
- ``MetaMathQA-395K.json``: a list of ``{"query", "response"}``, as published by meta-math;
- ``gsm8k/test.jsonl``: lines of ``{"question", "answer"}``, as published by OpenAI, and ``MATH/test/<subject>/<number>.json``:
  ``{"problem", "solution"}``, as published by Hendrycks et al.; either may be missing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data.wheels import MissingDataError
from poise.core.experiments.sorsa_task import Task
from poise.core.gpu import derive_generator
from poise.core.lab import Run

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The prompt of Alpaca (Taori et al., 2023)."""

IGNORED = -100
"""Label of the tokens that do not count in the loss."""

FILE = "MetaMathQA-395K.json"


@dataclass(frozen=True)
class Problem:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class MathData:
    """What is in the folder.

    Attributes:
        model: folder of the model.
        pairs: queries and responses to learn.
        problems: test problems by name of the set.
    """

    model: Path
    pairs: tuple[tuple[str, str], ...]
    problems: dict[str, tuple[Problem, ...]]


def read_math(folder: Path, examples: int = 100_000) -> MathData:
    """MetaMathQA, the tests and a language model, in one folder.

    Args:
        folder: see the module's text.
        examples: how many of the first rows to learn.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a file has another content than expected.
    """
    if not (folder / "model" / "config.json").is_file():
        raise FileNotFoundError("no model/config.json: save a causal language model there with save_pretrained")
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"no {FILE}")
    rows = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(r, dict) and {"query", "response"} <= r.keys() for r in rows)
    ):
        raise ValueError(f"{FILE} must be a list of objects with 'query' and 'response'")
    pairs = tuple((str(row["query"]), str(row["response"])) for row in rows[:examples])
    problems = {
        "gsm8k": read_gsm8k(folder / "gsm8k" / "test.jsonl"),
        "math": read_competition(folder / "MATH" / "test"),
    }
    problems = {name: found for name, found in problems.items() if found}
    if not problems:
        raise FileNotFoundError("neither gsm8k/test.jsonl nor MATH/test: there is nothing to test on")
    return MathData(folder / "model", pairs, problems)


def read_gsm8k(file: Path) -> tuple[Problem, ...]:
    """GSM-8K as published, whose answers end with ``#### n``; nothing if the file does not exist."""
    if not file.is_file():
        return ()
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "question" not in row or "####" not in row.get("answer", ""):
            raise ValueError(f"{file.name}, line {number}: expected 'question', and 'answer' with '#### n'")
        found.append(Problem(row["question"], normal(row["answer"].rpartition("####")[2])))
    return tuple(found)


def read_competition(folder: Path) -> tuple[Problem, ...]:
    """MATH as published, whose solutions box the answer; nothing if the folder does not exist."""
    found = []
    for file in sorted(folder.glob("*/*.json")) if folder.is_dir() else ():
        row = json.loads(file.read_text(encoding="utf-8"))
        answer = boxed(row.get("solution", ""))
        if "problem" not in row or answer is None:
            raise ValueError(f"{file}: expected 'problem', and 'solution' with a \\boxed answer")
        found.append(Problem(row["problem"], normal(answer)))
    return tuple(found)


def math_task(run: Run, *, examples: int, tokens: int, batch: int, answers: int, problems: int) -> Task:
    """The language model and its data."""
    data = run.load(partial(read_math, examples=examples))
    model, tokenizer = load_language_model(data.model, run.device)

    def batches(steps: range) -> Iterator[dict[str, Tensor]]:
        for step in steps:
            epoch, place = divmod(step * batch, max(batch, len(data.pairs) // batch * batch))
            order = torch.randperm(len(data.pairs), generator=derive_generator(run.seed, "rows", epoch))
            rows = run.shard(order[place : place + batch])
            yield collate([encode(tokenizer, data.pairs[row], tokens) for row in rows.tolist()], run.device)

    def judge(net: nn.Module) -> dict[str, float]:
        metrics = {}
        for name, found in data.problems.items():
            chosen = found[: problems or None]
            solved = [
                normal(answer_in(reply(net, tokenizer, p.question, answers, run.device))) == p.answer for p in chosen
            ]
            metrics[f"{name}_accuracy"] = sum(solved) / len(solved)
        return metrics

    return Task(model, TARGETS, (), batches, response_loss, judge)


def load_language_model(folder: Path, device: torch.device) -> tuple[nn.Module, Any]:
    """The model, in bfloat16 on a GPU, and its tokenizer.

    Raises:
        MissingDataError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDataError("this needs transformers, which is not installed: pip install transformers") from error
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = cast(nn.Module, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True))
    return model.to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode(tokenizer: Any, pair: tuple[str, str], tokens: int) -> tuple[list[int], list[int]]:
    """Tokens of the prompt with the response, and the labels: the response and the end of the text."""
    prompt_text = PROMPT.format(instruction=pair[0])
    prompt = [token for token in tokenizer(prompt_text)["input_ids"] if token != tokenizer.eos_token_id]
    whole = tokenizer(f"{prompt_text} {pair[1]}")["input_ids"]
    if tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
    return whole[:tokens], labels[:tokens]


def collate(rows: list[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Rows of one length; what is added at the end does not count."""
    length = max(len(whole) for whole, _ in rows)
    ids = torch.tensor([whole + [0] * (length - len(whole)) for whole, _ in rows])
    labels = torch.tensor([kept + [IGNORED] * (length - len(kept)) for _, kept in rows])
    mask = torch.tensor([[1] * len(whole) + [0] * (length - len(whole)) for whole, _ in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def response_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the response's tokens; zero, with a gradient of zero, if the prompts fill the whole length."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


@torch.no_grad()
def reply(net: Any, tokenizer: Any, question: str, most: int, device: torch.device) -> str:
    """The most likely response, token by token."""
    prompt = PROMPT.format(instruction=question) + " Let's think step by step."
    given = tokenizer(prompt, return_tensors="pt").to(device)
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = net.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def answer_in(text: str) -> str:
    """The answer that a response gives: after "The answer is:", as MetaMathQA writes it, or boxed, or the last number."""
    _, found, after = text.rpartition("The answer is:")
    if found:
        return after.strip().splitlines()[0] if after.strip() else ""
    inside = boxed(text)
    if inside is not None:
        return inside
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return str(numbers[-1]) if numbers else ""


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` holds, with its braces matched."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


def normal(answer: str) -> str:
    """An answer without what does not change it: spaces, dollar signs, thousands separators, a final period, ``.00``."""
    text = re.sub(r"\\left|\\right|\\!|\\,|\\%|%|\$|\s", "", answer).rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)
