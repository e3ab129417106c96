"""The mixture-of-experts router."""

import pytest
import torch

from poise.ot import NegEntropy, SparseOTRouter, SparsityConstrained, solve_semi_dual, sparse_simplex_projection
from poise.ot.sparse.router import row_potential


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 10.0])
@pytest.mark.parametrize("method", ["sparse", "sinkhorn", "lbfgs"])
@pytest.mark.parametrize("choose", ["tokens", "experts"])
def test_no_expert_is_overfull(factor, method, choose):
    torch.manual_seed(0)
    router = SparseOTRouter(8, 6, choose=choose, selected=2, capacity_factor=factor, method=method)
    tokens = 5 * torch.randn(3, 50, 8)
    dispatch, combine, metrics = router(tokens)
    assert int(dispatch.sum(1).max()) <= router.capacity(50)
    assert float(metrics["max_load"]) <= 1
    assert torch.equal(combine > 0, dispatch)


def test_capacity_is_an_equal_share_rounded_up_to_a_multiple_of_four():
    router = SparseOTRouter(8, 32, capacity_factor=1.0)
    assert router.capacity(400) == 16
    assert router.capacity(3) == 3


def test_tokens_can_choose_experts():
    torch.manual_seed(0)
    dispatch, _, _ = SparseOTRouter(8, 6, choose="experts", selected=2, steps=50)(torch.randn(2, 40, 8))
    assert int(dispatch.sum(-1).max()) <= 2


def test_first_choices_go_first_and_then_the_queue_decides():
    torch.manual_seed(0)
    router = SparseOTRouter(8, 2, choose="experts", selected=2, capacity_factor=0.5)
    plan = torch.tensor([[[0.9, 0.1]] * 5 + [[0.6, 0.4]] * 3]).flip(
        1
    )  # all prefer the first expert; the surest stand last
    assert router.capacity(8) == 4
    assert router._within_capacity(plan)[0, :, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    router.first_come = False
    assert router._within_capacity(plan)[0, :, 0].nonzero()[:, 0].tolist() == [3, 4, 5, 6]


def test_capacity_counts_every_choice_of_a_token():
    assert SparseOTRouter(8, 8, choose="experts", selected=2).capacity(64) == 16


@pytest.mark.parametrize("method", ["sinkhorn", "lbfgs"])
def test_entropic_routers_use_the_optimal_plan(method):
    torch.manual_seed(0)
    scores = torch.randn(3, 20, 5, dtype=torch.float64)
    router = SparseOTRouter(8, 5, capacity_factor=100.0, method=method, steps=200)
    plan = router.plan(scores)
    a, b = torch.ones(3, 20, dtype=torch.float64), torch.full((3, 5), 4.0, dtype=torch.float64)
    torch.testing.assert_close(plan, solve_semi_dual(a, b, -scores, NegEntropy(1.0)).plan, atol=0.02, rtol=0)


def test_gates_carry_the_gradient_and_the_plan_does_not():
    torch.manual_seed(0)
    router = SparseOTRouter(8, 4)
    tokens = torch.randn(2, 16, 8)
    combine = router(tokens).combine
    gates = router.score(tokens).softmax(-1)
    torch.testing.assert_close(combine, torch.where(combine > 0, gates, 0.0))
    combine.square().sum().backward()
    assert router.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["sparse", "sinkhorn", "lbfgs"])
def test_the_plan_can_weigh_the_answers_and_then_carries_the_gradient(method):
    torch.manual_seed(0)
    router = SparseOTRouter(8, 4, combine="plan", method=method, capacity_factor=4.0)
    dispatch, combine, _ = router(torch.randn(2, 16, 8))
    torch.testing.assert_close(combine.sum(1), torch.full((2, 4), 4.0))
    assert torch.equal(combine > 0, dispatch)
    combine.square().sum().backward()
    assert router.score.weight.grad.abs().sum() > 0


def test_the_gradient_of_the_plan_is_that_of_the_read_out():
    torch.manual_seed(0)
    router = SparseOTRouter(8, 3).double()
    scores = torch.randn(1, 12, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    potential = row_potential(scores.detach(), 4.0, SparsityConstrained(4, 1.0), "sparse", 20, 1e-2)

    def read_out(scores):
        return 4.0 * sparse_simplex_projection((scores + potential[..., None]) / 4.0, 4, dim=-2)

    weight = torch.randn(1, 12, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((router.plan(scores) * weight).sum(), scores)
    (expected,) = torch.autograd.grad((read_out(scores) * weight).sum(), scores)
    torch.testing.assert_close(ours, expected)


def test_noise_is_for_training_and_comes_from_its_generator():
    torch.manual_seed(0)
    tokens = torch.randn(1, 32, 8)
    router = SparseOTRouter(8, 4, method="lbfgs", noise=5.0, generator=torch.Generator().manual_seed(0))
    noisy = router(tokens).dispatch
    assert not torch.equal(noisy, router(tokens).dispatch)
    router.generator.manual_seed(0)
    assert torch.equal(noisy, router(tokens).dispatch)
    router.eval()
    assert torch.equal(router(tokens).dispatch, router(tokens).dispatch)


def test_half_precision_tokens_are_routed_in_float32():
    torch.manual_seed(0)
    router = SparseOTRouter(8, 4).bfloat16()
    tokens = torch.randn(2, 16, 8, dtype=torch.bfloat16)
    dispatch, combine, metrics = router(tokens)
    assert combine.dtype == torch.bfloat16
    assert int(dispatch.sum(1).max()) <= router.capacity(16)
    assert metrics["row_error"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "width and experts"),
        ({"choose": "both"}, "choose must be"),
        ({"combine": "sum"}, "combine must be"),
        ({"method": "greedy"}, "method must be"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"selected": 5}, "selected must lie in 1..4"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"noise": -1.0}, "noise must not be negative"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SparseOTRouter(**({"width": 8, "experts": 4} | change))


@pytest.mark.parametrize("shape", [(16, 8), (2, 16, 7), (2, 0, 8)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="tokens must have shape"):
        SparseOTRouter(8, 4)(torch.zeros(shape))
