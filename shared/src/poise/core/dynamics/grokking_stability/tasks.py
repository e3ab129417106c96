r"""The algorithmic tasks on which grokking is studied: a few hundred samples, a rule behind them, and the rest to test on.

Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697, who use the tasks
of Power et al., "Grokking", 2022, arXiv 2201.02177, and of Barak et al., "Hidden Progress in Deep Learning", NeurIPS 2022, arXiv
2207.08799.

    modular arithmetic: (a, b) -> a + b, a b, a - b or a / b mod p        sparse parity: x in {0, 1}^n -> x_1 + ... + x_k mod 2

>>> import torch
>>> task = ModularArithmetic(7, op="div", encoding="index")
>>> inputs, labels = task.table()
>>> (inputs[9].tolist(), labels[9].item(), 4 * 5 % 7)
([1, 4], 2, 6)
>>> data = task.split(0.4, torch.Generator().manual_seed(0))
>>> [len(part) for part in data]
[16, 16, 26, 26]
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Literal["add", "mul", "sub", "div"]
Encoding = Literal["one_hot", "index", "binary"]


class Split(NamedTuple):
    """Training and test samples."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: torch.device | str) -> "Split":
        """The same on another device."""
        return Split(*(part.to(device) for part in self))


@dataclass(frozen=True)
class ModularArithmetic:
    """All pairs of residues, labelled by an operation modulo p.

    Args:
        p: the modulus; a prime for ``div``.
        op: ``add``, ``mul``, ``sub`` or ``div``, the last without the pairs that divide by zero. (The authors' code floors the
            quotient of the integers; this is division in the field.)
        encoding: two one-hot vectors, two indices, or two binary numbers with the highest bit first.
        start: the first residue. The authors' data for transformers leave out 0.

    Raises:
        ValueError: an argument is unknown, ``p`` is below 2 or, for ``div``, not a prime, or ``start`` is not a residue.
    """

    p: int
    op: Operation = "add"
    encoding: Encoding = "one_hot"
    start: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("op", self.op, Operation), ("encoding", self.encoding, Encoding)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if self.p < 2 or not 0 <= self.start < self.p:
            raise ValueError(
                f"expected a modulus of at least 2 and a first residue below it, got {self.p} and {self.start}"
            )
        if self.op == "div" and any(self.p % factor == 0 for factor in range(2, int(self.p**0.5) + 1)):
            raise ValueError(f"division needs a prime modulus, got {self.p}")

    @property
    def width(self) -> int:
        """Numbers per encoded sample."""
        return {"one_hot": 2 * self.p, "index": 2, "binary": 2 * (self.p - 1).bit_length()}[self.encoding]

    def table(self) -> tuple[Tensor, Tensor]:
        """All samples in the order of the pairs: float inputs ``(n, width)`` (int64 for ``index``) and labels ``(n,)``."""
        residues = torch.arange(self.start, self.p)
        pairs = torch.cartesian_prod(residues, residues)
        if self.op == "div":
            pairs = pairs[pairs[:, 1] != 0]
        return self._encode(pairs), self._label(*pairs.unbind(1))

    def split(self, train_fraction: float, generator: torch.Generator) -> Split:
        """A random share of the table to train on, the rest to test.

        Args:
            train_fraction: the share, strictly between 0 and 1.
            generator: of the permutation.

        Raises:
            ValueError: no sample would be left on one side.
        """
        return _split(*self.table(), train_fraction, generator)

    def _label(self, a: Tensor, b: Tensor) -> Tensor:
        match self.op:
            case "add":
                return (a + b) % self.p
            case "sub":
                return (a - b) % self.p
            case "mul":
                return a * b % self.p
            case "div":
                inverses = torch.tensor([pow(residue, -1, self.p) if residue else 0 for residue in range(self.p)])
                return a * inverses[b] % self.p

    def _encode(self, pairs: Tensor) -> Tensor:
        match self.encoding:
            case "index":
                return pairs
            case "one_hot":
                return F.one_hot(pairs, self.p).flatten(1).float()
            case "binary":
                bits = torch.arange((self.p - 1).bit_length() - 1, -1, -1)
                return (pairs[:, :, None] >> bits & 1).flatten(1).float()


@dataclass(frozen=True)
class SparseParity:
    """Distinct random bit strings, labelled by the parity of their first bits.

    Args:
        n_parity: bits that count.
        n_noise: bits that do not.
        n_samples: strings to draw.

    Raises:
        ValueError: a number is out of range, or there are not that many strings.
    """

    n_parity: int = 3
    n_noise: int = 40
    n_samples: int = 2_000

    def __post_init__(self) -> None:
        if self.n_parity < 1 or self.n_noise < 0 or self.n_samples < 1:
            raise ValueError(f"expected n_parity >= 1, n_noise >= 0 and n_samples >= 1, got {self}")
        if self.n_samples > 2**self.width:
            raise ValueError(f"there are {2**self.width} strings of {self.width} bits, cannot draw {self.n_samples}")

    @property
    def width(self) -> int:
        """Bits per sample."""
        return self.n_parity + self.n_noise

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float inputs ``(n_samples, width)`` of zeros and ones, no two alike, and labels ``(n_samples,)``.

        Args:
            generator: a CPU generator.
        """
        drawn = torch.empty(0, self.width)
        while len(drawn) < self.n_samples:
            more = torch.randint(2, (self.n_samples, self.width), generator=generator).float()
            drawn = torch.cat([drawn, more])
            drawn = drawn.unique(dim=0)
        inputs = drawn[torch.randperm(len(drawn), generator=generator)[: self.n_samples]]
        return inputs, inputs[:, : self.n_parity].sum(1).long() % 2

    def split(self, train_fraction: float, generator: torch.Generator) -> Split:
        """New samples, a random share of them to train on, the rest to test.

        Args:
            train_fraction: the share, strictly between 0 and 1.
            generator: of the samples and the permutation.

        Raises:
            ValueError: no sample would be left on one side.
        """
        return _split(*self.draw(generator), train_fraction, generator)


def _split(inputs: Tensor, labels: Tensor, train_fraction: float, generator: torch.Generator) -> Split:
    count = int(train_fraction * len(inputs))
    if not 0 < count < len(inputs):
        raise ValueError(f"train_fraction {train_fraction} leaves {count} of {len(inputs)} samples to train on")
    order = torch.randperm(len(inputs), generator=generator)
    train, test = order[:count], order[count:]
    return Split(inputs[train], labels[train], inputs[test], labels[test])
