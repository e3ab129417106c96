"""Choosing layers by name and kind, and replacing them."""

import re

import pytest
import torch
from torch import nn

from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.targets import (
    as_weight,
    find_targets,
    layer_kind,
    replace_module,
    tied_layers,
    weight_matrix,
)


class Conv1D(nn.Module):
    """Shaped as the layer of transformers: the weight is stored as (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def block() -> nn.ModuleDict:
    attention = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    return nn.ModuleDict({"attention": attention, "fc": Conv1D(8, 4), "conv": nn.Conv2d(1, 2, 3)})


@pytest.fixture
def model() -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 2)})


def test_all_linear_takes_linear_and_conv1d_layers_in_the_models_order(model: nn.Module) -> None:
    assert list(find_targets(model)) == [
        *("blocks.0.attention.query", "blocks.0.attention.key", "blocks.0.fc"),
        *("blocks.1.attention.query", "blocks.1.attention.key", "blocks.1.fc"),
        "head",
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("query", ["blocks.0.attention.query", "blocks.1.attention.query"]),
        ("0.attention.query", ["blocks.0.attention.query"]),
        ("uery", None),
        ("blocks.1.*", ["blocks.1.fc", "blocks.1.conv"]),
        ("1.attention.?ey", ["blocks.1.attention.key"]),
        (re.compile(r"blocks\.\d\.attention\.(query|key)"), ["blocks.0.attention.query", "blocks.0.attention.key"] * 2),
        (lambda name, module: isinstance(module, nn.Conv2d), ["blocks.0.conv", "blocks.1.conv"]),
        (["head", "0.fc"], ["blocks.0.fc", "head"]),
    ],
)
def test_pattern_matches_a_name_or_its_end(model: nn.Module, pattern: object, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(ValueError, match=r"no layer matches 'uery'; names like it: \['query'"):
            find_targets(model, pattern)
    else:
        expected = (
            {name.replace("blocks.0", f"blocks.{turn // 2}") for turn, name in enumerate(names)}
            if len(names) == 4
            else set(names)
        )
        assert set(find_targets(model, pattern)) == expected


def test_exclude_wins_and_types_restrict(model: nn.Module) -> None:
    assert "head" not in find_targets(model, "all-linear", exclude="head")
    assert list(find_targets(model, types=(nn.Linear,), exclude=("attention.*", "absent"))) == ["head"]


def test_nothing_to_adapt_is_an_error_that_says_why(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="matches only LayerNorm, expected Linear"):
        find_targets(model, "norm")
    with pytest.raises(ValueError, match="no layer is left"):
        find_targets(model, "head", exclude="head")
    with pytest.raises(ValueError, match="exclude names single layers"):
        find_targets(model, exclude="all-linear")


def test_tied_weight_is_left_out_of_all_linear_and_refused_by_name() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "decoder": nn.Linear(4, 5, False)})
    model["decoder"].weight = model["embedding"].weight
    assert tied_layers(model) == {"decoder": ("embedding.weight",)}
    assert list(find_targets(model)) == ["body"]
    with pytest.raises(ValueError, match=r"'decoder' is shared with 'embedding.weight'"):
        find_targets(model, "decoder")
    assert list(find_targets(model, "decoder", tied="allow")) == ["decoder"]


def test_one_module_under_two_names_is_given_once_and_replaced_everywhere() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert list(find_targets(model)) == ["a"]
    new = nn.Linear(3, 3)
    replace_module(model, shared, new)
    assert model["a"] is new
    assert model["b"][0] is new
    with pytest.raises(ValueError, match="not inside the model"):
        replace_module(model, shared, new)


def test_output_embeddings_of_a_language_model_are_left_out_of_all_linear() -> None:
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    assert list(find_targets(LM())) == ["body"]
    assert list(find_targets(LM(), "lm_head")) == ["lm_head"]


def test_adapted_layers_are_found_and_their_insides_are_not(model: nn.Module) -> None:
    model["head"] = AdaptedLayer(model["head"])
    assert "head" in find_targets(model)
    assert not any("base" in name for name in find_targets(model))
    assert layer_kind(model["head"]) == "linear"


def test_quantised_weight_is_refused(model: nn.Module) -> None:
    model["head"].weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'head' has a weight of torch.int8"):
        find_targets(model, "head")


def test_weight_matrix_has_a_row_per_output_and_goes_back() -> None:
    for layer, shape in ((nn.Linear(3, 5), (5, 3)), (Conv1D(5, 3), (5, 3)), (nn.Conv2d(2, 6, (3, 1)), (6, 6))):
        matrix = weight_matrix(layer)
        assert matrix.shape == shape
        assert torch.equal(as_weight(layer, matrix), layer.weight)
    with pytest.raises(TypeError, match="module must be a Linear, Conv2d or Conv1D layer, got LayerNorm"):
        weight_matrix(nn.LayerNorm(3))
