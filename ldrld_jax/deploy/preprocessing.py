"""Describes the preprocessing of a deployed student as JSON that any program can reproduce."""

from typing import Any

from ml_collections import ConfigDict

from ldrld_jax.data.views import CentreCrop, Fitted, Shape, View
from ldrld_jax.train.step import Network


def describe(network: Network, data: ConfigDict, shape: Shape, classes: int) -> dict[str, Any]:
    """Returns the content of preprocessing.json.

    Args:
      network: the student, whose normalisation and resize are part of the exported function.
      data: the `data` block of the run's config, which defines the evaluation view of an image.
      shape: height, width and channels of the function's input images.
      classes: number of classes.

    Returns:
      A dict. `input` and `output` are the function's signature, `before` lists in order the operations that turn
      an image into an input, and `inside` lists the operations that the function itself applies first.
    """
    height, width, channels = shape
    return {
        "input": {"dtype": "uint8", "shape": ["batch", *shape], "colours": {1: "grey", 3: "RGB"}[channels]},
        "output": {"dtype": "float32", "shape": ["batch", classes], "values": "logits"},
        "before": {
            "turn_as_exif_says": data.exif,
            "transparent_on": "white",
            # null: resize until the crop just fits, which leaves an image of the crop's size unchanged
            "resize_shorter_side": None if data.crop_size is None else data.resize_size or data.crop_size,
            "resize_filter": "bilinear, antialiased, as Pillow's",
            "crop_centre": [height, width],
        },
        "inside": {
            "scale": 1 / 255,
            "resize": network.image_size,
            "mean": list(network.mean),
            "std": list(network.std),
        },
    }


def view_of(preprocessing: dict[str, Any]) -> View:
    """Returns the view that applies the operations of `before`.

    Example:
      >>> before = {"turn_as_exif_says": True, "resize_shorter_side": 256}
      >>> view_of({"input": {"shape": ["batch", 224, 224, 3]}, "before": before})
      CentreCrop(resize=256, size=224, channels=3, exif=True)
    """
    _, height, width, channels = preprocessing["input"]["shape"]
    before = preprocessing["before"]
    if before["resize_shorter_side"] is None:
        return Fitted((height, width, channels), before["turn_as_exif_says"])
    return CentreCrop(before["resize_shorter_side"], height, channels, before["turn_as_exif_says"])
