"""The models that AEM regularizes: a padded batch is a loop over bags, attention is read in one form, other libraries agree."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from poise.medical import (
    ABMIL,
    DSMIL,
    AttentionEntropyLoss,
    Bag,
    FromMONAI,
    FromTorchmil,
    GatedAttention,
    QueryAttention,
    Subsample,
    TransMIL,
    collate_bags,
)
from poise.medical.mil.nystrom import NystromAttention, pseudo_inverse

SIZES = (7, 1, 30, 12, 2, 5)
WIDTH = 16
MODELS = {
    "gated": lambda: ABMIL(WIDTH, 16, 3, att_dim=8),
    "plain": lambda: ABMIL(WIDTH, 16, 3, "plain", att_dim=8),
    "multihead": lambda: ABMIL(WIDTH, 16, 3, "multihead"),
    "gated in chunks": lambda: ABMIL(WIDTH, 16, 3, chunk=4),
    "multihead in chunks": lambda: ABMIL(WIDTH, 16, 3, "multihead", chunk=4),
    "dsmil": lambda: DSMIL(WIDTH, 3),
    "transmil": lambda: TransMIL(WIDTH, 16, 3),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bags():
    return [Bag(normal(size, WIDTH, seed=size), label=size % 3) for size in SIZES]


@pytest.fixture(params=MODELS, name="model")
def _model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


def loss_and_gradient(model, features, mask, labels):
    reading, aem = model.read(features, mask), AttentionEntropyLoss(0.3)
    loss = reading.loss(labels) + aem(reading.scores, mask)
    return reading, loss, torch.autograd.grad(loss, list(model.parameters()))


def test_a_padded_batch_is_a_loop_over_bags(model):
    batch = collate_bags(bags())
    reading, loss, gradients = loss_and_gradient(model, batch.features, batch.mask, batch.labels)
    alone = [loss_and_gradient(model, bag.features[None], None, torch.tensor([bag.label])) for bag in bags()]
    tight = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(reading.logits, torch.cat([each[0].logits for each in alone]), **tight)
    torch.testing.assert_close(loss, torch.stack([each[1] for each in alone]).mean(), **tight)
    for index, together in enumerate(gradients):
        torch.testing.assert_close(together, torch.stack([each[2][index] for each in alone]).mean(0), **tight)
    weights = reading.weights(batch.mask)
    for index, (size, each) in enumerate(zip(SIZES, alone, strict=True)):
        torch.testing.assert_close(weights[index, :, :size], each[0].weights()[0], **tight)
        assert not weights[index, :, size:].any()


def test_what_padding_holds_does_not_matter(model):
    batch = collate_bags(bags())
    filled = batch.features.masked_fill(~batch.mask.unsqueeze(-1), 7.0)
    _, loss, gradients = loss_and_gradient(model, batch.features, batch.mask, batch.labels)
    _, other, others = loss_and_gradient(model, filled, batch.mask, batch.labels)
    torch.testing.assert_close(loss, other, atol=1e-12, rtol=0)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transmil"])
def test_order_of_instances_matters_only_to_the_order_of_attention(name):
    torch.manual_seed(0)
    model, bag = MODELS[name]().double().eval(), normal(1, 20, WIDTH)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    one, two = model.read(bag), model.read(bag[:, order])
    torch.testing.assert_close(one.logits, two.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.scores[..., order], two.scores, atol=1e-12, rtol=0)


def test_real_instances_may_lie_anywhere_in_the_mask(model):
    bag, mask = normal(1, 9, WIDTH), torch.tensor([[True, False, True, True, False, False, True, True, False]])
    inside, alone = model.read(bag, mask), model.read(bag[mask][None])
    torch.testing.assert_close(inside.logits, alone.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(inside.weights(mask)[:, :, mask[0]], alone.weights(), atol=1e-12, rtol=0)


def test_forward_is_the_prediction_and_its_attention(model):
    batch = collate_bags(bags())
    reading = model.read(batch.features, batch.mask)
    assert torch.equal(model(batch.features, batch.mask), reading.logits)
    logits, scores = model(batch.features, batch.mask, return_attention=True)
    assert torch.equal(logits, reading.logits)
    assert torch.equal(scores, reading.scores)
    assert scores.shape[::2] == batch.mask.shape
    rows = reading.weights(batch.mask).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_gradient_of_the_penalty_reaches_the_embedding(model):
    reading = model.read(normal(2, 20, WIDTH))
    AttentionEntropyLoss(1.0)(reading.scores).backward()
    first = model.query if isinstance(model, DSMIL) else model.embed
    assert first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("attention", ["gated", "plain", "multihead"])
def test_chunks_change_memory_and_nothing_else(attention):
    torch.manual_seed(0)
    whole = ABMIL(WIDTH, 16, 2, attention).double().eval()
    pieces = ABMIL(WIDTH, 16, 2, attention, chunk=7).double().eval()
    pieces.load_state_dict(whole.state_dict())
    bag, labels = normal(1, 40, WIDTH), torch.tensor([1])
    one, two = (loss_and_gradient(model, bag, None, labels) for model in (whole, pieces))
    torch.testing.assert_close(one[0].logits, two[0].logits, atol=1e-12, rtol=0)
    for ours, theirs in zip(one[2], two[2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_memory_of_a_bag_in_chunks_does_not_grow_with_it():
    from poise.core.gpu import peak_memory

    model = ABMIL(64, 128, 2, chunk=512)

    def peak(instances):
        bag = torch.zeros(1, instances, 64)
        model.read(bag).loss(torch.tensor([0])).backward()
        return peak_memory(lambda: model.read(bag).loss(torch.tensor([0])).backward())

    assert peak(16_384) < 1.5 * peak(4_096)


def test_branches_pool_apart():
    pool = GatedAttention(WIDTH, 8, branches=3).double()
    scores, weights, pooled = pool(normal(2, 10, WIDTH))
    assert (scores.shape, weights.shape, pooled.shape) == ((2, 3, 10), (2, 3, 10), (2, 3, WIDTH))
    torch.testing.assert_close(pooled[:, 1], (weights[:, 1, :, None] * normal(2, 10, WIDTH)).sum(1))


def test_multihead_attention_is_that_of_torch():
    torch.manual_seed(0)
    pool = QueryAttention(WIDTH, heads=4).double().eval()
    torch.nn.init.normal_(pool.query)
    theirs = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True, dtype=torch.float64)
    parts = (pool.q_proj, pool.k_proj, pool.v_proj)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": pool.out_proj.weight,
            "out_proj.bias": pool.out_proj.bias,
        }
    )
    batch = collate_bags(bags())
    out, weights = theirs(
        pool.query.expand(len(SIZES), 1, -1),
        batch.features,
        batch.features,
        key_padding_mask=~batch.mask,
        average_attn_weights=False,
    )
    ours = pool(batch.features, batch.mask)
    torch.testing.assert_close(ours.weights, weights.squeeze(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.pooled, pool.norm(out.squeeze(1)), atol=1e-10, rtol=0)


# Landmark attention


def test_as_many_landmarks_as_tokens_give_exact_attention():
    torch.manual_seed(0)
    attention = NystromAttention(16, 2, landmarks=10, iterations=30, dropout=0.0).double()
    torch.nn.init.zeros_(attention.local.weight)
    tokens = normal(1, 10, 16)
    q, k, v = attention.to_qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out, scores = attention(tokens, torch.tensor([10]))
    torch.testing.assert_close(out, attention.to_out(exact), atol=1e-8, rtol=0)
    torch.testing.assert_close(scores, (q[:, :, 0, None] @ k.mT).squeeze(2) / 8**0.5)


def test_pseudo_inverse_of_each_matrix_does_not_depend_on_its_batch():
    matrices = normal(3, 6, 6).softmax(-1) * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None, None]
    together = pseudo_inverse(matrices, 40)
    torch.testing.assert_close(together[1], pseudo_inverse(matrices[1:2], 40)[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(together, torch.linalg.pinv(matrices), atol=1e-6, rtol=1e-6)


# Other libraries


@pytest.mark.parametrize("mode", ["att", "att_trans"])
def test_monai_model_says_what_it_said_and_shows_its_attention(mode):
    from monai.networks.nets import MILModel

    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, WIDTH, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    theirs = MILModel(3, mode, backbone=encoder, backbone_num_features=WIDTH).double().eval()
    model, images = FromMONAI(theirs), normal(2, 6, 3, 8, 8)
    reading = model.read(images)
    torch.testing.assert_close(reading.logits, theirs(images), atol=1e-12, rtol=0)
    features = theirs(images, no_head=True)
    torch.testing.assert_close(model.read(features).scores, reading.scores, atol=1e-12, rtol=0)
    if mode == "att":
        pooled = reading.weights() @ features
        torch.testing.assert_close(theirs.myfc(pooled.squeeze(1)), reading.logits, atol=1e-12, rtol=0)
    padded = torch.cat([images, images.new_full((2, 2, 3, 8, 8), 5.0)], 1)
    mask = torch.arange(8).expand(2, -1) < 6
    masked = model.read(padded, mask)
    torch.testing.assert_close(masked.logits, reading.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(masked.weights(mask)[..., :6], reading.weights(), atol=1e-10, rtol=0)
    AttentionEntropyLoss(0.1)(masked.scores, mask).backward()
    assert theirs.attention[0].weight.grad.abs().max() > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in theirs.modules())


def test_monai_model_without_attention_is_refused():
    from monai.networks.nets import MILModel

    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    with pytest.raises(ValueError, match="mode with attention, got 'mean'"):
        FromMONAI(MILModel(2, "mean", backbone=encoder, backbone_num_features=4))
    with pytest.raises(ValueError, match="mode with attention, got 'Linear'"):
        FromMONAI(torch.nn.Linear(2, 2))


def test_gated_attention_is_torchmils_scores_included():
    torchmil = pytest.importorskip("torchmil.nn")
    torch.manual_seed(0)
    theirs = torchmil.AttentionPool(in_dim=WIDTH, att_dim=8, gated=True).double()
    ours = GatedAttention(WIDTH, 8).double()
    (V, b_V), (U, b_U) = theirs.fc1.parameters(), theirs.fc_gated.parameters()
    state = {
        "V.weight": V,
        "V.bias": b_V,
        "U.weight": U,
        "U.bias": b_U,
        "w.weight": theirs.fc2.weight,
        "w.bias": torch.zeros(1),
    }
    ours.load_state_dict(state)
    batch = collate_bags(bags())
    pooled, scores = theirs(batch.features, batch.mask, return_att=True)
    reading = ours(batch.features, batch.mask)
    torch.testing.assert_close(reading.scores.squeeze(1), scores, atol=1e-12, rtol=0)
    torch.testing.assert_close(reading.pooled.squeeze(1), pooled, atol=1e-12, rtol=0)


def test_torchmil_model_is_read_as_two_classes():
    models = pytest.importorskip("torchmil.models")
    torch.manual_seed(0)
    theirs = models.ABMIL(in_shape=(WIDTH,), gated=True).double()
    batch = collate_bags(bags())
    labels = batch.labels.clamp(max=1)
    logit, scores = theirs(batch.features, batch.mask, return_att=True)
    reading = FromTorchmil(theirs).read(batch.features, batch.mask)
    torch.testing.assert_close(reading.scores.squeeze(1), scores)
    torch.testing.assert_close(reading.loss(labels), binary_cross_entropy_with_logits(logit, labels.double()))


# Bad input


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(2, 0, WIDTH), None, "empty bag"),
        (torch.zeros(4, WIDTH), None, r"\(bags, instances, features\)"),
        (torch.zeros(2, 3, 5), None, f"built for {WIDTH} features, got 5"),
        (torch.zeros(2, 3, WIDTH), torch.tensor([[True] * 3, [False] * 3]), "no instance of bag 1"),
        (torch.zeros(2, 3, WIDTH), torch.ones(2, 4, dtype=torch.bool), "mask must be"),
    ],
)
@pytest.mark.parametrize("name", ["gated", "dsmil", "transmil"])
def test_models_refuse_what_is_no_bag(name, features, mask, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name]()(features, mask)


def test_labels_without_a_class_are_refused():
    reading = ABMIL(WIDTH, 16, 2).read(torch.zeros(2, 3, WIDTH))
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
            reading.loss(torch.tensor(labels))


def test_settings_that_make_no_model_are_refused():
    with pytest.raises(ValueError, match="'gated', 'plain' or 'multihead'"):
        ABMIL(WIDTH, 16, 2, "mean")
    with pytest.raises(ValueError, match="multiple of heads"):
        ABMIL(WIDTH, 20, 2, "multihead")
    with pytest.raises(ValueError, match="multiple of heads"):
        TransMIL(WIDTH, 20, 2)
    with pytest.raises(ValueError, match="one logit per bag"):
        FromTorchmil(_TwoScores()).read(torch.zeros(2, 3, WIDTH))


class _TwoScores(torch.nn.Module):
    def forward(self, bags, mask=None, return_att=False):
        return bags[:, 0, 0], bags[:, :, :2]


# Subsampling


@pytest.mark.parametrize(("rho", "instances"), [(0.6, 30), (0.01, 30), (0.7, 1), (0.5, 7), (1.0, 5)])
def test_subsampling_keeps_the_right_number_of_distinct_instances(rho, instances):
    features = torch.arange(float(instances)).reshape(1, -1, 1).expand(3, -1, 2)
    kept, mask = Subsample(rho, torch.Generator().manual_seed(0))(features)
    assert mask is None
    assert kept.shape == (3, max(1, int(rho * instances)), 2)
    assert all(len(set(bag[:, 0].tolist())) == len(bag) for bag in kept)


def test_subsampling_of_a_padded_batch_counts_every_bag_by_itself():
    sizes = torch.tensor([30, 1, 7])
    mask = torch.arange(30) < sizes[:, None]
    features = torch.arange(1.0, 31.0).reshape(1, -1, 1) * mask.unsqueeze(-1)
    kept, real = Subsample(0.6, torch.Generator().manual_seed(0))(features, mask)
    assert real.sum(1).tolist() == [18, 1, 4]
    for bag, its, size in zip(kept, real, sizes.tolist(), strict=True):
        values = bag[its, 0].tolist()
        assert len(set(values)) == len(values)
        assert set(values) <= set(range(1, size + 1))


def test_subsampling_is_reproducible_and_off_in_evaluation():
    features = normal(2, 20, 3)
    one, two, three = (Subsample(0.5, torch.Generator().manual_seed(seed))(features)[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert Subsample(0.5).eval()(features)[0] is features
    for rho in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"rho must lie in \(0, 1\]"):
            Subsample(rho)
