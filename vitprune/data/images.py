"""Encode, decode, verify and hash images. Files are not trusted: formats, pixels and decoding passes are limited."""

import functools
import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vitprune.runtime.messages import first_line

# Formats with a decoder in Pillow itself: EPS would run Ghostscript, and an icon holds another file
FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "DIB", "DDS", "PCX", "PSD", "QOI",
    "SGI", "TGA",
)  # fmt: skip
MAX_PIXELS = 89_478_485  # where Pillow begins to warn
MAX_SCANNED = 1 << 32  # pixels times scans of a progressive JPEG
LARGE = 1 << 23  # pixels of an image that is decoded alone
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation

_large_image = threading.RLock()


@dataclass(frozen=True)
class ExaminedImage:
    """What the manifest needs to know about an image.

    Attributes:
        sha256: Checksum of the encoded bytes.
        pixels: Checksum of the size and the decoded pixels, equal for the same picture in another lossless encoding.
        oriented: Whether its EXIF orientation was applied.
    """

    sha256: str
    pixels: bytes
    oriented: bool


def bytes_sha256(data: bytes) -> str:
    """Return the SHA-256 checksum of encoded bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the file extensions of the readable formats, in lower case, with the dot."""
    names = {*readable_formats(), "MPO"}  # read as JPEG
    return frozenset(end for end, name in Image.registered_extensions().items() if name in names)


def decode(data: bytes, mode: str, orient: bool = True) -> Image.Image:
    """Decode one image and convert it to a Pillow mode ("RGB" or "L"); of several frames the first.

    Pixels of 12 and 16 bits are scaled to 8. Pixels of 32 bits have no fixed range and are refused.

    Args:
        data: Encoded bytes.
        mode: Pillow mode.
        orient: Apply the EXIF orientation.

    Raises:
        Exception: what Pillow raises for invalid data: OSError, SyntaxError, ValueError, zlib.error and others.
    """
    image = _open(data)
    with _alone_if_large(image):
        return _converted(image, mode, orient)


def examine(data: bytes, orient: bool = True) -> ExaminedImage:
    """Verify, fully decode and hash one image.

    Raises:
        Exception: as `decode`.
    """
    image = _open(data)
    with _alone_if_large(image):
        image.verify()  # checks checksums, which decoding ignores
        image = _open(data)
        picture = _converted(image, "RGB", orient)
        pixels = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        return ExaminedImage(bytes_sha256(data), pixels, orient and _orientation(image) in TRANSPOSE)


def why_unreadable(error: Exception) -> str:
    """Return in words why an image cannot be read or decoded, from the error of its source or of `decode`."""
    if isinstance(error, UnidentifiedImageError):  # whose message has an address in memory
        return "no image of a known format"
    return (isinstance(error, OSError) and error.strerror) or first_line(error)[:200]


def encode(image: Image.Image) -> bytes:
    """Encode as uncompressed PNG, so that the checksum does not depend on the version of zlib."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=readable_formats())
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}; cut it into tiles")
    if image.format in ("JPEG", "MPO") and pixels * data.count(b"\xff\xda") > MAX_SCANNED:
        raise ValueError(f"{data.count(bytes((0xFF, 0xDA)))} scans of {pixels} pixels; save it as a baseline JPEG")
    return image


@contextmanager
def _alone_if_large(image: Image.Image) -> Iterator[None]:
    """Decode one large image at a time, so that memory is bounded for any number of threads."""
    if image.width * image.height <= LARGE:
        yield
        return
    with _large_image:
        yield


def _converted(image: Image.Image, mode: str, orient: bool) -> Image.Image:
    image.load()  # Pillow applies the orientation of a TIFF here
    method = TRANSPOSE.get(_orientation(image)) if orient else None
    image = _eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        # in one step, Pillow warns about a transparent palette; two steps give the same pixels
        image = image.convert("RGBA")
    image = image.convert(mode)
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none or the EXIF data are broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises various errors for broken EXIF data
        return 1
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale the gray levels of more than 8 bits by the range of their type; Pillow cuts them off at 255."""
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: scaled to 16 bits
        bits = tags.get(BITS_PER_SAMPLE, (16,))
        largest = (1 << int(np.max(bits))) - 1
        levels = (np.asarray(image).astype(np.uint32) * 255 + largest // 2) // largest
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            levels = 255 - levels
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range; convert it to 8 or 16 bits")
    return image
