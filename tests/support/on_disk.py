"""Digits written to disk in the layouts of users' image sources."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitprune import data
from vitprune.runtime import tables

GRAY8 = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bicubic"}
RGB32 = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


def as_table(manifest: data.Manifest) -> pa.Table:
    return pa.Table.from_pylist(manifest.rows, schema=tables.MANIFEST)


def jpeg(source: data.Source, row: int) -> bytes:
    """Return one digit at 32 px as JPEG."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(source.read(source.ids[row]))).resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(root: Path, source: data.Source, rows: Sequence[int]) -> None:
    """Write digits as root/CLASS/ROW.jpg."""
    for row in rows:
        file = root / f"class{source.labels[row]}" / f"{row}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(source, row))


def write_parquet(path: Path, source: data.Source, rows: Sequence[int], names: Sequence[str] = ()) -> None:
    images = [{"bytes": source.read(source.ids[row]), "path": f"{row}.png"} for row in rows]
    schema = pa.schema([("image", tables.IMAGE), ("label", pa.int64())])
    if names:
        info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    table = pa.table({"image": images, "label": [source.labels[row] for row in rows]}, schema=schema)
    pq.write_table(table, path, row_group_size=7)
