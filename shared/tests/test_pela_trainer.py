"""The trainer of PELA: what learns, what stays as it is, and what is restored."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.low_rank_surgery import apply_low_rank
from poise.core.adapters.pela_trainer import PelaTrainer


def perceptrons() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.5)) for width in (20, 32)]
    teacher = nn.Sequential(*blocks, nn.Linear(32, 12))
    return apply_low_rank(teacher, 2).model, teacher


def test_the_teacher_stays_as_it_is_over_training() -> None:
    student, teacher = perceptrons()
    before = copy.deepcopy(teacher.state_dict())
    both = nn.ModuleList([student, teacher])
    with PelaTrainer(student, teacher, blocks=("0", "1")) as pela:
        optimizer = torch.optim.AdamW(both.parameters(), lr=1e-2)
        for _step in range(5):
            both.train()  # wakes the teacher, too
            output, penalty = pela(torch.randn(8, 20))
            assert not any(module.training for module in teacher.modules())
            optimizer.zero_grad()
            (output.square().mean() + penalty).backward()
            optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert student[0][1].num_batches_tracked == 5


def test_all_parameters_of_the_student_learn() -> None:
    student, teacher = perceptrons()
    with PelaTrainer(student, teacher, blocks=("0", "1", "2")) as pela:
        pela(torch.randn(8, 20)).penalty.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    student, _teacher = perceptrons()
    twin = copy.deepcopy(student)
    pela = PelaTrainer(student.eval(), twin, blocks=("0", "1"), logit_weight=1.0)
    penalty = pela(torch.randn(8, 20)).penalty
    torch.testing.assert_close(penalty, torch.zeros(()), rtol=0, atol=1e-10)


def test_without_distillation_the_teacher_is_not_run() -> None:
    student, teacher = perceptrons()
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    pela = PelaTrainer(student, teacher, blocks=("0",), feature_weight=lambda step: float(step > 0))
    pela(torch.randn(8, 20))
    assert set(pela.metrics) == {"perturbation"}
    assert not calls
    pela.step()
    pela(torch.randn(8, 20))
    assert set(pela.metrics) == {"features", "perturbation"}
    assert calls == [1]


def test_nothing_is_held_and_nothing_is_tapped_afterwards() -> None:
    student, teacher = perceptrons()
    with PelaTrainer(student, teacher, blocks=("0", "1")) as pela:
        pela(torch.randn(8, 20))
        assert not pela._ours.calls("0")
    hooks = [module._forward_hooks for net in (student, teacher) for module in net.modules()]
    assert not any(hooks)


def test_in_place_surgery_that_makes_teacher_and_student_one_is_refused() -> None:
    teacher = perceptrons()[1]
    student, _ = apply_low_rank(teacher, 2, inplace=True)
    with pytest.raises(ValueError, match=r"share \d+ parameters .*apply_low_rank\(inplace=False\)"):
        PelaTrainer(student, teacher, blocks=("0",))


def test_blocks_must_exist_in_both_networks() -> None:
    student, teacher = perceptrons()
    with pytest.raises(ValueError, match="no module matches 'blocks'"):
        PelaTrainer(student, teacher, blocks=("blocks",))
    with pytest.raises(ValueError, match="the blocks differ"):
        PelaTrainer(student, teacher, blocks=("0.**",))


def test_logits_are_found_in_tensors_and_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    teacher = transformers.BertForSequenceClassification(config)
    student, _ = apply_low_rank(teacher, 2)
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    with PelaTrainer(student.eval(), teacher, ("bert.encoder.layer.*",), logit_weight=1.0) as pela:
        output, _ = pela(**tokens)
        expected = F.mse_loss(output.logits, teacher(**tokens).logits)
    torch.testing.assert_close(pela.metrics["logits"], expected.detach())

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.layer(x)

    pairs = Pairs()
    pela = PelaTrainer(apply_low_rank(pairs, 2).model, pairs, ("layer",), logit_weight=1.0)
    with pytest.raises(TypeError, match="must return a tensor or an object with logits, got tuple"):
        pela(torch.randn(2, 20))


def test_the_teacher_can_run_in_half_precision() -> None:
    student, teacher = perceptrons()
    x = torch.randn(8, 20)
    found = {}
    for dtype in (None, torch.bfloat16):
        with PelaTrainer(student.eval(), teacher, ("2",), perturbation_weight=0.0, teacher_dtype=dtype) as pela:
            output, found[dtype] = pela(x)
            assert output.dtype == torch.float32
    assert found[None] != found[torch.bfloat16]
    torch.testing.assert_close(found[torch.bfloat16], found[None], rtol=0.05, atol=0)


def test_the_position_in_the_schedules_is_restored() -> None:
    student, teacher = perceptrons()
    pela = PelaTrainer(student, teacher, ("0",), feature_weight=lambda step: 1.0 + step)
    pela.step()
    again = PelaTrainer(student, teacher, ("0",), feature_weight=lambda step: 1.0 + step)
    again.load_state_dict(pela.state_dict())
    assert again.terms.terms["features"].weight == 2.0


def test_a_compiled_student_is_tapped() -> None:
    student, teacher = perceptrons()
    x = torch.randn(8, 20)
    penalties = []
    for net in (student.eval(), torch.compile(student.eval(), backend="eager")):
        with PelaTrainer(net, teacher, ("0", "1")) as pela:
            penalties.append(pela(x).penalty.detach())
    torch.testing.assert_close(*penalties)


def test_the_stage_brings_the_student_back_to_its_teacher() -> None:
    student, teacher = perceptrons()
    x = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
    student.eval()
    with PelaTrainer(student, teacher, ("0", "1"), perturbation_weight=0.0) as pela:
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            penalty = pela(x).penalty
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
            losses.append(float(penalty.detach()))
    assert losses[-1] < 0.9 * losses[0]
