"""Data that are given as objects: arrays, and datasets with one example an index, of any library.

An object is a dataset here if it has `len(it)` and `it[i]`, which is a pair `(image, label)` or a dict with
`image` and `label`. An image is an array, a Pillow image or an encoded file's bytes. A label is a class, or an array of
classes, one a token, in which -1 is left out. Further attributes, all optional:

- `class_names` (or `classes`), the name of each label, or `num_classes`, their number;
- `raw`: True if inputs go to the model as they are: token ids, spectrograms, images that are normalised already;
- `thread_safe`: True if several threads may read examples at once. Otherwise one does, as with PyTorch's datasets,
  which may share a file handle or a random generator.

Arrays and images of 8 bits are pixels; others are raw, as are texts `[length]` of 8 bits with a label per token. Raw
numbers of 64 bits become 32-bit ones, whatever `precision` is.
"""

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldrld_jax.data.decode import BrokenImageError, RaisedError, pixels
from ldrld_jax.data.source import Source, check_count_from_0, spaced
from ldrld_jax.errors import UserError

_HASHED_BYTES = 2**28  # of arrays; of larger ones evenly spaced examples
_LOOKED_AT = 1000
_GREY, _NUMBERS = ("1", "L", "LA", "La"), ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of Pillow
_READ_TWICE = 16  # of 16 images mirrored at random, all are the same twice in one of 65,536 cases
_ONE_AT_A_TIME = threading.RLock()  # shared by all datasets: two may read one file, and one may read another
_LABELS_LOOKED_AT = 64  # each reads an image of a dataset object


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Examples in two arrays, which may be memory maps.

    Attributes:
      images: `[n, ...]`.
      targets: `[n]`, or `[n, ...]` for several labels each, int32.
      title: the name in error messages.
    """

    images: Any
    targets: np.ndarray
    title: str

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": np.asarray(self.images[i]), "label": self.targets[i]} for i in indices]

    def name(self, index: int) -> str:
        return f"example {index} of the {self.title}"

    def labels(self) -> np.ndarray:
        return self.targets

    def listing(self) -> Iterator[str]:
        """Yields shape and dtype, and digests of the labels and of the images: of all, or of some if they are many."""
        yield f"{self.images.shape} {self.images.dtype}"
        yield hashlib.sha256(self.targets.tobytes()).hexdigest()
        digest = hashlib.sha256()
        few = self.images.nbytes <= _HASHED_BYTES
        for i in range(len(self)) if few else spaced(len(self), _LOOKED_AT).tolist():
            digest.update(np.ascontiguousarray(self.images[i]).tobytes())
        yield digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ItemRecords:
    """Examples of a dataset object, one an index.

    Attributes:
      items: the object, see the module.
      title: the name in error messages.
      exif: whether images of Pillow are turned as their EXIF orientation says; False for `data.exif=False`.
    """

    items: Any
    title: str
    exif: bool = True

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._record(i) for i in indices]

    def _record(self, index: int) -> dict[str, Any]:
        safe = getattr(self.items, "thread_safe", False)
        try:
            with contextlib.nullcontext() if safe else _ONE_AT_A_TIME:
                item = self.items[index]
        except Exception as error:  # of the user's code; what reads the record raises or skips it
            broken = RaisedError(f"{type(error).__name__}: {error}")
            broken.__cause__ = error
            return {"image": broken, "label": -1}
        return _record(item, self.name(index), self.exif)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def labels(self) -> np.ndarray:
        labels = [record["label"] for i in range(len(self)) for record in self.__getitems__([i])]
        shape = max(map(np.shape, labels), key=len)  # a scalar among arrays is the -1 of an example that raised
        return np.array([np.broadcast_to(label, shape) for label in labels])

    def listing(self) -> Iterator[str]:
        """Yields the type and the number of examples, and some labels.

        Images tell nothing: a dataset object may augment them at random.
        """
        yield f"{type(self.items).__name__} {len(self)}"
        yield " ".join(
            str(np.asarray(record["label"]).tolist())
            for record in self.__getitems__(spaced(len(self), _LABELS_LOOKED_AT).tolist())
        )


@dataclasses.dataclass(frozen=True)
class HuggingFaceRecords(ItemRecords):
    """Examples of a `datasets.Dataset` whose images are not decoded.

    Attributes:
      image, label: the names of the columns.
    """

    image: str = "image"
    label: str = "label"

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = self.items[list(indices)]
        return [
            {"image": BrokenImageError("its label is missing") if label is None else _bytes(image), "label": label or 0}
            for image, label in zip(rows[self.image], rows[self.label], strict=True)
        ]

    def listing(self) -> Iterator[str]:
        """Yields digests of the labels and of some images; the object's own fingerprint changes as its files move."""
        yield f"{type(self.items).__name__} {len(self)}"
        yield hashlib.sha256(self.labels().tobytes()).hexdigest()
        digest = hashlib.sha256()
        for record in self.__getitems__(spaced(len(self), _LABELS_LOOKED_AT).tolist()):
            image = record["image"]
            digest.update(image if isinstance(image, bytes) else str(image).encode())
        yield digest.hexdigest()

    def labels(self) -> np.ndarray:
        labels = self.items.select_columns([self.label])[:][self.label]
        return np.array([-1 if label is None else label for label in labels], np.int32)


