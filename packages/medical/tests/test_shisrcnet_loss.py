"""The loss of SHISRCNet: its terms, what each of them reads, and weights of zero."""

import torch

from poise.core.functional import focal_loss, nt_xent
from poise.medical import (
    SHISRCLoss,
    SHISRCNet,
    SHISRCOutput,
    SRResNetMFE,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small(**arguments):
    torch.manual_seed(0)
    return SHISRCNet(2, upscaler=SRResNetMFE(2, width=8, blocks=1), **arguments)


def output_of(seed=0, with_hr=True):
    sr = uniform(3, 3, 8, 8, seed=seed)
    logits, features = normal(3, 2, seed=seed), normal(3, 5, seed=seed + 1)
    if not with_hr:
        return SHISRCOutput(sr, logits, features)
    return SHISRCOutput(sr, logits, features, normal(3, 2, seed=seed + 2), normal(3, 5, seed=seed + 3))


def test_loss_is_the_weighted_sum_of_its_terms():
    output, hr, labels = output_of(), uniform(3, 3, 8, 8, seed=9), torch.tensor([1, 0, 1])
    terms = SHISRCLoss()(output, hr, labels)
    torch.testing.assert_close(terms["sr"], (output.sr - hr).abs().mean())
    focal = [focal_loss(logits, labels, 5.0) for logits in (output.logits, output.hr_logits)]
    torch.testing.assert_close(terms["classification"], (focal[0] + focal[1]) / 2)
    torch.testing.assert_close(terms["contrastive"], nt_xent(output.features, output.hr_features, 2.0))
    expected = 0.6 * terms["sr"] + 0.3 * terms["classification"] + 0.1 * terms["contrastive"]
    torch.testing.assert_close(terms["loss"], expected)


def test_focal_reads_logits_and_the_contrastive_term_reads_features():
    output, hr, labels = output_of(), uniform(3, 3, 8, 8, seed=9), torch.tensor([1, 0, 1])
    tensors = {
        name: getattr(output, name).requires_grad_() for name in ("logits", "features", "hr_logits", "hr_features")
    }
    terms = SHISRCLoss()(output, hr, labels)
    for term, readers in (("classification", {"logits", "hr_logits"}), ("contrastive", {"features", "hr_features"})):
        found = torch.autograd.grad(terms[term], list(tensors.values()), allow_unused=True)
        assert {name for name, gradient in zip(tensors, found, strict=True) if gradient is not None} == readers


def test_without_high_resolution_there_is_no_contrastive_term_and_classification_is_that_of_one_view():
    output, hr, labels = output_of(with_hr=False), uniform(3, 3, 8, 8, seed=9), torch.tensor([1, 0, 1])
    terms = SHISRCLoss()(output, hr, labels)
    assert terms.keys() == {"loss", "sr", "classification"}
    torch.testing.assert_close(terms["classification"], focal_loss(output.logits, labels, 5.0))


def test_a_term_of_weight_zero_is_not_computed(monkeypatch):
    monkeypatch.setattr("poise.medical.histopathology.shisrcnet.losses.nt_xent", None)
    output, hr, labels = output_of(), uniform(3, 3, 8, 8, seed=9), torch.tensor([1, 0, 1])
    assert SHISRCLoss(w_con=0)(output, hr, labels).keys() == {"loss", "sr", "classification"}
    nothing = SHISRCLoss(0, 0, 0)(output, hr, labels)
    assert nothing == {"loss": torch.tensor(0.0)}


def test_training_on_one_batch_lowers_every_term():
    torch.manual_seed(0)
    model, criterion = small(), SHISRCLoss()
    lr, hr, labels = uniform(4, 3, 16, 16), uniform(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    history = []
    for _ in range(30):
        terms = criterion(model(lr, hr), hr, labels)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    assert all(history[-1][name] < history[0][name] for name in ("loss", "sr", "classification", "contrastive"))
