"""The orthogonal convolution experiment: real steps on bundled images and on the published formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from poise.core.experiments.attacks import accuracy, l2_attack
from poise.core.experiments.orthogonal_conv import EXPERIMENT, build, compare
from poise.core.experiments.orthogonal_conv_landscape import LANDSCAPE
from poise.core.experiments.orthogonal_conv_measures import input_sizes
from poise.core.lab import ArmResult, Run
from poise.core.weights.orthogonal_conv import OrthogonalRegularizer

QUICK = replace(
    EXPERIMENT.presets["quick"],
    epochs=1,
    train=100,
    test=100,
    attacked=20,
    attack_steps=2,
    spectrum_every=1,
    landscape_steps=4,
    landscape_starts=2,
)


def test_arms_measure_what_the_claims_are_about(tmp_path: Path) -> None:
    results = {}
    for arm in ("baseline", "strong", "kernel", "landscape"):
        metrics = EXPERIMENT.run(QUICK, arm, Run.scratch(tmp_path / arm))
        assert {claim.metric for claim in EXPERIMENT.claims if claim.arm == arm} <= metrics.keys()
        results[arm] = ArmResult(arm, metrics, tmp_path / arm)
    run = Run.scratch(tmp_path / "compare")
    compare(QUICK, results, run)
    assert sorted(path.name for path in (tmp_path / "compare" / "figures").iterdir()) == [
        "effect.png",
        "scalability.png",
    ]
    assert results["strong"].metrics["total_orthogonality"] < results["baseline"].metrics["total_orthogonality"]
    assert results["baseline"].metrics["frobenius_not_doubled"] < 1e-9


def test_all_arms_start_from_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for arm in ("baseline", "strong"):
        run = Run.scratch(tmp_path / arm, seed=3)
        weights.append(build(QUICK, 10).state_dict())
        run.close()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name])


def test_landscape_covers_both_regimes_and_both_obstacles() -> None:
    regimes = {rows <= channels * stride**2 for rows, channels, _, stride in LANDSCAPE.values()}
    assert regimes == {True, False}


def test_paper_preset_reads_the_published_format(tmp_path: Path, write_cifar: Callable[[Path, int], None]) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", images=2)
    config = replace(
        EXPERIMENT.presets["paper"],
        network="allconv",
        epochs=1,
        batch=5,
        workers=0,
        attacked=2,
        attack_steps=1,
        skip=("5", "7", "9", "11", "13"),
        layer_factors=("1=0.5", "1?=2"),
        spectrum_every=1,
    )
    metrics = EXPERIMENT.run(config, "strong", Run.scratch(tmp_path / "run", data=tmp_path))
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["share_of_bound"] <= 1
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "orthogonality/15" in logged
    assert "smallest_singular_value/15" in logged
    with pytest.raises(ValueError, match=r"layer_factors must be entries like 'stages\.0\.\*\*=0\.1', got 'stages'"):
        EXPERIMENT.run(replace(config, layer_factors=("stages",)), "strong", Run.scratch(tmp_path / "2", data=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "imagenet"])
def test_published_settings_take_real_steps(
    preset: str, tmp_path: Path, write_cifar: Callable[[Path, int], None], write_image_folders: Callable[..., None]
) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", images=4)
    write_image_folders(tmp_path)
    config = replace(
        EXPERIMENT.presets[preset], epochs=1, batch=4, attacked=2, attack_steps=1, workers=0, spectrum_every=100
    )
    metrics = EXPERIMENT.run(config, "strong", Run.scratch(tmp_path / "run", data=tmp_path))
    assert metrics["share_of_bound"] <= 1


@pytest.mark.parametrize("preset", ["paper", "imagenet"])
def test_published_networks_are_regularized_without_their_stem(preset: str) -> None:
    config = EXPERIMENT.presets[preset]
    with torch.device("meta"):
        net = build(config, 10)
    with pytest.warns(UserWarning, match="no orthogonal convolution"):  # the strided shortcuts of one tap
        penalty = OrthogonalRegularizer(net, skip=config.skip)
    assert len(penalty.layers) == sum(isinstance(module, nn.Conv2d) for module in net.modules()) - 1
    assert "stem.0" not in penalty.layers


def test_input_sizes_are_those_that_the_layers_see() -> None:
    net = build(QUICK, 10)
    sizes = input_sizes(net, OrthogonalRegularizer(net), torch.zeros(1, 1, 14, 14))
    assert list(sizes.values()) == [(14, 14), (14, 14), (14, 14), (7, 7)]


def test_attacks_stay_in_the_ball_and_lower_accuracy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(200, 1, 4, 4)
    y = net(x).argmax(1)
    attacked = l2_attack(net, x, y, radius=0.5, steps=5)
    assert (attacked - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert accuracy(net, [(x, y)]) == 1
    assert accuracy(net, [(attacked, y)]) < 0.7
    assert all(parameter.grad is None for parameter in net.parameters())
