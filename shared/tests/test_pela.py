"""PELA against the authors' code, and its laws."""

import copy
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.low_rank_surgery import apply_low_rank
from poise.core.adapters.pela import (
    FeatureDistillation,
    WeightPerturbation,
    feature_distillation_loss,
    largest_weight_changes,
    weight_perturbation_loss,
)
from poise.core.adapters.pela_trainer import PelaTrainer

GOLDEN = Path(__file__).parent / "golden" / "pela"
Pair = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(outputs: int, inputs: int, rank: int, seed: int = 0) -> Pair:
    w1, w2 = normal(rank, inputs, seed=seed).requires_grad_(), normal(outputs, rank, seed=seed + 1).requires_grad_()
    return w1, w2, normal(outputs, inputs, seed=seed + 2)


def literal_loss(pairs: list[Pair], eps: float) -> Tensor:
    """The definition with a dense backward pass."""
    return torch.stack([((w2 @ w1 - w0).abs().max() - eps).square() for w1, w2, w0 in pairs]).mean()


def perceptrons() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.5)) for width in (20, 32)]
    teacher = nn.Sequential(*blocks, nn.Linear(32, 12))
    return apply_low_rank(teacher, 2).model, teacher


# The authors' code


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "mlp_ratio2.npz") as file:
        return dict(file)


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(20, 24),
            act=nn.GELU(),
            fc2=nn.Linear(24, 24, bias=False),
            norm=nn.LayerNorm(24),
            head=nn.Linear(24, 12),
        )
    ).double()


def state(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): torch.tensor(array) for name, array in golden.items() if name.startswith(prefix)}


@pytest.fixture
def both(golden: dict[str, np.ndarray]) -> tuple[nn.Module, nn.Module]:
    """Student, as it is at first, and teacher."""
    teacher = network()
    teacher.load_state_dict(state(golden, "teacher."))
    student, report = apply_low_rank(teacher, float(golden["ratio"]), skip=("head",))
    assert (report.parameters, report.kept) == (int(golden["params_before"]), int(golden["params_after"]))
    assert [layer.rank for layer in report.layers] == [int(golden["fc1.rank"]), int(golden["fc2.rank"])]
    return student, teacher


def equal(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_the_student_starts_where_the_authors_student_starts(
    both: tuple[nn.Module, nn.Module], golden: dict[str, np.ndarray]
) -> None:
    student, teacher = both
    equal(student.fc1.weight, golden["fc1.product"])
    equal(student.fc2.weight, golden["fc2.product"])
    equal(student(torch.tensor(golden["x"])), golden["student_logits_init"])
    equal(WeightPerturbation(student, teacher, eps=float(golden["eps"]))(), golden["inf_norm_init"])


def test_losses_and_gradients_are_those_of_the_authors(
    both: tuple[nn.Module, nn.Module], golden: dict[str, np.ndarray]
) -> None:
    student, teacher = both
    student.load_state_dict(state(golden, "student."))  # their names fit
    x, eps = torch.tensor(golden["x"]), float(golden["eps"])
    with PelaTrainer(
        student, teacher, blocks=("act", "norm"), logit_weight=0.5, perturbation_weight=3.0, eps=eps
    ) as pela:
        output, penalty = pela(x)
    equal(output, golden["student_logits"])
    equal(pela.metrics["features"], golden["L_fm"])
    equal(pela.metrics["logits"], golden["L_sr"])
    equal(pela.metrics["perturbation"], golden["L_inf"])
    equal(penalty, golden["L_fm"] + 0.5 * golden["L_sr"] + 3.0 * golden["L_inf"])
    WeightPerturbation(student, teacher, eps=eps)().backward()
    equal(student.fc1[0].weight.grad, golden["grad_inf_fc1_0"])
    equal(student.fc1[1].weight.grad, golden["grad_inf_fc1_1"])


# The perturbation term


@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.0, 0.01, 5.0]))
@settings(max_examples=25, deadline=None)
def test_value_and_gradient_are_those_of_the_definition(seed: int, layers: int, eps: float) -> None:
    shapes = [(6, 5, 2), (7, 4, 3)]
    pairs = [pair(*shapes[layer % 2], seed=10 * seed + layer) for layer in range(layers)]
    factors = [factor for w1, w2, _ in pairs for factor in (w1, w2)]
    expected, loss = literal_loss(pairs, eps), weight_perturbation_loss(pairs, eps)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, factors), torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layers_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(6, 5, 2), (7, 4, 3), (6, 5, 2), (5, 6, 2), (7, 4, 3), (6, 5, 2)]
    pairs = [pair(*shape, seed=7 * number) for number, shape in enumerate(shapes)]
    expected = torch.stack([(w2 @ w1 - w0).abs().max() for w1, w2, w0 in pairs])
    torch.testing.assert_close(largest_weight_changes(pairs), expected)
    monkeypatch.setattr("poise.core.adapters.pela._CHUNK", 2 * 6 * 5)  # in several batches
    torch.testing.assert_close(largest_weight_changes(iter(pairs)), expected)


