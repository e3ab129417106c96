"""What the ADELE experiment measures, in per cent where it is an IoU; means over the foreground classes."""

import torch
from torch import Tensor, nn

from poise.medical.experiments.adele_data import Task
from poise.medical.segmentation.adele.consistency import multiscale_consistency
from poise.medical.segmentation.adele.detector import MemorizationDetector
from poise.medical.segmentation.adele.iou import StreamingIoU
from poise.medical.segmentation.adele.multiscale import multiscale_forward

MEASURES = ("iou_noisy", "iou_clean", "label_iou", "miou")
"""After every epoch: IoU of the training predictions with the masks as given and with the true masks, of the masks in use with the
true masks, and of the predictions on the test set with true masks (NaN where that was not evaluated)."""

LAST = 5
"""Epochs at the end that the two training IoU are averaged over: they are measured while the network changes."""


def epoch_measures(task: Task, model: nn.Module, device: torch.device, evaluate: bool) -> Tensor:
    """One value for each of ``MEASURES``."""
    noisy, clean, labels = training_iou(task)
    test = mean_iou(task, model, device) if evaluate else torch.nan
    return torch.tensor([noisy, clean, labels, test], dtype=torch.float64)


def training_iou(task: Task, chunk: int = 64) -> tuple[float, float, float]:
    """Of remembered predictions with given and true masks (NaN before there are any), and of masks in use with true ones."""
    store = task.store
    with_given, with_true, in_use = (StreamingIoU(len(task.classes)) for _ in range(3))
    for index in torch.arange(len(store)).split(chunk):
        clean = task.clean(index)
        in_use.update(_within(store.read(index)), _outside(clean, store.read(index)))
        seen = store.predicted.seen(index)
        if seen.any():
            predicted = store.prediction(index[seen]).label.long()
            with_given.update(predicted, store.read_original(index[seen]))
            with_true.update(predicted, clean[seen])
    predicted_any = bool(with_true.counts.any())
    return (
        foreground(with_given) if predicted_any else torch.nan,
        foreground(with_true) if predicted_any else torch.nan,
        foreground(in_use),
    )


@torch.no_grad()
def mean_iou(task: Task, model: nn.Module, device: torch.device) -> float:
    """On the test set, in evaluation mode."""
    model.eval()
    iou = StreamingIoU(len(task.classes)).to(device)
    for images, masks in task.test():
        (logits,) = multiscale_forward(model, images.to(device), (1.0,))
        iou.update(logits.max(1).indices, masks.to(device))
    return foreground(iou)


@torch.no_grad()
def inconsistency(task: Task, model: nn.Module, device: torch.device) -> float:
    """Mean divergence of predictions at three scales from their mixture, over the test set without a gate, times 1000."""
    model.eval()
    total, pixels = 0.0, 0
    for images, masks in task.test():
        _, divergence, _ = multiscale_consistency(multiscale_forward(model, images.to(device)), gate=0.0)
        total += float(divergence.sum())
        pixels += masks.numel()
    return 1000 * total / pixels


def final_measures(task: Task, model: nn.Module, device: torch.device, history: Tensor) -> dict[str, float]:
    """Of the trained network and of the masks that it leaves behind."""
    miou = mean_iou(task, model, device)
    evaluated = history[:, MEASURES.index("miou")]
    best = max([miou, *evaluated[evaluated.isfinite()].tolist()])
    _, _, labels = training_iou(task)
    given = StreamingIoU(len(task.classes))
    for index in torch.arange(len(task.store)).split(64):
        original = task.store.read_original(index)
        given.update(_within(original), _outside(task.clean(index), original))
    return {
        "miou": miou,
        "miou_best": best,
        "miou_drop": best - miou,
        "label_iou": labels,
        "label_iou_given": foreground(given),
        "label_gain": labels - foreground(given),
        "inconsistency": inconsistency(task, model, device),
    }


def early_learning(history: Tensor) -> dict[str, float]:
    """What comes after the epoch in which training predictions are closest to the true masks; nothing where they are not followed."""
    noisy, clean = history[:, MEASURES.index("iou_noisy")], history[:, MEASURES.index("iou_clean")]
    if not (noisy.isfinite().all() and clean.isfinite().all()):
        return {}
    peak = int(clean.argmax())
    return {
        "clean_peak": float(peak + 1),
        "noisy_rise": float(noisy[-LAST:].mean() - noisy[peak]),
        "clean_fall": float(clean[peak] - clean[-LAST:].mean()),
    }


def trigger_measures(detector: MemorizationDetector, task: Task, epochs: int) -> dict[str, float]:
    """How many classes were triggered, how far apart, and how many pixels of the others changed."""
    classes = len(task.classes) - 1
    triggered = detector.triggered[1:].expand(classes)  # a detector of one class stands for all
    when = torch.where(triggered, detector.trigger_epochs[1:].expand(classes), epochs)
    kept = 1 + (~triggered).nonzero()[:, 0]
    changed = 0
    for index in torch.arange(len(task.store)).split(64):
        now, before = task.store.read(index), task.store.read_original(index)
        changed += int(((now != before) & (torch.isin(now, kept) | torch.isin(before, kept))).sum())
    return {
        "triggered_classes": float(triggered.sum()),
        "first_trigger": float(when.min()),
        "trigger_spread": float(when.max() - when.min()),
        "untriggered_changed": float(changed),
    }


def foreground(iou: StreamingIoU) -> float:
    """Mean IoU of the foreground classes that occur, in per cent."""
    _, predicted, labelled = iou.counts[:, 1:]
    occurs = (predicted + labelled) > 0
    return float(100 * iou.compute()[1:][occurs].mean()) if occurs.any() else 0.0


def _within(labels: Tensor) -> Tensor:
    """Labels as if they were predictions: ignored pixels are background, and left out by :func:`_outside`."""
    return labels.masked_fill(labels == 255, 0)


def _outside(clean: Tensor, labels: Tensor) -> Tensor:
    return clean.masked_fill(labels == 255, 255)
