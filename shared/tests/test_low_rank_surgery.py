"""Low-rank layers in whole networks: what is replaced, what is left and why, and checkpoints."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.low_rank import LowRankLinear, low_rank_factors, low_rank_tensors
from poise.core.adapters.low_rank_surgery import apply_low_rank


def perceptron() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 48, bias=False))
    return nn.Sequential(body, nn.LayerNorm(48), nn.Linear(48, 12))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_every_layer_keeps_its_share_and_the_report_counts_right() -> None:
    model = perceptron()
    small, report = apply_low_rank(model, 2, skip=("2",))
    assert [layer.name for layer in report.layers] == ["0.0.weight", "0.2.weight"]
    assert [(matrix.name, matrix.reason) for matrix in report.skipped] == [("2.weight", "named in skip")]
    for layer in report.layers:
        assert layer.kept <= layer.parameters / 2
    assert report.kept == sum(parameter.numel() for parameter in small.parameters())
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.share == report.kept / report.parameters
    assert f"{report.parameters} -> {report.kept}" in str(report).splitlines()[-1]


def test_the_reported_error_is_what_the_discarded_singular_values_hold() -> None:
    model = perceptron()
    _, report = apply_low_rank(model, 3)
    for layer in report.layers:
        values = torch.linalg.svdvals(model.get_parameter(layer.name).detach().double()).square()
        assert layer.error == pytest.approx(math.sqrt(float(values[layer.rank :].sum() / values.sum())), rel=1e-5)


def test_the_original_is_untouched_unless_asked() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    small, _ = apply_low_rank(model, 2)
    assert small is not model
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not set(small.parameters()) & set(model.parameters())
    assert apply_low_rank(model, 2, inplace=True).model is model
    assert isinstance(model[2], LowRankLinear)


def test_a_pattern_skips_a_module_with_all_inside() -> None:
    _, report = apply_low_rank(perceptron(), 2, skip=("0",))
    assert [layer.name for layer in report.layers] == ["2.weight"]
    with pytest.raises(ValueError, match="no module matches 'heads'"):
        apply_low_rank(perceptron(), 2, skip=("heads",))


def test_small_heads_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 9))
    small, report = apply_low_rank(model, 2)
    assert type(small[1]) is nn.Linear
    assert report.skipped[0].reason == "fewer than 10 outputs"
    assert isinstance(apply_low_rank(model, 2, min_out_features=9).model[1], LowRankLinear)


def test_a_layer_under_two_names_stays_one_layer() -> None:
    shared = nn.Linear(40, 40)
    small, report = apply_low_rank(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), 2)
    assert small["a"] is small["b"][0]
    assert len(report.layers) == 1


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 20)
            self.body = nn.Linear(20, 20)
            self.head = nn.Linear(20, 30, bias=False)
            self.head.weight = self.embed.weight

    small, report = apply_low_rank(Tied(), 2)
    assert small.head.weight is small.embed.weight
    assert [(matrix.name, matrix.reason) for matrix in report.skipped] == [("head.weight", "tied to another module")]


def test_layers_that_compute_otherwise_are_left_and_named() -> None:
    model = nn.Sequential(
        nn.Linear(40, 40), Own(40, 40), nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)), nn.Bilinear(4, 4, 40)
    )
    small, report = apply_low_rank(model, 2)
    reasons = {matrix.name: matrix.reason for matrix in report.skipped}
    assert reasons == {"1.weight": "Own has a forward of its own", "2.weight": "computed from other parameters"}
    again = apply_low_rank(nn.Sequential(small, nn.Linear(20, 20)), 2).report
    assert {matrix.reason for matrix in again.skipped if matrix.name == "0.0.weight"} == {"of low rank already"}


def test_layers_with_an_adapter_are_left_whole() -> None:
    model = nn.Sequential(nn.Linear(40, 40), AdaptedLayer(nn.Linear(40, 40)))
    small, report = apply_low_rank(model, 2)
    assert [(matrix.name, matrix.reason) for matrix in report.skipped] == [("1.weight", "carries an adapter")]
    assert isinstance(small[1], AdaptedLayer)


def test_ratios_out_of_range_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: ratio 30 leaves no rank .* or leave it out with skip"):
        apply_low_rank(nn.Sequential(nn.Linear(40, 40)), 30)
    with pytest.warns(UserWarning, match="above the full rank 20"), pytest.raises(ValueError, match="not smaller"):
        apply_low_rank(nn.Sequential(nn.Linear(20, 2000)), 0.9)


def test_nothing_to_factorise_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"LowRankLinear\.from_linear"):
        apply_low_rank(nn.Linear(20, 20), 2)
    with pytest.raises(ValueError, match=r"0\.weight: fewer than 10 outputs"):
        apply_low_rank(nn.Sequential(nn.Linear(20, 5)), 2)
    with pytest.raises(ValueError, match="it has no Linear layer"):
        apply_low_rank(nn.Sequential(nn.ReLU()), 2)


def test_a_checkpoint_loads_into_the_structure_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(perceptron(), nn.MultiheadAttention(12, 2))
    trained, _ = apply_low_rank(model, 2)

    def forbidden(*_: object) -> None:
        raise AssertionError("decomposed")

    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    rebuilt, report = apply_low_rank(model, 2, decompose=False)
    assert {layer.error for layer in report.layers} == {None}
    rebuilt.load_state_dict(trained.state_dict())
    x = torch.randn(5, 40)
    assert torch.equal(rebuilt[0](x), trained[0](x))
    tokens = torch.randn(3, 2, 12)
    assert torch.equal(rebuilt[1](tokens, tokens, tokens)[0], trained[1](tokens, tokens, tokens)[0])


@pytest.mark.parametrize("sizes", [{}, {"kdim": 20, "vdim": 14}])
@pytest.mark.parametrize("training", [True, False])
def test_attention_with_bare_projections_is_factorised(sizes: dict[str, int], training: bool) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True, **sizes).train(training)
    model = nn.ModuleDict({"attention": attention})
    small, report = apply_low_rank(model, 2)
    names = {layer.name.removeprefix("attention.") for layer in report.layers}
    bare = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if sizes else {"in_proj_weight"}
    assert names == bare | {"out_proj.weight"}
    inputs = [torch.randn(3, 4, width) for width in (16, sizes.get("kdim", 16), sizes.get("vdim", 16))]
    # the same attention with the products written into dense weights
    for name, tensor, module in low_rank_tensors(small):
        w1, w2 = low_rank_factors(module, tensor)
        model.get_submodule(name).get_parameter(tensor).data.copy_(w2 @ w1)
    expected, result = (net["attention"](*inputs)[0] for net in (model, small))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert report.kept < 0.6 * report.parameters
    if training:
        result.sum().backward()
        gradients = [parameter.grad for parameter in small.parameters()]
        assert all(gradient is not None for gradient in gradients)


def test_encoder_layers_of_pytorch_run_on_their_fast_path_too() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    small, report = apply_low_rank(encoder, 1.2)
    assert len(report.layers) == 8
    assert not report.skipped
    tokens = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = small(tokens)
    torch.testing.assert_close(fast, small(tokens).detach(), rtol=0, atol=1e-5)
    small.train()(tokens).sum().backward()


def test_a_deep_copy_of_a_factorised_attention_is_independent() -> None:
    small, _ = apply_low_rank(nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}), 2)
    twin = copy.deepcopy(small)
    assert not set(twin.parameters()) & set(small.parameters())
    assert torch.equal(twin["a"].in_proj_weight, small["a"].in_proj_weight)


def test_random_factors_come_from_the_generator() -> None:
    draws = [
        apply_low_rank(
            perceptron_of_ones(), 2, method="randomized", generator=torch.Generator().manual_seed(seed)
        ).model
        for seed in (1, 1, 2)
    ]
    first, same, other = (next(model.parameters()) for model in draws)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def perceptron_of_ones() -> nn.Sequential:
    torch.manual_seed(0)
    return perceptron()


# Libraries


def test_vision_transformer_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=20).eval()
    small, report = apply_low_rank(model, 2, skip=("head", "patch_embed", "**.norm*"))
    assert [layer.name for layer in report.layers][:4] == [
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert [matrix.name for matrix in report.skipped] == ["head.weight"]
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 20)


def test_swin_of_timm_with_the_published_skip_list() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=2,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=20,
    ).eval()
    skip = ("head", "patch_embed", "layers.*.downsample", "layers.*.blocks.*.attn.proj")
    small, report = apply_low_rank(model, 1.5, skip=skip)
    assert {layer.name.split(".", 4)[4] for layer in report.layers} == {
        "attn.qkv.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }
    assert {matrix.reason for matrix in report.skipped} == {"named in skip"}
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 20)


def test_vision_transformer_of_torchvision_whose_projections_are_bare() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=12).eval()
    small, report = apply_low_rank(model, 2, skip=("heads",))
    names = [layer.name for layer in report.layers if "layer_0" in layer.name]
    assert [name.removeprefix("encoder.layers.encoder_layer_0.") for name in names] == [
        "self_attention.in_proj_weight",
        "self_attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.3.weight",
    ]
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_transformers_of_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
        inputs = {"input_ids": torch.arange(12).view(2, 6)}
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
        inputs = {"input_ids": torch.arange(12).view(2, 6)}
    else:
        model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    model.eval()
    small, report = apply_low_rank(model, 2)
    assert report.share < 0.8
    assert len(report.layers) >= 8
    with torch.no_grad():
        assert small(**inputs)[0].shape == model(**inputs)[0].shape
    if kind == "gpt2":
        assert [(matrix.name, matrix.reason) for matrix in report.skipped] == [
            ("lm_head.weight", "tied to another module")
        ]
        assert small.lm_head.weight is small.transformer.wte.weight
