"""Forgeries of a finished run by a person with write access to the project, MLflow and DVC, but no signing key.

`forged` and `logged` record the run again after the edit, with an attestation of their own, so that all records agree.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from safetensors.torch import load_file, save_file

from tests.support import tiny_project
from tests.support.tampering import Edit, edit_text, forged, forget_runs, in_database, in_mlflow, in_project, in_tag
from vitprune.orchestration.attestation.statements import Attestation
from vitprune.orchestration.tracking.journal import JOURNAL, RunLog, digests_of, lock_entry, read_log
from vitprune.runtime.files import sha256

Fact = dict[str, Any]
PARENT = "(SELECT run_uuid FROM tags WHERE key = 'vitprune.key' AND value NOT LIKE '%/%')"
GRANDIOSE = 99.0


def logged(change: Callable[[list[Fact]], object]) -> Edit:
    """Change events of the run log, attest them without signature, and upload them instead of the true ones."""

    def carry_out(project: Path) -> None:
        forget_runs(project)
        log = tiny_project.record(project, "forged")
        facts = read_log(log.path)
        change(facts)
        log.path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        attest_again(log)
        tiny_project.upload(project)

    return carry_out


def attest_again(log: RunLog) -> None:
    """Write an attestation without signature that agrees with the events of a run log."""
    facts, path = read_log(log.path), log.attestation.path
    path.unlink()
    attestation = Attestation(path, log.flow_run_id)
    for fact in facts:
        if fact["fact"] == "stage":
            entry = lock_entry(log.project, fact["stage"])
            outs = digests_of(log.project, entry.get("outs", ()), each_file=True)
            attestation.add_stage(fact, entry, outs, digests_of(log.project, entry.get("deps", ())))
    subjects = {file["path"]: {"sha256": file["sha256"]} for file in (*facts[0]["files"], *facts[-1]["files"])}
    attestation.close(facts[0], facts[-1], subjects | {JOURNAL: {"sha256": sha256(log.path)}})


def of_stage(stage: str, change: Callable[[Fact], object]) -> Callable[[list[Fact]], object]:
    """Change the event of one stage in the run log."""
    return lambda facts: change(next(fact for fact in facts if fact.get("stage") == stage))


def of_json(name: str, change: Callable[[Fact], object]) -> Edit:
    """Change the values of a JSON file in the project."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=2) + "\n")

    return in_project(name, edit)


def all_of(*edits: Edit) -> Edit:
    """Carry out several edits."""

    def carry_out(project: Path) -> None:
        for edit in edits:
            edit(project)

    return carry_out


def copy_of_the_run(project: Path) -> str:
    """Record the run once more in MLflow with the same keys and a better top-1; return the id of the copy."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    copies: dict[str, str] = {}
    for run in reversed(client.search_runs(["1"], order_by=["attributes.start_time DESC"])):
        tags = dict(run.data.tags)
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = copies[tags["mlflow.parentRunId"]]
        copy = client.create_run("1", run.info.start_time - 1000, tags, run.info.run_name).info.run_id
        copies[run.info.run_id] = copy
        for name, value in run.data.params.items():
            client.log_param(copy, name, value)
        for name, value in run.data.metrics.items():
            client.log_metric(copy, name, GRANDIOSE if name == "pruned.top1" else value)
        for file in client.list_artifacts(run.info.run_id):
            local = client.download_artifacts(run.info.run_id, file.path)
            client.log_artifacts(copy, local, file.path) if file.is_dir else client.log_artifact(copy, local)
        client.set_terminated(copy, "FINISHED", run.info.end_time)
    return next(copies[run.info.run_id] for run in client.search_runs(["1"], f"run_id IN ('{next(iter(copies))}')"))


def register_another_model(project: Path) -> None:
    """Log other weights as a model of the run, and make it the champion."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    model = client.create_logged_model("1", "vitprune", None, {"vitprune.key": "first/distill"}, model_type="timm")
    client.log_model_artifact(model.model_id, str(project / "out/dense/model.safetensors"))
    client.finalize_logged_model(model.model_id, "READY")
    run = client.search_runs(["1"], "tags.`vitprune.key` = 'first'")[0].info.run_id
    client.create_registered_model("vit")
    mlflow.set_tracking_uri(client.tracking_uri)  # models:/ is resolved there
    version = client.create_model_version("vit", f"models:/{model.model_id}", run, model_id=model.model_id)
    client.set_registered_model_alias("vit", "champion", version.version)