def as_source(data: Any, *, num_classes: int | None = None, title: str = "data", exif: bool = True) -> Source:
    """Returns a source of what a user gives as one split.

    Args:
      data: a pair of arrays `(images, labels)`, a `datasets.Dataset`, another dataset object (see the module), or a
        `Source`.
      num_classes: for data that do not know it; unset, arrays have as many classes as their largest label asks for.
      title: the name in error messages.
      exif: whether images of Pillow are turned as their EXIF orientation says. Those that are encoded are turned, or
        not, as they are decoded.

    Raises:
      UserError: if it is none of these, or a label is out of range.

    Example:
      >>> source = as_source((np.zeros((5, 8, 8, 1), np.uint8), np.arange(5)), num_classes=10)
      >>> len(source), source.image_shape, len(source.class_names)
      (5, (8, 8, 1), 10)
      >>> as_source((np.zeros((5, 6), np.int32), np.zeros((5, 6), int)), num_classes=50).label_shape
      (6,)
    """
    if isinstance(data, Source):
        return data
    if num_classes is not None and not isinstance(num_classes, int | np.integer):
        raise UserError(f"num_classes must be a whole number, got {num_classes!r}.")
    examples = isinstance(data, list) and any(map(_is_example, data))
    if isinstance(data, tuple | list) and len(data) == 2 and not examples:
        return _of_arrays(*data, num_classes=num_classes, title=title)
    if hasattr(data, "features") and hasattr(data, "cast_column"):
        _check_hugging_face(data, title)
        return _of_hugging_face(data, title)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str | dict):
        return _of_items(data, num_classes=num_classes, title=title, exif=exif)
    raise UserError(
        f"the {title} must be (images, labels), a dataset with a length and one example per index, or a source, got "
        f"{type(data).__name__}. Give one of these."
    )


def _is_example(part: Any) -> bool:
    """Returns whether a part of a list is an example and neither images nor labels."""
    pair = isinstance(part, list) and len(part) == 2 and np.ndim(part[1]) == 0 != np.ndim(part[0])
    return pair or isinstance(part, tuple | Mapping)


def _of_arrays(images: Any, labels: Any, *, num_classes: int | None, title: str) -> Source:
    images = _as_one_array(images, f"inputs of the {title}")  # a memory map stays one
    labels = np.asarray(_as_one_array(labels, f"labels of the {title}"))
    if not labels.ndim or labels.dtype.kind not in "iu" or _is_one_hot(labels, images, num_classes):
        one_hot = bool(labels.ndim) and labels.dtype.kind in "iu"
        raise UserError(
            f"the labels of the {title} must be integers [n], or [n, length] for one per token, got {labels.dtype} "
            f"{labels.shape}{', one-hot' * one_hot}. Convert one-hot labels with argmax(-1)"
            f"{'; for one label per token, set num_classes' * one_hot}."
        )
    if len(images) != len(labels) or not len(labels):
        raise UserError(
            f"the {title} must have one label per image, got {len(images)} images and {len(labels)} labels."
        )
    if images.dtype == np.uint8 and images.ndim != 4 and labels.ndim == 1:
        raise UserError(
            f"the images of the {title} must be [n, height, width, channels], got {images.shape}. Add the axis that is "
            "missing: images[..., None]; or, for tokens, give them as int32."
        )
    if images.dtype.kind not in "fiu" or images.ndim < 2:
        raise UserError(f"the images of the {title} must be numbers [n, ...], got {images.dtype} {images.shape}.")
    if images.dtype.kind == "f" and not all(np.isfinite(images[i]).all() for i in spaced(len(images), _LOOKED_AT)):
        raise UserError(f"the images of the {title} hold numbers that are not finite. Remove those images.")
    several = labels.ndim > 1
    if several and not (labels >= 0).any():
        raise UserError(f"every label of the {title} is below 0, so that none is left. Give the classes from 0.")
    if num_classes is None:
        largest = int(labels.max())
        check_count_from_0(largest, labels.size, f"the {title}")
        num_classes = largest + 1
    names = named_classes(None, num_classes)
    bad = np.argwhere((labels < (-1 if several else 0)) | (labels >= len(names)))
    if len(bad):
        raise UserError(
            f"label {labels[tuple(bad[0])]} of example {bad[0][0]} of the {title} is out of range: there are "
            f"{len(names)} classes, from 0{', and -1 for a label that is left out' * several}. Correct it"
            f"{f' and {len(bad) - 1} others' * (len(bad) > 1)}, or num_classes."
        )
    records = ArrayRecords(images, labels.astype(np.int32), title)
    raw = several and images.ndim != 4  # bytes of a text
    dtype = _stored_as(images.dtype)
    return Source(records, names, images.shape[1:], dtype=dtype, raw=raw, label_shape=labels.shape[1:])


