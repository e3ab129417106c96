"""Cost of sparse transport: against POT's NumPy solvers, and of the router in a mixture-of-experts layer.

uv run python tools/bench.py ot/sparse-ot
"""

import contextlib
import io
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from ot.smooth import SparsityConstrained as PotSparsityConstrained
from ot.smooth import semi_dual_obj_grad, smooth_ot_semi_dual
from torch import Tensor, nn

from poise.core.bench import case, peer
from poise.ot import SparseOTRouter, SparsityConstrained, solve_semi_dual
from poise.ot.sparse.duals import SemiDual

POT = version("POT")
K, GAMMA = 8, 1.0
POT_STEPS = 30
"""Iterations of POT on each problem of a batch; it is then still short of the optimum, which ours reaches."""


def problem(m: int, n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform masses and squared distances between random points in the unit square."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(batch, size, 2, generator=generator, dtype=torch.float64) for size in (m, n))
    a, b = (torch.full((batch, size), 1 / size, dtype=torch.float64) for size in (m, n))
    return a, b, torch.cdist(x, y).square()


def evaluation(size: int = 2_000) -> dict[str, Any]:
    """One value and gradient of the semi-dual."""
    a, b, cost = problem(size, size)
    ours = SemiDual(a, b, cost.mT.contiguous(), SparsityConstrained(K, GAMMA))
    alpha = 0.01 * torch.randn(1, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = PotSparsityConstrained(max_nz=K, gamma=GAMMA)
    arrays = [each[0].numpy() for each in (alpha, a, b, cost)]
    return peer(
        "POT",
        POT,
        f"semi-dual value and gradient, {size} x {size}, k = {K}",
        lambda: -ours(alpha)[0].item(),
        lambda: float(semi_dual_obj_grad(*arrays, theirs)[0]),
        repeats=5,
    )


def full_solve(size: int, k: int, peer_steps: int) -> dict[str, Any]:
    """A whole solve. Ours runs to the optimum, POT's until its steps are used up; agreement compares the values."""
    a, b, cost = problem(size, size)
    arrays = [each[0].numpy() for each in (a, b, cost)]
    reg = SparsityConstrained(k, GAMMA)

    def theirs() -> float:
        _, log = smooth_ot_semi_dual(
            *arrays,
            reg.gamma,
            reg_type="sparsity_constrained",
            max_nz=k,
            numItermax=peer_steps,
            stopThr=1e-12,
            log=True,
        )
        alpha = log["alpha"]
        return float(semi_dual_obj_grad(alpha, *arrays, PotSparsityConstrained(max_nz=k, gamma=reg.gamma))[0])

    return peer(
        "POT",
        POT,
        f"solve {size} x {size}, k = {k}, POT with {peer_steps} iterations",
        lambda: float(solve_semi_dual(a, b, cost, reg, tol=1e-6).value),
        theirs,
        repeats=1,
        warmup=1,
    )


def batched(count: int = 64, size: int = 128) -> dict[str, Any]:
    """Many problems at once against a loop."""
    a, b, cost = problem(size, size, count)
    arrays = [each.numpy() for each in (a, b, cost)]
    reg = SparsityConstrained(4, GAMMA)

    def theirs() -> float:
        values = []
        for index in range(count):
            one = [array[index] for array in arrays]
            _, log = smooth_ot_semi_dual(
                *one, reg.gamma, reg_type="sparsity_constrained", max_nz=4, numItermax=POT_STEPS, stopThr=1e-9, log=True
            )
            values.append(semi_dual_obj_grad(log["alpha"], *one, PotSparsityConstrained(max_nz=4, gamma=reg.gamma))[0])
        return float(np.sum(values))

    return peer(
        "POT",
        POT,
        f"{count} problems of {size} x {size}, k = 4, against a loop of {POT_STEPS} iterations each",
        lambda: float(solve_semi_dual(a, b, cost, reg, tol=1e-4).value.sum()),
        theirs,
        repeats=1,
        warmup=1,
    )


def router_step(tokens: int = 784, width: int = 192, experts: int = 8) -> dict[str, Any]:
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
        peers = [evaluation(), full_solve(500, 4, 100), batched()]
    return {"method": "ot/sparse-ot", "cases": [router_step()], "peers": peers}
