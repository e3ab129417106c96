"""Sinkhorn's algorithm: agreement with POT, exact optimal transport and autograd; honesty about convergence; the divergence."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from poise.ot import (
    ConvergenceWarning,
    Euclidean,
    PNormP,
    RelativeEpsilon,
    SqEuclidean,
    sinkhorn,
    sinkhorn_points,
)
from poise.ot.entropic import fixed_point, streaming
from poise.ot.entropic.kernels import StabilizedKernel

METHODS: list[Literal["log", "absorption"]] = ["log", "absorption"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(-1)


def problem(n: int = 30, m: int = 40, d: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return masses(n), masses(m, seed=1), torch.cdist(normal(n, d, seed=2), normal(m, d, seed=3) + 0.5).square()


def entropy(plan: Tensor) -> Tensor:
    return -torch.xlogy(plan, plan).sum((-2, -1))


# Against POT and exact optimal transport


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
def test_plan_is_that_of_pot(method: Literal["log", "absorption"], reg: float) -> None:
    a, b, M = (tensor.numpy() for tensor in problem())
    expected = ot.sinkhorn(a, b, M, reg, method="sinkhorn_log", stopThr=1e-12, numItermax=100_000)
    result = sinkhorn(a, b, M, reg, method=method, tol=1e-11, max_iter=100_000)
    np.testing.assert_allclose(result.plan(), expected, rtol=0, atol=1e-8)


def test_numpy_in_numpy_out() -> None:
    a, b, M = (tensor.numpy() for tensor in problem())
    for weights in ((a, b), (None, None)):
        result = sinkhorn(*weights, M, 0.1)
        for entry in (
            result.f,
            result.g,
            result.value,
            result.reg,
            result.marginal_error,
            result.converged,
            result.plan(),
        ):
            assert isinstance(entry, np.ndarray)
    frozen = M.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(
        sinkhorn(a, b, frozen[:, ::-1].copy()[:, ::-1], 0.1).value, sinkhorn(a, b, M, 0.1).value
    )


def test_value_lies_between_the_exact_cost_and_it_less_the_largest_entropy() -> None:
    a, b, M = problem()
    exact = float(ot.emd2(a.numpy(), b.numpy(), M.numpy()))
    for reg in (1.0, 0.1, 0.01, 0.001):
        value = sinkhorn(a, b, M, reg, max_iter=20_000, tol=1e-6).value.item()
        assert exact - reg * math.log(a.numel() * b.numel()) <= value <= exact


def test_value_is_cost_less_entropy_and_what_the_potentials_say() -> None:
    a, b, M = problem()
    result = sinkhorn(a, b, M, 0.3, tol=1e-12)
    plan = result.plan()
    torch.testing.assert_close(result.value, (plan * M).sum() - 0.3 * entropy(plan))
    torch.testing.assert_close(result.value, result.f @ a + result.g @ b)
    torch.testing.assert_close(plan, torch.exp((result.f[:, None] + result.g - M) / 0.3))


def test_value_is_a_lower_bound_at_every_iterate() -> None:
    a, b, M = problem()
    exact = sinkhorn(a, b, M, 0.05, tol=1e-12, max_iter=10_000).value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        values = [sinkhorn(a, b, M, 0.05, tol=1e-12, max_iter=n).value for n in (1, 2, 3, 5, 9, 17, 33, 65)]
    assert all(value <= exact + 1e-12 for value in values)


# Marginals and convergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_reported_marginal_error_is_that_of_the_plan(method: Literal["log", "absorption"], dtype: torch.dtype) -> None:
    a, b, M = (tensor.to(dtype) for tensor in problem())
    result = sinkhorn(a, b, M, 0.1, method=method, tol=1e-4)
    plan = result.plan()
    assert result.converged
    assert result.marginal_error <= 1e-4
    torch.testing.assert_close((plan.sum(1) - a).abs().sum(), result.marginal_error, rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.sum(0), b, rtol=1e-4, atol=1e-7)


def test_too_few_iterations_are_flagged() -> None:
    a, b, M = problem()
    with pytest.warns(ConvergenceWarning, match="after 5 iterations"):
        result = sinkhorn(a, b, M, 0.01, init=(torch.zeros(30), torch.zeros(40)), max_iter=5)
    assert not result.converged
    assert result.marginal_error > 1e-3
    assert result.n_iter == 5


def test_a_batch_says_which_of_its_problems_converged() -> None:
    a, b, M = problem()
    with pytest.warns(ConvergenceWarning):
        result = sinkhorn(
            a.expand(2, -1), b.expand(2, -1), M.expand(2, -1, -1), torch.tensor([2.0, 1e-3]), max_iter=200
        )
    assert result.converged.tolist() == [True, False]


def test_warm_start_needs_few_iterations() -> None:
    a, b, M = problem()
    cold = sinkhorn(a, b, M, 0.05, tol=1e-8, max_iter=10_000)
    for method in METHODS:
        warm = sinkhorn(a, b, M, 0.05, tol=1e-7, init=(cold.f, cold.g), method=method)
        assert warm.n_iter == 1 < cold.n_iter
        torch.testing.assert_close(warm.value, cold.value)


def test_over_relaxation_and_annealing_save_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, M = problem(100, 100, 2)
    reg = 0.005 * M.mean().item()
    fast = sinkhorn(a, b, M, reg, tol=1e-6, max_iter=100_000)
    monkeypatch.setattr(fixed_point, "OMEGA_MAX", 1.0)
    monkeypatch.setattr(fixed_point, "ANNEALING_SPREAD", 1e-9)
    plain = sinkhorn(a, b, M, reg, tol=1e-6, max_iter=100_000)
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-6, atol=1e-6)
    assert fast.n_iter < plain.n_iter / 3


def test_overflow_falls_back_to_the_log_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, M = problem()
    exact = sinkhorn(a, b, M, 0.1, method="log").value
    rows, calls = StabilizedKernel.rows, itertools.count()

    def overflowing(kernel: StabilizedKernel, psi: Tensor) -> Tensor:
        """Infinite from some iteration on, as when an exponential leaves the range of the dtype."""
        return rows(kernel, psi) + (math.inf if next(calls) > 20 else 0.0)

    monkeypatch.setattr(StabilizedKernel, "rows", overflowing)
    torch.testing.assert_close(sinkhorn(a, b, M, 0.1).value, exact, rtol=1e-4, atol=1e-4)
    with pytest.warns(ConvergenceWarning, match="marginal error of inf"):
        forced = sinkhorn(a, b, M, 0.1, method="absorption")
    assert not forced.converged
    assert torch.isfinite(forced.value)


@pytest.mark.parametrize("relative", [1e-3, 1e-5])
def test_small_epsilon_in_single_precision(relative: float) -> None:
    x, y = normal(64, 32).float(), (0.8 * normal(64, 32, seed=1) + 0.5).float()
    M = torch.cdist(x, y).square()
    exact = float(ot.emd2(np.full(64, 1 / 64), np.full(64, 1 / 64), M.double().numpy()))
    result = sinkhorn(None, None, M, RelativeEpsilon(relative), max_iter=5000)
    assert result.converged
    assert result.value.item() == pytest.approx(exact, abs=2 * result.reg.item() * math.log(64) + 1e-3)


# Equal results along different ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relative", [0.1, 0.01, 0.001])
def test_log_domain_absorption_and_streaming_agree(relative: float, dtype: torch.dtype) -> None:
    x, y = normal(60, 2).to(dtype), (normal(50, 2, seed=1) + 0.5).to(dtype)
    solve = partial(sinkhorn_points, x, y, RelativeEpsilon(relative), tol=1e-3, max_iter=5_000)
    log, absorption, stream = solve(method="log"), solve(method="absorption"), solve(method="streaming")
    torch.testing.assert_close(absorption.value, log.value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream.value, log.value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream.plan(), log.plan(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", [*METHODS, "streaming"])
def test_a_batch_is_its_problems_one_by_one(method: Literal["log", "absorption", "streaming"]) -> None:
    x, y = normal(3, 20, 2), normal(3, 25, 2, seed=1) * torch.tensor([1.0, 3.0, 0.2]).double()[:, None, None]
    a, b = masses(3, 20), masses(3, 25, seed=1)
    solve = partial(sinkhorn_points, method=method, tol=1e-9, max_iter=10_000)
    batch = solve(x, y, RelativeEpsilon(0.05), SqEuclidean(), a, b)
    for i in range(3):
        single = solve(x[i], y[i], RelativeEpsilon(0.05), SqEuclidean(), a[i], b[i])
        torch.testing.assert_close(batch.value[i], single.value)
        torch.testing.assert_close(batch.reg[i], single.reg)
        torch.testing.assert_close(batch.plan()[i], single.plan(), rtol=0, atol=1e-9)


def test_transport_to_itself_is_the_general_problem() -> None:
    x, a = normal(40, 3), masses(40)
    for method in (*METHODS, "streaming"):
        solve = partial(sinkhorn_points, method=method, tol=1e-10, max_iter=10_000)
        symmetric, general = solve(x, None, 1.0, SqEuclidean(), a), solve(x, x, 1.0, SqEuclidean(), a, a)
        torch.testing.assert_close(symmetric.value, general.value)
        torch.testing.assert_close(symmetric.plan(), general.plan(), rtol=0, atol=1e-9)
        torch.testing.assert_close(symmetric.f, symmetric.g)
        assert symmetric.n_iter < general.n_iter


@pytest.mark.parametrize("method", [*METHODS, "streaming"])
def test_points_without_mass_have_no_effect(method: Literal["log", "absorption", "streaming"]) -> None:
    x, y = normal(20, 2), normal(15, 2, seed=1)
    a, b = masses(20), masses(15, seed=1)
    padded = [torch.cat([points, torch.zeros(5, 2)]) for points in (x, y)]
    weights = [torch.cat([mass, torch.zeros(5)]) for mass in (a, b)]
    solve = partial(sinkhorn_points, method=method, tol=1e-9)
    expected, result = solve(x, y, 0.1, SqEuclidean(), a, b), solve(*padded, 0.1, SqEuclidean(), *weights)
    torch.testing.assert_close(result.value, expected.value)
    torch.testing.assert_close(result.plan()[:20, :15], expected.plan(), rtol=0, atol=1e-9)
    assert result.plan()[20:].abs().max() == 0
    assert (result.f[20:] == -math.inf).all()


def test_scaling_all_masses_scales_the_plan() -> None:
    a, b, M = problem()
    plan, scaled = sinkhorn(a, b, M, 0.1, tol=1e-9).plan(), sinkhorn(7 * a, 7 * b, M, 0.1, tol=1e-9).plan()
    torch.testing.assert_close(scaled, 7 * plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    M = problem()[2].to(dtype).requires_grad_()
    result = sinkhorn(None, None, M, 0.1)
    assert result.value.dtype == result.f.dtype == torch.float32
    torch.testing.assert_close(result.value, sinkhorn(None, None, M.detach().float(), 0.1).value)
    result.value.backward()
    assert M.grad is not None
    assert M.grad.dtype == dtype


@pytest.mark.parametrize("method", [*METHODS, "streaming"])
def test_autocast_does_not_reach_the_solver(method: Literal["log", "absorption", "streaming"]) -> None:
    x, y = normal(2, 30, 3).float(), normal(2, 20, 3, seed=1).float().requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = sinkhorn_points(x, y, RelativeEpsilon(0.05, "std"), SqEuclidean(), method=method).value.sum()
        results.append((value, *torch.autograd.grad(value, y)))
    torch.testing.assert_close(*results)


# Gradients


def unrolled(a: Tensor, b: Tensor, M: Tensor, reg: float, iterations: int) -> Tensor:
    """The value by autograd through plain iterations in the log domain."""
    g = torch.zeros_like(b)
    for _ in range(iterations):
        f = reg * (a.log() - ((g - M) / reg).logsumexp(1))
        g = reg * (b.log() - ((f[:, None] - M) / reg).logsumexp(0))
    return f @ a + g @ b


@pytest.mark.parametrize("method", METHODS)
def test_envelope_gradient_is_that_of_finite_differences(method: Literal["log", "absorption"]) -> None:
    a, b, M = problem(5, 4)

    def value(M: Tensor, for_a: Tensor, for_b: Tensor) -> Tensor:
        # softmax keeps the totals equal, along which alone the value has a derivative
        return sinkhorn(for_a.softmax(0), for_b.softmax(0), M, 0.5, method=method, tol=1e-12, max_iter=10_000).value

    torch.autograd.gradcheck(value, (M.requires_grad_(), a.requires_grad_(), b.requires_grad_()), atol=1e-6)


def test_envelope_gradient_is_that_of_500_unrolled_iterations() -> None:
    a, b, M = problem(12, 10)
    M.requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(a, b, M, 0.3, 500), M)
    result = sinkhorn(a, b, M, 0.3, tol=1e-12)
    (gradient,) = torch.autograd.grad(result.value, M)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(gradient, result.plan(), rtol=0, atol=1e-15)


def test_no_graph_passes_through_the_iterations() -> None:
    a, b, M = problem()
    result = sinkhorn(a.requires_grad_(), b.requires_grad_(), M.requires_grad_(), 0.1)
    assert not result.f.requires_grad
    assert not result.plan().requires_grad
    node = result.value.grad_fn
    assert node is not None
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    assert len(parents) == 3
    assert all(type(parent).__name__ == "AccumulateGrad" for parent in parents)


def test_streamed_gradients_are_those_of_the_stored_matrix() -> None:
    a, b = masses(2, 30), masses(2, 25, seed=1)
    results = []
    for method in ("absorption", "streaming"):
        x, y = normal(2, 30, 3).requires_grad_(), normal(2, 25, 3, seed=1).requires_grad_()
        leaves = [x, y, a.clone().requires_grad_(), b.clone().requires_grad_()]
        value = sinkhorn_points(x, y, 0.3, Euclidean(), *leaves[2:], method=method, tol=1e-11, max_iter=10_000).value
        alone = sinkhorn_points(x, None, 0.3, Euclidean(), method=method, tol=1e-11).value
        results.append(torch.autograd.grad((value * torch.tensor([1.0, 2.0])).sum() + alone.sum(), leaves))
    for stored, streamed in zip(*results, strict=True):
        shift = (stored - streamed).mean(-1, keepdim=True) if stored.ndim == 2 else 0  # potentials have a free constant
        torch.testing.assert_close(streamed + shift, stored, rtol=0, atol=1e-8)


# Bounded memory


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("cost", [SqEuclidean(), PNormP(1.5)], ids=repr)
def test_streaming_never_holds_more_than_a_tile(cost: SqEuclidean | PNormP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TILE", 2**11)
    monkeypatch.setattr(fixed_point, "SAMPLE", 32)
    x, y = normal(300, 3).float(), normal(250, 3, seed=1).float().requires_grad_()
    with LargestTensor() as largest:
        result = sinkhorn_points(x, y, 1.0, cost, method="streaming", tol=1e-2)
        result.value.backward()
    assert largest.entries <= 2**11 < 300 * 250 / 30
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


def test_large_clouds_are_streamed_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(100, 2), normal(90, 2, seed=1)
    monkeypatch.setattr("poise.ot.entropic.points.STREAM_ABOVE", 5000)
    with LargestTensor() as largest:
        monkeypatch.setattr(streaming, "TILE", 2**10)
        monkeypatch.setattr(fixed_point, "SAMPLE", 16)
        sinkhorn_points(x, y, 1.0)
    assert largest.entries < 5000
