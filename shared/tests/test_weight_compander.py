"""Companding functions and their parametrization against exact values, and their laws."""

import copy
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.core.weights.companding import SHAPES, Kind, WeightCompander, compand, compand_inverse

GOLDEN = Path(__file__).parent / "golden" / "weight-compander"
KINDS: tuple[Kind, ...] = ("arctan", "tanh", "softsign", "erf")

kinds = st.sampled_from(KINDS)
scales = st.floats(0.05, 20)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(v: Tensor, a: Tensor, b: Tensor, kind: Kind) -> Tensor:
    """The definition, literally."""
    r = v / b
    values = {"arctan": r.atan, "tanh": r.tanh, "softsign": lambda: r / (1 + r.abs()), "erf": r.erf}
    return a * values[kind]()


@pytest.fixture(params=["conv", "linear"])
def stored(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"arctan_{request.param}.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}


def test_agrees_with_forty_digits(stored: dict[str, Tensor]) -> None:
    v, a, b = (stored[name].clone().requires_grad_() for name in ("v", "a", "b"))
    w = compand(v, a, b)
    torch.testing.assert_close(w, stored["w"], rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(w, (v, a, b), stored["grad_w"], retain_graph=True)
    for name, gradient in zip(("grad_v", "grad_a", "grad_b"), gradients, strict=True):
        torch.testing.assert_close(gradient, stored[name], rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(w.sum(), v)
    torch.testing.assert_close(slope, stored["dw_dv"], rtol=1e-12, atol=0)


def test_inverse_agrees_with_forty_digits(stored: dict[str, Tensor]) -> None:
    v0 = compand_inverse(stored["w0"], stored["a"], stored["b"])
    torch.testing.assert_close(v0, stored["v0"], rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(kind=kinds, a=scales, b=scales, seed=st.integers(0, 99))
def test_odd_and_zero_at_zero(kind: Kind, a: float, b: float, seed: int) -> None:
    v = 3 * b * normal(20, seed=seed)
    torch.testing.assert_close(compand(-v, a, b, kind), -compand(v, a, b, kind), rtol=0, atol=0)
    assert compand(torch.zeros(3), a, b, kind).tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(kind=kinds, a=scales, b=scales)
def test_strictly_increasing(kind: Kind, a: float, b: float) -> None:
    v = b * torch.linspace(-3, 3, 2_001, dtype=torch.float64)
    assert (compand(v, a, b, kind).diff() > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_below_the_bound_and_without_nan_however_large_the_values(kind: Kind, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    v = torch.tensor([most, -most, 1e30, -1e30, math.inf, -math.inf, 5.0], dtype=dtype, requires_grad=True)
    a, b = torch.tensor(0.7, dtype=dtype, requires_grad=True), torch.tensor(0.3, dtype=dtype, requires_grad=True)
    w = compand(v, a, b, kind)
    assert (w.double().abs() < a.double() * SHAPES[kind].limit).all()
    for gradient in torch.autograd.grad(w.sum(), (v, a, b)):
        assert gradient.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(a=scales, b=scales, seed=st.integers(0, 99))
def test_inverse_of_arctan_returns_the_values_up_to_a_hundred_b(a: float, b: float, seed: int) -> None:
    v = b * torch.cat((normal(50, seed=seed), torch.linspace(-100, 100, 41, dtype=torch.float64)))
    torch.testing.assert_close(compand_inverse(compand(v, a, b), a, b), v, rtol=1e-9, atol=0)


@settings(max_examples=60, deadline=None)
@given(kind=kinds, a=scales, b=scales, share=st.floats(-0.999, 0.999))
def test_weights_below_the_bound_are_reached(kind: Kind, a: float, b: float, share: float) -> None:
    w = torch.tensor([share * a * SHAPES[kind].limit], dtype=torch.float64)
    torch.testing.assert_close(compand(compand_inverse(w, a, b, kind), a, b, kind), w, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_refuses_weights_at_the_bound_and_beyond(kind: Kind) -> None:
    limit = SHAPES[kind].limit
    for factor in (1.0, 1.5, -1.0, math.nan):
        w = torch.tensor([0.1, 2 * limit * factor], dtype=torch.float64)
        with pytest.raises(ValueError, match="choose a larger a"):
            compand_inverse(w, 2.0, 1.0, kind)


@settings(max_examples=30, deadline=None)
@given(kind=kinds, a=scales, b=scales, c=st.floats(0.1, 10))
def test_scales_with_its_arguments(kind: Kind, a: float, b: float, c: float) -> None:
    v = b * normal(20)
    torch.testing.assert_close(compand(c * v, c * a, c * b, kind), c * compand(v, a, b, kind), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_becomes_the_plain_layer_as_both_scales_grow(scale: float) -> None:
    v = normal(50).requires_grad_()
    w = compand(v, scale, scale)
    (slope,) = torch.autograd.grad(w.sum(), v)
    square = (v.detach() / scale).square()
    assert ((w.detach() / v.detach() - 1).abs() <= square + 1e-15).all()
    assert ((slope - 1).abs() <= square + 1e-15).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [(), (4, 1, 1)])
def test_gradients_are_those_of_the_definition_twice(kind: Kind, scale: tuple[int, ...]) -> None:
    v = normal(4, 2, 3).requires_grad_()
    a, b = (normal(*scale, seed=seed).abs().add(0.5).requires_grad_() for seed in (1, 2))

    def function(*inputs: Tensor) -> Tensor:
        return compand(*inputs, kind)

    assert torch.autograd.gradcheck(function, (v, a, b))
    assert torch.autograd.gradgradcheck(function, (v, a, b))
    torch.testing.assert_close(compand(v, a, b, kind), plain(v, a, b, kind), rtol=1e-12, atol=0)


def test_under_torch_func() -> None:
    v, a = normal(5, 3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    each = torch.func.vmap(torch.func.grad(lambda row, scale: compand(row, scale, 0.7).square().sum(), argnums=(0, 1)))
    rows, scales_ = each(v, a[:1].expand(5))
    expected = torch.func.grad(lambda values, scale: compand(values, scale, 0.7).square().sum(), argnums=(0, 1))
    together = expected(v, a[:1].expand(5, 1))
    torch.testing.assert_close(rows, together[0])
    torch.testing.assert_close(scales_, together[1].squeeze(1))
    (hessian,) = (torch.func.jacrev(torch.func.jacrev(lambda x: compand(x, 1.0, 1.0).sum()))(v[0]),)
    torch.testing.assert_close(hessian, torch.diag(-2 * v[0] / (1 + v[0] ** 2) ** 2))


def test_bad_input_is_refused() -> None:
    v = normal(4, 3)
    for name, a, b in (("a", 0.0, 1.0), ("a", math.nan, 1.0), ("b", 1.0, -1.0), ("b", 1.0, math.inf)):
        for function in (compand, compand_inverse):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
                function(v, a, b)
        with pytest.raises(ValueError, match=rf"{name} must lie in \[eps"):
            WeightCompander(a, b)
    with pytest.raises(ValueError, match="kind must be one of arctan, tanh, softsign, erf, got 'relu'"):
        inspect.unwrap(compand)(v, 1.0, 1.0, "relu")
    with pytest.raises(ValueError, match=r"a must broadcast to \(4, 3\), got shape \(2, 4, 3\)"):
        compand(v, torch.ones(2, 4, 3), 1.0)
    with pytest.raises(ValueError, match=r"eps must lie in \(0, 1\)"):
        WeightCompander(eps=0.0)


def test_parametrization_takes_assignments() -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", WeightCompander(a=0.6, b=0.2).double())
    torch.testing.assert_close(layer.weight, before)
    layer.weight = before / 2
    torch.testing.assert_close(layer.weight, before / 2)
    with pytest.raises(ValueError, match="choose a larger a"):
        layer.weight = before + 10


@pytest.mark.parametrize("learnable", [True, False])
def test_copies_and_state_dicts_agree(learnable: bool) -> None:
    v = normal(6)
    compander = WeightCompander(0.8, torch.tensor(0.3), learnable=learnable, kind="tanh").double()
    assert (len(list(compander.parameters())), len(list(compander.buffers()))) == ((2, 0) if learnable else (0, 2))
    torch.testing.assert_close(compander(v), compand(v, 0.8, 0.3, "tanh"), rtol=1e-6, atol=0)
    other = WeightCompander(2.0, 2.0, learnable=learnable, kind="tanh").double()
    other.load_state_dict(compander.state_dict())
    assert torch.equal(other(v), compander(v))
    assert torch.equal(copy.deepcopy(compander)(v), compander(v))


@pytest.mark.parametrize("direction", [1, -1])
def test_scales_stay_positive_under_adversarial_steps(direction: int) -> None:
    compander = WeightCompander(0.5, 0.5)
    v = torch.randn(10, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(compander.parameters(), lr=10.0, momentum=0.9)
    for _ in range(1_000):
        optimizer.zero_grad()
        (direction * (compander.a + compander.b)).backward()
        optimizer.step()
    assert 0 < compander.a < math.inf
    assert 0 < compander.b < math.inf
    assert compander(v).isfinite().all()
