"""Stores a teacher's logits on disk for every image and augmentation epoch, with a key that identifies them.

`DIR/key.json` is the key. `DIR/00007` is a zarr array `[examples, classes]` for the images as augmented in epoch 7, or
`[examples, ..., classes]` for several labels per example, and `DIR/00007/whole` appears once the array is complete.
With `logits.top_k` there are three arrays in its place, `values`, `classes` and `rest`, see `TopLogits`. Any zarr
reader opens the arrays.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from ml_collections import ConfigDict

from ldrld_jax.errors import UserError, reason
from ldrld_jax.files import check_writable, free_bytes, full_disk_named, human_bytes, is_local, is_of_machine
from ldrld_jax.identity import READING, differences, flat
from ldrld_jax.logit_store.top import TopLogits, class_dtype

Key = dict[str, Any]
Logits = np.ndarray | TopLogits  # of an epoch: [examples, classes], or the largest of each example

_FULL = "no space left for the logit store; its whole epochs are intact"
_SAMPLES = 64  # images of a checksum
_CHUNK_BYTES = 2**24  # per file: large enough for any disk, small enough for several threads to share the reading

# Keys of the data block that change neither the index of an image nor what the teacher sees of it. The key holds
# the augmentation seed separately, and the teacher's normalisation with the teacher.
_NOT_KEY = (
    *(*READING, "eval_split", "remainder", "label_noise", "label_noise_rate", "mixup", "augment_seed"),
    *("mean", "std", "image_size"),
)


def check(
    config: ConfigDict,
    *,
    views: int,
    last_layer: bool,
    teacher_changes: bool,
    from_file: bool,
    top_needed: Mapping[str, int | None],
) -> None:
    """Raises a UserError if a run of this config cannot use a logit store, or a file of logits.

    Args:
      config: the run's resolved config.
      views: number of augmentations of an image that the methods compare.
      last_layer: True if a method uses the weights of the teacher's last layer.
      teacher_changes: True if the teacher's weights change as the student trains.
      from_file: True if the teacher is a file of logits.
      top_needed: `Method.top_needed` of each method.
    """
    logits = config.logits
    if not logits and not from_file:
        return
    for wrong, why in (
        (teacher_changes, f"teacher.model={config.teacher.model} changes as the student trains"),
        (config.data.mixup, "data.mixup blends each image with another one every time"),
        (views > 1, f"method={config.method} compares {views} views of an image, and one is stored"),
        (last_layer, f"method={config.method} takes the teacher's last layer, which is not stored"),
    ):
        if wrong:
            what = "a file has logits" if from_file else "logits.dir keeps a teacher's logits for later runs"
            raise UserError(f"{what}, but {why}. Unset one of them.")
    if logits.get("top_k") is None:
        if logits.get("spread_rest"):
            raise UserError(
                "logits.spread_rest spreads what logits.top_k leaves out, and logits.top_k is unset. Set it, or unset "
                "logits.spread_rest."
            )
        return
    for name, needed in top_needed.items():
        if needed is None and not logits.spread_rest:
            raise UserError(
                f"method={name} reads every logit of the teacher, and logits.top_k={logits.top_k} keeps the largest "
                "and the mass of the rest. Unset logits.top_k, or spread that mass evenly: logits.spread_rest=True."
            )
        if needed is not None and needed > logits.top_k:
            raise UserError(
                f"method={name} compares the {needed} largest logits, and logits.top_k={logits.top_k} keeps fewer. "
                f"Set it to at least {needed}."
            )


def check_top_k(config: ConfigDict, classes: int) -> None:
    """Raises a UserError if `logits.top_k` leaves nothing out of `classes` logits."""
    top_k = config.logits.get("top_k")
    if top_k is not None and top_k >= classes:
        raise UserError(
            f"logits.top_k must be below the number of classes ({classes}), got {top_k}. Unset it to keep all logits."
        )


def make_key(
    config: ConfigDict,
    *,
    classes: int,
    records: Any,
    listing: str,
    augment_seed: int,
    label_shape: tuple[int, ...] = (),
    networks: Sequence[Any] = (),
    weights: Sequence[Any] = (),
    structures: Sequence[str] = (),
    name: str | None = None,
    fed: Mapping[str, Any] | None = None,
) -> Key:
    """Returns the key of a store: everything that determines the logits of an image in an epoch.

    Args:
      config: the run's resolved config.
      classes: number of classes.
      records: the training set, see `data.source.Records`.
      listing: digest of its list, see `data.source.fingerprint`.
      augment_seed: seed of the crops, mirrors and random views.
      label_shape: of an example's labels, see `data.source.Source`.
      networks: the teacher's networks, several for an ensemble.
      weights: the weights of each network.
      structures: digests of modules that are given, see `models.structure`.
      name: of a teacher that is no network of ours.
      fed: what such a teacher's images are normalised by, `mean` and `std`.
    """
    teacher = {
        "model": config.teacher.model,
        "ensemble": config.teacher.ensemble if len(networks) > 1 else None,
        "precision": config.precision,
        "matmul_precision": config.matmul_precision,
        **{name: [getattr(network, name) for network in networks] for name in ("mean", "std", "image_size")},
        "weights": [checksum(variables) for variables in weights],
        **{key: value for key, value in (("name", name), ("fed", fed)) if value is not None},
        **({"structure": " ".join(structures)} if structures else {}),
    }
    data = {name: value for name, value in config.data.items() if name not in _NOT_KEY}
    data |= {"records": len(records), "images": checksum_of_images(records), "listing": listing}
    key = {"format": 1, "dtype": config.logits.dtype, "classes": classes, "augment_seed": augment_seed}
    key["top_k"] = config.logits.top_k
    if label_shape:
        key["label_shape"] = label_shape
    return json.loads(json.dumps(key | {"data": data, "teacher": teacher}))  # tuples become lists, as when read back


def checksum(tree: Any) -> str:
    """Returns a checksum over the paths, dtypes, shapes and bits of a tree's arrays.

    Example:
      >>> checksum({"w": np.zeros(3)}) == checksum({"w": np.zeros(4)})
      False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def checksum_of_images(records: Any) -> str:
    """Returns a checksum over evenly spaced images, as stored; it differs for another folder, order or selection."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(records) - 1, _SAMPLES).astype(int)).tolist():
        image = records.__getitems__([index])[0]["image"]
        if isinstance(image, Exception):  # one that could not be read
            image = str(image).encode()
        digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class LogitStore:
    """Logits of one teacher on one training set, indexed by augmentation epoch.

    Concurrent writers are safe: they all write the same content for an epoch, an epoch counts only once it is
    complete, and the first key written stays.

    Attributes:
      directory: a local path, or a remote one such as `gs://...`.
      key: from `make_key`.

    Example:
      >>> import tempfile
      >>> key = {"dtype": "float16", "classes": 2, "data": {"records": 3}}
      >>> store = LogitStore(tempfile.mkdtemp(), key)
      >>> store.create(teacher_top1=50.0, evaluated={"split": "test"})
      >>> store.write(7, np.ones((3, 2), np.float16))
      >>> 7 in store, 8 in store, store.read(7).sum()
      (True, False, np.float16(6.0))
    """

    directory: str
    key: Key

    @property
    def top_k(self) -> int | None:
        """The number of largest logits that are kept of each example; None for all."""
        return self.key.get("top_k")

    @property
    def dtype(self) -> np.dtype:
        return ts.dtype(self.key["dtype"]).numpy_dtype

    def empty(self) -> Logits:
        """Returns zeros in the form in which an epoch is stored."""
        classes, rows = self.key["classes"], (self.key["data"]["records"], *self.key.get("label_shape", ()))
        if self.top_k is None:
            return np.zeros((*rows, classes), self.dtype)
        return TopLogits(
            np.zeros((*rows, self.top_k), self.dtype),
            np.zeros((*rows, self.top_k), class_dtype(classes)),
            np.zeros(rows, np.float32),
            classes,
        )

    @property
    def bytes_per_epoch(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self.empty()))

    def describe(self, epochs: int) -> str:
        """Returns the size of `epochs` epochs as readable text."""
        examples, classes, size = self.key["data"]["records"], self.key["classes"], self.bytes_per_epoch
        shape = self.key.get("label_shape", ())
        labels = f"{math.prod(shape):,} labels x " if shape else ""
        each = f"{labels}{classes:,} classes x {self.dtype.itemsize} bytes"
        if self.top_k is not None:
            each = f"{size // examples:,} bytes (the {self.top_k:,} largest of {classes:,} classes)"
        return f"{human_bytes(size * epochs)}: {epochs:,} epoch{'s' * (epochs > 1)} x {examples:,} images x {each}"

    def teacher_top1(self, evaluated: dict[str, Any]) -> float | None:
        """Returns the teacher's top-1 in percent if it was measured on these data, else None.

        Args:
          evaluated: a description of the data, JSON.

        Raises:
          UserError: if the store has another key; the message names each part that differs.
        """
        found = self._note()
        return found[0] if found is not None and found[1] == evaluated else None

    def check_key(self) -> None:
        """Raises a UserError if there is a store of another key; the message names each part that differs."""
        self._note()

    def _note(self) -> tuple[float, Any] | None:
        """Checks the key in `key.json`; returns the teacher's top-1 and what it is of, or None if there is no store."""
        with _reachable(self.directory):
            content = self._files.read("key.json").result()
        if content.state == "missing":
            check_new(self.directory)
            return None
        try:
            note = json.loads(content.value)
            top1, evaluated = float(note["teacher_top1"]), note["evaluated"]
            theirs, ours = flat(note["key"]), flat(self.key)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{self.directory}/key.json is not the key.json of a logit store. Set another logits.dir."
            ) from None
        if differing := differences(theirs, ours):
            shown = ", ".join(differing.values())
            raise UserError(f"the logit store {self.directory} holds other logits: {shown}. Set another logits.dir.")
        return top1, evaluated

    def create(self, *, teacher_top1: float, evaluated: dict[str, Any]) -> None:
        """Writes the key unless one exists; raises a UserError if the existing key differs. See `teacher_top1`."""
        note = {"teacher_top1": teacher_top1, "evaluated": evaluated, "key": self.key}
        with _reachable(self.directory), full_disk_named(self.directory, _FULL):
            there = self._files.read("key.json").result()
            if self._note() is None:
                text = json.dumps(note, indent=2) + "\n"
                self._files.write("key.json", text.encode(), if_equal=there.stamp.generation).result()
        self._note()

    def check_space(self, epochs: int) -> None:
        """Raises a UserError if `epochs` more epochs cannot be written or do not fit; remote stores are not checked."""
        needed = self.bytes_per_epoch * epochs
        if not is_local(self.directory) or not epochs:
            return
        check_writable(self.directory, "logits.dir")
        if needed > (free := free_bytes(self.directory)):
            raise UserError(
                f"the logit store {self.directory} needs {human_bytes(needed)} more, and {human_bytes(free)} are free "
                "there. Set logits.dir on a larger disk, or logits.views for fewer augmentations."
            )

    def __contains__(self, epoch: int) -> bool:
        with _reachable(self.directory):
            return self._files.read(f"{epoch:05}/whole").result().state == "value"

    def read(self, epoch: int) -> Logits:
        """Returns the logits of a stored epoch.

        Raises:
          UserError: if the stored data is damaged or cannot be read.
        """
        form = self.empty()
        try:
            with _reachable(self.directory):
                opened = [ts.open(spec, open=True).result() for spec, _ in self._arrays(epoch, form)]
                read = [array.read().result() for array in opened]
        except UserError:
            raise
        except ValueError as error:
            raise self._damaged(epoch, str(error)) from error
        for array in read:
            whole = array < self.key["classes"] if array.dtype.kind == "u" else np.isfinite(array)
            if not whole.all():
                raise self._damaged(epoch, "a part of it is missing")
        return jax.tree.unflatten(jax.tree.structure(form), read)

    def write(self, epoch: int, logits: Logits) -> None:
        """Writes the logits of an epoch, in the form of `empty`, and then marks it as stored.

        Raises:
          OSError: if the disk is full; the epochs before it stay intact.
        """
        with _reachable(self.directory), full_disk_named(self.directory, _FULL):
            for spec, array in self._arrays(epoch, logits):
                spec["metadata"] |= _layout(array)
                ts.open(spec, open=True, create=True).result().write(array).result()
            self._files.write(f"{epoch:05}/whole", b"").result()

    @property
    def _files(self) -> Any:
        return _files(self.directory)

    def _arrays(self, epoch: int, logits: Logits) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yields the zarr arrays of an epoch, each with what it holds."""
        for path, array in jax.tree_util.tree_leaves_with_path(logits):
            place = "/".join([f"{epoch:05}", *(part.name for part in path), ""])
            metadata = {"shape": list(array.shape), "data_type": ts.dtype(array.dtype).name}
            yield {"driver": "zarr3", "kvstore": _place(self.directory, place), "metadata": metadata}, array

    def _damaged(self, epoch: int, how: str) -> UserError:
        place = f"{self.directory.rstrip('/')}/{epoch:05}"
        return UserError(f"{place} is damaged: {how}. Delete this folder: the next run writes it again.")


@contextlib.contextmanager
def _reachable(directory: str) -> Iterator[None]:
    """Raises a UserError for an error that is due to the machine or to permissions, not to the store's content."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError) or not is_of_machine(error):
            raise
        why = reason(error).partition(" [")[0]  # tensorstore's notes on the source and the spec
        raise UserError(
            f"the logit store {directory} cannot be used: {why}. This is no sign of damage: check its permissions and "
            "the machine, or set another logits.dir."
        ) from None


