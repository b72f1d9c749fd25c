"""Helpers of the fuzz tests: values of files, damaged bytes, and the allowed form of errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

from vitprune.errors import BadInput

NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, 1e-12, 0.5])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["bicubic", "../x", "a\nb"])
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.one_of(st.lists(below, max_size=4), st.dictionaries(st.text(max_size=6), below, max_size=4)),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of a file with some bytes replaced, removed or inserted."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        length = draw(st.sampled_from([0, 1, 1, 4, 64]))
        result[at : at + length] = draw(st.binary(max_size=16))
    return bytes(result[: draw(st.sampled_from([len(result), len(result), len(result) // 2]))])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Accept BadInput if its message is one line of bounded length; any other error is a failure."""
    try:
        yield
    except BadInput as error:
        line = str(error)
        assert line
        assert line.isprintable()
        assert len(line) <= 1000
