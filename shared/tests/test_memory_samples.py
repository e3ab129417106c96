"""A bank must hold what was written for each sample, err no more than its storage says, and survive a checkpoint."""

import copy
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, Storage, TopKRows


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def softmax_rows(count: int, classes: int, generator: torch.Generator, sharpness: float = 3.0) -> Tensor:
    return (sharpness * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)


def test_rows_not_in_the_batch_never_change(generator: torch.Generator) -> None:
    bank = SampleBank(20, 3)
    bank.write(torch.arange(20), softmax_rows(20, 3, generator).float())
    before = bank.read(torch.arange(20))
    bank.update(torch.tensor([3, 17]), torch.ones(2, 3), momentum=0.5)
    changed = (bank.read(torch.arange(20)) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 17]


@hypothesis.given(momentum=st.floats(0, 0.999), visits=st.integers(1, 6))
@hypothesis.settings(max_examples=20, deadline=None)
def test_rows_sum_to_one_minus_momentum_to_the_visits(momentum: float, visits: int) -> None:
    generator = torch.Generator().manual_seed(visits)
    bank = SampleBank(4, 5, storage=DenseRows(torch.float64))
    index = torch.tensor([2, 0])
    for _ in range(visits):
        target = bank.update(index, softmax_rows(2, 5, generator), momentum)
    torch.testing.assert_close(target.sum(1), torch.full((2,), 1 - momentum**visits, dtype=torch.float64))
    assert bank.read(torch.tensor([1, 3])).count_nonzero() == 0


def test_the_target_contains_the_current_prediction_and_carries_no_gradient(generator: torch.Generator) -> None:
    bank = SampleBank(4, 5, storage=DenseRows(torch.float64))
    logits = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = bank.update(torch.tensor([1, 2]), logits.softmax(1), 0.7)
    torch.testing.assert_close(target, 0.3 * logits.softmax(1).detach())
    assert not target.requires_grad
    assert bank.update(torch.tensor([1]), logits[:1].float().softmax(1), 0.0).dtype == torch.float32


@pytest.mark.parametrize("storage", [DenseRows(), TopKRows(2)])
def test_the_last_row_of_a_repeated_index_counts_once(storage: Storage) -> None:
    bank = SampleBank(5, 4, storage=storage)
    rows = torch.eye(4)
    target = bank.update(torch.tensor([3, 1, 3, 3]), rows, momentum=0.5)
    assert torch.equal(target, 0.5 * torch.stack([rows[3], rows[1], rows[3], rows[3]]))
    bank.write(torch.tensor([2, 2]), rows[:2])
    assert torch.equal(bank.read(torch.tensor([2])), rows[1:2])


def test_unseen_samples_are_known_and_zero() -> None:
    bank = SampleBank(6, 2)
    bank.write(torch.tensor([4]), torch.ones(1, 2))
    bank.update(torch.tensor([1], dtype=torch.int32), torch.ones(1, 2), 0.0)
    assert bank.seen(torch.arange(6)).tolist() == [False, True, False, False, True, False]
    assert len(bank) == 6


@pytest.mark.parametrize("storage", [DenseRows(), DenseRows(torch.float16), TopKRows(2)])
def test_a_bank_resumes_from_its_checkpoint(storage: Storage, generator: torch.Generator) -> None:
    bank, resumed = SampleBank(50, 7, storage=storage), SampleBank(50, 7, storage=storage)
    for _ in range(3):
        bank.update(torch.randperm(50, generator=generator)[:20], softmax_rows(20, 7, generator).float(), 0.7)
    resumed.load_state_dict(copy.deepcopy(bank.state_dict()))
    index, rows = torch.arange(0, 50, 2), softmax_rows(25, 7, generator).float()
    assert torch.equal(bank.update(index, rows, 0.7), resumed.update(index, rows, 0.7))
    assert torch.equal(bank.written, resumed.written)


def test_shuffling_the_loader_does_not_change_the_bank(generator: torch.Generator) -> None:
    rows = softmax_rows(40, 3, generator).float()
    banks = []
    for _ in range(2):
        bank = SampleBank(40, 3)
        for batch in torch.randperm(40, generator=generator).split(7):
            bank.update(batch, rows[batch], 0.5)
        banks.append(bank.read(torch.arange(40)))
    assert torch.equal(*banks)