def check_new(directory: str) -> None:
    """Raises a UserError if a folder without a key cannot become a store.

    It may not be written to, or have epochs already, and nothing says what those are of.
    """
    check_writable(directory, "logits.dir")
    files = _files(directory)
    epochs = files.list(ts.KvStore.KeyRange("0", ":")).result()  # ":" follows the digits
    # In the meantime another run may have begun the store.
    if any(name.endswith(b"/whole") for name in epochs) and files.read("key.json").result().state == "missing":
        raise UserError(
            f"{directory} has stored epochs and no key.json, which says what they are of. Restore it, or set another "
            "logits.dir."
        )


def _files(directory: str) -> Any:
    return ts.KvStore.open(_place(directory, "")).result()


def _place(directory: str, folder: str) -> dict[str, str] | str:
    if not is_local(directory):
        return f"{directory.rstrip('/')}/{folder}"
    return {"driver": "file", "path": f"{pathlib.Path(directory).resolve()}/{folder}"}


def _layout(array: np.ndarray) -> dict[str, Any]:
    """Returns how an array is split into files: evenly, because zarr pads the last one to the size of the others."""
    examples, *row = array.shape
    rows = -(-examples // -(-array.nbytes // _CHUNK_BYTES))
    return {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *row]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        # Makes a missing file visible.
        "fill_value": int(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else "NaN",
    }
