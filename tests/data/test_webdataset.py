"""WebDataset shards: random access by id, splits, labels, and error messages."""

import io
import json
import os
import pickle
import subprocess
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitprune import data
from vitprune.errors import BadInput


def write_shard(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def samples(source: data.Source, rows: range, ending: str = "png") -> dict[str, bytes]:
    """Return the members of digits as timm's converters write them: KEY.cls, KEY.json, KEY.png."""
    members: dict[str, bytes] = {}
    for row in rows:
        label = source.labels[row]
        members[f"{row:05d}.cls"] = f"{label}\n".encode()
        members[f"{row:05d}.json"] = json.dumps({"label": label, "also": {"shifted": label - 1}}).encode()
        members[f"{row:05d}.{ending}"] = source.read(source.ids[row])
    return members


def test_images_are_read_by_id_in_any_order(tmp_path: Path, digits: data.Source) -> None:
    write_shard(tmp_path / "digits-0.tar", samples(digits, range(30)))
    write_shard(tmp_path / "digits-1.tar", samples(digits, range(30, 40), "PNG"))
    source = data.open_source(f"wds/{tmp_path}")
    assert (source.ids[0], source.ids[-1], source.splits, source.classes) == (
        "digits-0.tar#00000", "digits-1.tar#00039", None, None
    )  # fmt: skip
    assert source.labels == digits.labels[:40]
    for row in np.random.default_rng(0).permutation(40):
        assert source.read(source.ids[row]) == digits.read(digits.ids[row])
    copy = pickle.loads(pickle.dumps(source.read))
    assert copy("digits-1.tar#00035") == digits.read(digits.ids[35])
    rows = data.build_manifest(source, 0.25, 0, 0.0).rows
    assert Counter(row["split"] for row in rows) == {"train": 30, "eval": 10}


def test_splits_come_from_info_json(tmp_path: Path, digits: data.Source) -> None:
    (tmp_path / "parts").mkdir()
    write_shard(tmp_path / "parts/a.tar", samples(digits, range(20)))
    write_shard(tmp_path / "parts/b.tar", samples(digits, range(20, 30)))
    write_shard(tmp_path / "left-out.tar", samples(digits, range(30, 40)))
    splits = {"train": {"filenames": ["parts/a.tar"]}, "validation": {"filenames": ["parts/b.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    source = data.open_source(f"wds/mine:{tmp_path}")
    assert Counter(source.splits or ()) == {"train": 20, "eval": 10}
    assert source.read("parts/b.tar#00021") == digits.read(digits.ids[21])


def test_alt_label_names_the_json_field_of_the_label(tmp_path: Path, digits: data.Source) -> None:
    write_shard(tmp_path / "a.tar", samples(digits, range(20)))
    split = {"filenames": ["a.tar"], "alt_label": "also/shifted"}
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"train": split}}))
    source = data.open_source(f"wds/{tmp_path}")
    assert source.labels == tuple(label - 1 for label in digits.labels[:20] if label)  # -1: skipped, as in timm


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_splits_come_from_shard_names(tmp_path: Path, digits: data.Source, name: str) -> None:
    write_shard(tmp_path / "imagenet1k-train-0000.tar", samples(digits, range(20)))
    write_shard(tmp_path / f"imagenet1k-{name}-00.tar", samples(digits, range(20, 30)))
    assert Counter(data.open_source(f"wds/{tmp_path}").splits or ()) == {"train": 20, "eval": 10}
    one = data.open_source(f"wds/{tmp_path}/imagenet1k-train-0000.tar")
    assert (len(one.ids), one.splits) == (20, None)


