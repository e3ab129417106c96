"""The average must follow its recursion exactly, whatever wraps the model, and survive a checkpoint."""

import copy
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from poise.core.memory.ema import EMA, RampedDecay
from poise.core.schedule import Linear


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def perturb(model: nn.Module, generator: torch.Generator, scale: float = 1.0) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                assert module.running_mean is not None
                assert module.num_batches_tracked is not None
                module.running_mean.normal_(generator=generator)
                module.num_batches_tracked.add_(1)


def test_the_average_starts_as_an_exact_copy_without_gradients() -> None:
    model = network()
    ema = EMA(model)
    for ours, theirs in zip(ema.average.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert not any(weight.requires_grad for weight in ema.parameters())
    assert not ema.average.training


@hypothesis.given(decays=st.lists(st.floats(0, 1), min_size=1, max_size=5), seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_average_follows_its_recursion_with_a_schedule(decays: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = network()
    ema = EMA(model, decay=lambda step: decays[min(step, len(decays) - 1)])
    expected = [weight.detach().clone() for weight in model.parameters()]
    for decay in decays:
        perturb(model, generator)
        ema.update(model)
        expected = [decay * a + (1 - decay) * w.detach() for a, w in zip(expected, model.parameters(), strict=True)]
    for ours, wanted in zip(ema.average.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert ema.updates == len(decays)


def test_decay_one_keeps_and_decay_zero_copies_bit_for_bit(generator: torch.Generator) -> None:
    model = network(torch.float32)
    start = copy.deepcopy(model)
    keep, follow = EMA(model, 1.0), EMA(model, 0.0)
    perturb(model, generator)
    keep.update(model)
    follow.update(model)
    for kept, copied, first, last in zip(
        keep.average.parameters(), follow.average.parameters(), start.parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(kept, first)
        assert torch.equal(copied, last)


def test_a_ramped_decay_is_the_mean_of_all_weights_at_first(generator: torch.Generator) -> None:
    model = network()
    ema = EMA(model, RampedDecay(0.9))
    seen = []
    for _ in range(10):  # 1 - 1/(step + 1) reaches 0.9 at step 9
        perturb(model, generator)
        seen.append(model[0].weight.detach().clone())
        ema.update(model)
    torch.testing.assert_close(ema.average[0].weight.detach(), torch.stack(seen).mean(0))
    assert ema.decay == 0.9


def test_a_linear_schedule_reaches_its_end() -> None:
    ema = EMA(network(), Linear(0.996, 1.0, steps=4))
    decays = []
    for _ in range(6):
        decays.append(ema.decay)
        ema.update(network())
    assert decays == pytest.approx([0.996, 0.997, 0.998, 0.999, 1.0, 1.0])


def test_buffers_are_copied_averaged_or_kept(generator: torch.Generator) -> None:
    model = network()
    averages = {rule: EMA(model, 0.5, buffers=rule) for rule in ("copy", "average", "keep")}
    first = model[1].running_mean.clone()
    perturb(model, generator)
    last = model[1].running_mean
    for rule, wanted in (("copy", last), ("average", (first + last) / 2), ("keep", first)):
        averages[rule].update(model)
        torch.testing.assert_close(averages[rule].average[1].running_mean, wanted)
        assert averages[rule].average[1].num_batches_tracked == (0 if rule == "keep" else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_averaged_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(model, 0.999)
        model.weight.fill_(2.0)
    for _ in range(1000):
        ema.update(model)
    wanted = 2 - 0.999**1000
    torch.testing.assert_close(ema.average.weight.detach(), torch.tensor([[wanted]], dtype=dtype))
    again = EMA(model, 0.999)
    again.load_state_dict(ema.state_dict())
    for _ in range(10):
        ema.update(model)
        again.update(model)
    assert torch.equal(again._exact.get_buffer("weight"), ema._exact.get_buffer("weight"))


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_swapping_evaluates_the_average_and_restores_bit_for_bit(
    error: type[Exception] | None, generator: torch.Generator
) -> None:
    model = network().eval()
    ema = EMA(model, 0.9)
    perturb(model, generator)
    ema.update(model)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    before, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.average.state_dict())
    pointers = [weight.data_ptr() for weight in model.parameters()]

    def evaluate() -> None:
        with ema.swapped(model) as same:
            assert same is model
            assert [weight.data_ptr() for weight in model.parameters()] == pointers
            expected = EMA(model, 0.9).average
            expected.load_state_dict(average)
            assert torch.equal(model(x), expected(x))
            with pytest.raises(RuntimeError, match=r"update it outside of swapped\(\)"):
                ema.update(model)
            with pytest.raises(RuntimeError, match="swapped already"), ema.swapped(model):
                pass
            if error is not None:
                raise error

    if error is None:
        evaluate()
    else:
        with pytest.raises(error):
            evaluate()
    for state, wanted in ((model.state_dict(), before), (ema.average.state_dict(), average)):
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
    ema.update(model)


def test_a_resumed_average_continues_bit_for_bit(generator: torch.Generator) -> None:
    model = network()
    ema = EMA(model, RampedDecay(0.99), buffers="average")
    for _ in range(3):
        perturb(model, generator)
        ema.update(model)
    resumed = EMA(network(), RampedDecay(0.99), buffers="average")
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert resumed.updates == 3
    perturb(model, generator)
    ema.update(model)
    resumed.update(model)
    for a, b in zip(ema.average.state_dict().values(), resumed.average.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_stay_tied_and_move_once(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    ema = EMA(model, 0.5)
    perturb(model, generator)
    ema.update(model)
    assert ema.average[0].weight is ema.average[1].weight
    torch.testing.assert_close(ema.average[0].weight.detach(), (start + model[0].weight.detach()) / 2)


def test_compiled_models_and_compiled_parts_are_looked_through(generator: torch.Generator) -> None:
    model = network()
    whole: Any = torch.compile(model, backend="aot_eager")
    ema = EMA(whole, 0.5)
    part: Any = torch.compile(copy.deepcopy(model[0]), backend="aot_eager")
    parts = nn.Sequential(part, model[1], model[2])
    start = model[0].weight.detach().clone()
    perturb(parts, generator)
    ema.update(parts)
    torch.testing.assert_close(ema.average[0].weight.detach(), (start + parts[0].weight.detach()) / 2)
    ema.update(whole)


def test_an_average_of_other_structure_follows_the_names_in_common(generator: torch.Generator) -> None:
    student = nn.ModuleDict({"base_layer": nn.Linear(3, 2), "adapter": nn.Linear(3, 2)})
    teacher = nn.ModuleDict({"layer": nn.Linear(3, 2), "own": nn.Linear(1, 1)})
    start = copy.deepcopy(teacher.state_dict())
    ema = EMA(student, 0.75, average=teacher, rename=lambda name: name.replace("base_", ""))
    assert ema.average is teacher
    perturb(student, generator)
    ema.update(student)
    torch.testing.assert_close(
        teacher["layer"].weight.detach(), 0.75 * start["layer.weight"] + 0.25 * student["base_layer"].weight.detach()
    )
    assert torch.equal(teacher["own"].weight, start["own.weight"])
    with pytest.raises(ValueError, match="no parameter name in common: pass rename"):
        EMA(student, average=teacher)


def test_the_mode_of_the_average_is_its_own() -> None:
    owner = nn.ModuleDict({"teacher": EMA(network())})
    teacher: Any = owner["teacher"]
    owner.train()
    assert not teacher.average[1].training
    teacher.average.train()
    owner.eval()
    assert teacher.average[1].training


def test_a_bad_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5 at update 0"):
        EMA(network(), 1.5)
    with pytest.raises(ValueError, match="buffers must be 'copy', 'average' or 'keep', got 'drop'"):
        EMA(network(), buffers="drop")
    ema = EMA(network())
    with pytest.raises(ValueError, match=r"no longer has the structure of its average; they differ in \['3.weight'\]"):
        ema.update(nn.Sequential(*network(), nn.Linear(2, 2, bias=False)))
    with pytest.raises(ValueError, match=r"0.weight has shape \(4, 5\) in the model and \(4, 3\) in the average"):
        ema.update(nn.Sequential(nn.Linear(5, 4), *network()[1:]))
    with pytest.raises(ValueError, match=r"is torch\.float32 in the model"), ema.swapped(network().float()):
        pass