def measure_the_model_again(project: Path) -> None:
    """Log a metric of the run's model in another run."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    model = client.search_logged_models(["1"])[0].model_id
    other = client.create_run("1").info.run_id
    client.log_batch(other, [Metric("pruned.top1", GRANDIOSE, 0, 0, model_id=model)])


def add_artifacts(project: Path) -> None:
    """Add files to the run and to its logged model in MLflow."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    run = client.search_runs(["1"], "tags.`vitprune.key` = 'first'")[0].info.run_id
    client.log_text(run, "top-1: 99.9 %", "results.md")
    model = client.search_logged_models(["1"])[0]
    (project.parent / "python_model.pkl").write_bytes(b"not read")
    client.log_model_artifact(model.model_id, str(project.parent / "python_model.pkl"))


def load_through_other_code(project: Path) -> None:
    """Let MLflow load the model of the run through another module."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    model = client.search_logged_models(["1"])[0].model_id
    path = project.parent / "MLmodel"
    path.write_text("flavors: {python_function: {loader_module: innocent}}\n")
    client.log_model_artifact(model, str(path))


def predict_right(project: Path) -> None:
    """Set every prediction of the evaluation to the label, and the accuracy to 100 % everywhere."""

    def edit(path: Path) -> None:
        table = pq.read_table(path)
        index = table.column_names.index("pruned")
        labels = pa.array(table["label"].to_pylist(), table.field(index).type)
        pq.write_table(table.set_column(index, table.field(index), labels), path)

    in_project("out/evaluate/evaluation.parquet", edit)(project)
    dense = json.loads((project / "metrics/evaluate.json").read_text())["dense"]["top1"]
    perfect = {"top1": 100.0, "top5": 100.0}
    of_json("metrics/evaluate.json", lambda m: (m["pruned"].update(perfect), m.update(top1_drop=dense - 100)))(project)
    of_json("metrics/distill.json", lambda m: m.update(perfect))(project)


def change_weights(folder: str, change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> Edit:
    """Change the weights of a model, and its digest and top-1 wherever they are named."""

    def carry_out(project: Path) -> None:
        old = sha256(project / folder / "model.safetensors")

        def edit(path: Path) -> None:
            torch.manual_seed(0)
            weights = {k: change(v) if only in k and v.is_floating_point() else v for k, v in load_file(path).items()}
            save_file(weights, path, {"format": "pt"})

        folders = [folder, *(["out/export/timm"] if folder == "out/distill" else [])]
        for name in folders:
            in_project(f"{name}/model.safetensors", edit)(project)
        new = sha256(project / folder / "model.safetensors")
        for path in [*project.glob("metrics/*.json"), *project.glob("out/**/*.json"), *project.glob("out/**/*.md")]:
            if old in path.read_text():
                in_project(path.relative_to(project).as_posix(), edit_text(old, new))(project)

    return carry_out


def permute_masks(project: Path) -> None:
    """Exchange two units in the first mask of the mask stage and of every cycle, with their digests."""
    paths = [project / "out/mask/masks.safetensors", *sorted(project.glob("out/cycles/*/masks.safetensors"))]
    first = load_file(paths[0])
    name = next(iter(first))
    last = load_file(paths[-1])[name].flatten()
    kept, removed = int(last.nonzero()[0]), int((~first[name].flatten()).nonzero()[0])
    for path in paths:
        old = sha256(path)

        def edit(file: Path) -> None:
            masks = load_file(file)
            flat = masks[name].flatten()
            flat[[kept, removed]] = flat[[removed, kept]]
            save_file(masks, file, {"format": "pt"})

        in_project(path.relative_to(project).as_posix(), edit)(project)
        for other in [*project.glob("metrics/*.json"), *project.glob("out/**/*.json"), *project.glob("out/**/*.md")]:
            if old in other.read_text():
                in_project(other.relative_to(project).as_posix(), edit_text(old, sha256(path)))(project)


def set_param(*path: str, value: object) -> Edit:
    """Commit another value of params.yaml and change all records accordingly, without computing anything again."""

    def carry_out(project: Path) -> None:
        params = yaml.safe_load((project / "params.yaml").read_text())
        section = params
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        amend(project)

    return carry_out


def amend(project: Path) -> None:
    """Replace the last commit by one with the present files."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "commit", "-qa", "--amend", "-m", "A tiny project of images."], cwd=project, check=True)


