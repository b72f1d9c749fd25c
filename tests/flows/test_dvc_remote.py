"""Runs shared by a DVC remote (folder, SSH, S3): a clone pulls the outputs instead of computing them."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import servers, tiny_project
from vitprune.errors import BadInput
from vitprune.pipeline.project_template import Choice, create_project

pytestmark = pytest.mark.pipeline
KINDS = ("folder", "ssh", "s3")


@pytest.fixture(scope="module")
def project(shared_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has run once, with its metrics and dvc.lock committed."""
    project = shutil.copytree(shared_project, tmp_path_factory.mktemp("remote") / "project", symlinks=True)
    tiny_project.commit(project, "A run.")
    return project


@pytest.fixture
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """Address of a remote of the requested type, and the file of its SSH key."""
    with contextlib.ExitStack() as stack:
        if request.param == "folder":
            yield str(tmp_path / "store"), ""
        elif request.param == "ssh":
            if lacks := servers.missing():
                pytest.skip(f"not installed: {lacks}")
            made = stack.enter_context(servers.remote(tmp_path / "ssh"))
            yield made.address, str(made.key)
        else:
            pytest.importorskip("dvc_s3")
            for name, value in stack.enter_context(servers.bucket(tmp_path / "s3.log")).items():
                monkeypatch.setenv(name, value)
            yield "s3://team/store", ""


@pytest.mark.parametrize("remote", KINDS, indirect=True)
def test_a_clone_pulls_a_run_and_computes_nothing(project: Path, remote: tuple[str, str], tmp_path: Path) -> None:
    address, key = remote
    mine, other = tmp_path / "mine", tmp_path / "elsewhere" / "clone"
    clone(project, mine)
    tiny_project.dvc(mine, "cache", "dir", "--local", str(project / ".dvc/cache"))
    tiny_project.add_remote(mine, address, key)
    tiny_project.commit(mine, "Name the team's remote.")
    tiny_project.dvc(mine, "push", "-q", "--run-cache")

    clone(mine, other)
    if key:
        tiny_project.set_remote_key(other, key)
    tiny_project.dvc(other, "pull", "-q", "--run-cache")
    output = tiny_project.dvc(other, "repro", "evaluate")
    assert output.count("didn't change, skipping") == 9  # eight stages, and the images
    assert "Running stage" not in output
    for name in ("metrics/evaluate.json", "out/distill/model.safetensors", "data/manifest.parquet"):
        assert (other / name).read_bytes() == (project / name).read_bytes()
    assert "up to date" in tiny_project.dvc(other, "status")


def test_init_configures_the_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_project(tmp_path / "first", Choice(remote="store"))
    assert tiny_project.dvc(tmp_path / "first", "config", "remote.team.url").strip() == str(tmp_path / "store")
    assert (tmp_path / "first/requirements.txt").read_text().count("\n") == 1
    create_project(tmp_path / "second", Choice(remote="ssh://me@host.example/store"))
    assert tiny_project.dvc(tmp_path / "second", "config", "remote.team.url").strip() == "ssh://me@host.example/store"
    assert tiny_project.dvc(tmp_path / "second", "config", "core.remote").strip() == "team"
    assert (tmp_path / "second/requirements.txt").read_text().splitlines()[1] == "dvc[ssh]"


def test_an_existing_remote_is_kept(tmp_path: Path) -> None:
    for name in ("same", "other"):
        subprocess.run(["git", "init", "-q", tmp_path / name], check=True)
        tiny_project.dvc(tmp_path / name, "init", "-q")
        tiny_project.dvc(tmp_path / name, "remote", "add", "-d", "mine", str(tmp_path / "store"))
    create_project(tmp_path / "same", Choice(remote=str(tmp_path / "store")))
    assert tiny_project.dvc(tmp_path / "same", "config", "core.remote").strip() == "mine"
    with pytest.raises(BadInput, match=r"DVC's default remote is mine, .*store; leave out --remote to keep it"):
        create_project(tmp_path / "other", Choice(remote=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "other/params.yaml").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ssh://me:SECRET@host/store", r"^--remote ssh://\.\.\.@host/store: contains a password"),
        ("s3://SECRET@bucket/store", r"^--remote s3://\.\.\.@bucket/store: contains a password or key"),
        ("s3://bucket/x?X-Amz-Signature=SECRET", r"^--remote s3://bucket/x: contains a query or fragment"),
        ("azure://bucket/x?", r"^--remote azure://bucket/x: contains a query or fragment"),
        ("gs://bucket/x#SECRET", r"^--remote gs://bucket/x: contains a query or fragment"),
        ("s3://[SECRET", r"^--remote s3://: not an address"),
        ("ftp://host/store", r"^--remote ftp://: unknown; give a folder, or .*ssh://$"),
        ("s3:///store", r"^--remote s3:///store: has no bucket$"),
    ],
)
def test_an_invalid_address_leaves_no_files(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        create_project(tmp_path / "project", Choice(remote=address))
    assert not (tmp_path / "project").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dvc_gs", None)
    with pytest.raises(BadInput, match=r"^--remote gs://team/store: needs dvc_gs; pip install 'dvc\[gs\]'$"):
        create_project(tmp_path / "project", Choice(remote="gs://team/store"))


def clone(source: Path, target: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(source), str(target)], check=True)
