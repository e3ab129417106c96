"""Laws of the algorithmic tasks."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from poise.core import ModularArithmetic, SparseParity, algorithmic_mlp

law = settings(deadline=None, max_examples=50)

OPERATIONS = {
    "add": lambda a, b, p: (a + b) % p,
    "sub": lambda a, b, p: (a - b) % p,
    "mul": lambda a, b, p: a * b % p,
    "div": lambda a, b, p: next(c for c in range(p) if b * c % p == a),
}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("start", [0, 1])
def test_table_is_that_of_the_operation(op: Any, start: int) -> None:
    pairs, labels = ModularArithmetic(7, op, "index", start).table()
    expected = [(a, b) for a in range(start, 7) for b in range(start, 7) if op != "div" or b]
    assert [tuple(pair) for pair in pairs.tolist()] == expected
    assert labels.tolist() == [OPERATIONS[op](a, b, 7) for a, b in expected]


@law
@given(st.integers(2, 20))
def test_encodings_tell_the_same_pairs(p: int) -> None:
    pairs, labels = ModularArithmetic(p, encoding="index").table()
    one_hot, others = ModularArithmetic(p).table()
    bits, _ = ModularArithmetic(p, encoding="binary").table()
    assert torch.equal(labels, others)
    assert torch.equal(one_hot, F.one_hot(pairs, p).flatten(1).float())
    width = (p - 1).bit_length()
    numbers = [[int("".join(str(int(bit)) for bit in half), 2) for half in row.split(width)] for row in bits]
    assert numbers == pairs.tolist()
    assert ModularArithmetic(p, encoding="index").width == pairs.shape[1]
    assert ModularArithmetic(p).width == one_hot.shape[1]
    assert ModularArithmetic(p, encoding="binary").width == bits.shape[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 7, "op": "pow"}, "op must be one of add, mul, sub, div"),
        ({"p": 7, "encoding": "gray"}, "encoding must be one of"),
        ({"p": 1}, "modulus of at least 2"),
        ({"p": 7, "start": 7}, "first residue"),
        ({"p": 9, "op": "div"}, "prime modulus, got 9"),
    ],
)
def test_impossible_arithmetic_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(ModularArithmetic.__init__)(object.__new__(ModularArithmetic), **arguments)


@law
@given(st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_split_is_a_partition_and_a_function_of_the_seed(fraction: float, seed: int) -> None:
    task = ModularArithmetic(11, encoding="index")
    data = task.split(fraction, torch.Generator().manual_seed(seed))
    assert len(data.x_train) == int(fraction * 121)
    together = torch.cat([torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])[:, None]], 1)
    pairs, labels = task.table()
    assert torch.equal(together.unique(dim=0), torch.cat([pairs, labels[:, None]], 1))
    again = task.split(fraction, torch.Generator().manual_seed(seed)).to("cpu")
    assert all(torch.equal(one, other) for one, other in zip(data, again, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1e-9])
def test_split_without_samples_on_one_side_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="samples to train on"):
        ModularArithmetic(5).split(fraction, torch.Generator())


@law
@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 2**31), st.data())
def test_parity_strings_are_distinct_and_labelled_by_their_first_bits(
    n_parity: int, n_noise: int, seed: int, data: st.DataObject
) -> None:
    n_samples = data.draw(st.integers(1, 2 ** (n_parity + n_noise)))
    task = SparseParity(n_parity, n_noise, n_samples)
    x, y = task.draw(torch.Generator().manual_seed(seed))
    assert x.shape == (n_samples, task.width)
    assert x.unique(dim=0).shape == x.shape
    assert set(x.flatten().tolist()) <= {0.0, 1.0}
    assert y.tolist() == [int(sum(row[:n_parity])) % 2 for row in x.tolist()]


def test_parity_strings_are_drawn_uniformly() -> None:
    x, y = SparseParity().draw(torch.Generator().manual_seed(0))
    assert (x.mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(2_000)
    assert abs(y.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(2_000)
    split = SparseParity().split(0.5, torch.Generator().manual_seed(0))
    assert [len(part) for part in split] == [1_000] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 1), "n_parity >= 1"),
        ((1, -1, 1), "n_noise >= 0"),
        ((1, 1, 0), "n_samples >= 1"),
        ((1, 1, 5), "4 strings of 2 bits"),
    ],
)
def test_impossible_parity_is_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseParity(*arguments)


def test_network_without_biases_is_homogeneous_of_the_degree_of_its_layers() -> None:
    torch.manual_seed(0)
    model, x = algorithmic_mlp(6, 4, hidden=(8, 8)).double(), torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    torch.testing.assert_close(model(x), 1.5**3 * before)


def test_network_has_the_published_shape_and_scale() -> None:
    model = algorithmic_mlp(226, 113)
    assert [tuple(weight.shape) for weight in model.parameters()] == [(200, 226), (200, 200), (113, 200)]
    torch.manual_seed(0)
    plain = algorithmic_mlp(6, 4, hidden=(8,), bias=True)
    torch.manual_seed(0)
    scaled = algorithmic_mlp(6, 4, hidden=(8,), bias=True, alpha=0.25)
    assert len(list(plain.parameters())) == 4
    assert torch.equal(scaled(torch.ones(1, 6)), 0.25 * plain(torch.ones(1, 6)))
    with pytest.raises(ValueError, match="at least one unit"):
        algorithmic_mlp(6, 4, hidden=(0,))
