"""Encoded images: their digest, whether they are intact, and their pixels."""

import hashlib
import io

from PIL import Image


def bytes_sha256(data: bytes) -> str:
    """Return the sha256 of the encoded bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, mode: str) -> Image.Image:
    """Decode one image and convert it to a Pillow mode ("RGB" or "L").

    Raises whatever Pillow raises for broken data: OSError, SyntaxError, ValueError, zlib.error and others.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns when a transparent palette is flattened in one step; the pixels are the same in two.
        image = image.convert("RGBA")
    return image.convert(mode)


def encode(image: Image.Image) -> bytes:
    """Encode as PNG, uncompressed, so that the digest does not depend on the version of zlib."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def is_intact(data: bytes) -> bool:
    """Tell whether Pillow can check and fully decode the image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # checksums, which decoding alone does not look at
        decode(data, "RGB")
    except MemoryError:
        raise
    except Exception:  # each decoder has its own: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        return False
    return True
