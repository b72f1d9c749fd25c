"""Parquet tables of the stages."""

from pathlib import Path

import pyarrow as pa
import pytest

from vitprune.errors import BadInput
from vitprune.runtime.tables import read_table, write_table

SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int64())])
ROWS = [{"id": "a", "label": 1}]


@pytest.mark.parametrize("folder", ["plain", "label=3"])
def test_a_directory_is_no_table(tmp_path: Path, folder: str) -> None:
    table = tmp_path / "table" / folder / "part.parquet"
    table.parent.mkdir(parents=True)
    write_table(ROWS, SCHEMA, table)
    assert read_table(table, SCHEMA).to_pylist() == ROWS
    with pytest.raises(BadInput, match=r"table: not a readable Parquet file \(.*Is a directory.*\); run the"):
        read_table(tmp_path / "table", SCHEMA)
