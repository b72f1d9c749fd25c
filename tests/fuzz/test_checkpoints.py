"""Checkpoints: any config.json and safetensors header is refused in one line, or loads and preprocesses an image."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.fuzzing import VALUES, damaged, one_line_errors
from tests.support.model_zoo import tiny
from vitprune import load, save
from vitprune.data import data_config, transform
from vitprune.models.validation import read_header


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save(tiny("vit", dtype=torch.float32), folder)
    return folder


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value below."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*above, key)
        yield from places(below, (*above, key))


def use(folder: Path) -> None:
    with one_line_errors():
        model = load(folder)
        image = transform(data_config(model)).image(Image.new("RGB", (40, 30)))
        assert bool(image.isfinite().all())


@given(data=st.data())
def test_any_value_in_config_json_is_refused_or_loaded(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    config = json.loads((saved / "config.json").read_text())
    where = data.draw(st.sampled_from([*places(config), ("model_args", "new"), ("pretrained_cfg", "new")]))
    target = config
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = data.draw(VALUES)
    shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    use(tmp_path / "model")


@given(data=st.data())
def test_a_damaged_config_json_is_refused_or_loaded(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model/config.json").write_bytes(data.draw(damaged((saved / "config.json").read_bytes())))
    use(tmp_path / "model")


@given(data=st.data())
def test_damaged_safetensors_headers_are_refused_or_loaded(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = (saved / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True)
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(data.draw(damaged(content[:length])) + content[length:])
    with one_line_errors():
        read_header(path)
    use(tmp_path / "model")


@given(tensors=st.dictionaries(st.text(max_size=8), VALUES, max_size=4), size=st.integers(0, 200))
def test_safetensors_headers_of_any_json_are_refused_or_loaded(
    tmp_path: Path, tensors: dict[str, Any], size: int
) -> None:
    text = json.dumps(tensors).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with one_line_errors():
        read_header(tmp_path / "x.safetensors")
