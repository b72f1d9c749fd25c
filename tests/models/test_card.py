"""Model card: recorded values only, and loading code that runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from tests.support.digits_project import ORDER, project_in
from tests.support.model_zoo import images, predict, tiny
from tests.support.pruned_models import cut_of, dense_of
from vitprune import BadInput, merge_tokens, prune, save, write_card
from vitprune.pipeline import stages
from vitprune.runtime.files import sha256


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def as_the_card_says(folder: Path) -> nn.Module:
    """Run the loading code of the card."""
    (code,) = re.findall(r"```python\n(.*?)```", parts(folder)[1], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", str(folder)), names)
    return names["model"]


def table(text: str, title: str) -> list[list[str]]:
    """Cells of a section's table."""
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    lines = next(part for part in section if part.startswith(title)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("family", ["vit", "swin", "pvt"])
def test_a_card_loads_an_uneven_model_with_vitprune(family: str, tmp_path: Path) -> None:
    model = cut_of(family, "stream")
    save(model, tmp_path)
    write_card(tmp_path)
    assert "vitprune.load(" in parts(tmp_path)[1]
    assert torch.equal(predict(as_the_card_says(tmp_path), images(model)), predict(model, images(model)))


@pytest.mark.parametrize("family", ["vit", "distilled", "pvt", "swin"])
def test_a_card_loads_a_uniform_model_with_plain_timm(family: str, tmp_path: Path) -> None:
    dense, half = dense_of(family), {"ffn": 0.5, "attention": 0.5, "residual": 0.5}
    model = (
        prune(dense, "magnitude", sparsity=0.5).model
        if family == "swin"
        else prune(dense, "channel-magnitude", sparsity=half).model
    )
    save(model, tmp_path)
    write_card(tmp_path)
    assert "vitprune" not in re.findall(r"```python\n(.*?)```", parts(tmp_path)[1], re.DOTALL)[0]
    torch.testing.assert_close(predict(as_the_card_says(tmp_path), images(model)), predict(model, images(model)))


def test_a_card_names_merged_tokens(tmp_path: Path) -> None:
    save(merge_tokens(tiny("vit", dtype=torch.float32), 3), tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Before every block but the first, up to 3 patch tokens are merged into similar ones." in text
    assert "vitprune.load(" in text


def test_a_card_without_metrics_has_no_results(tmp_path: Path) -> None:
    model = cut_of("vit", "units")
    save(model, tmp_path)
    write_card(tmp_path)
    header, text = parts(tmp_path)
    assert header == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "pruning", "vitprune"],
    }
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Loading", "Provenance"]
    assert f"A timm model of {sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert f"- sha256 of model.safetensors: `{sha256(tmp_path / 'model.safetensors')}`" in text
    assert f"- timm: {timm.__version__}\n" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    before = (tmp_path / "README.md").read_bytes()
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == before


def test_published_weights_give_base_model_and_license(tmp_path: Path) -> None:
    save(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), tmp_path)
    (tmp_path / "metrics").mkdir()
    for origin, known in (("pretrained", True), ("train", False), ("checkpoint", False)):
        (tmp_path / "metrics/dense.json").write_text(json.dumps({"from": origin, "sha256": "ab" * 32}))
        write_card(tmp_path, tmp_path)
        header, text = parts(tmp_path)
        assert header.get("license") == ("mit" if known else None)
        assert header.get("base_model") == ("timm/swin_tiny_patch4_window7_224.ms_in1k" if known else None)
        assert f"- sha256 of the dense weights: `{'ab' * 32}`" in text
    assert "## Measured" not in text


def test_the_export_stage_writes_sparsity_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = project_in(tmp_path / "digits", method="magnitude", kinds=None, sparsity=0.6, cycles=2, finetune=None)
    monkeypatch.chdir(project)
    for stage in ORDER:
        stages.run(stage, project)
    header, text = parts(project / "out/export/timm")
    assert header["tags"][-1] == "magnitude"
    assert "license" not in header
    assert "Method `magnitude`, in 2 cycles:" in text
    assert table(text, "What was removed") == [["weight", "60.0 %"]]
    assert f"sha256 of the masks: `{sha256(project / 'out/cycles/02/masks.safetensors')}`" in text
    result = json.loads((project / "metrics/evaluate.json").read_text())
    rows = {name: cells for name, *cells in table(text, "Measured")}
    assert rows["Top-1 accuracy, %"] == [f"{result[name]['top1']:.2f}" for name in ("dense", "pruned")]
    assert rows["Nonzero parameters"] == [f"{result[name]['nonzero_params']:,}" for name in ("dense", "pruned")]
    assert rows["Parameters"] == [f"{result['dense']['params']:,}"] * 2
    assert f"Accuracy on {result['images']} evaluation images" in text
    assert "- the dense model started from: random weights, trained\n" in text
    assert as_the_card_says(project / "out/export/timm").num_classes == 10


def test_invalid_models_and_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config.json: no such file"):
        write_card(tmp_path)
    save(cut_of("vit", "units"), tmp_path)
    (tmp_path / "metrics").mkdir()
    for content in ("{", "[]"):
        (tmp_path / "metrics/evaluate.json").write_text(content)
        with pytest.raises(BadInput, match=r"metrics/evaluate.json: not .*; run the stage that writes it again"):
            write_card(tmp_path, tmp_path)
    (tmp_path / "metrics/evaluate.json").unlink()
    (tmp_path / "out/cycles/01").mkdir(parents=True)
    for file, content, key in (
        ("metrics/evaluate.json", {"dense": 5}, "dense"),
        ("metrics/evaluate.json", {"pruned": [{"top1": 5}]}, "pruned"),
        ("metrics/evaluate.json", {"dense": {"top1": "80"}, "pruned": {"top1": 79.5}}, "dense.top1"),
        ("metrics/evaluate.json", {"images": "many"}, "images"),
        ("metrics/dense.json", {"from": ["train"]}, "from"),
        ("metrics/score.json", {"method": 3}, "method"),
        ("metrics/prune.json", {"cycles": "two"}, "cycles"),
        ("out/cycles/01/metrics.json", {"sparsity": {"ffn": None}}, "sparsity.ffn"),
    ):
        (tmp_path / "metrics/prune.json").write_text(json.dumps({"cycles": 1}))
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(BadInput, match=rf"{file}: the value of {key} has another type; run the stage that writes"):
            write_card(tmp_path, tmp_path)
        (tmp_path / file).unlink()
    assert not (tmp_path / "README.md").exists()
