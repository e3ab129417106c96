"""perpGrad against its authors' code, its laws, and what an optimizer must do."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core import OptimizerWrapper, PerpGrad, perp_grad_

GOLDEN = Path(__file__).parent / "golden" / "grokking-stability"
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.8}
ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}

seeds = st.integers(0, 2**31)


def parameter(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    made = nn.Parameter(weight.clone())
    made.grad = gradient.clone()
    return made


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return parameter(weight.to(dtype), gradient.to(dtype))


def grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def model_and_loss(seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    return model, lambda: F.cross_entropy(model(x), y)


# The authors' code


@pytest.mark.parametrize(
    ("file", "base", "settings"),
    [("perpgrad_sgd.npz", torch.optim.SGD, SGD), ("perpgrad_adamw.npz", torch.optim.AdamW, ADAMW)],
)
@pytest.mark.parametrize("parallel_tol", [0.0, 1e-6])
def test_agrees_with_the_authors_code(
    file: str, base: type[torch.optim.Optimizer], settings: dict[str, Any], parallel_tol: float
) -> None:
    with np.load(GOLDEN / file) as archive:
        golden = {name: torch.from_numpy(archive[name]) for name in archive.files}
    params = [nn.Parameter(golden[f"p{index}_init"]) for index in range(2)]
    optimizer = PerpGrad(base, params, settings, parallel_tol=parallel_tol)
    for step in range(2):
        for index, param in enumerate(params):
            param.grad = golden[f"g{index}_step{step}"].clone()
        optimizer.step()
        for index, param in enumerate(params):
            torch.testing.assert_close(param.grad, golden[f"gproj{index}_step{step}"], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(param.detach(), golden[f"p{index}_after{step}"], rtol=1e-12, atol=1e-14)


# The projection


@given(seeds, st.integers(2, 40))
def test_result_is_orthogonal_to_the_weight_and_keeps_the_norm(seed: int, size: int) -> None:
    param = drawn(seed, size)
    norm = grad(param).norm()
    perp_grad_([param])
    assert (param * grad(param)).sum().abs() <= 1e-12 * param.norm() * norm
    torch.testing.assert_close(grad(param).norm(), norm, rtol=1e-12, atol=0)


@given(seeds)
def test_without_rescaling_it_is_the_orthogonal_projection(seed: int) -> None:
    param = drawn(seed, 3, 4)
    weight, gradient = param.detach().clone(), grad(param).clone()
    perp_grad_([param], rescale=False)
    removed = gradient - grad(param)
    torch.testing.assert_close(
        removed, weight * (weight * gradient).sum() / weight.square().sum(), rtol=1e-9, atol=1e-12
    )
    assert grad(param).norm() <= gradient.norm()


@given(seeds, st.booleans())
def test_projecting_twice_changes_nothing_more(seed: int, rescale: bool) -> None:
    param = drawn(seed, 5)
    perp_grad_([param], rescale)
    once = grad(param).clone()
    perp_grad_([param], rescale)
    torch.testing.assert_close(grad(param), once, rtol=1e-12, atol=1e-14)


def test_each_tensor_is_projected_by_itself() -> None:
    together = [drawn(0, 3, 4), drawn(1, 4), drawn(2, 2, 3, 2, dtype=torch.float32)]
    alone = copy.deepcopy(together)
    for param, other in zip(together, alone, strict=True):
        other.grad = grad(param).clone()
    perp_grad_(together)
    for param, other in zip(together, alone, strict=True):
        perp_grad_([other])
        assert torch.equal(grad(param), grad(other))
        assert abs((param * grad(param)).sum().item()) < 1e-6


def test_zero_weight_leaves_the_gradient_as_it_is() -> None:
    param = parameter(torch.zeros(3), torch.tensor([1.0, -2.0, 3.0]))
    perp_grad_([param])
    assert grad(param).tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("parallel_tol", [0.0, 1e-6])
def test_zero_gradient_stays_zero(parallel_tol: float) -> None:
    params = [parameter(torch.ones(3), torch.zeros(3)), parameter(torch.zeros(3), torch.zeros(3))]
    perp_grad_(params, parallel_tol=parallel_tol)
    assert all(not grad(param).any() for param in params)


@given(seeds, st.floats(0.01, 100))
def test_parallel_gradient_becomes_zero_and_not_a_step_of_rounding_noise(seed: int, factor: float) -> None:
    weight = torch.randn(7, generator=torch.Generator().manual_seed(seed))
    for param in (parameter(weight, factor * weight), parameter(weight[:1], weight[1:2])):
        perp_grad_([param])
        assert not grad(param).any()


def test_without_tolerance_rounding_noise_is_rescaled_as_in_the_authors_code() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    param = parameter(weight, 3 * weight)
    perp_grad_([param], parallel_tol=0.0)
    torch.testing.assert_close(grad(param).norm(), 3 * weight.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_projected_in_float32(dtype: torch.dtype) -> None:
    param = drawn(0, 64, 64, dtype=dtype)
    wide = parameter(param.detach().float(), grad(param).float())
    perp_grad_([param])
    perp_grad_([wide])
    assert grad(param).dtype == dtype
    assert torch.equal(grad(param), grad(wide).to(dtype))


def test_layout_in_memory_does_not_matter() -> None:
    plain = drawn(0, 2, 3, 4, 5)
    strided = parameter(
        plain.detach().contiguous(memory_format=torch.channels_last),
        grad(plain).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    )
    perp_grad_([plain])
    perp_grad_([strided])
    torch.testing.assert_close(grad(strided), grad(plain), check_stride=False)


def test_missing_and_sparse_gradients_are_left_alone() -> None:
    frozen, table, empty = (
        nn.Parameter(torch.ones(2)),
        nn.Embedding(5, 2, sparse=True),
        parameter(torch.ones(0), torch.ones(0)),
    )
    table(torch.tensor([1, 1])).sum().backward()
    before = grad(table.weight).to_dense()
    perp_grad_([frozen, table.weight, empty])
    assert frozen.grad is None
    assert torch.equal(grad(table.weight).to_dense(), before)


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="real parameters, got one of"):
        perp_grad_([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(("setting", "value"), [("eps", 0.0), ("parallel_tol", 1.0), ("parallel_tol", -1e-6)])
def test_bad_settings_are_refused(setting: str, value: float) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ValueError, match=f"{setting} must"):
        perp_grad_([], **settings)
    with pytest.raises(ValueError, match=f"{setting} must"):
        PerpGrad(torch.optim.SGD([drawn(0, 2)], lr=0.1), **settings)


@given(seeds, st.floats(1e-3, 1.0))
def test_plain_gradient_descent_grows_the_weights_by_the_step_alone(seed: int, lr: float) -> None:
    param = drawn(seed, 6)
    before, step = param.detach().square().sum(), (lr * grad(param)).square().sum()
    PerpGrad(torch.optim.SGD([param], lr=lr)).step()
    torch.testing.assert_close(param.detach().square().sum(), before + step, rtol=1e-12, atol=0)


# The optimizer


def test_class_with_settings_is_the_same_as_an_optimizer() -> None:
    steps = []
    for make in (
        lambda params: PerpGrad(torch.optim.AdamW(params, **ADAMW)),
        lambda params: PerpGrad(torch.optim.AdamW, params, ADAMW),
    ):
        model, loss = model_and_loss()
        optimizer = make(model.parameters())
        loss().backward()
        optimizer.step()
        steps.append(nn.utils.parameters_to_vector(model.parameters()))
        assert optimizer.param_groups[0]["eps"] == 1e-8
    assert torch.equal(*steps)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.optim.AdamW,),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), [torch.zeros(1)]),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), None, {"lr": 0.1}),
        ("AdamW", [torch.zeros(1)]),
        (nn.Linear, [torch.zeros(1)]),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: Any) -> None:
    with pytest.raises(TypeError):
        PerpGrad(*arguments)


@pytest.mark.parametrize("reloaded", [False, True])
def test_scheduler_changes_the_step(reloaded: bool) -> None:
    param = drawn(0, 5)
    gradient = grad(param).clone()
    optimizer = PerpGrad(torch.optim.SGD([param], lr=1.0))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())  # which replaces the groups of the wrapped optimizer
    lengths = []
    for _ in range(3):
        param.grad = gradient.clone()
        before = param.detach().clone()
        optimizer.step()
        lengths.append((param.detach() - before).norm())
        scheduler.step()
    torch.testing.assert_close(
        torch.stack(lengths) / gradient.norm(), torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    )


def test_groups_state_and_defaults_are_those_of_the_wrapped_optimizer_always() -> None:
    base = torch.optim.AdamW([drawn(0, 3)], lr=0.1)
    optimizer = PerpGrad(base)
    optimizer.step()
    for load in (optimizer.load_state_dict, base.load_state_dict):
        load(copy.deepcopy(base.state_dict()))
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        assert optimizer.defaults is base.defaults
    optimizer.add_param_group({"params": [drawn(1, 2)], "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.5]
    optimizer.param_groups = base.param_groups[:1]
    assert len(base.param_groups) == 1
    optimizer.zero_grad()
    assert base.param_groups[0]["params"][0].grad is None


def test_saved_state_continues_bit_for_bit() -> None:
    model, loss = model_and_loss()
    optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), **ADAMW))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters())

    train(model, optimizer, loss)
    other_model, other_loss = model_and_loss()
    other = PerpGrad(torch.optim.AdamW(other_model.parameters(), lr=1.0))
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, loss), train(other_model, other, other_loss))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copy_is_complete_and_independent(copied: Callable[[PerpGrad], PerpGrad]) -> None:
    param = drawn(0, 5)
    optimizer = PerpGrad(torch.optim.SGD([param], **SGD), rescale=False)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    twin = copied(optimizer)
    assert (twin.rescale, twin.param_groups[0]["momentum"]) == (False, 0.8)
    before, [other] = param.detach().clone(), twin.param_groups[0]["params"]
    other.grad = grad(param).clone()
    twin.step()
    assert torch.equal(param, before)
    optimizer.step()
    assert torch.equal(param, other)


def test_gradients_of_every_evaluation_of_a_closure_are_transformed() -> None:
    steps = []
    for closed in (False, True):
        model, loss = model_and_loss()
        optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1))

        def evaluate(model: nn.Module = model, loss: Callable[[], Tensor] = loss) -> Tensor:
            model.zero_grad()
            value = loss()
            value.backward()
            return value

        value = evaluate()
        assert optimizer.step(evaluate if closed else None) == (value if closed else None)
        steps.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*steps)


def test_works_around_an_optimizer_that_evaluates_several_times() -> None:
    model, loss = model_and_loss()
    optimizer = PerpGrad(torch.optim.LBFGS(model.parameters(), max_iter=5))
    norms = [weight.norm().item() for weight in model.parameters()]

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = evaluate().item()
    optimizer.step(evaluate)
    assert loss().item() < before
    assert norms != [weight.norm().item() for weight in model.parameters()]


def test_gradient_scaler_unscales_first_and_skips_overflow() -> None:
    steps = []
    for scale in (1.0, 2.0**10):
        model, loss = model_and_loss()
        optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), fused=True, **ADAMW))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        steps.append(nn.utils.parameters_to_vector(model.parameters()))
        grad(next(model.parameters())).fill_(torch.inf)
        scaler.step(optimizer)
        assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), steps[-1])
    torch.testing.assert_close(*steps)


def test_hooks_run_around_the_step_and_the_state() -> None:
    seen: list[str] = []
    param = drawn(0, 4)
    optimizer = PerpGrad(torch.optim.SGD([param], lr=0.1))
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(f"before, {abs((param * grad(param)).sum().item()) > 1e-6}")
    )
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before, True", "after", "saving", "saved", "loading", "loaded"]


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, loss = model_and_loss()
    base = torch.optim.AdamW(model.parameters(), **ADAMW)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, PerpGrad(base))
    loss().backward()
    optimizer.step()
    assert base.param_groups[0]["eps"] == 1e-8
    assert optimizer.param_groups is base.param_groups


def test_wrapper_without_a_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match="OptimizerWrapper must define transform_gradients"):
        OptimizerWrapper(torch.optim.SGD([drawn(0, 2)], lr=0.1)).step()
