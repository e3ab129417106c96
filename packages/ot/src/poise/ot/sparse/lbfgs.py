r"""Limited-memory BFGS on a batch of independent problems, each with its own history, line search and end.

Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical Programming 45, 1989; line search of
Nocedal and Wright, "Numerical Optimization", algorithms 3.5 and 3.6, with the approximate Wolfe conditions of Hager and Zhang, SIAM J.
Optim. 16, 2005, near the optimum, where differences of values are rounding.

Problems do not wait for each other: one evaluation of the batch serves some as a trial of their line search and others as their
next step. Problems that are done leave the batch once they are half of it.

>>> import torch
>>> from dataclasses import dataclass
>>> @dataclass
... class Quadratic:
...     curvature: torch.Tensor
...     def __call__(self, x):
...         return (self.curvature * (x - 1).square()).sum(-1) / 2, self.curvature * (x - 1)
...     def select(self, keep):
...         return Quadratic(self.curvature[keep])
>>> minimum = lbfgs(Quadratic(torch.tensor([[1.0, 10.0], [2.0, 300.0]])), torch.zeros(2, 2), tol=1e-4, max_iter=50)
>>> minimum.point.round(decimals=3), minimum.converged
(tensor([[1., 1.],
        [1., 1.]]), tensor([True, True]))
"""

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SUFFICIENT_DECREASE = 1e-4  # c1 of the Wolfe conditions
CURVATURE = 0.9  # c2
OVERSHOOT = 2.0  # how much steeper a trial may climb than the search fell; beside a kink nothing flatter is near
TRIALS = 20  # of one line search before it counts as failed
EXPANSION = 4.0  # of the step while no upper end of the bracket is known


@runtime_checkable
class Objective(Protocol):
    """A batch of independent functions."""

    def __call__(self, x: Float[Tensor, "batch d"], /) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"]]:
        """Value and gradient of every function at its row of ``x``."""
        ...

    def select(self, keep: Int[Tensor, " kept"], /) -> "Objective":
        """The functions at the places ``keep``."""
        ...


@dataclass(frozen=True)
class Minimum:
    """Where a batch of minimisations ended.

    Attributes:
        point: the minimisers.
        error: L1 norms of the gradients there.
        n_iter: accepted steps.
        converged: whether ``error`` came down to the tolerance.
    """

    point: Float[Tensor, "batch d"]
    error: Float[Tensor, " batch"]
    n_iter: Int[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]


@dataclass
class _State:
    """One row per problem that is still running."""

    place: Int[Tensor, " batch"]  # in the caller's batch
    tol: Float[Tensor, " batch"]
    n_iter: Int[Tensor, " batch"]
    x: Float[Tensor, "batch d"]
    f: Float[Tensor, " batch"]
    g: Float[Tensor, "batch d"]
    direction: Float[Tensor, "batch d"]
    slope: Float[Tensor, " batch"]  # of the function along the direction
    step: Float[Tensor, " batch"]  # the next trial
    trials: Int[Tensor, " batch"]
    # the bracket: its better end `low`, with value and slope, and the other end `high`, infinite while unknown
    low: Float[Tensor, " batch"]
    f_low: Float[Tensor, " batch"]
    s_low: Float[Tensor, " batch"]
    high: Float[Tensor, " batch"]
    f_high: Float[Tensor, " batch"]
    s_high: Float[Tensor, " batch"]
    # differences of points and of gradients, newest last, and 1 / <s, y>, which is 0 where nothing is stored
    s: Float[Tensor, "batch h d"]
    y: Float[Tensor, "batch h d"]
    r: Float[Tensor, "batch h"]
    reset: Bool[Tensor, " batch"]  # the last line search failed and the history was dropped

    def rows(self, keep: Int[Tensor, " kept"]) -> "_State":
        return _State(*(getattr(self, field.name)[keep] for field in fields(self)))


