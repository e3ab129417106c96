"""Calibration and ranking of confidences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.core.labels.calibration import aurc, eaurc, expected_calibration_error, negative_log_likelihood


def sample(count: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def test_calibrated_predictions_have_no_error_but_that_of_the_sample() -> None:
    probs, labels = sample(100_000)
    assert expected_calibration_error(probs, labels) < 0.01
    overconfident = probs.pow(4) / probs.pow(4).sum(1, keepdim=True)
    assert expected_calibration_error(overconfident, labels) > 0.1


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 1000))
def test_calibration_error_is_that_of_torchmetrics_off_the_edges(count: int, bins: int, seed: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = sample(count, seed=seed)
    theirs = metrics.multiclass_calibration_error(probs, labels, num_classes=4, n_bins=bins, norm="l1")
    assert expected_calibration_error(probs, labels, bins=bins) == pytest.approx(theirs.item(), abs=1e-6)


def test_bins_contain_their_upper_bound() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.96, 0.04]], dtype=torch.float64)
    # one bin: 2 of 3 right at confidences 1, 1, .96
    assert expected_calibration_error(probs, torch.tensor([0, 1, 0])) == pytest.approx(abs(2 - 2.96) / 3)


def test_perfect_ranking_has_no_excess() -> None:
    confidence = torch.linspace(0.95, 0.55, 9, dtype=torch.float64)
    probs = torch.stack([confidence, 1 - confidence], 1)
    labels = torch.tensor([0] * 6 + [1] * 3)
    assert eaurc(probs, labels) == 0
    best = sum(j / (6 + j) for j in range(1, 4)) / 9
    assert aurc(probs, labels) == pytest.approx(best)
    assert eaurc(probs, labels.flip(0)) > 0.1


def test_no_errors_no_risk() -> None:
    probs, _ = sample(20)
    assert aurc(probs, probs.argmax(1)) == eaurc(probs, probs.argmax(1)) == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_risk_depends_on_the_order_of_confidences_only(seed: int) -> None:
    probs, labels = sample(50, seed=seed)
    # between the largest and the others lies 1/4: squashing towards it keeps order and predictions
    squashed = 0.25 + 0.3 * (probs - 0.25)
    assert aurc(squashed, labels) == pytest.approx(aurc(probs, labels), abs=1e-12)


def test_likelihood_is_the_cross_entropy() -> None:
    probs, labels = sample(50)
    expected = torch.nn.functional.nll_loss(probs.log(), labels).item()
    assert negative_log_likelihood(probs, labels) == pytest.approx(expected)


def test_bad_input_is_refused() -> None:
    probs, labels = sample(5)
    for measure in (expected_calibration_error, negative_log_likelihood, aurc, eaurc):
        for call in (lambda f: f(probs[:0], labels[:0]), lambda f: f(probs, labels[:3])):
            with pytest.raises(ValueError, match="as many labels"):
                call(measure)
    with pytest.raises(ValueError, match="bins must"):
        expected_calibration_error(probs, labels, bins=0)
