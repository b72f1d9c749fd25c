"""Audits of an unmodified run and of tampered ones: one edit of each type; all edits are in benchmarks/reliability."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support import preloaded, tamper_worker, tiny_project
from tests.support.forgeries import FORGERIES, LISTED
from tests.support.tampering import ATTACKS, EDITS, forget_runs
from vitprune.config.params import load_params
from vitprune.orchestration.attestation.signing import SIGNING_KEY
from vitprune.orchestration.execution.dvc_cache import tree_md5
from vitprune.pipeline.verify import CHECKS, RecordedRun, recheck
from vitprune.runtime.files import md5

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(shared_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished, recorded run."""
    project = shutil.copytree(shared_project, tmp_path_factory.mktemp("audit") / "project", symlinks=True)
    tiny_project.record(project, "first")
    tiny_project.upload(project)
    return project


def audit(cwd: Path, *words: str, **env: str) -> tuple[int, str, str]:
    result = preloaded.run("vitprune.cli", "audit", *words, cwd=cwd, env=os.environ | env)
    return result.returncode, result.stdout, result.stderr


def test_an_unmodified_run_passes_and_edits_are_named(project: Path) -> None:
    expected = {
        "honest": "trained_stages: dense, prune, distill",
        "a mask's units change places, in DVC's cache": "stages: out/mask/masks.safetensors: DVC's copy",
        "top-1 raised in MLflow's database": "records: compress-first: metric pruned.top1 is shown as",
        "a digest edited in the project's dvc.lock": "belongs to no run in MLflow",
        "a pixel changed in an image": "images/0/0030.png: has the MD5",
        "a cycle's run deleted in MLflow": "cycle-01: MLflow has no runs with the key",
        "all digests agree: top-1 raised": "weights: metrics/evaluate.json: pruned: top1 is ",
        "all digests agree: a mask flipped": "cycles: out/cycles/02/masks.safetensors: ",
    }
    edits = {"honest": lambda path: None, **EDITS}
    options = {"all digests agree: a mask flipped": ["--all"]}  # the report differs before
    results = {name: tamper_worker.edited(project, edits[name], *options.get(name, ())) for name in expected}
    assert {name: output for name, (_, output) in results.items() if expected[name] not in output} == {}
    assert {name: code for name, (code, _) in results.items()} == {name: int(name != "honest") for name in expected}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "F22 the outputs are a link to a folder elsewhere",
            1,
            "project: dvc.lock: dense: path 'out/dense' is outside of",
        ),
        (
            "F28 an eval image moved to the training split",
            1,
            "dataset: data/manifest.parquet: row 0 (0/0000.png): split",
        ),
        ("F29 calibration images replaced", 1, "calibrate: data/calibration.parquet: row 0 (4/0144.png): image is "),
        *[(name, 0, f"- project: {LISTED[name][1]}") for name in ("F22b a model is a link", "F26 an image added")],
    ],
)
def test_links_and_other_images_are_detected_or_listed(project: Path, name: str, code: int, message: str) -> None:
    result, output = tamper_worker.edited(project, tamper_worker.EVERY_EDIT[name])
    assert (result, message in output) == (code, True), output
    lines = [line for line in output.splitlines() if not line.endswith((": ok", ": see below"))]
    assert code == 0 or lines[0].startswith(message), output  # all earlier checks pass


