"""The orthonormal regularizer: its value, its gradient at the minimum, and the two ways to apply it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.singular_change import singular_change
from poise.core.adapters.sorsa import SorsaConfig, SorsaLinear, apply_sorsa, sorsa_deltas, sorsa_parameters
from poise.core.adapters.sorsa_penalty import SorsaRegularizer, descend_, orthonormal_penalty, sorsa_penalty
from poise.core.schedule import Linear


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.mT


def network(rank: int = 2, noise: float = 0.0) -> nn.Sequential:
    """Layers of several shapes, two of one shape."""
    torch.manual_seed(0)
    sizes = ((6, 8), (8, 8), (8, 8), (8, 3))
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes)).double()
    apply_sorsa(model, SorsaConfig(r=rank))
    with torch.no_grad():
        for parameter in sorsa_parameters(model):
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def literally(model: nn.Module, squared: bool = False) -> Tensor:
    """The formula, matrix by matrix."""
    terms = []
    for delta in sorsa_deltas(model).values():
        for a in (delta.v, delta.u.mT):
            residual = a @ a.mT - torch.eye(len(a), dtype=a.dtype)
            terms.append(residual.square().sum() if squared else residual.norm())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("squared", [False, True])
def test_penalty_is_the_mean_over_matrices_and_so_is_its_gradient(squared: bool) -> None:
    model = network(noise=0.2)
    ours, theirs = sorsa_penalty(model, squared), literally(model, squared)
    torch.testing.assert_close(ours, theirs)
    parameters = [p for delta in sorsa_deltas(model).values() for p in (delta.u, delta.v)]
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))


@pytest.mark.parametrize("dim", ["rows", "cols"])
def test_scaled_orthonormal_factor_costs_its_excess_and_rotation_costs_nothing(dim: str) -> None:
    a = orthonormal(3, 7)
    rotation = orthonormal(3, 3, seed=1)
    turn = (lambda x: x) if dim == "rows" else (lambda x: x.mT)
    for scale in (0.5, 1.3):
        value = orthonormal_penalty(turn(scale * a), dim)
        assert value.item() == pytest.approx(abs(scale**2 - 1) * math.sqrt(3))
        assert orthonormal_penalty(turn(scale * a), dim, squared=True).item() == pytest.approx(value.item() ** 2)
    noisy = a + 0.1 * torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(orthonormal_penalty(turn(rotation @ noisy), dim), orthonormal_penalty(turn(noisy), dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_gradient_at_orthonormality_is_zero(dtype: torch.dtype, squared: bool) -> None:
    model = network().to(dtype)
    gradients = torch.autograd.grad(sorsa_penalty(model, squared), sorsa_parameters(model), allow_unused=True)
    limit = 0.0 if not squared else 1e-5
    assert all(gradient is None or gradient.abs().max() <= limit for gradient in gradients)
    before = [p.clone() for p in sorsa_parameters(model)]
    descend_(model, 0.1)
    assert all(torch.equal(p, old) for p, old in zip(sorsa_parameters(model), before, strict=True))


def test_squared_penalty_has_the_gradient_of_the_closed_form() -> None:
    b = orthonormal(3, 7).mT + 0.1
    b.requires_grad_()
    gradient = torch.autograd.grad(orthonormal_penalty(b, "cols", squared=True), b)[0]
    torch.testing.assert_close(gradient, 4 * b @ (b.mT @ b - torch.eye(3, dtype=torch.float64)))


@pytest.mark.parametrize("squared", [False, True])
def test_decoupled_step_is_gamma_times_the_gradient(squared: bool) -> None:
    model = network(noise=0.2)
    parameters = [p for delta in sorsa_deltas(model).values() for p in (delta.u, delta.v)]
    gradients = torch.autograd.grad(sorsa_penalty(model, squared), parameters)
    expected = [p - 0.03 * g for p, g in zip(parameters, gradients, strict=True)]
    singular = [delta.s.clone() for delta in sorsa_deltas(model).values()]
    regularizer = SorsaRegularizer(model, 0.03, mode="decoupled", squared=squared)
    assert regularizer() == 0
    regularizer.step()
    torch.testing.assert_close([p.detach() for p in parameters], [e.detach() for e in expected])
    assert all(torch.equal(delta.s, s) for delta, s in zip(sorsa_deltas(model).values(), singular, strict=True))


def test_both_modes_agree_under_plain_gradient_descent_to_first_order() -> None:
    ends = []
    for mode, lr in (("loss", 0.01), ("decoupled", None)):
        model = network(noise=0.2)
        regularizer = SorsaRegularizer(model, 1e-4, mode=mode, lr=lr)
        optimizer = torch.optim.SGD(sorsa_parameters(model), lr=0.01)
        (model(torch.ones(2, 6, dtype=torch.float64)).square().sum() * 0 + regularizer()).backward()
        optimizer.step()
        regularizer.step()
        ends.append([p.detach() for p in sorsa_parameters(model)])
    torch.testing.assert_close(*ends)


def train(gamma: float | None, micro_batches: int = 1) -> list[Tensor]:
    model = network(noise=0.1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    regularizer = None if gamma is None else SorsaRegularizer(model, gamma, lr=0.05)
    optimizer = torch.optim.Adam(sorsa_parameters(model), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (F.mse_loss(model(inputs), targets) / micro_batches).backward()
        if regularizer is not None:
            penalty = regularizer()
            if penalty.requires_grad:
                penalty.backward()
        optimizer.step()
        if regularizer is not None:
            regularizer.step()
    return [p.detach() for p in sorsa_parameters(model)]


def test_gamma_zero_is_training_without_the_regularizer_bit_by_bit() -> None:
    assert all(torch.equal(a, b) for a, b in zip(train(0.0), train(None), strict=True))


def test_gradient_accumulation_counts_the_penalty_once() -> None:
    torch.testing.assert_close(train(1e-2, micro_batches=4), train(1e-2))


def test_penalty_lowers_the_distance_from_orthonormal() -> None:
    model = network(noise=0.2)
    before = sorsa_penalty(model).item()
    regularizer = SorsaRegularizer(model, 0.05, mode="decoupled")
    for _ in range(100):
        regularizer.step()
    assert sorsa_penalty(model).item() < 0.25 * before


def test_weight_is_gamma_and_takes_a_schedule() -> None:
    regularizer = SorsaRegularizer(network(noise=0.2), Linear(0.0, 1e-3, steps=2), lr=0.1)
    assert regularizer() == 0
    regularizer.step()
    regularizer.step()
    assert regularizer.weight == 1e-3
    assert regularizer().item() == pytest.approx(1e-2 * sorsa_penalty(regularizer.model).item())


def test_half_factors_are_measured_in_single_precision() -> None:
    model = network(noise=0.2).to(torch.bfloat16)
    assert sorsa_penalty(model).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "los"}, "mode must be 'loss' or 'decoupled'"),
        ({"mode": "loss"}, "needs a positive lr"),
        ({"mode": "loss", "lr": 0.0}, "needs a positive lr"),
        ({"mode": "decoupled", "lr": 0.1}, "leave it out"),
        ({"gamma": -1.0, "lr": 0.1}, "weight must be finite and not negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SorsaRegularizer(network(), **({"gamma": 1e-3} | settings))


def test_a_model_without_triplets_and_an_unknown_side_are_refused() -> None:
    with pytest.raises(ValueError, match="no SORSA layers"):
        sorsa_penalty(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no SORSA layers"):
        SorsaRegularizer(nn.Linear(2, 2), 1e-3, lr=0.1)
    with pytest.raises(ValueError, match="dim must be 'rows' or 'cols'"):
        orthonormal_penalty(torch.eye(2), "columns")


# How a weight changed


def test_equal_weights_have_changed_by_exactly_nothing() -> None:
    weight = torch.randn(9, 7)
    for match in ("index", "hungarian"):
        change = singular_change(weight, weight.clone(), 4, match)
        assert change.sigma == 0
        assert change.direction == 0


def test_twice_the_weight_changes_values_and_no_direction() -> None:
    weight = torch.randn(9, 7, dtype=torch.float64)
    change = singular_change(weight, 2 * weight, 5)
    torch.testing.assert_close(change.sigma, torch.linalg.svdvals(weight)[:5].mean())
    assert change.direction < 1e-12


def test_rotated_outputs_change_half_of_the_directions_and_no_value() -> None:
    layer = SorsaLinear(nn.Linear(6, 6).double(), 2)
    u, s, v = (factor.detach() for factor in (layer.triplets.u, layer.triplets.s, layer.triplets.v))
    other = torch.linalg.qr(torch.cat((u, torch.randn(6, 2, dtype=torch.float64)), 1)).Q[:, 2:]
    change = singular_change((u * s) @ v, (other * s) @ v, 2)
    assert change.sigma < 1e-12
    assert change.direction.item() == pytest.approx(0.5)


def test_matching_pairs_triplets_that_swapped_places() -> None:
    q, p = orthonormal(4, 6), orthonormal(4, 5, seed=1)
    before = (q.mT * torch.tensor([4.0, 3.0, 2.9, 1.0], dtype=torch.float64)) @ p
    after = (q.mT * torch.tensor([4.0, 2.9, 3.0, 1.0], dtype=torch.float64)) @ p
    assert singular_change(before, after, 4).direction.item() == pytest.approx(0.5)
    matched = singular_change(before, after, 4, "hungarian")
    assert matched.direction < 1e-12
    assert matched.sigma.item() == pytest.approx(0.05)


def test_change_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="before and after must have the same shape"):
        singular_change(torch.eye(2), torch.eye(3), 1)
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.2"):
        singular_change(torch.eye(2), torch.eye(2), 3)
    with pytest.raises(ValueError, match="match must be"):
        singular_change(torch.eye(2), torch.eye(2), 1, "best")
