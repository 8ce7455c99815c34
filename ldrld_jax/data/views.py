"""Views: the transforms of one encoded image for training and evaluation.

A view is called with the bytes of an image, or its pixels as an array, and, if it is random, with that image's
generator (`augment.generator`). It returns uint8 pixels of its fixed shape. Resizing is Pillow's antialiased
bilinear, as in the training of torchvision's teachers.
"""

import dataclasses
import math
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image, ImageOps

from ldrld_jax.data.decode import BrokenImageError, Encoded, check_pixels, open_image, pixels, upright_size

Shape = tuple[int, int, int]
BILINEAR = Image.Resampling.BILINEAR
_LONGEST = 32  # crops: the longer side of an image that is resized before it is cropped


class View(Protocol):
    """A transform: `view(data, rng)` returns an array of `view.shape`; it ignores `rng` unless `random` is True."""

    random: ClassVar[bool]

    @property
    def shape(self) -> Shape: ...

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class AsStored:
    """Images of one size, unchanged, or raw inputs of one shape."""

    shape: Shape
    exif: bool = True
    random: ClassVar[bool] = False

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        if isinstance(data, np.ndarray):
            if data.shape != self.shape:
                raise BrokenImageError(f"its shape is {data.shape}, and the others have {self.shape}")
            return data
        height, width, channels = self.shape
        image = pixels(open_image(data), channels=channels, exif=self.exif)
        if image.size != (width, height):
            raise BrokenImageError(f"{image.width}x{image.height} pixels, the others have {width}x{height}")
        return np.asarray(image).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """Shorter side resized to `resize`, then cropped to the central square of `size`: torchvision's evaluation.

    Example:
      >>> CentreCrop(resize=256, size=224).shape
      (224, 224, 3)
    """

    resize: int
    size: int
    channels: int = 3
    exif: bool = True
    random: ClassVar[bool] = False

    @property
    def shape(self) -> Shape:
        return (self.size, self.size, self.channels)

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        image = pixels(open_image(data), channels=self.channels, exif=self.exif)
        width, height = image.size
        short = min(width, height)
        scaled = scaled_size(width, height, shorter=self.resize)
        # As in torchvision: halves are rounded to even, and the extra pixel of odd padding goes right and below.
        over = [side - self.size for side in scaled]
        left, top = (round(more / 2) if more > 0 else -(-more // 2) for more in over)
        if max(scaled) > _LONGEST * self.size:  # a thin image, whose resized form would take gigabytes
            side = self.size * short / self.resize
            x, y = max(left * short / self.resize, 0), max(top * short / self.resize, 0)
            box = (x, y, min(x + side, width), min(y + side, height))
            return np.asarray(image.resize((self.size, self.size), BILINEAR, box=box)).reshape(self.shape)
        image = image.resize(scaled, BILINEAR).crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).reshape(self.shape)


def scaled_size(width: int, height: int, *, shorter: int) -> tuple[int, int]:
    """Returns width and height of an image that is resized to a shorter side; the longer one is rounded down.

    Example:
      >>> scaled_size(500, 375, shorter=256)
      (341, 256)
    """
    short = min(width, height)
    return shorter * width // short, shorter * height // short


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Largest central part with the shape's proportions, resized to it; an image of that size is unchanged.

    Example:
      >>> Fitted((32, 32, 3)).shape
      (32, 32, 3)
    """

    shape: Shape
    exif: bool = True
    random: ClassVar[bool] = False

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        height, width, channels = self.shape
        image = pixels(open_image(data), channels=channels, exif=self.exif)
        return np.asarray(ImageOps.fit(image, (width, height), BILINEAR)).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Random part of the image, chosen by `crop_box` and resized to a square of `size`.

    A JPEG far larger than the crop needs is decoded at a half, a quarter or an eighth of its size.
    """

    size: int
    channels: int = 3
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    exif: bool = True
    random: ClassVar[bool] = True

    @property
    def shape(self) -> Shape:
        return (self.size, self.size, self.channels)

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        assert rng is not None
        if isinstance(data, np.ndarray):
            return self._of_pixels(data, rng)
        image = open_image(data)
        width, height = upright_size(image, exif=self.exif)
        left, top, wide, high = crop_box(rng, width, height, area=self.area, ratio=self.ratio)
        # draft() selects the smallest scaled decode that is at least as large as requested.
        enough = self.size / min(wide, high)
        if enough <= 0.5 and image.format == "JPEG":
            image.draft(None, (math.ceil(image.width * enough), math.ceil(image.height * enough)))
        image = pixels(image, channels=self.channels, exif=self.exif)
        scale_x, scale_y = image.width / width, image.height / height
        box = (left * scale_x, top * scale_y, (left + wide) * scale_x, (top + high) * scale_y)
        if (scale_x, scale_y) == (1, 1):
            # Crop first: with box=, resize would blend in the pixels around the crop.
            image, box = image.crop((left, top, left + wide, top + high)), (0, 0, wide, high)
        return np.asarray(image.resize((self.size, self.size), BILINEAR, box=box)).reshape(self.shape)

    def _of_pixels(self, data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Crops before anything is converted, so that of a mapped file only the crop is copied."""
        check_pixels(data)
        height, width = data.shape[:2]
        left, top, wide, high = crop_box(rng, width, height, area=self.area, ratio=self.ratio)
        crop = np.ascontiguousarray(data[top : top + high, left : left + wide])
        image = pixels(open_image(crop), channels=self.channels, exif=False)
        return np.asarray(image.resize((self.size, self.size), BILINEAR)).reshape(self.shape)


def crop_box(
    rng: np.random.Generator, width: int, height: int, *, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a random box `(left, top, width, height)` inside an image.

    Its share of the image's area is uniform in `area`, and the logarithm of width / height is uniform in
    `ratio`. A box that does not fit is redrawn, up to ten times; then the largest central box is used.

    References:
      Szegedy et al., "Going Deeper with Convolutions", 2015, section 6; the number of tries and the
      fallback are torchvision's RandomResizedCrop.
    """
    shares = rng.uniform(*area, 10)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), 10))
    corner = rng.random(2)
    for share, aspect in zip(shares.tolist(), ratios.tolist(), strict=True):
        wide = round(math.sqrt(width * height * share * aspect))
        high = round(math.sqrt(width * height * share / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(corner[0] * (width - wide + 1)), int(corner[1] * (height - high + 1)), wide, high
    aspect = min(max(width / height, ratio[0]), ratio[1])
    wide, high = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - wide) // 2, (height - high) // 2, wide, high


@dataclasses.dataclass(frozen=True)
class RandomRotation:
    """View `base`, rotated about its centre by up to `degrees` in either direction; the corners become black.

    It takes the nearest pixels, the default of torchvision's RandomRotation.
    """

    base: AsStored | CentreCrop
    degrees: float
    random: ClassVar[bool] = True

    @property
    def shape(self) -> Shape:
        return self.base.shape

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        assert rng is not None
        image, degrees = self.base(data), rng.uniform(-self.degrees, self.degrees)
        # Pillow turns three channels at once, and of others any number one by one.
        planes = [image] if self.shape[-1] == 3 else np.moveaxis(image, -1, 0)
        turned = [np.asarray(Image.fromarray(plane).rotate(degrees)) for plane in planes]
        return turned[0] if self.shape[-1] == 3 else np.stack(turned, axis=-1)
