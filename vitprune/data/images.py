"""Encode, decode, verify and hash images."""

import hashlib
import io

from PIL import Image


def bytes_sha256(data: bytes) -> str:
    """Return the SHA-256 checksum of encoded bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, mode: str) -> Image.Image:
    """Decode one image and convert it to a Pillow mode ("RGB" or "L").

    Raises:
        Exception: what Pillow raises for invalid data: OSError, SyntaxError, ValueError, zlib.error and others.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode == "P" and "transparency" in image.info:
        # in one step, Pillow warns about a transparent palette; two steps give the same pixels
        image = image.convert("RGBA")
    return image.convert(mode)


def encode(image: Image.Image) -> bytes:
    """Encode as uncompressed PNG, so that the checksum does not depend on the version of zlib."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def is_intact(data: bytes) -> bool:
    """Return whether Pillow can verify and fully decode the image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # checks checksums, which decoding ignores
        decode(data, "RGB")
    except MemoryError:
        raise
    except Exception:  # OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        return False
    return True
