"""Writes decoded images to disk, from where `data.name=decoded` reads them; see `decoded` for the files."""

import contextlib
import dataclasses
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.data import decoded
from ldrld_jax.data.ahead import ahead
from ldrld_jax.data.decode import BrokenImageError, Encoded, open_image, pixels
from ldrld_jax.data.pipeline import made_by, opened
from ldrld_jax.data.source import Source, fingerprint, spaced
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.views import BILINEAR, scaled_size
from ldrld_jax.data.workers import Batch
from ldrld_jax.errors import UserError
from ldrld_jax.files import (
    appending,
    expand_home,
    free_bytes,
    full_disk_named,
    human_bytes,
    is_local,
    locked,
    replace_text,
)

SHORT_SIDE = 256
_SPAN = 64  # images that are decoded and written together


class Decoding:
    """The decoded images of a config's splits, on their way to a folder.

    Args:
      data: the `data` block of a config.
      folder: a local folder; each split becomes a folder in it.
      short_side: length to which the shorter side of a larger image is resized, as for evaluation; None for
        `data.resize_size`, or 256.
      quality: of JPEGs, 1 to 100; None for raw pixels.

    Raises:
      UserError: if the data are no images with one label each, the folder holds anything else, or they do not fit on
        its disk.
    """

    def __init__(self, data: ConfigDict, folder: str, *, short_side: int | None = None, quality: int | None = None):
        self._data, self._folder = data, epath.Path(expand_home(folder))
        if quality is not None and not 1 <= quality <= 100:
            raise UserError(f"--quality must be between 1 and 100, got {quality}.")
        if not is_local(self._folder):
            raise UserError(f"decoded images are read by memory map, from a local disk, got {folder}. Choose a folder.")
        splits = [data.train_split] if data.held_out else dict.fromkeys([data.train_split, data.eval_split])
        side = short_side or data.resize_size or SHORT_SIDE
        self._splits = [_Split(data, split, self._folder / split, side, quality) for split in splits]
        self._needed, self._free = sum(split.needed for split in self._splits), free_bytes(self._folder)
        if self._needed > self._free:
            raise UserError(
                f"the decoded images take about {human_bytes(self._needed)}, and {human_bytes(self._free)} are free in "
                f"{folder}. Choose another folder, a smaller --short_side, or JPEGs: --quality 95."
            )

    @property
    def total(self) -> int:
        """The number of images."""
        return sum(len(split.maker.source) for split in self._splits)

    @property
    def done(self) -> int:
        """The number of images that are written already."""
        return sum(split.done for split in self._splits)

    def describe(self) -> str:
        """Returns a line with the number of images and the bytes that they need."""
        left = f"{self.total:,} images" + (f", {self.done:,} of them already there" if self.done else "")
        return f"{self._folder}: {left}; about {human_bytes(self._needed)} to write, {human_bytes(self._free)} are free"

    def write(self) -> Iterator[int]:
        """Writes what is missing, and yields the number of images that are written so far.

        A process that is killed leaves an unfinished folder, which is not read, and which the next call continues.

        Raises:
          UserError: if an image is broken and `data.on_error` is "raise".
          OSError: if the disk is full.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder, other="folder"):
            for split in self._splits:
                for _ in split.write(**made_by(self._data)):
                    yield self.done


class _Split:
    """The decoded images of a split.

    Attributes:
      maker: decodes them.
      done: the number of images that are written.
      needed: about the number of bytes of the others.
    """

    def __init__(self, data: ConfigDict, name: str, folder: epath.Path, short_side: int, quality: int | None):
        source = opened(data, name, open_source)
        if source.raw or source.label_shape or source.image_shape[-1] not in (1, 3):
            raise UserError(
                f"data.name={data.name} cannot be decoded: only images of 1 or 3 channels with one label each can. "
                "Choose other data."
            )
        if source.changes:
            raise UserError(
                f"data.name={data.name} cannot be decoded: its images differ each time they are read, and one draw "
                "would be kept. Give images without random transforms."
            )
        self.maker, self._folder = _Maker(source, short_side, quality, data.exif), folder
        self._made_by = dict(
            format=decoded.FORMAT,
            name=data.name,
            split=name,
            **fingerprint(source),
            short_side=short_side,
            quality=quality,
            exif=data.exif,
            channels=source.image_shape[-1],
            class_names=list(source.class_names),
        )
        self.done, _, _ = self._written()
        sample = spaced(len(source), _SPAN).tolist()
        left = len(source) - self.done
        self.needed = int(self.maker.batch(sample)["images"].size * left / len(sample)) if left else 0

    def _written(self) -> tuple[int, int, bool]:
        """Returns the number and the bytes of the images that are written, and whether the folder is finished."""
        folder = self._folder
        if not (folder / decoded.MANIFEST).exists():
            if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(f"{folder} holds other files. Choose another folder for --decoded.")
            return 0, 0, False
        manifest = decoded.read_manifest(folder)
        if differing := [key for key in decoded.MADE_BY if manifest[key] != self._made_by[key]]:
            shown = ", ".join(_difference(key, manifest[key], self._made_by[key]) for key in differing)
            raise UserError(f"{folder} holds other decoded images: {shown}. Choose another folder, or delete this one.")
        finished = manifest["index"] is not None
        if finished:
            decoded.open_decoded(manifest["split"], str(folder.parent))  # raises an error if they are damaged
        ends = np.cumsum(decoded.read_index(folder)[0][:, decoded.BYTES])
        # An image is flushed to the disk before its row is written, which some disks do not keep to.
        images = folder / decoded.IMAGES
        whole = int(np.searchsorted(ends, images.stat().length, side="right")) if images.exists() else 0
        return whole, int(ends[whole - 1]) if whole else 0, finished

    def write(self, *, threads: int | None, workers: int | None) -> Iterator[None]:
        """Writes the missing images, and yields after each span of them."""
        folder, source = self._folder, self.maker.source
        self.done, size, finished = self._written()
        if finished:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(full_disk_named(folder, "no space left; the images written stay, and the same command goes on"))
            self._write_manifest(None)  # first: by it the next call knows the folder
            images, index = (enter(appending(folder / name, "ab")) for name in (decoded.IMAGES, decoded.INDEX))
            images.truncate(size)
            index.truncate(self.done * decoded.ROW_BYTES)
            spans = range(self.done, len(source), _SPAN)
            one = lambda index: self.maker.batch([index])  # noqa: E731
            for batch in ahead(self.maker, spans, source, self.maker.batch_bytes, threads, workers, one):
                for file, array in ((images, batch["images"]), (index, batch["rows"])):
                    file.write(array)
                    file.flush()
                    os.fsync(file.fileno())
                self.done += len(batch["rows"])
                yield
            self._write_manifest(decoded.read_index(folder)[1])

    def _write_manifest(self, digest: str | None) -> None:
        replace_text(self._folder / decoded.MANIFEST, json.dumps({**self._made_by, "index": digest}, indent=2) + "\n")


def _difference(key: str, there: Any, here: Any) -> str:
    """Returns a key with its two values, if they are short enough for a line."""
    shown = f"{key} ({there!r} there, {here!r} here)"
    return shown if len(shown) <= 100 else key


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Decoder of a source's images; called with an index, it decodes `_SPAN` of them from there on."""

    source: Source
    short_side: int
    quality: int | None
    exif: bool

    @property
    def batch_bytes(self) -> int:
        """The bytes of a batch of images that are twice as wide as high; few are larger."""
        return _SPAN * 2 * self.short_side**2 * self.source.image_shape[-1]

    def __call__(self, start: int) -> Batch:
        return self.batch(range(start, min(start + _SPAN, len(self.source))))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns `images` `[bytes]` uint8, one after the other, and their `rows` `[n, 5]` int64."""
        images, rows = [], []
        for index, record in zip(indices, self.source.records.__getitems__(list(indices)), strict=True):
            width, height, data = 0, 0, b""
            try:
                (width, height), data = self._small(record["image"])
            except BrokenImageError as error:
                self.source.report(index, error)
            rows.append((len(data), height, width, int(record["label"]), zlib.crc32(data)))
            images.append(data)
        return {"images": np.frombuffer(b"".join(images), np.uint8), "rows": np.array(rows, "<i8")}

    def _small(self, data: Encoded) -> tuple[tuple[int, int], bytes]:
        image = pixels(open_image(data), channels=self.source.image_shape[-1], exif=self.exif)
        if min(image.size) > self.short_side:
            image = image.resize(scaled_size(*image.size, shorter=self.short_side), BILINEAR)
        if self.quality is None:
            return image.size, image.tobytes()
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return image.size, file.getvalue()
