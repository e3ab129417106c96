"""The masks in use, next to what the network last predicted for them: 7 bytes a pixel, whatever the number of classes.

>>> import torch
>>> store = LabelStore(torch.tensor([[[1, 1], [0, 0]], [[2, 0], [0, 0]]]), num_classes=3)
>>> index = torch.tensor([1, 0])
>>> store.read(index).shape, store.labels.nbytes
(torch.Size([2, 2, 2]), 10)
>>> store.remember(index, torch.tensor([0.9, 0.05, 0.05]).view(1, 3, 1, 1).expand(2, 3, 2, 2))
>>> store.correct(torch.tensor([False, True, False]))  # pixels that were changed
2
>>> store[0].tolist(), store.original(0).tolist(), store[1].tolist()
([[0, 0], [0, 0]], [[1, 1], [0, 0]], [[2, 0], [0, 0]])
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows
from poise.medical.segmentation.adele.checks import check_labels, check_probabilities, check_spatial
from poise.medical.segmentation.adele.correction import IGNORE, MEDICAL, Correction, Prediction, check_triggered


@runtime_checkable
class Masks(Protocol):
    """N masks, tensors or arrays, such as a list or a data set that reads one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class LabelStore(nn.Module):
    """Masks of a training set that are corrected as it is trained on.

    Of a prediction it keeps what correction needs, the class, the largest foreground probability and that of background, the last two
    in half precision (2^-12 relative; a threshold decides by them). All of it is in the ``state_dict``. With
    ``torch.distributed`` every process remembers what all of them predicted, and corrects the same.

    Args:
        labels: (N, H, W) or (N, D, H, W) classes 0..C-1 or 255 to ignore; or a sequence of N masks that may differ in size, such as a
            data set that reads one at a time.
        num_classes: C, at most 255.
        folder: keep everything in files there, mapped into memory, instead of in memory.
        device: where the store stays; by default on the CPU until it is moved.
        synchronize: share predictions between processes.

    Attributes:
        labels: bank of the masks in use (N, *S) uint8; smaller ones are padded with 255.
        originals: bank of the masks as given.

    Raises:
        TypeError: masks are not integers.
        ValueError: there is none, a label is out of range, masks differ in dimension, or the folder holds a store of another size.
    """

    sizes: Tensor

    def __init__(
        self,
        labels: Tensor | Masks,
        num_classes: int,
        *,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        if not 2 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes must lie in 2..{IGNORE}, got {num_classes}")
        if len(labels) == 0:
            raise ValueError("labels must hold at least one mask, got none")
        self.num_classes = num_classes
        sizes = [tuple(mask.shape) for mask in _masks(labels)]
        if {len(size) for size in sizes} not in ({2}, {3}):
            raise ValueError(f"labels must be masks of two, or all of three dimensions, got {sorted(set(sizes))[:5]}")
        self.register_buffer("sizes", torch.tensor(sizes))
        shape = tuple(self.sizes.amax(0).tolist())

        def bank(name: str, shape: tuple[int, ...], shared: bool, dtype: torch.dtype = torch.uint8) -> SampleBank:
            file = None if folder is None else Path(folder) / f"{name}.bin"
            storage = DenseRows(dtype, file)
            return SampleBank(len(sizes), shape, storage=storage, device=device, synchronize=shared)

        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        # Every process has the masks and corrects them alike; only what each of them predicts has to be shared.
        self.labels, self.originals = bank("labels", shape, False), bank("originals", shape, False)
        self.predicted = bank("predicted", shape, synchronize)
        self.confidence = bank("confidence", (2, *shape), synchronize, torch.float16)
        start = 0
        for masks in _batches(labels):
            check_labels(masks, num_classes, IGNORE, f"labels (from mask {start} on)")
            index = torch.arange(start, start + len(masks))
            self._write(self.originals, index, masks.to(torch.uint8), IGNORE)
            start += len(masks)
        self.reset()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Integer[Tensor, "..."]:
        """The mask in use of one sample, uint8, in its own size."""
        return self._own_size(self.labels, index)

    def original(self, index: int) -> Integer[Tensor, "..."]:
        """The mask of one sample as it was given, uint8, in its own size."""
        return self._own_size(self.originals, index)

    def read(self, index: Integer[Tensor, " batch"]) -> Integer[Tensor, "batch ..."]:
        """Masks in use (B, *S) as a loss takes them (int64); smaller ones are padded with 255."""
        return self.labels.read(index).long()

    def read_original(self, index: Integer[Tensor, " batch"]) -> Integer[Tensor, "batch ..."]:
        """Masks as they were given, otherwise like :meth:`read`."""
        return self.originals.read(index).long()

    @torch.no_grad()
    def remember(self, index: Integer[Tensor, " batch"], probs: Float[Tensor, "..."]) -> None:
        """Keep a summary of the last prediction of some samples.

        Args:
            index: (B,) their places in the data set.
            probs: (B, C, *S) probabilities on the pixels of their masks; one call is for masks of one size. On an accelerator their
                sums are not checked.

        Raises:
            TypeError: ``probs`` are not floating-point, or the index is not integer.
            ValueError: they hold NaN or do not sum to 1, or do not have C classes or the size of the masks.
        """
        sizes = self.sizes[index.to(self.sizes.device)]
        if probs.ndim < 3 or probs.shape[1] != self.num_classes or (sizes != sizes.new_tensor(probs.shape[2:])).any():
            raise ValueError(
                f"probs must be (batch, {self.num_classes}, *S) on masks of sizes {sizes.unique(dim=0).tolist()}, "
                f"got {tuple(probs.shape)}"
            )
        check_spatial(probs[:, 0], probs)
        if probs.device.type == "cpu":
            check_probabilities(probs)
        label, foreground, background = Prediction.of(probs)
        self._write(self.predicted, index, label.to(torch.uint8), 0)
        self._write(self.confidence, index, torch.stack([foreground, background], 1).half(), 0)

    def prediction(self, index: Integer[Tensor, " batch"]) -> Prediction:
        """Summaries that were remembered, of smaller images padded with 0; of samples without one all 0."""
        return Prediction(self.predicted.read(index), *self.confidence.read(index).unbind(1))

    @torch.no_grad()
    def correct(self, triggered: Bool[Tensor, " classes"], how: Correction = MEDICAL, chunk: int = 256) -> int:
        """Correct the masks in use by the remembered predictions; samples without one stay as they are.

        Args:
            triggered: (C,) the classes that are being memorised.
            how: the rule of correction.
            chunk: samples at a time.

        Returns:
            Number of pixels that changed.

        Raises:
            TypeError, ValueError: ``triggered`` is not one bool for each class.
        """
        check_triggered(triggered, self.num_classes)
        changed = torch.zeros((), dtype=torch.int64, device=self.labels.written.device)
        if not triggered[1:].any():
            return 0
        for size in self.sizes.unique(dim=0):
            of_this_size = (self.sizes == size).all(1) & self.predicted.written.to(self.sizes.device)
            crop: Any = (..., *(slice(side) for side in size.tolist()))
            for index in of_this_size.nonzero()[:, 0].split(chunk):
                before = self.labels.read(index)
                prediction = Prediction(*(part[crop] for part in self.prediction(index)))
                after = before.clone()
                after[crop] = how(before[crop], prediction, triggered)
                changed += (after != before).sum()
                self.labels.write(index, after)
        return int(changed)

    def reset(self, chunk: int = 256) -> None:
        """Go back to the masks that were given."""
        for index in torch.arange(len(self)).split(chunk):
            self.labels.write(index, self.originals.read(index))

    @property
    def nbytes(self) -> int:
        """Bytes of masks and predictions."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{len(self)} masks of up to {tuple(self.labels.shape)}, num_classes={self.num_classes}"

    def _write(self, bank: SampleBank, index: Tensor, rows: Tensor, padding: int) -> None:
        missing = [most - side for most, side in zip(bank.shape[-self._dims :], rows.shape[-self._dims :], strict=True)]
        pads = [pad for side in reversed(missing) for pad in (0, side)]
        bank.write(index, nn.functional.pad(rows, pads, value=padding) if any(pads) else rows)

    def _own_size(self, bank: SampleBank, index: int) -> Tensor:
        crop = tuple(slice(side) for side in self.sizes[index].tolist())
        return bank.read(torch.tensor([index]))[0][crop]

    @property
    def _dims(self) -> int:
        return self.sizes.shape[1]


def _masks(labels: Tensor | Masks) -> Iterator[Tensor]:
    for index in range(len(labels)):
        mask = labels[index]
        yield torch.from_numpy(np.ascontiguousarray(mask)) if isinstance(mask, np.ndarray) else mask


def _batches(labels: Tensor | Masks, size: int = 256) -> Iterator[Tensor]:
    """Masks with a batch dimension: many of a tensor, one of a sequence, where they may differ in size."""
    yield from labels.split(size) if isinstance(labels, Tensor) else (mask[None] for mask in _masks(labels))
