"""Curves of the training IoU, and when they say that a class is being memorised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from poise.medical import IoUCurve, MemorizationDetector, StreamingIoU, fit_iou_curve, memorization_epoch

GOLDEN = np.load(Path(__file__).parent / "golden" / "adele" / "curve_fit.npz")
CURVES = [row[~np.isnan(row)] for row in GOLDEN["iou"]]
EPOCHS, R = int(GOLDEN["n_epoch"]), float(GOLDEN["threshold"])

# Curves that bend within the epochs seen: where they do not, c and a say the same and the fit may choose.
curves = st.builds(IoUCurve, st.floats(0.3, 1.0), st.floats(0.5, 1.0), st.floats(0.8, 5.0))


def sampled(curve: IoUCurve, count: int = 40) -> np.ndarray:
    return curve(np.linspace(0, count, count))


@pytest.mark.parametrize("row", range(4))
def test_fit_agrees_with_the_authors(row):
    assert fit_iou_curve(CURVES[row]) == pytest.approx(GOLDEN["fit_abc"][row], abs=1e-3)


@pytest.mark.parametrize("row", range(4))
def test_memorization_epoch_agrees_with_the_authors(row):
    assert memorization_epoch(CURVES[row], EPOCHS, R, skip_flat=False) == GOLDEN["update_epoch"][row]


@pytest.mark.parametrize("row", range(4))
def test_decision_after_every_epoch_agrees_with_the_authors(row):
    decisions = []
    for known in range(1, len(CURVES[row]) + 1):
        due = memorization_epoch(CURVES[row][:known], EPOCHS, R)
        decisions.append(int(due is not None and known - 1 >= due))
    evaluated = GOLDEN["trigger"][row][: len(decisions)] != -2
    assert not any(decisions[:3])
    assert np.array_equal(np.array(decisions)[evaluated], GOLDEN["trigger"][row][: len(decisions)][evaluated])


def test_detector_takes_the_decisions_of_the_authors_class_by_class():
    detector = MemorizationDetector(4, EPOCHS, R)
    for epoch in range(20):  # the first 20 values are there for every curve; background may be anything
        triggered = detector.update([0.5, CURVES[0][epoch], CURVES[1][epoch], CURVES[2][epoch]])
        expected = [False, *(bool((GOLDEN["trigger"][row][: epoch + 1] == 1).any()) for row in range(3))]
        assert triggered.tolist() == expected
    assert detector.trigger_epochs.tolist() == [-1, 8, 14, 19]


@settings(deadline=None, max_examples=30)
@given(curves)
def test_fit_recovers_the_curve_that_it_is_given(curve):
    assert fit_iou_curve(sampled(curve)) == pytest.approx(curve, abs=1e-3)


@settings(deadline=None, max_examples=15)
@given(curves, st.integers(0, 2**32 - 1))
def test_fit_is_that_of_scipy_with_the_same_weights(curve, seed):
    noisy = np.clip(sampled(curve, 25) + np.random.default_rng(seed).normal(0, 0.02, 25), 0, 1)
    expected, _ = curve_fit(
        lambda t, a, b, c: a * (1 - np.exp(-(t**b) / c)),
        np.linspace(0, 25, 25),
        noisy,
        (1, 1, 1),
        sigma=np.geomspace(1, 0.1, 25),
        bounds=([0, 0, 0], [1, 1, np.inf]),
    )
    at = np.arange(1, 25)
    assert fit_iou_curve(noisy)(at) == pytest.approx(IoUCurve(*expected)(at), abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(curves, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_memorization_epoch_does_not_decrease_in_r(curve, both):
    low, high = (memorization_epoch(sampled(curve), 60, r, skip_flat=False) for r in sorted(both))
    assert low is not None
    assert high is not None
    assert low <= high


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(0, 30), st.booleans())
def test_a_constant_curve_never_triggers(value, count, skip_flat):
    assert memorization_epoch([value] * count, 100, skip_flat=skip_flat) is None


@pytest.mark.parametrize("skip_flat", [True, False])
def test_odd_curves_never_raise(skip_flat):
    for curve in (
        [0, 0, 0, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 1e-9],
        [1, 1, 1, 1, 0],
    ):
        memorization_epoch(curve, 50, skip_flat=skip_flat)


@pytest.mark.parametrize("count", range(4))
def test_fewer_than_four_values_do_not_decide(count):
    assert memorization_epoch([0.1, 0.5, 0.8][:count], 100, skip_flat=False) is None
    flat = [0.0] * 5 + [0.3, 0.6, 0.7][: max(count - 1, 0)]  # the last value before the rise counts
    assert memorization_epoch(flat, 100) is None


def test_a_flat_start_shifts_the_epoch_and_changes_nothing_else():
    curve = sampled(IoUCurve(0.9, 0.7, 1.0))
    rising = memorization_epoch(curve, 100)
    assert rising is not None
    assert memorization_epoch(np.concatenate([[0.0] * 6, curve]), 100) == rising + 6


def test_epochs_between_values_stretch_the_curve():
    curve = IoUCurve(0.9, 0.7, 1.5)
    t = np.linspace(0, 20, 100)
    found = memorization_epoch(curve(t), 50, skip_flat=False, interval=0.2)
    assert found == memorization_epoch(curve(np.linspace(0, 20, 20)), 50, skip_flat=False)


def test_slope_is_the_derivative():
    curve, t, h = IoUCurve(0.8, 0.6, 2.0), np.linspace(1, 20, 7), 1e-5
    assert curve.slope(t) == pytest.approx((curve(t + h) - curve(t - h)) / (2 * h), rel=1e-4)


@settings(deadline=None, max_examples=10)
@given(st.permutations([1, 2, 3]))
def test_permuting_classes_permutes_triggers(order):
    plain, permuted = MemorizationDetector(4, 40), MemorizationDetector(4, 40)
    series = [sampled(IoUCurve(0.9, b, c)) for b, c in ((0.8, 1.0), (0.8, 4.0), (1.0, 8.0))]
    for epoch in range(25):
        values = torch.tensor([0.9, *(each[epoch] for each in series)])
        expected = plain.update(values)[[0, *order]]
        assert torch.equal(permuted.update(values[[0, *order]]), expected)
    assert len(plain.trigger_epochs.unique()) > 2  # the classes differ, so the law says something


def test_a_triggered_class_stays_triggered():
    detector = MemorizationDetector(2, 40)
    for value in sampled(IoUCurve(0.9, 0.8, 1.0), 20):
        detector.update([0.9, value])
    assert detector.triggered[1]
    for _ in range(5):
        assert detector.update([0.9, 0.0]).tolist() == [False, True]


def test_a_resumed_detector_decides_as_if_it_had_not_stopped():
    series = np.stack([np.full(30, 0.9), sampled(IoUCurve(0.9, 0.8, 1.0), 30), sampled(IoUCurve(0.8, 0.9, 4.0), 30)], 1)
    whole, first = MemorizationDetector(3, 60), MemorizationDetector(3, 60)
    for epoch, values in enumerate(series):
        whole.update(values)
        if epoch < 12:
            first.update(values)
    second = MemorizationDetector(3, 60)
    second.load_state_dict(first.state_dict())
    for values in series[12:]:
        second.update(values)
    assert torch.equal(second.trigger_epochs, whole.trigger_epochs)
    assert torch.equal(second.history, whole.history)
    with pytest.raises(ValueError, match="3 classes"):
        MemorizationDetector(4, 60).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_iou_curve([0.1, 0.2]), "at least 3"),
        (lambda: fit_iou_curve([0.1, float("nan"), 0.3, 0.4]), "finite"),
        (lambda: fit_iou_curve([0.1, 0.2, 1.3, 0.4]), r"\[0, 1\]"),
        (lambda: fit_iou_curve([0.1, 0.2, 0.3, 0.4], [1, 2, 3]), "one value for each"),
        (lambda: memorization_epoch(np.ones((2, 2)), 10), "one value after the other"),
        (lambda: memorization_epoch([0.1], 0), "total_epochs"),
        (lambda: memorization_epoch([0.1], 10, 1.5), "r must lie"),
        (lambda: memorization_epoch([0.1], 10, interval=0.0), "interval"),
        (lambda: MemorizationDetector(1, 10), "num_classes"),
        (lambda: MemorizationDetector(3, 10).update([0.1, 0.2]), "3 classes"),
        (lambda: MemorizationDetector(2, 10).update([0.1, float("nan")]), "finite"),
        (lambda: StreamingIoU(1), "num_classes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# IoU


@pytest.mark.parametrize("name", ["correction", "correction_free"])
def test_counts_and_iou_agree_with_the_authors(name):
    golden = np.load(Path(__file__).parent / "golden" / "adele" / f"{name}.npz")
    iou = StreamingIoU(golden["probs"].shape[1])
    predicted, labels = torch.tensor(golden["probs"].argmax(1)), torch.tensor(golden["labels"])
    for batch in range(3):
        iou.update(predicted[2 * batch : 2 * batch + 2], labels[2 * batch : 2 * batch + 2])
    assert np.array_equal(iou.counts.numpy(), golden["tp_pred_true"])
    assert iou.compute().numpy() == pytest.approx(golden["iou"], abs=1e-12)
    iou.reset()
    assert iou.compute().tolist() == [0.0] * iou.num_classes


def test_iou_is_pooled_and_not_a_mean_over_images():
    labels, predicted = torch.zeros(2, 1, 10, dtype=torch.long), torch.zeros(2, 1, 10, dtype=torch.long)
    labels[0, 0, :8], predicted[0, 0, :8] = 1, 1
    labels[1, 0, 0], predicted[1, 0, 1] = 1, 1
    iou = StreamingIoU(2)
    iou.update(predicted, labels)
    assert iou.compute()[1].item() == pytest.approx(8 / 10)  # per image it would be 1 and 0


def test_iou_is_that_of_torchmetrics_and_monai():
    from monai.metrics import MeanIoU
    from torchmetrics import JaccardIndex

    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(0, 4, (2, 3, 9, 9), generator=generator)
    iou = StreamingIoU(4)
    iou.update(predicted, labels)
    theirs = JaccardIndex(task="multiclass", num_classes=4, average="none")(predicted, labels)
    assert iou.compute().float().tolist() == pytest.approx(theirs.tolist())
    pooled = [torch.nn.functional.one_hot(each.reshape(1, -1, 1), 4).movedim(-1, 1) for each in (predicted, labels)]
    metric = MeanIoU(reduction="none", get_not_nans=False)
    assert iou.compute().float().tolist() == pytest.approx(metric(*pooled)[0].tolist())


def test_iou_refuses_labels_out_of_range_and_other_shapes():
    iou, labels = StreamingIoU(3), torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must be classes 0..2, or 255 to ignore a pixel; got \[7\]"):
        iou.update(labels, labels + 7)
    with pytest.raises(ValueError, match="predicted must be"):
        iou.update(labels + 3, labels)
    with pytest.raises(ValueError, match="same shape"):
        iou.update(labels[:, :3], labels)
