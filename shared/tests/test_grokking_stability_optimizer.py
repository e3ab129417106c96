"""The wrapper of optimizers, by way of perpGrad, does what an optimizer must do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core import OptimizerWrapper, PerpGrad

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.8}
ADAMW: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-8}


def drawn(seed: int, size: int) -> nn.Parameter:
    weight, gradient = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    param = nn.Parameter(weight)
    param.grad = gradient
    return param


def grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def model_and_loss(seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    return model, lambda: F.cross_entropy(model(x), y)


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
    optimizer = PerpGrad(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5))
    found: list[Tensor] = []

    def evaluate() -> Tensor:
        if found:  # what the evaluation before left to the optimizer
            found.append(
                torch.stack([(grad(w) * before).sum() for w, before in zip(model.parameters(), weights, strict=True)])
            )
        else:
            found.append(torch.zeros(4))
        weights[:] = [w.detach().clone() for w in model.parameters()]
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    weights: list[Tensor] = []
    optimizer.step(evaluate)
    assert len(found) > 2
    assert torch.stack(found).abs().max() < 1e-6


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
