"""Cost of sparse transport: against POT's NumPy solvers, and of the router in a mixture-of-experts layer.

uv run python tools/bench.py ot/sparse-ot
"""

import contextlib
import io
from importlib.metadata import version
from typing import Any

import torch
from ot.smooth import SparsityConstrained as PotSparsityConstrained
from ot.smooth import semi_dual_obj_grad, smooth_ot_semi_dual
from torch import Tensor, nn

from poise.core.bench import Case, Peer, case, peer
from poise.ot import SparseOTRouter, SparsityConstrained, solve_semi_dual
from poise.ot.sparse.duals import SemiDual

POT = version("POT")
K, GAMMA = 8, 1.0
POT_STEPS = 100
"""Iterations that POT takes by default; it is then short of the optimum."""


def problem(m: int, n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform masses and squared distances between random points in the unit square."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(batch, size, 2, generator=generator, dtype=torch.float64) for size in (m, n))
    a, b = (torch.full((batch, size), 1 / size, dtype=torch.float64) for size in (m, n))
    return a, b, torch.cdist(x, y).square()


def evaluation(size: int = 2_000) -> Peer:
    """One value and gradient of the semi-dual, with nothing kept from an evaluation before."""
    a, b, cost = problem(size, size)
    by_column, reg = cost.mT.contiguous(), SparsityConstrained(K, GAMMA)
    alpha = 0.01 * torch.randn(1, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = PotSparsityConstrained(max_nz=K, gamma=GAMMA)
    arrays = [each[0].numpy() for each in (alpha, a, b, cost)]
    return peer(
        "POT",
        POT,
        f"semi-dual value and gradient, {size} x {size}, k = {K}",
        lambda: -SemiDual(a, b, by_column, reg)(alpha)[0].item(),
        lambda: float(semi_dual_obj_grad(*arrays, theirs)[0]),
        repeats=7,
    )


def same_value(size: int, k: int) -> Peer:
    """A solve to the dual value at which POT stops by default, after 100 iterations of L-BFGS, or to a better one."""
    a, b, cost = problem(size, size)
    arrays = [each[0].numpy() for each in (a, b, cost)]
    reg = SparsityConstrained(k, GAMMA)
    goal = pot_value(arrays, k, POT_STEPS)
    steps = next(count for count in range(50, 500, 10) if lbfgs_value(a, b, cost, reg, count) >= goal)
    return peer(
        "POT",
        POT,
        f"solve {size} x {size}, k = {k}, to POT's dual value after {POT_STEPS} iterations ({steps} of ours)",
        lambda: lbfgs_value(a, b, cost, reg, steps),
        lambda: pot_value(arrays, k, POT_STEPS),
        repeats=1,
        warmup=1,
    )


def exact(size: int, k: int) -> Peer:
    """A solve to the optimum, which ours proves with a duality gap, against POT until its line search gives up."""
    a, b, cost = problem(size, size)
    arrays = [each[0].numpy() for each in (a, b, cost)]
    reg = SparsityConstrained(k, GAMMA)
    return peer(
        "POT",
        POT,
        f"solve {size} x {size}, k = {k}, to the optimum, against POT to where it stalls",
        lambda: float(solve_semi_dual(a, b, cost, reg, tol=1e-6).value),
        lambda: pot_value(arrays, k, 10_000),
        repeats=1,
        warmup=1,
    )


def batched(count: int = 64, size: int = 128) -> Peer:
    """Many problems at once against a loop, to the same sum of dual values."""
    a, b, cost = problem(size, size, count)
    arrays = [each.numpy() for each in (a, b, cost)]
    reg = SparsityConstrained(4, GAMMA)

    def theirs() -> float:
        return sum(pot_value([array[index] for array in arrays], 4, POT_STEPS) for index in range(count))

    goal = theirs()
    steps = next(count for count in range(20, 500, 10) if lbfgs_value(a, b, cost, reg, count) >= goal)
    return peer(
        "POT",
        POT,
        f"{count} problems of {size} x {size}, k = 4, to the sum of POT's dual values after {POT_STEPS} iterations ({steps} of ours)",
        lambda: lbfgs_value(a, b, cost, reg, steps),
        theirs,
        repeats=3,
        warmup=1,
    )


def lbfgs_value(a: Tensor, b: Tensor, cost: Tensor, reg: SparsityConstrained, steps: int) -> float:
    """The sum of the dual values after so many iterations."""
    return float(solve_semi_dual(a, b, cost, reg, solver="lbfgs", tol=1e-12, max_iter=steps).value.sum())


def pot_value(arrays: list[Any], k: int, steps: int) -> float:
    """The dual value of POT after at most so many iterations."""
    reg = PotSparsityConstrained(max_nz=k, gamma=GAMMA)
    _, log = smooth_ot_semi_dual(
        *arrays, GAMMA, reg_type="sparsity_constrained", max_nz=k, numItermax=steps, stopThr=1e-12, log=True
    )
    return float(semi_dual_obj_grad(log["alpha"], *arrays, reg)[0])


def router_step(tokens: int = 784, width: int = 192, experts: int = 8) -> Case:
    """Forward and backward of a mixture-of-experts MLP with a top-1 softmax router and with the sparse one."""
    torch.manual_seed(0)
    inner = nn.Parameter(0.05 * torch.randn(experts, width, 4 * width))
    outer = nn.Parameter(0.05 * torch.randn(experts, 4 * width, width))
    score, router = nn.Linear(width, experts, bias=False), SparseOTRouter(width, experts)
    x = torch.randn(4, tokens, width)
    places = router.capacity(tokens)

    def layer(combine: Tensor) -> None:
        weight, index = combine.mT.topk(places, dim=-1)
        chosen = x.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, width)).unflatten(1, index.shape[1:])
        hidden = torch.einsum("gepd,edh->geph", chosen, inner).relu()
        (torch.einsum("geph,ehd->gepd", hidden, outer) * weight.unsqueeze(-1)).sum().backward()

    def top1() -> None:
        gates = score(x).softmax(-1)
        layer(gates * nn.functional.one_hot(gates.argmax(-1), experts))

    def sparse() -> None:
        layer(router(x).combine)

    return case(f"expert layer, 4 groups of {tokens} tokens, {experts} experts", top1, sparse)


def bench() -> dict[str, Any]:
    """All cases."""
    with contextlib.redirect_stdout(io.StringIO()):  # POT prints a shape at every evaluation
        peers = [evaluation(), same_value(1_000, 4), exact(500, 4), batched()]
    return {"method": "ot/sparse-ot", "cases": [router_step()], "peers": peers}