def test_rows_of_any_shape_and_dtype_such_as_label_maps() -> None:
    bank = SampleBank(3, (4, 5), storage=DenseRows(torch.uint8))
    labels = torch.arange(20, dtype=torch.uint8).view(1, 4, 5)
    bank.write(torch.tensor([2]), labels)
    assert torch.equal(bank.read(torch.tensor([2])), labels)
    assert bank.read(torch.tensor([2])).dtype == torch.uint8


@pytest.mark.parametrize(("dtype", "relative", "tiny"), [(torch.float16, 2**-11, 2**-25), (torch.bfloat16, 2**-8, 0)])
def test_half_storage_errs_as_documented(
    dtype: torch.dtype, relative: float, tiny: float, generator: torch.Generator
) -> None:
    rows = softmax_rows(200, 100, generator).float()
    bank = SampleBank(200, 100, storage=DenseRows(dtype))
    bank.write(torch.arange(200), rows)
    stored = bank.read(torch.arange(200))
    assert stored.dtype == torch.float32
    assert ((stored - rows).abs() <= relative * rows + tiny).all()


@hypothesis.given(seed=st.integers(0, 10**6), k=st.integers(1, 9), sharpness=st.floats(0, 20))
@hypothesis.settings(max_examples=40, deadline=None)
def test_top_k_storage_errs_as_documented(seed: int, k: int, sharpness: float) -> None:
    rows = softmax_rows(30, 10, torch.Generator().manual_seed(seed), sharpness).float()
    bank = SampleBank(30, 10, storage=TopKRows(k))
    bank.write(torch.arange(30), rows)
    stored = bank.read(torch.arange(30))
    kept = torch.zeros(30, 10, dtype=torch.bool).scatter(1, bank.get_buffer("classes").long(), True)
    error, rounding = (stored - rows).abs(), 2**-11 * rows + 2**-24
    assert (error[kept] <= rounding[kept]).all()
    # the others, of which none exceeds the next largest entry, take up the rounding of those that are kept
    others, taken_up = rows.masked_fill(kept, 0), rounding.masked_fill(~kept, 0).sum(1)
    assert (error.masked_fill(kept, 0).amax(1) <= others.amax(1) + taken_up).all()
    assert (error.masked_fill(kept, 0).sum(1) <= 2 * others.sum(1) + taken_up).all()
    assert (others.amax(1) <= rows.masked_fill(~kept, math.inf).amin(1)).all()
    assert ((stored.sum(1) - 1).abs() <= 2**-11 + 2**-20).all()
    assert (stored >= 0).all()


def test_top_k_storage_is_exact_where_the_tail_is_uniform() -> None:
    row = torch.tensor([[0.5, 0.0625, 0.25, 0.0625, 0.0625, 0.0625]])
    bank = SampleBank(1, 6, storage=TopKRows(2))
    bank.write(torch.tensor([0]), row)
    assert torch.equal(bank.read(torch.tensor([0])), row)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_errors_of_top_k_storage_do_not_pile_up_beyond_the_bound(momentum: float, generator: torch.Generator) -> None:
    exact, compressed = SampleBank(20, 30, storage=DenseRows(torch.float64)), SampleBank(20, 30, storage=TopKRows(8))
    index, largest = torch.arange(20), 0.0
    for _ in range(30):
        rows = softmax_rows(20, 30, generator, 1.0)
        old = compressed.read(index).double()
        blended = momentum * old + (1 - momentum) * rows
        wanted, stored = exact.update(index, rows, momentum), compressed.update(index, rows, momentum)
        largest = max(largest, (stored - blended).abs().sum(1).max().item())
        assert (stored - wanted).abs().sum(1).max() <= largest / (1 - momentum) + 1e-6


@pytest.mark.parametrize(
    ("storage", "gigabytes"),
    [(DenseRows(), 5.13), (DenseRows(torch.float16), 2.56), (TopKRows(16), 0.0884), (TopKRows(5), 0.0320)],
)
def test_sizes_for_imagenet(storage: Storage, gigabytes: float) -> None:
    bank = SampleBank(1_281_167, 1000, storage=storage, device="meta")
    assert bank.nbytes / 1e9 == pytest.approx(gigabytes, rel=5e-3)


@pytest.mark.parametrize("classes", [2**15, 2**15 + 1])
def test_top_k_storage_addresses_every_class(classes: int) -> None:
    bank = SampleBank(1, classes, storage=TopKRows(1))
    row = torch.zeros(1, classes)
    row[0, -1] = 1.0
    bank.write(torch.tensor([0]), row)
    assert torch.equal(bank.read(torch.tensor([0])), row)