def test_json_labels_and_metadata_members(tmp_path: Path, digits: data.Source) -> None:
    members = {name: content for name, content in samples(digits, range(5)).items() if not name.endswith(".cls")}
    first = {
        "__meta__": b"about",
        "README": b"no ending",
        "part.v2/deep.seg.png": b"another ending",
        "part.v2/x.npy": b"",
    }
    write_shard(tmp_path / "a.tar", members)
    assert data.open_source(f"wds/{tmp_path}").labels == digits.labels[:5]
    write_shard(tmp_path / "a.tar", {name: first[name] for name in ("__meta__", "README")} | members)
    assert len(data.open_source(f"wds/{tmp_path}").ids) == 5
    write_shard(tmp_path / "a.tar", first | members)
    with pytest.raises(BadInput, match=r"a.tar: sample part.v2/deep has no label"):
        data.open_source(f"wds/{tmp_path}")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.png": b"", "x.cls": b"cat"}, r"a.tar: sample x has the label 'cat', which must be one integer"),
        ({"x.png": b"", "x.cls": b"-1"}, r"a.tar: sample x has label -1, which must be 0 or more"),
        ({"x.png": b"", "x.json": b'{"label": [1, 2]}'}, r"has the label \[1, 2\], which must be one integer"),
        ({"x.png": b"", "x.json": b"{"}, r"has a .json member that is not JSON"),
        ({"x.png": b"", "x.json": b"{}"}, r"has no field label in its .json member"),
        ({"x.png": b""}, r"sample x has no label; each needs a .cls member"),
        ({"x.cls": b"1"}, r"sample x has no image; each needs one of .jpg, .jpeg, .png, .webp"),
        ({"x.png": b"", "x.PNG": b"", "x.cls": b"1"}, r"a.tar: x.PNG occurs twice"),
        ({}, r"no samples in the shards"),
        (
            {"x.png": b"", "x.cls": b"9223372036854775808"},
            r"sample x has label 9223372036854775808, which must be 0..2147483647$",
        ),
        ({"x.png": b"", "x.cls": b"4294967296"}, r"sample x has label 4294967296, which must be 0..2147483647$"),
        ({"x.png": b"", "x.cls": b"1_0"}, r"has the label '1_0', which must be one integer"),
        ({"x.png": b"", "x.cls": b"9" * 500_000}, r"has the label '999.*999', which must be one integer"),
        ({"x.png": b"", "x.cls": b"1" * 2_000_000}, r"x.cls is sparse or too large \(2000000 bytes\); write the shard"),
        ({"x.png": b"", "x.json": b'{"label": 1.5}'}, r"has the label 1.5, which must be one integer"),
        ({"x.png": b"", "x.json": b'{"label": true}'}, r"has the label True, which must be one integer"),
        ({"x.png": b"", "x.json": b'{"label": 1e999}'}, r"has the label inf, which must be one integer"),
        ({"x.png": b"", "x.json": b"[" * 100_000}, r"has a .json member that is not JSON"),
    ],
)
def test_invalid_samples_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(BadInput, match=message) as error:
        data.open_source(f"wds/{tmp_path}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_every_format_that_pillow_reads_is_an_image(tmp_path: Path, digits: data.Source) -> None:
    picture = io.BytesIO()
    Image.open(io.BytesIO(digits.read(digits.ids[0]))).save(picture, "BMP")
    write_shard(tmp_path / "a.tar", {"x.bmp": picture.getvalue(), "x.cls": b" 3\n", "x.eps": b"%!PS"})
    source = data.open_source(f"wds/{tmp_path}")
    assert (source.labels, source.read("a.tar#x")) == ((3,), picture.getvalue())


def test_sparse_members_and_huge_headers_are_refused_without_reading_them(tmp_path: Path) -> None:
    with (tmp_path / "x.cls").open("wb") as file:
        file.truncate(32 << 30)
    subprocess.run(["tar", "-C", tmp_path, "-cSf", tmp_path / "a.tar", "x.cls"], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 20
    with pytest.raises(BadInput, match=r"a.tar: x.cls is sparse or too large \(34359738368 bytes\)"):
        data.open_source(f"wds/{tmp_path}/a.tar")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 6 << 30
    with (tmp_path / "b.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(8 << 30)
    with pytest.raises(BadInput, match=r"b.tar: not a complete, uncompressed tar file"):
        data.open_source(f"wds/{tmp_path}/b.tar")


def test_shards_that_are_not_regular_files_or_outside_the_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(BadInput, match=r"pipe.tar: not a regular file"):
        data.open_source(f"wds/{tmp_path}/pipe.tar")
    for shard in ("../x.tar", "/etc/passwd"):
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [shard]}}}))
        with pytest.raises(BadInput, match=r"_info.json: path .* is outside of the project"):
            data.open_source(f"wds/{tmp_path}")
    (tmp_path / "_info.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"_info.json: not a dataset description in timm.s format"):
        data.open_source(f"wds/{tmp_path}")


def test_shards_of_which_only_some_name_a_split_are_refused(tmp_path: Path, digits: data.Source) -> None:
    for name in ("x-train-0.tar", "more.tar"):
        write_shard(tmp_path / name, samples(digits, range(5)))
    with pytest.raises(BadInput, match=r"more.tar has no split in its name, but x-train-0.tar has; rename it"):
        data.open_source(f"wds/{tmp_path}")
    (tmp_path / "more.tar").rename(tmp_path / "x-valid-0.tar")
    write_shard(tmp_path / "x-test-0.tar", samples(digits, range(5)))
    source = data.open_source(f"wds/{tmp_path}")
    assert (Counter(source.splits), source.left_out) == ({"train": 5, "eval": 5}, ("x-test-0.tar",))


def test_labels_outside_the_classes_are_refused(tmp_path: Path, digits: data.Source) -> None:
    write_shard(tmp_path / "a.tar", samples(digits, range(5)))
    with pytest.raises(BadInput, match=r"sample 00002 has label 2, which must be 0..1 \(2 classes\)"):
        data.open_source(f"wds/{tmp_path}", ["a", "b"])


def test_unreadable_shards_are_refused(tmp_path: Path, digits: data.Source) -> None:
    shard = tmp_path / "a.tar"
    with pytest.raises(BadInput, match=r"no \*.tar file in the folder"):
        data.open_source(f"wds/{tmp_path}")
    with pytest.raises(BadInput, match=r"no such file or folder"):
        data.open_source(f"wds/{shard}")
    with pytest.raises(BadInput, match=r"lacks the path; write wds/PATH"):
        data.open_source("wds/")
    write_shard(shard, samples(digits, range(5)), "w:gz")
    with pytest.raises(BadInput, match=r"a.tar: not a complete, uncompressed tar file"):
        data.open_source(f"wds/{tmp_path}")
    write_shard(shard, samples(digits, range(5)))
    full = data.open_source(f"wds/{tmp_path}")
    index = full.read.ranges[full.ids[-1]]  # type: ignore[attr-defined]
    shard.write_bytes(shard.read_bytes()[: index.start + index.size // 2])
    with pytest.raises(BadInput, match=r"a.tar: not a complete, uncompressed tar file"):
        data.open_source(f"wds/{tmp_path}")
    with pytest.raises(OSError, match="is shorter than when it was indexed"):
        full.read(full.ids[-1])
    with pytest.raises(BadInput, match=r"a.tar#none: not in wds/"):
        full.read("a.tar#none")


def test_invalid_info_json_is_refused(tmp_path: Path, digits: data.Source) -> None:
    info = tmp_path / "_info.json"
    info.write_text('{"splits": ["train"]}')
    with pytest.raises(BadInput, match=r"_info.json: not a dataset description in timm.s format"):
        data.open_source(f"wds/{tmp_path}")
    info.write_text('{"splits": {"validation": {"filenames": []}}}')
    with pytest.raises(BadInput, match=r"_info.json: has no split train"):
        data.open_source(f"wds/{tmp_path}")
    info.write_text('{"splits": {"train": {"filenames": ["gone.tar"]}}}')
    with pytest.raises(BadInput, match=r"gone.tar: no such file"):
        data.open_source(f"wds/{tmp_path}")
