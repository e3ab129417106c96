"""PS-KD with the last epoch's model as teacher: agreement with the memory, resume, translation and detection."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.labels.ps_kd import PSKDLoss, ps_kd_loss
from poise.core.labels.ps_kd_detector import PSKDDetector
from poise.core.labels.ps_kd_teacher import PreviousModelTeacher, PSKDTrainer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, LABELS = randn(12, 5), torch.arange(12) % 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches(epoch: int, with_index: bool) -> list[tuple[Tensor, ...]]:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
    return [(X[i], LABELS[i], i) if with_index else (X[i], LABELS[i]) for i in order.split(4)]


def trainer(model: nn.Module, with_memory: bool) -> PSKDTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    return PSKDTrainer(
        model,
        optimizer,
        num_classes=3,
        alpha_T=0.8,
        total_epochs=4,
        num_examples=12 if with_memory else None,
        scheduler=scheduler,
    )


def test_teacher_is_the_model_of_the_last_epoch_in_evaluation_mode() -> None:
    model = network()
    teacher = PreviousModelTeacher(model)
    assert teacher(X) is None
    model(X)
    teacher.update(model)
    expected = copy.deepcopy(model).eval()(X).softmax(1)
    with torch.no_grad():
        model[0].weight.add_(1)
    past = teacher(X)
    assert past is not None
    torch.testing.assert_close(past, expected.detach())
    assert not past.requires_grad


def test_both_back_ends_agree_on_clean_predictions_at_the_end_of_an_epoch() -> None:
    """No augmentation, evaluation mode: writing the predictions down, or keeping the model that makes them, is the same."""
    model = network().eval()
    teacher, memory = PreviousModelTeacher(model), PSKDLoss(12, 3, 0.8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(4):
        memory.set_epoch(epoch)
        for inputs, labels, index in batches(epoch, with_index=True):
            logits = model(inputs)
            by_memory = memory(logits, labels, index, update=False)
            by_teacher = ps_kd_loss(logits, labels, teacher(inputs), memory.alpha)
            torch.testing.assert_close(by_memory, by_teacher)
            optimizer.zero_grad()
            by_teacher.backward()
            optimizer.step()
        teacher.update(model)
        memory.memory.write(torch.arange(12), model(X).softmax(1))


@pytest.mark.parametrize("with_memory", [True, False])
def test_training_stopped_in_the_middle_of_an_epoch_continues_identically(with_memory: bool) -> None:
    whole = trainer(network(), with_memory)
    for epoch in range(2):
        whole.train_epoch(batches(epoch, with_memory))
    first, *rest = batches(2, with_memory)
    whole.step(*first)
    state, rng = copy.deepcopy(whole.state_dict()), torch.get_rng_state()

    def finish(trainer: PSKDTrainer) -> list[Tensor]:
        losses = [trainer.step(*batch) for batch in rest]
        trainer.end_epoch()
        return [*losses, trainer.train_epoch(batches(3, with_memory))]

    expected = finish(whole)
    resumed = trainer(network(seed=1), with_memory)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert [loss.item() for loss in finish(resumed)] == [loss.item() for loss in expected]
    assert resumed.finished
    with pytest.raises(ValueError, match="epoch must lie"):
        resumed.step(*first)


def test_trainer_with_memory_is_the_plain_loop() -> None:
    model, twin = network(), network()
    ours, loss = trainer(model, with_memory=True), PSKDLoss(12, 3, 0.8, 4)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for epoch in range(2):
        torch.manual_seed(epoch)
        ours.train_epoch(batches(epoch, with_index=True))
        torch.manual_seed(epoch)
        loss.set_epoch(epoch)
        for inputs, labels, index in batches(epoch, with_index=True):
            value = loss(twin(inputs), labels, index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainer_refuses_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="with a memory"):
        trainer(network(), with_memory=True).step(X, LABELS)
    with pytest.raises(ValueError, match="with a memory"):
        trainer(network(), with_memory=False).step(X, LABELS, torch.arange(12))
    with pytest.raises(ValueError, match="no batch"):
        trainer(network(), with_memory=True).train_epoch([])
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="classes in dimension 1"):
        PSKDTrainer(network(), optimizer, num_classes=3, alpha_T=0.8, total_epochs=4, num_examples=12, dim=-1)


class Translator(nn.Module):
    """A sequence-to-sequence model in the shape of one: two inputs, logits (batch, time, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.embed(target) + self.embed(source).mean(1, keepdim=True))


