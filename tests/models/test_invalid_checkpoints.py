"""Invalid or mismatching checkpoints are refused with a one-line error that names the file."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.model_zoo import ZOO, random_masks, tiny
from vitprune import BadInput, find_groups, load, save, shrink


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shrunk, saved model."""
    model = tiny("vit", dtype=torch.float32)
    groups = find_groups(model, ["residual", "attention", "ffn"])
    save(shrink(model, groups, random_masks(groups, 0.3)), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"head.weight": torch.ones(7, 3)}))
    message = refused(folder)
    assert message.startswith(
        f"{folder / 'model.safetensors'}: weight head.weight has shape [7, 3], the model needs [7,"
    )


def test_missing_and_surplus_weights_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"surplus": torch.ones(1)}))
    assert "weight surplus is not in VisionTransformer" in refused(folder)
    rewrite(folder, lambda tensors: (tensors.pop("surplus"), tensors.pop("blocks.0.mlp.fc1.bias")))
    assert "weight blocks.0.mlp.fc1.bias is missing" in refused(folder)


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refused(folder).startswith(f"{path}: not a safetensors file")


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith(f"{folder / 'model.safetensors'}: no such file")
    (folder / "config.json").unlink()
    assert refused(folder).startswith(f"{folder / 'config.json'}: no such file")
    assert refused(folder / "nowhere").startswith(f"{folder / 'nowhere' / 'config.json'}: no such file")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"{}", b'{"architecture": "x"}']
)
def test_a_broken_config_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert refused(folder).startswith(f"{folder / 'config.json'}: not a timm model config")


def test_a_failed_save_keeps_the_old_model(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    diverged = nn.Linear(2, 2)
    nn.init.constant_(diverged.weight, torch.nan)
    with pytest.raises(BadInput, match=r"^weight: has values that are not finite"):
        save(diverged, folder)
    with pytest.raises(BadInput, match=r"^factory 'timm:vit': unknown; write torchvision:NAME$"):
        save(nn.Linear(2, 2), folder, factory="timm:vit")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_of_several_types_are_refused(tmp_path: Path) -> None:
    architecture, args = ZOO["vit"]
    model = timm.create_model(architecture, **args)
    model.head.half()
    with pytest.raises(BadInput, match=r"^VisionTransformer: weights are torch.float16, torch.float32; give them one"):
        save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
