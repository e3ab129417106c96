"""SORSA in models of peft is SORSA, and peft's PiSSA starts from the same split."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from poise.core.adapters.lora import LoRAConfig, apply_lora
from poise.core.adapters.sorsa import SorsaConfig, apply_sorsa, sorsa_deltas
from poise.core.adapters.sorsa_peft import read_sorsa_lora_config, sorsa_lora_config
from poise.core.adapters.sorsa_penalty import SorsaRegularizer, sorsa_penalty

peft = pytest.importorskip("peft")

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))


def pretrained() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def factors(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_output_penalty_and_gradients_are_those_of_sorsa(alpha: float | None) -> None:
    ours = apply_sorsa(pretrained(), SorsaConfig(r=3, alpha=alpha, target_modules=("0", "2")))
    theirs = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0", "2"], alpha))
    with torch.no_grad():
        for number, delta in zip("02", sorsa_deltas(ours).values(), strict=True):
            layer = theirs.base_model.model[int(number)]
            noise = [0.1 * torch.randn_like(p) for p in (delta.u, delta.s, delta.v)]
            for parameter, step in zip((delta.u, delta.s, delta.v), noise, strict=True):
                parameter.add_(step)
            for parameter, step in zip(layer.singular_factors()[0], noise, strict=True):
                parameter.add_(step)
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(sorsa_penalty(ours), sorsa_penalty(theirs))
    (ours(X).square().sum() + SorsaRegularizer(ours, 0.1, lr=1.0)()).backward()
    (theirs(X).square().sum() + SorsaRegularizer(theirs, 0.1, lr=1.0)()).backward()
    layer = theirs.base_model.model[0]
    delta = sorsa_deltas(ours)["0"]
    for mine, other in zip((delta.u, delta.s, delta.v), layer.singular_factors()[0], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_only_the_triplets_are_trained() -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0"]))
    assert sum(p.numel() for p in factors(model)) == 3 * (12 + 16 + 1)


def test_merge_and_unload_gives_plain_layers() -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0", "2"]))
    perturb(model)
    y = model(X)
    merged = model.merge_and_unload()
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(merged(X), y)


def test_disabled_adapter_gives_the_pretrained_model() -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0", "2"]))
    perturb(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), pretrained()(X), rtol=0, atol=1e-5)
    assert (model(X) - pretrained()(X)).abs().max() > 1e-2


def test_merged_model_unmerges_to_rounding() -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0"]))
    perturb(model)
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y)


def test_saved_model_is_loaded_onto_the_pretrained_one(tmp_path: Path) -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0", "2"], alpha=6.0))
    perturb(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pretrained(), tmp_path, config=read_sorsa_lora_config(tmp_path))
    torch.testing.assert_close(again(X), model(X))


def test_second_adapter_can_be_added_and_chosen() -> None:
    model = peft.get_peft_model(pretrained(), sorsa_lora_config(3, ["0"]))
    perturb(model)
    y = model(X)
    model.add_adapter("second", sorsa_lora_config(2, ["0"]))
    torch.testing.assert_close(model(X), y)
    model.set_adapter("second")
    torch.testing.assert_close(model(X), pretrained()(X), rtol=0, atol=1e-5)


def test_conv1d_layers_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (2, 8))
    before = model(ids).logits
    adapted = peft.get_peft_model(copy.deepcopy(model), sorsa_lora_config(4, ["c_attn"])).eval()
    torch.testing.assert_close(adapted(ids).logits, before, rtol=0, atol=1e-5)
    perturb(adapted)
    y = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, y, rtol=0, atol=1e-5)


def test_split_is_that_of_pissa_in_peft() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(pretrained(), config).base_model.model[0]
    sorsa = apply_sorsa(pretrained(), SorsaConfig(r=3, target_modules="0"))[0]
    pissa = apply_lora(pretrained(), LoRAConfig(r=3, target_modules="0", init="pissa"))[0]
    for layer in (sorsa, pissa):
        torch.testing.assert_close(layer.base.weight, theirs.base_layer.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.delta_weight(), theirs.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="r must be at least 1"):
        sorsa_lora_config(0, ["0"])
    with pytest.raises(ValueError, match="alpha must be positive"):
        sorsa_lora_config(2, ["0"], alpha=0.0)
