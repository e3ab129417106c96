"""IoU of every class, pooled over all pixels of an epoch.

>>> import torch
>>> iou = StreamingIoU(num_classes=2)
>>> iou.update(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [0, 255]]))
>>> iou.counts.tolist()  # true positives, predicted, labelled
[[1, 1], [1, 2], [2, 1]]
>>> [round(value, 4) for value in iou.compute().tolist()]
[0.5, 0.5]
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor, nn

from poise.medical.segmentation.adele.checks import check_labels

EPS = 1e-10
"""Added to the union, so that a class that is nowhere has IoU 0."""


class StreamingIoU(nn.Module):
    r""":math:`IoU_c = TP_c / (T_c + P_c - TP_c + 10^{-10})` of counts that are summed over batches and processes.

    Not a mean over images: in an image where a small organ is barely cut, its IoU is noise.

    Args:
        num_classes: C, with background.
        ignore_index: label of pixels that do not count.

    Attributes:
        counts: (3, C) integers: true positives TP, predicted P, labelled T, of this process.

    Raises:
        ValueError: fewer than two classes.
    """

    counts: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (background and one class), got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.register_buffer("counts", torch.zeros(3, num_classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, predicted: Integer[Tensor, "..."], labels: Integer[Tensor, "..."]) -> None:
        """Count a batch.

        Args:
            predicted: classes 0..C-1, of any shape.
            labels: classes of the same shape, or ``ignore_index``.

        Raises:
            ValueError: the shapes differ or a label is out of range.
        """
        if predicted.shape != labels.shape:
            raise ValueError(
                f"predicted and labels must have the same shape, got {tuple(predicted.shape)} and {tuple(labels.shape)}"
            )
        check_labels(labels, self.num_classes, self.ignore_index)
        check_labels(predicted, self.num_classes, None, "predicted")
        # Ignored pixels go to a row of their own, which is faster than leaving them out.
        classes = self.num_classes
        rows = torch.where(labels == self.ignore_index, classes, labels.long())
        pairs = rows.mul_(classes).add_(predicted).flatten()
        confusion = torch.bincount(pairs, minlength=(classes + 1) * classes).view(classes + 1, classes)[:classes]
        self.counts += torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)]).to(self.counts.device)

    def compute(self) -> Float[Tensor, " classes"]:
        """(C,) float64, over all processes."""
        counts = self.counts.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        hits, predicted, labelled = counts.double()
        return hits / (labelled + predicted - hits + EPS)

    def reset(self) -> None:
        """Forget all counts; for the next epoch."""
        self.counts.zero_()

    def extra_repr(self) -> str:
        return f"{self.num_classes}, ignore_index={self.ignore_index}"