def test_a_bank_in_a_file_equals_one_in_memory(tmp_path: Path, generator: torch.Generator) -> None:
    file = tmp_path / "bank.f16"
    mapped = SampleBank(100, 6, storage=DenseRows(torch.float16, file=file))
    plain = SampleBank(100, 6, storage=DenseRows(torch.float16))
    assert file.stat().st_size == 100 * 6 * 2
    for _ in range(3):
        index, rows = torch.randperm(100, generator=generator)[:30], softmax_rows(30, 6, generator).float()
        assert torch.equal(mapped.update(index, rows, 0.5), plain.update(index, rows, 0.5))
    assert np.array_equal(np.fromfile(file, dtype=np.float16).reshape(100, 6), plain.get_buffer("rows").numpy())
    state = copy.deepcopy(mapped.state_dict())
    again = SampleBank(100, 6, storage=DenseRows(torch.float16, file=file))
    assert again.read(torch.arange(100)).count_nonzero() == 0
    again.load_state_dict(state)
    assert torch.equal(again.read(torch.arange(100)), plain.read(torch.arange(100)))
    with pytest.raises(ValueError, match="has 1200 bytes, a bank of this size 2400: remove it first"):
        SampleBank(100, 12, storage=DenseRows(torch.float16, file=file))
    with pytest.raises(ValueError, match="stays on the CPU, got device 'meta'"):
        SampleBank(100, 6, storage=DenseRows(torch.float16, file=file), device="meta")


def test_a_bank_moves_with_its_owner_unless_told_to_stay_and_is_never_converted(tmp_path: Path) -> None:
    owner = nn.ModuleDict(
        {
            "moves": SampleBank(4, 3),
            "stays": SampleBank(4, 3, device="cpu"),
            "mapped": SampleBank(4, 3, storage=DenseRows(file=tmp_path / "bank")),
        }
    )
    owner.half()
    owner.to(torch.float64)
    assert {buffer.dtype for buffer in owner.buffers()} == {torch.float32, torch.bool}
    owner.to("meta")
    devices = {name: {buffer.device.type for buffer in bank.buffers()} for name, bank in owner.items()}
    assert devices == {"moves": {"meta"}, "stays": {"cpu"}, "mapped": {"cpu"}}


@pytest.mark.parametrize(
    ("index", "rows", "error", "message"),
    [
        (torch.tensor([0, 5]), torch.ones(2, 3), ValueError, r"index must lie in 0\.\.4, got 0 to 5"),
        (torch.tensor([-1]), torch.ones(1, 3), ValueError, r"index must lie in 0\.\.4, got -1 to -1"),
        (torch.tensor([1.0]), torch.ones(1, 3), TypeError, "index must be integer, got torch.float32"),
        (torch.tensor([True]), torch.ones(1, 3), TypeError, "index must be integer, got torch.bool"),
        (torch.tensor([[1]]), torch.ones(1, 3), ValueError, r"index must have shape \(batch,\), got \(1, 1\)"),
        (torch.tensor([1]), torch.ones(1, 4), ValueError, r"rows must have shape \(1, 3\), got \(1, 4\)"),
        (torch.tensor([1]), torch.ones(2, 3), ValueError, r"rows must have shape \(1, 3\), got \(2, 3\)"),
    ],
)
def test_bad_indices_and_rows_are_refused(index: Tensor, rows: Tensor, error: type[Exception], message: str) -> None:
    bank = SampleBank(5, 3)
    with pytest.raises(error, match=message):
        bank.write(index, rows)
    with pytest.raises(error, match=message):
        bank.update(index, rows, 0.5)
    assert not bank.written.any()


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        SampleBank(5, 3).update(torch.tensor([0]), torch.ones(1, 3), 1.5)
    with pytest.raises(TypeError, match=r"rows must be floating-point to be averaged, got torch\.int64"):
        SampleBank(5, 3).update(torch.tensor([0]), torch.ones(1, 3).long(), 0.5)
    with pytest.raises(ValueError, match=r"must be positive, got 0 and \(3,\)"):
        SampleBank(0, 3)
    with pytest.raises(
        ValueError, match=r"TopKRows\(3\) stores vectors of more than 3 entries, got rows of shape \(3,\)"
    ):
        SampleBank(5, 3, storage=TopKRows(3))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopKRows(0)
