"""Cost of AEM: of a training step with and without it, of a padded batch against a loop over bags, of a very large bag, and against
torchmil.

uv run python tools/bench.py medical/aem
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from poise.core.bench import Case, Peer, case, peak_memory, peer
from poise.medical import ABMIL, AttentionEntropyLoss, BagModel, FromTorchmil

LAM = 0.1


def training_step(
    model: BagModel, bags: Tensor, labels: Tensor, aem: AttentionEntropyLoss | None
) -> Callable[[], Tensor]:
    """Forward, backward and an AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-5)

    def step() -> Tensor:
        reading = model.read(bags)
        loss = reading.loss(labels)
        if aem is not None:
            loss = loss + aem(reading.scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_and_without(instances: int, width: int, hidden: int, attention: str = "gated") -> Case:
    """A step of ABMIL on one bag."""
    torch.manual_seed(0)
    bag, label = torch.randn(1, instances, width), torch.tensor([1])
    model = ABMIL(width, hidden, 2, attention)
    return case(
        f"{attention} ABMIL step, a bag of {instances:,} x {width}, hidden {hidden}",
        training_step(model, bag, label, None),
        training_step(model, bag, label, AttentionEntropyLoss(LAM)),
        repeats=21,
    )


def entropy_in_batch_and_loop(bags: int = 64, instances: int = 200) -> Case:
    """The term and its gradient for a batch of bags, against one bag at a time (the plain call)."""
    torch.manual_seed(0)
    together = torch.randn(bags, 1, instances, requires_grad=True)
    alone = [bag.detach().unsqueeze(0).requires_grad_() for bag in together]
    aem = AttentionEntropyLoss(LAM)

    def loop() -> None:
        for scores in alone:
            (aem(scores) / bags).backward()

    name = f"AEM alone, {bags} bags of {instances}: batch against loop"
    return case(name, loop, lambda: aem(together).backward())


def batch_and_loop(width: int, hidden: int, att_dim: int, bags: int = 64, instances: int = 200) -> Case:
    """A training step on a padded batch, against a step per bag as in the paper (the plain call).

    A batch saves calls and nothing else: both do the same arithmetic, and the larger the network the more of the time that is.
    """
    torch.manual_seed(0)
    features, labels = torch.randn(bags, instances, width), torch.arange(bags) % 2
    mask = torch.ones(bags, instances, dtype=torch.bool)
    model, aem = ABMIL(width, hidden, 2, att_dim=att_dim), AttentionEntropyLoss(LAM)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-5)

    def step(part: Tensor, its_labels: Tensor, its_mask: Tensor | None) -> None:
        reading = model.read(part, its_mask)
        loss = reading.loss(its_labels) + aem(reading.scores, its_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def loop() -> None:
        for bag, label in zip(features.split(1), labels.split(1), strict=True):
            step(bag, label, None)

    name = f"{bags} bags of {instances} x {width}, hidden {hidden}, attention {att_dim}: a masked batch against a step per bag"
    return case(name, loop, lambda: step(features, labels, mask), repeats=7)


def large_bag(chunk: int, instances: int = 100_000, width: int = 1_024, hidden: int = 512) -> Case:
    """A step on a very large bag at once (the plain call), and in chunks; the bag itself, made before, is not counted."""
    torch.manual_seed(0)
    bag, label = torch.randn(1, instances, width), torch.tensor([1])
    whole, pieces = ABMIL(width, hidden, 2), ABMIL(width, hidden, 2, chunk=chunk)
    plain_ms, plain_mb = _measured_once(training_step(whole, bag, label, AttentionEntropyLoss(LAM)))
    method_ms, method_mb = _measured_once(training_step(pieces, bag, label, AttentionEntropyLoss(LAM)))
    size = bag.numel() * bag.element_size() / 1e6
    return Case(
        name=f"step on a bag of {instances:,} x {width} ({size:.0f} MB, not counted), hidden {hidden}: "
        f"in chunks of {chunk:,} against at once",
        plain_ms=plain_ms,
        method_ms=method_ms,
        ratio=method_ms / plain_ms,
        plain_mb=plain_mb,
        method_mb=method_mb,
    )


def _measured_once(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds and peak MB of one call: long enough not to need repetition."""
    start = time.perf_counter()
    memory = peak_memory(call)
    return 1e3 * (time.perf_counter() - start), memory


def against_torchmil(instances: int = 10_000, width: int = 384, hidden: int = 128) -> Peer:
    """A step of ABMIL without AEM, both of the same sizes and weights; then compare gradients of the attention."""
    from torchmil.models import ABMIL as TheirABMIL

    torch.manual_seed(0)
    first = torch.nn.Linear(width, hidden, bias=False)
    embed = torch.nn.Sequential(first, torch.nn.ReLU())
    theirs = TheirABMIL(in_shape=(width,), gated=True, feat_ext=embed)
    ours = ABMIL(width, hidden, 2)
    (V, b_V), (U, b_U) = theirs.pool.fc1.parameters(), theirs.pool.fc_gated.parameters()
    weight, bias = theirs.classifier.parameters()
    with torch.no_grad():
        state = {"embed.weight": first.weight, "attention.w.weight": theirs.pool.fc2.weight}
        state |= {"attention.V.weight": V, "attention.V.bias": b_V, "attention.U.weight": U, "attention.U.bias": b_U}
        state |= {"attention.w.bias": torch.zeros(1)}
        state |= {"classifier.weight": torch.cat([torch.zeros_like(weight), weight])}
        state |= {"classifier.bias": torch.cat([torch.zeros_like(bias), bias])}
        ours.load_state_dict(state)
    bag, label = torch.randn(1, instances, width), torch.tensor([1])
    mask = torch.ones(1, instances, dtype=torch.bool)

    def our_step() -> Tensor | None:
        ours.zero_grad()
        ours.read(bag).loss(label).backward()
        return ours.embed.weight.grad

    def their_step() -> Tensor | None:
        theirs.zero_grad()
        binary_cross_entropy_with_logits(theirs(bag, mask), label.float()).backward()
        return first.weight.grad

    name = (
        f"gated ABMIL, loss and gradient, a bag of {instances:,} x {width}, hidden {hidden}; agreement of the gradient"
    )
    return peer("torchmil", version("torchmil"), name, our_step, their_step, repeats=15)


def entropy_on_torchmil(instances: int = 10_000, width: int = 384) -> Case:
    """AEM on torchmil's own model."""
    from torchmil.models import ABMIL as TheirABMIL

    torch.manual_seed(0)
    embed = torch.nn.Sequential(torch.nn.Linear(width, 128, bias=False), torch.nn.ReLU())
    model = FromTorchmil(TheirABMIL(in_shape=(width,), gated=True, feat_ext=embed))
    bag, label = torch.randn(1, instances, width), torch.tensor([1])
    return case(
        f"torchmil's gated ABMIL step, a bag of {instances:,} x {width}, hidden 128",
        training_step(model, bag, label, None),
        training_step(model, bag, label, AttentionEntropyLoss(LAM)),
        repeats=21,
    )


def bench() -> dict[str, Any]:
    """All cases."""
    return {
        "method": "medical/aem",
        "cases": [
            with_and_without(10_000, 384, 128),
            with_and_without(10_000, 384, 128, "multihead"),
            entropy_on_torchmil(),
            entropy_in_batch_and_loop(),
            batch_and_loop(16, 16, 16),
            batch_and_loop(32, 64, 128),
            batch_and_loop(384, 128, 128),
            large_bag(chunk=4_096),
        ],
        "peers": [against_torchmil()],
    }
