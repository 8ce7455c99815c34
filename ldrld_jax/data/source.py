"""Sources of records: random access to images, encoded or as arrays, and their labels.

A record has one label, or an array of them: a class for each token of a text, or for each pixel. In an array, -1 marks
a label that is left out of loss and metrics, such as a prompt's or padding's. The loader makes the batch's mask of it,
as it does of the -1 of a record that is skipped, so that no source needs a mask of its own beside its labels.
"""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from ldrld_jax.data.augment import generator
from ldrld_jax.data.decode import BrokenImageError, RaisedError
from ldrld_jax.data.views import AsStored, View
from ldrld_jax.errors import UserError

logger = logging.getLogger("ldrld_jax")


_MOST_ABSENT = 100  # numbers that are no label, to each one that is


def check_count_from_0(largest: int, count: int, what: str, *, instead: str = "") -> None:
    """Raises a UserError if numbers that tell examples apart, such as identifiers, are given as labels.

    Each number up to the largest is a class with a name, so a single large one exhausts the memory.

    Args:
      largest: the largest label.
      count: the number of labels.
      what: description of what has them.
      instead: what else the user can do.

    Example:
      >>> check_count_from_0(20_000_000, 3, "the list")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ldrld_jax.errors.UserError: the list has 3 labels that are numbers up to 20000000, and numbers count ...
    """
    if largest > _MOST_ABSENT * count:
        raise UserError(
            f"{what} has {count} labels that are numbers up to {largest}, and numbers count from 0. Renumber "
            f"them{instead}."
        )


class Record(TypedDict):
    """An example: its image and its label."""

    image: bytes | np.ndarray | BrokenImageError  # encoded, or pixels, or why it could not be read
    label: int | np.ndarray


class Records(Protocol):
    """Random access to images."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Record]: ...

    def name(self, index: int) -> str:
        """Returns a readable name of the record: its file or its number."""
        ...

    def labels(self) -> np.ndarray:
        """Returns the labels `[n, ...]`, integers, without decoding any image."""
        ...

    def listing(self) -> Iterator[str]:
        """Yields what tells this list of records from another, without reading any: names and sizes of files."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a dataset.

    Attributes:
      records: the images, encoded or as arrays, and their labels.
      class_names: the name of each label.
      image_shape: `(height, width, channels)`; the first two are None if the images may differ in size. Raw inputs
        have any shape.
      view: the transform of each image; by default none, and all images must have `image_shape`.
      on_error: a broken image or a label out of range stops the run ("raise"), or gets the label -1 and
        is logged once ("skip").
      max_skipped: with "skip", the share of broken records above which the run stops as well; ten may always be
        skipped, unless all records are broken.
      dtype: of an image; what is not uint8 is raw.
      raw: whether inputs go to the model as they are, and no view but the default can be taken of them.
      label_shape: of a record's labels: () for one, `(length,)` for one per token.
      changes: whether the records themselves differ each time they are read, as a dataset's do that augments them.
    """

    records: Any
    class_names: tuple[str, ...]
    image_shape: tuple[Any, ...]
    view: View = None  # type: ignore[assignment]  # set below
    on_error: str = "raise"
    max_skipped: float = 0.05
    dtype: Any = np.uint8
    raw: bool = False
    label_shape: tuple[int, ...] = ()
    changes: bool = False
    broken: set[int] = dataclasses.field(default_factory=set, compare=False)  # the records skipped so far

    def __post_init__(self) -> None:
        if self.dtype != np.uint8:
            object.__setattr__(self, "raw", True)
        if self.view is None:
            object.__setattr__(self, "view", AsStored(self.image_shape))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def uncached(self) -> "Source":
        """The source itself; `InMemory` has the source that it caches."""
        return self

    def of(self, records: Records, view: View) -> "Source":
        """Returns a source of other records of the dataset with another view."""
        return dataclasses.replace(self, records=records, view=view, image_shape=view.shape, broken=set())

    def read(self, indices: np.ndarray, key: tuple[int, int] = (0, 0)) -> tuple[np.ndarray, np.ndarray]:
        """Reads images `[n, *image_shape]` of the source's dtype and labels `[n, *label_shape]` int32 at `indices`.

        Args:
          indices: `[n]`.
          key: seed and epoch; together with an image's index they determine the draws of a random view.

        Raises:
          UserError: if an image is broken and `on_error` is "raise"; with "skip" its row is 0 and its labels are -1.
        """
        view = self.view
        # A host may have no share of an epoch's last batch, and the reader of array_record takes no empty list.
        records = self.records.__getitems__(indices.tolist()) if len(indices) else []
        images = np.zeros((len(records), *view.shape), self.dtype)
        labels = np.full((len(records), *self.label_shape), -1, np.int32)
        for row, (index, record) in enumerate(zip(indices.tolist(), records, strict=True)):
            try:
                if isinstance(record["image"], BrokenImageError):
                    raise record["image"]
                label = self._checked(record["label"])
                image = view(record["image"], generator(*key, index) if view.random else None)
                check_dtype(image.dtype, self.dtype)
                check_range(image, self.dtype)
                images[row] = image
                labels[row] = label
            except BrokenImageError as error:
                self.report(index, error)
        return images, labels

    def _checked(self, label: Any) -> Any:
        if np.shape(label) != self.label_shape:
            raise BrokenImageError(f"its labels have shape {np.shape(label)}, and the others {self.label_shape}")
        classes, several = len(self.class_names), bool(self.label_shape)
        each = np.atleast_1d(label)
        if (bad := each[(each < -several) | (each >= classes)]).size:
            whose, none = ("a", ", and -1 for none") if several else ("its", "")
            raise BrokenImageError(f"{whose} label is {bad[0]}, and there are {classes} classes{none}")
        return label

    def report(self, index: int, error: BrokenImageError) -> None:
        """Skips a broken image, see `skip`.

        Raises:
          UserError: if `on_error` is "raise", or too many are broken. An error raised by a user's dataset is raised
            again instead.
        """
        name = self.records.name(index)
        if self.on_error == "raise":
            if isinstance(error, RaisedError) and error.__cause__ is not None:
                raise error.__cause__  # the user's code is mended by its traceback
            raise UserError(f"{name} is broken: {error}. Repair or remove it, or set data.on_error=skip.") from error
        self.skip(index, name, str(error))

    def skip(self, index: int, name: str, why: str) -> None:
        """Counts and logs a broken image the first time that it is skipped.

        Raises:
          UserError: if there are more of them than `max_skipped` allows.
        """
        if index in self.broken:
            return
        self.broken.add(index)
        count = len(self.broken)
        logger.warning("skipped %s: %s (%d skipped so far)", name, why, count)
        if too_many(count, len(self), self.max_skipped):
            raise UserError(
                f"{count} of {len(self)} images are broken, the last of them {name} ({why}), more than "
                f"data.max_skipped={self.max_skipped:g} allows. Repair the data, or raise data.max_skipped."
            )


def spaced(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices below `count`, evenly spaced from the first to the last.

    Example:
      >>> spaced(9, 3).tolist(), spaced(2, 3).tolist()
      ([0, 4, 8], [0, 1])
    """
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def check_range(image: np.ndarray, dtype: np.dtype) -> None:
    """Raises a BrokenImageError if a whole number does not fit the narrower type that a batch has."""
    narrows = image.dtype.kind in "iu" and not np.can_cast(image.dtype, dtype)
    if narrows and not np.array_equal(image, image.astype(dtype)):
        raise BrokenImageError(f"it has numbers beyond those of {np.dtype(dtype)}")


