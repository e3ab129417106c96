"""Low-rank factors and layers: the best approximation, balanced, and a stand-in for the layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.core.adapters.low_rank import (
    LowRankLinear,
    LowRankProduct,
    dense_matrix,
    is_linear,
    low_rank_factorize,
    low_rank_factors,
    new_factors,
    rank_for_ratio,
)

sides = st.integers(1, 12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(outputs: int, inputs: int, power: float = 1.0) -> Tensor:
    """A matrix with the singular values 1, 2^-p, 3^-p, ..."""
    u, _, vh = torch.linalg.svd(normal(outputs, inputs), full_matrices=False)
    return u @ torch.diag(torch.arange(1, len(vh) + 1, dtype=torch.float64) ** -power) @ vh


class Conv1D(nn.Module):
    """The layer of GPT-2 as transformers lays it out: the weight is stored transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@given(sides, sides, st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_matrix_of_that_rank_is_nearer(outputs: int, inputs: int, rank: int, seed: int) -> None:
    rank = min(rank, outputs, inputs)
    weight = normal(outputs, inputs, seed=seed)
    w1, w2 = low_rank_factorize(weight, rank)
    rest = torch.linalg.svdvals(weight)[rank:].square().sum()  # Eckart and Young
    torch.testing.assert_close((weight - w2 @ w1).square().sum(), rest, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_both_factors_carry_the_same_singular_values(method: str) -> None:
    weight = decaying(20, 30)
    w1, w2 = low_rank_factorize(weight, 5, method, generator=torch.Generator().manual_seed(1))
    values = torch.diag(torch.linalg.svdvals(weight)[:5])
    tolerance = {"svd": 1e-12, "randomized": 1e-3}[method]
    torch.testing.assert_close(w1 @ w1.T, values, rtol=0, atol=tolerance)
    torch.testing.assert_close(w2.T @ w2, values, rtol=0, atol=tolerance)


def test_full_rank_gives_the_weight_itself() -> None:
    linear = nn.Linear(48, 32)
    x = torch.randn(7, 48)
    layer = LowRankLinear.from_linear(linear, 32)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-6)


def test_randomized_factors_are_nearly_the_best() -> None:
    weight = decaying(200, 300, power=0.7).float()
    errors = []
    for method in ("svd", "randomized"):
        w1, w2 = low_rank_factorize(weight, 40, method, generator=torch.Generator().manual_seed(0))
        errors.append(float((weight - w2 @ w1).norm()))
    assert errors[0] <= errors[1] < 1.01 * errors[0]


def test_randomized_factors_depend_on_the_generator_alone() -> None:
    weight = normal(30, 20)
    first, second = (
        low_rank_factorize(weight, 4, "randomized", generator=torch.Generator().manual_seed(3)) for _ in "ab"
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    state = torch.get_rng_state()
    low_rank_factorize(weight, 4, "randomized", generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


def test_half_types_are_factorised_in_single_precision() -> None:
    weight = decaying(12, 9).to(torch.bfloat16)
    w1, w2 = low_rank_factorize(weight, 3)
    exact1, exact2 = low_rank_factorize(weight.float(), 3)
    assert w1.dtype == w2.dtype == torch.bfloat16
    assert torch.equal(w1, exact1.to(torch.bfloat16))
    assert torch.equal(w2, exact2.to(torch.bfloat16))


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    w1, w2 = low_rank_factorize(torch.zeros(4, 3), 2)
    assert not w1.any()
    assert not (w2 @ w1).any()


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(1.0, 8.0))
@settings(max_examples=200, deadline=None)
def test_the_pair_has_at_most_its_share_of_the_parameters(inputs: int, outputs: int, ratio: float) -> None:
    most = inputs * outputs / (inputs + outputs)
    if most / ratio < 1:
        return
    rank = rank_for_ratio(inputs, outputs, ratio)
    assert 1 <= rank <= min(inputs, outputs)
    assert rank * (inputs + outputs) <= inputs * outputs / ratio * (1 + 1e-12)
    assert (rank + 1) * (inputs + outputs) > inputs * outputs / ratio * (1 - 1e-12)


def test_published_sizes_have_the_published_ranks() -> None:
    assert rank_for_ratio(768, 3072, 2) == 307
    assert rank_for_ratio(768, 2304, 2) == 288
    assert rank_for_ratio(128, 512, 1.5) == 68


def test_a_ratio_that_leaves_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves no rank .* it can be 5.333 at most"):
        rank_for_ratio(8, 16, 6)


def test_a_ratio_below_one_gives_the_full_rank_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="above the full rank 16"):
        assert rank_for_ratio(16, 16, 0.4) == 16


@pytest.mark.parametrize(("inputs", "outputs", "ratio"), [(0, 4, 2.0), (4, 4, 0.0), (4, 4, -1.0), (4, 4, float("nan"))])
def test_sizes_and_ratios_that_mean_nothing_are_refused(inputs: int, outputs: int, ratio: float) -> None:
    with pytest.raises(ValueError):
        rank_for_ratio(inputs, outputs, ratio)


def test_bad_weights_and_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.3"):
        low_rank_factorize(torch.ones(3, 4), 4)
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.3"):
        LowRankLinear(3, 4, 0)
    with pytest.raises(ValueError, match="'svd' or 'randomized'"):
        low_rank_factorize(torch.ones(3, 4), 2, "qr")
    with pytest.raises(ValueError, match="entries that are not finite"):
        low_rank_factorize(torch.full((3, 4), float("inf")), 2)
    with pytest.raises(TypeError, match="linear must be a Linear layer, got Conv2d"):
        LowRankLinear.from_linear(nn.Conv2d(3, 4, 1), 2)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_what_its_dense_form_computes(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(5, 7, bias=bias).double()
    layer = LowRankLinear.from_linear(linear, 3)
    x = normal(*shape)
    assert layer(x).shape == (*shape[:-1], 7)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    if bias:
        assert torch.equal(layer.second.bias, linear.bias)
        assert layer.second.bias is not linear.bias
    else:
        assert layer.bias is None
        assert layer.to_linear().bias is None


def test_the_layer_takes_over_type_mode_and_what_is_frozen() -> None:
    linear = nn.Linear(6, 8).to(torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    layer = LowRankLinear.from_linear(linear, 2)
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert [parameter.requires_grad for parameter in layer.parameters()] == [False, False, True]
    assert list(layer.state_dict()) == ["0.weight", "1.weight", "1.bias"]


def test_a_layer_on_the_meta_device_stays_there() -> None:
    layer = LowRankLinear.from_linear(nn.Linear(6, 8, device="meta"), 2, decompose=False)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_conv1d_becomes_the_layer_that_computes_the_same() -> None:
    conv = Conv1D(nf=9, nx=6)
    layer = LowRankLinear.from_linear(conv, 6)
    assert is_linear(conv)
    assert dense_matrix(conv).shape == (9, 6)
    assert (layer.in_features, layer.out_features) == (6, 9)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-5)


def test_gradients_reach_both_factors_through_the_dense_weight() -> None:
    layer = LowRankLinear(4, 6, 2).double()
    direction = normal(6, 4)
    (layer.weight * direction).sum().backward()
    w1, w2 = layer.factors
    torch.testing.assert_close(w1.grad, w2.detach().T @ direction)
    torch.testing.assert_close(w2.grad, direction @ w1.detach().T)


def test_a_copy_of_the_layer_is_independent() -> None:
    layer = LowRankLinear(4, 6, 2)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.first.weight.zero_()
    assert layer.first.weight.any()
    assert twin.rank == 2


def test_new_factors_are_drawn_like_those_of_new_layers() -> None:
    torch.manual_seed(0)
    w1, w2 = new_factors(torch.empty(6, 4, dtype=torch.float64), 2)
    torch.manual_seed(0)
    layer = LowRankLinear(4, 6, 2, bias=False, dtype=torch.float64)
    assert torch.equal(w1, layer.first.weight)
    assert torch.equal(w2, layer.second.weight)


def test_only_products_have_factors() -> None:
    module = nn.Linear(4, 6)
    with pytest.raises(TypeError, match="not a product"):
        low_rank_factors(module)
    with pytest.raises(TypeError, match="no tensor 'kernel'"):
        dense_matrix(module, "kernel")
    nn.utils.parametrize.register_parametrization(module, "weight", LowRankProduct(lambda w: low_rank_factorize(w, 2)))
    w1, w2 = low_rank_factors(module)
    torch.testing.assert_close(module.weight, w2 @ w1)
    module.weight = torch.ones(6, 4)  # an assignment is factorised
    torch.testing.assert_close(module.weight, torch.ones(6, 4), rtol=0, atol=1e-5)
