"""The most recent rows must be held in order and outside of autograd."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from poise.core.memory.features import FeatureBank


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@hypothesis.given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 20), max_size=8))
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_bank_holds_the_last_rows_in_order(size: int, batches: list[int]) -> None:
    bank = FeatureBank(size, features=torch.zeros(2), label=torch.zeros((), dtype=torch.long))
    pushed = 0
    for count in batches:
        label = torch.arange(pushed, pushed + count)
        bank.push(features=label[:, None].float().expand(-1, 2), label=label)
        pushed += count
    expected = torch.arange(max(0, pushed - size), pushed)
    assert len(bank) == len(expected)
    assert torch.equal(bank["label"], expected)
    assert torch.equal(bank["features"], expected[:, None].float().expand(-1, 2))


def test_the_oldest_row_is_overwritten_in_place_at_the_position() -> None:
    bank = FeatureBank(5, code=torch.zeros(1))
    bank.push(code=torch.arange(5.0)[:, None])
    bank.push(code=torch.tensor([[10.0], [11.0]]))
    assert bank.position == 2
    assert bank.get_buffer("code").flatten().tolist() == [10, 11, 2, 3, 4]


def test_no_gradient_reaches_the_bank_and_later_pushes_do_not_break_backward(generator: torch.Generator) -> None:
    bank = FeatureBank(4, code=torch.zeros(3), label=torch.zeros((), dtype=torch.long))
    codes = torch.randn(4, 3, generator=generator, requires_grad=True)
    bank.push(code=codes, label=torch.tensor([0, 1, 2, 0]))
    head = nn.Linear(3, 3)
    loss = nn.functional.cross_entropy(head(bank["code"]), bank["label"])
    bank.push(code=2 * codes, label=torch.tensor([1, 1, 1, 1]))
    loss.backward()
    assert codes.grad is None
    assert head.weight.grad is not None


def test_a_feature_bank_resumes_from_its_checkpoint(generator: torch.Generator) -> None:
    bank, resumed = FeatureBank(7, code=torch.zeros(2)), FeatureBank(7, code=torch.zeros(2))
    for count in (3, 3, 3):
        bank.push(code=torch.randn(count, 2, generator=generator))
    resumed.load_state_dict(copy.deepcopy(bank.state_dict()))
    rows = torch.randn(5, 2, generator=generator)
    for one in (bank, resumed):
        one.push(code=rows)
    assert torch.equal(bank["code"], resumed["code"])
    assert len(resumed) == 7


def test_bad_pushes_are_refused() -> None:
    bank = FeatureBank(3, code=torch.zeros(2), label=torch.zeros(()))
    with pytest.raises(ValueError, match=r"expected the columns \['code', 'label'\], got \['code'\]"):
        bank.push(code=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"code must be a batch of rows of shape \(2,\), got \(1, 3\)"):
        bank.push(code=torch.ones(1, 3), label=torch.ones(1))
    with pytest.raises(ValueError, match=r"label must be a batch of rows of shape \(\), got \(\)"):
        bank.push(code=torch.ones(1, 2), label=torch.ones(()))
    with pytest.raises(ValueError, match=r"same number of rows, got \[1, 2\]"):
        bank.push(code=torch.ones(1, 2), label=torch.ones(2))
    with pytest.raises(KeyError, match=r"no column 'codes'; there are \['code', 'label'\]"):
        bank["codes"]
    with pytest.raises(ValueError, match="a size of at least 1 and a column, got 0"):
        FeatureBank(0, code=torch.zeros(2))
