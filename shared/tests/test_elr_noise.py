"""Label-noise generators: exact numbers, the protocols of the literature, and reproducibility."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from poise.core.labels.indexed import IndexedDataset
from poise.core.labels.noise import CIFAR10_CONFUSIONS, asymmetric_noise, confusions, next_in_group, symmetric_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_redrawing_with_the_true_label_flips_nine_tenths_of_the_rate(rate: float) -> None:
    labels = torch.arange(10).repeat(5_000)
    flipped = (symmetric_noise(labels, rate, 10, seeded()) != labels).double().mean().item()
    assert flipped == pytest.approx(0.9 * rate, abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.floats(0, 1), st.integers(2, 7), st.integers(0, 1000))
def test_without_the_true_label_exactly_the_rate_is_flipped(count: int, rate: float, classes: int, seed: int) -> None:
    labels = torch.randint(classes, (count,), generator=seeded(seed))
    noisy = symmetric_noise(labels, rate, classes, seeded(seed), include_true=False)
    assert (noisy != labels).sum().item() == (torch.arange(count) < rate * count).sum().item()
    assert 0 <= noisy.min() <= noisy.max() < classes


def test_wrong_labels_are_uniform() -> None:
    labels = torch.zeros(40_000, dtype=torch.long)
    for include_true, classes in ((True, 5), (False, 4)):
        noisy = symmetric_noise(labels, 1.0, 5, seeded(), include_true=include_true)
        shares = torch.bincount(noisy, minlength=5)[-classes:] / 40_000
        torch.testing.assert_close(shares, torch.full((classes,), 1 / classes), rtol=0, atol=0.01)


def test_asymmetric_noise_of_cifar10_follows_the_pairs_exactly() -> None:
    labels = torch.arange(10).repeat_interleave(50)[torch.randperm(500, generator=seeded(1))]
    noisy = asymmetric_noise(labels, 0.4, confusions(CIFAR10_CONFUSIONS, 10), seeded())
    for true in range(10):
        found = torch.bincount(noisy[labels == true], minlength=10)
        expected = torch.zeros(10, dtype=torch.long)
        expected[true] = 50
        if true in CIFAR10_CONFUSIONS:
            expected[true], expected[CIFAR10_CONFUSIONS[true]] = 30, 20
        assert torch.equal(found, expected)


def test_asymmetric_noise_of_cifar100_stays_in_groups_of_five() -> None:
    successor = next_in_group(100)
    assert successor[:6].tolist() == [1, 2, 3, 4, 0, 6]
    labels = torch.arange(100).repeat(20)
    noisy = asymmetric_noise(labels, 0.25, successor, seeded())
    assert (noisy != labels).sum() == 500
    assert torch.equal(noisy // 5, labels // 5)


def test_same_generator_same_noise_and_labels_are_not_touched() -> None:
    labels = torch.arange(10).repeat(10)
    kept = labels.clone()
    assert torch.equal(symmetric_noise(labels, 0.5, 10, seeded()), symmetric_noise(labels, 0.5, 10, seeded()))
    assert not torch.equal(symmetric_noise(labels, 0.5, 10, seeded()), symmetric_noise(labels, 0.5, 10, seeded(1)))
    assert torch.equal(labels, kept)


def test_bad_input_is_refused() -> None:
    labels = torch.arange(10)
    for call, words in (
        (lambda: symmetric_noise(labels, 1.5, 10, seeded()), "rate must lie"),
        (lambda: symmetric_noise(labels, 0.5, 9, seeded()), r"labels must lie in 0\.\.8"),
        (lambda: asymmetric_noise(labels, 0.5, torch.arange(10) + 1, seeded()), "labels must lie"),
        (lambda: next_in_group(12, 5), "must divide"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_indices_survive_shuffling() -> None:
    x = torch.arange(12.0)
    for inputs, labels, index in DataLoader(
        IndexedDataset(TensorDataset(x, x.long() % 3)), batch_size=5, shuffle=True, generator=seeded()
    ):
        assert torch.equal(x[index], inputs)
        assert torch.equal(x[index].long() % 3, labels)
    assert IndexedDataset(["a", "b"])[1] == ("b", 1)