def test_translation_ignores_padding_and_learns_from_its_past() -> None:
    torch.manual_seed(0)
    model = Translator()
    source, target = torch.randint(1, 9, (4, 6)), torch.randint(1, 9, (4, 5))
    words = torch.randint(1, 9, (4, 5))
    words[:, 3:] = 0
    options: dict[str, Any] = {"num_classes": 9, "alpha_T": 0.5, "total_epochs": 2, "ignore_index": 0, "dim": -1}
    ours = PSKDTrainer(model, torch.optim.SGD(model.parameters(), lr=0.5), **options)
    kept = words != 0
    plain = F.cross_entropy(model(source, target)[kept], words[kept])
    torch.testing.assert_close(ours.loss((source, target), words), plain)
    ours.train_epoch([((source, target), words)])
    with torch.no_grad():
        past = model(source, target).softmax(-1)
    expected = 0.5 * plain_targets(words) + 0.5 * past
    torch.testing.assert_close(
        ours.loss((source, target), words), F.cross_entropy(model(source, target)[kept], expected[kept])
    )


def plain_targets(words: Tensor) -> Tensor:
    return F.one_hot(words, 9).float()


def detector() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
    pool = pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=1)
    return detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 9, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        min_size=64,
        max_size=64,
        box_batch_size_per_image=16,
    )


def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [20.0, 16.0, 60.0, 50.0]])
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]


def test_detection_softens_the_classification_loss_only() -> None:
    ours = PSKDDetector(detector(), 0.8, total_epochs=2).train()
    images, targets = scenes()
    torch.manual_seed(1)
    plain = ours.detector(images, targets)
    torch.manual_seed(1)
    first = ours(images, targets)
    assert {name: loss.item() for name, loss in first.items()} == {name: loss.item() for name, loss in plain.items()}
    ours.end_epoch()
    torch.manual_seed(1)
    second = ours(images, targets)
    assert second.keys() == plain.keys()
    for name in plain.keys() - {"loss_classifier"}:
        torch.testing.assert_close(second[name], plain[name])
    assert second["loss_classifier"].item() != plain["loss_classifier"].item()
    second["loss_classifier"].backward()
    assert all(parameter.grad is None for parameter in ours.teacher.parameters())


def test_detection_with_an_unchanged_model_scales_the_gradient() -> None:
    """The teacher equals the model, and there is no dropout or batch normalisation: P = p, so the gradient is (1 - a) of it."""
    ours = PSKDDetector(detector(), 0.8, total_epochs=2).train()
    images, targets = scenes()
    weight = ours.detector.roi_heads.box_predictor.cls_score.weight
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(ours(images, targets)["loss_classifier"], weight)
    ours.end_epoch()
    assert ours.alpha == 0.8
    torch.manual_seed(1)
    (soft,) = torch.autograd.grad(ours(images, targets)["loss_classifier"], weight)
    torch.testing.assert_close(soft, 0.2 * plain, rtol=1e-4, atol=1e-7)


def test_detection_leaves_the_detector_as_it_was() -> None:
    ours = PSKDDetector(detector(), 0.8, total_epochs=2)
    ours.end_epoch()
    images, targets = scenes()
    ours.train()(images, targets)
    heads = ours.detector.roi_heads
    assert "select_training_samples" not in vars(heads)
    assert not heads.box_predictor._forward_hooks
    assert not heads.box_roi_pool._forward_pre_hooks
    assert len(ours.eval()(images)) == 2
    twin = PSKDDetector(detector(), 0.8, total_epochs=2)
    twin.load_state_dict(ours.state_dict())
    assert twin.alpha == ours.alpha


def test_a_model_that_is_no_detector_is_refused() -> None:
    with pytest.raises(TypeError, match="two-stage detector"):
        PSKDDetector(nn.Linear(2, 2), 0.8, 4)
