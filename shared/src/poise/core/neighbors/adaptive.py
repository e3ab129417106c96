"""What a search must offer, and the one that chooses between the others by measuring."""

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from poise.core.neighbors.boxes import BoxSearch
from poise.core.neighbors.libraries import TreeSearch
from poise.core.neighbors.matmul import MatmulSearch

_TREE_SECONDS_PER_ROW = 1e-6  # building a k-d tree costs less than this
_BOXES_SECONDS_PER_ROW = 4e-6  # and the boxes about this
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

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """Whether :meth:`within` is faster than :meth:`candidates` for nearest rows known to lie within ``squared``."""
        ...


class AdaptiveSearch:
    """Matrix products, until they have taken as long as building a k-d tree would; from then on whichever is faster.

    Whether a tree pays depends on the intrinsic dimension of the data, which no formula in n and d knows. The choice may
    depend on the clock because the neighbours found do not depend on the choice. Building late bounds the loss: data
    that is queried once never pays for a tree. On an accelerator, or without SciPy, there is nothing to choose.

    Queries whose distance is bounded may go to boxes instead, which are built and chosen in the same way.
    """

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        self.data, self.memory = data, memory
        self.current: MatmulSearch | TreeSearch = MatmulSearch(data, memory)
        self.boxes: BoxSearch | None = None
        on_cpu = data.device.type == "cpu"
        self.undecided = on_cpu and find_spec("scipy") is not None
        self.undecided_on_balls = on_cpu
        self.seconds = 0.0

    def batch(self, count: int) -> int:
        """As the search in use; short while undecided, so that one large call can profit too."""
        batch = self.current.batch(count)
        return min(batch, 1024) if self.undecided else batch

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """As the search in use."""
        if not (self.undecided or self.undecided_on_balls):
            return self.current.candidates(queries, count)
        if self.undecided and self.seconds > _TREE_SECONDS_PER_ROW * self.data.shape[0]:
            self._decide(queries, count)
            return self.current.candidates(queries, count)
        start = time.perf_counter()
        found = self.current.candidates(queries, count)
        self.seconds += time.perf_counter() - start
        return found

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """As the boxes, if there are any, or the search in use."""
        return (self.boxes or self.current).within(queries, squared)

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """What measured faster on such queries."""
        if self.undecided_on_balls and self.seconds > _BOXES_SECONDS_PER_ROW * self.data.shape[0]:
            boxes = BoxSearch(self.data, self.memory)
            pace = _seconds_per_query(lambda some: self.current.candidates(some, 1), queries)
            if _seconds_per_query(lambda some: list(boxes.within(some, squared)), queries) < pace:
                self.boxes = boxes
            self.undecided_on_balls = False
        return self.boxes is not None

    def _decide(self, queries: Float[Tensor, "m d"], count: int) -> None:
        """Compare the two on this batch, unless the tree loses by far on its first queries."""
        tree = TreeSearch(self.data, self.memory)
        pace = _seconds_per_query(lambda some: self.current.candidates(some, count), queries)
        hopeless = _seconds_per_query(lambda some: tree.candidates(some, count), queries[:_TRIAL]) > 4 * pace
        if not hopeless and _seconds_per_query(lambda some: tree.candidates(some, count), queries) < pace:
            self.current = tree
        self.undecided = False


def _seconds_per_query(answer: Callable[[Tensor], object], queries: Float[Tensor, "m d"]) -> float:
    """The best of three: what disturbs a measurement makes it longer."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        answer(queries)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / queries.shape[0]
