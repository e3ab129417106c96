"""What a search must offer, and the one that chooses between the others by measuring."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from poise.core.neighbors.libraries import TreeSearch
from poise.core.neighbors.matmul import MatmulSearch

_TREE_SECONDS_PER_ROW = 1e-6  # building a k-d tree costs less than this
_TRIAL = 16  # queries on which a tree that is far too slow is found out


@runtime_checkable
class Search(Protocol):
    """A data structure over n rows that proposes neighbours; row number n stands for "no row".

    :class:`~poise.core.neighbors.search.Neighbors` makes the result exact. Bounds on squared distances must hold for the
    true distances, whatever the rounding inside.
    """

    def batch(self, count: int) -> int:
        """How many queries fit into the memory at once when ``count`` rows are wanted for each."""
        ...

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """At least ``count`` rows per query, ascending, and a lower bound on the squared distance of all others.

        A few rows more make it likely that the bound proves the first ``count`` of them right.
        """
        ...

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """Pairs (query, row), all with squared distance up to ``squared`` among them, in pieces of bounded size."""
        ...


class AdaptiveSearch:
    """Matrix products, until they have taken as long as building a k-d tree would; from then on whichever is faster.

    Whether a tree pays depends on the intrinsic dimension of the data, which no formula in n and d knows. The choice may
    depend on the clock because the neighbours found do not depend on the choice. Building late bounds the loss: data
    that is queried once never pays for a tree. On an accelerator, or without SciPy, there is nothing to choose.
    """

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        self.data, self.memory = data, memory
        self.current: MatmulSearch | TreeSearch = MatmulSearch(data, memory)
        self.undecided = data.device.type == "cpu" and find_spec("scipy") is not None
        self.seconds = 0.0

    def batch(self, count: int) -> int:
        """As the search in use; short while undecided, so that one large call can profit too."""
        batch = self.current.batch(count)
        return min(batch, 1024) if self.undecided else batch

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """As the search in use."""
        if not self.undecided:
            return self.current.candidates(queries, count)
        if self.seconds > _TREE_SECONDS_PER_ROW * self.data.shape[0]:
            self._decide(queries, count)
            return self.current.candidates(queries, count)
        start = time.perf_counter()
        found = self.current.candidates(queries, count)
        self.seconds += time.perf_counter() - start
        return found

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """As the search in use."""
        return self.current.within(queries, squared)

    def _decide(self, queries: Float[Tensor, "m d"], count: int) -> None:
        """Compare the two on this batch, unless the tree loses by far on its first queries."""
        tree = TreeSearch(self.data, self.memory)
        pace = _seconds_per_query(self.current, queries, count)
        hopeless = _seconds_per_query(tree, queries[:_TRIAL], count) > 4 * pace
        if not hopeless and _seconds_per_query(tree, queries, count) < pace:
            self.current = tree
        self.undecided = False


def _seconds_per_query(search: Search, queries: Float[Tensor, "m d"], count: int) -> float:
    """The best of three: what disturbs a measurement makes it longer."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        search.candidates(queries, count)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / queries.shape[0]