def check_dtype(dtype: np.dtype, wanted: np.dtype) -> None:
    """Raises a BrokenImageError if inputs of `dtype` mean something else than those of `wanted`, or do not fit it.

    Pixels are uint8; of other inputs, whole numbers are not taken for fractions, nor fractions for whole numbers.

    Example:
      >>> check_dtype(np.dtype("int64"), np.dtype("int32"))
      >>> check_dtype(np.dtype("float32"), np.dtype("uint8"))
      Traceback (most recent call last):
        ...
      ldrld_jax.data.decode.BrokenImageError: its dtype is float32, and the others have uint8
    """
    if dtype != wanted and (wanted == np.uint8 or (dtype.kind == "f") != (np.dtype(wanted).kind == "f")):
        raise BrokenImageError(f"its dtype is {dtype}, and the others have {np.dtype(wanted)}")


def too_many(broken: int, images: int, max_skipped: float) -> bool:
    """Returns whether more of a split's images are broken than may be skipped: a share, or ten unless that is all.

    Example:
      >>> too_many(10, 100, 0.05), too_many(11, 100, 0.05), too_many(3, 3, 1.0)
      (False, True, True)
    """
    return broken == images or broken > max(10, max_skipped * images)


class InMemory:
    """A source that caches its decoded images; for views that are not random."""

    changes = False

    def __init__(self, source: Source):
        self.uncached = source
        self.class_names, self.image_shape = source.class_names, source.image_shape
        self.dtype, self.raw, self.label_shape = source.dtype, source.raw, source.label_shape
        self._images = np.zeros((len(source), *source.image_shape), source.dtype)  # pages are allocated as they fill
        self._labels = np.zeros((len(source), *source.label_shape), np.int32)
        self._known = np.zeros(len(source), bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.uncached)

    def read(self, indices: np.ndarray, key: tuple[int, int] = (0, 0)) -> tuple[np.ndarray, np.ndarray]:
        """Reads images and labels as `Source.read` does."""
        missing = indices[~self._known[indices]]
        if len(missing):
            images, labels = self.uncached.read(missing, key)
            with self._lock:  # an example is marked as known only once it is stored
                self._images[missing], self._labels[missing] = images, labels
                self._known[missing] = True
        return self._images[indices], self._labels[indices]


@dataclasses.dataclass(frozen=True)
class Selected:
    """A subset of records by index; `given_labels` replace theirs: noisy ones, or those that have been read."""

    records: Records
    indices: np.ndarray
    given_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        records = self.records.__getitems__(self.indices[indices].tolist())
        if self.given_labels is None:
            return records
        return [{**record, "label": int(self.given_labels[i])} for i, record in zip(indices, records, strict=True)]

    def name(self, index: int) -> str:
        return self.records.name(int(self.indices[index]))

    def labels(self) -> np.ndarray:
        return self.records.labels()[self.indices] if self.given_labels is None else self.given_labels

    def listing(self) -> Iterator[str]:
        """Yields the listing of all records: a run's config says which of them are selected."""
        return self.records.listing()


def whole_of(records: Any) -> Any:
    """Returns all the records of which some are selected."""
    while isinstance(records, Selected):
        records = records.records
    return records


def fingerprint(source: Any) -> dict[str, Any]:
    """Returns the number of images of a source and a digest of the list of its records, as JSON.

    Copies, such as decoded images, also have the digest of the source that they are from, `original`.
    """
    records = source.uncached.records
    digest = hashlib.sha256()
    for line in records.listing():
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    original = getattr(whole_of(records), "original", None)
    return {"images": len(source), "digest": digest.hexdigest()[:32], **({"original": original} if original else {})}
