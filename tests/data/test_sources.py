"""Image sources: stored bytes, splits, class names, and error messages."""

import hashlib
import io
import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.on_disk import jpeg, write_folder, write_parquet
from vitprune import data
from vitprune.errors import BadInput


def test_digits_are_those_of_scikit_learn(digits: data.Source) -> None:
    assert len(digits.ids) == 1797
    assert digits.ids[0] == "digits/0000"
    assert digits.labels[:10] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    image = Image.open(io.BytesIO(digits.read("digits/0000")))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    # scikit-learn's first row of the first digit: 0 0 5 13 9 1 0 0 of 16
    assert np.asarray(image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_the_checksum_of_a_digit_is_platform_independent(digits: data.Source) -> None:
    digest = hashlib.sha256(digits.read("digits/0000")).hexdigest()
    assert digest == "d79b74a84660260fea78c0b6384a0ffa2d88bef62d035c7a70a4a233c4ae194a"


def test_a_folder_without_splits_is_in_natural_order(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(20))
    (tmp_path / "class10" / "deep").mkdir(parents=True)
    (tmp_path / "class10" / "deep" / "x.JPEG").write_bytes(jpeg(digits, 30))
    (tmp_path / "class10" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    source = data.open_source(f"folder:{tmp_path}")
    assert source.classes == (*(f"class{digit}" for digit in range(10)), "class10")
    assert source.ids[:3] == ("class0/0.jpg", "class0/10.jpg", "class1/1.jpg")
    assert source.ids[-1] == "class10/deep/x.JPEG"
    assert source.labels[-1] == 10
    assert source.splits is None
    assert source.read("class1/1.jpg") == jpeg(digits, 1)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_splits_are_used(tmp_path: Path, digits: data.Source, name: str) -> None:
    write_folder(tmp_path / "train", digits, range(20))
    write_folder(tmp_path / name, digits, range(20, 30))
    result = data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.5, 0, 0.0)
    assert Counter(row["split"] for row in result.rows) == {"train": 20, "eval": 10}
    assert {row["id"].split("/")[0] for row in result.rows if row["split"] == "eval"} == {name}


def test_classes_select_and_order_the_folders(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path, digits, range(10))
    source = data.open_source(f"folder:{tmp_path}", ["class7", "class2"])
    assert list(zip(source.ids, source.labels, strict=True)) == [("class7/7.jpg", 0), ("class2/2.jpg", 1)]


def test_parquet_rows_are_read_in_any_order(tmp_path: Path, digits: data.Source) -> None:
    write_parquet(tmp_path / "a.parquet", digits, range(40))
    write_parquet(tmp_path / "b.parquet", digits, range(40, 45))
    source = data.open_source(f"parquet:{tmp_path}")
    assert (source.ids[0], source.ids[39], source.ids[-1]) == ("a.parquet#0", "a.parquet#39", "b.parquet#4")
    assert source.labels == digits.labels[:45]
    assert source.classes is None
    for row in np.random.default_rng(0).permutation(45):
        assert source.read(source.ids[row]) == digits.read(digits.ids[row])
    copy = pickle.loads(pickle.dumps(source.read))  # as for a spawned worker process
    assert copy("b.parquet#2") == digits.read(digits.ids[42])


def test_parquet_splits_and_class_names_of_hugging_face(tmp_path: Path, digits: data.Source) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", digits, range(20), "abcdefghij")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", digits, range(20, 30), "abcdefghij")
    write_parquet(tmp_path / "test-00000-of-00001.parquet", digits, range(30, 40), "abcdefghij")
    source = data.open_source(f"parquet:{tmp_path}")
    assert source.classes == tuple("abcdefghij")
    assert Counter(source.splits or ()) == {"train": 30, "eval": 10}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:missing", r"^folder:missing: no such folder; correct {}$"),
        ("digitz", r"^{}: 'digitz' is unknown; use digits, folder:PATH"),
        ("wds/missing", r"^wds/missing: no such file or folder; correct {}$"),
        ("parquet:", r"^{}: 'parquet:' lacks the path; write parquet:PATH$"),
    ],
)
def test_an_error_names_the_setting_of_the_source(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=message.format("dataset.source")):
        data.open_source(spec)
    with pytest.raises(BadInput, match=message.format("dataset.eval_source")):
        data.open_source("digits", eval_source=spec)
    with pytest.raises(BadInput, match=message.format("--data")) as error:
        data.open_source(spec, setting="--data")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_eval_source_provides_the_eval_split(tmp_path: Path, digits: data.Source) -> None:
    write_folder(tmp_path / "a", digits, range(30))
    write_folder(tmp_path / "b", digits, [37, 38])  # only classes 9 and 8, matched by name
    source = data.open_source(f"folder:{tmp_path}/a", eval_source=f"folder:{tmp_path}/b")
    rows = data.build_manifest(source, 0.2, 0, 0.0).rows
    assert [(row["id"], row["label"]) for row in rows if row["split"] == "eval"] == [
        (f"eval:class{digits.labels[row]}/{row}.jpg", digits.labels[row]) for row in (38, 37)
    ]
    assert source.read(rows[-1]["id"]) == jpeg(digits, 37)


