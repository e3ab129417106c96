"""Maps that take a context, and their estimator."""

import pytest
import torch
from torch import nn

from poise.ot import (
    ConditionalMongeMap,
    ConditionalMongeMapEstimator,
    DoseContext,
    EmbeddingContext,
    JoinedContext,
    MongeGapLoss,
    OneHotContext,
    SqEuclidean,
)


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perceptron(inputs, outputs, width=16):
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_encoders_encode():
    torch.testing.assert_close(OneHotContext(3)(torch.tensor([2, 0])), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    doses = DoseContext(1_000.0)(torch.tensor([0.0, 10, 100, 1_000]))
    torch.testing.assert_close(doses[[0, 3], 0], torch.tensor([0.0, 1.0]))
    steps = doses[2:, 0] - doses[1:3, 0]
    torch.testing.assert_close(steps[0], steps[1], atol=0.02, rtol=0)
    joined = JoinedContext([OneHotContext(2), DoseContext(), EmbeddingContext(4, width=5)], sizes=(1, 1, 4))
    assert joined(torch.tensor([[1.0, 1.0, 0, 0, 0, 0]])).shape == (1, 8)
    torch.testing.assert_close(joined(torch.tensor([1.0, 1.0, 0, 0, 0, 0]))[:3], torch.tensor([0.0, 1, 1]))


def test_encoders_refuse_bad_sizes():
    for make in (lambda: OneHotContext(0), lambda: DoseContext(0.0), lambda: JoinedContext([DoseContext()], sizes=())):
        with pytest.raises(ValueError, match=r"at least 1|positive|size"):
            make()
    with pytest.raises(ValueError, match="2 entries"):
        JoinedContext([DoseContext(), DoseContext()], sizes=(1, 1))(torch.zeros(3))


@pytest.mark.parametrize("residual", [False, True])
def test_conditional_map_under_one_many_and_batched_contexts_agree(residual):
    transport = ConditionalMongeMap(perceptron(2 + 3, 2), OneHotContext(3), residual=residual)
    x = points(3, 7, 2, dtype=torch.float32)
    batched = transport(x, torch.arange(3))
    for context in range(3):
        torch.testing.assert_close(batched[context], transport(x[context], torch.tensor(context)))
        torch.testing.assert_close(batched[context], transport.at(torch.tensor(context))(x[context]))
        torch.testing.assert_close(batched[context], transport(x[context], torch.full((7,), context)))
    assert not torch.allclose(batched[0], transport(x[0], torch.tensor(1)))
    with pytest.raises(ValueError, match="one context or 7"):
        transport(x[0], torch.arange(3))


def test_conditional_map_takes_descriptors():
    encoder = EmbeddingContext(4, width=6)
    transport = ConditionalMongeMap(perceptron(2 + 6, 2), encoder)
    x, descriptors = points(5, 7, 2, dtype=torch.float32), points(5, 4, seed=1, dtype=torch.float32)
    torch.testing.assert_close(transport(x, descriptors)[2], transport(x[2], descriptors[2]))
    with pytest.raises(ValueError, match="one context or 5"):
        transport(x, descriptors[:3])


def test_conditional_estimator_never_mixes_contexts_and_averages_over_them():
    seen = []

    def regularizer(x, t):
        seen.append(x)
        return t.mean() * 0 + x.mean().round()

    tasks = {
        name: (torch.tensor(index), [torch.full((4, 2), float(index))], [torch.full((4, 2), 5.0 + index)])
        for index, name in enumerate("abc")
    }
    transport = ConditionalMongeMap(perceptron(2 + 3, 2), OneHotContext(3))
    estimator = ConditionalMongeMapEstimator(transport, lambda t, y: (t - y).square().mean(), regularizer)
    estimator.fit(tasks, steps=2)
    assert len(seen) == 6
    assert all(len(x.unique()) == 1 for x in seen)
    assert estimator.history[0].regularizer == 1.0  # the mean of 0, 1 and 2


def test_conditional_estimator_learns_a_map_per_context():
    x = points(3, 200, 2, dtype=torch.float32)
    y = x.flip(1) + torch.tensor([-2.0, 0, 2])[:, None, None]
    tasks = {index: (torch.tensor(index), x[index].split(50), y[index].split(50)) for index in range(3)}
    transport = ConditionalMongeMap(perceptron(2 + 3, 2, 32), OneHotContext(3))
    estimator = ConditionalMongeMapEstimator(
        transport,
        regularizer=MongeGapLoss(SqEuclidean(), relative_epsilon=0.05),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    generator = torch.Generator().manual_seed(0)
    estimator.fit(tasks, steps=120, contexts_per_step=2, generator=generator)
    images = estimator.transform(x, torch.arange(3))
    torch.testing.assert_close(images.mean(1), y.mean(1), atol=0.25, rtol=0)
    for count in (0, 4):
        with pytest.raises(ValueError, match="contexts_per_step"):
            estimator.fit(tasks, steps=1, contexts_per_step=count)
