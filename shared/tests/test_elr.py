"""Early-learning regularization against the authors' code, and its laws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from poise.core.labels.elr import ELRLoss, detect_label_errors, elr_regularizer
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, TopKRows

GOLDEN = Path(__file__).parent / "golden" / "elr"
DOUBLE = DenseRows(torch.float64)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.tensor(file[key]) for key in file}


def criterion(examples: int, classes: int, lam: float = 3.0, beta: float = 0.7) -> ELRLoss:
    return ELRLoss(examples, classes, lam, beta, memory=SampleBank(examples, classes, storage=DOUBLE))


def rows(loss: ELRLoss) -> Tensor:
    return loss.memory.read(torch.arange(len(loss.memory)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["elr_steps.npz", "elr_saturated.npz"])
def test_agrees_with_the_authors_code_step_by_step(name: str) -> None:
    stored = golden(name)
    loss = criterion(
        int(stored["num_examples"]), stored["logits"].shape[-1], float(stored["lam"]), float(stored["beta"])
    )
    for step in range(int(stored["steps"])):
        logits = stored["logits"][step].requires_grad_()
        value = loss(logits, stored["labels"][step], stored["index"][step])
        (gradient,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(value, stored["loss"][step], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, stored["grad_logits"][step], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rows(loss), stored["target_after"][step], rtol=1e-10, atol=1e-10)


def test_without_weight_it_is_cross_entropy() -> None:
    logits = randn(6, 4).requires_grad_()
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    ours = criterion(9, 4, lam=0)(logits, labels, torch.arange(6))
    plain = F.cross_entropy(logits, labels)
    assert ours.item() == plain.item()
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)]
    assert torch.equal(*gradients)


def test_one_hot_labels_are_labels() -> None:
    logits, labels = randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    hard, soft = criterion(6, 4), criterion(6, 4)
    torch.testing.assert_close(
        soft(logits, F.one_hot(labels, 4).double(), torch.arange(6)), hard(logits, labels, torch.arange(6))
    )


def test_only_rows_of_the_batch_change_and_sums_grow_geometrically() -> None:
    loss = criterion(10, 4, beta=0.7)
    index = torch.tensor([2, 7, 5])
    for visits in range(1, 5):
        loss(randn(3, 4, seed=visits), torch.zeros(3, dtype=torch.long), index)
        expected = torch.zeros(10, dtype=torch.float64)
        expected[index] = 1 - 0.7**visits
        torch.testing.assert_close(rows(loss).sum(1), expected, rtol=1e-12, atol=1e-12)


def test_memory_approaches_a_constant_prediction_at_the_rate_beta() -> None:
    loss = criterion(1, 5, beta=0.6)
    logits = randn(1, 5)
    for visits in range(1, 8):
        loss(logits, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(rows(loss) - logits.softmax(1), -(0.6**visits) * logits.softmax(1))


def test_without_momentum_the_target_is_the_current_prediction() -> None:
    loss = criterion(3, 4, beta=0)
    for seed in range(2):
        logits = randn(3, 4, seed=seed)
        loss(logits, torch.zeros(3, dtype=torch.long), torch.arange(3))
        torch.testing.assert_close(rows(loss), logits.softmax(1))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_gradient_of_the_regularizer_is_the_closed_form(classes: int, seed: int) -> None:
    logits = randn(5, classes, seed=seed).requires_grad_()
    target = 0.8 * randn(5, classes, seed=seed + 1).softmax(1)
    (gradient,) = torch.autograd.grad(elr_regularizer(logits.softmax(1), target, "sum"), logits)
    p = logits.detach().softmax(1)
    inner = (p * target).sum(1, keepdim=True)
    closed = p * ((target[:, None, :] - target[:, :, None]) * p[:, None, :]).sum(2) / (1 - inner)
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=1e-12)


def test_regularizer_pulls_towards_the_remembered_class_and_not_the_label() -> None:
    """The remembered class is 0: with label 0 both parts pull alike, with label 1 against one another."""
    target = torch.tensor([[0.8, 0.05, 0.05]], dtype=torch.float64)
    logits = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    (pull,) = torch.autograd.grad(elr_regularizer(logits.softmax(1), target), logits)
    inner = [
        (pull * torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), logits)[0]).sum().item()
        for label in (0, 1)
    ]
    assert inner[0] > 0 > inner[1]


def test_no_gradient_reaches_the_memory() -> None:
    loss = criterion(3, 4)
    logits = randn(3, 4).requires_grad_()
    loss(logits, torch.zeros(3, dtype=torch.long), torch.arange(3)).backward()
    assert not rows(loss).requires_grad
    target = rows(loss).requires_grad_()
    elr_regularizer(randn(3, 4).requires_grad_().softmax(1), target).backward()
    assert target.grad is None


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_stays_finite_for_saturated_predictions_in_float32(scale: float) -> None:
    loss = ELRLoss(8, 3, lam=7.0, beta=0.9)
    logits = (scale * randn(8, 3).sign()).float().requires_grad_()
    for _ in range(60):
        value = loss(logits, torch.zeros(8, dtype=torch.long), torch.arange(8))
    value.backward()
    assert value.isfinite()
    assert loss.regularizer is not None
    assert loss.regularizer.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (1 - (loss.memory.read(torch.arange(8)) * logits.softmax(1).clamp(1e-4, 1 - 1e-4)).sum(1) > 0).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_confident_and_remembered_is_the_least_value(classes: int) -> None:
    e = 1e-4
    probs = torch.full((1, classes), e, dtype=torch.float64)
    probs[0, 0] = 1 - e
    value = elr_regularizer(probs, probs / probs.sum()).item()
    closed = math.log(1 - ((1 - e) ** 2 + (classes - 1) * e**2) / (1 + (classes - 2) * e))
    assert value == pytest.approx(closed, rel=1e-9)
    if classes == 2:
        assert value == pytest.approx(math.log(2 * e - 2 * e**2), rel=1e-9)


def test_permuting_the_classes_changes_nothing() -> None:
    logits, labels, index = randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0]), torch.arange(6)
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    straight, permuted = criterion(6, 4), criterion(6, 4)
    for _ in range(2):
        a, b = straight(logits, labels, index), permuted(logits[:, order], inverse[labels], index)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(rows(straight)[:, order], rows(permuted))


def test_of_an_example_twice_in_a_batch_the_last_prediction_counts() -> None:
    loss = criterion(3, 4, beta=0.5)
    logits = randn(2, 4)
    loss(logits, torch.tensor([0, 1]), torch.tensor([1, 1]))
    torch.testing.assert_close(rows(loss)[1], 0.5 * logits[1].softmax(0))


def test_evaluation_mode_reads_and_does_not_write() -> None:
    loss = criterion(4, 3)
    index, labels = torch.arange(4), torch.zeros(4, dtype=torch.long)
    loss(randn(4, 3), labels, index)
    before = rows(loss)
    value = loss.eval()(randn(4, 3, seed=1), labels, index)
    assert torch.equal(rows(loss), before)
    expected = elr_regularizer(randn(4, 3, seed=1).softmax(1).clamp(1e-4, 1 - 1e-4), before)
    torch.testing.assert_close(value, F.cross_entropy(randn(4, 3, seed=1), labels) + 3 * expected)


def test_a_resumed_run_continues_identically() -> None:
    index, labels = torch.arange(4), torch.zeros(4, dtype=torch.long)
    first, second = ELRLoss(4, 3), ELRLoss(4, 3)
    first(randn(4, 3).float(), labels, index)
    second.load_state_dict(first.state_dict())
    values = [loss(randn(4, 3, seed=1).float(), labels, index) for loss in (first, second)]
    assert torch.equal(*values)
    assert torch.equal(rows(first), rows(second))


def test_compressed_memory_for_a_thousand_classes_stays_close() -> None:
    """Top-16 storage of peaked predictions: the loss differs by less than what is not among them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 1000, generator=generator)
    logits[torch.arange(32), torch.randint(1000, (32,), generator=generator)] += 12
    labels, index = torch.randint(1000, (32,), generator=generator), torch.arange(32)
    losses = {
        name: ELRLoss(64, 1000, memory=SampleBank(64, 1000, storage=storage))
        for name, storage in (("all", DenseRows()), ("half", DenseRows(torch.float16)), ("top", TopKRows(16)))
    }
    for _ in range(4):
        values = {name: loss(logits, labels, index).item() for name, loss in losses.items()}
    assert values["half"] == pytest.approx(values["all"], rel=1e-3)
    assert values["top"] == pytest.approx(values["all"], rel=1e-2)
    assert losses["top"].memory.nbytes < losses["all"].memory.nbytes / 40