def wrap_command(project: Path) -> None:
    """Commit a dvc.yaml whose evaluate stage calls another program after vitprune."""
    pipeline = yaml.safe_load((project / "dvc.yaml").read_text())
    pipeline["stages"]["evaluate"]["cmd"] = "vitprune evaluate && true raise"
    (project / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    amend(project)


def lower_a_loss(project: Path) -> None:
    """Lower the last loss of the distillation, in its history and its plot alike."""
    rows = [json.loads(line) for line in (project / "out/distill/history.jsonl").read_text().splitlines()]
    old, rows[-1]["loss"] = rows[-1]["loss"], 0.125
    in_project("out/distill/history.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))(
        project
    )
    in_project("plots/distill.csv", edit_text(str(old), "0.125"))(project)


def move_an_eval_image(project: Path) -> None:
    """Move an image of the evaluation split to the training split, and run all later stages on the new manifest."""
    path = project / "data/manifest.parquet"
    old, rows = sha256(path), pq.read_table(path).to_pylist()
    next(row for row in rows if row["split"] == "eval")["split"] = "train"
    in_project("data/manifest.parquet", partial(_write_rows, rows))(project)
    splits = {split: sum(row["split"] == split for row in rows) for split in ("train", "eval")}
    of_json("metrics/dataset.json", lambda m: m.update(splits))(project)
    in_project("metrics/dataset.json", edit_text(old, sha256(path)))(project)
    tiny_project.run_stages(project, "dense")


def replace_calibration_images(project: Path) -> None:
    """Exchange the bytes of the calibration images, but not their checksums: no later stage would read them."""
    _exchange_in_calibration(project, ("image",))


def replace_calibration_images_and_checksums(project: Path) -> None:
    """Exchange the bytes and the checksums of the calibration images, and run all later stages on them."""
    _exchange_in_calibration(project, ("image", "sha256"))
    tiny_project.run_stages(project, "score")


def _exchange_in_calibration(project: Path, columns: Sequence[str]) -> None:
    path = project / "data/calibration.parquet"
    old, rows = sha256(path), pq.read_table(path).to_pylist()
    changed = [row | {name: other[name] for name in columns} for row, other in zip(rows, rows[::-1], strict=True)]
    in_project("data/calibration.parquet", partial(_write_rows, changed))(project)
    in_project("metrics/calibrate.json", edit_text(old, sha256(path)))(project)


def _write_rows(rows: list[Fact], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)


def link_outputs(project: Path) -> None:
    """Move the outputs to a folder outside of the project, and replace them by a symbolic link."""
    elsewhere = project.with_name(f"{project.name}-elsewhere")
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.move(project / "out", elsewhere)
    (project / "out").symlink_to(elsewhere)


def link_a_model(project: Path) -> None:
    """Move the final model to a folder outside of the project, and replace it by a symbolic link."""
    elsewhere, path = project.with_name(f"{project.name}-model"), project / "out/distill/model.safetensors"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere / path.name)


def add_an_image(project: Path) -> None:
    """Add an image to the folder of images, after the run."""
    tiny_project.write_images(project / "images", range(240, 241))


def add_an_output(project: Path) -> None:
    """Add a file to the outputs of a stage, after the run."""
    (project / "out/distill/model-99.safetensors").write_bytes(b"not read")


def _dirty(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text() + "# a comment that is not committed\n")


def _amended(project: Path) -> None:
    (project / "notes.txt").write_text("later\n")
    subprocess.run(["git", "add", "notes.txt"], cwd=project, check=True)
    amend(project)


def _raise_journal(fact: Fact) -> None:
    fact["metrics"]["pruned.top1"] = GRANDIOSE


def _faster(latency: Fact) -> None:
    pruned = latency["pruned"]
    pruned["throughput"] *= 10
    pruned["latency_ms"] |= {key: pruned["latency_ms"][key] / 10 for key in ("median", "p10", "p90")}


def _seconds(fact: Fact) -> None:
    fact["seconds"] /= 10


def _top5(project: Path) -> None:
    of_json("metrics/evaluate.json", lambda m: [m[k].update(top5=GRANDIOSE) for k in ("dense", "pruned")])(project)
    for stage in ("dense", "distill"):
        of_json(f"metrics/{stage}.json", lambda m: m.update(top5=GRANDIOSE))(project)


