"""Training with ADELE: what happens between two epochs."""

import pytest
import torch
from torch import nn

from poise.medical import (
    PASCAL,
    AdeleLoss,
    AdeleTrainer,
    Correction,
    CorrectionSchedule,
    LabelStore,
    MemorizationDetector,
    correct_labels,
)

EAGER = Correction(tau_fg=0.3, tau_bg=0.3)


def squares(count: int = 6, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of squares of two kinds, and their masks."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, side, side, dtype=torch.long)
    for place, mask in enumerate(masks):
        left, top = torch.randint(2, side - 8, (2,), generator=generator).tolist()
        mask[left : left + 6, top : top + 6] = 1 + place % 2
    return masks.float().unsqueeze(1) + 0.1 * torch.randn(count, 1, side, side, generator=generator), masks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))


class Triggered(MemorizationDetector):
    """Triggers class 1 after the first epoch and class 2 after the third."""

    def decide(self, epoch):
        self.triggered = torch.tensor([False, epoch >= 0, epoch >= 2])
        return self.triggered.clone()


def trainer(detector: type[MemorizationDetector] = Triggered, epochs: int = 6, **settings) -> AdeleTrainer:
    _, masks = squares()
    model = network()
    settings = {"correction": EAGER} | settings
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return AdeleTrainer(model, optimizer, LabelStore(masks, 3), detector(3, epochs), **settings)


def epoch(made: AdeleTrainer, number: int) -> None:
    images, _ = squares()
    for index in torch.randperm(6, generator=torch.Generator().manual_seed(number)).split(3):
        made.step(images[index], index)


def test_training_lowers_the_loss_and_the_reported_iou_is_that_of_the_training_predictions():
    made, (images, _) = trainer(MemorizationDetector, 20), squares()
    losses, reports = [], []
    for number in range(20):
        losses.append([made.step(images[index], index) for index in torch.arange(6).split(3)])
        predicted = made.store.prediction(torch.arange(6)).label.long()
        reports.append(made.end_epoch())
        both = (predicted == 1) & (made.store.read_original(torch.arange(6)) == 1)
        either = (predicted == 1) | (made.store.read_original(torch.arange(6)) == 1)
        if number < 3:  # labels have not been corrected yet
            assert reports[-1].iou[1].item() == pytest.approx((both.sum() / either.sum()).item(), abs=1e-6)
    assert losses[-1][-1] < 0.5 * losses[0][0]
    assert torch.equal(made.detector.history[-1], reports[-1].iou)
    assert made.epoch == 20


def test_labels_are_corrected_when_due_from_the_predictions_of_the_epoch():
    made = trainer(correct_every=2)
    every = torch.arange(6)
    expected = [[1], [1], [2], [1, 2], [], [1, 2]]  # when triggered, then at every second epoch
    for number in range(6):
        epoch(made, number)
        before = made.store.read(every)
        prediction = made.store.prediction(every)
        report = made.end_epoch()
        assert report.corrected.nonzero()[:, 0].tolist() == expected[number]
        assert report.triggered.tolist() == [False, True, number >= 2]
        after = made.store.read(every)
        assert report.changed == int((after != before).sum())
        if report.corrected.any():
            assert torch.equal(after, EAGER(before, prediction, report.corrected))
        else:
            assert torch.equal(after, before)


def test_schedule_once_and_every_epoch():
    once, always = CorrectionSchedule(3, None), CorrectionSchedule(3, 1)
    triggered = torch.tensor([False, True, False])
    assert [once.due(triggered, finished).tolist()[1] for finished in range(1, 6)] == [True, *[False] * 4]
    assert all(always.due(triggered, finished)[1] for finished in range(1, 6))
    with pytest.raises(ValueError, match="every must be"):
        CorrectionSchedule(3, 0)


def test_without_correction_labels_stay():
    made = trainer(correction=None)
    for number in range(3):
        epoch(made, number)
        assert made.end_epoch().changed == 0
    assert torch.equal(made.store.read(torch.arange(6)), squares()[1])


def test_reinitialized_corrections_start_from_the_labels_as_given():
    made, every = trainer(correct_every=1, reinitialize=True), torch.arange(6)
    for number in range(4):
        epoch(made, number)
        prediction = made.store.prediction(every)
        report = made.end_epoch()
        expected = EAGER(made.store.read_original(every), prediction, report.triggered)
        assert torch.equal(made.store.read(every), expected)


def test_the_detector_may_be_shown_the_original_labels():
    current, original = trainer(correct_every=1), trainer(correct_every=1, judged_by="original")
    for number in range(3):
        for made in (current, original):
            epoch(made, number)
            made.end_epoch()
    assert torch.equal(current.detector.history[0], original.detector.history[0])  # nothing was corrected yet
    assert not torch.equal(current.detector.history[2], original.detector.history[2])


