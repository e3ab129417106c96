"""What several processes remember must be the same on all of them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.core.memory.gather import gather_rows


def test_without_processes_rows_are_returned_as_given() -> None:
    a, b = torch.ones(2), torch.zeros(2, 3)
    assert all(x is y for x, y in zip(gather_rows(a, b), (a, b), strict=True))


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from poise.core.memory.batchnorm import recalibrate_batchnorm
from poise.core.memory.features import FeatureBank
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, TopKRows

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

rows = torch.randn(21, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
data = TensorDataset(torch.arange(21))
sampler = DistributedSampler(data, shuffle=True, seed=3)  # 21 samples: one is repeated to fill up
loader = DataLoader(data, batch_size=4, sampler=sampler)
banks = {
    "dense": SampleBank(21, 4),
    "half": SampleBank(21, 4, storage=DenseRows(torch.float16)),
    "topk": SampleBank(21, 4, storage=TopKRows(2)),
    "file": SampleBank(21, 4, storage=DenseRows(file=f"{folder}/bank")),
    "own": SampleBank(21, 4, synchronize=False),
}
recent = FeatureBank(10, row=torch.zeros(4), index=torch.zeros((), dtype=torch.long))
for epoch in range(3):
    sampler.set_epoch(epoch)
    for (index,) in loader:
        for bank in banks.values():
            bank.update(index, rows[index] * (1 + epoch), momentum=0.7)
        recent.push(row=rows[index], index=index)
uneven = torch.arange(3 if rank == 0 else 1) + 10 * rank  # ranks may bring different numbers of rows
banks["dense"].write(torch.cat([uneven, torch.tensor([20])]), torch.full((len(uneven) + 1, 4), float(rank)))

layer = nn.BatchNorm1d(4)
recalibrate_batchnorm(layer, [rows[:9], rows[9:13]] if rank == 0 else [rows[13:]])
torch.save(
    {
        **{name: bank.read(torch.arange(21)) for name, bank in banks.items()},
        "written": banks["dense"].written.clone(),
        "recent": recent["index"],
        "mean": layer.running_mean,
        "var": layer.running_var,
    },
    f"{folder}/{rank}.pt",
)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert (folder / "bank.rank0").read_bytes() == (folder / "bank.rank1").read_bytes()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def single_process() -> Tensor:
    """The rows after three epochs in which every sample was updated once."""
    rows = torch.randn(21, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    held = torch.zeros_like(rows)
    for epoch in range(3):
        held = 0.7 * held + 0.3 * rows * (1 + epoch)
    return held


@pytest.mark.parametrize("name", ["dense", "half", "topk", "file", "recent", "written", "mean", "var"])
def test_all_processes_agree(two_processes: list[dict[str, Tensor]], name: str) -> None:
    assert torch.equal(two_processes[0][name], two_processes[1][name])


def test_processes_that_do_not_synchronize_each_hold_a_part(two_processes: list[dict[str, Tensor]]) -> None:
    assert not torch.equal(two_processes[0]["own"], two_processes[1]["own"])


def test_the_bank_of_two_processes_equals_that_of_one(
    two_processes: list[dict[str, Tensor]], single_process: Tensor
) -> None:
    found = two_processes[0]["file"]
    # the sampler fills up with one repeated sample per epoch, which is updated twice if the two fall into different batches
    different = (found - single_process).abs().amax(1) > 1e-6
    assert different.sum() <= 3
    assert two_processes[0]["written"].all()
    dense = two_processes[0]["dense"]
    assert torch.equal(dense[:3], torch.zeros(3, 4))
    assert torch.equal(dense[10], torch.ones(4))
    assert torch.equal(dense[20], torch.ones(4))  # written by both: the last row of the highest rank counts
    assert torch.equal(dense[3:10], found[3:10])


def test_batch_statistics_are_pooled_over_processes(two_processes: list[dict[str, Tensor]]) -> None:
    rows = torch.randn(21, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    torch.testing.assert_close(two_processes[0]["mean"], rows.mean(0))
    torch.testing.assert_close(two_processes[0]["var"], rows.var(0))


def test_recent_rows_come_in_the_order_of_the_ranks(two_processes: list[dict[str, Tensor]]) -> None:
    indices: Any = torch.utils.data.TensorDataset(torch.arange(21))
    orders = []
    for rank in range(2):
        sampler = torch.utils.data.DistributedSampler(indices, num_replicas=2, rank=rank, shuffle=True, seed=3)
        sampler.set_epoch(2)
        orders.append(torch.tensor(list(sampler)).split(4))
    expected = torch.cat([batch for pair in zip(*orders, strict=True) for batch in pair])
    assert torch.equal(two_processes[0]["recent"], expected[-10:])
