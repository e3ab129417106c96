"""Adapter files: only the adapter, only for the model it belongs to; and LoRA as peft has it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from poise.core.adapters.checkpoint import load_adapter, read_adapter, save_adapter
from poise.core.adapters.handle import Adapters, adapted_layers
from poise.core.adapters.lora import LoRAConfig, LoRADelta, apply_lora
from poise.core.adapters.peft_format import load_peft_lora, save_peft_lora
from poise.core.adapters.sorsa import SorsaConfig, apply_sorsa


def pretrained(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5))
    return nn.Sequential(*layers).to(dtype)


def tuned(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = pretrained(dtype)
    targets = ("0", "2")
    if kind == "sorsa":
        apply_sorsa(model, SorsaConfig(r=3, alpha=6.0, target_modules=targets))
    else:
        init = "pissa" if kind == "pissa" else "standard"
        apply_lora(model, LoRAConfig(r=3, alpha=6.0, target_modules=targets, init=init, dropout=0.1))
    with torch.no_grad():
        for parameter in Adapters(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["lora", "pissa", "sorsa"])
@pytest.mark.parametrize("merged", [False, True])
def test_adapter_goes_to_a_file_and_back_onto_the_pretrained_model(kind: str, merged: bool, tmp_path: Path) -> None:
    model = tuned(kind)
    if merged:
        Adapters(model).merge()
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = pretrained().eval()
    before = fresh(X)
    adapters = load_adapter(fresh, tmp_path / "a.safetensors")
    fresh.eval()
    torch.testing.assert_close(fresh(X), model(X))
    assert {id(p) for p in fresh.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    for ours, theirs in zip(adapters.parameters(), Adapters(model).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with adapters.disabled():
        torch.testing.assert_close(fresh(X), before)


def test_loading_again_keeps_the_parameters_of_the_optimizer(tmp_path: Path) -> None:
    model = tuned("sorsa")
    save_adapter(model, tmp_path / "a.safetensors")
    expected, parameters = model(X), Adapters(model).parameters()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    load_adapter(model, tmp_path / "a.safetensors")
    assert [id(p) for p in Adapters(model).parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(model(X), expected)


def test_file_holds_the_adapter_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    for kind, factor in (("lora", 1), ("sorsa", 2)):  # SORSA keeps what it took, too
        adapted = copy.deepcopy(model)
        if kind == "lora":
            apply_lora(adapted, LoRAConfig(r=4))
        else:
            apply_sorsa(adapted, SorsaConfig(r=4))
        save_adapter(adapted, tmp_path / kind)
        trained = sum(p.numel() for p in Adapters(adapted).parameters())
        assert (tmp_path / kind).stat().st_size <= factor * 4 * trained + 2_000


def test_file_is_safetensors_with_a_header(tmp_path: Path) -> None:
    save_adapter(tuned("sorsa"), tmp_path / "a", "default")
    header, tensors = read_adapter(tmp_path / "a")
    assert header["layers"]["2"] == {
        "kind": "sorsa",
        "rank": 3,
        "scale": 2.0,
        "dropout": 0.0,
        "rows": None,
        "takes": 2.0,
    }
    assert {key for key in tensors if key.startswith("2.")} == {
        f"2.{n}" for n in ("u", "s", "v", "taken_up", "taken_down")
    }


def test_wrong_model_is_told_layer_by_layer_and_stays_as_it_was(tmp_path: Path) -> None:
    save_adapter(tuned("sorsa"), tmp_path / "a")
    other = pretrained()
    other[0] = nn.LayerNorm(4)
    other[2] = nn.Linear(24, 17).double()
    with pytest.raises(
        ValueError, match=r"does not match the model: 0: it is a LayerNorm in the model; 2: tensors of other shapes"
    ):
        load_adapter(other, tmp_path / "a")
    with pytest.raises(ValueError, match="0: it is a Sequential in the model; 2: there is no such layer in the model"):
        load_adapter(nn.Sequential(nn.Sequential()), tmp_path / "a")
    moved = pretrained()
    with torch.no_grad():
        moved[2].weight.add_(0.1 * torch.randn_like(moved[2].weight))
    with pytest.raises(ValueError, match=r"model: 2: its pretrained weight is another"):
        load_adapter(moved, tmp_path / "a")
    assert not adapted_layers(moved)
    assert all(parameter.requires_grad for parameter in moved.parameters())


def test_half_model_takes_its_own_adapter(tmp_path: Path) -> None:
    model = tuned("sorsa", torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    fresh = pretrained(torch.bfloat16)
    load_adapter(fresh, tmp_path / "a")
    fresh.eval()
    torch.testing.assert_close(fresh(X.bfloat16()), model(X.bfloat16()), rtol=0.05, atol=0.05)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_adapter(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_adapter(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not an adapter file of version 1"):
        read_adapter(tmp_path / "other")
    with pytest.raises(ValueError, match="no adapter 'default'"):
        save_adapter(pretrained(), tmp_path / "b")
    with pytest.raises(TypeError, match="0: SorsaDelta is not among the kinds"):
        save_adapter(tuned("sorsa"), tmp_path / "b", kinds={"lora": LoRADelta})


# The format of peft


@pytest.mark.parametrize("kind", ["lora", "pissa", "sorsa"])
def test_peft_checkpoint_round_trip_onto_the_pretrained_model(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    save_peft_lora(model, tmp_path, base_model="base")
    fresh = pretrained().eval()
    adapters = load_peft_lora(fresh, tmp_path)
    fresh.eval()
    torch.testing.assert_close(fresh(X), model(X))
    assert {delta.rank for delta in adapters.deltas.values()} == {3 if kind == "lora" else 6}


@pytest.mark.parametrize("kind", ["lora", "sorsa"])
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tuned(kind)
    save_peft_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(pretrained(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"patterns": True}])
def test_checkpoint_of_peft_is_read(settings: dict[str, object], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"0": 2}, "alpha_pattern": {"0": 10}} if settings.pop("patterns", False) else {}
    base = pretrained(torch.float32)
    targets = ["2"] if "init_lora_weights" in settings else ["0", "2"]  # peft's PiSSA has no convolutions
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings, **patterns)
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path)
    ours = pretrained(torch.float32)
    load_peft_lora(ours, tmp_path)
    torch.testing.assert_close(ours.eval()(X.float()), theirs(X.float()), rtol=0, atol=1e-5)


def test_checkpoints_that_are_no_plain_lora_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_peft_lora(pretrained(), tmp_path)
    save_peft_lora(tuned("lora"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "of the type LORA, got 'IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "it trains biases"),
        ({"modules_to_save": ["head"]}, "whole modules"),
        ({"init_lora_weights": "corda"}, "changes the pretrained weight"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_peft_lora(pretrained(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = pretrained()
    other[2] = nn.Linear(24, 17)
    with pytest.raises(ValueError, match="2: its weight is 16 x 24 in the checkpoint, 17 x 24 in the model"):
        load_peft_lora(other, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file(state | {"base_model.model.e.lora_embedding_A": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"it has a tensor 'base_model\.model\.e\.lora_embedding_A'"):
        load_peft_lora(pretrained(), tmp_path)


def test_what_peft_cannot_express_is_refused(tmp_path: Path) -> None:
    model = apply_lora(pretrained(), LoRAConfig(r=2, target_modules="2", rows=(0, 8)))
    with pytest.raises(ValueError, match=r"2: peft adapts whole layers, this adapter has rows \(0, 8\)"):
        save_peft_lora(model, tmp_path)
    grouped = apply_lora(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoRAConfig(r=2, target_modules="0"))
    with pytest.raises(ValueError, match="0: peft has another form of adapters for grouped"):
        save_peft_lora(grouped, tmp_path)
    save_adapter(model, tmp_path / "rows")
    fresh = pretrained()
    load_adapter(fresh, tmp_path / "rows")
    assert torch.equal(fresh(X), model(X))
