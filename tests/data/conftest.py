"""Fixtures: scanned digits, and real photographs where available."""

from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.on_disk import as_table
from vitprune import data


@pytest.fixture(scope="session")
def digits() -> data.Source:
    return data.open_source("digits")


@pytest.fixture(scope="session")
def manifest(digits: data.Source) -> pa.Table:
    return as_table(data.build_manifest(digits, eval_fraction=0.2, seed=0, skip_limit=0.0))


@pytest.fixture(scope="session")
def photographs(real_data: Path) -> Path:
    path = real_data / "imagenet-val-800.parquet"
    if not path.exists():
        pytest.skip(f"VITPRUNE_REAL_DATA has no {path.name}")
    return path
