"""Parquet source: splits by name, class names, labels, and files whose metadata exceed their content."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.on_disk import write_parquet
from vitprune import data
from vitprune.errors import BadInput
from vitprune.runtime import tables


def write_labels(path: Path, labels: pa.Array, metadata: bytes | None = None) -> None:
    images = pa.nulls(len(labels), tables.IMAGE)
    schema = pa.schema([("image", tables.IMAGE), ("label", labels.type)])
    schema = schema.with_metadata({"huggingface": metadata}) if metadata is not None else schema
    pq.write_table(pa.table([images, labels], schema=schema), path, compression="zstd")


@pytest.mark.parametrize(("train", "evaluation"), [("imagenet-train", "imagenet-val"), ("x.train.0", "x.test.0")])
def test_splits_come_from_words_in_the_file_names(
    tmp_path: Path, digits: data.Source, train: str, evaluation: str
) -> None:
    write_parquet(tmp_path / f"{train}.parquet", digits, range(20))
    write_parquet(tmp_path / f"{evaluation}.parquet", digits, range(20, 30))
    assert Counter(data.open_source(f"parquet:{tmp_path}").splits or ()) == {"train": 20, "eval": 10}


def test_file_names_of_which_only_some_name_a_split_are_refused(tmp_path: Path, digits: data.Source) -> None:
    for name in ("imagenet-train", "imagenet-validation", "more"):
        write_parquet(tmp_path / f"{name}.parquet", digits, range(5))
    with pytest.raises(BadInput, match=r"more.parquet has no split in its name, but imagenet-train.parquet has"):
        data.open_source(f"parquet:{tmp_path}")
    (tmp_path / "more.parquet").rename(tmp_path / "test.parquet")
    assert data.open_source(f"parquet:{tmp_path}").left_out == ("test.parquet",)
    (tmp_path / "imagenet-train.parquet").unlink()
    with pytest.raises(BadInput, match=r"has the splits val and test, but no train; add it or use a single file"):
        data.open_source(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    "metadata",
    [b"null", b"[1]", b"{", b"3", b"\xff", b"[" * 100_000, b'{"info": null}', b'{"info": {"features": {"label": []}}}',
     b'{"info": {"features": {"label": {"names": "abc"}}}}', b'{"info": {"features": {"label": {"names": [1, 2]}}}}'],
)  # fmt: skip
def test_broken_metadata_are_named_unless_the_settings_list_the_classes(tmp_path: Path, metadata: bytes) -> None:
    write_labels(tmp_path / "x.parquet", pa.array([0, 1]), metadata)
    with pytest.raises(BadInput, match=r"x.parquet: its metadata `huggingface` do not describe a data set \(") as error:
        data.open_source(f"parquet:{tmp_path}")
    assert len(str(error.value)) < 400
    assert data.open_source(f"parquet:{tmp_path}", ["a", "b"]).classes == ("a", "b")


def test_files_with_other_class_names_are_refused(tmp_path: Path, digits: data.Source) -> None:
    write_parquet(tmp_path / "a.parquet", digits, range(5), "abcdefghij")
    write_parquet(tmp_path / "b.parquet", digits, range(5), "jihgfedcba")
    with pytest.raises(BadInput, match=r"b.parquet: has other class names than the files before it"):
        data.open_source(f"parquet:{tmp_path}")


@pytest.mark.parametrize("label", [2**63, 2**31, 2**64 - 1])
def test_a_label_that_is_not_an_index_is_named(tmp_path: Path, label: int) -> None:
    write_labels(tmp_path / "x.parquet", pa.array([0, label], pa.uint64()))
    with pytest.raises(BadInput, match=rf"x.parquet: row 1 has label {label}, which must be 0..2147483647$"):
        data.open_source(f"parquet:{tmp_path}")


def test_more_rows_than_the_file_can_hold_are_refused_before_they_are_read(tmp_path: Path) -> None:
    labels = pa.array(np.zeros(3_000_000, np.int8))
    write_labels(tmp_path / "x.parquet", labels)
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    with pytest.raises(
        BadInput, match=r"x.parquet: 3000000 rows in \d+ bytes cannot be images; correct dataset.source"
    ):
        data.open_source(f"parquet:{tmp_path}")


def test_a_row_group_that_decompresses_to_more_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitprune.data.parquet.MAX_GROUP_BYTES", 10 << 20)
    images = [{"bytes": bytes(1 << 20), "path": None}] * 40
    schema = pa.schema([("image", tables.IMAGE), ("label", pa.int64())])
    pq.write_table(pa.table({"image": images, "label": [0] * 40}, schema), tmp_path / "x.parquet", compression="zstd")
    source = data.open_source(f"parquet:{tmp_path}")
    with pytest.raises(
        BadInput, match=r"x.parquet: row group 0 has more than 10485760 bytes; write smaller row groups"
    ):
        source.read("x.parquet#0")


def test_files_that_are_not_regular_parquet_files_are_refused(tmp_path: Path, digits: data.Source) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(BadInput, match=r"pipe.parquet: not a regular file"):
        data.open_source(f"parquet:{tmp_path}/pipe.parquet")
    with pytest.raises(BadInput, match=r"none.parquet: no such file"):
        data.open_source(f"parquet:{tmp_path}/none.parquet")
    path = tmp_path / "x.parquet"
    write_parquet(path, digits, range(20))
    source, content = data.open_source(f"parquet:{path}"), path.read_bytes()
    path.write_bytes(content[:50] + bytes(200) + content[250:])
    with pytest.raises(BadInput, match=r"x.parquet: not a readable Parquet file"):
        source.read("x.parquet#0")
    twice = pa.table([pa.nulls(1, tables.IMAGE), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    pq.write_table(twice, path)
    with pytest.raises(BadInput, match=r"x.parquet: needs a column label of integers"):
        data.open_source(f"parquet:{path}")
