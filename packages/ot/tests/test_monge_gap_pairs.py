"""Pairs of measures with a known optimal map: generated ones, and those of the Wasserstein-2 benchmark."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.ot import (
    gaussian_map,
    l2_uvp,
    mixture_pair,
    read_mixture_pair,
)


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@settings(max_examples=15, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_maps_of_generated_pairs_are_monotone_and_standardised(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    pair = mixture_pair(dim, generator=generator)
    x, other = pair.sample_source(512, generator), pair.sample_source(512, generator)
    assert (((pair(x) - pair(other)) * (x - other)).sum(-1) > 0).all(), "a gradient of a strictly convex function"
    y = pair.sample_target(4_096, generator)
    assert y.mean(0).abs().max() < 0.15
    assert abs(y.var(0).mean() - 1) < 0.1


def test_generated_pair_has_no_monge_gap_and_is_not_affine():
    generator = torch.Generator().manual_seed(0)
    pair = mixture_pair(8, generator=generator)
    x = pair.sample_source(1_000, generator)
    cost = torch.cdist(x.double(), pair(x).double()).square().numpy()
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    assert cost.diagonal().mean() == pytest.approx(cost[rows, columns].mean(), rel=1e-9)
    matrix, offset = gaussian_map(x, pair(x))
    assert 5 < l2_uvp(x @ matrix + offset, pair(x)) < 60


def test_pairs_repeat_under_a_seed_and_refuse_bad_sizes():
    first, second = (mixture_pair(4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    x = points(8, 4, dtype=torch.float32)
    assert torch.equal(first(x), second(x))
    for arguments in ({"dim": 0}, {"dim": 2, "modes": 0}, {"dim": 2, "temperature": 0.0}):
        with pytest.raises(ValueError, match="expected dim"):
            mixture_pair(**arguments, generator=torch.Generator())


def test_uvp_is_a_hundred_for_the_best_constant_and_zero_for_the_map():
    optimal = points(100, 3)
    torch.testing.assert_close(
        l2_uvp(optimal.mean(0).expand_as(optimal), optimal), torch.tensor(100.0, dtype=torch.float64)
    )
    assert l2_uvp(optimal, optimal) == 0
    with pytest.raises(ValueError, match="same points"):
        l2_uvp(optimal[:5], optimal)


@pytest.mark.parametrize("place", [".", "benchmarks", "benchmarks/Mix3toMix10"])
def test_published_pair_is_read_and_its_map_is_monotone(tmp_path, place, write_published_pair):
    pair = read_mixture_pair(write_published_pair(tmp_path, 4) / place, 4)
    generator = torch.Generator().manual_seed(0)
    x, other = pair.sample_source(512, generator), pair.sample_source(512, generator)
    assert (((pair(x) - pair(other)) * (x - other)).sum(-1) > 0).all()
    assert pair.dim == 4


def test_published_source_is_numpys_at_seed_zero(tmp_path, write_published_pair):
    pair = read_mixture_pair(write_published_pair(tmp_path, 2), 2)
    random = np.random.RandomState(0)
    centers = np.stack([random.choice([0, 1, 2], 3, replace=False) for _ in range(2)], axis=1) - 1.0
    scale = np.sqrt((centers**2).sum(1).mean() + 2 * 0.4**2) / np.sqrt(2)
    np.testing.assert_allclose(pair.source.centers.numpy(), centers / scale, rtol=1e-6)
    sample = pair.sample_source(20_000, torch.Generator().manual_seed(0))
    assert abs(sample.square().sum(-1).mean() - 2) < 0.1


def test_published_potential_is_the_formula(published_potential):
    from poise.ot.benchmark_pairs import QuadraticICNN

    state = {key: value.double() for key, value in published_potential(3, 0).items()}
    x = points(5, 3)

    def quadratic(layer):
        factors = state[f"quadratic_layers.{layer}.quadratic_decomposed"][:, 0]
        return (
            (x @ factors) ** 2
            + x @ state[f"quadratic_layers.{layer}.weight"].T
            + state[f"quadratic_layers.{layer}.bias"]
        )

    z = quadratic(0)
    for layer in (0, 1):
        z = torch.celu(z @ state[f"convex_layers.{layer}.weight"].T + quadratic(layer + 1))
    expected = (z @ state["final_layer.weight"].T)[:, 0] + 0.005 * x.square().sum(-1)
    torch.testing.assert_close(QuadraticICNN(state)(x), expected)


def test_published_pair_refuses_other_files(tmp_path, published_potential, write_published_pair):
    with pytest.raises(FileNotFoundError, match=r"2_v1\.pt"):
        read_mixture_pair(tmp_path, 2)
    write_published_pair(tmp_path, 2)
    file = tmp_path / "benchmarks" / "Mix3toMix10" / "2_v2.pt"
    state = published_potential(2, 2)
    torch.save(state | {"final_layer.weight": -state["final_layer.weight"]}, file)
    with pytest.raises(ValueError, match="not convex"):
        read_mixture_pair(tmp_path, 2)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="missing"):
        read_mixture_pair(tmp_path, 2)
