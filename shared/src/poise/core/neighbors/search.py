r"""Exact k nearest neighbours in bounded memory, on any device.

For queries q_1..q_m and data x_1..x_n in R^d, find for every query the k rows of least Euclidean distance

    |q_i - x_j|_2,     ties going to the smaller row number j.

>>> import torch
>>> data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
>>> distances, indices = nearest(torch.tensor([[0.9, 0.0]]), data, k=2)
>>> indices.tolist(), [round(value, 3) for value in distances[0].tolist()]
([[2, 0]], [0.1, 0.9])

**How exactness is reached.** A search proposes candidates together with a *floor*, a proven lower bound on the distance
of every row that it did not propose. The distances of the candidates are computed directly, from differences and in
float64. Where the k-th of them lies below the floor the answer is proven; the other queries (ties, rows closer together
than the search can tell apart) are answered from all rows that the search cannot rule out. Hence every backend returns
the same answer, that of brute force in float64, and only the time differs.

**Which backend.** ``matmul`` ranks by |x|^2/2 - q.x, one float32 matrix product per tile with its rounding error
bounded; it runs on any device and its time does not depend on the data. ``kdtree`` is SciPy's k-d tree on the CPU: many
times faster for data of low intrinsic dimension (up to about 6, whatever the number of columns), many times slower
above. ``boxes`` is for queries of which a near row is known beforehand (``near``): in 23 dimensions still several times
faster than the product. ``faiss`` is the flat index of faiss-cpu, which only keeps up for a handful of queries at a
time. ``auto`` starts with ``matmul`` and, on the CPU, changes to the tree, or for queries with ``near`` to the boxes,
when that measures faster. ``benchmarks/bench_neighbors.py``
measures all of them; the committed result is ``docs/results/core/neighbors.bench.json``.

Other metrics reduce to this one: cosine similarity by normalising the rows, a weighted distance by scaling the columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.core.neighbors.adaptive import AdaptiveSearch, Search
from poise.core.neighbors.boxes import BoxSearch
from poise.core.neighbors.libraries import FaissSearch, TreeSearch
from poise.core.neighbors.matmul import MatmulSearch

_BACKENDS: dict[str, Callable[[Tensor, int], Search]] = {
    "auto": AdaptiveSearch,
    "matmul": MatmulSearch,
    "boxes": BoxSearch,
    "kdtree": TreeSearch,
    "faiss": FaissSearch,
}
_MEMORY = 256 * 2**20
_LIMIT = 1e150  # squares of larger differences overflow float64


class Nearest(NamedTuple):
    """Distances (m, k), ascending, and the numbers (m, k) of the rows they belong to."""

    distances: Tensor
    indices: Tensor


class Neighbors:
    """An index over fixed data, built once and queried often.

    Args:
        data: rows (n, d), floating; kept, not copied: it must not change while the index is in use. ``matmul`` and ``boxes``
            add about 4 n (d + 1) bytes on the data's device, the others keep what their library keeps.
        backend: ``"auto"``, ``"matmul"``, ``"boxes"``, ``"kdtree"`` or ``"faiss"``, see the module's text.
        memory: bytes of working memory per query call, ``None`` for 256 MiB. The queries in float64 and the results come
            on top, and for ``kdtree`` and ``faiss`` what their library uses.

    Raises:
        TypeError: ``data`` is not floating.
        ValueError: ``data`` is not of shape (n, d) with n, d >= 1, or has NaN, infinite or absurdly large entries
            (beyond 1e150); ``backend`` is unknown.
        ModuleNotFoundError: the library of the backend asked for is not installed.
    """

    def __init__(self, data: Tensor, backend: str = "auto", memory: int | None = None) -> None:
        _check_rows("data", data)
        if data.shape[0] == 0 or data.shape[1] == 0:
            raise ValueError(f"data must have at least one row and one column, got shape {tuple(data.shape)}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {sorted(_BACKENDS)}, got {backend!r}")
        self.data = data.detach()
        _check_finite("data", self.data)
        self._search = _BACKENDS[backend](self.data, _MEMORY if memory is None else memory)

    def __len__(self) -> int:
        return self.data.shape[0]

    @torch.no_grad()
    def query(
        self,
        queries: Tensor,
        k: int = 1,
        exclude: Int[Tensor, "..."] | None = None,
        near: Int[Tensor, "..."] | None = None,
    ) -> Nearest:
        """The k nearest rows of each query. Costs one synchronisation with the device.

        Args:
            queries: (m, d), floating, on the data's device.
            k: how many rows, 1 <= k <= n (n - 1 with ``exclude``).
            exclude: (m,) one row number per query that must not be returned. Pass ``arange(n)`` when the queries are
                the data and a row must not find itself: unlike dropping the first of k + 1, this is right for
                duplicate rows too.
            near: (m,) one row number per query that is known to be near, with k = 1 and without ``exclude``. The nearest row is
                no farther than it, which can save most of the search and never changes the answer.

        Returns:
            :class:`Nearest`. Distances are computed in float64 and rounded to the promoted dtype of the inputs (float32
            for half types). They carry no gradient: differentiate ``(queries[:, None] - data[indices]).norm(dim=-1)``.

        Raises:
            TypeError: ``queries`` is not floating.
            ValueError: shapes, devices or ``k`` do not fit, a query is not finite, or the memory does not suffice for
                one query; the message says how much does.
        """
        self._check(queries, k, exclude, near)
        dtype = torch.promote_types(torch.promote_types(queries.dtype, self.data.dtype), torch.float32)
        if queries.shape[0] == 0:
            return Nearest(queries.new_empty((0, k), dtype=dtype), queries.new_empty((0, k), dtype=torch.long))
        points = queries.detach().double()
        if near is not None:
            bound = self._rounded_up((self.data[near].double() - points).square_().sum(-1))
            if self._search.prefers_balls(points, bound):
                _check_finite("queries", points)
                squared, indices = self._all_within(points, bound, k, exclude)
                return Nearest(squared.sqrt().to(dtype), indices)
        squared, indices, floor = self._best_candidates(points, k, exclude)
        radius = self._rounded_up(squared[:, -1])
        unproven = (~(radius < floor)).nonzero().squeeze(1)  # NaN lands here too
        if unproven.numel():
            _check_finite("queries", points[unproven])
            left_out = None if exclude is None else exclude[unproven]
            squared[unproven], indices[unproven] = self._all_within(points[unproven], radius[unproven], k, left_out)
        return Nearest(squared.sqrt().to(dtype), indices)

    def _rounded_up(self, squared: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Above what these squared distances can be: rounding of a direct float64 distance, underflow of its squares."""
        columns = self.data.shape[1]
        return squared * (1 + (columns + 4) * 2.0**-52) + columns * 1e-307

    def _best_candidates(
        self, points: Float[Tensor, "m d"], k: int, exclude: Int[Tensor, " m"] | None
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"], Float[Tensor, " m"]]:
        """The k best of what the search proposes, and the floor of the rest."""
        wanted = k + (exclude is not None)
        parts, start = [], 0
        while start < points.shape[0]:
            part = slice(start, start + self._search.batch(wanted))
            index, floor = self._search.candidates(points[part], wanted)
            absent = index == len(self)
            if exclude is not None:
                absent |= index == exclude[part, None]
            rows = self.data[index.clamp(max=len(self) - 1)].double()
            squared = (rows - points[part, None]).square_().sum(-1).masked_fill_(absent, torch.inf)
            # a stable sort of candidates in ascending order: ties go to the smaller row number
            squared, order = squared.sort(dim=1, stable=True)
            parts.append((squared[:, :k].clone(), index.gather(1, order[:, :k]), floor))  # frees the other candidates
            start = part.stop
        squared, indices, floor = (torch.cat(column) for column in zip(*parts, strict=True))
        return squared, indices, floor

    def _all_within(
        self, points: Float[Tensor, "m d"], radius: Float[Tensor, " m"], k: int, exclude: Int[Tensor, " m"] | None
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """The k best of all rows within a squared radius that is known to hold k of them."""
        query = index = torch.empty(0, dtype=torch.long, device=points.device)
        squared = points.new_empty(0)
        for new_query, new_index in self._search.within(points, radius):
            if exclude is not None:
                kept = new_index != exclude[new_query]
                new_query, new_index = new_query[kept], new_index[kept]
            new_squared = (self.data[new_index].double() - points[new_query]).square_().sum(-1)
            query, index = torch.cat([query, new_query]), torch.cat([index, new_index])
            query, squared, index = _first_k(query, torch.cat([squared, new_squared]), index, k)
        return squared.view(-1, k), index.view(-1, k)

    def _check(self, queries: Tensor, k: int, exclude: Tensor | None, near: Tensor | None) -> None:
        _check_rows("queries", queries)
        if queries.shape[1] != self.data.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} columns, the data {self.data.shape[1]}")
        if queries.device != self.data.device:
            raise ValueError(f"queries are on {queries.device}, the data on {self.data.device}")
        available = len(self) - (exclude is not None)
        if not 1 <= k <= available:
            raise ValueError(f"k must lie in 1..{available} for {len(self)} rows, got {k}")
        if exclude is not None and exclude.shape != queries.shape[:1]:
            raise ValueError(f"exclude must have shape {tuple(queries.shape[:1])}, got {tuple(exclude.shape)}")
        if near is not None and (near.shape != queries.shape[:1] or k != 1 or exclude is not None):
            raise ValueError(
                f"near must have shape {tuple(queries.shape[:1])} and goes with k = 1 and without exclude, got shape "
                f"{tuple(near.shape)} and k = {k}"
            )


def nearest(
    queries: Tensor,
    data: Tensor,
    k: int = 1,
    backend: str = "auto",
    memory: int | None = None,
    exclude: Int[Tensor, "..."] | None = None,
) -> Nearest:
    """The k nearest rows of ``data`` for each query, once; for repeated queries build :class:`Neighbors`.

    Args:
        queries: (m, d), floating.
        data: (n, d), floating, on the same device.
        k: how many rows, 1 <= k <= n (n - 1 with ``exclude``).
        backend: ``"auto"``, ``"matmul"``, ``"boxes"``, ``"kdtree"`` or ``"faiss"``, see the module's text.
        memory: bytes of working memory, ``None`` for 256 MiB.
        exclude: (m,) one row number per query that must not be returned.

    Returns:
        Distances (m, k), ascending, and row numbers (m, k), without gradient.

    Raises:
        TypeError, ValueError, ModuleNotFoundError: as :class:`Neighbors` and :meth:`Neighbors.query`.
    """
    return Neighbors(data, backend, memory).query(queries, k, exclude)


def _first_k(
    query: Int[Tensor, " p"], squared: Float[Tensor, " p"], index: Int[Tensor, " p"], k: int
) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"], Int[Tensor, " r"]]:
    """Sort pairs by (query, squared distance, row) and keep the first k of each query."""
    order = index.argsort(stable=True)
    order = order[squared[order].argsort(stable=True)]
    order = order[query[order].argsort(stable=True)]
    query = query[order]
    rank = torch.arange(query.numel(), device=query.device) - torch.searchsorted(query, query)
    order = order[rank < k]
    return query[rank < k], squared[order], index[order]


def _check_rows(name: str, rows: Tensor) -> None:
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (rows, columns), got {tuple(rows.shape)}")


def _check_finite(name: str, rows: Tensor) -> None:
    low, high = (bound.item() for bound in rows.aminmax())  # NaN propagates
    if not (low >= -_LIMIT and high <= _LIMIT):
        raise ValueError(f"{name} must be finite and at most {_LIMIT:g} in magnitude, got {low} to {high}")
