r"""The dual of cardinality-constrained transport, smoothed by a proximal term on the plan, evaluated on few entries per column.

For k < m the dual is not differentiable where entries tie for the k-th place, and the optimum lies on such ties: there the relaxed
plan splits mass among them. Adding :math:`\frac{1}{2\rho}\|t - t_0\|^2` to the (convex) biconjugate of :math:`\Omega` makes the dual
differentiable with a piecewise linear gradient. With :math:`v = \alpha + \beta_j - c_j + t_0/\rho` and :math:`\sigma = \gamma\rho`,

.. math::

    \theta_i = \min(1, \max(0, \sigma (v_i / s - 1))), \quad \sum_i \theta_i = k, \qquad
    t_i = \begin{cases} v_i / (\gamma + 1/\rho) & \theta_i = 1 \\ \rho\, (v_i - s)_+ & \text{else,} \end{cases}

where the level s is that of the k-th place and :math:`\theta_i` the share of a place that an entry gets. A column with at most k
positive entries is that of :class:`~poise.ot.sparse.regularizers.SquaredL2`.

Only entries above the level count, and which ones can be is known from a scan of all of them for as long as the potentials have not
moved by more than the margin seen in that scan; :class:`SmoothedDual` scans a problem again only then.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poise.ot.sparse.regularizers import Entries, widen

CANDIDATES = 16
"""Entries per column kept by a scan, at least; three times the cap if that is more."""

LEVEL_STEPS = 60
"""Steps that find the level of a column at most; a handful is usual, and halving alone would need 50."""


@dataclass(frozen=True)
class Columns:
    r"""The candidates of every column at one point of the dual.

    Attributes:
        index: their rows.
        cost: their costs.
        x: :math:`\alpha_i + \beta_j - c_{ij}`.
        v: ``x`` plus the pull of the proximal centre.
        level: the level s, 0 where no entries compete.
        whole: entries that have a place of their own.
        tied: entries that share places.
        plan: the entries of the plan.
    """

    index: Int[Tensor, "batch n c"]
    cost: Float[Tensor, "batch n c"]
    x: Float[Tensor, "batch n c"]
    v: Float[Tensor, "batch n c"]
    level: Float[Tensor, "batch n 1"]
    whole: Bool[Tensor, "batch n c"]
    tied: Bool[Tensor, "batch n c"]
    plan: Float[Tensor, "batch n c"]

    def entries(self, size: int) -> Entries:
        """The plan, whose columns have ``size`` entries."""
        return Entries(self.plan, self.index, size)


@dataclass(frozen=True)
class Piece:
    """Which linear piece of its gradient every column of a dual is on: the rows of its entries, and how those take part.

    Attributes:
        index: rows of the candidates.
        whole: entries that have a place of their own.
        tied: entries that share places.
    """

    index: Int[Tensor, "batch n c"]
    whole: Bool[Tensor, "batch n c"]
    tied: Bool[Tensor, "batch n c"]

    def select(self, keep: Int[Tensor, " kept"]) -> "Piece":
        return Piece(self.index[keep], self.whole[keep], self.tied[keep])

    def where(self, choose: Bool[Tensor, " batch"], other: "Piece") -> "Piece":
        """Itself for the problems chosen, else ``other``; the narrower one is padded with entries that take no part."""
        width = max(self.index.shape[-1], other.index.shape[-1])

        def merge(one: Tensor, two: Tensor) -> Tensor:
            return torch.where(choose[:, None, None], widen(one, width), widen(two, width))

        return Piece(merge(self.index, other.index), merge(self.whole, other.whole), merge(self.tied, other.tied))


@dataclass(frozen=True)
class Curvature:
    """Second derivatives of a batch of functions that are sums over columns: ``diag(diagonal) - weight tied tied^T`` per column."""

    index: Int[Tensor, "batch n s"]
    diagonal: Float[Tensor, "batch n s"]
    tied: Float[Tensor, "batch n s"]
    weight: Float[Tensor, "batch n 1"]


@dataclass
class _Scan:
    """The largest entries of every column when alpha was ``seen``, and a bound on all others: ``floor``, at beta 0."""

    index: Int[Tensor, "batch n c"]
    cost: Float[Tensor, "batch n c"]
    pull: Float[Tensor, "batch n c"]  # center / rho
    floor: Float[Tensor, "batch n"]
    seen: Float[Tensor, "batch m"]


@dataclass
class SmoothedDual:
    """The negated smoothed dual of a batch of problems as a function of ``[alpha, beta]``, an objective of the solvers.

    Attributes:
        a: row masses.
        b: column masses.
        cost: costs of all problems of the caller, one column per row.
        place: which of those problems this batch is about.
        gamma: strength of the quadratic term.
        k: the cap, ``None`` for none.
        rho: how loosely the plan is held at the centre, per problem; infinite for no proximal term.
        center: the proximal centre, ``None`` for 0.
    """

    a: Float[Tensor, "batch m"]
    b: Float[Tensor, "batch n"]
    cost: Float[Tensor, "all n m"]
    place: Int[Tensor, " batch"]
    gamma: float
    k: int | None
    rho: Float[Tensor, " batch"]
    center: Entries | None = None
    scan: _Scan | None = None

    def __call__(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"]]:
        return self.evaluate(p)[:2]

    def evaluate(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"], Piece]:
        """Value, gradient, and the piece of the gradient that ``p`` is on."""
        columns = self.columns(p)
        alpha, beta = self._split(p)
        value = (columns.plan * columns.v).sum((-2, -1)) / 2 - (alpha * self.a).sum(-1) - (beta * self.b).sum(-1)
        plan = columns.entries(self.a.shape[-1])
        missing = torch.cat([plan.row_sums() - self.a, plan.column_sums() - self.b], dim=-1)
        return value, missing, Piece(columns.index, columns.whole, columns.tied)

    def select(self, keep: Int[Tensor, " kept"]) -> "SmoothedDual":
        part = replace(self, a=self.a[keep], b=self.b[keep], place=self.place[keep], rho=self.rho[keep])
        if self.center is not None:
            part.center = self.center.select(keep)
        if self.scan is not None:
            part.scan = _Scan(*(getattr(self.scan, field.name)[keep] for field in fields(_Scan)))
        return part

    def columns(self, p: Float[Tensor, "batch d"]) -> Columns:
        """The candidates at ``p``; scans all entries where the last scan does not vouch for them any more."""
        size = self.a.shape[-1]
        if self.scan is None:
            self.scan = self._look(p, slice(None), min(size, max(CANDIDATES, 3 * (self.k or 0))))
        columns, fresh = self._weigh(p, self.scan), False
        while self.scan.index.shape[-1] < size:
            bound = self.scan.floor + (self._split(p)[0] - self.scan.seen).amax(-1, keepdim=True) + self._split(p)[1]
            stale = (bound > columns.level[..., 0]).any(-1)
            if not bool(stale.any()):
                break
            if fresh:  # even now more entries count than were kept
                self.scan = self._look(p, slice(None), min(size, 2 * self.scan.index.shape[-1]))
            else:
                rows = stale.nonzero()[:, 0]
                seen = self._look(p, rows, self.scan.index.shape[-1])
                for field in fields(_Scan):
                    getattr(self.scan, field.name)[rows] = getattr(seen, field.name)
            columns, fresh = self._weigh(p, self.scan), True
        return columns

    def curvature(self, piece: Piece) -> Curvature:
        """The second derivatives, on that piece, of the part that is a sum over columns."""
        rho = self.rho[:, None, None]
        order = torch.where(piece.tied, 2, piece.whole.to(torch.uint8))
        width = int((order > 0).sum(-1).amax())
        kind, active = order.topk(max(width, 1), dim=-1)
        tied = (kind == 2).to(self.a.dtype)
        diagonal = torch.where(kind == 2, rho, torch.where(kind == 1, 1 / (self.gamma + 1 / rho), 0.0))
        weight = torch.zeros_like(tied[..., :1])
        if self.k is not None:
            shared = self.k - (kind == 1).sum(-1, keepdim=True)
            count = tied.sum(-1, keepdim=True)
            weight = torch.where(count > 0, rho / (count + shared / (self.gamma * rho)), 0.0)
        return Curvature(piece.index.gather(-1, active), diagonal, tied, weight)

    def lift(self, p: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """``p`` with alpha raised, in rows that the plan leaves empty, until their first entry takes part.

        There the function is linear in alpha and has no curvature, which leaves Newton's method without a scale.
        """
        columns = self.columns(p)
        empty = columns.entries(self.a.shape[-1]).row_sums() == 0
        rows = empty.any(-1).nonzero()[:, 0]
        if rows.numel() == 0:
            return p
        alpha, beta = self._split(p[rows])
        needed = self.cost[self.place[rows]] + (columns.level[rows] - beta[..., None])
        if self.center is not None:
            assert self.center.index is not None
            needed.scatter_add_(-1, self.center.index[rows], -self.center.values[rows] / self.rho[rows][:, None, None])
        stiffness = torch.where(self.rho.isinf(), 1 / self.gamma, self.rho)[rows]
        reached = needed.amin(-2) + self.a[rows] / stiffness[:, None]
        lifted = p.clone()
        lifted[rows, : self.a.shape[-1]] = torch.where(empty[rows], reached, alpha)
        return lifted

    def gap(
        self, p: Float[Tensor, "batch d"], columns: Columns
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Relaxed primal value of the plan at ``p`` minus the dual value without smoothing there, and the size of their terms."""
        alpha, beta = self._split(p)
        curve = torch.where(columns.tied, columns.level, self.gamma * columns.plan)  # t^2 / theta = t s / gamma on ties
        primal = (columns.plan * (columns.cost + curve / 2)).sum((-2, -1))
        size = (columns.plan * (columns.cost.abs() + curve / 2)).sum((-2, -1))
        best = columns.x if self.k is None else columns.x.topk(min(self.k, columns.x.shape[-1]), dim=-1).values
        conjugate = best.clamp_min(0).square().sum((-2, -1)) / (2 * self.gamma)
        return primal - ((alpha * self.a).sum(-1) + (beta * self.b).sum(-1) - conjugate), size

    def _split(self, p: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, "batch m"], Float[Tensor, "batch n"]]:
        return p[:, : self.a.shape[-1]], p[:, self.a.shape[-1] :]

    def _look(self, p: Float[Tensor, "batch d"], rows: Int[Tensor, " some"] | slice, kept: int) -> _Scan:
        """The ``kept`` largest entries of every column of the problems ``rows``."""
        alpha = self._split(p)[0][rows]
        costs = self.cost[self.place[rows]]
        v = alpha[:, None, :] - costs
        if self.center is not None:
            assert self.center.index is not None
            place, pull = self.center.index[rows], self.center.values[rows] / self.rho[rows][:, None, None]
            v.scatter_add_(-1, place, pull)
        largest, index = v.topk(kept, dim=-1)
        cost = costs.gather(-1, index)
        at = alpha[:, None, :].expand_as(v).gather(-1, index)
        return _Scan(index, cost, largest - (at - cost), largest[..., -1].clone(), alpha.clone())

    def _weigh(self, p: Float[Tensor, "batch d"], scan: _Scan) -> Columns:
        alpha, beta = self._split(p)
        rho = self.rho[:, None, None]
        x = alpha.gather(-1, scan.index.flatten(1)).view_as(scan.cost) - scan.cost + beta[..., None]
        v = x + scan.pull
        free = v.clamp_min(0) / (self.gamma + 1 / rho)
        if self.k is None:
            level, whole = torch.zeros_like(beta)[..., None], v > 0
            return Columns(scan.index, scan.cost, x, v, level, whole, torch.zeros_like(whole), free)
        level = place_level(v, self.k, self.gamma * rho)
        whole = (v > 0) & (self.gamma * rho * (v - level) >= level)
        tied = (v > level) & ~whole
        plan = torch.where(tied, rho * (v - level), torch.where(whole, free, 0.0))
        return Columns(scan.index, scan.cost, x, v, level, whole, tied, plan)


