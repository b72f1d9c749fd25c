"""Parquet image source: columns image (struct of bytes and path) and label (an integer type)."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitprune.data.sources import MAX_LABEL, Source, SourceError, checked_label, missing_image
from vitprune.data.split_names import files_by_split
from vitprune.errors import BadInput
from vitprune.runtime.messages import first_line

GROUPS_IN_MEMORY = 4
BYTES_PER_ROW, FREE_BYTES = 16, 1 << 20  # a file has at least 16 bytes per image, beyond its first MiB
MAX_GROUP_BYTES, ROWS_AT_ONCE = 1 << 31, 16  # decompressed images of a row group
MAX_SCHEMA = 5_000  # elements of a schema, and row groups


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
                with _opened(self._files[name]) as file:
                    self._groups[key] = _read_group(file, group, self._files[name])
            self._groups.move_to_end(key)
            while len(self._groups) > GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
            return self._groups[key]


def open_parquet(path: Path, classes: Sequence[str] | None) -> Source:
    """Open a Parquet file, or a folder of them; files with train and val (test) in their names are splits.

    Args:
        path: File or folder.
        classes: Class names by label; None to read them from the metadata of Hugging Face datasets, if present.

    Returns:
        The source.

    Raises:
        BadInput: a file is missing, is not Parquet, lacks a column, has an invalid label, or only some names have a
            split.
    """
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise SourceError(f"parquet:{path}: no *.parquet file in the folder")
    by_split, unused = files_by_split([file.name for file in paths], f"parquet:{path}")
    split_of = {name: "train" if split == "train" else "eval" for split, names in by_split.items() for name in names}
    by_name = {file.name: file for file in paths if file.name in split_of}
    read = {name: _read_labels(file, classes is None) for name, file in by_name.items()}
    names = (
        tuple(classes) if classes is not None else _common_names(by_name, [table.classes for table in read.values()])
    )
    labels = tuple(label for name, table in read.items() for label in _checked(table.labels, names, by_name[name]))
    if not labels:
        raise SourceError(f"parquet:{path}: no rows")
    starts = {name: table.starts for name, table in read.items()}
    counts = {name: int(starts[name][-1]) for name in by_name}
    ids = tuple(f"{name}#{row}" for name, rows in counts.items() for row in range(rows))
    splits = tuple(split_of[name] for name, rows in counts.items() for _ in range(rows)) if len(by_split) == 2 else None
    reader = ParquetReader(by_name, starts)
    return Source(f"parquet:{path}", ids, labels, names, splits, reader, tuple(unused))


@dataclass(frozen=True)
class LabelColumn:
    """Labels of a file.

    Attributes:
        starts: First row of each row group, then the number of rows.
        labels: The column of labels.
        classes: Class names in the metadata; None if there are none.
    """

    starts: np.ndarray
    labels: Any
    classes: tuple[str, ...] | None


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file; an error of pyarrow or of the file system becomes BadInput."""
    try:
        if not path.is_file() and path.exists():
            raise SourceError(f"{path}: not a regular file")
        with pq.ParquetFile(path, thrift_container_size_limit=MAX_SCHEMA) as file:
            yield file
    except BadInput:
        raise
    except FileNotFoundError:
        raise SourceError(f"parquet:{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        reason = first_line(error)[:200]
        raise BadInput(f"{path}: not a readable Parquet file of at most {MAX_SCHEMA} row groups ({reason})") from None


def _read_group(file: pq.ParquetFile, group: int, path: Path) -> Any:
    """Read the images of a row group, in small steps: its stated size may be wrong."""
    parts, size = [], 0
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["image"], use_threads=False):
        parts.append(batch.column(0))
        size += batch.nbytes
        if size > MAX_GROUP_BYTES:
            raise BadInput(f"{path}: row group {group} has more than {MAX_GROUP_BYTES} bytes; write smaller row groups")
    return pa.chunked_array(parts)


def _read_labels(path: Path, with_names: bool) -> LabelColumn:
    with _opened(path) as file:
        schema = file.schema_arrow
        image = schema.field("image").type if schema.names.count("image") == 1 else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise BadInput(f"{path}: needs the columns image: struct<bytes: binary, path: string> and label: int64")
        if schema.names.count("label") != 1 or not pa.types.is_integer(schema.field("label").type):
            raise BadInput(f"{path}: needs a column label of integers (0, 1, ...)")
        rows, size = file.metadata.num_rows, path.stat().st_size
        if rows * BYTES_PER_ROW > size + FREE_BYTES:
            raise SourceError(f"{path}: {rows} rows in {size} bytes cannot be images")
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != rows:
            raise BadInput(f"{path}: its row groups have not {rows} rows together; write the file again")
        names = _class_names(schema.metadata, path) if with_names else None
        return LabelColumn(np.cumsum([0, *groups]), file.read(columns=["label"])["label"], names)


def _class_names(metadata: dict[bytes, bytes] | None, path: Path) -> tuple[str, ...] | None:
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text).get("info", {}).get("features", {}).get("label", {}).get("names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError("names are not a list of text")
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: its metadata `huggingface` do not describe a data set ({first_line(error)[:100]}); write it "
            "again, or list the classes in dataset.classes"
        ) from None
    return tuple(names) if names else None


def _common_names(files: Mapping[str, Path], stored: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """Return the class names of all files, which must agree."""
    names = next((names for names in stored if names is not None), None)
    for file, other in zip(files.values(), stored, strict=True):
        if other is not None and other != names:
            raise BadInput(f"{file}: has other class names than the files before it; list them in dataset.classes")
    return names


def _checked(labels: Any, names: tuple[str, ...] | None, path: Path) -> list[int]:
    if labels.null_count:
        raise BadInput(f"{path}: {labels.null_count} labels are null; give every image a label")
    numbers: list[int] = labels.to_pylist()
    if numbers and not 0 <= min(numbers) <= max(numbers) <= (MAX_LABEL if names is None else len(names) - 1):
        for row, number in enumerate(numbers):
            checked_label(number, names, f"{path}: row {row}")
    return numbers
