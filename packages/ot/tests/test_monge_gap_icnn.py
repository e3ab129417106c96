"""Convex potentials: convexity through training, the Gaussian map, conjugates, and the neural dual built on them."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from poise.ot import ICNN, NeuralDualSolver, conjugate_point, gaussian_map, potential_gradient

ADAM = partial(torch.optim.Adam, lr=1e-2, betas=(0.5, 0.9))


def is_convex_between(potential, x, y, share=0.5):
    middle = potential(share * x + (1 - share) * y)
    chord = share * potential(x) + (1 - share) * potential(y)
    return bool((middle <= chord + 1e-6 * (1 + chord.abs())).all())


def cloud(n=256, d=3, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ICNN


@settings(max_examples=30, deadline=None)
@given(
    positivity=st.sampled_from(["projection", "softplus"]),
    dim=st.integers(1, 4),
    depth=st.integers(1, 4),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**16),
)
def test_icnn_is_convex(positivity, dim, depth, share, seed):
    torch.manual_seed(seed)
    potential = ICNN(dim, (8,) * depth, positivity=positivity).double()
    x, y = 3 * torch.randn(2, 64, dim, dtype=torch.float64)
    assert is_convex_between(potential, x, y, share)


@pytest.mark.parametrize("positivity", ["projection", "softplus"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.3), partial(torch.optim.Adam, lr=0.05)])
def test_icnn_is_convex_after_every_optimizer_step(positivity, optimizer):
    potential = ICNN(2, (16, 16), positivity=positivity).double()
    steps = optimizer(potential.parameters())
    potential.project_after(steps)
    x, y = cloud(d=2, dtype=torch.float64), 3 * cloud(d=2, seed=1, dtype=torch.float64)
    for _ in range(40):  # a concave target pulls every weight below 0
        steps.zero_grad()
        (potential(x) + x.square().sum(-1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(potential.parameters(), 1.0)
        steps.step()
        assert is_convex_between(potential, x, y)


def test_projection_stops_when_its_handle_is_removed():
    potential = ICNN(2, (8, 8))
    optimizer = torch.optim.SGD(potential.parameters(), lr=100.0)
    potential.project_after(optimizer).remove()
    potential(cloud(d=2)).sum().backward()
    optimizer.step()
    assert min(weight.min() for weight in potential.between) < 0


def test_projection_leaves_other_positivities_alone():
    potential = ICNN(2, (8, 8), positivity="penalty")
    with torch.no_grad():
        potential.between[0].fill_(-1.0)
    potential.project_()
    assert (potential.between[0] == -1).all()


def test_negativity_is_zero_iff_weights_are_nonnegative():
    potential = ICNN(2, (4, 4), positivity="penalty")
    assert potential.negativity() == 0
    with torch.no_grad():
        potential.between[0][0, 0] = -2.0
        potential.between[1][0, 1] = -1.0
    torch.testing.assert_close(potential.negativity(), torch.tensor(5.0))
    assert ICNN(2, (4, 4), positivity="softplus").negativity() == 0


def test_penalty_restores_convexity():
    potential = ICNN(2, (8, 8), positivity="penalty").double()
    with torch.no_grad():
        for weight in potential.between:
            weight.sub_(0.5)
    optimizer = torch.optim.SGD(potential.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        potential.negativity().backward()
        optimizer.step()
    x, y = cloud(d=2, dtype=torch.float64), cloud(d=2, seed=1, dtype=torch.float64)
    assert potential.negativity() < 1e-12
    assert is_convex_between(potential, x, y)


def test_gradient_equals_finite_differences_and_is_monotone():
    potential = ICNN(3, (16, 16)).double()
    x, y = cloud(32, dtype=torch.float64), cloud(32, seed=1, dtype=torch.float64)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    numeric = torch.stack([(potential(x + e) - potential(x - e)) / 2e-6 for e in step], dim=-1)
    torch.testing.assert_close(potential.gradient(x), numeric, atol=1e-7, rtol=1e-6)
    assert (((potential.gradient(x) - potential.gradient(y)) * (x - y)).sum(-1) >= 0).all()


def test_gradient_trains_the_parameters_and_ignores_no_grad():
    potential = ICNN(2, (8, 8))
    x = cloud(16, 2)
    potential.gradient(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in potential.between)
    with torch.no_grad():
        torch.testing.assert_close(potential.gradient(x), potential_gradient(potential, x))


@pytest.mark.parametrize("positivity", ["projection", "softplus", "penalty"])
def test_icnn_starts_near_the_identity(positivity):
    x = cloud()
    assert (ICNN(3, positivity=positivity).gradient(x) - x).norm(dim=-1).mean() < 0.2


def test_icnn_takes_any_leading_axes():
    potential = ICNN(3, (8,))
    x = torch.randn(2, 5, 3)
    assert potential(x).shape == (2, 5)
    torch.testing.assert_close(potential(x)[1], potential(x[1]))
    assert ICNN(3, (8,), rank=0)(x).shape == (2, 5)


@pytest.mark.parametrize(
    "arguments", [{"dim": 0}, {"dim": 2, "hidden": ()}, {"dim": 2, "rank": 3}, {"dim": 2, "hidden": (4, 0)}]
)
def test_icnn_refuses_sizes_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected dim"):
        ICNN(**arguments)


def test_icnn_refuses_unknown_positivity_and_wrong_dimension():
    with pytest.raises(ValueError, match="projection, softplus, penalty"):
        ICNN(2, positivity="clip")
    with pytest.raises(ValueError, match="3 dimensions"):
        ICNN(3)(torch.zeros(4, 2))


# The Gaussian map


def test_gaussian_map_sends_mean_and_covariance():
    x = cloud(2_000, dtype=torch.float64) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0.5, 0.3]], dtype=torch.float64)
    y = cloud(2_000, seed=1, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 4
    matrix, offset = gaussian_map(x, y)
    image = x @ matrix + offset
    torch.testing.assert_close(image.mean(0), y.mean(0))
    torch.testing.assert_close(image.T.cov(), y.T.cov())
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("positivity", ["projection", "penalty"])
def test_icnn_starts_at_the_gaussian_map(positivity):
    x, y = cloud(500, dtype=torch.float64), cloud(500, seed=1, dtype=torch.float64) * torch.tensor([1.0, 2, 3]) + 1
    potential = ICNN(3, (16, 16), positivity=positivity).double()
    potential.initialise_at_gaussian_map(x, y)
    matrix, offset = gaussian_map(x, y)
    torch.testing.assert_close(potential.gradient(x), x @ matrix + offset)
    potential(x).sum().backward()
    assert potential.between[-1].grad.abs().max() > 0, "the layers must be able to learn from there"


def test_softplus_icnn_starts_close_to_the_gaussian_map():
    x, y = cloud(500), cloud(500, seed=1) * torch.tensor([1.0, 2, 3]) + 1
    potential = ICNN(3, (16, 16), positivity="softplus")
    potential.initialise_at_gaussian_map(x, y)
    matrix, offset = gaussian_map(x, y)
    assert (potential.gradient(x) - x @ matrix - offset).abs().max() < 0.02


def test_gaussian_map_needs_full_rank():
    flat = cloud() * torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="singular"):
        gaussian_map(flat, cloud())
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_map(cloud(1), cloud())
    with pytest.raises(ValueError, match="rank 3"):
        ICNN(3, (4,), rank=1).initialise_at_gaussian_map(cloud(), cloud(seed=1))


# Conjugates


def test_conjugate_of_a_quadratic_is_exact():
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    y = cloud(32, 2, dtype=torch.float64)
    found = conjugate_point(lambda x: (x @ matrix * x).sum(-1) / 2, y, torch.zeros_like(y), tol=1e-10, max_iter=50)
    expected = torch.linalg.solve(matrix, y.T).T
    assert found.converged.all()
    torch.testing.assert_close(found.point, expected)
    torch.testing.assert_close(found.value, (expected * y).sum(-1) / 2)


def test_conjugate_inverts_the_map_of_a_trained_potential():
    potential = ICNN(3, (16, 16)).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    x = cloud(64, dtype=torch.float64)
    y = potential.gradient(x).detach()
    found = conjugate_point(potential, y, torch.zeros_like(y), tol=1e-9, max_iter=100)
    assert found.converged.all()
    torch.testing.assert_close(found.point, x, atol=1e-7, rtol=1e-6)


def test_conjugate_rows_do_not_see_each_other():
    potential = ICNN(2, (8, 8)).double()
    y = 5 * cloud(16, 2, dtype=torch.float64)
    together = conjugate_point(potential, y, torch.zeros_like(y), tol=1e-9, max_iter=100)
    alone = conjugate_point(potential, y[3:4], torch.zeros(1, 2, dtype=torch.float64), tol=1e-9, max_iter=100)
    torch.testing.assert_close(together.point[3:4], alone.point, atol=1e-8, rtol=1e-8)


def test_conjugate_agrees_with_scipy():
    from scipy.optimize import minimize

    potential = ICNN(2, (8, 8)).double()
    y = 4 * cloud(4, 2, dtype=torch.float64)
    found = conjugate_point(potential, y, torch.zeros_like(y), tol=1e-9, max_iter=100)
    for row, value in zip(y, found.value, strict=True):

        def objective(point, row=row):
            point = torch.from_numpy(point)
            return float((potential(point) - point @ row).detach()), (
                potential_gradient(potential, point) - row
            ).detach().numpy()

        assert minimize(objective, [0.0, 0.0], jac=True, method="L-BFGS-B").fun == pytest.approx(
            -float(value), rel=1e-6
        )


def test_conjugate_tells_what_has_not_converged():
    y = 10 * cloud(8, 2)
    found = conjugate_point(lambda x: functional.softplus(x).sum(-1), y.abs() + 2, torch.zeros_like(y), max_iter=5)
    assert not found.converged.any(), "softplus has slope below 1: the maximum is at infinity"
    assert found.iterations <= 5
    assert conjugate_point(lambda x: x.square().sum(-1), y, y / 2, max_iter=0).converged.all()


def test_conjugate_refuses_bad_settings():
    y = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="same shape"):
        conjugate_point(lambda x: x.sum(-1), y, torch.zeros(4, 3))
    for setting in ({"tol": 0.0}, {"max_iter": -1}, {"history": 0}, {"max_halvings": -1}):
        with pytest.raises(ValueError, match="expected tol > 0"):
            conjugate_point(lambda x: x.square().sum(-1), y, y, **setting)


# The neural dual


def gaussian_pair():
    x, y = cloud(2_000, 2), cloud(2_000, 2, seed=1) @ torch.tensor([[1.5, 0.4], [0.4, 0.7]]) + 1
    return x, y


@pytest.mark.parametrize("method", ["amortized", "lbfgs", "cycle"])
@pytest.mark.parametrize("positivity", ["projection", "softplus", "penalty"])
def test_neural_dual_finds_the_map_between_gaussians(method, positivity):
    x, y = gaussian_pair()
    potentials = [ICNN(2, (16, 16), positivity=positivity) for _ in range(2)]
    solver = NeuralDualSolver(
        *potentials, method, optimizer=ADAM, inner_steps=4 if method == "amortized" else 1, cycle_weight=2.0
    )
    solver.fit(x.split(250), y.split(250), steps=100)
    matrix, offset = gaussian_map(x, y)
    optimal = x @ matrix + offset
    assert (solver.transform(x) - optimal).square().sum(-1).mean() < 0.03 * optimal.var(0).sum()
    assert (solver.inverse_transform(optimal) - x).square().sum(-1).mean() < 0.05 * x.var(0).sum()
    distance = (optimal - x).square().sum(-1).mean()
    assert abs(solver.squared_distance(x, y) - distance) < 0.1 * distance


def test_forward_loss_is_the_dual_value_at_the_optimum():
    x = cloud(500, 2, dtype=torch.float64)
    y = 2 * x + 1  # f = |x|^2 + <1, x> is optimal, its conjugate |y - 1|^2 / 4
    potentials = [ICNN(2, (4,)).double() for _ in range(2)]
    for potential, there, back in ((potentials[0], x, y), (potentials[1], y, x)):
        potential.initialise_at_gaussian_map(there, back)
    solver = NeuralDualSolver(*potentials)
    expected = (x * y).sum(-1).mean()  # Fenchel-Young with equality
    torch.testing.assert_close(solver.forward_loss(x, y), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(solver.squared_distance(x, y), (y - x).square().sum(-1).mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["amortized", "lbfgs"])
def test_updates_touch_their_own_potential_only(method):
    x, y = gaussian_pair()
    solver = NeuralDualSolver(ICNN(2, (8,)), ICNN(2, (8,)), method)
    f = [parameter.clone() for parameter in solver.f.parameters()]
    solver.update_inverse(y[:64])
    assert all(torch.equal(a, b) for a, b in zip(f, solver.f.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in solver.f.parameters())
    g = [parameter.clone() for parameter in solver.g.parameters()]
    solver.update_forward(x[:64], y[:64])
    assert all(torch.equal(a, b) for a, b in zip(g, solver.g.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(f, solver.f.parameters(), strict=True))


def test_neural_dual_draws_fresh_targets_for_inner_steps():
    solver = NeuralDualSolver(ICNN(2, (4,)), ICNN(2, (4,)), inner_steps=3)
    asked = iter([cloud(8, 2, seed=seed) for seed in range(3)])
    solver.update(cloud(8, 2), cloud(8, 2, seed=9), inner=asked)
    assert next(asked, None) is None


def test_neural_dual_state_round_trip_continues_identically():
    x, y = gaussian_pair()

    def solver():
        torch.manual_seed(1)
        return NeuralDualSolver(ICNN(2, (8, 8)), ICNN(2, (8, 8)), optimizer=ADAM, inner_steps=2)

    straight = solver().fit(x.split(500), y.split(500), steps=8)
    first = solver().fit(x.split(500), y.split(500), steps=4)
    torch.manual_seed(2)
    second = NeuralDualSolver(ICNN(2, (8, 8)), ICNN(2, (8, 8)), optimizer=ADAM, inner_steps=2)
    second.load_state_dict(first.state_dict())
    second.fit(x.split(500), y.split(500), steps=4)
    torch.testing.assert_close(second.transform(x), straight.transform(x))


def test_neural_dual_refuses_bad_settings():
    f, g = ICNN(2, (4,)), ICNN(2, (4,))
    with pytest.raises(ValueError, match="amortized, lbfgs, cycle"):
        NeuralDualSolver(f, g, "newton")
    for setting in ({"inner_steps": 0}, {"cycle_weight": -1.0}, {"positivity_weight": -1.0}):
        with pytest.raises(ValueError, match="expected inner_steps"):
            NeuralDualSolver(f, g, **setting)
    with pytest.raises(ValueError, match="no batch"):
        NeuralDualSolver(f, g).fit([], [torch.zeros(2, 2)], steps=1)
    with pytest.raises(TypeError, match="tensor"):
        NeuralDualSolver(f, g).fit(["x"], ["y"], steps=1)