# Forgeries that a check must detect.
FORGERIES: dict[str, Edit] = {
    "M1 top-1 raised in latest_metrics only": in_database(
        "UPDATE latest_metrics SET value = value + 2 WHERE key = 'pruned.top1'"
    ),
    "M2 top-1 raised in the run log": logged(of_stage("evaluate", _raise_journal)),
    "M3 a param changed in the run log": logged(lambda facts: facts[0]["params"].update({"prune.sparsity.ffn": 0.9})),
    "M4 versions changed in the run log": logged(lambda facts: facts[0]["versions"].update(torch="1.0.0")),
    "M5 a cycle removed from the run log": logged(of_stage("prune", lambda fact: fact["cycles"].pop(0))),
    "M6 seconds of a stage divided by 10": logged(of_stage("distill", _seconds)),
    "M7 branch and dirty flag changed": logged(lambda facts: facts[0]["git"].update(branch="release", dirty=False)),
    "M11 top-1 raised in the logged model": in_database(
        "UPDATE logged_model_metrics SET metric_value = 99 WHERE metric_name = 'pruned.top1'"
    ),
    "M14b the description replaced": in_tag("mlflow.note.content", "99.9 %"),
    "M16 a param deleted in MLflow": in_database("DELETE FROM params WHERE key = 'distill.temperature'"),
    "M17 a metric added in MLflow": in_database(
        f"INSERT INTO latest_metrics SELECT 'speedup', 9, 0, 0, 0, run_uuid FROM runs WHERE run_uuid IN {PARENT}",
        f"INSERT INTO metrics SELECT 'speedup', 9, 0, run_uuid, 0, 0 FROM runs WHERE run_uuid IN {PARENT}",
    ),
    "M18 history of a metric deleted": in_database("DELETE FROM metrics WHERE key = 'pruned.top1'"),
    "M19 a point added to a curve": in_database(
        "INSERT INTO metrics SELECT 'curve.loss', 0.001, 0, run_uuid, 999, 0 FROM runs WHERE name = 'dense'"
    ),
    "M20 another model of the run registered": register_another_model,
    "M21 the report replaced in MLflow": in_mlflow("report.html", lambda path: path.write_text("99 %")),
    "M23 status of a run changed": in_database("UPDATE runs SET status = 'FAILED' WHERE name = 'evaluate'"),
    "M24 times of a run changed": in_database("UPDATE runs SET end_time = start_time + 1 WHERE name = 'prune'"),
    "M25 a run renamed": in_database("UPDATE runs SET name = 'evaluate-99' WHERE name = 'evaluate'"),
    "M26 MLflow loads the model through other code": load_through_other_code,
    "F1 all predictions right": forged(predict_right),
    "F2 masks permuted alike": forged(permute_masks),
    "F3 dense weights are noise": forged(change_weights("out/dense", torch.randn_like)),
    "F4 numbers of the report changed": forged(in_project("out/report/report.html", edit_text("%", " %"))),
    "F5 latency divided by 10": forged(of_json("metrics/latency.json", _faster)),
    "F6 the card's top-1 changed": forged(in_project("out/export/timm/README.md", edit_text("%", "0 %"))),
    "F7 mean of the exported config changed": forged(
        in_project("out/export/timm/config.json", edit_text("0.5", "0.4"))
    ),
    "F8 a loss lowered in history and plot": forged(lower_a_loss),
    "F10 export.json: difference changed": forged(
        of_json("metrics/export.json", lambda m: m["timm"].update(max_abs_diff=-1.0))
    ),
    "F11 mask.json: cost changed": forged(of_json("metrics/mask.json", lambda m: m.update(target={"macs": 0.1}))),
    "F13 top-5 raised everywhere": forged(_top5),
    "F15 final weights are noise": forged(change_weights("out/distill", torch.randn_like)),
    "F16 head of the final model negated": forged(change_weights("out/distill", torch.neg, "head.weight")),
    "F17 another seed committed": forged(set_param("seed", value=7)),
    "F18 another temperature committed": forged(set_param("distill", "temperature", value=8.0)),
    "F18b another calibration committed": forged(set_param("calibrate", "balance", value="uniform")),
    "F18c another method committed": forged(set_param("prune", "method", value="channel-magnitude")),
    "F18d another sparsity committed": forged(set_param("prune", "sparsity", value={"ffn": 0.9, "attention": 0.9})),
    "F22 the outputs are a link to a folder elsewhere": link_outputs,
    "F28 an eval image moved to the training split": forged(move_an_eval_image),
    "F29 calibration images replaced": forged(replace_calibration_images),
    "F29b calibration images and checksums replaced": forged(replace_calibration_images_and_checksums),
    "F30 a command wrapped in the commit": forged(wrap_command),
    "F31 a cycle's model is noise": forged(change_weights("out/cycles/01", torch.randn_like)),
}
# Changes that are also legitimate: the audit passes and lists them.
LISTED: dict[str, tuple[Edit, str]] = {
    "M11b a metric of the model from another run": (measure_the_model_again, "pruned.top1 99.0 was logged by the run"),
    "M12 artifacts added": (add_artifacts, "the artifact results.md is in MLflow only"),
    "M14 tags added": (in_tag("reviewed", "99.9 %"), "tag reviewed is in MLflow only: '99.9 %'"),
    "F19 uncommitted params.yaml": (forged(_dirty), "the run used uncommitted changes of params.yaml"),
    "F22b a model is a link": (link_a_model, "out/distill/model.safetensors is a symbolic link to "),
    "F26 an image added": (add_an_image, "images has 1 file that is not in images.dvc, images/"),
    "F26b a file added to the outputs": (
        add_an_output, "out/distill has 1 file that is not in dvc.lock, out/distill/model-99.safetensors"
    ),
    "F21 commit on no branch": (_amended, "no branch of a git remote has the commit"),
}  # fmt: skip
