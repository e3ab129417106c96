"""Sample inputs that put every method of poise.medical under the workspace contract."""

from functools import partial

import torch

from poise.core.testing import Sample, randn
from poise.medical import (
    ABMIL,
    DSMIL,
    AttentionEntropyLoss,
    GatedAttention,
    QueryAttention,
    Subsample,
    TransMIL,
    attention_entropy,
)

MASK_IS_READ = "that every bag has an instance is read off the mask, which a fake tensor does not have"


def mask(_generator: torch.Generator) -> torch.Tensor:
    """The second of two bags of six instances has four."""
    return torch.arange(6) < torch.tensor([[6], [4]])


AEM = (
    Sample(
        name="aem/loss",
        build=lambda: AttentionEntropyLoss(0.7),
        inputs=lambda generator: (randn(generator, 2, 3, 6),),
    ),
    Sample(
        name="aem/loss_masked",
        build=lambda: AttentionEntropyLoss(0.7),
        inputs=lambda generator: (randn(generator, 2, 3, 6), mask(generator)),
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/loss_annealed_sum",
        build=lambda: AttentionEntropyLoss(0.7, annealing="cosine", total_steps=10, reduction="sum"),
        inputs=lambda generator: (randn(generator, 2, 6),),
    ),
    Sample(
        name="aem/entropy_relative",
        build=lambda: partial(attention_entropy, normalize=True),
        inputs=lambda generator: (randn(generator, 2, 3, 6), mask(generator)),
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/gated_attention",
        build=lambda: GatedAttention(4, 5, branches=2).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
    ),
    Sample(
        name="aem/query_attention",
        build=lambda: QueryAttention(4, heads=2, dropout=0.0).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4), mask(generator)),
        parameters=True,
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/abmil",
        build=lambda: ABMIL(4, 6, 2, att_dim=5).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
    ),
    Sample(
        name="aem/abmil_in_chunks",
        build=lambda: ABMIL(4, 6, 2, "plain", att_dim=5, chunk=4).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
        compile=False,
        reason="chunks are found out by running out of memory, which is caught as an error",
    ),
    Sample(
        name="aem/abmil_multihead_attention",
        build=lambda: partial(ABMIL(4, 6, 2, "multihead", heads=2, dropout=0.0).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
    Sample(
        name="aem/dsmil",
        build=lambda: partial(DSMIL(4, 2, att_dim=5).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
    Sample(
        name="aem/transmil",
        build=lambda: partial(TransMIL(4, 8, 2, heads=2, dropout=0.0).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        atol=1e-5,
    ),
    Sample(
        name="aem/subsample",
        build=lambda: Subsample(0.5),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
)

SAMPLES: tuple[Sample, ...] = AEM
