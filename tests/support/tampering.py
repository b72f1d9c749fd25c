"""Edits of a finished run: each function changes one thing of a recorded project.

`forged_*` also let DVC accept the edit and record the run again, so that all digests agree.
"""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support import shared, tiny_project
from vitprune.runtime.files import md5, sha256

Edit = Callable[[Path], str | None]  # of a project; may return the id of the run to audit


def in_project(name: str, edit: Edit) -> Edit:
    """Edit a file in the project."""

    def carry_out(project: Path) -> None:
        _loose(project / name)
        edit(project / name)

    return carry_out


def in_cache(name: str, edit: Edit) -> Edit:
    """Edit DVC's copy of a file without changing its name."""

    def carry_out(project: Path) -> None:
        sha = md5(project / name)
        cached = project / ".dvc/cache/files/md5" / sha[:2] / sha[2:]
        _loose(cached)
        edit(cached)

    return carry_out


def in_mlflow(name: str, edit: Edit) -> Edit:
    """Edit every copy of a file in MLflow."""

    def carry_out(project: Path) -> None:
        copies = list((project / "mlartifacts").rglob(name))
        assert copies, name
        for path in copies:
            edit(path)

    return carry_out


def in_database(*statements: str) -> Edit:
    """Change rows of MLflow's database."""

    def carry_out(project: Path) -> None:
        with closing(sqlite3.connect(project / "mlflow.db")) as base, base:
            changed = [base.execute(statement).rowcount for statement in statements]
        assert all(changed), changed

    return carry_out


def flip_mask(path: Path) -> None:
    """Swap two units in the first mask of a file."""
    masks = load_file(path)
    name = next(iter(masks))
    mask = masks[name].flatten()
    mask[[int(mask.nonzero()[0]), int((~mask).nonzero()[0])]] = torch.tensor([False, True])
    masks[name] = mask.view(masks[name].shape)
    save_file(masks, path, {"format": "pt"})


def nudge_weight(path: Path) -> None:
    """Change the last bit of one weight."""
    weights = load_file(path)
    first = next(iter(sorted(weights)))
    weights[first].view(-1)[0] = torch.nextafter(weights[first].view(-1)[0], torch.tensor(1e9))
    save_file(weights, path, {"format": "pt"})


def edit_text(old: str, new: str) -> Edit:
    """Replace words of a text file, once."""

    def carry_out(path: Path) -> None:
        text = path.read_text()
        assert old in text, (path, old)
        path.write_text(text.replace(old, new, 1))

    return carry_out


def raise_top1(path: Path) -> None:
    """Increase the top-1 of the pruned model."""
    facts = json.loads(path.read_text())
    facts["pruned"]["top1"] += 2.0
    facts["top1_drop"] -= 2.0
    path.write_text(json.dumps(facts, indent=2) + "\n")


def edit_row(column: str, change: Callable[[int], int]) -> Edit:
    """Change one column of the fifth row of a table."""

    def carry_out(path: Path) -> None:
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[4] = change(values[4])
        directory = table.column_names.index(column)
        pq.write_table(
            table.set_column(directory, table.field(directory), pa.array(values, table.field(directory).type)), path
        )

    return carry_out


def swap_cycles(project: Path) -> None:
    """Swap the models of two cycles."""
    one, two = (project / f"out/cycles/{number}/model.safetensors" for number in ("01", "02"))
    first, second = one.read_bytes(), two.read_bytes()
    for path, content in ((one, second), (two, first)):
        _loose(path)
        path.write_bytes(content)


def change_image(project: Path) -> None:
    """Change one pixel of an image file, which can still be decoded."""
    from PIL import Image

    path = sorted((project / "images").rglob("*.png"))[3]
    _loose(path)
    with Image.open(path) as image:
        pixels = image.copy()
    pixels.putpixel((0, 0), 255 - pixels.getpixel((0, 0)))
    pixels.save(path, compress_level=0)


