"""Candidate search by optional libraries, on the CPU: SciPy's k-d tree and the flat index of faiss."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.core.neighbors.matmul import FAR, Frame, rounding_bound


class TreeSearch:
    """SciPy's k-d tree: distances in float64, so the floor only needs room for their rounding."""

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        try:
            from scipy.spatial import KDTree
        except ImportError as error:
            raise ModuleNotFoundError("backend 'kdtree' needs SciPy: pip install scipy") from error
        self.rows, self.columns = data.shape
        self.memory = memory
        self.slack = (self.columns + 4) * 2.0**-52
        # copied: the tree keeps a view of what it is given
        self.tree = KDTree(data.double().cpu().numpy(), copy_data=data.dtype == torch.float64)

    def batch(self, count: int) -> int:
        """How many queries fit into the memory at once."""
        return _batch(self.memory, count + 1, self.columns)

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """One row more than wanted, ascending; all others are at least as far as the farthest of them."""
        taken = min(count + 1, self.rows)
        distance, index = self.tree.query(queries.cpu().numpy(), k=range(1, taken + 1), workers=torch.get_num_threads())
        floor = torch.from_numpy(distance[:, -1] ** 2 * (1 - self.slack)).to(queries.device)
        if taken == self.rows:
            floor = torch.full_like(floor, torch.inf)
        return torch.from_numpy(np.sort(index, axis=1)).to(queries.device), floor

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """The contents of a ball around each query."""
        radius = (squared.sqrt() * (1 + self.slack)).tolist()
        balls = (self.tree.query_ball_point(*ball) for ball in zip(queries.cpu().numpy(), radius, strict=True))
        return _pieces(balls, self.memory // (48 * (self.columns + 4)), queries.device)

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """No: a ball holds many rows, and its query finds the nearest of them by itself."""
        return False


class FaissSearch:
    """The flat (exhaustive) L2 index of faiss, float32, with the error bound of :mod:`poise.core.neighbors.matmul`."""

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ModuleNotFoundError("backend 'faiss' needs faiss: pip install faiss-cpu") from error
        self.rows, self.columns = data.shape
        self.memory = memory
        self.frame = Frame(data)
        self.kappa = rounding_bound(2 * self.columns + 16)
        self.index: Any = faiss.IndexFlatL2(self.columns)
        for _, rows in self.frame.parts(data):
            self.index.add(self._float32(rows))

    def batch(self, count: int) -> int:
        """How many queries fit into the memory at once."""
        return _batch(self.memory, count + 4, self.columns)

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """A few rows more than wanted by float32 distances, ascending, and the floor of the rest."""
        taken = min(count + 4, self.rows)
        points = self.frame(queries)
        distance, index = self.index.search(self._float32(points), taken)
        floor = (torch.from_numpy(distance[:, -1]).to(points) - self._error(points)) / self.frame.scale**2
        floor.masked_fill_(points.norm(dim=1) > FAR, -torch.inf)
        if taken == self.rows:
            floor = torch.full_like(floor, torch.inf)
        index[index < 0] = self.rows  # distances that overflowed
        return torch.from_numpy(np.sort(index, axis=1)).to(queries.device), floor

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """The contents of a ball around each query, widened by the rounding error."""
        points = self.frame(queries)
        limit = ((squared * self.frame.scale**2 + self._error(points)) * (1 + 2.0**-22)).tolist()
        return _pieces(
            map(self._ball, self._float32(points), limit), self.memory // (48 * (self.columns + 4)), queries.device
        )

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """No: every row is looked at either way."""
        return False

    def _ball(self, point: np.ndarray, radius: float) -> np.ndarray:
        # a query so far out that float32 overflows: nothing can be ruled out
        return self.index.range_search(point[None], radius)[2] if radius < FAR**2 else np.arange(self.rows)

    def _error(self, points: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Bound on the error of a squared distance to any row (rows have norm at most 1)."""
        return self.kappa * (points.norm(dim=1) + 1).square()

    @staticmethod
    def _float32(points: Tensor) -> np.ndarray:
        return np.ascontiguousarray(points.float().cpu().numpy())


def _pieces(
    balls: Iterable[Sequence[int] | np.ndarray], size: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
    """Pairs (query, row) from the rows in each query's ball, at most ``size`` at a time and not many fewer."""
    queries: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    held = 0
    for number, ball in enumerate(balls):
        rows.append(np.asarray(ball, dtype=np.int64))
        queries.append(np.full(len(ball), number))
        held += len(ball)
        if held >= size:
            yield from _split(queries, rows, size, device)
            queries, rows, held = [], [], 0
    if held:
        yield from _split(queries, rows, size, device)


def _split(
    queries: list[np.ndarray], rows: list[np.ndarray], size: int, device: torch.device
) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
    pairs = torch.from_numpy(np.stack([np.concatenate(queries), np.concatenate(rows)])).to(device)
    for piece in pairs.split(max(1, size), dim=1):
        yield piece[0], piece[1]


def _batch(memory: int, count: int, columns: int) -> int:
    need = 24 * count * (columns + 2)
    if memory < need:
        raise ValueError(f"memory must be at least {need} bytes for one query, got {memory}")
    return memory // need
