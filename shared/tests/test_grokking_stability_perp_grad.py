"""perpGrad against its authors' code, its laws, and what an optimizer must do."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.core import PerpGrad, perp_grad_

law = settings(deadline=None, max_examples=50)

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


@law
@given(seeds, st.integers(2, 40))
def test_result_is_orthogonal_to_the_weight_and_keeps_the_norm(seed: int, size: int) -> None:
    param = drawn(seed, size)
    norm = grad(param).norm()
    perp_grad_([param])
    assert (param * grad(param)).sum().abs() <= 1e-12 * param.norm() * norm
    torch.testing.assert_close(grad(param).norm(), norm, rtol=1e-12, atol=0)


@law
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


@law
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


@law
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


@law
@given(seeds, st.floats(1e-3, 1.0))
def test_plain_gradient_descent_grows_the_weights_by_the_step_alone(seed: int, lr: float) -> None:
    param = drawn(seed, 6)
    before, step = param.detach().square().sum(), (lr * grad(param)).square().sum()
    PerpGrad(torch.optim.SGD([param], lr=lr)).step()
    torch.testing.assert_close(param.detach().square().sum(), before + step, rtol=1e-12, atol=0)