def test_timm_datasets_are_read_through_timm(tmp_path: Path, digits: data.Source) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, rows in (("train", range(50)), ("t10k", range(50, 60))):
        pixels = [np.asarray(Image.open(io.BytesIO(digits.read(digits.ids[row])))) for row in rows]
        shape = struct.pack(">iiii", 2051, len(rows), 8, 8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(shape + np.stack(pixels).tobytes())
        labels = bytes(digits.labels[row] for row in rows)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(rows)) + labels)
    source = data.open_source(f"torch/mnist:{tmp_path}")
    assert source.labels == digits.labels[:60]
    assert Counter(source.splits or ()) == {"train": 50, "eval": 10}
    assert source.read("train#3") == digits.read("digits/0003")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "dataset.source: 'digitz' is unknown"),
        ("tfds/imagenet", "is a stream"),
        ("torch/mnist:/nowhere", "torch/mnist:/nowhere cannot be opened: Dataset not found"),
        ("torch/image_folder:x", "write folder:x"),
        ("folder:", "lacks the path"),
        ("folder:/nowhere", "folder:/nowhere: no such folder"),
        ("parquet:/nowhere.parquet", "parquet:/nowhere.parquet: no such file"),
    ],
)
def test_invalid_sources_are_refused(spec: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        data.open_source(spec)
    assert "\n" not in str(error.value)


def test_hugging_face_datasets_need_their_package() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(BadInput, match="pip install datasets"):
            data.open_source("hfds/some/name")
    else:
        pytest.skip("the package datasets is installed")


def test_parquet_without_images_or_labels_is_refused(tmp_path: Path, digits: data.Source) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"x.parquet: not a readable Parquet file"):
        data.open_source(f"parquet:{path}")
    pq.write_table(pa.table({"image": [b""], "label": [0]}), path)
    with pytest.raises(BadInput, match=r"x.parquet: needs the columns image: struct"):
        data.open_source(f"parquet:{path}")
    write_parquet(path, digits, range(10))
    with pytest.raises(BadInput, match=r"x.parquet: row 3 has label 3, which must be 0..2 \(3 classes\)"):
        data.open_source(f"parquet:{path}", ["a", "b", "c"])
    write_folder(tmp_path / "f", digits, [0, 1])
    with pytest.raises(BadInput, match=r"class 2 is not a class of"):
        data.open_source(f"folder:{tmp_path}/f", eval_source=f"parquet:{path}")


def test_digits_have_ten_classes() -> None:
    with pytest.raises(BadInput, match=r"dataset.classes: digits has 10 classes, not 2"):
        data.open_source("digits", ["a", "b"])


@pytest.mark.real
def test_photographs_in_parquet(photographs: Path) -> None:
    source = data.open_source(f"parquet:{photographs}")
    assert (len(source.ids), len(set(source.labels)), source.labels[0]) == (800, 534, 472)
    row = source.read("imagenet-val-800.parquet#0")
    assert hashlib.sha256(row).hexdigest() == "b4ba0d149ef9f1834e88050cf40537d47f7c69e095f6c67a5bd494f04f6cb560"
    images = pq.read_table(photographs)["image"]
    for number in (799, 3, 400, 250):
        assert source.read(f"imagenet-val-800.parquet#{number}") == images[number].as_py()["bytes"]
