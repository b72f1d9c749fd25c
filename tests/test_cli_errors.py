"""The command line: one clear line on stderr and exit code 2 for bad input, no partial files; help and start-up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vitprune import cli
from vitprune.pipeline import stages

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a small params.yaml, as the current directory."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["args"] |= {"depth": 1, "embed_dim": 48, "num_heads": 3}
    params["dense"]["train"]["epochs"] = 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run a command and return its one line on stderr."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vitprune", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        message = capsys.readouterr().err
        assert end.value.code == 2, message
        assert message.count("\n") == 1
        assert message.startswith("Error: ")
        return message

    return run


def change(project: Path, key: str, value: object) -> None:
    """Set a dotted key of params.yaml."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    *sections, leaf = key.split(".")
    section = params
    for name in sections:
        section = section[name]
    section[leaf] = value
    path.write_text(yaml.safe_dump(params))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prune.sparsty", 0.5, "prune.sparsty: unknown key"),
        ("prune.cycles", "three", "prune.cycles: "),
        ("prune.cycles", 0, "prune.cycles: "),
        ("prune.cycles", 10**12, "prune.cycles: "),
        ("threads", 10**9, "threads: Input should be less than or equal to 1024"),
        ("seed", 2**70, "seed: "),
        ("prune.sparsity", 1.5, "prune.sparsity"),
        ("prune.sparsity", {"ffn": -0.1}, "prune.sparsity"),
        ("prune.sparsity", {"fnn": 0.5}, "prune.sparsity"),
        ("dense.start", "scratch", "dense.start: "),
        ("dense.train.lr", 0, "dense.train.lr: "),
        ("calibrate.balance", "even", "calibrate.balance: "),
    ],
)
def test_invalid_params_are_refused(project, refuse, key, value, message):
    change(project, key, value)
    assert message in refuse("dataset")
    assert "params.yaml" in refuse("dataset")
    assert not (project / "data").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prune.sparsity", {"residual": 0.5}, "prune.sparsity.residual: only ffn, attention are scored"),
        ("prune.method", "magic", "Error: prune.method 'magic': unknown"),
        ("prune.scope", "everything", "scope 'everything': unknown"),
        ("prune.sparsity", {"head": 0.5, "attention": 0.5}, "head and attention prune the same axis"),
        ("prune.merge_heads_to", 2, "3 heads cannot merge into 2"),
    ],
)
def test_invalid_plans_are_refused(project, refuse, key, value, message):
    for stage in ("dataset", "dense", "calibrate"):
        stages.run(stage, project)
    change(project, key, value)
    assert message in refuse("score")


def test_a_missing_params_yaml_is_refused(tmp_path, monkeypatch, refuse):
    monkeypatch.chdir(tmp_path)
    assert "params.yaml: no such file" in refuse("dataset")


def test_a_missing_file_names_the_stage_that_writes_it(project, refuse):
    assert "data/manifest.parquet: no such file" in refuse("calibrate")
    assert "out/dense/config.json: no such file" in refuse("score")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parquet:here.parquet", "here.parquet: no such"),
        ("folder:here", "here: no such folder"),
        ("wds/here", "here: no such"),
        ("hearsay", "hearsay"),
    ],
)
def test_a_missing_image_source_is_refused(project, refuse, spec, message):
    change(project, "dataset.source", spec)
    assert message in refuse("dataset")


def test_a_missing_project_is_refused(refuse):
    assert "here: no such directory" in refuse("dataset", "--project", "here")


def test_a_calibration_set_larger_than_the_data_is_refused(project, refuse):
    stages.run("dataset", project)
    change(project, "calibrate.size", 5000)
    message = refuse("calibrate")
    assert "5000" in message
    assert "1438" in message


def test_a_checkpoint_of_another_shape_is_refused(project, refuse):
    stages.run("dataset", project)
    stages.run("dense", project)
    weights = load_file("out/dense/model.safetensors")
    save_file(weights | {"head.weight": torch.zeros(11, 48)}, "other.safetensors")
    change(project, "dense.checkpoint", "other.safetensors")
    change(project, "dense.start", "checkpoint")
    message = refuse("dense")
    assert "other.safetensors: weight head.weight has shape [11, 48], the model needs [10, 48]" in message


def test_a_broken_checkpoint_is_refused(project, refuse):
    stages.run("dataset", project)
    (project / "broken.safetensors").write_bytes(b"not tensors")
    change(project, "dense.checkpoint", "broken.safetensors")
    change(project, "dense.start", "checkpoint")
    assert "broken.safetensors: not a safetensors file" in refuse("dense")


def test_an_unknown_timm_model_is_refused(project, refuse):
    stages.run("dataset", project)
    change(project, "model.name", "vit_enormous")
    assert "vit_enormous" in refuse("dense")


def test_a_model_with_too_few_classes_is_refused(project, refuse):
    stages.run("dataset", project)
    change(project, "model.args.num_classes", 9)
    assert "model.args.num_classes: 9" in refuse("dense")


