"""The experiment: every arm of both presets trains, claims have their metrics, and a killed run resumes bit-identically."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from poise.core.lab import Run
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.rl import DrQV2Agent, make_dmc_pixels
from poise.rl.experiments import adaptive_rr as experiment
from poise.rl.experiments.adaptive_rr import EXPERIMENT
from poise.rl.experiments.adaptive_rr_arms import ACTING, QUICK
from poise.rl.plasticity.adaptive_rr import AdaptiveReplayRatio

SMALL = {
    "size": 24,
    "horizon": 20,
    "action_repeat": 2,
    "channels": 4,
    "feature_dim": 8,
    "hidden": 16,
    "pad": 2,
    "batch": 8,
    "episodes": 1,
    "probe_transitions": 30,
    "probe_early": 4,
    "probe_late": 8,
    "fit_targets": 1,
    "fit_steps": 3,
    "prime": 5,
    "prime_after": 21,
}
TINY = replace(
    EXPERIMENT.presets["quick"], **SMALL, start_steps=20, steps=12, evaluate_every=6, intervene_at=6, intervene_every=6
)


train = partial(rehearse, EXPERIMENT)


@pytest.fixture(autouse=True)
def renderer():
    pytest.importorskip("pygame")


def test_every_arm_of_the_quick_preset_is_trained_and_compared(tmp_path):
    results = {arm: train(TINY, arm, tmp_path) for arm in QUICK}
    for claim in EXPERIMENT.claims:
        for arm in (claim.arm, claim.versus):
            assert arm is None or claim.metric in results[arm].metrics
    EXPERIMENT.compare(TINY, results, Run.scratch(tmp_path / "compare"))
    assert figures(tmp_path / "compare") == {"arms.png", "probe.png"}
    assert (results["baseline"].dir / "figures" / "policy.gif").read_bytes().startswith(b"GIF89a")
    updates = {arm: results[arm].metrics["updates"] for arm in QUICK if arm in ACTING}
    assert (updates["baseline"], updates["rr_high"], updates["rr_high_no_shift"]) == (6, 24, 24)
    for arm in QUICK:
        if arm.startswith("probe"):
            metrics = results[arm].metrics
            assert metrics["changed_by_actor"] == 0, "the policy is no part of what is probed"
            assert metrics["dead_fau"] == 0
            assert metrics["revived_fau"] > 0.2
            assert metrics["injection_change"] < 1e-4


@pytest.mark.parametrize("arm", [arm for arm in ACTING if arm not in QUICK])
def test_the_interventions_of_the_study_train(arm, tmp_path):
    metrics = train(replace(TINY, evaluate_every=1_000), arm, tmp_path).metrics
    assert metrics["rule_mismatches"] == 0
    assert metrics["updates"] == (24 if ACTING[arm].ratio == "high" else 6)


def test_the_controller_of_an_arm_switches_where_the_rule_says_and_never_back(tmp_path):
    config = replace(TINY, steps=100, evaluate_every=1_000, phi_gap=0.5, check_freq=2)
    result = train(config, "adaptive", tmp_path)
    assert result.metrics["rule_mismatches"] == 0
    assert result.metrics["switched"] == 1
    taken = result.load("log")["taken"]
    assert taken[20:40].tolist() == [1, 0] * 10
    assert (taken[40:] == 2).all(), "the fourth episode's end is the first check after an update"
    assert result.metrics["updates"] == 10 + 2 * 80


def test_mismatches_with_the_rule_are_counted():
    config = replace(TINY, start_steps=4, steps=8, check_freq=2, phi_gap=0.1)
    log = {
        "taken": torch.tensor([0, 0, 0, 0, 1, 0, 1, 0, 2, 2, 2, 2]),
        "ended": torch.tensor([False, False, False, True] * 3),
        "fau": torch.full((20, 3), 0.5, dtype=torch.float64),
    }
    controller = AdaptiveReplayRatio(0.5, 2.0, 2, 0.1)
    assert experiment.rule_mismatches(config, log, controller) == 0
    log["taken"][9] = 1
    assert experiment.rule_mismatches(config, log, controller) == 1
    log["fau"][0] = 0.9  # no recovery: it should not have switched, so that every later step differs
    assert experiment.rule_mismatches(config, log, controller) == 4


def test_paper_preset_takes_steps_at_the_published_sizes(tmp_path):
    pytest.importorskip("dm_control")
    try:
        make_dmc_pixels("walker", "walk").close()
    except RuntimeError as error:
        pytest.skip(f"no renderer here: {error}")
    paper = EXPERIMENT.presets["paper"]
    assert (paper.size, paper.channels, paper.feature_dim, paper.hidden, paper.pad) == (84, 32, 50, 1024, 4)
    assert (paper.batch, paper.nstep, paper.learning_rate, paper.tau, paper.gamma) == (256, 3, 1e-4, 0.01, 0.99)
    assert (paper.check_freq, paper.phi_gap, paper.low, paper.high) == (50, 1e-3, 0.5, 2.0)
    assert paper.action_repeat * (paper.start_steps + paper.steps) == 3_001_000, "frames"
    assert (paper.action_repeat * paper.start_steps, paper.buffer) == (4_000, 100_000)
    config = replace(paper, start_steps=40, steps=2, evaluate_every=10, episodes=1, buffer=1_000, horizon=40)
    result = train(config, "adaptive", tmp_path)
    assert result.metrics["updates"] == 1
    assert 0.3 < result.metrics["critic_fau"] < 0.7
    assert result.load("log")["td_loss"][0] > 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("arm", ["adaptive", "primed", "inject_critic", "probe_no_shift"])
def test_an_interrupted_run_resumes_bit_identically(arm, tmp_path):
    config = replace(TINY, steps=30, check_freq=2, phi_gap=0.5, start_steps=20)
    check_resume(EXPERIMENT, config, arm, tmp_path, kill=(DrQV2Agent, "update", 7))
