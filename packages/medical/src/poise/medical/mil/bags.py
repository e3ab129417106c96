r"""Bags of instances: one at a time, or several of different size padded to one tensor with a mask.

>>> import torch
>>> small, large = Bag(torch.randn(3, 8), label=0, id="a"), Bag(torch.randn(5, 8), label=1, id="b")
>>> batch = collate_bags([small, large])
>>> batch.features.shape, batch.mask.sum(1).tolist(), batch.labels.tolist()
(torch.Size([2, 5, 8]), [3, 5], [0, 1])
>>> features, mask = Subsample(0.6)(batch.features, batch.mask)
>>> features.shape, mask.sum(1).tolist()
(torch.Size([2, 3, 8]), [1, 3])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class Bag:
    """The instances of one slide.

    Attributes:
        features: ``(instances, features)``, floating-point.
        label: class of the bag, 0 or above.
        coords: where each instance lies, ``(instances, 2)``: x and y in pixels of the slide; ``None`` if not known.
        id: name of the slide.

    Raises:
        ValueError: no instance, features that are not finite, a negative label, or coordinates that do not fit.
        TypeError: features are not floating-point.
    """

    features: Tensor
    label: int
    coords: Tensor | None = None
    id: str = ""

    def __post_init__(self) -> None:
        name, features = f"bag {self.id!r}", self.features
        if features.ndim != 2:
            raise ValueError(f"{name}: features must have shape (instances, features), got {tuple(features.shape)}")
        if len(features) == 0:
            raise ValueError(f"{name} is empty: a bag needs at least one instance")
        if not features.is_floating_point():
            raise TypeError(f"{name}: features must be floating-point, got {features.dtype}")
        # One sum finds out without a mask as large as the bag; only what it suspects is looked at closely.
        if not features.sum(dtype=torch.float32).isfinite() and not (finite := features.isfinite().all(1)).all():
            bad = int((~finite).sum())
            raise ValueError(f"{name}: {bad} of {len(features)} instances have features that are NaN or infinite")
        if self.label < 0:
            raise ValueError(f"{name}: label must be a class index, 0 or above, got {self.label}")
        if self.coords is not None and tuple(self.coords.shape) != (len(features), 2):
            raise ValueError(
                f"{name}: {len(features)} instances need coordinates of shape ({len(features)}, 2), got {tuple(self.coords.shape)}"
            )

    def __len__(self) -> int:
        return len(self.features)


class BagBatch(NamedTuple):
    """Several bags, padded with zeros to the size of the largest.

    Attributes:
        features: ``(bags, instances, features)``.
        mask: True where an instance is real ``(bags, instances)``.
        labels: ``(bags,)``.
        coords: ``(bags, instances, 2)``, or ``None`` if a bag has none.
        ids: names of the bags.
    """

    features: Tensor
    mask: Tensor
    labels: Tensor
    coords: Tensor | None
    ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> "BagBatch":
        """The same on another device."""
        features, mask, labels = (tensor.to(device) for tensor in (self.features, self.mask, self.labels))
        return BagBatch(features, mask, labels, None if self.coords is None else self.coords.to(device), self.ids)


def collate_bags(bags: Sequence[Bag]) -> BagBatch:
    """Join bags of any size; the ``collate_fn`` of a ``DataLoader``.

    Raises:
        ValueError: no bag, or bags with a different number of features.
    """
    widths = sorted({bag.features.shape[1] for bag in bags})
    if len(widths) != 1:
        raise ValueError(f"bags of a batch must have one number of features, got {widths or 'no bag'}")
    sizes = torch.tensor([len(bag) for bag in bags])
    coords = [bag.coords for bag in bags if bag.coords is not None]
    return BagBatch(
        features=pad_sequence([bag.features for bag in bags], batch_first=True),
        mask=torch.arange(int(sizes.max())) < sizes[:, None],
        labels=torch.tensor([bag.label for bag in bags]),
        coords=pad_sequence(coords, batch_first=True) if len(coords) == len(bags) else None,
        ids=tuple(bag.id for bag in bags),
    )


def check_bags(features: Tensor, mask: Tensor | None, in_dim: int | None = None) -> None:
    """Refuse what no model can pool.

    That every bag has a real instance can only be read off the mask, so CUDA waits for it here; under ``torch.compile`` that
    check is left out.

    Args:
        features: ``(bags, instances, features)``.
        mask: True where an instance is real ``(bags, instances)``, or ``None``.
        in_dim: number of features that the model expects.

    Raises:
        ValueError: empty bags, a bag without a real instance, or shapes that do not fit.
        TypeError: the mask is not boolean.
    """
    if features.ndim != 3:
        raise ValueError(f"bags must have shape (bags, instances, features), got {tuple(features.shape)}")
    if features.shape[1] == 0:
        raise ValueError(f"empty bag: expected at least one instance, got features of shape {tuple(features.shape)}")
    if in_dim is not None and features.shape[2] != in_dim:
        raise ValueError(f"the model was built for {in_dim} features, got {features.shape[2]}")
    if mask is not None:
        check_mask(mask, features)


def check_mask(mask: Tensor, features: Tensor) -> None:
    """The part of :func:`check_bags` about the mask; features may have any shape that begins with (bags, instances)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True where an instance is real), got {mask.dtype}")
    if mask.shape != features.shape[:2]:
        raise ValueError(f"mask must be (bags, instances) = {tuple(features.shape[:2])}, got {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and not (filled := mask.any(1)).all():
        empty = (~filled).nonzero().flatten().tolist()
        raise ValueError(f"mask leaves no instance of bag {', '.join(map(str, empty))} of the batch")


class Subsample(nn.Module):
    r"""Keep a random part of every bag, :math:`\max(1, \lfloor \rho N \rfloor)` distinct instances, while training.

    In evaluation mode bags pass as they are.

    Args:
        rho: the share that is kept, in (0, 1]; all of it at 1.
        generator: where to draw from; PyTorch's global generator by default.

    Raises:
        ValueError: ``rho`` is out of range.

    Source:
        Zhang et al., arXiv 2406.15303, "Subsampling".
    """

    def __init__(self, rho: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < rho <= 1:
            raise ValueError(f"rho must lie in (0, 1], got {rho}")
        self.rho, self.generator = rho, generator

    def forward(
        self, features: Float[Tensor, "bags instances ..."], mask: Bool[Tensor, "bags instances"] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The kept instances, in random order, and their mask (``None`` if there was none).

        Args:
            features: padded bags, or anything else with one entry per instance.
            mask: True where an instance is real.

        Raises:
            ValueError: the bags hold no instance.
        """
        if not self.training or self.rho == 1:
            return features, mask
        bags, instances = features.shape[:2]
        if instances == 0:
            raise ValueError(f"features must hold an instance in each bag, got shape {tuple(features.shape)}")
        device = features.device if self.generator is None else self.generator.device
        draw = torch.rand(bags, instances, generator=self.generator, device=device).to(features.device)
        if mask is not None:
            draw = draw.masked_fill(~mask, 2.0)  # behind every real instance
        kept = max(1, int(self.rho * instances))
        order = draw.argsort(1)[:, :kept]
        index = order.reshape(bags, kept, *[1] * (features.ndim - 2)).expand(-1, -1, *features.shape[2:])
        chosen = features.gather(1, index)
        if mask is None:
            return chosen, None
        keep = (self.rho * mask.sum(1).double()).long().clamp(min=1)
        return chosen, torch.arange(kept, device=features.device) < keep[:, None]

    def extra_repr(self) -> str:
        return f"rho={self.rho}"
