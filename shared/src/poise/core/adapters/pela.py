r"""Make a pretrained network small and repair it: low-rank layers, then a short stage of training beside the original.

Guo, Wang and Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR 2024,
arXiv 2310.10700.

.. math:: L = L_{task} + \alpha \frac1B \sum_b \mathrm{MSE}(F_s^b, F_t^b) + \beta\, \mathrm{MSE}(z_s, z_t)
              + w \frac1P \sum_p \big( \|W_2^p W_1^p - W_0^p\|_\infty - \epsilon \big)^2

with the outputs :math:`F^b` of the B blocks and the logits z of student and frozen teacher, and the norm of the entry that is
largest in size over the P layers that were factorised (:mod:`poise.core.adapters.low_rank`). What comes out is an ordinary
network, to be fine-tuned as the original would have been.

>>> import torch
>>> from torch import nn
>>> from torch.nn import functional as F
>>> from poise.core import PelaTrainer, apply_low_rank
>>> teacher = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.GELU()), nn.Sequential(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 3))
>>> student, report = apply_low_rank(teacher, ratio=2, skip=("2",))
>>> pela = PelaTrainer(student, teacher, blocks=("0", "1"))
>>> optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
>>> x, y = torch.randn(8, 16), torch.randint(3, (8,))
>>> logits, penalty = pela(x)
>>> (F.cross_entropy(logits, y) + penalty).backward()
>>> optimizer.step()
>>> sorted(pela.metrics)
['features', 'perturbation']
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.adapters.low_rank import dense_matrix, low_rank_factors, low_rank_tensors
from poise.core.functional._numerics import full_precision, widen
from poise.core.names import plain_modules
from poise.core.penalty import Penalty
from poise.core.schedule import Schedule

Features = Sequence[Tensor] | Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor, Tensor]
"""Both factors of a layer, (rank, inputs) and (outputs, rank), and the matrix (outputs, inputs) that they stand for."""

_CHUNK = 2**20  # entries of products held at a time


def feature_distillation_loss(student: Features, teacher: Features) -> Float[Tensor, ""]:
    r""":math:`\frac1B \sum_b \mathrm{MSE}(F_s^b, F_t^b)`, without a gradient into the teacher.

    Args:
        student: outputs of the student's blocks, in a sequence or by name (:class:`~poise.core.Taps` are such a mapping).
        teacher: those of the teacher, of the same shapes.

    Returns:
        The mean over blocks of the mean over entries, in float32 for half types.

    Raises:
        TypeError: a feature is not of a floating-point type, or only one of the two is a mapping.
        ValueError: there is none, one is empty, or numbers, names or shapes differ.

    Source:
        Guo et al., CVPR 2024, on feature distillation.
    """
    named = isinstance(student, Mapping), isinstance(teacher, Mapping)
    if named[0] != named[1]:
        raise TypeError("give the features of student and teacher in the same form, two sequences or two mappings")
    ours, theirs = _by_name(student), _by_name(teacher)
    if not ours or ours.keys() != theirs.keys():
        raise ValueError(f"expected features of the same blocks, at least one, got {list(ours)} and {list(theirs)}")
    errors = []
    for name, feature in ours.items():
        target = theirs[name]
        if feature.shape != target.shape:
            raise ValueError(
                f"features {name}: the student's shape {tuple(feature.shape)} differs from the teacher's {tuple(target.shape)}"
            )
        if feature.numel() == 0:
            raise ValueError(f"features {name}: there is nothing to compare in the shape {tuple(feature.shape)}")
        errors.append((widen(feature, "student") - widen(target.detach(), "teacher")).square().mean())
    return torch.stack(errors).mean()


def largest_weight_changes(pairs: Iterable[Pair]) -> Float[Tensor, " pairs"]:
    r""":math:`\|W_2 W_1 - W_0\|_\infty`, the entry that is largest in size, for every pair of factors.

    The gradient lives in one row of :math:`W_2` and one column of :math:`W_1`. The search for that entry needs the products,
    equal shapes in one batch and a few at a time; it leaves no graph behind, so that the backward pass costs next to nothing.

    Args:
        pairs: ``(w1, w2, original)`` each; originals take no gradient.

    Returns:
        One number per pair, in order, in float32 for half types.

    Raises:
        TypeError: a tensor is not of a floating-point type.
        ValueError: there is no pair, or the shapes of one do not fit or are empty.
    """
    triples = [_checked(number, pair) for number, pair in enumerate(pairs)]
    if not triples:
        raise ValueError("expected at least one pair of factors, got none")
    changes: dict[int, Tensor] = {}
    for rows in _batches(triples):
        changes |= zip(rows, _largest_entries([triples[row] for row in rows]).unbind(), strict=True)
    return torch.stack([changes[row] for row in range(len(triples))])


def weight_perturbation_loss(pairs: Iterable[Pair], eps: float = 0.0) -> Float[Tensor, ""]:
    r""":math:`\frac1P \sum_p ( \|W_2^p W_1^p - W_0^p\|_\infty - \epsilon )^2`.

    It is a square, not a hinge: a change below ε is pushed up to it.

    Args:
        pairs: ``(w1, w2, original)`` each.
        eps: ε, not negative.

    Raises:
        TypeError, ValueError: as for :func:`largest_weight_changes`; or ``eps`` is negative.

    Source:
        Guo et al., CVPR 2024, on the regularization of weight perturbation.
    """
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return (largest_weight_changes(pairs) - eps).square().mean()


class FeatureDistillation(Penalty):
    """``weight`` times :func:`feature_distillation_loss`."""

    def penalty(self, student: Features, teacher: Features) -> Float[Tensor, ""]:
        """The mean over blocks; arguments as for the function."""
        return feature_distillation_loss(student, teacher)


class WeightPerturbation(Penalty):
    """``weight`` times :func:`weight_perturbation_loss` over the low-rank layers of a student.

    It reads the current factors and the original weights from the two networks, of which it keeps no copy: neither belongs to
    its state. To compute it at every fourth step only, give a schedule: ``lambda step: 4.0 * (step % 4 == 0)``.

    Args:
        student: has low-rank layers, see :func:`~poise.core.apply_low_rank`.
        teacher: the network that it was made from, in the precision in which changes are to be measured.
        weight: w, a number or a schedule.
        eps: ε.

    Raises:
        ValueError: the student has no low-rank layer, the teacher lacks one of them or has it in another shape, or ``eps`` is
            negative.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, weight: float | Schedule = 1.0, *, eps: float = 0.0
    ) -> None:
        super().__init__(weight)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.eps = eps
        # A plain tuple: registered, the networks would be in the penalty's state.
        self._matched = tuple(_match(student, teacher))

    @property
    def pairs(self) -> dict[str, Pair]:
        """Factors and original of every low-rank matrix, by its name: ``blocks.0.mlp.fc1.weight``."""
        return {
            _join(name, tensor): (*low_rank_factors(ours, tensor), dense_matrix(theirs, tensor).detach())
            for name, tensor, ours, theirs in self._matched
        }

    def penalty(self) -> Float[Tensor, ""]:
        """The mean over layers."""
        return weight_perturbation_loss(self.pairs.values(), self.eps)

    @torch.no_grad()
    def changes(self) -> dict[str, Float[Tensor, ""]]:
        """The largest change of an entry, by the name of the weight."""
        pairs = self.pairs
        return dict(zip(pairs, largest_weight_changes(pairs.values()), strict=True))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, layers={len(self._matched)}"


