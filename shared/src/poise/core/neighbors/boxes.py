r"""Search in a balanced tree of boxes, for balls that hold few of the rows: all queries go down the tree together.

The rows are turned onto their principal axes and halved again and again, each time at the median of the axis along which
they spread most, until at most 128 are left. Every node knows the box around its rows, which bounds the distance of a query
q to any of them:

    |q - x| >= |max(|q - c| - h, 0)|,      c the box's centre, h half its sides.

A k-d tree in a library visits these nodes one after the other. Here the frontier of all queries, a list of pairs (query, node), goes
down three levels at a time in a few vectorised operations, and the rows of the leaves that remain are multiplied with all the
queries that reached them, in one batched product. In 23 dimensions, where nearest rows are no longer much nearer than others, the
box of 128 rows rules out several times more than the ball around them does, and the product makes what remains cheap.

Rounding is bounded as in :mod:`poise.core.neighbors.matmul`, so that nothing within a ball is missed.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.core.neighbors.matmul import FAR, Frame, rounding_bound, shortened_inputs

_UNIT = 2.0**-24
_LEAF = 128  # rows at most; fewer would cost more boxes than they save products
_FAN = 8  # children of a node
_WIDEST = 16  # queries that a leaf is multiplied with at once
_TILE = 128  # leaves, or a quarter of the families of boxes, at once: what is made of them should stay in the cache


class BoxSearch:
    """See the module's text. Keeps n (d + 1) float32 numbers and a few per cent more for the boxes.

    The tiles that are worked on, a few MB, come on top of ``memory``.
    """

    def __init__(self, data: Float[Tensor, "n d"], memory: int) -> None:
        self.rows, self.columns = data.shape
        self.memory = memory
        self.frame = Frame(data)
        self.axes = _principal_axes(self.frame(data[:: -(-self.rows // 65_536)]))
        shortened = shortened_inputs()
        self.kappa = rounding_bound(self.columns + 16, shortened)
        self.widening = 1 + (self.columns + 12) * _UNIT + 2 * shortened
        depth = max(0, math.ceil(math.log2(self.rows / _LEAF)))
        self.leaves = 2**depth
        self.size = -(-self.rows // self.leaves)
        turned = data.new_empty((self.leaves * self.size, self.columns), dtype=torch.float32)
        for part, rows in self.frame.parts(data):
            turned[part][: len(rows)] = rows @ self.axes
        # copies of rows fill the leaves up; only the boxes take notice of them
        padding = torch.arange(len(turned) - self.rows, device=data.device)
        turned[self.rows :] = turned[padding * self.rows // max(1, len(padding))]
        turned, order = _halved(turned, depth)
        self.order = order.clamp_(max=self.rows)
        half_norm = turned.double().square().sum(1) * (0.5 - self.kappa)
        half_norm[self.order == self.rows] = torch.inf
        self.lifted = torch.cat([turned, half_norm.float()[:, None]], dim=1).view(self.leaves, self.size, -1)
        self.boxes = _boxes(turned.view(self.leaves, self.size, -1))
        self.ones = turned.new_ones(self.columns)

    def batch(self, count: int) -> int:
        """How many queries fit into the memory at once."""
        need = self._frontier() + 24 * self._taken(count) * self.size * (self.columns + 2)
        if self.memory < need:
            raise ValueError(f"memory must be at least {need} bytes for one query, got {self.memory}")
        return self.memory // need

    def candidates(
        self, queries: Float[Tensor, "m d"], count: int
    ) -> tuple[Int[Tensor, "m candidates"], Float[Tensor, " m"]]:
        """The rows around each query, which bound its distance; of the others only :meth:`within` knows.

        On the way down each query takes the nearest box; with its leaf come as many neighbours in the tree as hold ``count`` rows.
        """
        points = (self.frame(queries) @ self.axes).float()
        node = torch.zeros_like(points[:, 0], dtype=torch.long)
        for center, half in self.boxes:
            fan = min(_FAN, len(center))
            child = node[:, None] * fan + torch.arange(fan, device=node.device)
            gap = (points[:, None] - center[child]).abs_().sub_(half[child]).clamp_min_(0)
            node = child.gather(1, gap.square_().sum(2).argmin(1, keepdim=True)).squeeze(1)
        taken = self._taken(count)
        place = torch.arange(taken * self.size, device=node.device) + (node // taken * taken * self.size)[:, None]
        return self.order[place].sort(dim=1).values, torch.full_like(queries[:, 0], -torch.inf)

    def within(
        self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """All pairs that boxes and scores cannot rule out."""
        exact = self.frame(queries) @ self.axes
        norm = exact.square().sum(1)
        scaled = squared * self.frame.scale**2
        underflow = self.columns * 2.0**-120 * (1 + norm.sqrt())
        limit = ((scaled - (1 - self.kappa) * norm + underflow) / 2).float()
        limit = limit.nextafter(torch.full_like(limit, torch.inf)).masked_fill_(norm > FAR**2, torch.inf)
        error = 4 * _UNIT * (norm.sqrt() + math.sqrt(self.columns))
        reach = (scaled.sqrt() + error).square() * self.widening
        reach = reach.masked_fill_(norm > FAR**2, torch.inf).float()
        points = exact.clamp(-FAR, FAR).float()
        every = torch.arange(len(queries), device=queries.device)
        for some in every.split(max(1, self.memory // self._frontier())):
            query, leaf = self._reached(points[some], reach[some])
            for found, row in self._scan(points[some], limit[some], query, leaf):
                yield some[found], row

    def prefers_balls(self, queries: Float[Tensor, "m d"], squared: Float[Tensor, " m"]) -> bool:
        """Yes: the smaller the ball, the fewer the boxes."""
        return True

    def _reached(
        self, points: Float[Tensor, "m d"], reach: Float[Tensor, " m"]
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Pairs of queries and the leaves whose boxes they reach, in the order of the leaves."""
        query = torch.arange(len(points), device=points.device)
        node = torch.zeros_like(query)
        for center, half in self.boxes:
            fan = min(_FAN, len(center))
            tall, wide = center.view(-1, fan * self.columns), half.view(-1, fan * self.columns)
            asked = points.repeat(1, fan)
            near = []
            for some, parent in zip(query.split(4 * _TILE), node.split(4 * _TILE), strict=True):
                gap = asked.index_select(0, some).sub_(tall.index_select(0, parent)).abs_()
                gap.sub_(wide.index_select(0, parent)).clamp_min_(0).square_()
                # A product sums along so short an axis twice as fast as a sum does; `out=` keeps autocast away from it.
                squared = torch.mv(gap.view(-1, self.columns), self.ones, out=gap.new_empty(len(some) * fan))
                near.append(squared.view(-1, fan) <= reach[some, None])
            pair, child = torch.cat(near).nonzero(as_tuple=True)
            query, node = query.index_select(0, pair), node.index_select(0, pair) * fan + child
        order = node.argsort(stable=True)
        return query[order], node[order]

    def _scan(
        self,
        points: Float[Tensor, "m d"],
        limit: Float[Tensor, " m"],
        query: Int[Tensor, " pairs"],
        leaf: Int[Tensor, " pairs"],
    ) -> Iterator[tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]]:
        """The rows of the leaves that the scores cannot rule out."""
        lifted = torch.cat([-points, torch.ones_like(points[:, :1])], dim=1)
        close = [leaf.new_empty(0)]
        for width, pair in _grouped(leaf, self.leaves):
            some, asked = leaf[pair[:, 0]], query[pair]
            for start in range(0, len(pair), _TILE):
                rows = self.lifted.index_select(0, some[start : start + _TILE])
                group = asked[start : start + _TILE]
                score = _score(lifted.index_select(0, group.flatten()).view(len(rows), width, -1), rows)
                close.append(pair[start : start + _TILE][score.amin(2) <= limit[group]])
        found = torch.cat(close).unique()  # a group that is not full repeats a pair
        query, leaf = query[found], leaf[found]
        piece = max(1, self.memory // (16 * self.size * (self.columns + 1)))
        for start in range(0, len(found), piece):
            some, asked = leaf[start : start + piece], query[start : start + piece]
            score = _score(lifted[asked][:, None], self.lifted[some]).squeeze(1)
            pair, row = (~(score > limit[asked, None])).nonzero(as_tuple=True)
            index = self.order[some[pair] * self.size + row]
            real = index < self.rows
            yield asked[pair[real]], index[real]

    def _taken(self, count: int) -> int:
        """Leaves side by side, a power of two, with twice as many rows as wanted, since some are copies."""
        return min(self.leaves, 2 ** math.ceil(math.log2(max(1.0, 2 * count / self.size))))

    def _frontier(self) -> int:
        """Bytes for the pairs of one query, should it reach every leaf."""
        return 64 * self.leaves


def _score(
    queries: Float[Tensor, "groups width lifted"], rows: Float[Tensor, "groups size lifted"]
) -> Float[Tensor, "groups width size"]:
    """The scores of rows that belong together, with queries as the rows of a product so that they are minima of its rows."""
    return torch.bmm(queries, rows.mT, out=queries.new_empty((*queries.shape[:2], rows.shape[1])))


def _grouped(leaf: Int[Tensor, " pairs"], leaves: int) -> Iterator[tuple[int, Int[Tensor, "groups width"]]]:
    """Pairs of one leaf in groups of a common width, the last pair repeated where there are fewer.

    Leaves of few and of many queries are apart, so that little is repeated.
    """
    counts = torch.bincount(leaf, minlength=leaves)
    first = counts.cumsum(0) - counts
    for width in (1, 2, 4, 8, _WIDEST):
        fits = (counts > width // 2) & ((counts <= width) | (width == _WIDEST))
        some = fits.nonzero().squeeze(1)
        groups = (counts[some] + width - 1) // width
        owner = some.repeat_interleave(groups)
        rank = torch.arange(len(owner), device=leaf.device) - (groups.cumsum(0) - groups).repeat_interleave(groups)
        slot = rank[:, None] * width + torch.arange(width, device=leaf.device)
        yield width, first[owner, None] + torch.minimum(slot, counts[owner, None] - 1)


def _principal_axes(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """An orthogonal matrix; with its columns as axes the rows are uncorrelated."""
    centered = rows - rows.mean(0)
    return torch.linalg.eigh(centered.mT @ centered).eigenvectors


def _halved(rows: Float[Tensor, "n d"], depth: int) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """The rows in the order of the leaves of a tree, and where each was."""
    order = torch.arange(len(rows), device=rows.device)
    for level in range(depth):
        groups = rows.view(2**level, -1, rows.shape[1])
        axis = groups[:, :: max(1, groups.shape[1] // 256)].var(1).argmax(1)
        along = groups.gather(2, axis[:, None, None].expand(-1, groups.shape[1], 1)).squeeze(2)
        first = torch.arange(0, len(rows), groups.shape[1], device=rows.device)
        moved = (along.argsort(1) + first[:, None]).flatten()
        rows, order = rows[moved], order[moved]
    return rows, order


def _boxes(leaves: Float[Tensor, "leaves size d"]) -> list[tuple[Tensor, Tensor]]:
    """Centre and half sides of the boxes of every third level, from one with at most 8 nodes down to the leaves."""
    low, high = leaves.amin(1), leaves.amax(1)
    levels = []
    while True:
        center = (low + high) / 2
        half = torch.maximum(high - center, center - low) * (1 + 2 * _UNIT)
        levels.append((center, half))
        if len(low) <= _FAN:
            return levels[::-1]
        low, high = (bound.view(-1, _FAN, bound.shape[1]) for bound in (low, high))
        low, high = low.amin(1), high.amax(1)
