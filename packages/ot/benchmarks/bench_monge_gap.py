"""Cost of the Monge gap: of a training step with and without it, against OTT-JAX, geomloss and POT, and at 50,000 points.

uv run python tools/bench.py ot/monge-gap
"""

import time
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.core.bench import Case, Peer, case, peak_memory, peer
from poise.ot import ConvergenceWarning, MongeGapLoss, monge_gap_from_samples, sinkhorn_divergence, sinkhorn_points

N, DIM, ERROR = 1_024, 32, 1e-3
RELATIVE_EPSILON = 0.01


def samples(n: int = N, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Standard normal points and their images under a random two-layer network, a map that is not optimal."""
    torch.manual_seed(0)
    x = torch.randn(n, dim)
    net = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))
    with torch.no_grad():
        return x, 3 * net(x)


def against_ott() -> Peer:
    """Value and gradient of the gap, both to the same marginal error."""
    import jax
    from ott.neural.methods.monge_gap import monge_gap_from_samples as ott_gap

    x, t = samples()
    epsilon = RELATIVE_EPSILON * float(torch.cdist(x, t).square().mean())
    source, target = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(t.numpy())
    gradient = jax.jit(
        jax.value_and_grad(lambda t: ott_gap(source, t, epsilon=epsilon, threshold=ERROR, max_iterations=5_000))
    )
    t.requires_grad_()

    def ours() -> np.ndarray:
        value, _ = monge_gap_from_samples(x, t, epsilon=epsilon, tol=ERROR)
        (gradient,) = torch.autograd.grad(value, t)
        return np.append(gradient.numpy().ravel(), value.item())

    def theirs() -> np.ndarray:
        value, gradient_t = jax.block_until_ready(gradient(target))
        return np.append(np.asarray(gradient_t).ravel(), float(value))

    name = f"gap, value and gradient, n = {N}, d = {DIM}, float32, eps = {RELATIVE_EPSILON} mean cost, error {ERROR:g}"
    return peer("ott-jax under jit", version("ott-jax"), name, ours, theirs)


def against_geomloss() -> Peer:
    """Sinkhorn divergence with its gradient, at the same entropy; geomloss anneals a fixed number of steps."""
    from geomloss import SamplesLoss

    x, y = samples()
    epsilon = 0.1 * float(torch.cdist(y, y).square().mean())
    theirs_loss = SamplesLoss("sinkhorn", p=2, blur=(epsilon / 2) ** 0.5, scaling=0.9, backend="tensorized")
    x.requires_grad_()

    def ours() -> float:
        value = sinkhorn_divergence(x, y, epsilon, tol=ERROR)
        torch.autograd.grad(value, x)
        return value.item()

    def theirs() -> float:
        value = 2 * theirs_loss(x, y)  # its ground cost is |x - y|^2 / 2
        torch.autograd.grad(value, x)
        return value.item()

    return peer(
        "geomloss",
        version("geomloss"),
        f"Sinkhorn divergence and gradient, n = {N}, d = {DIM}",
        ours,
        theirs,
        repeats=5,
    )


def against_pot() -> Peer:
    """Sinkhorn divergence, the value alone, which POT gives for NumPy arrays."""
    import ot

    x, y = samples()
    epsilon = 0.1 * float(torch.cdist(y, y).square().mean())
    points = x.numpy(), y.numpy()

    def ours() -> float:
        return sinkhorn_divergence(x, y, epsilon, tol=ERROR).item()

    def cost(one: np.ndarray, two: np.ndarray) -> float:
        """The entropic value that POT's plan gives, in our convention."""
        matrix = ot.dist(one, two)
        plan = ot.sinkhorn([], [], matrix, epsilon, method="sinkhorn_log", stopThr=ERROR, numItermax=5_000)
        return float((plan * matrix).sum() + epsilon * (plan * np.log(np.maximum(plan, 1e-300))).sum())

    def theirs() -> float:
        return cost(*points) - (cost(points[0], points[0]) + cost(points[1], points[1])) / 2

    return peer("POT", version("POT"), f"Sinkhorn divergence, n = {N}, d = {DIM}", ours, theirs, repeats=3, warmup=1)


def training_step() -> Case:
    """A step of a map with the fitting loss alone, and with the gap."""
    x, _ = samples(256, 3)
    y = torch.randn(256, 3) + 1
    net = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    adam, gap = torch.optim.Adam(net.parameters(), 1e-3), MongeGapLoss()

    def step(regularized: bool) -> None:
        t = net(x)
        loss = sinkhorn_divergence(t, y, static_b=True)
        if regularized:
            loss = loss + gap(x, t)
        adam.zero_grad()
        loss.backward()

    return case("training step of a 3-64-64-3 map, batch 256", lambda: step(False), lambda: step(True))


def streaming(n: int, iterations: int = 1) -> dict[str, Any]:
    """An iteration that never stores the costs: memory against that of the cost matrix, had it been stored."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator) for _ in range(2))

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the measurement is of memory; it stops early
            sinkhorn_points(x, y, 1.0, method="streaming", max_iter=iterations)

    start = time.perf_counter()
    memory = peak_memory(ours)
    took = 1e3 * (time.perf_counter() - start)
    return {
        "name": f"streaming Sinkhorn, n = {n}, {iterations} iteration; plain MB: the cost matrix that is not stored",
        "plain_ms": took,
        "method_ms": took,
        "ratio": 1.0,
        "plain_mb": 4 * n * n / 1e6,
        "method_mb": memory,
    }


def bench() -> dict[str, Any]:
    """All cases."""
    return {
        "method": "ot/monge-gap",
        "cases": [training_step(), *(streaming(n) for n in (5_000, 10_000, 50_000))],
        "peers": [against_ott(), against_geomloss(), against_pot()],
    }
