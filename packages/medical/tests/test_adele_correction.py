"""Which labels are corrected, and to what."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.medical import MEDICAL, PASCAL, Correction, LabelStore, correct_labels, random_under_over, under_over_segment

GOLDEN = Path(__file__).parent / "golden" / "adele"
C = 4

seeds = st.integers(0, 2**32 - 1)
subsets = st.lists(st.booleans(), min_size=C, max_size=C).map(torch.tensor)
thresholds = st.floats(0, 1.2)


def problem(seed: int, ignored: bool = False, dims: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of which every image lacks some class, and probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, *(6, 7, 3)[:dims])
    labels = torch.randint(0, C + ignored, shape, generator=generator)
    most = torch.randint(1, C, (5, *[1] * dims), generator=generator)
    labels = torch.where(labels == C, 255, labels.minimum(most))
    probs = (3 * torch.randn(5, C, *shape[1:], generator=generator, dtype=torch.float64)).softmax(1)
    return labels, probs


def one_by_one(labels, probs, triggered, tau_fg, tau_bg, constraint):
    """The rule pixel by pixel, as it is written in the paper."""
    result = labels.clone()
    chosen = {0} | {index for index in range(1, C) if triggered[index]}
    for image in range(len(labels)):
        present = set(labels[image].unique().tolist())
        if not present & (chosen - {0}):
            continue
        for place in np.ndindex(*labels.shape[1:]):
            p = probs[(image, slice(None), *place)]
            k, label = int(p.argmax()), int(labels[(image, *place)])
            confident = p[1:].max() > tau_fg or p[0] > tau_bg
            if confident and label in chosen and k in chosen and (not constraint or k in present | {0}):
                result[(image, *place)] = k
    return result


@pytest.mark.parametrize("name", ["correction", "correction_free"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_correction_agrees_with_the_authors(name, kind):
    golden = np.load(GOLDEN / f"{name}.npz")
    given = [golden["labels"], golden["probs"], np.concatenate([[False], golden["need"].astype(bool)])]
    if kind == "torch":
        given = [torch.from_numpy(each) for each in given]
    settings = {"class_constraint": bool(golden["class_constraint"]), "ignore_shrunk": bool(golden["logic_255"])}
    corrected = correct_labels(*given, float(golden["conf_fg"]), float(golden["conf_bg"]), **settings)
    assert type(corrected) is type(given[0])
    assert np.array_equal(np.asarray(corrected), golden["new_labels"])
    assert not np.array_equal(golden["labels"], golden["new_labels"])


@settings(deadline=None, max_examples=25)
@given(seeds, subsets, thresholds, thresholds, st.booleans(), st.sampled_from([2, 3]))
def test_correction_is_the_rule_pixel_by_pixel(seed, triggered, tau_fg, tau_bg, constraint, dims):
    labels, probs = problem(seed, ignored=True, dims=dims)
    corrected = correct_labels(labels, probs, triggered, tau_fg, tau_bg, class_constraint=constraint)
    assert torch.equal(corrected, one_by_one(labels, probs, triggered, tau_fg, tau_bg, constraint))


@settings(deadline=None, max_examples=25)
@given(seeds, subsets, st.booleans())
def test_thresholds_of_one_change_nothing(seed, triggered, constraint):
    labels, probs = problem(seed)
    assert torch.equal(correct_labels(labels, probs, triggered, 1.0, 1.0, class_constraint=constraint), labels)


@settings(deadline=None, max_examples=25)
@given(seeds, thresholds, st.booleans(), st.booleans(), st.sampled_from(["both", "single"]))
def test_no_triggered_class_changes_nothing(seed, tau, constraint, shrunk, rule):
    labels, probs = problem(seed)
    for background in (False, True):
        triggered = torch.tensor([background, False, False, False])
        assert torch.equal(correct_labels(labels, probs, triggered, tau, tau, constraint, rule, shrunk), labels)


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_no_threshold_and_all_classes_give_the_prediction(seed):
    labels, probs = problem(seed)
    labels[:, 0, 0] = 1  # images without any triggered class would be left alone
    corrected = correct_labels(labels, probs, torch.ones(C, dtype=torch.bool), 0.0, 0.0, class_constraint=False)
    assert torch.equal(corrected, probs.argmax(1))


@settings(deadline=None, max_examples=40)
@given(seeds, subsets, thresholds, st.booleans())
def test_pixels_of_an_untriggered_class_never_change_and_none_becomes_one(seed, triggered, tau, constraint):
    labels, probs = problem(seed, ignored=True)
    corrected = correct_labels(labels, probs, triggered, tau, tau, class_constraint=constraint)
    untriggered = torch.cat([~triggered, torch.ones(256 - C, dtype=torch.bool)])
    untriggered[0] = False
    assert torch.equal(corrected[untriggered[labels]], labels[untriggered[labels]])
    assert not untriggered[corrected[corrected != labels]].any()


@settings(deadline=None, max_examples=40)
@given(seeds, subsets, thresholds, st.sampled_from([MEDICAL, PASCAL, Correction(ignore_shrunk=True)]))
def test_correcting_again_changes_nothing_more(seed, triggered, tau, how):
    labels, probs = problem(seed)
    arguments = (triggered, tau, tau, how.class_constraint, how.rule, how.ignore_shrunk)
    options = {"background_images": how.background_images, "drop_vanishing": how.drop_vanishing}
    once = correct_labels(labels, probs, *arguments, **options)
    assert torch.equal(correct_labels(once, probs, *arguments, **options), once)


@settings(deadline=None, max_examples=25)
@given(seeds, subsets, st.permutations(range(5)))
def test_images_are_corrected_independently(seed, triggered, order):
    labels, probs = problem(seed)
    together = correct_labels(labels, probs, triggered, 0.5, 0.5)
    assert torch.equal(correct_labels(labels[order], probs[order], triggered, 0.5, 0.5), together[order])


def confident(prediction: torch.Tensor) -> torch.Tensor:
    return 0.97 * torch.nn.functional.one_hot(prediction, C).movedim(-1, 1).double() + 0.0075


def test_single_rule_asks_for_the_prediction_only():
    labels, triggered = torch.tensor([[[2, 2, 1, 0]]]), torch.tensor([False, True, False, False])
    probs = confident(torch.tensor([[[1, 0, 2, 1]]]))
    assert correct_labels(labels, probs, triggered).tolist() == [[[2, 2, 1, 1]]]
    assert correct_labels(labels, probs, triggered, rule="single").tolist() == [[[1, 0, 1, 1]]]


def test_background_images_are_corrected_where_asked_to():
    labels, triggered = torch.zeros(1, 1, 4, dtype=torch.long), torch.tensor([False, True, False, False])
    probs = confident(torch.tensor([[[1, 1, 2, 0]]]))
    assert torch.equal(correct_labels(labels, probs, triggered, rule="single"), labels)
    corrected = correct_labels(labels, probs, triggered, rule="single", background_images=True)
    assert corrected.tolist() == [[[1, 1, 0, 0]]]  # class 2 has not been triggered


def test_a_correction_that_would_erase_an_object_is_dropped():
    labels, triggered = torch.zeros(2, 1, 100, dtype=torch.long), torch.tensor([False, True, False, False])
    labels[:, 0, :10] = 1
    prediction = torch.zeros_like(labels)
    prediction[1, 0, :6] = 1  # keeps more than half
    probs = confident(prediction)
    assert torch.equal(correct_labels(labels, probs, triggered), prediction * 0 + torch.where(prediction == 1, 1, 0))
    kept = correct_labels(labels, probs, triggered, drop_vanishing=True)
    assert torch.equal(kept[0], labels[0])
    assert torch.equal(kept[1], prediction[1])


def test_inputs_are_not_changed_and_types_are_kept():
    labels, probs = problem(0)
    triggered = torch.ones(C, dtype=torch.bool)
    before = labels.clone(), probs.clone(), triggered.clone()
    assert correct_labels(labels.to(torch.uint8), probs, triggered).dtype == torch.uint8
    assert correct_labels(labels.numpy().astype(np.int32), probs.numpy(), triggered.numpy()).dtype == np.int32
    correct_labels(labels, probs, triggered)
    assert all(torch.equal(one, other) for one, other in zip(before, (labels, probs, triggered), strict=True))


LABELS, PROBS = problem(0)
ALL = torch.ones(C, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probs": 1.5 * PROBS}, ValueError, "sum to 1"),
        ({"probs": torch.where(PROBS > 0.99, float("nan"), PROBS)}, ValueError, "finite"),
        ({"probs": PROBS - 0.5}, ValueError, "negative"),
        ({"probs": PROBS.long()}, TypeError, "floating-point"),
        ({"probs": PROBS[..., :-1]}, ValueError, "must have the shape"),
        ({"probs": PROBS[:, 0]}, ValueError, "at least two classes"),
        ({"labels": LABELS + 1}, ValueError, r"classes 0..3, or 255 to ignore a pixel; got \[4\]"),
        ({"labels": LABELS - 1}, ValueError, r"got \[-1\]"),
        ({"labels": LABELS.float()}, TypeError, "integer"),
        ({"triggered": ALL[:-1]}, ValueError, "each of 4 classes"),
        ({"triggered": ALL.long()}, TypeError, "boolean"),
        ({"rule": "either"}, ValueError, "rule must be"),
        ({"tau_bg": float("nan")}, ValueError, "tau_fg and tau_bg"),
    ],
)
def test_bad_input_is_refused(change, error, message, request):
    labels = change.pop("labels", LABELS)
    probs, triggered = change.pop("probs", PROBS), change.pop("triggered", ALL)
    rule = change.pop("rule", "both")
    with pytest.raises(error, match=message):
        correct_labels(labels, probs, triggered, rule=rule, **change)


# The store


@pytest.mark.parametrize("folder", [None, "store"])
def test_store_corrects_as_full_probabilities_do(tmp_path, folder):
    labels, probs = problem(3, ignored=True)
    triggered = torch.tensor([False, True, False, True])
    store = LabelStore(labels, C, folder=None if folder is None else tmp_path / folder)
    for index in torch.tensor([[4, 1], [0, 2]]):
        store.remember(index, probs[index].float())
    changed = store.correct(triggered, chunk=3)
    expected = correct_labels(labels, probs, triggered)
    expected[3] = labels[3]  # was never predicted
    assert torch.equal(store.read(torch.arange(5)), expected)
    assert changed == int((expected != labels).sum()) > 0
    assert torch.equal(store.read_original(torch.arange(5)), labels)
    store.reset()
    assert torch.equal(store.read(torch.arange(5)), labels)


def test_store_corrects_from_the_labels_in_use():
    labels, probs = problem(5)
    store, every = LabelStore(labels, C), torch.arange(5)
    store.remember(every, probs)
    store.correct(torch.tensor([False, True, False, False]))
    first = store.read(every)
    other = probs.roll(1, 0)
    store.remember(every, other)
    store.correct(torch.tensor([False, True, True, False]))
    assert torch.equal(store.read(every), correct_labels(first, other, torch.tensor([False, True, True, False])))
    assert not torch.equal(store.read(every), correct_labels(labels, other, torch.tensor([False, True, True, False])))


@pytest.mark.parametrize("how", [MEDICAL, PASCAL])
def test_store_of_masks_of_different_size_corrects_each_in_its_own(how):
    labels, probs = problem(1)
    sizes = [(6, 7), (4, 7), (6, 5), (4, 7), (3, 3)]
    masks = [mask[:h, :w] for mask, (h, w) in zip(labels, sizes, strict=True)]
    store, triggered = LabelStore(masks, C), torch.tensor([False, True, True, False])
    for index, (h, w) in enumerate(sizes):
        store.remember(torch.tensor([index]), probs[index : index + 1, :, :h, :w])
    store.correct(triggered, how)
    options = {"background_images": how.background_images, "drop_vanishing": how.drop_vanishing}
    for index, (h, w) in enumerate(sizes):
        alone = correct_labels(
            masks[index][None],
            probs[index : index + 1, :, :h, :w],
            triggered,
            how.tau_fg,
            how.tau_bg,
            rule=how.rule,
            **options,
        )
        assert torch.equal(store[index].long(), alone[0])
    padded = store.read(torch.tensor([4]))[0]
    assert padded.shape == (6, 7)
    assert (padded[3:] == 255).all()
    assert (padded[:, 3:] == 255).all()


def test_store_holds_seven_bytes_a_pixel_whatever_the_number_of_classes():
    masks = torch.zeros(8, 32, 32, dtype=torch.uint8)
    few, many = LabelStore(masks, 2).nbytes, LabelStore(masks, 200).nbytes
    assert few == many
    assert few / masks.numel() == pytest.approx(7, abs=0.05)


def test_a_resumed_store_is_the_same():
    labels, probs = problem(2)
    store, twin = LabelStore(labels, C), LabelStore(labels, C)
    store.remember(torch.arange(5), probs)
    twin.load_state_dict(store.state_dict())
    assert store.correct(ALL) == twin.correct(ALL) > 0
    assert torch.equal(store.read(torch.arange(5)), twin.read(torch.arange(5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelStore(LABELS, 2), r"classes 0..1, or 255 to ignore a pixel; got \[2, 3\]"),
        (lambda: LabelStore(LABELS, 300), "num_classes"),
        (lambda: LabelStore(LABELS[:0], C), "at least one mask"),
        (lambda: LabelStore([LABELS[0], LABELS], C), "two, or all of three dimensions"),
        (lambda: LabelStore(LABELS, C).remember(torch.tensor([0]), PROBS[:1, :, :-1]), "on masks of sizes"),
        (lambda: LabelStore(LABELS, C).remember(torch.tensor([0]), PROBS[:1, :-1]), "on masks of sizes"),
        (lambda: LabelStore(LABELS, C).remember(torch.tensor([0]), 2 * PROBS[:1]), "sum to 1"),
        (lambda: LabelStore(LABELS, C).remember(torch.tensor([0]), PROBS[:1] * float("nan")), "finite"),
        (lambda: LabelStore(LABELS, C).correct(ALL[:2]), "each of 4 classes"),
    ],
)
def test_store_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Noise


@pytest.mark.parametrize("mode", ["under", "over"])
@pytest.mark.parametrize("iterations", [2, 3, 4])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_noise_agrees_with_the_authors(mode, iterations, kind):
    golden = np.load(GOLDEN / "noise.npz")
    label = golden["label"] if kind == "numpy" else torch.from_numpy(golden["label"])
    drawn, expected = under_over_segment(label, iterations, mode), golden[f"{mode}_{iterations}"]
    boundary = int((expected != golden["label"]).sum())
    assert int((np.asarray(drawn) != expected).sum()) <= 0.01 * boundary  # another version of the cubic resize
    assert np.array_equal(np.asarray(label), golden["label"])


def test_dilation_takes_background_only_and_erosion_leaves_background_only():
    label = torch.from_numpy(np.load(GOLDEN / "noise.npz")["label"])
    over, under = under_over_segment(label, 2, "over"), under_over_segment(label, 2, "under")
    assert torch.equal(over[label != 0], label[label != 0])
    assert ((under == label) | (under == 0)).all()


def test_noise_is_relative_to_the_size_of_an_organ():
    mask = np.zeros((200, 200), dtype=np.uint8)
    mask[10:30, 10:30], mask[60:180, 60:180] = 1, 2
    grown = under_over_segment(mask, 3, "over", order=(1, 2))
    small, large = ((grown == label).sum() / (mask == label).sum() for label in (1, 2))
    assert small == pytest.approx(large, rel=0.1)


def test_order_decides_which_class_grows_first():
    mask = np.zeros((40, 40), dtype=np.int64)
    mask[10:30, 8:18], mask[10:30, 20:30] = 1, 2
    one, two = (under_over_segment(mask, 3, "over", order) for order in ((1, 2), (2, 1)))
    assert (one == 1).sum() > (two == 1).sum()
    assert np.array_equal(under_over_segment(mask, 3, "over", None), one)


def test_random_noise_draws_both_modes_and_all_iterations_from_the_generator():
    label = torch.from_numpy(np.load(GOLDEN / "noise.npz")["label"])
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(random_under_over(label, generator).flatten().tolist()) for _ in range(40)}
    possible = {
        tuple(under_over_segment(label, count, mode).flatten().tolist())
        for mode in ("under", "over")
        for count in (2, 3, 4)
    }
    assert drawn == possible


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: under_over_segment(LABELS, 2, "over"), "height, width"),
        (lambda: under_over_segment(LABELS[0], 2, "around"), "mode must be"),
        (lambda: under_over_segment(LABELS[0], 0, "over"), "at least 1"),
        (lambda: under_over_segment(LABELS[0] - 1, 1, "over"), "mask must be classes"),
        (lambda: random_under_over(LABELS[0], torch.Generator(), (3, 2)), "least and a largest"),
    ],
)
def test_noise_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
