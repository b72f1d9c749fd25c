"""Decoding: gray levels of more than 8 bits, orientation, formats, and bounds on pixels and passes."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vitprune.data.images import decode, examine, image_suffixes

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))


def encoded(image: np.ndarray | Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, name, **options)
    return buffer.getvalue()


def tiff(samples: bytes, order: str, bits: int, photometric: int = 1) -> bytes:
    """Write a gray TIFF of 256 x 16 pixels by hand: Pillow writes neither 12 bits nor big-endian files."""
    tags = {256: 256, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 8 * 12 + 4, 277: 1, 279: len(samples)}
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3 if value < 1 << 16 else 4, 1)
        + (struct.pack(f"{order}HH", value, 0) if value < 1 << 16 else struct.pack(f"{order}I", value))
        for tag, value in tags.items()
    )
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return begin + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + samples


def twelve_bits(levels: np.ndarray) -> bytes:
    """Pack pairs of 12-bit samples into three bytes."""
    a, b = levels.reshape(-1, 2).astype(np.uint16).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8).tobytes()


WIDE = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "data",
    [
        encoded(WIDE, "PNG"),
        encoded(WIDE, "TIFF"),
        encoded(WIDE, "TIFF", compression="tiff_deflate"),
        tiff(WIDE.astype("<u2").tobytes(), "<", 16),
        tiff(WIDE.astype(">u2").tobytes(), ">", 16),
        tiff((65535 - WIDE).astype("<u2").tobytes(), "<", 16, photometric=0),
        tiff(twelve_bits(np.round(RAMP * (4095 / 255))), "<", 12),
        b"P5 256 16 65535 " + WIDE.astype(">u2").tobytes(),
        b"P5 256 16 4095 " + np.round(RAMP * (4095 / 255)).astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "deflate", "little", "big", "white is zero", "12 bits", "pgm", "pgm of 12 bits"],
)
def test_gray_levels_of_more_than_8_bits_are_scaled(data: bytes) -> None:
    assert np.array_equal(np.asarray(decode(data, "L")), RAMP)
    assert np.array_equal(np.asarray(decode(data, "RGB"))[..., 1], RAMP)
    assert examine(data).pixels == examine(encoded(RAMP, "PNG")).pixels


@pytest.mark.parametrize("image", [WIDE.astype(np.int32), (RAMP / 255).astype(np.float32)])
def test_pixels_without_a_fixed_range_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="32-bit pixels have no fixed range; convert it to 8 or 16 bits"):
        decode(encoded(image, "TIFF"), "L")


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(name: str, orientation: int) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4), np.uint8)).resize((48, 72), 0)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of the transposition given by the orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(stored, name, exif=exif, **({"quality": 100} if name in ("JPEG", "WEBP") else {}))
    shown = decode(data, "L")
    assert shown.size == upright.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).mean() < 4
    if name != "TIFF":  # Pillow itself applies the orientation of a TIFF
        assert examine(data).oriented == (orientation != 1)
        assert decode(data, "L", orient=False).size == stored.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_do_not_make_an_image_unreadable() -> None:
    data = encoded(RAMP, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert decode(data, "L").size == (256, 16)


def test_formats_that_run_other_programs_or_contain_other_files_are_refused() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for data in (postscript, encoded(Image.fromarray(RAMP).resize((16, 16)), "ICO"), b"", b"text"):
        with pytest.raises(OSError, match="cannot identify image file"):
            decode(data, "L")
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"} <= image_suffixes()
    assert not {".eps", ".ps", ".ico", ".pdf", ".svg", ".h5", ".mpg"} & image_suffixes()


def test_the_number_of_pixels_and_of_passes_is_bounded() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 9_400, 9_600, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", 0xD8A1BCF5)
    jpeg = encoded(Image.new("L", (4_000, 4_000)), "JPEG", progressive=True)
    scans = jpeg.index(b"\xff\xda")
    with pytest.raises((ValueError, Warning, SyntaxError, OSError)):
        decode(bomb, "L")
    with pytest.raises(ValueError, match=r"scans of 16000000 pixels; save it as a baseline JPEG"):
        decode(jpeg[:scans] + jpeg[scans:-2] * 400, "L")
