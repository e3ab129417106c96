"""Recalibrated statistics must be those of the whole data, and nothing else may change."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from poise.core.memory.batchnorm import recalibrate_batchnorm


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@hypothesis.given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), shift=st.floats(-1e3, 1e3))
@hypothesis.settings(max_examples=30, deadline=None)
def test_statistics_are_those_of_the_whole_data_however_it_is_cut(sizes: list[int], shift: float) -> None:
    data = shift + torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.BatchNorm1d(3).double()
    recalibrate_batchnorm(layer, data.split(sizes))
    torch.testing.assert_close(layer.running_mean, data.mean((0, 2)))
    torch.testing.assert_close(layer.running_var, data.transpose(0, 1).flatten(1).var(1))
    assert layer.num_batches_tracked == len(sizes)


def test_a_deep_network_sees_what_it_sees_in_training(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.9), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    data = torch.randn(12, 1, 8, 8, generator=generator)
    model.eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    recalibrate_batchnorm(model, [(data, "label")])
    assert [module.training for module in model.modules()] == modes
    model.eval()
    model(data)
    torch.testing.assert_close(model[1](model[0](data)).mean((0, 2, 3)), model[1].bias, atol=1e-5, rtol=0)
    out = model(data)  # normalised at the end too: dropout was off, the first layer normalised by its batch
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(2), atol=1e-2, rtol=0)


def test_only_statistics_change_and_a_failure_changes_nothing(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.append(nn.BatchNorm1d(2, track_running_stats=False))
    before = copy.deepcopy(model.state_dict())
    for batches in ([], [torch.randn(4, 3, generator=generator), torch.randn(4, 9, generator=generator)]):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"at least one batch, got none|shapes cannot be multiplied"
        ):
            recalibrate_batchnorm(model, batches)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
    calls = []
    recalibrate_batchnorm(model, [{"x": torch.randn(4, 3)}], forward=lambda batch: calls.append(model(batch["x"])))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not calls[0].requires_grad


def test_a_model_without_batch_normalisation_is_left_alone() -> None:
    recalibrate_batchnorm(nn.Linear(2, 2), iter([]))


def test_half_inputs_are_pooled_in_float32() -> None:
    layer = nn.BatchNorm1d(1).to(torch.bfloat16)
    data = torch.full((4096, 1), 300.0, dtype=torch.bfloat16)
    data[::2] = 302.0
    recalibrate_batchnorm(layer, data.split(512))
    assert layer.running_mean == 301.0 or layer.running_mean == 300.0  # the nearest in bfloat16 is even
    torch.testing.assert_close(layer.running_var, torch.ones(1, dtype=torch.bfloat16))
