"""Image folders: accepted layouts, refused layouts, and files that are left out."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitprune import data
from vitprune.data.split_names import files_by_split, split_in, split_named
from vitprune.errors import BadInput


def fill(root: Path, folders: Sequence[str], suffix: str = "png", count: int = 2) -> None:
    """Write different images into each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng(abs(hash((folder, suffix, number))))
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            image.save(root / folder / f"{number}.{suffix}")


def content(source: data.Source) -> dict[tuple[str, str], int]:
    """Return the number of images by split and class."""
    splits = source.splits or ("",) * len(source.ids)
    return Counter((split, (source.classes or ())[label]) for split, label in zip(splits, source.labels, strict=True))


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("train", "val"), ("train", "eval"), ("Training", "Testing"), ("TRAIN", "Validation"), ("train", "dev"),
        ("train2017", "val2017"), ("training_set", "test_set"), ("train-images", "valid-images"),
        ("train", "evaluation"),
    ],
)  # fmt: skip
def test_split_folders_are_recognized_in_any_spelling(tmp_path: Path, train: str, evaluation: str) -> None:
    fill(tmp_path, [f"{split}/{name}" for split in (train, evaluation) for name in ("a", "b")])
    both = {(split, name): 2 for split in ("train", "eval") for name in ("a", "b")}
    assert content(data.open_source(f"folder:{tmp_path}")) == both


def test_a_third_split_and_other_folders_are_named_as_left_out(tmp_path: Path) -> None:
    fill(tmp_path, [f"{split}/{name}" for split in ("train", "val", "test", "notes") for name in ("a", "b")])
    (tmp_path / "train/list.txt").touch()
    source = data.open_source(f"folder:{tmp_path}")
    assert content(source) == {(split, name): 2 for split in ("train", "eval") for name in ("a", "b")}
    assert source.left_out == ("notes", "test", "train/list.txt")


def test_a_test_folder_without_classes_is_not_the_eval_split(tmp_path: Path) -> None:
    fill(tmp_path, ["train/a", "train/b", "test"])
    source = data.open_source(f"folder:{tmp_path}")
    assert (source.splits, source.left_out) == (None, ("test",))


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        (["dataset/a", "dataset/b"], r"one class only, dataset; its folders may be: write folder:.*/dataset$"),
        (["test/a", "test/b", "val/a", "val/b"], r"val, test: names of splits, but not one training folder"),
        (["train", "test"], "names of splits, but not one training folder with a sub-folder per class"),
        (["train/a", "train/b", "Training/a", "val/a"], "names of splits, but not one training folder"),
        (["train", "car", "bus"], "list the folders in dataset.classes if they are classes"),
        (["train/steam", "car/small", "bus/long"], "train: a split, but bus is none; name the evaluation folder val"),
        (["fold1/a", "fold1/b", "fold2/a", "fold2/b"], "each of fold1, fold2, ... has the same sub-folders, a, b, ..."),
        (["training_set/training_set/a", "test_set/test_set/a"], "class test_set has the name of a split"),
    ],
)  # fmt: skip
def test_an_ambiguous_layout_is_refused(tmp_path: Path, folders: list[str], why: str) -> None:
    fill(tmp_path, folders)
    with pytest.raises(BadInput, match=why) as error:
        data.open_source(f"folder:{tmp_path}")
    assert str(error.value).startswith(f"folder:{tmp_path}: ")


def test_classes_in_the_settings_determine_the_layout(tmp_path: Path) -> None:
    fill(tmp_path, ["train", "car", "bus"])
    source = data.open_source(f"folder:{tmp_path}", ["train", "car", "bus"])
    assert content(source) == {("", "train"): 2, ("", "car"): 2, ("", "bus"): 2}
    fill(tmp_path / "other", ["a", "b"])
    with pytest.raises(BadInput, match=r"dataset.classes: '../car' is not the name of a sub-folder of"):
        data.open_source(f"folder:{tmp_path}/other", ["../car", "a"])


