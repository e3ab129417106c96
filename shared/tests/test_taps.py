"""Taps must read exactly what flows, once, whatever wraps the network, and leave nothing behind."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.core.names import match_modules, plain_modules
from poise.core.taps import Taps


class Blocks(nn.Module):
    """Three blocks, checkpointed or not, with a residual stream."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            assert isinstance(y, Tensor)
            x = x + y
        return x


def blocks(reentrant: bool | None = None) -> Blocks:
    torch.manual_seed(0)
    return Blocks(reentrant)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def aligned_loss(model: nn.Module, taps: Taps, x: Tensor) -> Tensor:
    return model(x).square().sum() + taps["blocks.1"].sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def test_the_output_is_the_tensor_itself_with_its_graph(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.1") as taps:
        model(x)
        assert torch.equal(taps["blocks.1"], model.blocks[1](x + model.blocks[0](x)))
        taps["blocks.1"].sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == [
        f"blocks.{block}.0.{kind}" for block in (0, 1) for kind in ("weight", "bias")
    ]


def test_the_input_is_what_the_module_was_given(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.0", "blocks.2", at="input") as taps:
        out = model(x)
        assert taps["blocks.0"] is x
        torch.testing.assert_close(taps["blocks.2"] + model.blocks[2](taps["blocks.2"]), out)


def test_each_forward_pass_replaces_the_last(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.0") as taps:
        model(x)
        first = taps["blocks.0"]
        model(2 * x)
        assert len(taps.calls("blocks.0")) == 1
        assert not torch.equal(taps["blocks.0"], first)


def test_a_module_that_runs_twice_must_be_read_call_by_call(x: Tensor) -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    with Taps(model, "0") as taps:
        out = model(x)
        with pytest.raises(RuntimeError, match=r"module '0' ran 2 times in one forward pass: read calls\('0'\)"):
            taps["0"]
        assert [torch.equal(call, value) for call, value in zip(taps.calls("0"), (x.relu(), out), strict=True)] == [
            True,
            True,
        ]


@pytest.mark.parametrize("reentrant", [None, False])
def test_checkpointing_neither_duplicates_nor_changes_gradients(reentrant: bool | None, x: Tensor) -> None:
    plain, model = blocks(), blocks(reentrant)
    with Taps(plain, "blocks.1") as expected, Taps(model, "blocks.1", "blocks.1.0") as taps:
        aligned_loss(plain, expected, x).backward()
        aligned_loss(model, taps, x).backward()
        assert len(taps.calls("blocks.1")) == len(taps.calls("blocks.1.0")) == 1
        assert torch.equal(taps["blocks.1"], expected["blocks.1"])
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_of_the_whole_model_does_not_replace_the_values(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.1") as taps:
        out = checkpoint(model, x, use_reentrant=False)
        assert isinstance(out, Tensor)
        held = taps["blocks.1"]
        out.sum().backward()
        assert taps["blocks.1"] is held


def test_a_tensor_that_lost_its_graph_is_refused_unless_detached(x: Tensor) -> None:
    model = blocks(reentrant=True)
    with Taps(model, "blocks.1") as taps, Taps(model, "blocks.1", detach=True) as detached:
        model(x).sum().backward()
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            taps["blocks.1"]
        assert torch.equal(detached["blocks.1"], blocks().blocks[1](x + blocks().blocks[0](x)))
        with torch.no_grad():  # nothing is lost where nothing was wanted
            model(x)
        assert not taps["blocks.1"].requires_grad


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients_of_activations_equal_autograd(reentrant: bool | None, detach: bool, x: Tensor) -> None:
    reference, model = blocks(), blocks(reentrant)
    with Taps(reference, "blocks.*") as expected, Taps(model, "blocks.*", detach=detach, gradients=True) as taps:
        wanted = torch.autograd.grad(reference(x).square().sum(), list(expected.values()))
        model(x).square().sum().backward()
        for name, gradient in zip(taps, wanted, strict=True):
            (ours,) = taps.gradients(name)
            assert ours is not None
            torch.testing.assert_close(ours, gradient)


def test_gradients_under_reentrant_checkpointing_that_cannot_be_told_apart_are_refused(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(lambda y: self.inner(self.inner(y)), x, use_reentrant=True)

    model = Twice()
    with (
        Taps(model, "inner", gradients=True),
        pytest.raises(RuntimeError, match="'inner' ran 2 times under reentrant"),
    ):
        model(x).sum().backward()


def test_a_tensor_without_influence_has_no_gradient(x: Tensor) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    root = nn.Sequential(model["used"], model["unused"])
    with Taps(root, "0", "1", gradients=True) as taps:
        root(x)
        taps["0"].sum().backward()
        assert taps.gradients("1") == (None,)
        assert torch.equal(taps.gradients("0")[0], torch.ones(2, 4))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["output", "input"])
def test_compiled_whole_graph_gives_the_same_values_and_gradients(wrapped: bool, kind: str, x: Tensor) -> None:
    plain, model = blocks(), blocks()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        Taps(plain, "blocks.1", at=kind) as expected,
        Taps(compiled if wrapped else model, "blocks.1", at=kind) as taps,
    ):
        for _ in range(3):
            plain.zero_grad()
            model.zero_grad()
            aligned_loss(plain, expected, x).backward()
            aligned_loss(compiled, taps, x).backward()
            assert len(taps.calls("blocks.1")) == 1
            torch.testing.assert_close(taps["blocks.1"], expected["blocks.1"])
            for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
                torch.testing.assert_close(ours, theirs)
    compiled(x)
    assert taps._calls == {"blocks.1": []}  # compiled code that was traced with the hook records no more


def test_compiled_model_gives_gradients_of_activations(x: Tensor) -> None:
    reference, model = blocks(), blocks()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with Taps(reference, "blocks.1") as expected, Taps(model, "blocks.1", gradients=True) as taps:
        (wanted,) = torch.autograd.grad(reference(x).square().sum(), [expected["blocks.1"]])
        for _ in range(2):
            compiled(x).square().sum().backward()
            (ours,) = taps.gradients("blocks.1")
            assert ours is not None
            torch.testing.assert_close(ours, wanted)


def test_compiled_blocks_inside_a_checkpoint_are_recorded_once(x: Tensor) -> None:
    model = blocks(reentrant=False)
    for index, block in enumerate(model.blocks):
        compiled: Any = torch.compile(block, backend="aot_eager")
        model.blocks[index] = compiled
    with Taps(model, "blocks.1", "blocks.1.0") as taps:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            for _ in range(3):
                model(x).sum().backward()
                assert len(taps.calls("blocks.1")) == len(taps.calls("blocks.1.0")) == 1
        torch.compiler.reset()  # identical blocks now share compiled code, that of a block without a hook inside
        model(x)
        assert taps["blocks.1"].shape == (2, 4)
        with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False"):
            taps["blocks.1.0"]


def test_only_calls_within_a_forward_pass_count_unless_there_is_none(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.0") as taps:
        model.blocks[0](x)
        assert torch.equal(taps["blocks.0"], model.blocks[0](x))
        model(x)
        model.blocks[0](2 * x)
        assert torch.equal(taps["blocks.0"], model.blocks[0](x))


def test_attaching_after_compilation_says_what_to_do(x: Tensor) -> None:
    compiled: Any = torch.compile(blocks(), backend="aot_eager")
    compiled(x)
    with Taps(compiled, "blocks.1") as taps:
        compiled(x)
        with pytest.raises(RuntimeError, match=r"has not run .* torch.compiler.reset\(\)"):
            taps["blocks.1"]
        torch.compiler.reset()
        compiled(x)
        assert taps["blocks.1"].shape == (2, 4)


def test_hooks_and_tensors_are_gone_afterwards(x: Tensor) -> None:
    model = blocks()
    taps = Taps(model, "blocks.*", gradients=True)
    with taps:
        model(x)
        held = weakref.ref(taps["blocks.0"])
        assert hooks(model) == 5
    gc.collect()
    assert hooks(model) == 0
    assert held() is None
    taps.close()
    with taps, taps.attach():
        assert hooks(model) == 5
    assert hooks(model) == 0


def test_hooks_are_removed_and_recording_recovers_after_exceptions(x: Tensor) -> None:
    model = blocks()
    with pytest.raises(ZeroDivisionError), Taps(model, "blocks.1"):
        raise ZeroDivisionError
    assert hooks(model) == 0
    with Taps(model, "blocks.0") as taps:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(2, 5))
        model(x)
        assert taps["blocks.0"].shape == (2, 4)


def test_clear_frees_and_goes_on(x: Tensor) -> None:
    model = blocks()
    with Taps(model, "blocks.0") as taps:
        model(x)
        taps.clear()
        assert taps.calls("blocks.0") == ()
        model(x)
        assert taps["blocks.0"].shape == (2, 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: torch.load(save(model), weights_only=False)])
def test_copies_of_a_tapped_model_are_not_tapped(duplicate: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with Taps(model, "0") as taps:
        model(x)
        held = taps["0"]
        duplicate(model)(2 * x)
        assert taps["0"] is held


def save(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_overwriting_in_place_is_noticed_and_a_clone_is_safe(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    for detach in (False, True):
        with Taps(model, "0", "1", detach=detach) as taps, Taps(model, "0", detach=detach, clone=True) as safe:
            out = model(x)
            with pytest.raises(RuntimeError, match=r"'0' was overwritten in place: pass clone=True"):
                taps["0"]
            assert torch.equal(taps["1"], out)
            assert torch.equal(safe["0"], model[0](x))
            assert safe["0"].requires_grad is not detach


class Joint(nn.Module):
    """Returns and takes several things, as transformer blocks do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block = _Pair(kind)

    def forward(self, x: Tensor) -> Any:
        return self.block(x, temb=2 * x)


class _Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor, temb: Tensor) -> Any:
        if self.kind == "dict":
            return {"sample": hidden + 1, "other": None}
        return (None if self.kind == "none" else temb, hidden + 1)


@pytest.mark.parametrize(
    ("kind", "select"), [("tuple", 1), ("tuple", -1), ("none", None), ("dict", "sample"), ("dict", None)]
)
def test_select_takes_one_of_several_outputs(kind: str, select: Any, x: Tensor) -> None:
    model = Joint(kind)
    with Taps(model, "block", select=select) as taps:
        model(x)
        assert torch.equal(taps["block"], x + 1)


@pytest.mark.parametrize(("select", "factor"), [(0, 1), ("temb", 2), (lambda inputs: inputs["temb"].sum(), None)])
def test_select_takes_one_of_several_inputs(select: Any, factor: int | None, x: Tensor) -> None:
    model = Joint("tuple")
    with Taps(model, "block", at="input", select=select) as taps:
        model(x)
        assert torch.equal(taps["block"], factor * x if factor else (2 * x).sum())


def test_select_may_reduce_so_that_nothing_large_is_held(x: Tensor) -> None:
    def active(out: Tensor) -> Tensor:
        return (out > 0).sum()

    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(inplace=inplace))
        with Taps(model, "1", select=active) as taps:
            assert taps.names == ("1",)
            out = model(x)
            assert taps["1"].equal((out > 0).sum())


def test_ambiguous_or_wrong_selection_is_refused(x: Tensor) -> None:
    model = Joint("tuple")
    with (
        Taps(model, "block"),
        pytest.raises(TypeError, match=r"output of module 'block' holds 2 tensors \(\(Tensor, Tensor\)\): say which"),
    ):
        model(x)
    with (
        Taps(Joint("none"), "block", select=0) as taps,
        pytest.raises(TypeError, match=r"select=0 took NoneType from the output of module 'block'"),
    ):
        taps._model(x)


def test_inference_mode_is_read_too(x: Tensor) -> None:
    model = blocks()
    with torch.inference_mode(), Taps(model, "blocks.0") as taps:
        model(x)
        assert taps["blocks.0"].shape == (2, 4)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("blocks.*",), ["blocks.0", "blocks.1", "blocks.2"]),
        (("blocks.*.0",), ["blocks.0.0", "blocks.1.0", "blocks.2.0"]),
        (("**.1",), ["blocks.1", "blocks.0.1", "blocks.1.1", "blocks.2.1"]),
        (("blocks.2.**",), ["blocks.2.0", "blocks.2.1"]),
        (("blocks.?", "blocks.0"), ["blocks.0", "blocks.1", "blocks.2"]),
        (("", "blocks"), ["", "blocks"]),
    ],
)
def test_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    assert sorted(match_modules(blocks(), *patterns)) == sorted(names)


def test_wrappers_do_not_show_in_names() -> None:
    model = blocks()
    plain = list(plain_modules(model))
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert sorted(plain_modules(compiled)) == sorted(plain)
    assert plain_modules(compiled)[""] is compiled
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(compiled)
        assert sorted(plain_modules(wrapped)) == sorted(plain)
        with Taps(wrapped, "blocks.1") as taps:
            wrapped(torch.ones(2, 4)).sum().backward()
            assert taps["blocks.1"].shape == (2, 4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_of_the_users_own_named_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Sequential(nn.ReLU())})
    assert list(match_modules(model, "module.0")) == ["module.0"]


def test_bad_arguments_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"no module matches 'block.1'; names like it: \['blocks.1'"):
        Taps(blocks(), "block.1")
    with pytest.raises(ValueError, match="at least one name or pattern"):
        Taps(blocks())
    with pytest.raises(ValueError, match="at must be 'output' or 'input', got 'outputs'"):
        Taps(blocks(), "blocks.1", at="outputs")
    with pytest.raises(TypeError, match="DataParallel runs copies"):
        Taps(nn.DataParallel(blocks()), "blocks.1")
    with Taps(blocks(), "blocks.1") as taps:
        with pytest.raises(KeyError, match=r"no tap at 'blocks.0'; there are \['blocks.1'\]"):
            taps["blocks.0"]
        with pytest.raises(RuntimeError, match="make the taps with gradients=True"):
            taps.gradients("blocks.1")
