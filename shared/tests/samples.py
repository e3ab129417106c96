"""Sample inputs that put poise.core under the workspace contract."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core import functional, gates
from poise.core.memory.ema import EMA
from poise.core.memory.features import FeatureBank
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import TopKRows
from poise.core.neighbors.search import nearest
from poise.core.testing import Sample, randn

ALL_MASKED = "a distribution without entries raises, which takes the values of the mask"
DISCRETE = "the forward pass is a step function; the gradient is that of the identity by definition"


def _mask(*shape: int) -> Tensor:
    """Two entries of every row at least, and not all."""
    columns = torch.arange(shape[-1]).expand(shape)
    lengths = 2 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) % (shape[-1] - 2)
    return columns < lengths


def _group_lasso(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return functional.group_lasso([[a, b], c], weights=[1.0, 0.5])


FUNCTIONAL = (
    Sample(name="functional/l1", build=lambda: functional.l1, inputs=lambda g: (randn(g, 4, 3),)),
    Sample(name="functional/squared_l2", build=lambda: functional.squared_l2, inputs=lambda g: (randn(g, 4, 3),)),
    Sample(name="functional/l2", build=lambda: partial(functional.l2, dim=-1), inputs=lambda g: (randn(g, 4, 3),)),
    Sample(
        name="functional/group_lasso",
        build=lambda: _group_lasso,
        inputs=lambda g: (randn(g, 3, 2), randn(g, 2, 4), randn(g, 5)),
        differentiable=(0, 1, 2),
    ),
    Sample(name="functional/hoyer_sparsity", build=lambda: functional.hoyer_sparsity, inputs=lambda g: (randn(g, 7),)),
    Sample(name="functional/hoyer_square", build=lambda: functional.hoyer_square, inputs=lambda g: (randn(g, 7),)),
    Sample(
        name="functional/polarization",
        build=lambda: partial(functional.polarization, t=1.2),
        inputs=lambda g: (randn(g, 9).abs(),),
    ),
    Sample(
        name="functional/consensus", build=lambda: functional.consensus, inputs=lambda g: (randn(g, 6, 4).sigmoid(),)
    ),
    Sample(
        name="functional/nuclear_norm", build=lambda: functional.nuclear_norm, inputs=lambda g: (randn(g, 2, 5, 3),)
    ),
    Sample(
        name="functional/nuclear_norm_of_low_rank",
        build=lambda: lambda a, b: functional.nuclear_norm(a @ b),
        inputs=lambda g: (randn(g, 5, 2), randn(g, 2, 4)),
        differentiable=(0, 1),
    ),
    Sample(name="functional/stable_rank", build=lambda: functional.stable_rank, inputs=lambda g: (randn(g, 2, 5, 3),)),
    Sample(
        name="functional/effective_rank", build=lambda: functional.effective_rank, inputs=lambda g: (randn(g, 2, 5, 3),)
    ),
    Sample(
        name="functional/orthonormality",
        build=lambda: partial(functional.orthonormality, along="columns"),
        inputs=lambda g: (randn(g, 2, 5, 3),),
    ),
    Sample(
        name="functional/total_variation",
        build=lambda: functional.total_variation,
        inputs=lambda g: (randn(g, 2, 3, 5, 4),),
    ),
    Sample(
        name="functional/total_variation_of_volumes",
        build=lambda: partial(functional.total_variation, kind="vectorial", spacing=(0.5, 1.0, 2.0), reduction="none"),
        inputs=lambda g: (randn(g, 2, 2, 3, 3, 4),),
    ),
    Sample(name="functional/entropy", build=lambda: functional.entropy, inputs=lambda g: (randn(g, 4, 5),)),
    Sample(
        name="functional/entropy_of_masked",
        build=lambda: functional.entropy,
        inputs=lambda g: (randn(g, 4, 5), _mask(4, 5)),
        fake_cuda=False,
        reason=ALL_MASKED,
    ),
    Sample(
        name="functional/kl_divergence",
        build=lambda: functional.kl_divergence,
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/js_divergence",
        build=lambda: partial(functional.js_divergence, weights=(0.5, 0.2, 0.3)),
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5), randn(g, 4, 5)),
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="functional/js_divergence_of_masked",
        build=lambda: lambda a, b, mask: functional.js_divergence(a, b, mask=mask),
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5), _mask(4, 5)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=ALL_MASKED,
    ),
    Sample(
        name="functional/cosine_alignment",
        build=lambda: functional.cosine_alignment,
        inputs=lambda g: (randn(g, 4, 2, 5), randn(g, 4, 2, 5)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/cross_correlation",
        build=lambda: functional.cross_correlation,
        inputs=lambda g: (randn(g, 6, 3), randn(g, 6, 2)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/decorrelation",
        build=lambda: functional.decorrelation,
        inputs=lambda g: (randn(g, 6, 4), randn(g, 6, 4)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/decorrelation_of_few_samples",
        build=lambda: functional.decorrelation,
        inputs=lambda g: (randn(g, 4, 9),),
    ),
)

GATES = (
    Sample(
        name="gates/straight_through",
        build=lambda: lambda soft: gates.straight_through(torch.ones_like(soft), soft.sigmoid()),
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/binarize",
        build=lambda: gates.binarize,
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/round_through",
        build=lambda: gates.round_through,
        inputs=lambda g: (3 * randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/clamp_through",
        build=lambda: partial(gates.clamp_through, low=-0.5, high=0.5),
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/gumbel_softmax",
        build=lambda: lambda logits, noise: gates.gumbel_softmax(logits, 0.7, noise=noise),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3)),
    ),
    Sample(
        name="gates/gumbel_softmax_drawn",
        build=lambda: partial(gates.gumbel_softmax, hard=True),
        inputs=lambda g: (randn(g, 4, 3),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/gumbel_sigmoid",
        build=lambda: lambda logits, noise: gates.gumbel_sigmoid(logits, 0.7, noise=noise),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3)),
    ),
    Sample(
        name="gates/hard_concrete",
        build=lambda: gates.HardConcrete((2, 3), keep=0.6, generator=torch.Generator().manual_seed(1)).double().eval(),
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
    Sample(
        name="gates/hard_concrete_drawn",
        build=lambda: gates.HardConcrete(6, generator=torch.Generator().manual_seed(1)).double(),
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
    Sample(
        name="gates/topk_mask",
        build=lambda: partial(gates.topk_mask, k=2),
        inputs=lambda g: (randn(g, 3, 5),),
        differentiable=(),
        reason="a mask has no gradient",
    ),
    Sample(
        name="gates/topk_gate",
        build=lambda: partial(gates.topk_gate, k=2),
        inputs=lambda g: (randn(g, 3, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
)


def _remember(bank: SampleBank, index: Tensor, rows: Tensor) -> Tensor:
    return bank.update(index, rows, momentum=0.7)


def _push(bank: FeatureBank, rows: Tensor) -> Tensor:
    bank.push(rows=rows)
    return bank["rows"]


def _follow(ema: EMA, model: nn.Module, x: Tensor) -> Tensor:
    ema.update(model)
    return ema(x)


def _averaged() -> partial[Tensor]:
    ema, model = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double() for _ in range(2))
    return partial(_follow, EMA(ema, decay=0.5), model)


REMEMBERED = "what is remembered takes no part in autograd"

MEMORY = (
    Sample(
        name="memory/sample_bank",
        build=lambda: partial(_remember, SampleBank(9, 4), torch.tensor([5, 2, 5])),
        inputs=lambda g: (randn(g, 3, 4),),
        differentiable=(),
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/sample_bank_top_k",
        build=lambda: partial(_remember, SampleBank(9, 4, storage=TopKRows(2)), torch.tensor([5, 2, 5])),
        inputs=lambda g: (randn(g, 3, 4).softmax(1),),
        differentiable=(),
        atol=1e-3,
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/feature_bank",
        build=lambda: partial(_push, FeatureBank(5, rows=torch.zeros(4, dtype=torch.float64))),
        inputs=lambda g: (randn(g, 3, 4),),
        differentiable=(),
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/ema",
        build=_averaged,
        inputs=lambda g: (randn(g, 5, 4),),
    ),
)

NEIGHBORS = (
    Sample(
        name="neighbors/nearest",
        build=lambda: partial(nearest, k=3),
        inputs=lambda g: (randn(g, 5, 4), randn(g, 60, 4)),
        differentiable=(),
        fake_cuda=False,
        reason="row numbers have no gradient, and whether the candidates are proven is decided on the host",
    ),
)

SAMPLES = FUNCTIONAL + GATES + MEMORY + NEIGHBORS
