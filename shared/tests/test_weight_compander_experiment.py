"""The Weight Compander experiment: real steps on bundled images and on the published formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from poise.core.experiments.weight_compander import (
    EXPERIMENT,
    HOSTS,
    build,
    compand,
    compare,
    parts_of,
    weight_metrics,
    weights_of,
)
from poise.core.lab import ArmResult, Run

QUICK = replace(EXPERIMENT.presets["quick"], epochs=2, train=100, test=100, widths=(32, 32))
CONVOLUTIONS = replace(EXPERIMENT.presets["convolutions"], epochs=1, train=100, test=100, widths=(4, 8, 8))


def test_arms_are_every_host_with_every_compander() -> None:
    assert next(iter(EXPERIMENT.arms)) == "baseline"
    assert sorted(map(str, map(parts_of, EXPERIMENT.arms))) == sorted(
        str((host, compander)) for host in HOSTS for compander in (None, "learned", "slope_1", "slope_2", "slope_4")
    )


@pytest.mark.parametrize(
    ("config", "preset", "arms"),
    [
        (QUICK, "quick", ("baseline", "learned", "dropout", "dropout_slope_4")),
        (CONVOLUTIONS, "convolutions", ("decay", "decay_learned", "decay_slope_2")),
    ],
)
def test_arms_measure_what_the_claims_are_about(
    config: object, preset: str, arms: tuple[str, ...], tmp_path: Path
) -> None:
    results = {}
    for arm in arms:
        metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / arm))
        claims = [claim for claim in EXPERIMENT.claims if preset in claim.presets]
        assert {claim.metric for claim in claims if arm in (claim.arm, claim.versus)} <= metrics.keys()
        assert metrics.get("share_of_bound", 0.5) < 1
        results[arm] = ArmResult(arm, metrics, tmp_path / arm)
    compare(config, results, Run.scratch(tmp_path / "compare"))
    assert (tmp_path / "compare" / "figures" / "generalization.png").exists()


@pytest.mark.parametrize("config", [QUICK, CONVOLUTIONS])
@pytest.mark.parametrize("compander", ["learned", "slope_1", "slope_4"])
def test_every_arm_starts_from_the_same_function(config: object, compander: str, tmp_path: Path) -> None:
    outputs = []
    size = 28 if config is QUICK else 14
    for number in range(2):
        run = Run.scratch(tmp_path / str(number), seed=3)
        net = build(config, 10, dropout=0.0)
        if number:
            compand(config, compander, net)
            bounds = [module.bound for module in net.modules() if hasattr(module, "bound")]
            assert len(bounds) == len(weights_of(net))
        outputs.append(net(torch.rand(5, 1, size, size, generator=run.generator)))
        run.close()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_participation_tells_equal_weights_from_a_dominating_one() -> None:
    equal, single = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0.0, 5.0, 0.0, 0.0])
    assert weight_metrics([equal], 0.01)["participation"] == 1
    assert weight_metrics([single], 0.01) == {"participation": 0.25, "near_zero": 0.75, "largest_weight": 5.0}


@pytest.mark.parametrize("arm", ["decay", "decay_learned"])
def test_paper_preset_reads_the_published_format(
    arm: str, tmp_path: Path, write_cifar: Callable[[Path, int], None]
) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", images=2)
    config = replace(EXPERIMENT.presets["paper"], epochs=1, batch=5, workers=0)
    metrics = EXPERIMENT.run(config, arm, Run.scratch(tmp_path / "run", data=tmp_path))
    assert 0 <= metrics["accuracy"] <= 1
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert ("a/head.2.weight" in logged) == (arm == "decay_learned")


@pytest.mark.slow
def test_imagenet_preset_takes_real_steps(tmp_path: Path, write_image_folders: Callable[..., None]) -> None:
    write_image_folders(tmp_path)
    config = replace(EXPERIMENT.presets["imagenet"], epochs=1, batch=4, workers=0)
    metrics = EXPERIMENT.run(config, "decay_slope_1", Run.scratch(tmp_path / "run", data=tmp_path))
    assert metrics["share_of_bound"] < 1


@pytest.mark.parametrize("preset", ["paper", "imagenet"])
def test_published_networks_are_companded_in_every_convolution_and_the_classifier(preset: str) -> None:
    config = EXPERIMENT.presets[preset]
    net = build(config, 10, dropout=0.0)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())
    compand(config, "learned", net)
    assert sum(hasattr(module, "bound") for module in net.modules()) == layers
