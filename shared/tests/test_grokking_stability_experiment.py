"""The grokking stability experiment: every arm and preset takes real steps, and its measurements are what they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from poise.core.experiments import grokking_stability as experiment
from poise.core.experiments.grokking_stability import EXPERIMENT, Config
from poise.core.experiments.grokking_stability_measures import fidelity, first, squared_error
from poise.core.lab.run import ArmResult, Run

TINY = Config(p=11, steps=4, long_steps=6, measure_every=2)


def results(config: Config, tmp_path: Path, arms: tuple[str, ...]) -> dict[str, ArmResult]:
    return {
        arm: ArmResult(arm, EXPERIMENT.run(config, arm, Run.scratch(tmp_path / arm, seed=100)), tmp_path / arm)
        for arm in arms
    }


def test_every_arm_takes_steps_and_reports_what_is_claimed_of_it(tmp_path: Path) -> None:
    found = results(TINY, tmp_path, tuple(EXPERIMENT.arms))
    for claim in EXPERIMENT.claims:
        for arm in (claim.arm, claim.versus or claim.arm):
            assert claim.metric in found[arm].metrics, (claim.metric, arm)
    for arm, result in found.items():
        curves = result.load("curves")
        assert curves["step"].tolist() == list(range(0, 7 if experiment.SETUPS[arm].long else 5, 2))
        table = result.load("table")
        sums = torch.arange(11)[:, None] + torch.arange(11)
        assert torch.equal(table["right"], table["answers"] == sums % 11)
        assert (result.dir / "figures" / "curves.png").is_file()
    run = Run.scratch(tmp_path / "compare")
    assert EXPERIMENT.compare is not None
    EXPERIMENT.compare(TINY, found, run)
    EXPERIMENT.compare(TINY, {"perp_grad": found["perp_grad"]}, run)
    assert (run.dir / "figures" / "grokking.png").is_file()


@pytest.mark.parametrize("preset", sorted(EXPERIMENT.presets.keys() - {"quick"}))
@pytest.mark.parametrize("arm", ["baseline", "perp_grad", "stablemax"])
def test_other_presets_take_real_steps_at_the_published_sizes(preset: str, arm: str, tmp_path: Path) -> None:
    config = replace(EXPERIMENT.presets[preset], steps=2, long_steps=2, measure_every=2)
    metrics = results(config, tmp_path, (arm,))[arm].metrics
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["gradient_left"] > 0


def test_arms_see_the_same_data_and_start_from_the_same_weights(tmp_path: Path) -> None:
    found = results(TINY, tmp_path, ("baseline", "perp_grad", "softmax_float64", "weight_decay"))
    starts = [result.load("curves") for result in found.values()]
    for key in ("train_accuracy", "test_accuracy", "weight_norm"):
        assert len({curves[key][0].item() for curves in starts}) == 1


def test_squared_error_is_that_of_pytorch() -> None:
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 0])
    expected = F.mse_loss(logits, F.one_hot(labels, 3).float())
    torch.testing.assert_close(squared_error(logits, labels), expected)
    torch.testing.assert_close(squared_error(logits, labels, reduction="none").mean(), expected)


def test_fidelity_falls_when_the_loss_collapses() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    labels = torch.tensor([0, 1])
    for scale, faithful in ((1.0, True), (18.0, False)):
        logits = scale * weight.T
        cosine = fidelity(F.cross_entropy, logits, labels, torch.float32, [weight])
        assert (cosine.item() > 0.999) is faithful


def test_first_hit_is_found_and_a_missing_one_is_the_last_index() -> None:
    assert first(torch.tensor([False, True, True])) == 1
    assert first(torch.tensor([False, False, False])) == 2


def test_steps_that_are_not_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of measure_every"):
        Config(steps=10, measure_every=3)
