r"""Candidate search by float32 matrix products with a proven rounding error.

With rows x' = s (x - c), c amid the data and s a power of two such that |x'| <= 1, and queries q' likewise,

    |q' - x'|^2 = |q'|^2 + 2 h,     h = |x'|^2/2 - q'.x'.

One product of the rows [x', (1/2 - kappa) |x'|^2] with the queries [-q', 1] gives a score that satisfies

    score - kappa |q'|^2/2  <=  h,     kappa = gamma_{d+8} + 3 u_in,     gamma_n = n u / (1 - n u),  u = 2^-24.

For a product of length d + 1, summed in any order, errs by at most gamma_{d+1} (|q'||x'| + |x'|^2/2) (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., eq. 3.5), rounding its inputs adds 3 u_in times the same, and
|q'||x'| <= (|q'|^2 + |x'|^2)/2. u_in is u, or more where PyTorch may shorten the inputs of float32 products
(``torch.set_float32_matmul_precision``).

Selecting the smallest of a million scores costs more than computing them. So only the minimum of each block of B
consecutive rows is kept, a plain vectorised reduction; the rows of the best blocks are the candidates, and the minimum
of the next block is the floor of all others.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

_UNIT = 2.0**-24
_SHORTENED = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}  # unit roundoff of TF32 and bfloat16
_CACHE = 4 * 2**20  # bytes of a tile on the CPU: it is read again at once and should still be in the cache
_SPARE = 3  # blocks beyond the rows wanted: enough to separate them from the rest unless rows coincide

FAR = 2.0**60
"""Squared distances of queries further outside the data than this many radii could overflow float32."""


class Frame:
    """The map x -> s (x - c) that brings the rows into the unit ball, s a power of two so that scaling never rounds.

    Any point c in the middle of the data will do: it is the mean of a few thousand rows.
    """

    def __init__(self, data: Float[Tensor, "n d"]) -> None:
        rows, columns = data.shape
        self.center = data[:: -(-rows // 4096)].double().mean(dim=0)
        low, high = (bound.double() for bound in data.aminmax())
        radius = torch.maximum(high - self.center, self.center - low).amax().item() * math.sqrt(columns)
        self.scale = 2.0 ** min(-math.frexp(radius)[1], 465) if radius > 0 else 1.0

    def __call__(self, rows: Tensor) -> Float[Tensor, "m d"]:
        return (rows.double() - self.center) * self.scale

    def parts(self, data: Float[Tensor, "n d"]) -> Iterator[tuple[slice, Float[Tensor, "part d"]]]:
        """The mapped rows in pieces that stay in the cache."""
        step = max(1, _CACHE // (8 * data.shape[1]))
        for start in range(0, data.shape[0], step):
            yield slice(start, start + step), self(data[start : start + step])


def rounding_bound(terms: int, shortened: float = 0.0) -> float:
    """kappa for products of ``terms`` terms whose inputs are rounded with unit roundoff ``shortened``, at least u."""
    return terms * _UNIT / (1 - terms * _UNIT) + 3 * max(shortened, _UNIT)


def shortened_inputs() -> float:
    """Unit roundoff of the inputs of float32 products, where PyTorch may shorten them; 0 where it may not."""
    return _SHORTENED[torch.get_float32_matmul_precision()]


class MatmulSearch:
    """See the module's text. Keeps n (d + 1) float32 numbers."""

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        self.rows, self.columns = data.shape
        self.memory = memory
        self.frame = Frame(data)
        self.kappa = rounding_bound(self.columns + 8, shortened_inputs())
        self.lifted = data.new_empty((self.rows, self.columns + 1), dtype=torch.float32)
        for part, rows in self.frame.parts(data):
            self.lifted[part, :-1] = rows
            self.lifted[part, -1] = rows.square_().sum(1) * (0.5 - self.kappa)

    def batch(self, count: int) -> int:
        """How many queries fit into the memory at once."""
        size, taken = self._blocks(count)
        # minima and their transpose, candidates as data, in float64 and squared, and a quarter for the tile of scores
        need = 4 * (8 * -(-self.rows // size) + 24 * taken * size * self.columns) // 3 + 16 * size
        if self.memory < need:
            raise ValueError(f"memory must be at least {need} bytes for one query, got {self.memory}")
        return self.memory // need

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """The rows of the best blocks, ascending (n past the end), and the floor of the others."""
        size, taken = self._blocks(count)
        points = self.frame(queries)
        lowest = self._block_minima(points, size)
        if taken >= lowest.shape[1]:
            block = torch.arange(lowest.shape[1], device=queries.device).expand(lowest.shape)
            floor = torch.full_like(points[:, 0], torch.inf)
        else:
            score, block = lowest.topk(taken + 1, dim=1, largest=False)
            floor = (2 * score[:, -1].double() + self._offset(points)) / self.frame.scale**2
            block = block[:, :-1].sort(dim=1).values
        index = (block[:, :, None] * size + torch.arange(size, device=queries.device)).flatten(1)
        return index.clamp_(max=self.rows), floor

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """All pairs that the scores cannot rule out."""
        points = self.frame(queries)
        # the largest score of a row that may lie within the radius, rounded up
        limit = ((squared * self.frame.scale**2 - self._offset(points)) / 2).float()
        limit = limit.nextafter(torch.full_like(limit, torch.inf))
        piece = max(1, self.memory // (48 * (self.columns + 4)))
        for some in torch.arange(queries.shape[0], device=queries.device).split(256):
            lifted = _lift(points[some])
            step = max(1, self.memory // (64 * some.numel()))
            tile = lifted.new_empty((min(step, self.rows), some.numel()))
            for start in range(0, self.rows, step):
                # negated, so that an overflow (NaN) rules nothing out
                row, query = (~(self._score(start, lifted, tile) > limit[some])).nonzero(as_tuple=True)
                for at in range(0, row.numel(), piece):
                    yield some[query[at : at + piece]], row[at : at + piece] + start

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """No: every row is looked at either way."""
        return False

    def _block_minima(self, points: Float[Tensor, "m d"], size: int) -> Float[Tensor, "m blocks"]:
        lifted = _lift(points)
        queries = points.shape[0]
        lowest = lifted.new_empty((-(-self.rows // size), queries))
        budget = self.memory // 4 if points.device.type != "cpu" else min(self.memory // 4, _CACHE)
        step = max(1, budget // (4 * queries * size)) * size
        tile = lifted.new_empty((min(step, self.rows), queries))
        for start in range(0, self.rows, step):
            score = self._score(start, lifted, tile)
            first, whole = start // size, score.shape[0] // size
            blocks = score[: whole * size].view(whole, size, queries)
            lowest[first : first + whole] = blocks.amin(dim=1)
            if whole * size < score.shape[0]:
                lowest[first + whole] = score[whole * size :].amin(dim=0)
        return lowest.T.contiguous()

    def _score(
        self, start: int, lifted: Float[Tensor, "lifted m"], tile: Float[Tensor, "rows m"]
    ) -> Float[Tensor, "part m"]:
        """The scores of the rows from ``start`` on, as many as the tile holds; ``out=`` also keeps autocast away."""
        rows = self.lifted[start : start + tile.shape[0]]
        return torch.mm(rows, lifted, out=tile[: rows.shape[0]])

    def _offset(self, points: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """What twice a score lacks to a lower bound on the squared distance; nothing is certain about queries far out."""
        norm = points.square().sum(1)
        underflow = self.columns * 2.0**-120 * (1 + norm.sqrt())
        return ((1 - self.kappa) * norm - underflow).masked_fill(norm > FAR**2, -torch.inf)

    def _blocks(self, count: int) -> tuple[int, int]:
        """Rows per block and blocks to take.

        The size is the power of two that balances selection among n/B minima against the distances of the rows taken.
        """
        taken = count + _SPARE
        balanced = math.sqrt(self.rows / (4 * taken * self.columns))
        fast = self.rows / (64 * (taken + 1))  # torch.topk is several times slower when asked for more than 1/64
        return 2 ** min(6, max(0, math.floor(math.log2(min(balanced, fast)) + 0.5))), taken


def _lift(points: Float[Tensor, "m d"]) -> Float[Tensor, "lifted m"]:
    """The queries' side of the product, [-q', 1] as columns."""
    return torch.cat([-points, torch.ones_like(points[:, :1])], dim=1).float().T.contiguous()