def _as_one_array(given: Any, what: str) -> np.ndarray:
    """Returns what a user gives for all examples as one array.

    Raises:
      UserError: if it is a dict or no sequence, or the examples differ in shape.
    """
    if isinstance(given, Mapping):
        raise UserError(
            f"the {what} must be one array [n, ...], got a dict of {', '.join(map(str, given))}. Give one of them; the "
            "label -1 leaves a token out."
        )
    try:
        array = np.asanyarray(given)
    except ValueError:  # NumPy's, for parts that differ in shape
        array = None
    if array is None or (array.dtype == object and array.ndim):
        shapes = set()
        for part in given:
            with contextlib.suppress(ValueError):
                shapes.add(np.shape(part))
        if array is None or len(shapes) > 1:
            pictures = any(len(shape) > 1 for shape in shapes)
            todo = "Resize images to one size" if pictures else "Pad texts to one length, and label the padding -1"
            shown = " and ".join(map(str, sorted(shapes)[:2])) or "several"
            raise UserError(f"the {what} must have one shape, got {shown}. {todo}.")
    if not array.ndim:
        raise UserError(f"the {what} must be one array [n, ...], got {type(given).__name__}. Give an array.")
    return array


def _is_one_hot(labels: np.ndarray, images: np.ndarray, num_classes: int | None) -> bool:
    """Returns whether labels `[n, C]` have a single 1 in each row and zeros elsewhere, and are not tags of tokens."""
    if labels.ndim != 2:
        return False
    per_token = num_classes == 2 or labels.shape[1:] == images.shape[1:2]
    if per_token and num_classes not in (None, labels.shape[1]):  # one-hot labels have a column per class
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all())


def _of_items(data: Any, *, num_classes: int | None, title: str, exif: bool) -> Source:
    if not len(data):
        raise UserError(f"the {title} have no examples.")
    first, label = (_record(data[0], f"{title}[0]", exif)[key] for key in ("image", "label"))
    if isinstance(first, BrokenImageError):
        raise UserError(f"{title}[0] is broken: {first}. Repair or remove it.") from first.__cause__
    given = (getattr(data, name, None) for name in ("class_names", "classes"))
    names: Any = next((each for each in given if _lists(each)), None)
    if isinstance(names, Mapping):  # from labels to names, or from names to labels, in any order
        numbered = all(isinstance(key, int) for key in names)
        names = [names[key] for key in sorted(names)] if numbered else sorted(names, key=names.__getitem__)
    count = getattr(data, "num_classes", None)
    count = num_classes if count is None else count
    if names is None and count is None:
        raise UserError(f"the {title} do not say how many classes they have. Set num_classes.")
    records = ItemRecords(data, title, exif)
    shape: tuple[int, ...] = np.shape(label)
    if isinstance(first, bytes):
        changes = _changes(records)
        return Source(records, named_classes(names, count), (None, None, 3), label_shape=shape, changes=changes)
    raw = bool(getattr(data, "raw", False) or (shape and first.ndim != 3))  # as `_of_arrays` has it
    kind: dict[str, Any] = dict(raw=raw, dtype=_stored_as(first.dtype), changes=_changes(records))
    return Source(records, named_classes(names, count), first.shape, label_shape=shape, **kind)


def _changes(records: ItemRecords) -> bool:
    """Returns whether an example has other pixels the second time; looks at a few."""
    some = spaced(len(records), _READ_TWICE).tolist()
    first, second = ([record["image"] for record in records.__getitems__(some)] for _ in range(2))
    arrays = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, np.ndarray | bytes)]
    return any(not np.array_equal(a, b) for a, b in arrays)


