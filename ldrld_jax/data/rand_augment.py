"""RandAugment: a few random distortions of a given strength, for networks that overfit, such as transformers."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ldrld_jax.data.decode import Encoded
from ldrld_jax.data.views import Shape, View

GREY = (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    fill = GREY if image.mode == "RGB" else GREY[0]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)


# Each operation takes a strength in -1..1; operations without a direction use its absolute value.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, s: image,
    "shear_x": lambda image, s: _affine(image, 1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda image, s: _affine(image, 1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda image, s: _affine(image, 1, 0, 0.45 * s * image.width, 0, 1, 0),
    "translate_y": lambda image, s: _affine(image, 1, 0, 0, 0, 1, 0.45 * s * image.height),
    "rotate": lambda image, s: image.rotate(30 * s, fillcolor=GREY if image.mode == "RGB" else GREY[0]),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "colour": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """The view `base` followed by randomly chosen OPERATIONS.

    Attributes:
      base: the view before the distortions.
      operations: the number of operations, each drawn from all with replacement.
      magnitude: their strength, 0..30; the direction is random for operations that have one.

    References:
      Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", 2019.
    """

    base: View
    operations: int
    magnitude: int
    random: ClassVar[bool] = True

    @property
    def shape(self) -> Shape:
        return self.base.shape

    def __call__(self, data: Encoded, rng: np.random.Generator | None = None) -> np.ndarray:
        assert rng is not None
        pixels = self.base(data, rng)
        image = Image.fromarray(pixels[..., 0] if self.shape[-1] == 1 else pixels)
        for name in rng.choice(list(OPERATIONS), self.operations):
            sign = 1 if rng.random() < 0.5 else -1
            image = OPERATIONS[name](image, sign * self.magnitude / 30)
        return np.asarray(image).reshape(self.shape)
