"""The corpus of benchmarks/accuracy/language_model.py: Python sources, split by file."""

import sysconfig
from pathlib import Path

import torch

from benchmarks.lib import python_corpus as text


def test_whole_files_are_held_out_and_every_byte_is_in_the_vocabulary() -> None:
    corpus = text.standard_library()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sizes = [path.stat().st_size for path in files]
    assert len(corpus.held_out) == sum(sizes[::8])
    assert len(corpus.train) + len(corpus.held_out) == sum(sizes) > 1_000_000
    first = files[0].read_bytes()[:200]
    assert bytes(corpus.held_out[:200].tolist()) == first
    assert 0 <= int(corpus.train.min()) <= int(corpus.train.max()) < text.VOCABULARY
    assert corpus.sha256 == text.standard_library().sha256


def test_each_window_is_followed_by_itself_one_byte_later() -> None:
    tokens = torch.arange(1000)
    for batches in (list(text.drawn(tokens, 16, 4, 3, seed=0)), text.spread(tokens, 16, 4, 12)):
        assert [(a.shape, b.shape) for a, b in batches] == [((4, 16), (4, 16))] * 3
        for window, after in batches:
            assert torch.equal(after, window + 1)
            assert torch.equal(window, window[:, :1] + torch.arange(16))
    again = list(text.drawn(tokens, 16, 4, 3, seed=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, text.drawn(tokens, 16, 4, 3, seed=0), strict=True))
    assert not torch.equal(again[0][0], next(text.drawn(tokens, 16, 4, 1, seed=1))[0])
    ends = text.spread(tokens, 16, 12, 12)[0][1]
    assert int(ends.max()) == 999
