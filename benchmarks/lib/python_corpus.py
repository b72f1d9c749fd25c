"""Text corpus of the sources of Python's standard library, one token per byte."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 128  # ASCII; other bytes are replaced by a question mark
HELD_OUT = 8  # every eighth file


@dataclass(frozen=True)
class Corpus:
    """Tokens (N,) of the training and the held-out files, and the sha256 of both."""

    train: Tensor
    held_out: Tensor
    sha256: str


def standard_library() -> Corpus:
    """Read the top-level modules in the order of their names; every eighth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_bytes() for path in files]
    train = b"".join(text for number, text in enumerate(texts) if number % HELD_OUT)
    held_out = b"".join(texts[::HELD_OUT])
    return Corpus(_tokens(train), _tokens(held_out), hashlib.sha256(train + held_out).hexdigest())


def _tokens(text: bytes) -> Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens.masked_fill(tokens >= VOCABULARY, ord("?"))


def drawn(tokens: Tensor, context: int, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of (tokens, next tokens), both (batch, context), from random positions."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        positions = starts + torch.arange(context)
        yield tokens[positions], tokens[positions + 1]


def spread(tokens: Tensor, context: int, batch: int, number: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of (tokens, next tokens) from `number` equally spaced positions, for evaluation."""
    starts = torch.linspace(0, len(tokens) - context - 1, number).long()[:, None]
    positions = starts + torch.arange(context)
    return list(zip(tokens[positions].split(batch), tokens[positions + 1].split(batch), strict=True))
