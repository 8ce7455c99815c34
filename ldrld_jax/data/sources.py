"""Where records come from: random access to encoded images and labels."""

import contextlib
import dataclasses
import io
import logging
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ldrld_jax.data.digits import Digits
from ldrld_jax.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a dataset.

    Attributes:
      records: random access by index or by list of indices (`__getitems__`) to `{"image": bytes, "label": int}`.
      class_names: the name of each label.
      image_shape: `(height, width, channels)`, all images alike.
    """

    records: Any
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The decoded images `[n, height, width, channels]` uint8 and labels `[n]` int32 at `indices`."""
        records = self.records.__getitems__(indices.tolist())
        height, width, channels = self.image_shape
        images = np.empty((len(records), height, width, channels), np.uint8)
        for row, record in zip(images, records, strict=True):
            row[...] = np.asarray(Image.open(io.BytesIO(record["image"]))).reshape(row.shape)
        return images, np.array([record["label"] for record in records], np.int32)


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """A split of a TFDS image classification dataset, read without TensorFlow.

    Args:
      name: `digits`, which is prepared on first use, or any dataset name that TFDS knows.
      split: a split of it, or a slice such as `train[:90%]`.
      data_dir: where datasets lie; None for TFDS's own default.

    Raises:
      UserError: if the name or the split is unknown, or the dataset is not prepared in `data_dir`.
    """
    # data_source reads array_record only; TFDS warns at each use of another format and of Pillow.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if name == "digits":
            builder = Digits(data_dir=data_dir, file_format="array_record")
            if not builder.is_prepared():
                tfds.disable_progress_bar()
                with contextlib.redirect_stdout(io.StringIO()):  # it speaks of a download, and there is none
                    builder.download_and_prepare()
        else:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise unknown("dataset", name, ["digits", *tfds.list_builders(with_community_datasets=False)]) from None
    if not builder.is_prepared():
        where = f" --data_dir {data_dir}" if data_dir else ""
        raise UserError(
            f"dataset {name} is not prepared in {builder.data_dir}. Set data.data_dir to where it lies, or prepare "
            f"it: pip install 'ldrld_jax[tf]' && tfds build {name} --file_format array_record{where}"
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(
            f"dataset {name} has no image and label, but {', '.join(features)}. Choose a classification one."
        )
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except (KeyError, ValueError):
        raise unknown(f"split of {name}", split, builder.info.splits) from None
    return Source(records, tuple(features["label"].names), features["image"].shape)