def test_link_loops_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, ["set/a/deep", "set/b", "elsewhere/c"])
    root = tmp_path / "set"
    (root / "a/self").symlink_to(root / "a")
    (root / "a/deep/up").symlink_to(root)
    (root / "b/twice").symlink_to(root / "b")
    (root / "c").symlink_to(tmp_path / "elsewhere/c")  # a link to a class in another folder is allowed
    source = data.open_source(f"folder:{root}")
    assert content(source) == {("", "a"): 2, ("", "b"): 2, ("", "c"): 2}
    assert sorted(source.left_out) == ["a/deep/up", "a/self", "b/twice"]


@pytest.mark.parametrize("suffix", ["webp", "tif", "TIFF", "bmp", "gif", "JPG", "Png", "jfif", "ppm", "tga", "jp2"])
def test_every_format_that_pillow_reads_is_read(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path, ["a", "b"], suffix, 3)
    source = data.open_source(f"folder:{tmp_path}")
    assert content(source) == {("", "a"): 3, ("", "b"): 3}
    assert data.build_manifest(source, 0.4, 0, 0.0).skipped == []


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    fill(tmp_path, ["a", "b"])
    for name in ("a/x.heic", "b/readme", "b/x.eps", "b/.hidden"):
        (tmp_path / name).touch()
    assert sorted(data.open_source(f"folder:{tmp_path}").left_out) == ["a/x.heic", "b/readme", "b/x.eps"]
    for path in tmp_path.glob("*/*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        BadInput, match=r"no images in its sub-folders \(7 files are no images that Pillow reads, such as "
    ):
        data.open_source(f"folder:{tmp_path}")


def test_images_without_sub_folders_are_named(tmp_path: Path) -> None:
    fill(tmp_path, ["a"])
    for path in (tmp_path / "a").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "readme").touch()
    with pytest.raises(
        BadInput, match=r"no images in its sub-folders \(2 are beside them, such as 0.png, .*put the im"
    ):
        data.open_source(f"folder:{tmp_path}")


def test_names_that_are_not_utf_8_are_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, ["Käfer x", "犬"])
    data.build_manifest(data.open_source(f"folder:{tmp_path}"), 0.4, 0, 0.0)
    os.rename(tmp_path / "犬/0.png", os.fsencode(tmp_path / "犬") + b"/\xe4.png")
    with pytest.raises(BadInput, match=r"the name 犬/\\udce4.png is not UTF-8; rename it$"):
        data.open_source(f"folder:{tmp_path}")


def test_split_names() -> None:
    assert [split_named(name) for name in ("Train", "val_images", "testset", "dev", "eval2")] == [
        "train", "val", "test", "val", "val"
    ]  # fmt: skip
    for name in ("training shoe", "crash test dummy", "tram", "valley", "images", "2017", "", "train_val"):
        assert split_named(name) == ""
    assert split_in("imagenet-train-00001-of-00002.parquet") == "train"
    assert split_in("trainval.parquet") == split_in("train-test.parquet") == split_in("data.parquet") == ""


def test_files_of_a_folder_are_grouped_by_split() -> None:
    names = ["x-test.tar", "x-train-0.tar", "x-train-1.tar", "x-val.tar"]
    assert files_by_split(names, "wds/x") == ({"train": names[1:3], "val": names[3:]}, names[:1])
    assert files_by_split(["a", "b"], "wds/x") == ({"train": ["a", "b"]}, [])
    assert files_by_split(["test-0", "test-1"], "wds/x") == ({"train": ["test-0", "test-1"]}, [])
    with pytest.raises(BadInput, match="x: other has no split in its name, but x-train has; rename it"):
        files_by_split(["other", "x-train"], "x")
    with pytest.raises(BadInput, match="x: has the splits test and val, but no train"):
        files_by_split(["test", "val"], "x")