def test_a_forged_run_has_no_valid_signature(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    forget_runs(copy)
    monkeypatch.setenv(SIGNING_KEY, str(key))
    tiny_project.record(copy, "signed")
    tiny_project.upload(copy)
    monkeypatch.delenv(SIGNING_KEY)
    options = ("--all", "--trusted-keys", str(key.with_suffix(".pub")))
    code, output = tamper_worker.audited(copy, *options)
    assert code == 0, output
    assert "- signature: signed by the trusted key SHA256:" in output
    code, output = tamper_worker.edited(copy, FORGERIES["M6 seconds of a stage divided by 10"], *options)
    assert (code, output.count("has no valid signature of a trusted key")) == (1, 11)
    assert {line.split(": ")[0] for line in output.splitlines() if " has no valid " in line} == {"signature"}
    code, output = tamper_worker.edited(copy, FORGERIES["M26 MLflow loads the model through other code"], *options)
    assert (code, "MLmodel: of MLflow's model" in output) == (1, True), output
    code, output = tamper_worker.edited(copy, FORGERIES["F1 all predictions right"])
    assert (code, "predictions: out/evaluate/evaluation.parquet: " in output) == (1, True)  # without a key


def test_the_command_lists_all_differences_and_refuses_unknown_runs(project: Path) -> None:
    run = tamper_worker.newest(project)
    code, out, _ = audit(project, run, "--all")
    assert (code, out.splitlines()[-1]) == (0, "PASS")
    assert [line.split(": ")[0] for line in out.splitlines() if line.endswith(": ok")][-1] == "latencies"
    assert [line for line in out.splitlines() if line.startswith("- ")] == [
        "- signature: the run is not signed: whoever can write to the project, MLflow and the DVC remote"
        " can replace all of it",
        *[line for line in out.splitlines() if line.startswith("- commit: no branch of a git remote has the commit ")],
        "- trained_stages: dense, prune, distill: training is repeated by --rerun only",
    ]
    code, _, err = audit(project, "0123456789")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("Error: run 0123456789: ")
    nowhere = project.parent / "nowhere"
    code, out, err = audit(project, run, "--project", str(nowhere))
    assert (code, out, err) == (
        2,
        "",
        f"Error: {nowhere}/mlflow.db: no such file; give the project by --project, or set MLFLOW_TRACKING_URI\n",
    )
    assert not nowhere.exists()
    assert subprocess.run(["git", "worktree", "list"], cwd=project, capture_output=True).stdout.count(b"\n") == 1


def test_a_clone_is_audited_from_a_remote_alone(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "project", symlinks=True)
    tiny_project.dvc(copy, "remote", "add", "-d", "store", str(tmp_path / "store"))
    tiny_project.commit(copy, "Name a remote.")
    tiny_project.dvc(copy, "push", "-q")
    subprocess.run(["git", "clone", "-q", str(copy), str(tmp_path / "clone")], check=True)
    tiny_project.dvc(tmp_path / "clone", "pull", "-q", "images")
    uri = f"sqlite:///{project}/mlflow.db"
    # the commit of the run names no remote, so the clone's remote is used
    shutil.copyfile(copy / ".dvc/config", tmp_path / "clone/.dvc/config.local")
    words = (tamper_worker.newest(project), "--project", str(tmp_path / "clone"))
    code, out, err = audit(tmp_path, *words, MLFLOW_TRACKING_URI=uri)
    assert (code, out.splitlines()[-1]) == (0, "PASS"), out + err
    for path in (tmp_path / "store").rglob("*.dir"):
        path.chmod(0o644)
        path.unlink()
    code, out, err = audit(tmp_path, *words, MLFLOW_TRACKING_URI=uri)
    assert (code, out.splitlines()[0][:9]) == (1, "complete:"), out + err


def test_records_of_a_run_cannot_write_outside_the_audit_directory(project: Path) -> None:
    victim = project.parent / "victim.txt"
    victim.write_text("the auditor's own")
    for name, attack in ATTACKS.items():
        code, output = tamper_worker.edited(project, attack)
        assert code == 1, (name, output)
        assert "Traceback" not in output, (name, output)
        assert victim.read_text() == "the auditor's own"
        assert not victim.is_symlink(), name
    assert not list(project.rglob("*victim*"))


def test_a_command_that_exists_only_in_mlflow_is_not_executed(project: Path) -> None:
    marker, (record,) = project.parent / "ran", (project / "mlartifacts").rglob("dvc.yaml")
    original = record.read_text()
    record.write_text(original.replace("stages:\n", f"stages:\n  aaa:\n    cmd: touch {marker}\n", 1))
    try:
        code, out, err = audit(project, tamper_worker.newest(project), "--all", "--rerun")
    finally:
        record.write_text(original)
    assert (code, err) == (1, "")
    assert "rerun: dvc.yaml in MLflow is not that of the commit, and only committed commands are run" in out
    assert not marker.exists()


def test_digests_equal_those_of_dvc(project: Path) -> None:
    entry = yaml.safe_load((project / "images.dvc").read_text())["outs"][0]
    assert tree_md5(project / "images") == entry["md5"]
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["dataset"]
    assert md5(project / "data/manifest.parquet") == lock["outs"][0]["md5"]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_with_unreadable_files_reports_it(project: Path, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RecordedRun(load_params(project / "params.yaml"), {}, {}, 60)
    assert len(list(recheck(name, run))) == 1
