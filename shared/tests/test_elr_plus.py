"""ELR+: the authors' loss and weight averages, the reduction to ELR, and the two networks."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.labels.elr import ELRLoss
from poise.core.labels.elr_plus import ELRPlusLoss, ELRPlusTrainer, RampedUpDecay, WeightAverage, sigmoid_rampup
from poise.core.labels.mixing import Mix, draw_mix
from poise.core.memory.ema import RampedDecay
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows

GOLDEN = Path(__file__).parent / "golden" / "elr"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.tensor(file[key]) for key in file}


def bank(examples: int, classes: int) -> SampleBank:
    return SampleBank(examples, classes, storage=DenseRows(torch.float64))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["elr_plus_steps.npz", "elr_plus_rampup.npz"])
def test_agrees_with_the_authors_code_step_by_step(name: str) -> None:
    stored = golden(name)
    examples, classes = stored["hist_after"].shape[1:]
    loss = ELRPlusLoss(
        examples,
        classes,
        float(stored["lam"]),
        float(stored["beta"]),
        ramp_steps=int(stored["coef_step"]),
        memory=bank(examples, classes),
    )
    for step, iteration in enumerate(stored["iteration"].tolist()):
        mix = Mix(stored["mix_index"][step], float(stored["mixup_l"]))
        target = loss.update_targets(stored["index"][step], stored["teacher_logits"][step], mix)
        logits = stored["logits"][step].requires_grad_()
        value = loss(logits, stored["soft_labels"][step], target, iteration)
        (gradient,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(target, stored["q"][step], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(value, stored["loss"][step], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, stored["grad_logits"][step], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            loss.memory.read(torch.arange(examples)), stored["hist_after"][step], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("name", ["ema_rampup.npz", "ema_plain.npz"])
def test_weight_average_agrees_with_the_authors_code(name: str) -> None:
    stored = golden(name)
    live = nn.Linear(8, 1, bias=False).double()
    with torch.no_grad():
        live.weight.copy_(stored["ema_start"])
    ramp = int(stored["ema_step"]) if stored["use_rampup"] else None
    average = WeightAverage(live, float(stored["alpha"]), ramp)
    for step, params, after in zip(stored["global_step"], stored["params"], stored["ema_after"], strict=True):
        with torch.no_grad():
            live.weight.copy_(params)
        average.updates = int(step)
        average.update(live)
        torch.testing.assert_close(average.average.weight[0], after, rtol=1e-10, atol=1e-10)


def test_ramp_starts_at_exp_minus_five_and_ends_at_one() -> None:
    assert sigmoid_rampup(0, 100) == math.exp(-5)
    assert sigmoid_rampup(50, 100) == math.exp(-1.25)
    assert sigmoid_rampup(100, 100) == sigmoid_rampup(1_000, 100) == sigmoid_rampup(0, 0) == 1
    values = [sigmoid_rampup(step, 100) for step in range(101)]
    assert values == sorted(values)
    with pytest.raises(ValueError, match="length must not be negative"):
        sigmoid_rampup(0, -1)


def test_average_copies_no_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.5, None)
    model(5 + torch.randn(64, 3))
    average.update(model)
    assert not average.average[1].running_mean.any()
    average(torch.randn(8, 3))  # in train mode: statistics of its own
    assert average.average[1].running_mean.any()


def test_reduces_to_elr_without_clamp() -> None:
    """Nothing mixed, no ramp, no averaging, one network: what is left is ELR."""
    logits, labels, index = randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0]), torch.arange(6)
    plain = ELRLoss(6, 4, clamp=0.0, memory=bank(6, 4))
    plus = ELRPlusLoss(6, 4, clamp=0.0, memory=bank(6, 4))
    mix = Mix(torch.randperm(6), 1.0)
    for seed in range(3):
        logits = randn(6, 4, seed=seed)
        target = plus.update_targets(index, logits, mix)
        torch.testing.assert_close(
            plus(logits, mix(F.one_hot(labels, 4).double()), target), plain(logits, labels, index)
        )


def test_label_refinement_multiplies_and_normalises() -> None:
    loss = ELRPlusLoss(2, 3, lam=0, refine_labels=True)
    logits = randn(2, 3)
    labels = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0.6, 0.2, 0.1], [0.9, 0.1, 0.0]], dtype=torch.float64)
    refined = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)  # nothing in common: as it was
    torch.testing.assert_close(loss(logits, labels, target), F.cross_entropy(logits, refined))


def trainer(seed: int = 0, **settings: float) -> ELRPlusTrainer:
    torch.manual_seed(seed)
    return ELRPlusTrainer(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        num_examples=20,
        num_classes=3,
        **settings,
    )


def test_teacher_is_the_average_of_the_other_network() -> None:
    pair = trainer(alpha=0).eval()
    for average in pair.averages:
        average.average.eval()
    x, labels, index = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    pair.loss(0, x, labels, index, None)
    torch.testing.assert_close(
        pair.criteria[0].memory.read(index), 0.3 * pair.averages[1].average(x).softmax(1).detach()
    )
    assert not pair.criteria[1].memory.written.any()


def test_a_step_changes_one_network_and_its_average_only() -> None:
    pair = trainer(decay=0.5, decay_ramp_steps=0)
    before = copy.deepcopy(pair.state_dict())
    optimizer = torch.optim.SGD(pair.networks[0].parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    pair.step(0, optimizer, torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.arange(4), generator)
    after = pair.state_dict()
    weights = [
        name for name in after if isinstance(after[name], Tensor) and "running" not in name and "tracked" not in name
    ]
    changed = {".".join(name.split(".")[:2]) for name in weights if not torch.equal(after[name], before[name])}
    assert changed == {"networks.0", "averages.0", "criteria.0"}
    torch.testing.assert_close(
        after["averages.0.average.0.weight"], (before["networks.0.0.weight"] + after["networks.0.0.weight"]) / 2
    )
    assert (pair.steps(0), pair.steps(1)) == (1, 0)


def test_prediction_averages_two_members_and_leaves_modes_alone() -> None:
    pair = trainer()
    x = torch.randn(6, 5)
    optimizer = torch.optim.SGD(pair.networks[0].parameters(), lr=0.1)
    pair.step(0, optimizer, x, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6), torch.Generator().manual_seed(0))
    modes = [module.training for module in pair.modules()]
    both = {members: pair(x, members) for members in ("averages", "live", "live_and_average")}
    assert [module.training for module in pair.modules()] == modes
    live, average = (copy.deepcopy(module).eval()(x) for module in (pair.networks[0], pair.averages[1].average))
    torch.testing.assert_close(both["live_and_average"], (live + average) / 2)
    assert not torch.equal(both["averages"], both["live"])


def test_resumed_pair_continues_identically() -> None:
    pair = trainer()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9) for network in pair.networks]
    generator = torch.Generator().manual_seed(0)

    def train(pair: ELRPlusTrainer, optimizers: list[torch.optim.SGD], generator: torch.Generator) -> list[float]:
        losses = []
        for step in range(4):
            index = torch.arange(step, step + 8)
            x, labels = randn(8, 5, seed=step).float(), index % 3
            for student in (0, 1):
                losses.append(pair.step(student, optimizers[student], x, labels, index, generator).item())
        return losses

    train(pair, optimizers, generator)
    twin = trainer(seed=1)
    twin.load_state_dict(copy.deepcopy(pair.state_dict()))
    others = [torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9) for network in twin.networks]
    for ours, theirs in zip(others, optimizers, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert train(twin, others, generator.clone_state()) == train(pair, optimizers, generator)


def test_mixup_of_torchvision_is_the_same_mix() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    x, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    mixed, soft = transforms.MixUp(num_classes=3, alpha=1.0)(x, labels)
    share = soft.max(1).values.max().item()
    rolled = Mix(torch.arange(6).roll(1), share)
    torch.testing.assert_close(rolled(F.one_hot(labels, 3).float()), soft, rtol=0, atol=1e-6)
    torch.testing.assert_close(rolled(x), mixed, rtol=0, atol=1e-6)


def test_draws_of_the_mix_follow_the_beta_distribution_and_the_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = np.array([draw_mix(4, 0.5, generator).share for _ in range(3_000)])
    assert shares.min() >= 0.5
    raw = np.array([draw_mix(4, 0.5, generator, own_share_larger=False).share for _ in range(3_000)])
    assert abs(raw.mean() - 0.5) < 0.03
    assert abs(raw.var() - 1 / 8) < 0.01  # of Beta(1/2, 1/2)
    one, two = (draw_mix(9, 1.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.share == two.share
    assert torch.equal(one.partner, two.partner)
    assert draw_mix(4, 0.0, generator).share == 1
    with pytest.raises(ValueError, match="alpha"):
        draw_mix(4, -1.0, generator)


def test_each_row_may_have_a_share_of_its_own() -> None:
    x = randn(3, 2, 2)
    mix = Mix(torch.tensor([1, 2, 0]), torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(mix(x), torch.stack([x[0], x[2], (x[2] + x[0]) / 2]))
    with pytest.raises(ValueError, match="expected 3 rows"):
        mix(x[:2])


def test_bad_input_is_refused() -> None:
    loss = ELRPlusLoss(5, 3)
    uniform = torch.full((2, 3), 1 / 3)
    for call, words in (
        (lambda: ELRPlusLoss(5, 3, ramp_steps=-1), "ramp_steps must not be negative"),
        (lambda: ELRPlusLoss(5, 3, beta=1.5), "beta must lie"),
        (lambda: loss.update_targets(torch.tensor([0, 5]), uniform), "index must lie"),
        (lambda: loss.update_targets(torch.tensor([0, 1]), torch.zeros(2, 4)), "teacher_logits must have shape"),
        (lambda: loss(torch.zeros(2, 4), uniform, uniform), "logits must have shape"),
        (lambda: WeightAverage(nn.Linear(1, 1), 1.5), "decay must lie"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert RampedUpDecay(0.5, 0)(0) == 0.5
    assert RampedDecay(0.9)(0) == 0
