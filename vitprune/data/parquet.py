"""Parquet image source: columns image (struct of bytes and path) and label (int64)."""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitprune.data.sources import Source, missing_image
from vitprune.errors import BadInput
from vitprune.runtime.messages import first_line

GROUPS_IN_MEMORY = 4
SPLIT_OF_PREFIX = {"train": "train", "val": "eval", "validation": "eval", "valid": "eval", "test": "eval"}


class ParquetReader:
    """Reads rows in any order from any thread; the most recent row groups are cached."""

    def __init__(self, files: dict[str, Path], starts: dict[str, np.ndarray]):
        self._files = files
        self._starts = starts  # file name -> first row of each row group, then the number of rows
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # worker processes get an empty cache and a new lock
        return ParquetReader, (self._files, self._starts)

    def __call__(self, image_id: str, /) -> bytes:
        """Return the bytes of row ROW of file FILE, for the id FILE#ROW."""
        name, _, digits = image_id.rpartition("#")
        if name not in self._files or not digits.isdecimal() or int(digits) >= self._starts[name][-1]:
            raise missing_image(image_id, "the Parquet files")
        row = int(digits)
        group = int(np.searchsorted(self._starts[name], row, side="right")) - 1
        image = self._column(name, group)[row - int(self._starts[name][group])].as_py()
        if image is None or image["bytes"] is None:
            raise OSError(f"{image_id}: the row has no image")
        return bytes(image["bytes"])

    def _column(self, name: str, group: int) -> Any:
        key = (name, group)
        with self._lock:
            if key not in self._groups:
                # reopened, because an open file must not be shared with a forked process
                with pq.ParquetFile(self._files[name]) as file:
                    self._groups[key] = file.read_row_group(group, columns=["image"], use_threads=False)["image"]
            self._groups.move_to_end(key)
            while len(self._groups) > GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
            return self._groups[key]


def open_parquet(path: Path, classes: Sequence[str] | None) -> Source:
    """Open a Parquet file or a folder of them; files named train-* and validation-* (val-*, test-*) are splits.

    Args:
        path: File or folder.
        classes: Class names by label; None to read them from the metadata of Hugging Face datasets, if present.

    Returns:
        The source.

    Raises:
        BadInput: a file is missing, is not Parquet, lacks a column, or has an invalid label.
    """
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise BadInput(f"parquet:{path}: no *.parquet file in the folder; correct dataset.source")
    by_name, split_of = _by_split({file.name: file for file in paths})
    names = tuple(classes) if classes is not None else None
    starts: dict[str, np.ndarray] = {}
    labels: list[int] = []
    for name, file in by_name.items():
        starts[name], column, stored_names = _labels(file)
        names = names or stored_names
        labels += _checked(column, names, file)
    if not labels:
        raise BadInput(f"parquet:{path}: no rows; correct dataset.source")
    counts = {name: int(starts[name][-1]) for name in by_name}
    ids = tuple(f"{name}#{row}" for name, rows in counts.items() for row in range(rows))
    splits = tuple(split_of[name] for name, rows in counts.items() for _ in range(rows)) if split_of else None
    return Source(f"parquet:{path}", ids, tuple(labels), names, splits, ParquetReader(by_name, starts))


def _by_split(files: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files to use and the split of each; no splits unless every file name begins with one."""
    prefixes = {name: match[1] for name in files if (match := re.match(r"([a-z]+)[-.]", name))}
    prefixes = {name: prefix for name, prefix in prefixes.items() if prefix in SPLIT_OF_PREFIX}
    evaluation = next((prefix for prefix in list(SPLIT_OF_PREFIX)[1:] if prefix in prefixes.values()), None)
    if len(prefixes) < len(files) or evaluation is None or "train" not in prefixes.values():
        return files, {}
    used = {name: file for name, file in files.items() if prefixes[name] in ("train", evaluation)}
    return used, {name: SPLIT_OF_PREFIX[prefixes[name]] for name in used}


def _labels(path: Path) -> tuple[np.ndarray, Any, tuple[str, ...] | None]:
    """Return the row-group bounds, the label column and the class names of one file."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image = schema.field("image").type if "image" in schema.names else None
            if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
                raise BadInput(f"{path}: needs the columns image: struct<bytes: binary, path: string> and label: int64")
            if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
                raise BadInput(f"{path}: needs a column label of integers (0, 1, ...)")
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            return np.cumsum([0, *rows]), file.read(columns=["label"])["label"], _class_names(schema.metadata)
    except FileNotFoundError:
        raise BadInput(f"parquet:{path}: no such file; correct dataset.source") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    return tuple(names) if names else None


def _checked(labels: Any, names: tuple[str, ...] | None, path: Path) -> list[int]:
    if labels.null_count:
        raise BadInput(f"{path}: {labels.null_count} labels are null; give every image a label")
    numbers = [int(label) for label in labels.to_pylist()]
    for row, label in enumerate(numbers):
        if label < 0 or (names is not None and label >= len(names)):
            classes = "0 or more" if names is None else f"0..{len(names) - 1} ({len(names)} classes)"
            raise BadInput(f"{path}: row {row} has label {label}, which must be {classes}")
    return numbers