def test_a_module_that_is_not_supported_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vitprune", "inspect", "test_nfnet"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(ScaledStdConv2d): expected a Linear or Conv2d layer that uses its weights unchanged" in printed


def test_an_unsupported_module_is_named(project, refuse):
    change(project, "model.name", "vit_small_patch14_reg4_dinov2")
    args = {"img_size": 28, "in_chans": 1, "num_classes": 10, "depth": 1, "scale_attn_norm": True}
    change(project, "model.args", args)
    for stage in ("dataset", "dense", "calibrate"):
        stages.run(stage, project)
    assert "blocks.0.attn.norm (LayerNorm): " in refuse("score")


def test_a_loss_that_is_nan_is_reported(project, refuse):
    stages.run("dataset", project)
    change(project, "dense.train.lr", 1e30)
    change(project, "dense.train.clip", None)
    assert "the loss is" in refuse("dense")
    assert not (project / "out/dense/model.safetensors").exists()


def test_a_full_disk_is_reported(project, refuse):
    room = project / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", room], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (room / "params.yaml").write_text((project / "params.yaml").read_text())
        message = refuse("dataset", "--project", str(room))
        assert "No space left on device" in message
        assert not list(room.rglob("*.parquet*"))
    finally:
        os.chdir(project)
        subprocess.run(["umount", "-l", room], check=True)


def test_a_read_only_file_system(project, refuse):
    room = project / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", room], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (room / "params.yaml").write_text((project / "params.yaml").read_text())
        subprocess.run(["mount", "-o", "remount,ro", room], check=True)
        message = refuse("dataset", "--project", str(room))
        assert "data: cannot be made a directory (Read-only file system); give another path" in message
        subprocess.run(["mount", "-o", "remount,rw", room], check=True)
        (room / "data").mkdir()
        (room / "data/manifest.parquet").mkdir()
        message = refuse("dataset", "--project", str(room))
        assert "data/manifest.parquet: cannot be written (Is a directory); give another path" in message
        (room / "data/manifest.parquet").rmdir()
        subprocess.run(["mount", "-o", "remount,ro", room], check=True)
        message = refuse("dataset", "--project", str(room))
        assert "data/manifest.parquet: cannot be written (Read-only file system); give another path" in message
    finally:
        os.chdir(project)
        subprocess.run(["umount", "-l", room], check=True)


def commands() -> list[str]:
    """Every subcommand of the command line."""
    return [command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands]


@pytest.mark.parametrize("command", commands())
def test_the_help_of_every_command_has_an_example(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vitprune", command, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert f"Example: vitprune {command}" in capsys.readouterr().out


def test_the_help_shows_defaults_that_depend_on_other_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vitprune", "init", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "[default: deit_tiny_patch16_224]" in words
    assert "[default: unit-obs; channel-taylor for digits]" in words


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["--help"], {}, "Pipeline runs"),
        (["--version"], {}, "vitprune 0."),
        (["run", "--help"], {}, "--stage-limit"),
        ([], {"_VITPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "vitprune ver", "COMP_CWORD": "1"}, "versions"),
    ],
    ids=["help", "version", "help of run", "completion"],
)
def test_help_version_and_completion_import_no_heavy_package(words, env, expected):
    program = (
        "import atexit, sys\n"
        "heavy = ('torch', 'timm', 'prefect', 'mlflow', 'dvc', 'numpy', 'pyarrow')\n"
        "atexit.register(lambda: print('imported:', [name for name in heavy if name in sys.modules]))\n"
        "from vitprune.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("package", ["dvc", "prefect", "mlflow"])
@pytest.mark.parametrize(
    "words", [["run"], ["sweep"], ["retrain"], ["versions"], ["rollback"], ["audit", "1"], ["sync"]]
)
def test_a_missing_package_of_the_pipeline_is_named_with_its_extra(refuse, monkeypatch, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    assert refuse(*words) == f"Error: {package} is not installed; run: pip install 'vitprune[pipeline]'\n"


def test_a_project_without_its_flow_or_with_a_broken_one_is_refused(tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    program = "from vitprune.cli import main; main()"

    def run() -> str:
        command = [sys.executable, "-W", "ignore", "-c", program, "run", "--project", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    path = tmp_path / "flows/compress.py"
    assert run().startswith(f"Error: {path}: no such file; copy flows/ from a new project")
    path.parent.mkdir()
    path.write_text("import not_there\n")
    assert f"Error: {path}: cannot load the flow compress (ModuleNotFoundError: " in run()


@pytest.mark.parametrize("words", [["versions"], ["rollback"], ["audit", "0123456789abcdef"]])
def test_an_unreachable_mlflow_is_named_without_its_password(tmp_path, monkeypatch, refuse, words):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://admin:planted-secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    error = refuse(*words, "--project", str(tmp_path))
    assert "http://127.0.0.1:9" in error
    assert "planted-secret" not in error
    assert "admin" not in error
