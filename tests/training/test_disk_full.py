"""A full disk during checkpointing leaves the previous checkpoint intact."""

import errno
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FULL = """
import resource, sys
from pathlib import Path
import torch
from vitprune.training.checkpoint_store import CheckpointStore
shelf = CheckpointStore(Path(sys.argv[1]), "key", keep=1)
first = shelf.save({"number": 1}, {"weights": torch.ones(3)}).directory
if sys.argv[2] == "limit":  # file size limit of 64 KiB
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
before = sorted(str(path) for path in Path(sys.argv[1]).rglob("*"))
try:
    shelf.save({"number": 2}, {"weights": torch.zeros(1 << 20)})
except OSError as error:
    print(error.errno)
assert sorted(str(path) for path in Path(sys.argv[1]).rglob("*")) == before
saved = shelf.latest()
assert (saved.directory, saved.facts["number"]) == (first, 1)
assert torch.equal(saved.tensors()["weights"], torch.ones(3))
"""


def test_a_file_size_limit_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "work"), "limit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr


def test_a_full_file_system_is_reported_before_writing(tmp_path: Path) -> None:
    """A tmpfs of 66 MiB: 64 MiB are reserved, so a checkpoint of 4 MiB does not fit."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=66m tmpfs {tmp_path / 'disk'}"
    if subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own (unshare)")
    inner = shlex.join([sys.executable, "-c", FULL, str(tmp_path / "disk/work"), "disk"])
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mount} && {inner}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{errno.ENOSPC}\n"), done.stderr
