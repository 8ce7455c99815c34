"""Decoded images on disk, as `--mode decode` writes them: the data source `data.name=decoded`.

`DIR/SPLIT` is a folder of three files. `images.bin` holds the images one after the other: their pixels
`[height, width, channels]` uint8, or JPEGs. `index.bin` holds an int64 row for each image, see `COLUMNS`, with its
checksum (CRC-32). `manifest.json` says where the images are from and how they were made. The digest of the index is
written to it last, so that a manifest without one belongs to an unfinished folder.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldrld_jax.errors import UserError
from ldrld_jax.files import is_local, read_json

NAME = "decoded"
FORMAT = 1
IMAGES, INDEX, MANIFEST = "images.bin", "index.bin", "manifest.json"
COLUMNS = ("bytes", "height", "width", "label", "checksum")  # of an image that does not decode: 0 bytes
BYTES, HEIGHT, WIDTH, LABEL, _ = range(len(COLUMNS))
ROW_BYTES = 8 * len(COLUMNS)

# What a manifest holds, beside the digest of the index: two folders that agree in it hold the same images.
MADE_BY = ("format", "name", "split", "images", "digest", "short_side", "quality", "exif", "channels", "class_names")


@dataclasses.dataclass(frozen=True)
class DecodedRecords:
    """Decoded images of a split.

    Attributes:
      folder: the folder of the split.
      rows: `[n, 5]` int64, the index.
      channels: of an image, 1 or 3; None for JPEGs.
      images: the mapped file of all images `[bytes]` uint8.
      digest: of the index.
      original: the digest of the first source that they are copies of.
    """

    folder: str
    rows: np.ndarray
    channels: int | None
    images: np.ndarray
    digest: str
    original: str
    exif: bool = True

    def __post_init__(self) -> None:
        # Each process compares an image with its checksum at the first read: that reads it from the disk, too, and
        # holds no interpreter lock meanwhile.
        object.__setattr__(self, "_known", np.zeros(len(self), bool))
        object.__setattr__(self, "_ends", np.cumsum(self.rows[:, BYTES]))

    _known: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    _ends: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        images = self.images.view(np.ndarray)  # slicing a memmap takes far longer
        return [self._record(images, index) for index in indices]

    def _record(self, images: np.ndarray, index: int) -> dict[str, Any]:
        size, height, width, label, checksum = self.rows[index].tolist()
        end = int(self._ends[index])
        data = images[end - size : end]
        if not self._known[index]:
            if zlib.crc32(data.data) != checksum:
                raise _damaged(self.folder, f"image {index} has changed")
            self._known[index] = True
        if self.channels is None or not size:
            return {"image": data.tobytes(), "label": label}
        return {"image": data.reshape(height, width, self.channels), "label": label}

    def name(self, index: int) -> str:
        return f"image {index} of {self.folder}"

    def labels(self) -> np.ndarray:
        return self.rows[:, LABEL].astype(np.int32)

    def listing(self) -> Iterator[str]:
        """Yields the digest of the index, which has the size, label and checksum of each image."""
        yield self.digest


def open_decoded(split: str, data_dir: str | None) -> tuple[DecodedRecords, tuple[str, ...], tuple[Any, ...]]:
    """Returns the decoded images of a split, the class names, and the images' shape, with None where it varies.

    Args:
      split: the split that they were written from.
      data_dir: the folder given to `--mode decode`.

    Raises:
      UserError: if the folder is missing, unfinished, damaged or of another format.
    """
    how = "Write one: ldrld-jax decode --config CONFIG --decoded DIR, and set data.data_dir=DIR."
    if data_dir is None or not is_local(epath.Path(data_dir)):
        raise UserError(f"data.name={NAME} needs a local folder of decoded images, got {data_dir}. {how}")
    folder = epath.Path(data_dir) / split
    if not (folder / MANIFEST).exists():
        splits = epath.Path(data_dir).iterdir() if epath.Path(data_dir).is_dir() else ()
        there = ", ".join(sorted(path.name for path in splits if (path / MANIFEST).exists()))
        raise UserError(f"{data_dir} has no decoded images of the split {split}; it has {there or 'none'}. {how}")
    manifest = read_manifest(folder)
    try:
        rows, digest = read_index(folder)
        if finished := manifest["index"] is not None:
            images = np.memmap(str(folder / IMAGES), np.uint8, "r")
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from None
    if not finished:
        raise UserError(
            f"{folder} is unfinished: {len(rows):,} of {manifest['images']:,} images. Repeat the command that wrote "
            "them: it continues."
        )
    if digest != manifest["index"] or len(rows) != manifest["images"]:
        raise _damaged(folder, f"{INDEX} is not as it was written")
    if (total := int(rows[:, BYTES].sum())) != len(images):
        raise _damaged(folder, f"{IMAGES} has {len(images):,} bytes, and {total:,} were written")
    channels = None if manifest["quality"] is not None else manifest["channels"]
    whole = rows[rows[:, BYTES] > 0]
    if channels is not None and (whole[:, BYTES] != whole[:, HEIGHT] * whole[:, WIDTH] * channels).any():
        raise _damaged(folder, f"{INDEX} has sizes that do not fit the images")
    size = whole[0, [HEIGHT, WIDTH]]
    shape = size.tolist() if (whole[:, [HEIGHT, WIDTH]] == size).all() else (None, None)
    original = manifest.get("original", manifest["digest"])  # decoded images may be decoded again, to smaller ones
    records = DecodedRecords(str(folder), rows, channels, images, digest, original, manifest["exif"])
    return records, tuple(manifest["class_names"]), (*shape, manifest["channels"])


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a folder.

    Raises:
      UserError: if it is torn, or of another format.
    """
    what = "It describes decoded images"
    manifest = read_json(folder / MANIFEST, what, keys=("format",))
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder} has decoded images of format {manifest['format']}, and this version reads {FORMAT}. Write them "
            "again to another folder."
        )
    return read_json(folder / MANIFEST, what, keys=(*MADE_BY, "index"))


def read_index(folder: epath.Path) -> tuple[np.ndarray, str]:
    """Returns the whole rows of an index, `[n, 5]` int64, and its digest; none if there is no index yet."""
    content = (folder / INDEX).read_bytes() if (folder / INDEX).exists() else b""
    rows = np.frombuffer(content, "<i8", len(content) // ROW_BYTES * len(COLUMNS)).reshape(-1, len(COLUMNS))
    return rows, hashlib.sha256(content).hexdigest()[:32]


def _damaged(folder: epath.PathLike, how: str) -> UserError:
    return UserError(f"the decoded images in {folder} are damaged: {how}. Delete this folder, and write it again.")
