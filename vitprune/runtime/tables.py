"""Arrow schemas of the tables that stages write; Parquet input and output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitprune.errors import BadInput
from vitprune.runtime.files import atomic_write
from vitprune.runtime.messages import first_line

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MANIFEST = pa.schema([("id", pa.string()), ("split", pa.string()), ("label", pa.int64()), ("sha256", pa.string())])
CALIBRATION = pa.schema([("id", pa.string()), ("label", pa.int64()), ("sha256", pa.string()), ("image", IMAGE)])
GROUP = [("group", pa.string()), ("kind", pa.string()), ("units", pa.int64())]
SPARSITY = pa.schema([*GROUP, ("kept", pa.int64()), ("sparsity", pa.float64())])
SCORES = pa.schema([*GROUP, *((name, pa.float64()) for name in ("min", "p25", "median", "p75", "max", "mean"))])
EVALUATION = pa.schema([("id", pa.string()), ("label", pa.int64()), ("dense", pa.int64()), ("pruned", pa.int64())])


def write_table(rows: Sequence[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Write rows as a Parquet table, atomically."""
    with atomic_write(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), partial, compression="zstd")


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet table, with the columns of the schema in its order.

    Raises:
        BadInput: the file is missing, is not Parquet, or lacks a column of the schema.
    """
    try:
        with path.open("rb") as file:  # of a path that is a directory, pyarrow would merge all files
            table = pq.read_table(file)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; run the stage that writes it first") from None
    except (pa.ArrowInvalid, OSError) as error:
        why = f"not a readable Parquet file ({first_line(error)})"
        raise BadInput(f"{path}: {why}; run the stage that writes it again") from None
    missing = set(schema.names) - set(table.column_names)
    if missing:
        raise BadInput(f"{path}: column {', '.join(sorted(missing))} is missing; the table needs {schema.names}")
    return table.select(schema.names)
