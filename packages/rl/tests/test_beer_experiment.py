"""The BEER experiment: every preset trains at its published sizes, arms share their data, and a killed run resumes bit-identically."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from poise.core.lab import Run
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.rl.experiments import beer as experiment
from poise.rl.experiments.beer import ARMS, EXPERIMENT

TINY = {"batch": 16, "hidden": (16, 16), "bias_states": 4, "horizon": 20, "sample": 32, "episodes": 1}
QUICK = replace(EXPERIMENT.presets["quick"], **TINY, steps=6, evaluate_every=2, logged=300)
CONTROL = replace(EXPERIMENT.presets["control"], **TINY, steps=12, start_steps=20, evaluate_every=6)
MEASURED = {
    "rank",
    "cosine",
    "target_cosine",
    "bound",
    "excess",
    "own_excess",
    "mean_excess",
    "mean_above_bound",
    "above_bound",
    "head_norm",
}
train = partial(rehearse, EXPERIMENT)


def test_every_arm_learns_values_and_all_are_compared(tmp_path):
    results = {arm: train(QUICK, arm, tmp_path) for arm in ARMS}
    assert all(result.metrics.keys() == MEASURED | {"q_bias", "q_error"} for result in results.values())
    for claim in EXPERIMENT.claims:
        assert "quick" not in claim.presets or claim.metric in results[claim.arm].metrics
    EXPERIMENT.compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"story.png", "arms.png", "values.png"}
    exact = [result.load("values")["returns"] for result in results.values()]
    assert all(torch.equal(exact[0], other) for other in exact), "the policy is the same, and so are the states"


@pytest.mark.parametrize("arm", ["baseline", "strong_beer", "infer"])
def test_agents_learn_to_act(arm, tmp_path):
    result = train(CONTROL, arm, tmp_path)
    assert result.metrics.keys() == MEASURED | {"q_bias", "q_error", "return"}
    assert len(result.load("curves")["step"]) == 2


@pytest.mark.usefixtures("undrawn")
def test_weight_zero_is_the_baseline(tmp_path):
    plain, zero = train(QUICK, "baseline", tmp_path), train(replace(QUICK, beta=0.0), "beer", tmp_path)
    assert plain.metrics == zero.metrics


def test_lunar_lander_learns_with_discrete_actions(tmp_path):
    pytest.importorskip("Box2D")
    config = replace(EXPERIMENT.presets["lunar-lander"], **TINY, steps=60, start_steps=30, evaluate_every=30)
    for arm in ("baseline", "beer", "infer"):
        assert train(config, arm, tmp_path).metrics.keys() == MEASURED | {"return"}


def test_paper_preset_takes_steps_at_the_published_sizes(tmp_path):
    pytest.importorskip("dm_control")
    paper = EXPERIMENT.presets["paper"]
    assert (paper.batch, paper.hidden, paper.buffer, paper.start_steps) == (256, (256, 256), 1_000_000, 25_000)
    assert paper.start_steps + paper.steps == 1_000_000
    config = replace(paper, steps=4, start_steps=30, evaluate_every=4, episodes=1, bias_states=2, horizon=10, sample=32)
    assert "return" in train(config, "beer", tmp_path).metrics


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("config", [QUICK, CONTROL], ids=["quick", "control"])
@pytest.mark.parametrize("arm", ["strong_beer", "infer"])
def test_an_interrupted_run_resumes_bit_identically(config, arm, tmp_path):
    config = replace(config, evaluate_every=max(1, config.steps // 4))
    check_resume(EXPERIMENT, config, arm, tmp_path, kill=(experiment, "note", 3))