def _check_hugging_face(data: Any, title: str) -> None:
    """Raises a UserError for a dataset of Hugging Face that has no length, or whose rows are a function's."""
    if not hasattr(data, "__len__"):
        raise UserError(
            f"the {title} are of type {type(data).__name__}, which has no length and no example per index. Give "
            "a datasets.Dataset, as load_dataset returns it without streaming."
        )
    if data.format["type"] == "custom":
        raise UserError(
            f"the {title} have a transform (with_transform, set_transform), which may drop the columns of images and "
            "labels. Apply it with dataset.map, or give a dataset object of your own with (image, label) per index."
        )


def _of_hugging_face(data: Any, title: str) -> Source:
    columns = {
        kind: [name for name, feature in data.features.items() if type(feature).__name__ == kind]
        for kind in ("Image", "ClassLabel")
    }
    for kind, found in columns.items():
        if len(found) > 1:
            raise UserError(
                f"the {title} have several columns of {kind}: {', '.join(found)}. Keep the one to use: "
                "dataset.select_columns([...])."
            )
    if not all(columns.values()):
        raise UserError(
            f"the {title} have the columns {', '.join(data.features)}, and an Image and a ClassLabel are needed. Cast "
            "them: dataset.cast_column(name, datasets.ClassLabel(names=...)), or give texts as arrays (inputs, labels)."
        )
    (image,), (label,) = columns["Image"], columns["ClassLabel"]
    encoded = data.with_format(None).cast_column(image, type(data.features[image])(decode=False))
    records = HuggingFaceRecords(encoded, title, image=image, label=label)
    return Source(records, tuple(data.features[label].names), (None, None, 3))


def _lists(names: Any) -> bool:
    """Returns whether something holds names of classes, as lists, arrays and dicts do."""
    holds = hasattr(names, "__iter__") and hasattr(names, "__len__") and not isinstance(names, str)
    return holds and len(names) > 0


def named_classes(names: Sequence[str] | None, count: int | None) -> tuple[str, ...]:
    return tuple(map(str, names if names is not None else range(count or 0)))


def _record(item: Any, name: str, exif: bool) -> dict[str, Any]:
    try:
        image, label = (item["image"], item["label"]) if isinstance(item, dict) else item
        try:
            image = image if isinstance(image, bytes) else as_array(image, exif=exif)
        except BrokenImageError as error:  # the reader of the record raises or skips it
            image = error
        return {"image": image, "label": _label(label, name)}
    except UserError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{name} must be (image, label) or a dict with both, got {type(item).__name__}.") from error


def _label(label: Any, name: str) -> int | np.ndarray:
    """Returns a class, or an array of them; raises a UserError with the example's name for any other thing."""
    array = np.asarray(label)
    if array.dtype.kind not in "iub":
        shown = " ".join(str(label).split())[:60]
        raise UserError(f"{name} has the label {shown}, and labels are whole numbers from 0. Convert it.")
    return int(array) if array.ndim == 0 else array


def as_array(image: Any, *, exif: bool) -> np.ndarray:
    """Returns an image as an array: `[height, width, channels]` uint8 of a picture of Pillow's, grey or in colour.

    Palettes, transparency and the like become colours as those of an encoded file do. Pictures of 16 or 32 bits stay
    numbers.

    Args:
      image: a picture of Pillow's, or what NumPy takes.
      exif: whether a picture is turned as its EXIF orientation says.

    Raises:
      BrokenImageError: if a picture of Pillow's cannot be decoded.

    Example:
      >>> [as_array(Image.new(mode, (3, 2)), exif=True).shape for mode in ("P", "1")]
      [(2, 3, 3), (2, 3, 1)]
    """
    if isinstance(image, Image.Image) and image.mode not in _NUMBERS:
        image = pixels(image, channels=1 if image.mode in _GREY else 3, exif=exif)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 and array.dtype == np.uint8 else array  # a grey picture


def _bytes(image: dict[str, Any] | None) -> bytes | BrokenImageError:
    """Returns the file of an image that a dataset holds as its bytes, or as the path of a local file; or an error."""
    if image is None:
        return BrokenImageError("it is missing")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        with open(image["path"], "rb") as file:  # noqa: PTH123  # a path, or an address that datasets has opened
            return file.read()
    except OSError as error:
        return BrokenImageError(str(error))


def _stored_as(dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a batch: 64-bit numbers become 32-bit ones, in the machine's byte order."""
    return {8: np.dtype(f"{dtype.kind}4")}.get(dtype.itemsize, dtype.newbyteorder("="))
