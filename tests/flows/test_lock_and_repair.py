"""Files of DVC that a kill or a full disk leaves truncated."""

from pathlib import Path

import pytest
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.repo import Repo

from vitprune.orchestration.execution.lock_and_repair import LOCKFILE_COPY, is_complete, keep_lockfile, repair

pytestmark = pytest.mark.pipeline
MD5 = "04210ad2fbe0f3ffa3b9d9f0a1d1d2b3"
LOCK = f"""schema: '2.0'
stages:
  dataset:
    cmd: vitprune dataset
    deps:
    - path: images/
      hash: md5
      md5: {MD5}.dir
      size: 4100
      nfiles: 240
    params:
      params.yaml:
        seed: 0
    outs:
    - path: data/manifest.parquet
      hash: md5
      md5: {MD5}
      size: 4100
  dense:
    cmd: vitprune dense
    outs:
    - path: out/dense/
      hash: md5
      md5: {MD5}.dir
      size: 12
      nfiles: 2
"""
MALFORMED = [
    b"", b"[]", b"7", b"text", b"schema: '2.0'\nstages: [1]", b"schema: '2.0'\nstages:\n  dataset",
    b"schema: '2.0'\nstages:\n  dataset: 1", b"\xff\xfe", b"schema: '9'\n", b"? [a]\n: b", b"a: 2020-99-99",
    b"[" * 4000, b"a: &a [*a]", b"a: 1\na: 2", b"<<<<<<< HEAD\nschema: '2.0'\n",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


def accepted_by_dvc(repo: Repo, lock: Path) -> bool:
    try:
        Lockfile(repo, str(lock)).load()
    except DvcException:
        return False
    return True


def test_every_cut_that_dvc_refuses_is_incomplete(project: Path) -> None:
    lock, complete = project / "dvc.lock", 0
    with Repo.init(str(project), no_scm=True, force=True) as repo:
        for length in range(1, len(LOCK) + 1):
            lock.write_text(LOCK[:length])
            if is_complete(lock):
                assert accepted_by_dvc(repo, lock), LOCK[:length]
                complete += 1
    assert 0 < complete < len(LOCK) / 2  # cuts within a value or after an output
    assert is_complete(lock)


@pytest.mark.parametrize("content", MALFORMED)
def test_other_content_is_incomplete_and_replaced(project: Path, content: bytes) -> None:
    lock, lines = project / "dvc.lock", list[str]()
    lock.write_bytes(content)
    assert not is_complete(lock)
    repair(project, lines.append)
    assert (lock.exists(), (project / "dvc.lock.broken").read_bytes()) == (False, content)
    lock.write_text(LOCK)
    (project / LOCKFILE_COPY).parent.mkdir()
    keep_lockfile(project)
    lock.write_bytes(content)
    repair(project, lines.append)
    assert lock.read_text() == LOCK
    assert len(lines) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'{"write": {"/a": {"pid": "word", "cmd": "dvc"}}}', b'{"write": {"/a": 1}}', b"\xff\xfe",
     b'{"write": null}', b'{"read": {"/a": {"pid": 1}}}', b"[" * 100000,
     b'{"write": {"/a": {"pid": -5, "cmd": "dvc"}}}',
     b'{"read": {"/a": [{"pid": 99999999999999999999999, "cmd": "dvc"}]}}'],
)  # fmt: skip
def test_a_damaged_rwlock_is_removed(project: Path, content: bytes) -> None:
    rwlock, lines = project / ".dvc/tmp/rwlock", list[str]()
    rwlock.write_bytes(content)
    repair(project, lines.append)
    assert not rwlock.exists()
    assert len(lines) == 1