def lbfgs(
    objective: Objective,
    start: Float[Tensor, "batch d"],
    *,
    tol: float | Float[Tensor, " batch"],
    max_iter: int,
    history: int = 10,
) -> Minimum:
    """Minimise every function of the batch from its row of ``start``.

    Args:
        objective: convex functions with Lipschitz gradients (on others the line search may fail, which ends that problem).
        start: starting points.
        tol: L1 norm of the gradient at which a problem is done.
        max_iter: accepted steps after which it is given up.
        history: pairs kept per problem.

    Source:
        Nocedal and Wright, algorithms 7.4 (two-loop recursion) and 7.5.
    """
    state = _start(objective, start, tol, history)
    point, error = start.clone(), state.g.abs().sum(-1)
    n_iter, converged = torch.zeros_like(state.n_iter), error <= state.tol
    running = ~converged & (max_iter > 0)
    while True:
        alive = running.nonzero()[:, 0]
        if alive.numel() == 0:
            return Minimum(point, error, n_iter, converged)
        if 2 * alive.numel() <= running.numel():
            objective, state = objective.select(alive), state.rows(alive)
            running = torch.ones_like(alive, dtype=torch.bool)
        ended = _advance(objective, state) & running
        small = state.g.abs().sum(-1) <= state.tol
        ended |= running & (small | (state.n_iter >= max_iter))
        running &= ~ended
        where = state.place[ended]
        point[where], n_iter[where] = state.x[ended], state.n_iter[ended]
        error[where], converged[where] = state.g[ended].abs().sum(-1), small[ended]


def _start(
    objective: Objective, start: Float[Tensor, "batch d"], tol: float | Float[Tensor, " batch"], history: int
) -> _State:
    f, g = objective(start)
    zeros, count = torch.zeros_like(f), torch.zeros_like(f, dtype=torch.long)
    pairs = start.new_zeros((start.shape[0], history, start.shape[1]))
    slope = -g.square().sum(-1)
    return _State(
        torch.arange(len(start), device=start.device),
        torch.as_tensor(tol, dtype=start.dtype, device=start.device).expand_as(f),
        count,
        start,
        f,
        g,
        -g,
        slope,
        _first_step(g),
        count,
        zeros,
        f,
        slope,
        torch.full_like(f, torch.inf),
        f,
        slope,
        pairs,
        pairs,
        pairs[..., 0],
        torch.zeros_like(f, dtype=torch.bool),
    )


def _advance(objective: Objective, state: _State) -> Bool[Tensor, " batch"]:
    """Evaluate every problem at its trial step and move it on; true for those that can go no further."""
    x = state.x + state.step[:, None] * state.direction
    f, g = objective(x)
    slope = (g * state.direction).sum(-1)
    rounding = 4 * torch.finfo(f.dtype).eps * state.f.abs()
    decreased = f <= state.f + SUFFICIENT_DECREASE * state.step * state.slope
    level = (f <= state.f + rounding) & (slope <= (2 * SUFFICIENT_DECREASE - 1) * state.slope)
    flat = (slope >= CURVATURE * state.slope) & (slope <= -OVERSHOOT * state.slope)
    accepted = (decreased | level) & flat
    state.trials = state.trials + 1
    too_far = ~(decreased | (f <= state.f + rounding)) | (f > state.f_low + rounding)
    _tighten(state, f, slope, too_far)
    width = (state.high - state.low).abs() * state.direction.abs().amax(-1)
    failed = ~accepted & ((state.trials >= TRIALS) | (width <= 2 * torch.finfo(f.dtype).eps * state.x.abs().amax(-1)))
    hopeless = failed & state.reset
    if bool((accepted | failed).any()):
        _step(state, x, f, g, accepted | (failed & (f < state.f)), failed)
    return hopeless


