"""Progressive self-knowledge distillation against the authors' code, and its laws."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.labels.calibration import aurc, eaurc, expected_calibration_error
from poise.core.labels.mixing import Mix
from poise.core.labels.ps_kd import PSKDLoss, progressive_alpha, ps_kd_loss
from poise.core.labels.soft_targets import soft_cross_entropy, soft_labels
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, TopKRows

GOLDEN = Path(__file__).parent / "golden" / "ps-kd"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.tensor(file[key]) for key in file}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def criterion(examples: int, classes: int, alpha_T: float = 0.8, epochs: int = 4, **options: float | str) -> PSKDLoss:
    memory = SampleBank(examples, classes, storage=DenseRows(torch.float64))
    return PSKDLoss(examples, classes, alpha_T, epochs, memory=memory, **options)


def in_epoch(loss: PSKDLoss, epoch: int, past: Tensor) -> PSKDLoss:
    """The loss in an epoch, after all examples got a prediction."""
    loss.set_epoch(epoch)
    loss.memory.write(torch.arange(len(past)), past)
    return loss


def test_agrees_with_the_authors_loss_and_gradient() -> None:
    stored = golden("loss_metrics.npz")
    loss = in_epoch(criterion(200, 10, float(stored["alpha"]), 2, schedule="constant"), 1, stored["past_probs"])
    logits, labels, index = stored["logits"].requires_grad_(), stored["labels"], torch.arange(200)
    torch.testing.assert_close(
        loss.soft_targets(labels, index, dtype=torch.float64), stored["soft_targets"], rtol=1e-9, atol=1e-9
    )
    value = loss(logits, labels, index)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, stored["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, stored["grad_logits"], rtol=1e-9, atol=1e-9)
    function = ps_kd_loss(logits, labels, stored["past_probs"], float(stored["alpha"]))
    torch.testing.assert_close(function, stored["loss"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["loss_metrics.npz", "train_small.npz"])
def test_agrees_with_the_authors_metrics(name: str) -> None:
    stored = golden(name)
    probs = stored["final_probs"] if "final_probs" in stored else stored["logits"].softmax(1)
    labels = stored["labels"]
    assert 100 * expected_calibration_error(probs, labels) == pytest.approx(float(stored["ece_percent"]), abs=1e-8)
    assert 1000 * aurc(probs, labels) == pytest.approx(float(stored["aurc_x1000"]), abs=1e-8)
    assert 1000 * eaurc(probs, labels) == pytest.approx(float(stored["eaurc_x1000"]), abs=1e-8)


def linear(stored: dict[str, Tensor]) -> tuple[nn.Linear, torch.optim.SGD]:
    model = nn.Linear(5, 6).double()
    with torch.no_grad():
        model.weight.copy_(stored["weight_start"])
        model.bias.zero_()
    return model, torch.optim.SGD(model.parameters(), lr=float(stored["lr"]), momentum=0.9, nesterov=True)


def test_agrees_with_a_whole_training_of_the_authors() -> None:
    stored = golden("train_small.npz")
    model, optimizer = linear(stored)
    loss = criterion(24, 6, float(stored["alpha_T"]), 4)
    for epoch, order in enumerate(stored["order"]):
        loss.set_epoch(epoch)
        assert loss.alpha == pytest.approx(float(stored["alpha_t"][epoch]))
        for index in order.split(int(stored["batch_size"])):
            value = loss(model(stored["x"][index]), stored["labels"][index], index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        weights = torch.cat([model.weight, model.bias[:, None]], 1).detach()
        torch.testing.assert_close(weights, stored["weight_bias_after"][epoch], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            loss.memory.read(torch.arange(24)), stored["predictions_after"][epoch], rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(model(stored["x"]).softmax(1).detach(), stored["final_probs"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha_T", "epoch"), [(0.0, 3), (0.8, 0)])
def test_without_weight_and_in_the_first_epoch_it_is_cross_entropy(alpha_T: float, epoch: int) -> None:
    logits, labels = randn(6, 4).requires_grad_(), torch.tensor([0, 3, 1, 2, 2, 0])
    loss = in_epoch(criterion(6, 4, alpha_T), epoch, randn(6, 4, seed=1).softmax(1))
    ours, plain = loss(logits, labels, torch.arange(6)), F.cross_entropy(logits, labels)
    assert ours.item() == plain.item()
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (ours, plain)))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.floats(0.1, 1.0), st.integers(1, 3), st.integers(0, 1000))
def test_loss_and_gradient_are_those_of_the_soft_targets(classes: int, alpha_T: float, epoch: int, seed: int) -> None:
    logits = randn(5, classes, seed=seed).requires_grad_()
    labels = torch.arange(5) % classes
    past = randn(5, classes, seed=seed + 1).softmax(1)
    loss = in_epoch(criterion(5, classes, alpha_T), epoch, past)
    target = loss.soft_targets(labels, torch.arange(5), dtype=torch.float64)
    torch.testing.assert_close(target.sum(1), torch.ones(5, dtype=torch.float64))
    assert not target.requires_grad
    value = loss(logits, labels, torch.arange(5))
    torch.testing.assert_close(value, F.cross_entropy(logits, target))
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, (logits.softmax(1) - target).detach() / 5)


def test_a_past_like_the_present_scales_the_gradient() -> None:
    logits, labels = randn(6, 4).requires_grad_(), torch.tensor([0, 3, 1, 2, 2, 0])
    value = ps_kd_loss(logits, labels, logits.softmax(1), 0.3)
    (ours,) = torch.autograd.grad(value, logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(ours, 0.7 * plain)


def test_gradient_norm_measures_the_gain_in_confidence() -> None:
    """|grad|_1 is that of cross-entropy times 1 - a (1 - P_gt) / (1 - p_gt) where p_k >= a P_k for the wrong classes."""
    logits, labels, alpha = randn(400, 5).requires_grad_(), torch.arange(400) % 5, 0.4
    past = (randn(400, 5, seed=1) + logits.detach()).softmax(1)
    norms = [
        torch.autograd.grad(loss, logits)[0].abs().sum(1)
        for loss in (
            ps_kd_loss(logits, labels, past, alpha, reduction="sum"),
            F.cross_entropy(logits, labels, reduction="sum"),
        )
    ]
    probs, wrong = logits.softmax(1).detach(), F.one_hot(labels, 5) == 0
    valid = ((probs >= alpha * past) | ~wrong).all(1)
    assert 50 < valid.sum() < 400
    right = labels[:, None]
    closed = 1 - alpha * (1 - past.gather(1, right)) / (1 - probs.gather(1, right))
    torch.testing.assert_close((norms[0] / norms[1])[valid], closed.squeeze(1)[valid], rtol=1e-9, atol=1e-9)


def test_a_uniform_past_is_label_smoothing() -> None:
    logits, labels = randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    value = ps_kd_loss(logits, labels, torch.full((6, 4), 0.25).double(), 0.2)
    torch.testing.assert_close(value, F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_unseen_examples_keep_their_labels_in_later_epochs() -> None:
    loss = criterion(6, 4)
    loss.memory.write(torch.tensor([1]), randn(1, 4).softmax(1))
    loss.set_epoch(2)
    targets = loss.soft_targets(torch.tensor([0, 3]), torch.tensor([0, 1]))
    assert targets[0].tolist() == [1, 0, 0, 0]
    assert targets[1, 3] < 1


def test_smoothed_labels_are_mixed_with_the_past() -> None:
    labels, index = torch.tensor([0, 3]), torch.arange(2)
    past = randn(2, 4).softmax(1)
    loss = in_epoch(criterion(2, 4, label_smoothing=0.1), 1, past)
    expected = 0.6 * soft_labels(labels, 4, smoothing=0.1, dtype=torch.float64) + 0.4 * past
    torch.testing.assert_close(loss.soft_targets(labels, index, dtype=torch.float64), expected)
    torch.testing.assert_close(loss(randn(2, 4), labels, index), F.cross_entropy(randn(2, 4), expected))
    one_hot = F.one_hot(labels, 4).double()
    torch.testing.assert_close(loss.soft_targets(one_hot, index, dtype=torch.float64), expected)
    loss.set_epoch(0)
    plain = F.cross_entropy(randn(2, 4), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss(randn(2, 4), labels, index), plain)


def test_prediction_of_this_forward_is_remembered_and_only_in_train_mode() -> None:
    loss, logits, index = criterion(5, 4), randn(2, 4), torch.tensor([4, 1])
    loss.eval()(logits, torch.tensor([0, 1]), index)
    loss.train()(logits, torch.tensor([0, 1]), index, update=False)
    assert not loss.memory.written.any()
    loss(logits, torch.tensor([0, 1]), index)
    assert loss.memory.written.tolist() == [False, True, False, False, True]
    torch.testing.assert_close(loss.memory.read(index), logits.softmax(1))


def test_mixed_images_get_mixed_targets_and_are_not_remembered() -> None:
    past, labels, index = randn(4, 3, seed=2).softmax(1), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    mix = Mix(torch.tensor([1, 0, 3, 2]), 0.75)
    logits = randn(4, 3)
    loss = in_epoch(criterion(4, 3), 2, past)
    value = loss(logits, labels, index, mix=mix)
    targets = loss.soft_targets(labels, index, dtype=torch.float64)
    torch.testing.assert_close(value, F.cross_entropy(logits, mix(targets)))
    torch.testing.assert_close(loss.memory.read(index), past)
    own = in_epoch(criterion(4, 3, update_mixed="own_row"), 2, past)
    own(logits, labels, index, mix=mix)
    torch.testing.assert_close(own.memory.read(index), logits.softmax(1))


@pytest.mark.parametrize("share", [0.75, torch.tensor([1.0, 0.5, 0.25, 0.0])])
def test_without_weight_it_is_cutmix(share: float | Tensor) -> None:
    labels, logits, partner = torch.tensor([0, 1, 2, 0]), randn(4, 3), torch.tensor([1, 0, 3, 2])
    loss = in_epoch(criterion(4, 3, alpha_T=0.0), 2, randn(4, 3).softmax(1))
    own, other = (F.cross_entropy(logits, each, reduction="none") for each in (labels, labels[partner]))
    torch.testing.assert_close(
        loss(logits, labels, torch.arange(4), mix=Mix(partner, share)), (share * own + (1 - share) * other).mean()
    )


def test_pixelwise_predictions_have_pixelwise_memory_and_ignored_pixels() -> None:
    past, labels = randn(4, 3, 2, 2, seed=2).softmax(1), torch.arange(16).view(4, 2, 2) % 3
    labels[0, 0, 0] = 255
    memory = SampleBank(4, (3, 2, 2), storage=DenseRows(torch.float64))
    loss = in_epoch(PSKDLoss(4, (3, 2, 2), 0.8, 4, ignore_index=255, memory=memory), 1, past)
    logits = randn(4, 3, 2, 2)
    value = loss(logits, labels, torch.arange(4))
    flat, kept = logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1) != 255
    hard = F.one_hot(labels.reshape(-1).clamp(max=2), 3).double()
    targets = 0.6 * hard + 0.4 * past.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(value, F.cross_entropy(flat[kept], targets[kept]))
    torch.testing.assert_close(ps_kd_loss(logits, labels, past, 0.4, ignore_index=255), value)


def test_soft_cross_entropy_is_that_of_torch_in_every_layout() -> None:
    for shape in ((4, 3), (4, 3, 2, 5), (4, 3, 6)):
        logits, targets = randn(*shape), randn(*shape, seed=1).softmax(1)
        torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))
        for reduction in ("mean", "sum", "none"):
            torch.testing.assert_close(
                soft_cross_entropy(logits.movedim(1, -1), targets.movedim(1, -1), dim=-1, reduction=reduction),
                F.cross_entropy(logits, targets, reduction=reduction),
            )


def test_padding_of_a_translation_does_not_count() -> None:
    logits, past = randn(2, 5, 7).requires_grad_(), randn(2, 5, 7, seed=1).softmax(-1)
    words = torch.tensor([[3, 1, 6, 0, 0], [2, 2, 4, 5, 0]])  # 0 is padding
    value = ps_kd_loss(logits, words, past, 0.5, ignore_index=0, dim=-1)
    kept = words != 0
    targets = 0.5 * F.one_hot(words, 7).double() + 0.5 * past
    torch.testing.assert_close(value, F.cross_entropy(logits[kept], targets[kept]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert not gradient[~kept].any()
    plain = ps_kd_loss(logits, words, None, 0.5, ignore_index=0, dim=-1)
    torch.testing.assert_close(plain, F.cross_entropy(logits[kept], words[kept]))


def test_weight_grows_linearly_to_its_last_value() -> None:
    assert [progressive_alpha(0.8, epoch, 4) for epoch in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert progressive_alpha(0.8, 0, 4, "constant") == 0.8


def test_resumed_loss_continues_identically() -> None:
    first, second = PSKDLoss(6, 4, 0.8, 4), PSKDLoss(6, 4, 0.8, 4)
    logits, labels, index = randn(6, 4).float(), torch.tensor([0, 3, 1, 2, 2, 0]), torch.arange(6)
    first(logits, labels, index)
    first.set_epoch(2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.epoch == 2
    for seed in range(3):
        values = [loss(randn(6, 4, seed=seed).float(), labels, index) for loss in (first, second)]
        assert torch.equal(*values)


def test_compressed_memory_for_a_thousand_classes_errs_by_less_than_its_bound() -> None:
    """The loss is linear in the past: it errs by at most alpha times the mass not kept times the range of log p over it."""
    logits = randn(32, 1000).float()
    labels = torch.arange(32)
    logits[torch.arange(32), labels] += 12
    values = []
    for storage in (DenseRows(), DenseRows(torch.float16), TopKRows(16)):
        loss = PSKDLoss(32, 1000, 0.8, 2, memory=SampleBank(32, 1000, storage=storage))
        loss(logits, labels, labels)
        loss.set_epoch(1)
        values.append(loss(logits, labels, labels).item())
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    others = logits.log_softmax(1).sort(1).values[:, :-16]
    bound = 0.8 * (others.exp().sum(1) * (others[:, -1] - others[:, 0])).mean().item()
    assert bound < 0.06
    assert abs(values[2] - values[0]) < bound


def test_half_types_are_summed_in_float32() -> None:
    loss = PSKDLoss(6, 4, 0.8, 2)
    labels, index = torch.tensor([0, 3, 1, 2, 2, 0]), torch.arange(6)
    for epoch in range(2):
        loss.set_epoch(epoch)
        assert loss(randn(6, 4).bfloat16(), labels, index).dtype == torch.float32


def test_bad_input_is_refused() -> None:
    loss = criterion(5, 3)
    logits, labels, index = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
    uniform = torch.full((2, 3), 1 / 3)
    for call, words in (
        (lambda: loss(logits, labels, torch.tensor([0, 5])), "index must lie"),
        (lambda: loss(torch.zeros(2, 4), labels, index), "logits must have shape"),
        (lambda: loss(logits, torch.full((2, 4), 0.25), index), "labels do not fit"),
        (lambda: loss.soft_targets(torch.full((2, 4), 0.25), index), r"labels must have shape \(batch, \*\(3,\)\)"),
        (lambda: loss(logits * torch.nan, labels, index), "not finite"),
        (lambda: loss.set_epoch(4), r"epoch must lie in 0\.\.3"),
        (lambda: criterion(5, 3, alpha_T=1.2), "alpha_T must lie"),
        (lambda: criterion(5, 3, epochs=0), "epoch must lie"),
        (lambda: PSKDLoss(5, 3, 0.8, 4, memory=SampleBank(6, 3)), "memory must hold"),
        (lambda: ps_kd_loss(logits, labels, uniform, 1.5), "alpha must lie"),
        (lambda: ps_kd_loss(logits, labels, torch.full((2, 4), 0.25), 0.5), "past must have the shape"),
        (lambda: ps_kd_loss(logits, torch.zeros(3, dtype=torch.long), uniform, 0.5), "labels must have the shape"),
        (lambda: soft_cross_entropy(logits, torch.full((2, 4), 0.25)), "targets must have the shape"),
        (lambda: soft_cross_entropy(logits, uniform, mask=torch.ones(3, dtype=torch.bool)), "mask must have shape"),
        (lambda: soft_labels(labels, 3, smoothing=2.0), "smoothing must lie"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
