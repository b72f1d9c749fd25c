"""`vitprune check` of models of other libraries, by the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.other_models import make_model
from vitprune import BadInput
from vitprune.cli import app
from vitprune.models.named_models import create_named

OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 8), nn.GELU(), nn.Linear(8, 2))

def number():
    return 3

def fail():
    raise OSError("no weights")
"""


def lines(*arguments: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["check", *arguments, "--ratios", "0.5", "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_transformers_configuration(tmp_path: Path) -> None:
    config = make_model("vit").config
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    rows = lines(f"hf:{tmp_path}")
    proven = ("weight", "ffn", "attention", "head", "residual", "block", "branch")
    refused = ("qk", "vo")  # its forward pass has one size for q, k and v
    assert {row["kind"]: row["verdict"] for row in rows} == dict.fromkeys(proven, "proven") | dict.fromkeys(
        refused, "refused"
    )
    sizes = {row["kind"]: row["sizes"] for row in rows}
    assert sizes["attention"] == ["head_dim", "scaling"]
    assert sizes["head"] == []
    assert lines(f"hf:{tmp_path / 'config.json'}", "--kinds", "ffn")[0]["groups"] == 2


def test_torchvision_and_a_user_defined_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = lines("torchvision:swin_t", "--kinds", "head")
    assert (row["verdict"], row["groups"], row["left_out"]) == ("proven", 12, {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    (row,) = lines("module:own_models:make", "--kinds", "residual")
    assert (row["verdict"], row["why"]) == ("refused", "Sequential: it has no residual stream between its layers")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("module:own_models:number", "module:own_models:number: returns a int, not a torch.nn.Module"),
        ("module:own_models:fail", r"module:own_models:fail: cannot be built \(no weights\)"),
        ("module:own_models:missing", r"module:own_models:missing: cannot be built \(.*has no attribute 'missing'\)"),
        (".", r"^\.: is a directory; give the name of a model of timm, or hf:\. for one of transformers$"),
        ("module:nowhere:make", r"module:nowhere:make: cannot be built \(No module named 'nowhere'\)"),
        ("module:make", "module:make: write module:PACKAGE.FILE:CALLABLE"),
        ("torchvision:vit_b_17", r"torchvision:vit_b_17: cannot be built \(Unknown model vit_b_17\)"),
        ("hf:nowhere", r"hf:nowhere: no config.json of transformers with its architecture \(.*\)"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_refused(name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadInput, match=f"^{why}$"):
        create_named(name)
