"""Datasets known by description alone: enough to compile a run, but without records to read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.code import is_code
from ldrld_jax.data import decoded, folders, tfds_records
from ldrld_jax.data.source import Source
from ldrld_jax.data.sources import ARRAYS, open_source
from ldrld_jax.errors import UserError, reason

# Images per split if no description is on disk: TFDS's code holds a dataset's classes and shape, but not its size.
_SIZES = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "digits": {"train": 1_438, "test": 359},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "tiny_imagenet": {"train": 100_000, "val": 10_000},
}


@dataclasses.dataclass(frozen=True)
class Undelivered:
    """Records that have a count but no content; their labels are spread evenly over the classes."""

    count: int
    classes: int

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> NoReturn:
        raise UserError(f"record {indices[0]} is only described and cannot be read.")

    def name(self, index: int) -> str:
        return f"record {index} of a described dataset"

    def labels(self) -> np.ndarray:
        return np.arange(self.count, dtype=np.int32) % self.classes


@dataclasses.dataclass(frozen=True)
class Describer:
    """A callable like `sources.open_source` that opens splits without their images.

    Attributes:
      known: the `compile` block of a config, for values that no description provides.
      images: the key of that block with the number of images, "train_images" or "eval_images".
    """

    known: ConfigDict
    images: str

    def __call__(
        self, name: str, split: str, data_dir: str | None, *, train_split: str, exif: bool, **on_error: Any
    ) -> Source:
        """Describes a split.

        Raises:
          UserError: if the dataset is unknown, or it is not on this machine and a key of `compile` is missing.
        """
        files = name in folders.FOLDERS or name == decoded.NAME
        listed = files and data_dir is not None and epath.Path(data_dir).is_dir()
        if listed or is_code(name) or name.startswith(ARRAYS):  # no description is anywhere else
            return open_source(name, split, data_dir, train_split=train_split, exif=exif, **on_error)
        classes, shape, count = _folder(name, split) if files else _tfds(name, split, data_dir)
        classes = self._complete("classes", classes, name)
        shape = self._complete("image_shape", shape, name)
        count = self._complete(self.images, count, name)
        names = tuple(f"class {i}" for i in range(classes))
        return Source(Undelivered(count, classes), names, tuple(shape), **on_error)

    def _complete(self, key: str, described: Any, name: str) -> Any:
        value = self.known[key] if described is None else described
        if value is None:
            raise UserError(
                f"data.name={name} is not on this machine, and no description of it gives compile.{key}. Set "
                f"--config.compile.{key}, or set data.data_dir to the folder of the data."
            )
        return value


def _folder(name: str, split: str) -> tuple[int | None, tuple[Any, ...] | None, int | None]:
    """Returns classes, shape and number of images of a folder that is not on this machine; None for unknown values."""
    if name == "tiny_imagenet":
        return 200, (64, 64, 3), _SIZES[name].get(split)
    return None, (None, None, 3), None


def _tfds(name: str, split: str, data_dir: str | None) -> tuple[int, tuple[Any, ...], int | None]:
    """Returns classes, shape and number of images of a TFDS dataset; None for an unknown number."""
    builder = tfds_records.make_builder(name, data_dir)
    label, image = builder.info.features["label"], builder.info.features["image"]
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()} or _SIZES.get(name, {})
    return label.num_classes, image.shape, _count(split, sizes) if sizes else None


def _count(split: str, sizes: dict[str, int]) -> int:
    """Counts the images of a split such as `train[:90%]`.

    Raises:
      UserError: if there is no such split.

    Example:
      >>> _count("train[:10%]", {"train": 1000}), _count("train+test[5:]", {"train": 20, "test": 10})
      (100, 25)
    """
    try:
        found = [end - start for _, start, end in tfds_records.ranges_of(split, {key: [n] for key, n in sizes.items()})]
    except ValueError as error:
        raise UserError(
            f"split {split!r} cannot be read: {reason(error)}. Name a split, or a slice such as train[:90%]."
        ) from None
    if min(found) < 0 or not sum(found):
        raise UserError(f"split {split!r} has no images. Name a split, or a slice such as train[:90%].")
    return sum(found)
