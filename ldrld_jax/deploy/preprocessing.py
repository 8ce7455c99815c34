"""Describes the preprocessing of a deployed student as JSON that any program can reproduce."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldrld_jax.data.views import CentreCrop, Fitted, View
from ldrld_jax.errors import UserError
from ldrld_jax.train.step import Network


def describe(
    network: Network, data: ConfigDict, shape: Any, classes: int, *, dtype: Any = np.uint8, label_shape: Any = ()
) -> dict[str, Any]:
    """Returns the content of preprocessing.json.

    Args:
      network: the student, whose normalisation and resize are part of the exported function.
      data: the `data` block of the run's config, which defines the evaluation view of an image.
      shape: of the function's inputs: height, width and channels of an image.
      classes: number of classes.
      dtype: of the inputs.
      label_shape: of an input's labels, see `data.source.Source`.

    Returns:
      A dict. `input` and `output` are the function's signature, `before` lists in order the operations that turn
      an image into an input, and `inside` lists the operations that the function itself applies first. Both are None
      for raw inputs; `before` is None as well for pixels of other channels than grey and RGB, which no image file has.
    """
    output = {"dtype": "float32", "shape": ["batch", *label_shape, classes], "values": "logits"}
    if network.raw:
        described = {"dtype": np.dtype(dtype).name, "shape": ["batch", *shape]}
        return {"input": described, "output": output, "before": None, "inside": None}
    pixels: dict[str, Any] = {"dtype": "uint8", "shape": ["batch", *shape]}
    inside = {
        "scale": 1 / 255,
        "resize": network.image_size,
        "mean": list(network.mean),
        "std": list(network.std),
    }
    height, width, channels = shape
    if channels not in (1, 3):
        return {"input": pixels, "output": output, "before": None, "inside": inside}
    before = {
        "turn_as_exif_says": data.exif,
        "transparent_on": "white",
        # null: resize until the crop just fits, which leaves an image of the crop's size unchanged
        "resize_shorter_side": None if data.crop_size is None else data.resize_size or data.crop_size,
        "resize_filter": "bilinear, antialiased, as Pillow's",
        "crop_centre": [height, width],
    }
    colours = {1: "grey", 3: "RGB"}[channels]
    return {"input": {**pixels, "colours": colours}, "output": output, "before": before, "inside": inside}


def view_of(preprocessing: dict[str, Any]) -> View:
    """Returns the view that applies the operations of `before`.

    Raises:
      UserError: if they are no such operations, or the student takes inputs that no image file holds.

    Example:
      >>> before = {"turn_as_exif_says": True, "resize_shorter_side": 256}
      >>> view_of({"input": {"shape": ["batch", 224, 224, 3]}, "before": before})
      CentreCrop(resize=256, size=224, channels=3, exif=True)
    """
    try:
        before, shape = preprocessing["before"], preprocessing["input"]["shape"]
        if before is None:
            raise UserError(
                f"the student takes {preprocessing['input']['dtype']} inputs [{', '.join(map(str, shape))}] as they "
                "are, and no image files. Call its program, as the README.md of its export shows."
            )
        _, height, width, channels = shape
        side, exif = before["resize_shorter_side"], before["turn_as_exif_says"]
        sizes = [height, width, channels, *([] if side is None else [side])]
        if not all(type(size) is int and 0 < size < 2**16 for size in sizes) or type(exif) is not bool:
            raise ValueError(f"sizes {sizes}, turn_as_exif_says {exif!r}")
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"preprocessing.json is not of an export ({type(error).__name__}: {error}). Export the student again."
        ) from None
    if side is None:
        return Fitted((height, width, channels), exif)
    return CentreCrop(side, height, channels, exif)
