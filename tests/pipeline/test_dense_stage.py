"""A model pruned on one data set and fine-tuned on another by the stages; invalid combinations are refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import vitprune
from tests.support.digits_project import ORDER, project_in
from vitprune import BadInput, find_groups, models, shrink
from vitprune.architectures import structure
from vitprune.config.params import Params, read_yaml
from vitprune.pipeline import stages
from vitprune.pipeline.dense_stage import initial_model, zeros_to_keep
from vitprune.pipeline.report.page import write_report
from vitprune.runtime.files import sha256
from vitprune.training.loop import FrozenZeros

ROOT = Path(__file__).parents[2]
RECIPE = read_yaml(ROOT / "recipes/transfer_deit_tiny_folder.yaml", "")
SHORT = {"epochs": 2, "batch_size": 32, "lr": 0.002, "augment": "digits"}

LONGER = SHORT | {"epochs": 15, "augment": "none"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the export of a digits project, pruned by FFN units or by single weights."""
    parent, done = tmp_path_factory.mktemp("first"), {}

    def made(method: str) -> Path:
        if method not in done:
            sparsity = 0.5 if method == "magnitude" else {"ffn": 0.5}
            settings = {"kinds": None if method == "magnitude" else ["ffn"], "finetune": None}
            done[method] = project_in(parent / method, method=method, sparsity=sparsity, cycles=1, **settings)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(done[method])
                for stage in ORDER:
                    stages.run(stage, done[method])
        return done[method] / "out/export/timm"

    return made


def letters(folder: Path) -> None:
    """Write three classes of small gray images, one folder per class: the digits 3, 7 and 8 turned by 90 degrees."""
    images, labels = load_digits(return_X_y=True)
    for split, part in (("train", slice(0, 40)), ("val", slice(40, 60))):
        for label in (3, 7, 8):
            path = folder / split / f"turned{label}"
            path.mkdir(parents=True)
            for number, flat in enumerate(images[labels == label][part]):
                pixels = np.rot90((flat.reshape(8, 8) * 15.9).astype(np.uint8))
                Image.fromarray(pixels.copy()).resize((32, 32)).save(path / f"{number}.png")


