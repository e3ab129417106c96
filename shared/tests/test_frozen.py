"""A frozen module must stay bit for bit what it was, whatever the training loop around it does."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from poise.core.frozen import FrozenGuard


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def train(model: Model, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_training_around_a_frozen_module_leaves_it_bit_identical(model: Model, x: Tensor) -> None:
    before, head = copy.deepcopy(model.encoder.state_dict()), model.head.weight.clone()
    with FrozenGuard(model.encoder):
        train(model, x)
        assert not model.encoder[2].training
        assert all(weight.grad is None for weight in model.encoder.parameters())
        torch.testing.assert_close(model.encoder(x), model.encoder(x))
    after = model.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(model.head.weight, head)


def test_modes_and_flags_are_restored_also_after_an_exception(model: Model) -> None:
    model.encoder[1].eval()
    model.encoder[0].bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), FrozenGuard(model.encoder):
        model(torch.ones(2, 5))
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == flags
    model.train()
    assert all(module.training for module in model.modules())


def test_gradients_flow_through_to_the_input(model: Model, x: Tensor) -> None:
    x.requires_grad_()
    with FrozenGuard(model):
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() > 0


def spoil_weight(model: Model) -> None:
    with torch.no_grad():
        model.encoder[0].weight[1, 2] += 1e-6


def spoil_through_data(model: Model) -> None:
    model.encoder[0].weight.data[0, 0] *= 1 + 2**-20


def spoil_by_swapping_entries(model: Model) -> None:
    bias = model.encoder[0].bias.data
    bias.copy_(bias.flip(0))


def spoil_statistics(model: Model) -> None:
    model.encoder[1].training = True
    model.encoder[1](torch.randn(5, 8))


def spoil_counter(model: Model) -> None:
    counter = model.encoder[1].num_batches_tracked
    assert counter is not None
    counter.add_(1)


def spoil_gradient(model: Model) -> None:
    model.encoder[0].weight.grad = torch.zeros(8, 4)


def spoil_flag(model: Model) -> None:
    model.requires_grad_(True)


def spoil_registry(model: Model) -> None:
    model.encoder.register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, "changed: 0.weight"),
        (spoil_through_data, "changed: 0.weight"),
        (spoil_by_swapping_entries, "changed: 0.bias"),
        (
            spoil_statistics,
            "changed: 1.num_batches_tracked, 1.running_mean, 1.running_var; left evaluation mode: BatchNorm1d",
        ),
        (spoil_counter, "changed: 1.num_batches_tracked"),
        (spoil_gradient, "received a gradient: 0.weight"),
        (spoil_flag, "require a gradient again: 0.bias, 0.weight, 1.bias, 1.weight"),
        (spoil_registry, "were added or removed: extra"),
    ],
)
def test_every_violation_is_named(model: Model, spoil: Callable[[Model], None], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"frozen module violated: {message}$"), FrozenGuard(model.encoder):
        spoil(model)


def test_a_gradient_that_was_there_before_may_stay_but_not_change(model: Model, x: Tensor) -> None:
    model(x).sum().backward()
    with FrozenGuard(model.encoder):
        model(x)
    gradient = model.encoder[0].weight.grad
    assert gradient is not None
    with pytest.raises(RuntimeError, match=r"received a gradient: 0\.weight"), FrozenGuard(model.encoder):
        gradient.add_(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("entry", [0, 1, 2**20, 2**20 + 4])
def test_any_single_bit_is_seen_in_any_dtype(dtype: torch.dtype, entry: int) -> None:
    module = nn.Module()
    module.register_buffer("state", torch.zeros(2**20 + 5, dtype=dtype))
    module.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    state, flags = module.get_buffer("state"), module.get_buffer("flags")
    with pytest.raises(RuntimeError, match="changed: state"), FrozenGuard(module):
        torch.view_as_real(state)[entry, 1].neg_() if dtype.is_complex else state[entry].neg_()  # the sign of zero
    with pytest.raises(RuntimeError, match="changed: flags"), FrozenGuard(module):
        flags[1] = True


def test_only_batch_normalisation_can_be_frozen(model: Model, x: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    with FrozenGuard(*norms):
        train(model, x)
        assert model.encoder[0].weight.grad is not None
        assert model.encoder[2].training


def test_several_modules_are_told_apart(model: Model) -> None:
    with (
        pytest.raises(RuntimeError, match=r"changed: 1\.bias$"),
        FrozenGuard(model.encoder[0], model.head),
        torch.no_grad(),
    ):
        model.head.bias.add_(1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_frozen_module_is_not_frozen(model: Model, how: str) -> None:
    with FrozenGuard(model.encoder):
        if how == "deepcopy":
            duplicate = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            duplicate = torch.load(buffer, weights_only=False)
        assert duplicate.train() is duplicate
        assert duplicate.encoder[1].training
        assert not model.encoder[1].training


def test_freeze_check_and_release_in_steps(model: Model, x: Tensor) -> None:
    guard = FrozenGuard(model.encoder).freeze()
    guard.check()
    with pytest.raises(RuntimeError, match="frozen already"):
        FrozenGuard(model).freeze()
    train(model, x)
    guard.check()
    guard.release()
    guard.release()
    assert model.encoder[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="not frozen: call freeze"):
        guard.check()
    with pytest.raises(ValueError, match="at least one module"):
        FrozenGuard()
