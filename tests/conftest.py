"""Small models for all tests; the real DeiT-Tiny if VITPRUNE_REAL_DATA is set."""

import gc
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import shared, tiny_project
from tests.support.model_zoo import tiny
from vitprune import METHODS, models
from vitprune.criteria import magnitude
from vitprune.pruning.methods import Method

TESTS = Path(__file__).parent
SLOW = frozenset((TESTS / "slow_tests.txt").read_text().split())  # written by tests/support/slow_tests.py


def pytest_configure() -> None:
    """Put all temporary files into the folder of this run, which is deleted at the end; set TMPDIR to look at them."""
    place = str(shared.folder())
    os.environ.setdefault("TMPDIR", place)
    tempfile.tempdir = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and run the files that take minutes first, so that all processes end at about the same time."""
    marks: dict[Path, set[str]] = defaultdict(set)
    slow: dict[Path, int] = defaultdict(int)
    for item in items:
        if f"tests/{item.path.relative_to(TESTS)}::{item.originalname}" in SLOW:
            item.add_marker("slow")
            slow[item.path] += 1
        marks[item.path] |= {mark.name for mark in item.iter_markers()}
    items.sort(key=lambda item: ([name not in marks[item.path] for name in ("team", "pipeline")], -slow[item.path]))


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collections, which otherwise visit a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)  # also runs without pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than there are cores, at most 4, since pipeline tests wait for other processes."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread, in this process and those that it starts: threads are slow on busy cores and change rounding."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def vit() -> nn.Module:
    return tiny("vit")


@pytest.fixture
def swin() -> nn.Module:
    return tiny("swin")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a method `drawn` that draws random scores for units of every kind."""
    scopes = {"ffn": "layer", "attention": "head", "head": "layer", "residual": "layer", "block": "layer"}
    scopes["branch"] = "layer"
    monkeypatch.setitem(METHODS, "drawn", Method(magnitude.random, scopes, ("ffn", "attention"), True, "for tests"))


@pytest.fixture(scope="session")
def shared_project() -> Path:
    """A project whose ten stages have run, built once for all test processes; read-only."""
    return tiny_project.finished()


@pytest.fixture
def finished_project(shared_project: Path, tmp_path: Path) -> Path:
    """A copy of the project whose ten stages have run."""
    return shutil.copytree(shared_project, tmp_path / "project", symlinks=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("VITPRUNE_REAL_DATA")
    if folder is None:
        pytest.skip("VITPRUNE_REAL_DATA is not set: no real weights and images to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def real_deit(real_data: Path) -> nn.Module:
    """DeiT-Tiny with its published weights; shared, so do not change it."""
    checkpoint = real_data / "deit_tiny_patch16_224.safetensors"
    if not checkpoint.exists():
        pytest.skip(f"VITPRUNE_REAL_DATA has no {checkpoint.name}")
    return models.create("deit_tiny_patch16_224", checkpoint=checkpoint).eval()