def _by_name(features: Features) -> dict[Any, Tensor]:
    return dict(features) if isinstance(features, Mapping) else dict(enumerate(features))


def _checked(number: int, pair: Pair) -> Pair:
    """The pair in a type to accumulate in."""
    w1, w2, original = (widen(tensor, name) for tensor, name in zip(pair, ("w1", "w2", "original"), strict=True))
    fit = w1.dim() == w2.dim() == 2 and w1.shape[0] == w2.shape[1] and (w2.shape[0], w1.shape[1]) == original.shape
    if not fit:
        raise ValueError(
            f"pair {number}: expected w1 (rank, inputs), w2 (outputs, rank) and original (outputs, inputs), got the shapes "
            f"{tuple(w1.shape)}, {tuple(w2.shape)} and {tuple(original.shape)}"
        )
    if original.numel() == 0:
        raise ValueError(f"pair {number}: the original is empty, of shape {tuple(original.shape)}")
    return w1, w2, original.detach()


def _batches(triples: Sequence[Pair]) -> Iterator[list[int]]:
    """Rows of equal shapes, so many that their products stay small."""
    groups: dict[Any, list[int]] = {}
    for row, (w1, w2, original) in enumerate(triples):
        groups.setdefault((w1.shape, w2.shape, original.dtype, original.device), []).append(row)
    for rows in groups.values():
        most = max(1, _CHUNK // triples[rows[0]][2].numel())
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def _largest_entries(pairs: Sequence[Pair]) -> Float[Tensor, " pairs"]:
    """The largest entry of the change of each of these pairs, which have the same shapes."""
    w1, w2 = (torch.stack(factors) for factors in ([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    originals = [pair[2] for pair in pairs]
    each = torch.arange(len(pairs), device=w1.device)
    with full_precision(w1):
        with torch.no_grad():
            changes = torch.bmm(w2, w1)
            for change, original in zip(changes, originals, strict=True):
                change.sub_(original)
            row = changes.abs_().amax(dim=2).argmax(dim=1)
            column = changes[each, row].argmax(dim=1)
        products = (w2[each, row] * w1[each, :, column]).sum(dim=1)
        # index_select: to index by tensors without dimensions would wait for the GPU
        where = zip(originals, row.split(1), column.split(1), strict=True)
        before = torch.cat([original.index_select(0, i).index_select(1, j).flatten() for original, i, j in where])
    return (products - before).abs()


def _match(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Module]]:
    """Module name, tensor name, and the modules of both networks, for every low-rank matrix of the student."""
    originals = plain_modules(teacher)
    found = False
    for name, tensor, module in low_rank_tensors(student):
        found = True
        full = _join(name, tensor)
        if name not in originals or not isinstance(getattr(originals[name], tensor, None), Tensor):
            raise ValueError(f"the teacher has no {full}, which is of low rank in the student: is it another network?")
        w1, w2 = low_rank_factors(module, tensor)
        shape = dense_matrix(originals[name], tensor).shape
        if shape != (w2.shape[0], w1.shape[1]):
            raise ValueError(
                f"{full} is {w2.shape[0]} x {w1.shape[1]} in the student and {tuple(shape)} in the teacher"
            )
        yield name, tensor, module, originals[name]
    if not found:
        raise ValueError(f"{type(student).__name__} has no low-rank layer: make it with apply_low_rank")


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