def edit_locked(project: Path) -> None:
    """Replace a digest in dvc.lock."""
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"]["evaluate"]["outs"][0]["md5"] = "0" * 32 + ".dir"
    (project / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def forged(edit: Edit) -> Edit:
    """Edit, let DVC accept the edit, and record the run again; the new record is audited."""

    def carry_out(project: Path) -> None:
        edit(project)
        tiny_project.dvc(project, "commit", "-q", "--force")
        forget_runs(project)
        tiny_project.record(project, "forged")
        tiny_project.upload(project)

    return carry_out


def forget_runs(project: Path) -> None:
    """Remove all run logs and records of a project."""
    for folder in (project / ".vitprune", project / "mlartifacts"):
        shutil.rmtree(folder, ignore_errors=True)
    shared.add_empty_store(project)


def forge_mask(project: Path) -> None:
    """Flip a mask and update its digest everywhere."""
    folder = project / "out/cycles/02"
    old = sha256(folder / "masks.safetensors")
    in_project("out/cycles/02/masks.safetensors", flip_mask)(project)
    new = sha256(folder / "masks.safetensors")
    for name in ("out/cycles/02/metrics.json", "out/export/timm/README.md"):
        in_project(name, edit_text(old, new))(project)


def forge_label(project: Path) -> None:
    """Change a label in the manifest and update the manifest's digest."""
    old = sha256(project / "data/manifest.parquet")
    in_project("data/manifest.parquet", edit_row("label", lambda label: (label + 1) % 10))(project)
    new = sha256(project / "data/manifest.parquet")
    in_project("metrics/dataset.json", edit_text(old, new))(project)


def forge_weights(project: Path) -> None:
    """Change the last bit of one weight of the final and the exported model and update the digests."""
    old = sha256(project / "out/distill/model.safetensors")
    for name in ("out/distill/model.safetensors", "out/export/timm/model.safetensors"):
        in_project(name, nudge_weight)(project)
    new = sha256(project / "out/distill/model.safetensors")
    for name in ("metrics/distill.json", "out/export/timm/README.md"):
        in_project(name, edit_text(old, new))(project)


BETTER = "UPDATE {0} SET value = value + 2 WHERE key = 'pruned.top1'"
EDITS: dict[str, Edit] = {
    "a mask's units change places, in the project": in_project("out/cycles/02/masks.safetensors", flip_mask),
    "a mask's units change places, in DVC's cache": in_cache("out/cycles/01/masks.safetensors", flip_mask),
    "a mask's units change places, in MLflow": in_mlflow("out/cycles/02/masks.safetensors", flip_mask),
    "top-1 raised in MLflow's database": in_database(BETTER.format("metrics"), BETTER.format("latest_metrics")),
    "top-1 raised in the project's metrics": in_project("metrics/evaluate.json", raise_top1),
    "top-1 raised in MLflow's copy of the metrics": in_mlflow("metrics/evaluate.json", raise_top1),
    "a loss of a training curve lowered in MLflow": in_database(
        "UPDATE metrics SET value = value * 0.9 WHERE key = 'curve.loss' AND step = 3"
    ),
    "a parameter edited in MLflow's database": in_database("UPDATE params SET value = '1' WHERE key = 'seed'"),
    "a parameter edited in MLflow's params.yaml": in_mlflow("params.yaml", edit_text("seed: 0", "seed: 1")),
    "a digest edited in the project's dvc.lock": edit_locked,
    "a digest edited in MLflow's dvc.lock": in_mlflow("dvc.lock", edit_text("md5: 9", "md5: a")),
    "one weight changed in its last bit, in DVC's cache": in_cache("out/distill/model.safetensors", nudge_weight),
    "one weight changed in its last bit, in MLflow's model": in_mlflow("artifacts/model.safetensors", nudge_weight),
    "the models of two cycles swapped": swap_cycles,
    "a label changed in the manifest": in_cache("data/manifest.parquet", edit_row("label", lambda x: (x + 1) % 10)),
    "a pixel changed in an image": change_image,
    "a prediction changed in the evaluation": in_cache(
        "out/evaluate/evaluation.parquet", edit_row("pruned", lambda x: (x + 1) % 10)
    ),
    "a label changed in the calibration set": in_cache(
        "data/calibration.parquet", edit_row("label", lambda x: (x + 1) % 10)
    ),
    "a cycle's run deleted in MLflow": in_database(
        "UPDATE runs SET lifecycle_stage = 'deleted' WHERE name = 'cycle-01'"
    ),
    "an epoch's loss edited in a training history": in_project("out/distill/history.jsonl", edit_text("1.", "0.")),
    "the model card edited": in_project("out/export/timm/README.md", edit_text("# vit_tiny", "# vit_small")),
    "another git commit named": in_database(
        "UPDATE tags SET value = '1234567890123456789012345678901234567890' WHERE key = 'mlflow.source.git.commit'"
    ),
    "all digests agree: top-1 raised": forged(in_project("metrics/evaluate.json", raise_top1)),
    "all digests agree: a mask flipped": forged(forge_mask),
    "all digests agree: a label changed": forged(forge_label),
}
ONLY_AGAIN: dict[str, Edit] = {"all digests agree: one weight in its last bit": forged(forge_weights)}


def _loose(path: Path) -> None:
    """Replace a linked file by a writable copy."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def name_output(path: str) -> Edit:
    """Add an output to MLflow's dvc.lock whose content is in DVC's cache; {} is the project directory."""

    def edit(lock: Path) -> None:
        content = yaml.safe_load(lock.read_text())
        first = content["stages"]["dataset"]["outs"][0]
        root = next(parent for parent in lock.parents if parent.name == "mlartifacts").parent
        content["stages"]["dataset"]["outs"].append(first | {"path": path.format(root.parent)})
        lock.write_text(yaml.safe_dump(content, sort_keys=False))

    return in_mlflow("dvc.lock", edit)


def name_dependency(path: str) -> Edit:
    """Add a dependency to MLflow's dvc.lock."""

    def edit(lock: Path) -> None:
        content = yaml.safe_load(lock.read_text())
        first = content["stages"]["dense"]["deps"][0]
        content["stages"]["dense"]["deps"].append(first | {"path": path})
        lock.write_text(yaml.safe_dump(content, sort_keys=False))

    return in_mlflow("dvc.lock", edit)


def listing(*rows: object) -> Edit:
    """Replace DVC's list of a folder by other content with a correct digest; {} in a row is a digest in the cache."""

    def carry_out(project: Path) -> None:
        cache, content = project / ".dvc/cache/files/md5", (project / "data/manifest.parquet").read_bytes()
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        listed = json.dumps(rows).replace("{}", digest).encode()
        name = hashlib.md5(listed, usedforsecurity=False).hexdigest()
        (cache / name[:2]).mkdir(exist_ok=True)
        (cache / name[:2] / f"{name[2:]}.dir").write_bytes(listed)

        def edit(lock: Path) -> None:
            stages = yaml.safe_load(lock.read_text())
            stages["stages"]["dense"]["outs"][0]["md5"] = f"{name}.dir"
            lock.write_text(yaml.safe_dump(stages, sort_keys=False))

        in_mlflow("dvc.lock", edit)(project)

    return carry_out


def in_tag(key: str, value: str, child: bool = False) -> Edit:
    """Set a tag of the flow's run, or of all its child runs, in MLflow's database."""
    below = (
        "IN (SELECT run_uuid FROM tags WHERE key = 'vitprune.cycle')"
        if child
        else ("= (SELECT run_uuid FROM tags WHERE key = 'vitprune.key' AND value NOT LIKE '%/%')")
    )
    return in_database(
        f"INSERT OR REPLACE INTO tags (key, value, run_uuid) SELECT '{key}', '{value}', run_uuid FROM runs"
        f" WHERE run_uuid {below}"
    )


# attacks by a person with write access to MLflow or to the DVC remote; "victim.txt" is outside the project
ATTACKS: dict[str, Edit] = {
    "dvc.lock names an absolute path": name_output("{}/victim.txt"),
    "dvc.lock names a path above the project": name_output("../../../../../../../..{}/victim.txt"),
    "dvc.lock names a digest that is a path": in_mlflow("dvc.lock", edit_text("md5: ", "md5: ../../../../")),
    "dvc.lock names a dependency above the project": name_dependency("../victim.txt"),
    "dvc.lock is a list": in_mlflow("dvc.lock", lambda path: path.write_text("[1, 2]")),
    "a list of DVC names a file above its folder": listing({"md5": "{}", "relpath": "../../../victim.txt"}),
    "a list of DVC has a number for a file": listing(7),
    "a list of DVC has a file without a name": listing({"md5": "{}"}),
    "the tag of the prefix is another folder": in_tag("vitprune.git_prefix", "/tmp"),
    "the tag of the commit is an option of git": in_tag("mlflow.source.git.commit", "--output=victim.txt"),
    "the tag of a cycle is a path": in_tag("vitprune.cycle", "../../x", child=True),
}