def test_the_gradient_lives_in_one_row_and_one_column() -> None:
    w1, w2, w0 = pair(8, 6, 3)
    weight_perturbation_loss([(w1, w2, w0)]).backward()
    at = int((w2 @ w1 - w0).abs().argmax())
    assert w1.grad.abs().amax(0).nonzero().flatten().tolist() == [at % 6]
    assert w2.grad.abs().amax(1).nonzero().flatten().tolist() == [at // 6]


@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_exact_reconstruction_costs_the_square_of_eps_and_has_no_gradient(eps: float) -> None:
    w1, w2, _ = pair(4, 5, 2)
    # whole numbers, whose products are exact
    w1, w2 = ((4 * factor.detach()).round().requires_grad_() for factor in (w1, w2))
    loss = weight_perturbation_loss([(w1, w2, (w2 @ w1).detach())], eps)
    assert float(loss.detach()) == eps**2
    loss.backward()
    assert not w1.grad.any()
    assert not w2.grad.any()


def test_below_eps_the_change_is_pushed_up() -> None:
    w1, w2, _ = pair(4, 5, 2)
    original = (w2 @ w1).detach()
    original[1, 2] -= 0.1
    before = largest_weight_changes([(w1, w2, original)])
    weight_perturbation_loss([(w1, w2, original)], eps=1.0).backward()
    with torch.no_grad():
        moved = largest_weight_changes([(w1 - 1e-3 * w1.grad, w2 - 1e-3 * w2.grad, original)])
    assert moved > before


def test_the_loss_does_not_depend_on_how_the_product_is_split() -> None:
    w1, w2, w0 = pair(8, 6, 3)
    mixing = normal(3, 3, seed=9)
    torch.testing.assert_close(
        weight_perturbation_loss([(torch.linalg.inv(mixing) @ w1, w2 @ mixing, w0)], 0.1),
        weight_perturbation_loss([(w1, w2, w0)], 0.1),
    )


def test_the_backward_pass_holds_no_dense_matrix() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    pairs = [pair(40, 30, 3, seed=seed) for seed in range(4)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight_perturbation_loss(pairs).backward()
    assert max(sizes) < 40 * 30 / 3


def test_half_types_are_accumulated_in_single_precision() -> None:
    w1, w2, w0 = (tensor.detach().to(torch.bfloat16) for tensor in pair(8, 6, 3))
    expected = weight_perturbation_loss([(w1.float(), w2.float(), w0.float())])
    loss = weight_perturbation_loss([(w1, w2, w0)])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight_perturbation_loss([(w1.float(), w2.float(), w0.float())]), expected)


def test_a_schedule_can_leave_steps_out() -> None:
    student, teacher = perceptrons()
    penalty = WeightPerturbation(student, teacher, lambda step: 4.0 * (step % 4 == 0))
    values = []
    for _ in range(5):
        values.append(float(penalty().detach()))
        penalty.step()
    assert values[0] == values[4] > 0
    assert values[1:4] == [0.0] * 3


def test_shapes_that_do_not_fit_are_named() -> None:
    w1, w2, w0 = pair(8, 6, 3)
    with pytest.raises(ValueError, match=r"pair 1: expected .* \(3, 6\), \(8, 3\) and \(6, 8\)"):
        weight_perturbation_loss([(w1, w2, w0), (w1, w2, w0.T)])
    with pytest.raises(ValueError, match="at least one pair"):
        weight_perturbation_loss([])
    with pytest.raises(ValueError, match="eps must not be negative"):
        weight_perturbation_loss([(w1, w2, w0)], -0.1)
    with pytest.raises(ValueError, match="eps must not be negative"):
        WeightPerturbation(*perceptrons(), eps=-0.1)


def test_networks_that_do_not_fit_are_named() -> None:
    student, teacher = perceptrons()
    with pytest.raises(ValueError, match="has no low-rank layer: make it with apply_low_rank"):
        WeightPerturbation(teacher, teacher)
    with pytest.raises(ValueError, match=r"the teacher has no 0\.0\.weight"):
        WeightPerturbation(student, nn.Sequential(nn.ReLU()))
    wide = nn.Sequential(nn.Sequential(nn.Linear(21, 32), nn.GELU()), *teacher[1:])
    with pytest.raises(ValueError, match=r"0\.0\.weight is 32 x 20 in the student and \(32, 21\) in the teacher"):
        WeightPerturbation(student, wide)


def test_bare_projections_of_attention_are_compared_too() -> None:
    teacher = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    student, _ = apply_low_rank(teacher, 2)
    penalty = WeightPerturbation(student, teacher)
    assert set(penalty.changes()) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    penalty().backward()
    assert student["attention"].parametrizations.in_proj_weight.original0.grad.any()


def test_conv1d_is_compared_in_its_own_layout() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    teacher = nn.Sequential(conv1d(24, 16))
    student, _ = apply_low_rank(teacher, 2)
    change = WeightPerturbation(student, teacher).changes()["0.weight"]
    torch.testing.assert_close(change, (student[0].weight - teacher[0].weight.T).abs().max().detach())


def test_the_penalty_holds_neither_network() -> None:
    penalty = WeightPerturbation(*perceptrons())
    assert not list(penalty.parameters())
    assert "eps=0.0, layers=3" in repr(penalty)


# Distillation


def test_equal_features_cost_nothing() -> None:
    features = [normal(4, 3), normal(4, 5)]
    assert feature_distillation_loss(features, copy.deepcopy(features)) == 0


def test_blocks_weigh_alike_whatever_their_size() -> None:
    student, teacher = [normal(4, 3), normal(4, 50, seed=1)], [torch.zeros(4, 3).double(), torch.zeros(4, 50).double()]
    expected = (F.mse_loss(student[0], teacher[0]) + F.mse_loss(student[1], teacher[1])) / 2
    torch.testing.assert_close(feature_distillation_loss(student, teacher), expected)
    by_name = [dict(zip("ab", features, strict=True)) for features in (student, teacher)]
    torch.testing.assert_close(feature_distillation_loss(*by_name), expected)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    feature_distillation_loss([student], [teacher]).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_features_that_do_not_fit_are_named() -> None:
    a, b = normal(4, 3), normal(4, 5)
    with pytest.raises(ValueError, match="features 1: the student's shape"):
        feature_distillation_loss([a, a], [a, b])
    with pytest.raises(ValueError, match="same blocks, at least one"):
        feature_distillation_loss([a, a], [a])
    with pytest.raises(ValueError, match="same blocks, at least one"):
        feature_distillation_loss([], [])
    with pytest.raises(ValueError, match="same blocks, at least one"):
        feature_distillation_loss({"a": a}, {"b": a})
    with pytest.raises(TypeError, match="in the same form"):
        feature_distillation_loss([a], {"0": a})


def test_the_penalty_weighs_the_loss() -> None:
    student, teacher = [normal(4, 3)], [normal(4, 3, seed=1)]
    torch.testing.assert_close(
        FeatureDistillation(0.3)(student, teacher), 0.3 * feature_distillation_loss(student, teacher)
    )
