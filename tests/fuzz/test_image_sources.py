"""Parquet files, shards and images: damaged ones are read, counted as unreadable, or refused in one line."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.fuzzing import VALUES, damaged, one_line_errors
from tests.support.on_disk import write_parquet
from vitprune import data
from vitprune.data.images import decode, examine

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8))
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "PCX")


def encoded(name: str) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = io.BytesIO()
    PICTURE.save(buffer, name, exif=exif) if name in ("JPEG", "PNG", "WEBP") else PICTURE.save(buffer, name)
    return buffer.getvalue()


ENCODED = {name: encoded(name) for name in FORMATS}


def read_all(spec: str) -> None:
    """Open a source and build its manifest, however many images are unreadable."""
    with one_line_errors():
        data.build_manifest(data.open_source(spec), 0.5, 0, 1.0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@given(data=st.data(), name=st.sampled_from(FORMATS))
def test_damaged_images_decode_or_raise(data: st.DataObject, name: str) -> None:
    content = data.draw(damaged(ENCODED[name]))
    try:
        image = decode(content, "RGB")
        examine(content)
    except MemoryError:
        raise
    except Exception:  # Pillow raises various errors; the manifest counts each as an unreadable image
        return
    assert image.width * image.height <= 89_478_485


@given(data=st.data())
def test_damaged_parquet_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.parquet"
    if not (tmp_path / "whole").exists():
        write_parquet(tmp_path / "whole", source(), range(12), "abcdefghij")
    path.write_bytes(data.draw(damaged((tmp_path / "whole").read_bytes())))
    read_all(f"parquet:{path}")


def source() -> data.Source:
    return data.open_source("digits")


@given(data=st.data())
def test_damaged_shards_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, name in enumerate(("PNG", "JPEG", "GIF")):
            for ending, content in ((name.lower(), ENCODED[name]), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "x.tar").write_bytes(data.draw(damaged(buffer.getvalue())))
    read_all(f"wds/{tmp_path}/x.tar")


@given(
    values=st.lists(VALUES, min_size=1, max_size=3),
    kind=st.sampled_from(["json", "cls"]),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
def test_labels_of_any_value_are_read_or_refused(tmp_path: Path, values: list[object], kind: str, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, value in enumerate(values):
            text = json.dumps({"label": value} if kind == "json" else value).encode()
            for ending, content in (("png", ENCODED["PNG"]), (kind, text)):
                member = tarfile.TarInfo(f"{name}{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    read_all(f"wds/{tmp_path}/x.tar")
