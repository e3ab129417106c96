"""Docstrings of installed packages as texts with classes."""

import socket
import urllib.request

import pytest
import torch

from poise.core import data

pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may open a connection."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("data must not be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


class TestDocstrings:
    @pytest.fixture(scope="class")
    def corpus(self) -> data.Texts:
        pytest.importorskip("scipy")
        return data.docstring_corpus()

    def test_every_module_has_at_least_65_texts(self, corpus: data.Texts) -> None:
        counts = torch.bincount(corpus.targets)
        assert len(corpus.classes) == len(counts) == 10
        assert counts.min() >= 65
        assert len(corpus) == len(corpus.texts) == len(corpus.symbols) == counts.sum()

    def test_texts_are_distinct_and_of_the_promised_length(self, corpus: data.Texts) -> None:
        assert len(set(corpus.texts)) == len(corpus)
        assert all(80 <= len(text) <= 400 for text in corpus.texts)

    def test_texts_do_not_name_their_module_nor_hold_doctests_or_links(self, corpus: data.Texts) -> None:
        import re

        named = re.compile(
            r"\b(?:numpy|scipy|np|stats|signal|special|linalg|ndimage|optimize|sparse|interpolate|random|ma)\b"
        )
        for text in corpus.texts:
            assert not named.search(text.lower()), text
            assert ">>>" not in text
            assert "http" not in text
            assert ":math:" not in text

    def test_split_keeps_a_class_object_on_one_side(self, corpus: data.Texts) -> None:
        for seed in range(20):
            train, test = corpus.split(50, 26, seed=seed)
            assert torch.bincount(train.targets).tolist() == [50] * 10
            assert 15 <= torch.bincount(test.targets).min() <= torch.bincount(test.targets).max() <= 26
            sides = [
                {
                    (int(label), symbol.partition(".")[0])
                    for label, symbol in zip(part.targets, part.symbols, strict=True)
                }
                for part in (train, test)
            ]
            assert not sides[0] & sides[1]

    def test_a_seed_fixes_the_split(self, corpus: data.Texts) -> None:
        assert corpus.split(seed=1).train.texts == corpus.split(seed=1).train.texts
        assert corpus.split(seed=1).train.texts != corpus.split(seed=2).train.texts

    def test_split_refuses_more_than_there_are(self, corpus: data.Texts) -> None:
        with pytest.raises(ValueError, match="texts for training"):
            corpus.split(train=100)

    def test_any_module_can_be_read(self) -> None:
        texts = data.module_docstrings("argparse", without=("argparse",))
        assert "ArgumentParser" in texts
        assert "argparse" not in " ".join(texts.values())
        assert "ArgumentParser.parse_args" not in texts  # has no docstring

    def test_missing_docstrings_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("scipy")
        monkeypatch.setattr("poise.core.data.docstrings.module_docstrings", lambda module, without: {})
        with pytest.raises(RuntimeError, match=r"scipy.stats has 0 docstrings .* -OO"):
            data.docstring_corpus()
