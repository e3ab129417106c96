"""Every sample of every member under every law of the contract (poise.core.contract)."""

import importlib.util
from pathlib import Path

import pytest
import torch

from poise.core.contract import laws, modules
from poise.core.testing import Sample

ROOT = Path(__file__).parents[1]


def load_samples() -> list[Sample]:
    """The samples of all members, each from its ``tests/samples.py``."""
    samples: list[Sample] = []
    for path in sorted((*ROOT.glob("shared/tests/samples.py"), *ROOT.glob("packages/*/tests/samples.py"))):
        spec = importlib.util.spec_from_file_location(f"samples_{path.parts[-3]}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        samples += module.SAMPLES
    return samples


SAMPLES = load_samples()

pytestmark = pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in SAMPLES])


def test_gradients_match_finite_differences(sample: Sample) -> None:
    laws.gradients_match_finite_differences(sample)


def test_finite_in_reduced_precision(sample: Sample) -> None:
    laws.finite_in_reduced_precision(sample)


def test_same_under_the_same_seed(sample: Sample) -> None:
    laws.same_under_the_same_seed(sample)


def test_inputs_stay_untouched(sample: Sample) -> None:
    laws.inputs_stay_untouched(sample)


def test_copies_are_equal_and_independent(sample: Sample) -> None:
    laws.copies_are_equal_and_independent(sample)


def test_compiled_equals_eager(sample: Sample) -> None:
    laws.compiled_equals_eager(sample)


def test_runs_on_fake_cuda(sample: Sample) -> None:
    laws.runs_on_fake_cuda(sample)


def test_runs_on_a_device_of_its_own(sample: Sample) -> None:
    laws.runs_on_a_device_of_its_own(sample)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_runs_on_cuda(sample: Sample) -> None:
    laws.runs_on_cuda(sample)


def test_twice_the_weight_gives_twice_the_penalty(sample: Sample) -> None:
    modules.twice_the_weight_gives_twice_the_penalty(sample)


def test_no_weight_costs_nothing(sample: Sample) -> None:
    modules.no_weight_costs_nothing(sample)


def test_state_survives_a_round_trip(sample: Sample) -> None:
    modules.state_survives_a_round_trip(sample)