def settings(checkpoint: Path, **change: Any) -> dict[str, Any]:
    """Return the recipe with fewer epochs, for the small model of the digits project."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["dataset"] |= {"source": "folder:data/train", "eval_source": "folder:data/val"}
    recipe["model"] = {"name": "vit_tiny_patch16_224", "args": {"num_classes": 3}}
    recipe["dense"] |= {"checkpoint": str(checkpoint), "train": SHORT}
    recipe |= {"threads": 1, "evaluate": {"latency_runs": 2}, "export": {"onnx": False}}
    recipe["calibrate"]["size"] = 30
    for dotted, value in change.items():
        section, _, key = dotted.partition("__")
        recipe[section][key] = value
    return recipe


def run_all(project: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    letters(project / "data")
    (project / "params.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(project)
    for stage in ORDER:
        stages.run(stage, project)
    return {path.stem: json.loads(path.read_text()) for path in (project / "metrics").glob("*.json")}


def test_a_pruned_backbone_is_fine_tuned_on_other_classes(pruned, tmp_path, monkeypatch):
    source = pruned("channel-magnitude")
    result = run_all(tmp_path, settings(source, dense__train=LONGER), monkeypatch)
    first, dense, last = (vitprune.load(path) for path in (source, "out/dense", "out/export/timm"))
    assert [m.num_classes for m in (first, dense, last)] == [10, 3, 3]
    assert structure(first) == structure(dense) == structure(last)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc1.weight)
    facts = {key: result["dense"][key] for key in ("from", "checkpoint_sha256", "checkpoint_classes", "frozen_zeros")}
    expected = sha256(source / "model.safetensors")
    assert facts == {"from": "checkpoint", "checkpoint_sha256": expected, "checkpoint_classes": 10, "frozen_zeros": 0}
    assert result["evaluate"]["dense"]["top1"] > 50  # three classes; an untrained classifier has a third
    assert result["evaluate"]["pruned"]["top1"] == result["evaluate"]["dense"]["top1"]
    assert result["evaluate"]["kept"]["params"] == 1.0
    assert f"sha256 of that checkpoint: `{expected}`" in (tmp_path / "out/export/timm/README.md").read_text()
    write_report(tmp_path, tmp_path / "report.html")
    assert "turned7" in (tmp_path / "report.html").read_text()


def test_zeros_of_a_pruned_model_are_kept_in_further_pruning(pruned, tmp_path, monkeypatch):
    source = pruned("magnitude")
    recipe = settings(source, prune__sparsity={"ffn": 0.25}, prune__finetune=SHORT, distill__train=SHORT)
    result = run_all(tmp_path, recipe, monkeypatch)
    before, dense = (load_file(path / "model.safetensors") for path in (source, Path("out/dense")))
    names = [name for name in before if re.search(r"(qkv|proj|fc1|fc2)\.weight$", name) and "blocks" in name]
    assert sum(int((before[name] == 0).sum()) for name in names) == result["dense"]["frozen_zeros"] > 10_000
    assert all(torch.equal(before[name] == 0, dense[name] == 0) for name in names)
    assert result["evaluate"]["kept"]["params"] < 0.95
    start = vitprune.load("out/dense")
    groups = find_groups(start, ["ffn"])
    shrink(start, groups, {name: mask.bool() for name, mask in load_file("out/cycles/01/masks.safetensors").items()})
    for stage in ("prune", "distill"):
        remaining = load_file(Path("out", stage, "model.safetensors"))
        assert all(torch.equal(remaining[name] == 0, start.get_parameter(name) == 0) for name in names)
        assert not torch.equal(remaining[names[0]], start.get_parameter(names[0]))


def test_zeros_of_a_checkpoint_are_kept_unless_keep_zeros_is_false(pruned):
    params = Params.model_validate(settings(pruned("magnitude")))
    model = initial_model(params).model
    weight, selected = model.blocks[0].mlp.fc1.weight, FrozenZeros([], {})
    held = zeros_to_keep(model, params, selected, keep_zeros=True)
    assert torch.equal(held.masks["blocks.0.mlp.fc1.weight"], weight != 0)
    assert zeros_to_keep(model, params, selected, keep_zeros=False) is selected
    trained = params.model_copy(update={"dense": params.dense.model_copy(update={"start": "pretrained"})})
    assert zeros_to_keep(model, trained, selected, keep_zeros=True) is selected


def test_the_new_classifier_depends_on_the_seed(pruned):
    source = pruned("channel-magnitude")
    heads = [
        initial_model(Params.model_validate(settings(source) | {"seed": seed})).model.get_classifier().weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_with_the_same_classes_the_classifier_is_kept(pruned):
    source = pruned("channel-magnitude")
    for args in ({}, {"num_classes": 10}):
        start = initial_model(Params.model_validate(settings(source, model__args=args, dense__train=None)))
        assert torch.equal(start.model.head.weight, vitprune.load(source).head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_type_is_pruned_in_float32(dtype, tmp_path, monkeypatch):
    small = {"img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vitprune.save(models.create("vit_tiny_patch16_224", small | {"num_classes": 3}).to(dtype), tmp_path / "given")
    model = {"model__name": "vit_tiny_patch16_224", "model__args": {}, "dense__train": None}
    method = {"prune__method": "unit-obs", "prune__sparsity": 0.3, "prune__kinds": ["ffn"]}
    short = {"calibrate__size": 8, "prune__finetune": None, "distill__train": None}
    result = run_all(tmp_path, settings(tmp_path / "given", **model, **method, **short), monkeypatch)
    assert {weight.dtype for weight in load_file("out/export/timm/model.safetensors").values()} == {torch.float32}
    assert result["evaluate"]["kept"]["macs"] < 1


REFUSED = [
    ({"dense__train": None}, r"dense.train: the classifier for 3 classes is new \(.* has 10\), so give epochs"),
    ({"model__name": "deit_tiny_patch16_224"}, "model.name: deit_tiny_patch16_224, but .* holds vit_tiny_patch16_224"),
    ({"model__args": {"depth": 2}}, "model.args.depth: is fixed by checkpoint .*; remove it"),
    ({"model__args": {"num_classes": "three"}}, "model.args.num_classes: 'three' is not a number of classes"),
    ({"model__args": {"num_classes": 0}}, "model.args.num_classes: 0 is not a number of classes"),
    ({"dense__checkpoint": "data"}, "data/config.json: no such file; give a directory written by vitprune.save"),
    ({"dense__checkpoint": "nowhere"}, "nowhere: no such file"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: next(iter(value)) if value else "")
def test_settings_that_do_not_fit_the_checkpoint_are_named(change, message, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match=f"^{message}"):
        initial_model(Params.model_validate(settings(pruned("channel-magnitude"), **change)))
