"""The PRDC experiment: arms share their log, the paper preset reads the published formats, a killed run resumes bit-identically."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from poise.core.lab import Run
from poise.core.lab.errors import BadInput
from poise.core.lab.rehearsal import check_resume, figures, rehearse
from poise.rl import evaluate
from poise.rl.experiments import prdc as experiment
from poise.rl.experiments.prdc import ARMS, EXPERIMENT, TASK_ARMS
from poise.rl.experiments.prdc_line import Behaviour, LineWorld, line_log

TINY = {"batch": 16, "hidden": (16, 16), "steps": 6, "evaluate_every": 2, "episodes": 1, "sample": 20, "starts": 2}
LOGS = {"narrow_steps": 4, "hopper_steps": 4, "hopper_logged": 100}
LINE = {"line_steps": 4, "line_logged": 100, "line_hidden": (16, 16), "line_batch": 16, "line_episodes": 2}
QUICK = replace(EXPERIMENT.presets["quick"], **TINY, **LINE, horizon=20, logged=450, **LOGS)
NO_OTHERS = {"hopper_steps": 250, "line_steps": 0}
TASK_METRICS = {"return", "distance", "q", "neighbour_share", "overestimation"}
train = partial(rehearse, EXPERIMENT)


def test_every_arm_learns_and_all_are_compared(tmp_path):
    results = {arm: train(QUICK, arm, tmp_path) for arm in ARMS}
    for arm, result in results.items():
        of_logs = {f"{log}_{metric}" for log in ("narrow", "hopper") for metric in TASK_METRICS}
        of_task = TASK_METRICS | of_logs | {"behaviour", "gain", "narrow_behaviour"} if arm in TASK_ARMS else set()
        assert result.metrics.keys() == of_task | {"line_return", "line_gain"}
    for claim in EXPERIMENT.claims:
        assert "quick" not in claim.presets or claim.metric in results[claim.arm].metrics
    EXPERIMENT.compare(QUICK, results, Run.scratch(tmp_path / "compare"))
    drawn = figures(tmp_path / "compare")
    logs = {f"{log}_{kind}.png" for log in ("mixed", "narrow", "hopper") for kind in ("curves", "values")}
    assert drawn == logs | {"line.png"}
    assert len({results[arm].metrics["behaviour"] for arm in TASK_ARMS}) == 1, "one log for all arms"


@pytest.mark.usefixtures("undrawn")
def test_arms_begin_alike_whatever_they_learned_before(tmp_path):
    config = replace(QUICK, line_steps=1)  # the policy has not moved yet
    lines = [train(config, arm, tmp_path).load("line") for arm in ("prdc", "support")]
    assert torch.equal(lines[0]["action"], lines[1]["action"])


def test_the_log_of_the_pendulum_mixes_noises():
    config = replace(QUICK, logged=600)
    data, behaviour = experiment.log_pendulum(config, config.noises, 0)
    saturated = (data.actions.abs() == 1).float().view(3, 200).mean(1)
    assert saturated[0] < saturated[1] < saturated[2]
    assert -1_800 < behaviour < -100
    assert not data.terminated.any()


def test_half_of_the_lines_log_walks_away_from_the_goal():
    data = line_log(4_000, torch.Generator().manual_seed(0))
    assert data.actions.mean().abs() < 0.1
    assert (data.actions.abs() == 1).all()
    torch.testing.assert_close(data.next_observations, (data.observations + 0.1 * data.actions).clamp(-1, 1))
    torch.testing.assert_close(data.rewards, data.next_observations[:, 0] - 1)
    in_first_cell = data.observations[:, 0] < -0.95
    assert (data.actions[in_first_cell] == 1).all()
    assert evaluate(Behaviour(), LineWorld, episodes=30).mean() < -20


def d4rl_file(path, count=40):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    timeouts = np.arange(count) % 20 == 19
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(count, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
        file["rewards"] = rng.normal(size=count).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(count, bool), timeouts
        file["infos/qpos"] = np.zeros((count, 6))
    return path


def minari_folder(path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    (path / "data").mkdir(parents=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for number in range(3):
            group = file.create_group(f"episode_{number}")
            group["observations"] = rng.normal(size=(9, 11))
            group["actions"] = rng.uniform(-1, 1, (8, 3)).astype(np.float32)
            group["rewards"] = rng.normal(size=8)
            group["terminations"], group["truncations"] = np.arange(8) == 7, np.zeros(8, bool)
    return path


@pytest.mark.parametrize("arm", TASK_ARMS)
@pytest.mark.parametrize("kind", ["d4rl", "minari"])
def test_paper_preset_takes_steps_at_the_published_sizes(arm, kind, tmp_path):
    paper = EXPERIMENT.presets["paper"]
    assert (paper.steps, paper.batch, paper.hidden, paper.learning_rate) == (1_000_000, 256, (256, 256), 3e-4)
    assert (paper.alpha, paper.beta, paper.gamma) == (2.5, 2.0, 0.99)
    data = d4rl_file(tmp_path / "hopper.hdf5") if kind == "d4rl" else minari_folder(tmp_path / "hopper")
    config = replace(paper, steps=4, evaluate_every=4, episodes=1, sample=10, starts=2, horizon=10)
    assert train(config, arm, tmp_path, data=data).metrics.keys() == TASK_METRICS | {"score"}


def test_paper_preset_asks_for_its_data(tmp_path):
    with pytest.raises(BadInput, match="--data"):
        train(EXPERIMENT.presets["paper"], "prdc", tmp_path)


@pytest.mark.parametrize(("name", "words"), [("log.hdf5", "no HDF5 file"), ("none", "no file")])
def test_paper_preset_says_what_is_wrong_with_its_data(name, words, tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "log.hdf5").write_text("")
    with pytest.raises(BadInput, match=words):
        train(EXPERIMENT.presets["paper"], "prdc", tmp_path / "out", data=tmp_path / name)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("arm", ["baseline", "prdc"])
def test_an_interrupted_run_resumes_bit_identically(arm, tmp_path):
    check_resume(EXPERIMENT, QUICK, arm, tmp_path, kill=(experiment, "evaluate", 3))


@pytest.mark.slow
def test_prdc_keeps_values_finite_and_comes_nearer_to_the_data(tmp_path):
    config = replace(EXPERIMENT.presets["quick"], steps=2_000, narrow_steps=2_000, evaluate_every=250, **NO_OTHERS)
    held, free = train(config, "prdc", tmp_path), train(config, "baseline", tmp_path)
    assert held.metrics["narrow_distance"] < free.metrics["narrow_distance"]
    assert held.metrics["return"] > free.metrics["return"] - 200
    distance = held.load("narrow_curves")["distance"]
    assert distance[-1] < distance[0]
