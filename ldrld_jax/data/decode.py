"""Encoded images to pixels: upright, of the wanted number of channels, or an error that says what is wrong."""

import contextlib
import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

# Of content, whatever a file is called. Not all that Pillow knows: PostScript would be run, by another program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


class BrokenImageError(ValueError):
    """Bytes that do not hold the image they should; the message says why, the caller says which."""


def open_image(data: bytes) -> Image.Image:
    """The header of an encoded image; its pixels are not decoded yet.

    Raises:
      BrokenImageError: if the bytes begin like none of `FORMATS`, or claim to be an image too big to be one.

    Example:
      >>> open_image(b"hello")
      Traceback (most recent call last):
        ...
      ldrld_jax.data.decode.BrokenImageError: not an image (5 bytes)
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own message for an unknown format is the address of the buffer.
        why = str(error) if "BytesIO" not in str(error) else f"not an image ({len(data)} bytes)"
        raise BrokenImageError(why) from error


def upright_size(image: Image.Image, *, exif: bool) -> tuple[int, int]:
    """Width and height as `pixels` will give them.

    Raises:
      BrokenImageError: if the image ends before its orientation is known.
    """
    width, height = image.size
    return (height, width) if exif and _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    with _as_broken():
        return image.getexif().get(_ORIENTATION, 1)  # of a PNG this reads the whole file


@contextlib.contextmanager
def _as_broken() -> Iterator[None]:
    """What Pillow's decoders raise at bytes that are not as they should be, as one error."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error) as error:
        raise BrokenImageError(str(error)) from error


def pixels(image: Image.Image, *, channels: int, exif: bool) -> Image.Image:
    """The decoded image, in mode "L" or "RGB".

    Grey and colour are converted into each other, palettes and CMYK into either; what is transparent
    lies on white; 16-bit grey is scaled to 8 bits (Pillow's own conversion would clip it to white).

    Args:
      image: of `open_image`.
      channels: 1 or 3.
      exif: turn the image as its EXIF orientation says.

    Raises:
      BrokenImageError: if the image is truncated or corrupt, or has pixels that have no 8-bit equivalent.
    """
    with _as_broken():
        image.load()
    if exif and _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
    mode = {1: "L", 3: "RGB"}[channels]
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 65535:
        raise BrokenImageError(f"mode {image.mode}: only 8-bit and 16-bit integer pixels are known")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
