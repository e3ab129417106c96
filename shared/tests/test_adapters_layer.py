"""A layer with deltas: the same function merged or not, exact restoring, state, devices of its life."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.delta import Delta
from poise.core.adapters.lora import LoRADelta
from poise.core.adapters.sorsa import SorsaDelta
from poise.core.adapters.targets import weight_matrix

CONVOLUTIONS: list[dict[str, object]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "groups": 4},
]


class Conv1D(nn.Module):
    """Computes as the layer of transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def perturbed(layer: nn.Module, make: Callable[..., Delta], **settings: object) -> AdaptedLayer:
    adapted = AdaptedLayer(layer)
    delta = make(layer, 2, **settings)
    adapted.add("default", delta)
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            if not name.startswith("taken_"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted


def lora(layer: nn.Module, rank: int, **settings: object) -> LoRADelta:
    return LoRADelta(layer, rank, 3.0, **settings)


def pissa(layer: nn.Module, rank: int) -> LoRADelta:
    return LoRADelta(layer, rank, init="pissa")


MAKERS = (lora, pissa, SorsaDelta)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 5), (3, 4, 6)),
        (lambda: nn.Linear(6, 5, bias=False), (6,)),
        (lambda: Conv1D(5, 6), (3, 6)),
        *((lambda s=s: nn.Conv2d(4, 8, **s), (2, 4, 6, 7)) for s in CONVOLUTIONS),
        (lambda: nn.Conv2d(4, 8, 3), (4, 6, 7)),
    ],
)
def test_forward_merged_forward_and_effective_weight_agree(
    make: Callable[..., Delta], layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain = layer().double()
    adapted, x = perturbed(plain, make), torch.randn(shape, dtype=torch.float64)
    y = adapted(x)
    reference = copy.deepcopy(plain)
    with torch.no_grad():
        reference.weight.copy_(adapted.weight)
    torch.testing.assert_close(y, reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapted.weight, plain.weight + adapted.delta_weight())
    adapted.merge()
    torch.testing.assert_close(adapted(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(adapted.weight, reference.weight)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_hundred_merges_and_unmerges_leave_every_bit(make: Callable[..., Delta], dtype: torch.dtype) -> None:
    adapted = perturbed(nn.Linear(6, 5).to(dtype), make)
    before = adapted.base.weight.clone()
    for _ in range(100):
        adapted.merge()
        adapted.merge()
        assert not torch.equal(adapted.base.weight, before)
        adapted.unmerge()
        adapted.unmerge()
    assert torch.equal(adapted.base.weight, before)
    assert not adapted.merged


@pytest.mark.parametrize("make", MAKERS)
def test_removing_gives_the_pretrained_layer_and_its_flags(make: Callable[..., Delta]) -> None:
    plain = nn.Linear(6, 5).double()
    plain.bias.requires_grad_(False)
    before = plain.weight.clone()
    adapted = perturbed(plain, make)
    plain.requires_grad_(False)
    adapted.remove("default")
    assert adapted.released() is plain
    torch.testing.assert_close(plain.weight, before, rtol=1e-12, atol=1e-12)
    assert plain.weight.requires_grad
    assert not plain.bias.requires_grad


def test_deltas_add_up_and_inactive_ones_do_not_count() -> None:
    torch.manual_seed(0)
    adapted = perturbed(nn.Linear(6, 5).double(), SorsaDelta)
    adapted.add("second", lora(adapted.base, 1))
    nn.init.normal_(adapted["second"].b)
    x = torch.randn(3, 6, dtype=torch.float64)
    both = adapted(x)
    first, second = adapted["default"].matrix(), adapted["second"].matrix()
    residual, taken = adapted.base.weight, adapted["default"].taken()
    torch.testing.assert_close(both, F.linear(x, residual + first + second, adapted.bias))
    adapted.activate("second")
    torch.testing.assert_close(adapted(x), F.linear(x, residual + taken + second, adapted.bias))
    adapted.merge()
    torch.testing.assert_close(adapted(x), F.linear(x, residual + taken + second, adapted.bias) * 0 + adapted(x))
    torch.testing.assert_close(adapted.weight, adapted.original + taken + second)
    adapted.unmerge()
    adapted.activate()
    torch.testing.assert_close(adapted(x), F.linear(x, residual + taken, adapted.bias))


def test_rows_leave_the_other_outputs_alone() -> None:
    plain = nn.Linear(4, 9)
    x = torch.randn(2, 4)
    before = plain(x)
    adapted = perturbed(plain, lora, rows=(3, 6))
    change = adapted(x) - before
    assert (change[:, 3:6].abs() > 0).all()
    assert torch.equal(change[:, :3], torch.zeros(2, 3))
    assert torch.equal(change[:, 6:], torch.zeros(2, 3))
    adapted.merge()
    torch.testing.assert_close(adapted(x), before + change)


def test_adapter_of_a_half_layer_is_kept_in_float32_and_the_output_is_of_the_layer() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    adapted = AdaptedLayer(layer)
    adapted.add("default", SorsaDelta(layer, 2))
    assert adapted["default"].u.dtype == torch.float32
    y = adapted(torch.randn(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted(torch.randn(3, 8)).dtype == torch.bfloat16


def test_state_is_that_of_the_unmerged_layer_and_loading_keeps_the_mode() -> None:
    torch.manual_seed(0)
    adapted = perturbed(nn.Linear(6, 5), SorsaDelta)
    x = torch.randn(3, 6)
    y, state = adapted(x), {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    adapted.merge()
    merged_state = adapted.state_dict()
    assert state.keys() == merged_state.keys()
    assert all(torch.equal(state[name], merged_state[name]) for name in state)
    file = io.BytesIO()
    torch.save(merged_state, file)
    file.seek(0)
    other = perturbed(nn.Linear(6, 5), SorsaDelta)
    other.merge()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.merged
    torch.testing.assert_close(other(x), y)
    other.unmerge()
    assert torch.equal(other.base.weight, state["base.weight"])


def test_deep_copy_is_independent_merged_or_not() -> None:
    adapted = perturbed(nn.Linear(6, 5), SorsaDelta)
    adapted.merge()
    twin = copy.deepcopy(adapted)
    twin.unmerge()
    assert adapted.merged
    with torch.no_grad():
        twin["default"].u.zero_()
    adapted.unmerge()
    assert twin["default"].u.abs().sum() == 0
    assert adapted["default"].u.abs().sum() > 0
    assert torch.equal(adapted.base.weight, twin.base.weight)


@pytest.mark.parametrize("make", MAKERS)
def test_compiled_layer_equals_eager(make: Callable[..., Delta]) -> None:
    adapted = perturbed(nn.Linear(6, 5).double(), make)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapted(x))
    gradients = [
        torch.autograd.grad(layer(x).square().sum(), [*adapted["default"].parameters()][-1])
        for layer in (compiled, adapted)
    ]
    torch.testing.assert_close(*gradients)


def test_moves_to_another_dtype_with_the_layer() -> None:
    adapted = perturbed(nn.Linear(6, 5), SorsaDelta)
    adapted.merge()
    adapted.double()
    assert {tensor.dtype for tensor in (*adapted.parameters(), adapted.original)} == {torch.float64}


def test_code_that_reads_the_weight_sees_the_change() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    plain = attention.out_proj
    attention.out_proj = perturbed(plain, lora)
    with torch.no_grad():
        y = attention.eval()(x, x, x)[0]
        plain.weight.copy_(attention.out_proj.weight)
        attention.out_proj = plain
        torch.testing.assert_close(attention(x, x, x)[0], y)


def test_attributes_of_the_layer_are_seen_through() -> None:
    adapted = AdaptedLayer(nn.Conv2d(2, 4, 3, stride=2))
    assert adapted.stride == (2, 2)
    assert adapted.out_channels == 4
    with pytest.raises(AttributeError, match="absent"):
        _ = adapted.absent


def test_checkpointed_activations_give_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    adapted = perturbed(nn.Linear(6, 5).double(), SorsaDelta)
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = torch.autograd.grad(adapted(x).square().sum(), adapted["default"].u)[0]
    again = torch.autograd.grad(checkpoint(adapted, x, use_reentrant=False).square().sum(), adapted["default"].u)[0]
    torch.testing.assert_close(plain, again)


def test_wrong_use_is_named() -> None:
    layer = nn.Linear(6, 5)
    with pytest.raises(TypeError, match="must be a Linear, Conv2d or Conv1D layer, got LayerNorm"):
        AdaptedLayer(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="got AdaptedLayer"):
        AdaptedLayer(AdaptedLayer(layer))
    adapted = AdaptedLayer(layer)
    adapted.add("a", LoRADelta(layer, 2))
    with pytest.raises(ValueError, match=r"name must be new and without dots, got 'a'"):
        adapted.add("a", LoRADelta(layer, 2))
    with pytest.raises(ValueError, match=r"the delta is for a weight of shape \(3, 4\)"):
        adapted.add("b", LoRADelta(nn.Linear(4, 3), 2))
    with pytest.raises(ValueError, match="there is no delta 'c'"):
        adapted.activate("c")
    adapted.merge()
    for change in (
        lambda: adapted.activate(),
        lambda: adapted.remove("a"),
        lambda: adapted.add("b", LoRADelta(layer, 2)),
    ):
        with pytest.raises(RuntimeError, match="unmerge it"):
            change()
    adapted.unmerge()
    adapted.enabled = False
    with pytest.raises(RuntimeError, match="switched off"):
        adapted.merge()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"r must lie in 1\.\.5"),
        ({"rank": 6}, r"r must lie in 1\.\.5"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"init": "pisa"}, "init must be"),
        ({"rows": (2, 9)}, "rows must be start and stop"),
        ({"rows": (2, 3)}, r"r must lie in 1\.\.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRADelta(nn.Linear(6, 5), **({"rank": 2} | settings))


def test_pissa_is_the_balanced_split_of_the_leading_triplets() -> None:
    layer = nn.Linear(9, 7).double()
    weight = layer.weight.detach().clone()
    delta = LoRADelta(layer, 3, alpha=6.0, init="pissa")
    a, b = delta.a.detach(), delta.b.detach()
    torch.testing.assert_close(a @ a.mT, b.mT @ b)
    torch.testing.assert_close(a @ a.mT, torch.diag(torch.linalg.svdvals(weight)[:3] / 2))
    assert torch.linalg.matrix_rank(weight - delta.matrix()) == 4
    assert torch.equal(weight_matrix(layer), weight)  # the layer is changed when the delta is added
