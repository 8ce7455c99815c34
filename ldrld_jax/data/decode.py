"""Decodes images to upright pixels with the requested number of channels, or raises an error that names the defect."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

# Formats of the content, whatever the file name. Pillow knows more, but it runs PostScript in another program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # the EXIF tag; values of 5 and above swap width and height
_BITS, _PHOTOMETRIC = 0x0102, 0x0106  # TIFF tags
_SCALES = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey pixels of few bits, and not the transparent grey


class BrokenImageError(ValueError):
    """An image whose bytes are broken; the message says why, and the caller adds which image it is."""


class RaisedError(BrokenImageError):
    """An example whose dataset object raised; `__cause__` is what it raised."""


# An encoded image, its pixels [height, width, 1 or 3] uint8, or why it could not be read.
Encoded = bytes | np.ndarray | BrokenImageError


def open_image(data: Encoded) -> Image.Image:
    """Reads the header of an encoded image without decoding its pixels; pixels become an image of Pillow's.

    Raises:
      BrokenImageError: if the bytes have none of the `FORMATS`, or the header claims an implausibly large image; or
        `data` itself.

    Example:
      >>> open_image(b"hello")
      Traceback (most recent call last):
        ...
      ldrld_jax.data.decode.BrokenImageError: not an image (5 bytes)
    """
    if isinstance(data, BrokenImageError):
        raise data
    if isinstance(data, np.ndarray):
        check_pixels(data)
        return Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
    with _as_broken(f"not an image ({len(data)} bytes)"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    scale = _SCALES.get(str(image.tile[0][3])) if image.format == "PNG" and image.tile else None
    if scale is not None and isinstance(key := image.info.get("transparency"), int):
        image.info["transparency"] = scale * key
    return image


def check_pixels(data: np.ndarray) -> None:
    """Raises a BrokenImageError if an array is not `[height, width, 1 or 3]` uint8, with a pixel or more."""
    if data.dtype != np.uint8 or data.ndim != 3 or data.shape[-1] not in (1, 3) or not data.size:
        raise BrokenImageError(f"not an image ({data.dtype} {data.shape})")


def upright_size(image: Image.Image, *, exif: bool) -> tuple[int, int]:
    """Returns width and height of the result of `pixels`.

    Raises:
      BrokenImageError: if the image ends before its orientation.
    """
    with _as_broken():
        width, height = image.size
    return (height, width) if exif and _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    with _as_broken():
        return image.getexif().get(_ORIENTATION, 1)  # for a PNG this reads the whole file


@contextlib.contextmanager
def _as_broken(unknown: str = "not an image") -> Iterator[None]:
    """Converts whatever Pillow raises for malformed bytes, of a dozen types, to one kind of error."""
    try:
        yield
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:
        # For an unknown format, Pillow's message is the address of the buffer.
        why = unknown if "BytesIO" in str(error) else str(error) or type(error).__name__
        raise BrokenImageError(why) from error


def pixels(image: Image.Image, *, channels: int, exif: bool) -> Image.Image:
    """Decodes an image to mode "L" or "RGB".

    Grey and colour are converted into each other, palettes and CMYK into either. Transparent pixels
    are composited on white. 12-bit and 16-bit grey are scaled to 8 bits (Pillow's own conversion would clip
    them to white).

    Args:
      image: the result of `open_image`.
      channels: 1 or 3.
      exif: rotate the image by its EXIF orientation.

    Raises:
      BrokenImageError: if the image is truncated or corrupt, or its pixels have no 8-bit equivalent.
    """
    with _as_broken():
        image.load()
        tags = getattr(image, "tag_v2", {})
        bits, white_is_zero = 12 if tags.get(_BITS) == (12,) else 16, tags.get(_PHOTOMETRIC) == 0
        if exif and _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image, bits)
            image = ImageOps.invert(image) if white_is_zero else image  # as Pillow does for 8 bits
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
        mode = {1: "L", 3: "RGB"}[channels]
        return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    values, white = np.asarray(image), 2**bits - 1
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > white:
        raise BrokenImageError(
            f"mode {image.mode}: only 8-bit and 16-bit integer pixels are supported, and 12-bit ones in TIFF"
        )
    if isinstance(key := image.info.get("transparency"), int):
        values = np.where(values == key, white, values)
    return Image.fromarray(((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8))
