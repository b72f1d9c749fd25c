"""A project with prune.classes: images, labels, models and checks of some classes; dataset.labels."""

import contextlib
from pathlib import Path

import pytest
import yaml

from vitprune import BadInput, load
from vitprune.config.params import load_params
from vitprune.pipeline import stages
from vitprune.pipeline.project_data import source_of
from vitprune.pipeline.verify import RecordedRun, recheck
from vitprune.runtime import tables
from vitprune.runtime.files import read_json

AFTER_DENSE = ("calibrate", "score", "mask", "prune", "distill", "evaluate", "export")


@pytest.mark.parametrize("method", ["channel-taylor", "magnitude"])
def test_all_stages_use_the_images_and_logits_of_the_classes(method: str, finished_project: Path) -> None:
    path = finished_project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    sparsity = 0.5 if method == "magnitude" else {"ffn": 0.5}
    params["prune"] |= {"classes": [7, 1, 4], "method": method, "sparsity": sparsity, "cycles": 2}
    params["calibrate"]["size"], params["export"] = 20, {"onnx": True, "int8": method == "magnitude"}
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    with contextlib.chdir(finished_project):
        for stage in AFTER_DENSE:
            stages.run(stage, finished_project)
        calibrated = tables.read_table(Path("data/calibration.parquet"), tables.CALIBRATION)["label"].to_pylist()
        rows = tables.read_table(Path("out/evaluate/evaluation.parquet"), tables.EVALUATION).to_pylist()
        exported = read_json(Path("metrics/export.json"))
        evaluated, model = read_json(Path("metrics/evaluate.json")), load(Path("out/distill"))
        run = RecordedRun(load_params(Path("params.yaml")), {}, {}, 600)
        mismatches = {check: list(recheck(check, run)) for check in ("cycles", "weights", "curves", "predictions")}
    assert (len(calibrated), set(calibrated)) == (20, {7, 1, 4})
    assert (model.num_classes, model.vitprune_classes) == (3, (7, 1, 4))
    for column in ("label", "dense", "pruned"):
        assert {row[column] for row in rows} <= {7, 1, 4}
    assert evaluated["images"] == len(rows) > 10
    assert evaluated["pruned"]["top1"] == 100 * sum(row["pruned"] == row["label"] for row in rows) / len(rows)
    if method == "magnitude":
        assert exported["int8"]["model_top1"] == pytest.approx(evaluated["pruned"]["top1"], abs=5)
    assert mismatches == {"cycles": [], "weights": [], "curves": [], "predictions": []}


def test_the_classes_of_folders_get_the_numbers_of_the_model(
    shared_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_project)
    params = load_params(Path("params.yaml"))
    plain, labels = source_of(params), list(range(20, 30))
    mapped = source_of(with_labels(params, labels))
    assert mapped.labels == tuple(label + 20 for label in plain.labels)
    assert mapped.classes is None
    for wrong in ([1, 2, 3], [5] * 10):
        with pytest.raises(BadInput, match=r"^dataset.labels: names \d+ classes; folder:.* has 10, name each once"):
            source_of(with_labels(params, wrong))


def with_labels(params: object, labels: list[int]) -> object:
    """Return params with dataset.labels."""
    return params.model_copy(update={"dataset": params.dataset.model_copy(update={"labels": labels})})
