"""What the Monge gap adds to training a transport map, and how its solver compares with OTT, geomloss and POT.

uv run python tools/bench.py ot/monge-gap

A training step maps a batch, takes the Sinkhorn divergence to a target batch, goes back and updates; with the method it
takes the gap on top. Streaming is measured by its peak memory, which doubles with the points. Peers solve the same problems
to the same marginal error of 1e-3, or, where a library stops by another rule, at its fastest setting that is as accurate.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import geomloss
import jax
import numpy as np
import ot
import torch
from ott.geometry import costs as ott_costs
from ott.neural.methods.monge_gap import monge_gap_from_samples as ott_gap
from ott.tools import sinkhorn_divergence as ott_divergence
from torch import Tensor, nn

from poise.core.bench import Case, Peer, case, peer, relative_difference
from poise.ot import (
    Cost,
    Euclidean,
    MongeGapLoss,
    RelativeEpsilon,
    SqEuclidean,
    monge_gap_from_samples,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_points,
)

TOL = 1e-3
SIZE, DIM = 1024, 32


def samples(size: int, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Source points, target points, and images of the source under a small residual network at random weights."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, dim, generator=generator) for _ in range(2))
    first, second = (torch.randn(dim, dim, generator=generator) / dim**0.5 for _ in range(2))
    return x, 0.8 * y + 0.5, x + 2 * torch.relu(x @ first) @ second


def training_step(size: int, gap: MongeGapLoss | None) -> Callable[[], None]:
    x, y, _ = samples(size)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, DIM))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        t = net(x)
        loss = sinkhorn_divergence(t, y, static_b=True)
        if gap is not None:
            loss = loss + gap(x, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def streamed(size: int) -> Callable[[], None]:
    """Value and gradient of one transport problem in three dimensions, one iteration: memory does not depend on their number."""
    x, y, _ = samples(size, 3)
    y.requires_grad_()

    def solve() -> None:
        result = sinkhorn_points(x, y, RelativeEpsilon(0.05), SqEuclidean(), method="streaming", tol=0.99, max_iter=1)
        result.value.backward()

    return solve


def stored(size: int) -> Callable[[], None]:
    x, y, _ = samples(size, 3)
    y.requires_grad_()

    def solve() -> None:
        result = sinkhorn_points(x, y, RelativeEpsilon(0.05), SqEuclidean(), method="absorption", tol=0.99, max_iter=1)
        result.value.backward()

    return solve


def cases() -> list[Case]:
    found = [
        case(
            f"training step, batch {size}, {DIM} dimensions, {type(cost).__name__}: without and with the gap",
            training_step(size, None),
            training_step(size, MongeGapLoss(cost)),
        )
        for size, cost in ((256, SqEuclidean()), (1024, SqEuclidean()), (1024, Euclidean()))
    ]
    found += [
        case(
            f"one iteration and gradient, {size:,} points: stored and streamed", stored(size), streamed(size), repeats=3
        )
        for size in (2048, 8192)
    ]
    found += [
        case(
            f"one iteration and gradient, streamed: {size // 2:,} and {size:,} points",
            streamed(size // 2),
            streamed(size),
            repeats=1,
            warmup=1,
        )
        for size in (16_000, 50_000)
    ]
    return found


def against_ott(name: str, cost: Cost, ott_cost: Any, relative: float) -> Peer:
    """Value and gradient of the gap at the same ε and the same marginal error, OTT under ``jit``."""
    x, _, t = samples(SIZE)
    epsilon = relative * float(cost.pairwise(x, t).mean())
    t.requires_grad_()

    @jax.jit
    def compiled(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(
            lambda t: ott_gap(x, t, cost_fn=ott_cost, epsilon=epsilon, threshold=TOL, max_iterations=10_000)
        )(t)

    def ours() -> tuple[Tensor, Tensor]:
        value, _ = monge_gap_from_samples(x, t, cost, epsilon, tol=TOL)
        return value, torch.autograd.grad(value, t)[0]

    arrays = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(t.detach().numpy())
    return peer(
        "ott-jax",
        version("ott-jax"),
        f"gap and gradient, {SIZE} points, {DIM} dimensions, {name}, epsilon {relative} of the mean",
        ours,
        lambda: jax.block_until_ready(compiled(*arrays)),
        agreement=lambda one, other: relative_difference(one[0].detach(), np.asarray(other[0])),
    )


def divergence_against_ott(epsilon: float, x: Tensor, y: Tensor) -> Peer:
    @jax.jit
    def compiled(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def value(x: jax.Array) -> jax.Array:
            settings = {"threshold": TOL, "max_iterations": 10_000}
            return ott_divergence.sinkdiv(x, y, epsilon=epsilon, solve_kwargs=settings)[0]

        return jax.value_and_grad(value)(x)

    arrays = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy())
    return peer(
        "ott-jax",
        version("ott-jax"),
        f"Sinkhorn divergence and gradient, {SIZE} points, {DIM} dimensions, epsilon 0.1 of the mean",
        partial(divergence_and_gradient, x, y, epsilon),
        lambda: jax.block_until_ready(compiled(*arrays)),
        agreement=lambda one, other: relative_difference(one[0], np.asarray(other[0])),
    )


def divergence_against_geomloss(epsilon: float, x: Tensor, y: Tensor) -> Peer:
    """geomloss runs a schedule instead of stopping at an error: the shortest one whose value is off by 1e-3 at most."""
    exact = sinkhorn_divergence(x.double(), y.double(), epsilon, tol=1e-7, max_iter=20_000).item()
    losses = {
        scaling: geomloss.SamplesLoss(
            "sinkhorn", p=2, blur=math.sqrt(epsilon / 2), scaling=scaling, backend="tensorized"
        )
        for scaling in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
    }
    scaling = next(s for s, loss in losses.items() if abs(2 * loss(x, y).item() / exact - 1) <= TOL)

    def theirs() -> tuple[Tensor, Tensor]:
        points = x.clone().requires_grad_()
        value = 2 * losses[scaling](points, y)
        return value.detach(), torch.autograd.grad(value, points)[0]

    return peer(
        "geomloss",
        version("geomloss"),
        f"Sinkhorn divergence and gradient, {SIZE} points, {DIM} dimensions, epsilon 0.1 of the mean, scaling {scaling}",
        partial(divergence_and_gradient, x, y, epsilon),
        theirs,
        agreement=lambda one, other: relative_difference(one[0], other[0]),
    )


def divergence_and_gradient(x: Tensor, y: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    points = x.clone().requires_grad_()
    value = sinkhorn_divergence(points, y, epsilon, tol=TOL)
    return value.detach(), torch.autograd.grad(value, points)[0]


def against_pot(method: str, relative: float) -> Peer:
    """The plan for a given cost matrix. POT stops by the Euclidean norm of the violation: the largest that gives 1e-3."""
    x, y, _ = samples(SIZE)
    M = SqEuclidean().pairwise(x, y).numpy()
    weights = np.full(SIZE, 1 / SIZE, dtype=M.dtype)
    reg = relative * float(M.mean())

    def plan(threshold: float) -> np.ndarray:
        return ot.sinkhorn(weights, weights, M, reg, method=method, stopThr=threshold, numItermax=10_000, warn=False)

    def error(threshold: float) -> float:
        return float(np.abs(plan(threshold).sum(1) - weights).sum())

    threshold = next(t for t in (TOL / 2**k for k in range(12)) if error(t) <= TOL)
    return peer(
        "POT",
        version("pot"),
        f"plan, {SIZE} points, {DIM} dimensions, epsilon {relative} of the mean, {method}",
        lambda: sinkhorn(weights, weights, M, reg, tol=TOL).plan(),
        lambda: plan(threshold),
        agreement=lambda one, other: relative_difference((one * M).sum(), (other * M).sum()),
    )


def peers() -> list[Peer]:
    x, y, _ = samples(SIZE)
    epsilon = float(RelativeEpsilon(0.1).of_points(y, y, SqEuclidean()))
    return [
        against_ott("squared Euclidean", SqEuclidean(), ott_costs.SqEuclidean(), 0.05),
        against_ott("squared Euclidean", SqEuclidean(), ott_costs.SqEuclidean(), 0.01),
        against_ott("Euclidean", Euclidean(), ott_costs.Euclidean(), 0.05),
        divergence_against_ott(epsilon, x, y),
        divergence_against_geomloss(epsilon, x, y),
        against_pot("sinkhorn_log", 0.05),
        against_pot("sinkhorn_stabilized", 0.05),
        against_pot("sinkhorn_log", 0.01),
    ]


def bench() -> dict[str, Any]:
    return {"method": "ot/monge-gap", "cases": cases(), "peers": peers()}
