"""Attention entropy: the laws of the formula, and what the authors' code computes."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.schedule import Linear
from poise.medical import ABMIL, DSMIL, AttentionEntropyLoss, QueryAttention, attention_entropy

GOLDEN = Path(__file__).parent / "golden" / "aem"
SCORES = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(value, *tensors):
    return torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("instances", [1, 2, 50, 10_000])
def test_even_attention_has_the_largest_entropy_and_no_gradient(instances):
    scores = torch.full((1, instances), 0.7, dtype=torch.float64, requires_grad=True)
    entropy = attention_entropy(scores)
    assert entropy.item() == pytest.approx(math.log(instances), abs=1e-12)
    assert gradient(entropy.sum(), scores)[0].abs().max() < 1e-15
    assert attention_entropy(scores, normalize=True).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("gap", [1e2, 1e3, 1e4])
def test_attention_to_one_instance_has_loss_zero_without_nan(gap):
    scores = torch.zeros(1, 1, 6)
    scores[..., 2] = gap
    scores.requires_grad_()
    loss = AttentionEntropyLoss(1.0)(scores)
    assert loss.item() == pytest.approx(0, abs=1e-30)
    assert gradient(loss, scores)[0].isfinite().all()


def test_a_single_instance_has_loss_exactly_zero():
    scores = torch.tensor([[3.0]], requires_grad=True)
    aem = AttentionEntropyLoss(1.0)
    loss = aem(scores)
    assert loss.item() == 0
    assert gradient(loss, scores)[0].item() == 0
    assert aem.normalized_entropy.item() == 1


@given(SCORES, st.floats(-1e3, 1e3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_entropy_ignores_constants_and_order(values, constant, seed):
    scores = torch.tensor(values, dtype=torch.float64)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    entropy = attention_entropy(scores)
    torch.testing.assert_close(attention_entropy(scores + constant), entropy, atol=1e-9, rtol=0)
    torch.testing.assert_close(attention_entropy(scores[order]), entropy, atol=1e-12, rtol=0)
    assert -1e-12 <= entropy.item() <= math.log(len(values)) + 1e-12


@given(SCORES, st.integers(1, 4), st.floats(-50, 50))
@settings(max_examples=50, deadline=None)
def test_masked_instances_change_neither_value_nor_gradient(values, padding, filler):
    real = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    padded = torch.cat([real, torch.full((1, padding), filler, dtype=torch.float64)], 1)
    mask = torch.arange(padded.shape[1])[None] < len(values)
    for normalize in (False, True):
        alone, with_padding = (
            attention_entropy(real, normalize=normalize),
            attention_entropy(padded, mask, normalize=normalize),
        )
        torch.testing.assert_close(with_padding, alone, atol=1e-13, rtol=0)
        torch.testing.assert_close(
            gradient(with_padding.sum(), real)[0], gradient(alone.sum(), real)[0], atol=1e-13, rtol=0
        )


@given(SCORES)
@settings(max_examples=50, deadline=None)
def test_gradient_has_its_closed_form_and_entropy_is_that_of_torch(values):
    scores = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    entropy = attention_entropy(scores)
    a = scores.detach().softmax(0)
    log_a = scores.detach().log_softmax(0)
    torch.testing.assert_close(gradient(-entropy, scores)[0], a * (log_a + entropy.detach()), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=scores).entropy(), atol=1e-12, rtol=0)


def test_identical_heads_cost_what_one_does():
    scores = normal(3, 1, 9)
    aem = AttentionEntropyLoss(0.3)
    torch.testing.assert_close(aem(scores.expand(-1, 8, -1)), aem(scores), atol=1e-15, rtol=0)
    torch.testing.assert_close(aem(scores.squeeze(1)), aem(scores), atol=1e-15, rtol=0)


def test_a_mask_of_bags_is_shared_by_the_rows_even_when_rows_and_bags_are_as_many():
    scores = normal(2, 2, 5)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    each = torch.stack([attention_entropy(scores[0]), attention_entropy(scores[1, :, :2])])
    torch.testing.assert_close(attention_entropy(scores, mask), each)
    torch.testing.assert_close(attention_entropy(scores, mask[:, None].expand(-1, 2, -1)), each)
    torch.testing.assert_close(attention_entropy(scores.mT, mask[:, None].expand(-1, 2, -1).mT, dim=1), each)


def test_loss_of_a_padded_batch_is_the_mean_or_sum_over_its_bags():
    scores = normal(2, 3, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    mean, total = AttentionEntropyLoss(0.5), AttentionEntropyLoss(0.5, reduction="sum")
    each = [AttentionEntropyLoss(0.5)(one).item() for one in (scores[:1], scores[1:, :, :2])]
    assert mean(scores, mask).item() == pytest.approx(sum(each) / 2, abs=1e-14)
    assert total(scores, mask).item() == pytest.approx(sum(each), abs=1e-14)
    relative = attention_entropy(scores, mask, normalize=True)
    assert mean.normalized_entropy.item() == pytest.approx(relative.mean().item())
    assert mean.entropy.item() == pytest.approx(-mean.value.item())


def test_weight_zero_reproduces_plain_abmil_to_the_bit():
    def train(weight):
        torch.manual_seed(0)
        model = ABMIL(12, 16, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(5):
            reading = model.read(normal(1, 30, 12, seed=step, dtype=torch.float32))
            loss = reading.loss(torch.tensor([step % 2]))
            if weight is not None:
                loss = loss + AttentionEntropyLoss(weight)(reading.scores)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(train(None), train(0.0))
    assert not torch.equal(train(None), train(0.1))


def test_minimising_it_raises_the_entropy():
    scores = (5 * normal(2, 1, 20)).requires_grad_()
    optimizer, aem = torch.optim.SGD([scores], 5.0), AttentionEntropyLoss(1.0)
    entropies = []
    for _ in range(200):
        optimizer.zero_grad()
        aem(scores).backward()
        optimizer.step()
        entropies.append(aem.normalized_entropy.item())
    assert all(later >= earlier for earlier, later in itertools.pairwise(entropies))
    assert entropies[0] < 0.5 < 0.8 < entropies[-1]


def test_cosine_annealing_goes_from_the_weight_to_zero():
    aem = AttentionEntropyLoss(0.2, annealing="cosine", total_steps=10)
    weights = []
    for _ in range(12):
        weights.append(aem.weight)
        aem.step()
    assert weights[:11] == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 10)) for t in range(11)], abs=1e-15)
    assert weights[11] == 0
    assert AttentionEntropyLoss(Linear(0.0, 1.0, 4)).weight == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionEntropyLoss(-0.1), "not negative"),
        (lambda: AttentionEntropyLoss(0.1, annealing="linear"), "annealing must be"),
        (lambda: AttentionEntropyLoss(0.1, annealing="cosine"), "go together"),
        (lambda: AttentionEntropyLoss(0.1, total_steps=5), "go together"),
        (lambda: AttentionEntropyLoss(Linear(0, 1, 2), annealing="cosine", total_steps=5), "starts from a number"),
        (lambda: AttentionEntropyLoss(0.1, reduction="none"), "reduction must be"),
        (lambda: AttentionEntropyLoss(0.1)(torch.zeros(5)), r"\(bags, ..., instances\)"),
        (lambda: attention_entropy(torch.zeros(2, 0)), "at least one entry"),
        (lambda: attention_entropy(torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3])), "without entries"),
        (
            lambda: attention_entropy(torch.zeros(2, 4, 3), torch.ones(4, 3, dtype=torch.bool)),
            r"mask must be \(bags, instances\)",
        ),
        (
            lambda: attention_entropy(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool)),
            r"mask must be \(bags, instances\)",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# Against the authors' code


@pytest.fixture(params=["mil_small", "mil_peaked"], name="golden")
def _golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, check_dtype=False)


def load(module, golden, names):
    """Put the golden arrays into a module: our parameter name by theirs."""
    state = module.state_dict()
    assert state.keys() == names.keys()
    module.load_state_dict({ours: golden[theirs].reshape(state[ours].shape) for ours, theirs in names.items()})
    return module.double().eval()


def linear(ours, theirs, bias=True):
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias") if bias or part == "weight"}


def test_gated_abmil_gives_the_authors_loss_and_gradients(golden):
    classes = golden["abmil_logit"].shape[1]
    attention = linear("attention.V", "abmil.attention.attention_V.0")
    attention |= linear("attention.U", "abmil.attention.attention_U.0")
    attention |= linear("attention.w", "abmil.attention.attention_weights")
    names = {"embed.weight": "abmil.dimreduction.fc1.weight"} | attention | linear("classifier", "abmil.classifier.fc")
    model = load(ABMIL(12, 16, classes, att_dim=8).double(), golden, names)
    aem = AttentionEntropyLoss(golden["lam"].item())
    bag = golden["bag"][None].requires_grad_()
    reading = model.read(bag)
    bag_loss = reading.loss(golden["label"])
    loss = bag_loss + aem(reading.scores)
    close(reading.logits, golden["abmil_logit"])
    close(reading.scores[0], golden["abmil_attn_logit"])
    close(aem.value, golden["abmil_neg_entropy"])
    close(bag_loss, golden["abmil_ce"])
    close(loss, golden["abmil_loss"])
    parameters = dict(model.named_parameters())
    bag_gradient, *gradients = gradient(loss, bag, *(parameters[name] for name in attention))
    close(bag_gradient[0], golden["abmil_grad_bag"])
    for theirs, ours in zip(attention.values(), gradients, strict=True):
        close(ours, golden[theirs.replace("abmil.", "abmil_grad.", 1)])


def test_multihead_attention_gives_the_authors_loss(golden):
    classes = golden["mha_logit"].shape[1]
    names = {"embed.weight": "mha.dimreduction.fc1.weight", "attention.query": "mha.q"}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        names |= linear(f"attention.{part}", f"mha.attention.{part}")
    names |= linear("attention.norm", "mha.attention.layer_norm") | linear("classifier", "mha.classifier.fc")
    model = load(ABMIL(12, 16, classes, "multihead").double(), golden, names)
    aem = AttentionEntropyLoss(golden["lam"].item())
    reading = model.read(golden["bag"][None])
    close(reading.logits, golden["mha_logit"])
    close(reading.scores[0], golden["mha_attn_logit"])
    close(reading.loss(golden["label"]) + aem(reading.scores), golden["mha_loss"])
    close(aem.value, golden["mha_neg_entropy"])


def test_dsmil_gives_the_authors_loss(golden):
    classes = golden["dsmil_bag_logit"].shape[1]
    names = linear("instance_classifier", "dsmil.i_classifier.fc.0") | linear("query", "dsmil.b_classifier.q")
    names |= linear("bag_classifier", "dsmil.b_classifier.fcc")
    model = load(DSMIL(12, classes, att_dim=16).double(), golden, names)
    aem = AttentionEntropyLoss(golden["lam"].item())
    reading = model.read(golden["bag"][None])
    bag_loss = reading.loss(golden["label"])
    close(reading.instance_logits[0], golden["dsmil_instance_logit"])
    close(reading.streams[1], golden["dsmil_bag_logit"], 1e-6)
    close(reading.scores[0], golden["dsmil_attn_logit"], 1e-6)
    close(bag_loss, golden["dsmil_bag_loss"], 1e-6)
    close(bag_loss + aem(reading.scores), golden["dsmil_loss"], 1e-6)
    close(aem.value, golden["dsmil_neg_entropy"], 1e-6)
    mean = sum(stream.softmax(1) for stream in reading.streams) / 2
    close(reading.logits.exp(), mean, 1e-12)


def test_the_query_starts_at_a_millionth_so_that_attention_starts_even():
    torch.manual_seed(0)
    pool = QueryAttention(64)
    assert pool.query.std().item() == pytest.approx(1e-6, rel=0.3)
    with torch.no_grad():
        pool.q_proj.bias.zero_()
    assert attention_entropy(pool(normal(1, 100, 64, dtype=torch.float32)).scores, normalize=True).min() > 0.9999
