"""params.yaml: any text or value is accepted, or refused in one line; accepted settings give a plan, or one line."""

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fuzzing import VALUES, damaged, one_line_errors
from vitprune.config.params import Params, load_params
from vitprune.pruning.plan import plan_of
from vitprune.runtime.yaml_files import dump_yaml, load_yaml

TEXT = (Path(__file__).parents[2] / "params.yaml").read_text()
RAW = yaml.safe_load(TEXT)
KEYS = [(name,) for name in RAW] + [
    (name, key) for name, section in RAW.items() if isinstance(section, dict) for key in section
]
TOKENS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "&a ",
    "*a",
    "<<: *a",
    "!!set ",
    "'",
    '"',
    "\t",
    "|",
    "? ",
    "%TAG ! x\n",
    "---\n",
    "1e-5",
    "0x",
]


def write(folder: Path, content: bytes) -> Path:
    path = folder / "params.yaml"
    path.write_bytes(content)
    return path


@given(content=damaged(TEXT.encode()))
def test_damaged_text_is_accepted_or_refused(tmp_path: Path, content: bytes) -> None:
    with one_line_errors():
        plan_of(load_params(write(tmp_path, content)))


@given(
    parts=st.lists(st.one_of(st.sampled_from(TOKENS), st.sampled_from(TEXT.split()), st.text(max_size=4)), max_size=30)
)
def test_text_of_yaml_tokens_is_accepted_or_refused(tmp_path: Path, parts: list[str]) -> None:
    with one_line_errors():
        load_params(write(tmp_path, " ".join(parts).encode("utf-8", "replace")))


@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_any_key_is_accepted_or_refused(tmp_path: Path, key: tuple[str, ...], value: object) -> None:
    raw = yaml.safe_load(TEXT)
    section = raw
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value
    with one_line_errors():
        path = write(tmp_path, dump_yaml(raw).encode("utf-8", "replace"))
        params = load_params(path)
        assert Params.model_validate(params.model_dump()) == params
        plan_of(params)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="ascii"), max_size=8),
)


@given(
    value=st.recursive(
        PLAIN,
        lambda part: st.one_of(
            st.lists(part, max_size=4), st.dictionaries(st.text("abc", max_size=3), part, max_size=4)
        ),
        max_leaves=10,
    )
)
def test_written_values_are_read_unchanged(tmp_path: Path, value: object) -> None:
    content = {"value": value}
    assert load_yaml(write(tmp_path, dump_yaml(content).encode())) == content