def test_augmented_masks_are_trained_on_and_images_predicted_separately():
    made, (images, masks) = trainer(judged_by="original", correction=PASCAL, correct_every=1), squares()
    index = torch.arange(6)
    made.step(images.flip(-1), index, masks.flip(-1), masks.flip(-1))
    assert not made.store.predicted.seen(index).any()
    made.end_epoch([(images[:4], index[:4]), (images[4:], index[4:])], temperature=3.0, flip=False)
    assert made.store.predicted.seen(index).all()
    with pytest.raises(ValueError, match="augmented like the labels"):
        made.step(images.flip(-1), index, masks.flip(-1))


def test_images_of_different_size_are_predicted_one_at_a_time():
    images, masks = squares()
    store = LabelStore([mask[: 10 + place] for place, mask in enumerate(masks)], 3)
    model = network()
    made = AdeleTrainer(model, torch.optim.SGD(model.parameters(), 0.1), store, Triggered(3, 4), correction=PASCAL)
    made.step(images[:, :, :8], torch.arange(6), masks[:, :8])
    report = made.end_epoch((images[[place], :, : 10 + place], torch.tensor([place])) for place in range(6))
    assert store.predicted.written.all()
    assert report.corrected.tolist() == [False, True, False]


def test_refine_changes_what_corrects_labels_from_its_epoch_on():
    calls = []

    def refine(probabilities, images):
        assert probabilities.shape[2:] == images.shape[2:]
        calls.append(made.epoch)
        return torch.nn.functional.one_hot(torch.full_like(probabilities[:, 0], 2).long(), 3).movedim(-1, 1).float()

    made = trainer(refine=refine, refine_from=2)
    for number in range(4):
        epoch(made, number)
        refined = (made.store.prediction(torch.arange(6)).label == 2).all()
        assert bool(refined) is (number >= 2)
        made.end_epoch()
    assert calls == [2, 2, 3, 3]


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped():
    whole, first, second = (trainer(correct_every=2) for _ in range(3))
    for number in range(4):
        epoch(whole, number)
        whole.end_epoch()
        if number < 2:
            epoch(first, number)
            first.end_epoch()
    second.load_state_dict(first.state_dict())
    for number in range(2, 4):
        epoch(second, number)
        second.end_epoch()
    assert second.epoch == 4
    assert torch.equal(second.store.read(torch.arange(6)), whole.store.read(torch.arange(6)))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_values_within_an_epoch_reach_a_detector_with_an_interval():
    made = trainer(MemorizationDetector)
    made.detector = MemorizationDetector(3, 6, interval=0.5)
    images, _ = squares()
    for _ in range(2):
        made.step(images, torch.arange(6))
        made.record()
    assert made.end_epoch().iou.shape == (3,)
    assert made.detector.history.shape == (2, 3)


def test_the_weights_of_the_loss_are_trained_when_they_are_in_the_optimizer():
    images, masks = squares()
    model, loss = network(), AdeleLoss(learn_weights=True, average=False)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.1)
    made = AdeleTrainer(model, optimizer, LabelStore(masks, 3), Triggered(3, 4), loss=loss)
    made.step(images, torch.arange(6))
    assert not torch.equal(loss.weights, torch.ones(3))
    assert "weights" in made.state_dict()["loss"]


def test_corrected_labels_of_the_store_equal_those_of_full_probabilities():
    made, every = trainer(correct_every=1), torch.arange(6)
    images, masks = squares()
    made.model.train()
    made.step(images, every)
    full = torch.cat([made.store.prediction(every).background[:, None], torch.zeros(6, 2, 16, 16)], 1)
    label, foreground, _ = made.store.prediction(every)
    top = label.long().clamp_min(1)
    full.scatter_(1, top[:, None], foreground[:, None])
    rest = torch.where(top == 1, 2, 1)
    full.scatter_(1, rest[:, None], (1 - full.sum(1, keepdim=True)).clamp_min(0))
    report = made.end_epoch()
    assert torch.equal(made.store.read(every), correct_labels(masks, full, report.triggered, 0.3, 0.3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer(judged_by="clean"), "judged_by must be"),
        (lambda: trainer().step(squares()[0][:, :, :8], torch.arange(6)), "images are"),
        (lambda: trainer().end_epoch(), "no IoU was recorded"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_store_and_detector_must_agree_on_the_classes():
    _, masks = squares()
    model = network()
    with pytest.raises(ValueError, match="4 classes, the detector 3"):
        AdeleTrainer(model, torch.optim.SGD(model.parameters(), 0.1), LabelStore(masks, 4), Triggered(3, 4))
