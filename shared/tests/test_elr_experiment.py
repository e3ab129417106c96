"""The ELR experiment: every arm trains, and the published files are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from poise.core.experiments import elr
from poise.core.experiments.elr import EXPERIMENT, Config
from poise.core.experiments.noisy_labels import noisy
from poise.core.lab import ArmResult
from poise.core.lab.run import Run

SMALL = Config(train=120, test=60, epochs=3, epochs_plus=2, batch=40)
METRICS = {
    "best_accuracy",
    "last_accuracy",
    "accuracy_lost",
    "memorized",
    "recalled",
    "gradients_on_wrong_labels",
    "gradients_on_right_labels",
    "gradients_on_remembered_labels",
}


@pytest.mark.parametrize("arm", EXPERIMENT.arms)
def test_every_arm_trains_and_measures(arm: str, tmp_path: Path) -> None:
    metrics = EXPERIMENT.run(SMALL, arm, Run.scratch(tmp_path))
    assert metrics.keys() == METRICS
    assert all(np.isfinite(value) for value in metrics.values())
    assert EXPERIMENT.compare is not None
    EXPERIMENT.compare(SMALL, {arm: ArmResult(arm, metrics, tmp_path)}, Run.scratch(tmp_path / "compare"))
    assert (tmp_path / "compare" / "figures" / "arms.png").is_file()


def test_arms_of_a_seed_see_the_same_wrong_labels(tmp_path: Path) -> None:
    (first, one), (second, two) = (elr.load(SMALL, Run.scratch(tmp_path / name)) for name in "ab")
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.equal(one, two)
    assert not torch.equal(elr.load(SMALL, Run.scratch(tmp_path / "c", seed=1))[1], one)
    assert 0.3 < (one != first.train.labels).float().mean() < 0.6


def test_learning_rates_are_those_published() -> None:
    restarts, steps = EXPERIMENT.presets["paper"], EXPERIMENT.presets["cifar10-asymmetric"]
    assert [elr.learning_rate(restarts, epoch) for epoch in (0, 10, 140)] == [0.02] * 3
    assert elr.learning_rate(restarts, 5) == pytest.approx((0.02 + 1e-3) / 2)
    assert [elr.learning_rate(steps, epoch) for epoch in (39, 40, 80)] == pytest.approx([0.02, 2e-4, 2e-6])
    assert [elr.learning_rate_plus(restarts, epoch) for epoch in (149, 150)] == pytest.approx([0.02, 2e-3])


def test_noise_of_cifar100_is_in_its_groups() -> None:
    labels = torch.arange(100).repeat(10)
    assert torch.equal(noisy(labels, 100, "asymmetric", 0.4, seed=0) // 5, labels // 5)


def narrow(config: Config, classes: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))


@pytest.mark.parametrize("arm", ["elr", "elr_plus"])
@pytest.mark.parametrize("preset", ["paper", "cifar10-asymmetric"])
def test_published_presets_read_cifar(
    preset: str, arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_cifar: Callable[[Path, int], None]
) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", images=4)
    monkeypatch.setattr(elr, "build", narrow)
    config = replace(EXPERIMENT.presets[preset], batch=9, epochs=1, epochs_plus=1)
    metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / "run", data=tmp_path))
    assert metrics.keys() == METRICS


def test_published_network_is_a_resnet34() -> None:
    network = elr.build(EXPERIMENT.presets["paper"], 10, dropout=0.5)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 36
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