def place_level(
    v: Float[Tensor, "*batch c"], k: int, stiffness: Float[Tensor, "*#batch 1"]
) -> Float[Tensor, "*batch 1"]:
    r"""The level s with :math:`\sum_i \min(1, \max(0, \sigma(v_i/s - 1))) = k`; 0 where at most ``k`` entries are positive.

    Newton's method on the piecewise linear function of 1/s, kept inside a bracket: at the (k+1)-th largest entry at most k entries
    have a share, and where the k-th has its place to itself at least k are taken.
    """
    if v.shape[-1] <= k:
        return torch.zeros_like(v[..., :1])
    v = v.clamp_min(0)
    top = v.topk(k + 1, dim=-1).values
    contested = top[..., k:] > 0
    eps = torch.finfo(v.dtype).eps
    low = torch.where(contested, top[..., k:], 1.0).reciprocal()
    high = torch.where(contested, (1 + 1 / stiffness) / top[..., k - 1 : k], 1.0) * (1 + 4 * eps)
    tolerance = 16 * eps * (k + stiffness)  # the rounding of a sum of shares
    w = low
    for _ in range(LEVEL_STEPS):
        share = stiffness * (v * w - 1)
        missing = k - share.clamp(0, 1).sum(-1, keepdim=True)
        wrong = contested & (missing.abs() > tolerance) & (high > low)
        if not bool(wrong.any()):
            break
        low, high = torch.where(missing > 0, w, low), torch.where(missing < 0, w, high)
        slope = stiffness * torch.where((share > -tolerance) & (share < 1), v, 0.0).sum(-1, keepdim=True)
        newton = w + missing / slope
        inside = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        w = torch.where(wrong, inside, w)
    return torch.where(contested, w.reciprocal(), 0.0)