def test_errors_are_where_memory_and_label_disagree() -> None:
    loss = criterion(5, 3)
    confident = 5 * torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]]
    loss(confident, torch.tensor([0, 1, 2, 1]), torch.arange(4))
    given = torch.tensor([0, 2, 2, 0, 1])  # the last was never seen
    suspect, corrected = detect_label_errors(loss.memory, given, chunk=2)
    assert suspect.tolist() == [False, True, False, True, False]
    assert corrected.tolist() == [0, 1, 2, 1, 1]
    with pytest.raises(ValueError, match="label for each of the 5"):
        detect_label_errors(loss.memory, given[:3])


def test_bad_input_is_refused() -> None:
    loss = ELRLoss(5, 3)
    logits, labels, index = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
    for call, words in (
        (lambda: loss(logits, labels, torch.tensor([0, 5])), r"index must lie in 0\.\.4"),
        (lambda: loss(torch.zeros(2, 4), labels, index), r"logits must have shape \(batch, 3\)"),
        (lambda: loss(logits, torch.full((2, 4), 0.25), index), r"labels must have shape \(2,\) or \(2, 3\)"),
        (lambda: loss(logits * torch.nan, labels, index), "not finite"),
        (lambda: ELRLoss(5, 3, beta=1.0), r"beta must lie in \[0, 1\)"),
        (lambda: ELRLoss(5, 3, lam=-1.0), "lam must not be negative"),
        (lambda: ELRLoss(5, 3, clamp=0.5), "clamp must lie"),
        (lambda: ELRLoss(5, 3, memory=SampleBank(5, 4)), "memory must hold 5 rows"),
        (lambda: elr_regularizer(torch.zeros(2, 3), torch.zeros(2, 4)), "the shape of probs"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="index must be integer"):
        loss(logits, labels, torch.tensor([0.0, 1.0]))
    assert not loss.memory.written.any()  # nothing was written on the way


def test_early_learning_and_memorization_of_two_noisy_clusters() -> None:
    """The paper's linear model: gradient descent first points the right way, even for flipped labels, and then learns them all.

    x = y* v + sigma z with as many dimensions as examples, so that any labelling can be fitted; 30 % of the labels are flipped.
    """
    count, sigma, flips = 400, 0.3, 0.3
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(2, (count,), generator=generator).double() * 2 - 1
    flipped = torch.rand(count, generator=generator) < flips
    given = torch.where(flipped, -true, true)
    direction = F.one_hot(torch.tensor(0), count).double()
    x = true[:, None] * direction + sigma * torch.randn(count, count, generator=generator, dtype=torch.float64)

    weights = torch.zeros(count, dtype=torch.float64)
    cosines, right_on_flipped, fitted, share_of_flipped = [], [], [], []
    for _ in range(8_000):
        pull = given * torch.sigmoid(-given * (x @ weights)) / count
        descent = x.T @ pull
        cosines.append(F.cosine_similarity(descent, direction, dim=0).item())
        parts = [(x[part].T @ pull[part]).norm() for part in (flipped, ~flipped)]
        share_of_flipped.append((parts[0] / (parts[0] + parts[1])).item())
        weights = weights + 0.5 * descent
        prediction = (x @ weights).sign()
        right_on_flipped.append((prediction == true)[flipped].double().mean().item())
        fitted.append((prediction == given).double().mean().item())
        if fitted[-1] == 1:
            break

    assert cosines[0] > 0.7
    assert cosines[-1] < cosines[0] / 2
    assert max(right_on_flipped[:20]) > 0.9
    assert fitted[-1] == 1
    assert right_on_flipped[-1] == 0
    assert share_of_flipped[-1] > share_of_flipped[0] + 0.1
