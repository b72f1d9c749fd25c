"""Checkpoints across timm versions: the range of pyproject.toml with vitprune, older ones with plain timm."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.model_zoo import images, predict
from tests.support.pruned_models import dense_of
from vitprune import load, prune, save

ROOT = Path(__file__).parents[2]
Install = Callable[[str], Path]
FIRST_LOCAL = "1.0.16"  # the oldest timm that reads a local directory by create_model

HEAD = """
import sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
found = {}
"""
WRITE = """
from tests.support.pruned_models import cut_of
from tests.support.model_zoo import images, predict
from vitprune import save
for name in ("vit-blocks", "distilled-heads", "swin-stream", "pvt-stream"):
    model = cut_of(*name.split("-"))
    save(model, folder / timm.__version__ / name)
    found |= {f"{name}.images": images(model), f"{name}.logits": predict(model, images(model))}
save_file(found, folder / timm.__version__ / "written.safetensors")
"""
READ = """
from vitprune import load
for other in folder.glob("*/written.safetensors"):
    given = load_file(other)
    for name in (key.removesuffix(".images") for key in given if key.endswith(".images")):
        with torch.no_grad():
            logits = load(other.parent / name)(given[f"{name}.images"])
        torch.testing.assert_close(logits, given[f"{name}.logits"], rtol=0, atol=1e-5)
        print("read", other.parent.name, name)
"""
PLAIN = """
given = load_file(folder / "images.safetensors")
for name, x in given.items():
    model = timm.create_model(f"local-dir:{folder / name}", pretrained=True).eval()
    with torch.no_grad():
        found[name] = model(x)
save_file(found, folder / "logits.safetensors")
args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
model = timm.create_model("vit_tiny_patch16_224", **args).eval()
(folder / "theirs").mkdir()
timm.models._hub.save_config_for_hf(model, folder / "theirs/config.json", model_args=args)
save_file(model.state_dict(), folder / "theirs/model.safetensors")
with torch.no_grad():
    save_file({"logits": model(given["vit"])}, folder / "theirs.safetensors")
assert not any(name.startswith("vitprune") for name in sys.modules)
"""
TAIL = "print(timm.__version__, timm.__file__)"  # to verify the version in use


def allowed() -> tuple[str, str]:
    """The requirement of pyproject.toml, and its lowest version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (expected,) = [line for line in project["dependencies"] if re.match(r"timm\b", line)]
    return expected, re.search(r">=([\d.]+)", expected)[1]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Return a function that installs a version of timm into a folder."""
    parent, done = tmp_path_factory.mktemp("timm"), {}

    def installed(requirement: str) -> Path:
        if requirement not in done:
            target = parent / re.sub(r"\W", "_", requirement)
            words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--retries", "1"]
            words += ["--disable-pip-version-check", "--target", str(target), requirement]
            ran = subprocess.run(words, capture_output=True, text=True, timeout=300)
            if ran.returncode:
                pytest.skip(f"{requirement} cannot be installed: no package index here")
            done[requirement] = target
        return done[requirement]

    return installed


def run(code: str, folder: Path, timm: Path, *paths: Path) -> list[str]:
    """Run a script with the timm of a folder; return its output lines, the version last."""
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, (timm, *paths))), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", HEAD + code + TAIL, str(folder)]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)
    assert ran.returncode == 0, ran.stderr
    *lines, last = ran.stdout.splitlines()
    version, directory = last.split()
    assert directory.startswith(str(timm))
    return [*lines, version]


def test_pruned_checkpoints_load_across_the_timm_range(install: Install, tmp_path: Path) -> None:
    expected, lowest = allowed()
    oldest, newest = install(f"timm=={lowest}"), install(expected)
    selected = (ROOT, ROOT / "tests")
    assert run(WRITE, tmp_path, oldest, *selected) == [lowest]
    *forth, highest = run(READ + WRITE, tmp_path, newest, *selected)
    assert len(forth) == 4
    *back, last = run(READ, tmp_path, oldest, *selected)
    assert last == lowest
    assert {line.split()[1] for line in back} == {lowest, highest}


def test_uniform_checkpoints_load_in_older_timm_without_vitprune(install: Install, tmp_path: Path) -> None:
    given, expected = {}, {}
    for family in ("vit", "distilled", "deit3", "swin", "pvt"):
        dense, half = dense_of(family), {"ffn": 0.5, "attention": 0.5, "residual": 0.5}
        model = (
            prune(dense, "magnitude", sparsity=0.5).model
            if family == "swin"
            else prune(dense, "channel-magnitude", sparsity=half).model
        )
        save(model, tmp_path / family)
        given[family] = images(model)
        expected[family] = predict(model, given[family])
    save_file(given, tmp_path / "images.safetensors")
    assert run(PLAIN, tmp_path, install(f"timm=={FIRST_LOCAL}")) == [FIRST_LOCAL]
    for family, logits in load_file(tmp_path / "logits.safetensors").items():
        torch.testing.assert_close(logits, expected[family], rtol=0, atol=1e-5)
    theirs = load_file(tmp_path / "theirs.safetensors")["logits"]
    torch.testing.assert_close(predict(load(tmp_path / "theirs"), given["vit"]), theirs, rtol=0, atol=1e-5)