def _tighten(
    state: _State, f: Float[Tensor, " batch"], slope: Float[Tensor, " batch"], too_far: Bool[Tensor, " batch"]
) -> None:
    """Put the trial into the bracket and choose the next one (Nocedal and Wright, algorithm 3.6 and equation 3.59)."""
    unknown = state.high.isinf()
    crossed = ~too_far & (slope * torch.where(unknown, 1.0, state.high - state.low) >= 0)
    trial = (state.step, f, slope)
    low = (state.low, state.f_low, state.s_low)
    high = (state.high, state.f_high, state.s_high)
    state.high, state.f_high, state.s_high = (
        torch.where(too_far, new, torch.where(crossed, old_low, old_high))
        for new, old_low, old_high in zip(trial, low, high, strict=True)
    )
    state.low, state.f_low, state.s_low = (torch.where(too_far, old, new) for new, old in zip(trial, low, strict=True))
    h = state.high - state.low
    d1 = state.s_low + state.s_high - 3 * (state.f_high - state.f_low) / h
    radicand = d1.square() - state.s_low * state.s_high
    d2 = h.sign() * radicand.clamp_min(0).sqrt()
    cubic = state.high - h * (state.s_high + d2 - d1) / (state.s_high - state.s_low + 2 * d2)
    left, right = torch.minimum(state.low, state.high), torch.maximum(state.low, state.high)
    margin = 0.1 * (right - left)
    inside = torch.minimum(torch.maximum(cubic, left + margin), right - margin)
    zoom = torch.where(cubic.isfinite() & (radicand >= 0), inside, (left + right) / 2)
    state.step = torch.where(state.high.isinf(), EXPANSION * state.low, zoom)


def _step(
    state: _State,
    x: Float[Tensor, "batch d"],
    f: Float[Tensor, " batch"],
    g: Float[Tensor, "batch d"],
    moved: Bool[Tensor, " batch"],
    failed: Bool[Tensor, " batch"],
) -> None:
    """Accept the trial where ``moved``, drop the history where ``failed``, and begin a line search in both cases."""
    s, y = x - state.x, g - state.g
    product = (s * y).sum(-1)
    curved = moved & (product > torch.finfo(f.dtype).eps * s.norm(dim=-1) * y.norm(dim=-1))
    state.s = torch.where(curved[:, None, None], torch.cat([state.s[:, 1:], s[:, None]], 1), state.s)
    state.y = torch.where(curved[:, None, None], torch.cat([state.y[:, 1:], y[:, None]], 1), state.y)
    state.r = torch.where(curved[:, None], torch.cat([state.r[:, 1:], product.reciprocal()[:, None]], 1), state.r)
    state.r = torch.where(failed[:, None], 0.0, state.r)
    state.reset = torch.where(failed, True, state.reset & ~moved)
    state.x, state.g = torch.where(moved[:, None], x, state.x), torch.where(moved[:, None], g, state.g)
    state.f = torch.where(moved, f, state.f)
    state.n_iter = state.n_iter + moved

    fresh = moved | failed
    direction = _two_loops(state)
    descent = (direction * state.g).sum(-1, keepdim=True) < 0
    direction = torch.where(descent, direction, -state.g)
    state.direction = torch.where(fresh[:, None], direction, state.direction)
    state.slope = (state.direction * state.g).sum(-1)
    first = torch.where(state.r[:, -1] > 0, 1.0, _first_step(state.g))
    state.step = torch.where(fresh, first, state.step)
    state.trials = torch.where(fresh, 0, state.trials)
    state.low = torch.where(fresh, 0.0, state.low)
    state.f_low, state.s_low = torch.where(fresh, state.f, state.f_low), torch.where(fresh, state.slope, state.s_low)
    state.high = torch.where(fresh, torch.inf, state.high)


def _two_loops(state: _State) -> Float[Tensor, "batch d"]:
    """The quasi-Newton direction of every problem (Nocedal and Wright, algorithm 7.4)."""
    q, coefficients = state.g, []
    for i in reversed(range(state.r.shape[1])):
        coefficients.append(state.r[:, i] * (state.s[:, i] * q).sum(-1))
        q = q - coefficients[-1][:, None] * state.y[:, i]
    newest = state.r[:, -1] * state.y[:, -1].square().sum(-1)
    q = q / torch.where(newest > 0, newest, 1.0)[:, None]
    for i in range(state.r.shape[1]):
        correction = coefficients.pop() - state.r[:, i] * (state.y[:, i] * q).sum(-1)
        q = q + correction[:, None] * state.s[:, i]
    return -q


def _first_step(g: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
    return g.abs().sum(-1).clamp_min(torch.finfo(g.dtype).tiny).reciprocal().clamp_max(1.0)
