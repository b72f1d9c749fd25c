"""YAML files: YAML 1.2 as DVC reads it, one-line errors, and bounded depth, size and aliases."""

import os
from pathlib import Path

import pytest
from dvc.utils.serialize import parse_yaml

from vitprune.errors import BadInput
from vitprune.runtime.yaml_files import MAX_BYTES, dump_yaml, load_yaml

TEN_LEVELS = range(1, 10)
ALIASES = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in TEN_LEVELS)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in TEN_LEVELS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("010", 10),
        ("0o10", 8),
        ("1_000", 1000),
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2_as_in_dvc(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "x.yaml").write_text(f"key: {text}\n")
    read = load_yaml(tmp_path / "x.yaml")["key"]
    assert (read, type(read)) == (value, type(value))
    assert parse_yaml(f"key: {text}\n", "x.yaml")["key"] == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: 0\nseed: 1\n", r"line 2: found duplicate key \"seed\""),
        ("prune: {cycles: 1, cycles: 2}\n", 'found duplicate key "cycles"'),
        ("[" * 100_000, "nested more than 32 deep"),
        ("{a: " * 5000 + "}" * 5000, "nested more than 32 deep"),
        ("- " * 5000, "nested more than 32 deep"),
        ("a: &a [*a]", "nested more than 32 deep"),
        (ALIASES, "more than 100000 values with its aliases written out"),
        (MERGES, "more than 100000 values with its aliases written out"),
        ("[" + "a," * 400_000 + "]", "more than 100000 values"),
        ("a: " + "9" * 10_000, "4300 digits"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("%TAG ! x\n---\na: !y z", "line 1|not valid YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("? {a: b}\n: c", "unhashable key"),
        ("\0", "unacceptable character"),
        ("x" * (MAX_BYTES + 1), f"cannot be read .1048577 bytes, the limit is {MAX_BYTES}"),
    ],
)
def test_yaml_that_is_not_plain_data_gives_a_one_line_error(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=why) as error:
        load_yaml(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < 500


def test_paths_that_are_not_regular_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    (tmp_path / "text.yaml").write_bytes(b"\xff\xfe\x00seed")
    for name in ("pipe.yaml", "zeros.yaml"):
        with pytest.raises(BadInput, match=rf"{name}: cannot be read \(not a regular file\); give a YAML file$"):
            load_yaml(tmp_path / name)
    with pytest.raises(BadInput, match=r"text.yaml: not valid YAML \('utf-8' codec"):
        load_yaml(tmp_path / "text.yaml")
    with pytest.raises(FileNotFoundError):
        load_yaml(tmp_path / "none.yaml")


def test_anchors_and_merges_of_usual_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &train {lr: 1e-3, epochs: 2}\nb: {<<: *train, epochs: 3}\nc: *train\n")
    content = load_yaml(tmp_path / "x.yaml")
    assert content["b"] == {"lr": 0.001, "epochs": 3}
    assert content["c"] == content["a"]


def test_written_values_are_read_unchanged(tmp_path: Path) -> None:
    texts = [
        "08",
        "010",
        "1e5",
        "1e-5",
        "2:4",
        "no",
        "~",
        "null",
        "",
        "a: b",
        "x\ny",
        "é",
        "#",
        "0x1",
        "1_0",
        "<<",
        "-",
    ]
    shared = {"lr": 1e-5, "list": [1, {"deep": None}]}
    value = {"z": texts, "a": [1e-5, 1e300, True, None, 7], "first": shared, "again": shared, "empty": [{}, []]}
    (tmp_path / "x.yaml").write_text(dump_yaml(value), encoding="utf-8")
    assert load_yaml(tmp_path / "x.yaml") == value
    assert list(load_yaml(tmp_path / "x.yaml")) == list(value)
