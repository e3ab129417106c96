"""Companded models: what is companded, that nothing else changes, and how they train."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.core.weights.companding import WeightCompander, compand
from poise.core.weights.weight_compander import (
    apply_weight_compander,
    compander_report,
    remove_weight_compander,
    weight_compander_param_groups,
)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(64, 5)
    )


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()


class Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        keys = x if self.attention.kdim == 8 else x[..., : self.attention.kdim]
        values = x if self.attention.vdim == 8 else x[..., : self.attention.vdim]
        return self.attention(x, keys, values)[0]


MODELS = {
    "convolutions": (convolutions, (2, 3, 5, 5)),
    "one_axis": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 2, 3)), (2, 3, 9)),
    "three_axes": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, groups=2), nn.ConvTranspose3d(4, 2, 2)), (1, 2, 4, 4, 4)),
    "attention": (Attention, (2, 4, 8)),
    "attention_of_other_sizes": (lambda: Attention(kdim=6, vdim=5), (2, 4, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 4, 8)),
    "resnet18": (lambda: pytest.importorskip("torchvision.models").resnet18(num_classes=7), (2, 3, 32, 32)),
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_unchanged_by_companding_and_by_removal(name: str, per_channel: bool) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(*shape)
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = model(x).detach()
    assert apply_weight_compander(model, per_channel=per_channel) is model
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert remove_weight_compander(model) is model
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert {parameter: name for name, parameter in model.named_parameters()} == names
    assert not any(isinstance(module, WeightCompander) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_layer_is_companded_and_gets_a_gradient_and_nothing_else_is(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    normalizing = (nn.BatchNorm2d, nn.LayerNorm)
    expected = {
        f"{path}.{key}".lstrip(".")
        for path, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not isinstance(module, normalizing)
    }
    apply_weight_compander(model)
    assert compander_report(model).keys() == expected
    model(torch.randn(*shape)).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_function_may_change_instead_of_the_trained_values() -> None:
    model = perceptron()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    apply_weight_compander(model, a=0.8, b=0.4, keep_function=False)
    layer = model[0]
    torch.testing.assert_close(layer.weight, compand(before[0], 0.8, 0.4), rtol=1e-6, atol=0)
    assert torch.equal(layer.parametrizations.weight.original, before[0])


def test_included_by_pattern_are_layers_and_by_name_anything() -> None:
    model = nn.Sequential(convolutions(), nn.Embedding(5, 4), nn.LayerNorm(4))
    apply_weight_compander(model, include=["0.*"], exclude=["0.0"])
    assert list(compander_report(model)) == ["0.3.weight", "0.5.weight"]
    remove_weight_compander(model)
    apply_weight_compander(model, include=["1", "0.0"])
    assert sorted(compander_report(model)) == ["0.0.weight", "1.weight"]
    for options, message in (
        ({"include": ["0.1", "0.2"], "exclude": ["0.1"]}, "no weight to compand"),
        ({"include": ["9"]}, "no module matches '9'"),
        ({"exclude": ["9"]}, "no module matches '9'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_weight_compander(model, **options)


def test_a_model_that_cannot_be_companded_is_left_as_it_was() -> None:
    tied = nn.ModuleDict({"in": nn.Embedding(8, 4), "middle": nn.Linear(4, 4), "out": nn.Linear(4, 8, bias=False)})
    tied["out"].weight = tied["in"].weight
    hooked = nn.Sequential(nn.Linear(3, 3), torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    companded = nn.Sequential(nn.Linear(3, 3), apply_weight_compander(nn.Linear(3, 3)))
    for model, options, message in (
        (tied, {}, "in.weight and out.weight are one tensor"),
        (companded, {}, "1.weight is parametrized already"),
        (hooked, {}, "1.weight is no parameter"),
        (perceptron(), {"a": 0.01}, r"0.weight: w must stay below 1.571 a"),
        (perceptron(), {"a": -1.0}, r"a must lie in \[eps"),
        (perceptron(), {"b": 0.0}, r"b must lie in \[eps"),
        (perceptron(), {"kind": "cubic"}, "kind must be one of"),
        (perceptron(), {"steepness": 0.0}, "steepness must be positive"),
        (perceptron(), {"steepness": 2.0, "b": 1.0}, "goes with b='auto'"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(apply_weight_compander)(model, **options)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    for function in (remove_weight_compander, lambda model: weight_compander_param_groups(model, 0.1, 0.0)):
        with pytest.raises(ValueError, match="Sequential has no companded weight"):
            function(perceptron())
    apply_weight_compander(tied, exclude=["out"])
    assert list(compander_report(tied)) == ["middle.weight"]


def test_scales_are_chosen_for_each_layer_or_channel() -> None:
    model = convolutions()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "weight" in name}
    apply_weight_compander(model, steepness=2.0, kind="tanh")
    for name, layer in compander_report(model).items():
        assert layer.a == pytest.approx(4 * weights[name].square().mean().sqrt().item(), rel=1e-5)
        assert layer.b == pytest.approx(layer.a / 2, rel=1e-5)
    remove_weight_compander(model)
    apply_weight_compander(model, a=lambda w: 3 * w.abs().max(), b=0.5, learnable=False, per_channel=True)
    found = compander_report(model)["3.weight"]
    assert found.a == pytest.approx([3 * weights["3.weight"].abs().max().item()] * 4, rel=1e-5)
    assert found.b == pytest.approx([0.5] * 4, rel=1e-5)
    remove_weight_compander(model)
    apply_weight_compander(model, per_channel=True)
    transposed = model[3].parametrizations.weight[0]
    assert transposed.a.shape == (1, 4, 1, 1)
    torch.testing.assert_close(
        transposed.a.flatten(), 4 * weights["3.weight"].square().mean((0, 2, 3)).sqrt(), rtol=1e-5, atol=0
    )


def test_weights_far_from_the_others_and_zeros_fit_below_the_bound() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 50.0
        model[1].weight.zero_()
    apply_weight_compander(model)
    report = compander_report(model)
    assert report["0.weight"].largest == pytest.approx(50.0, rel=1e-4)
    assert report["0.weight"].bound == pytest.approx(60.0, rel=1e-4)
    assert report["1.weight"].a == pytest.approx(4 * 100**-0.5)


def test_a_small_gradient_step_moves_weights_by_the_squared_slope() -> None:
    model = perceptron()
    apply_weight_compander(model, learnable=False, steepness=3.0)
    layer, x, rate = model[0], torch.randn(9, 6, dtype=torch.float64), 1e-7
    compander = layer.parametrizations.weight[0]
    weight, v = layer.weight.detach(), layer.parametrizations.weight.original
    gradient = torch.func.grad(lambda w: model[2](torch.relu(nn.functional.linear(x, w, layer.bias))).square().sum())(
        weight
    )
    optimizer = torch.optim.SGD([v], lr=rate)
    model(x).square().sum().backward()
    slope = compander.a * compander.b / (compander.b**2 + v.detach() ** 2)
    optimizer.step()
    torch.testing.assert_close((layer.weight.detach() - weight) / rate, -(slope**2) * gradient, rtol=1e-4, atol=1e-6)


def test_decay_shrinks_trained_values_and_leaves_the_scales_alone() -> None:
    model = apply_weight_compander(perceptron())
    chain = model[0].parametrizations.weight
    v = chain.original.detach().clone()
    scales = chain[0].a.item(), chain[0].b.item()
    optimizer = torch.optim.SGD(weight_compander_param_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(5):
        optimizer.step()
    torch.testing.assert_close(chain.original, v * 0.95**5)
    torch.testing.assert_close(model[0].weight, chain[0](v * 0.95**5))
    assert (chain[0].a.item(), chain[0].b.item()) == scales


def test_groups_hold_every_parameter_once_and_the_scales_apart() -> None:
    model = apply_weight_compander(convolutions())
    others, scales = weight_compander_param_groups(model, lr=0.1, weight_decay=5e-4, lr_ab=0.01)
    assert len(scales["params"]) == 6
    assert (scales["lr"], scales["weight_decay"], others["lr"], others["weight_decay"]) == (0.01, 0.0, 0.1, 5e-4)
    assert {*others["params"], *scales["params"]} == set(model.parameters())
    assert len(others["params"]) + 6 == len(list(model.parameters()))
    assert weight_compander_param_groups(model, lr=0.1, weight_decay=0.0)[1]["lr"] == 0.1
    (only,) = weight_compander_param_groups(apply_weight_compander(convolutions(), learnable=False), 0.1, 0.0)
    assert len(only["params"]) == len(list(convolutions().parameters()))


def test_training_learns_the_scales_and_keeps_the_bound() -> None:
    model = apply_weight_compander(perceptron(), steepness=4.0)
    x = torch.randn(30, 6, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(weight_compander_param_groups(model, lr=0.1, weight_decay=1e-3), momentum=0.9)
    before, losses = compander_report(model), []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, layer in compander_report(model).items():
        assert layer.a != before[name].a
        assert layer.b != before[name].b
        assert layer.largest < layer.bound


def test_report_counts_small_and_saturated_weights() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -0.005, 0.3, -0.99 * torch.pi / 2]]))
    report = compander_report(apply_weight_compander(model, a=1.0, b=0.5))["weight"]
    assert (report.near_zero, report.saturated) == (0.5, 0.25)
    assert (report.a, report.b, report.bound) == pytest.approx((1.0, 0.5, torch.pi / 2))
    assert report.largest == pytest.approx(0.99 * torch.pi / 2, rel=1e-5)
    assert compander_report(model, near_zero=0.5)["weight"].near_zero == 0.75


def test_copies_and_state_dicts_compute_the_same() -> None:
    model, x = apply_weight_compander(convolutions().eval()), torch.randn(2, 3, 5, 5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].parametrizations.weight.original.mul_(2)
    assert not torch.equal(twin(x), model(x))
    other = apply_weight_compander(convolutions().eval(), a=3.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_compiled_and_mixed_precision_networks_agree() -> None:
    model, x = apply_weight_compander(perceptron().float()), torch.randn(4, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05)
    mixed.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    wrapped = torch.compile(perceptron(), backend="aot_eager")
    apply_weight_compander(wrapped)
    assert list(compander_report(wrapped)) == ["0.weight", "2.weight"]


def test_scales_that_would_not_be_synchronized_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(perceptron())
        with pytest.raises(ValueError, match="before DistributedDataParallel"):
            apply_weight_compander(wrapped)
        apply_weight_compander(wrapped, learnable=False)
        assert list(compander_report(wrapped)) == ["0.weight", "2.weight"]
        nn.parallel.DistributedDataParallel(apply_weight_compander(perceptron()))(
            torch.randn(2, 6).double()
        ).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_weight_is_computed_once_inside_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = apply_weight_compander(nn.Linear(4, 4)), torch.randn(2, 4)
    calls: list[int] = []
    forward = WeightCompander.forward
    monkeypatch.setattr(WeightCompander, "forward", lambda self, v: calls.append(1) or forward(self, v))
    with parametrize.cached():
        for _ in range(3):
            x = cell(x).tanh()
    assert len(calls) == 1
