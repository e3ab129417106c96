"""SORSA layers against the authors' code, and their laws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.handle import Adapters
from poise.core.adapters.sorsa import (
    SorsaConfig,
    SorsaDelta,
    SorsaLinear,
    apply_sorsa,
    merge_sorsa,
    sorsa_deltas,
    sorsa_parameters,
)
from poise.core.adapters.sorsa_penalty import SorsaRegularizer, sorsa_penalty

GOLDEN = Path(__file__).parent / "golden" / "sorsa" / "linear_sgd.npz"


@pytest.fixture
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {key: torch.tensor(file[key]) for key in file}


def layer_of(golden: dict[str, Tensor]) -> SorsaLinear:
    outputs, inputs = golden["W0"].shape
    base = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        base.weight.copy_(golden["W0"])
        base.bias.copy_(golden["bias"])
    return SorsaLinear(base, int(golden["r"]))


def start(layer: SorsaLinear, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        layer.triplets.v.copy_(golden["A_start"])
        layer.triplets.s.copy_(golden["S_start"])
        layer.triplets.u.copy_(golden["B_start"])


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_split_equals_the_authors(golden: dict[str, Tensor]) -> None:
    layer = layer_of(golden)
    same(layer.delta_weight(), golden["principal_init"])
    same(layer.base.weight, golden["residual_init"])
    same(layer.triplets.s, golden["S_init"])
    same(layer(golden["x"]), golden["y_init"])


def test_training_equals_the_authors_step_by_step(golden: dict[str, Tensor]) -> None:
    layer = layer_of(golden)
    start(layer, golden)
    same(sorsa_penalty(layer), golden["ortho_start"])
    gamma, lr, steps = float(golden["gamma"]), float(golden["lr"]), int(golden["steps"])
    regularizer = SorsaRegularizer(layer, gamma, lr=lr)
    optimizer = torch.optim.SGD(sorsa_parameters(layer), lr=lr)
    triplets = layer.triplets
    for step in range(steps):
        same(sorsa_penalty(layer), golden["ortho"][step])
        loss = F.mse_loss(layer(golden["x"]), golden["target"])
        same(loss, golden["loss"][step])
        optimizer.zero_grad()
        (loss + regularizer()).backward()
        if step == steps - 1:
            same(sorsa_penalty(layer), golden["ortho_last"])
            for factor, key in ((triplets.v, "A"), (triplets.s, "S"), (triplets.u, "B")):
                same(factor, golden[f"{key}_last"])
                assert factor.grad is not None
                same(factor.grad, golden[f"g{key}_last"])
        optimizer.step()
        regularizer.step()
    for factor, key in ((triplets.v, "A"), (triplets.s, "S"), (triplets.u, "B")):
        same(factor, golden[f"{key}_end"])
    same(layer(golden["x"]), golden["y_end"])
    layer.merge()
    same(layer.base.weight, golden["merged_weight"])


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    share=st.floats(0, 1),
    bias=st.booleans(),
    alpha=st.sampled_from([None, 0.5, 8.0]),
    seed=st.integers(0, 99),
)
def test_output_at_first_is_that_of_the_base(
    shape: tuple[int, int], share: float, bias: bool, alpha: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = max(1, round(share * min(shape)))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        base = nn.Linear(*shape, bias=bias, dtype=dtype)
        x = torch.randn(3, shape[0], dtype=dtype)
        before = base(x)
        layer = SorsaLinear(base, rank, alpha)
        assert (layer(x) - before).abs().max() <= tolerance
        assert (layer.triplets.s > 0).all()
        assert (layer.triplets.s.diff() <= 0).all()
        identity = torch.eye(rank, dtype=dtype)
        torch.testing.assert_close(layer.triplets.u.mT @ layer.triplets.u, identity, rtol=0, atol=tolerance)
        torch.testing.assert_close(layer.triplets.v @ layer.triplets.v.mT, identity, rtol=0, atol=tolerance)
        assert sorsa_penalty(layer) < tolerance


def test_full_rank_leaves_no_residual() -> None:
    layer = SorsaLinear(nn.Linear(7, 5).double(), 5)
    assert layer.base.weight.abs().max() < 1e-12


def test_rank_deficient_weight_still_gives_orthonormal_vectors() -> None:
    base = nn.Linear(12, 10)
    with torch.no_grad():
        base.weight.copy_(torch.outer(torch.randn(10), torch.randn(12)))
    layer = SorsaLinear(base, 6)
    torch.testing.assert_close(layer.triplets.v @ layer.triplets.v.mT, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.triplets.u.mT @ layer.triplets.u, torch.eye(6), rtol=0, atol=1e-5)


def test_only_the_triplets_are_trained() -> None:
    base = nn.Linear(7, 5)
    layer = SorsaLinear(base, 3)
    layer(torch.randn(2, 7)).sum().backward()
    assert base.weight.grad is None
    assert base.bias.grad is None
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * (7 + 5 + 1)
    assert {id(p) for p in trained} == {id(p) for p in sorsa_parameters(layer)}
    assert all(p.grad is not None for p in trained)


def test_gradient_of_a_singular_value_is_the_weight_gradient_along_its_triplet() -> None:
    torch.manual_seed(0)
    layer = SorsaLinear(nn.Linear(7, 5).double(), 3, alpha=6.0)
    x, target = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    F.mse_loss(layer(x), target).backward()
    weight = layer.weight.detach().requires_grad_()
    F.mse_loss(F.linear(x, weight, layer.bias), target).backward()
    triplets = layer.triplets
    expected = 2.0 * torch.einsum("or,oi,ri->r", triplets.u, weight.grad, triplets.v)
    torch.testing.assert_close(triplets.s.grad, expected)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_factored_forward_and_gradient_equal_the_dense_product(alpha: float | None) -> None:
    torch.manual_seed(0)
    layer = SorsaLinear(nn.Linear(7, 5).double(), 3, alpha)
    x = torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        for factor in sorsa_parameters(layer):
            factor.add_(torch.randn_like(factor))
    u, s, v = sorsa_parameters(layer)
    scale = layer.triplets.scale
    dense = F.linear(x, layer.base.weight + scale * (u * s) @ v, layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(layer(x).square().sum(), (u, s, v))
    theirs = torch.autograd.grad(dense.square().sum(), (u, s, v))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_the_adapter_only_and_in_training_only() -> None:
    base = nn.Linear(7, 5)
    x = torch.randn(64, 7)
    layer = SorsaLinear(base, 3, dropout=0.5)
    residual = base(x)
    assert not torch.equal(layer(x), layer(x))
    kept = (layer(x) - residual).norm() / layer.eval()(x).sub(residual).norm()
    assert 1.0 < kept < 3.0
    assert torch.equal(layer(x), layer(x))


def test_randomized_split_is_close_and_reproducible() -> None:
    torch.manual_seed(0)
    base = nn.Linear(300, 200)
    with torch.no_grad():  # a spectrum that decays, as that of trained weights
        u, s, vh = torch.linalg.svd(base.weight, full_matrices=False)
        base.weight.copy_((u * (s * torch.arange(1, 201).pow(-1.0))) @ vh)
    exact = SorsaDelta(base, 16)
    first, second = (
        SorsaDelta(base, 16, svd="randomized", generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first.u, second.u)
    torch.testing.assert_close(first.s, exact.s, rtol=1e-3, atol=0)
    torch.testing.assert_close(first.matrix(), exact.matrix(), rtol=0, atol=1e-3 * float(exact.s[0]))
    torch.testing.assert_close(first.u.mT @ first.u, torch.eye(16), rtol=0, atol=1e-5)


def test_half_weight_is_decomposed_in_single_precision() -> None:
    base = nn.Linear(32, 24)
    half = nn.Linear(32, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        half.weight.copy_(base.weight)
        base.weight.copy_(half.weight)
    torch.testing.assert_close(SorsaDelta(half, 4).s, SorsaDelta(base, 4).s)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_apply_freezes_the_rest_and_merge_gives_plain_layers_back() -> None:
    model = network()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    apply_sorsa(model, SorsaConfig(r=2, target_modules=("0", "2"), train_modules=("4",)))
    torch.testing.assert_close(model(x), before)
    assert list(sorsa_deltas(model)) == ["0", "2"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"4.weight", "4.bias", *(f"{i}.deltas.default.{f}" for i in (0, 2) for f in "usv")}
    with torch.no_grad():
        for parameter in sorsa_parameters(model):
            parameter.add_(0.1)
    changed = model(x)
    merged = merge_sorsa(model)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(merged(x), changed)


def test_switched_off_adapter_gives_the_pretrained_model() -> None:
    model = network()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    apply_sorsa(model, SorsaConfig(r=2))
    with torch.no_grad():
        for parameter in sorsa_parameters(model):
            parameter.add_(0.1)
    changed = model(x)
    with Adapters(model).disabled():
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model(x), changed)


def test_a_rank_that_does_not_fit_names_the_layer_and_leaves_the_model_alone() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"^4: r must lie in 1\.\.3"):
        apply_sorsa(model, SorsaConfig(r=4))
    assert not sorsa_deltas(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r must lie in 1\.\.5"),
        ({"r": 6}, ValueError, r"r must lie in 1\.\.5"),
        ({"r": 2, "alpha": -1.0}, ValueError, "alpha must be positive"),
        ({"r": 2, "dropout": -0.1}, ValueError, "dropout must lie in"),
        ({"r": 2, "svd": "full"}, ValueError, "svd must be 'exact' or 'randomized'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SorsaLinear(nn.Linear(7, 5), **settings)


def test_weights_that_cannot_be_decomposed_are_refused() -> None:
    base = nn.Linear(7, 5)
    with torch.no_grad():
        base.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        SorsaLinear(base, 2)
    base.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int32), requires_grad=False)
    with pytest.raises(TypeError, match="weight must be floating-point"):
        SorsaLinear(base, 2)
    with pytest.raises(ValueError, match="no SORSA layers: call apply_sorsa first"):
        sorsa_parameters(nn.Linear(2, 2))
