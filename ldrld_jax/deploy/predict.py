"""Predicts the top classes of image files, as lines or as a table in a file: `--mode predict`."""

import contextlib
import csv
import functools
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

import jax
import numpy as np
from etils import epath

from ldrld_jax.data.decode import BrokenImageError
from ldrld_jax.data.folders import SUFFIXES, images_below
from ldrld_jax.data.views import View
from ldrld_jax.deploy.export import Student
from ldrld_jax.deploy.preprocessing import view_of
from ldrld_jax.errors import UserError
from ldrld_jax.files import is_link, is_local, replacing
from ldrld_jax.record.console import answer, say, waiting

_BATCH = 64
_ROWS_IN_A_GROUP = 2**16  # of a Parquet file


class Guess(NamedTuple):
    """A class that an image may be of.

    Attributes:
      label: the index of the class.
      name: from the dataset.
      probability: in 0..1.
    """

    label: int
    name: str
    probability: float


Row = tuple[str, int, int, str, float]
COLUMNS = ("path", "rank", "class_index", "class_name", "probability")
Found = list[Guess] | BrokenImageError | OSError


def find(names: Iterable[str]) -> list[str]:
    """Returns the paths of the images that are named on a command line, in the order of the names.

    Args:
      names: files; patterns such as `*.jpg` or `a/**/*.png`; folders, for the images in and below them, sorted; and
        `-` for the paths on standard input, one a line. Those are taken as they are: a missing one is an unreadable
        image, not an error.

    Raises:
      UserError: if a name stands for no image.
    """
    paths = []
    for name in names:
        path = epath.Path(name)
        if name == "-":
            found, otherwise = _on_standard_input(), "standard input names no image."
        elif path.is_dir():
            found = list(images_below(path, others=[]))
            otherwise = f"there is no image in {name}. Supported are {', '.join(SUFFIXES)}."
        else:
            found, otherwise = [name] if path.exists() else sorted(_matches(path)), f"there is no image {name}."
        if not found:
            raise UserError(otherwise)
        paths += found
    return paths


def _on_standard_input() -> list[str]:
    if sys.stdin is None:
        raise UserError(
            "- reads the paths of images from standard input, which is closed. Pipe them, or name the images."
        )
    text = os.fsdecode(sys.stdin.buffer.read())  # a path need not be UTF-8
    if "\0" in text:
        raise UserError("- reads one path per line, but got NUL characters. Use find -print, not -print0.")
    return [path for path in (line.rstrip("\r") for line in text.split("\n")) if path]


def _matches(pattern: epath.Path) -> Iterator[str]:
    """Yields the files that match a pattern; on a local path, folders may have wildcards too, ** for any depth.

    A folder that exists is itself, even if its name is a pattern.
    """
    if is_local(pattern):
        there = next((place for place in pattern.parents if place.is_dir()), pattern.parent)
        whole = epath.Path(glob.escape(str(there))) / pattern.relative_to(there)
        found = map(epath.Path, glob.glob(str(whole), recursive=True))  # noqa: PTH207  # it takes absolute ones
    else:
        found = pattern.parent.glob(pattern.name)
    yield from (str(path) for path in found if not path.is_dir())


def predict(student: Student, paths: Sequence[str], top: int = 5) -> Iterator[tuple[str, Found]]:
    """Yields each path with its `top` classes, the most likely first; of equal ones the lower class.

    A path that cannot be read, or is no image, comes with the error instead. One program is compiled: every batch is
    padded to the same shape. The next batch is decoded while the device computes.

    Args:
      student: from `export.student_of` or `export.read_student`.
      paths: image files in any format of `decode.FORMATS`, grey or colour; at least one.
      top: number of classes, or all if there are fewer.

    Raises:
      UserError: if the student does not take images, or predicts several labels per input.
    """
    view, rows = view_of(student.preprocessing), min(_BATCH, len(paths))
    if len(labels := student.program.out_avals[0].shape[1:-1]):
        raise UserError(
            f"the student predicts {' x '.join(map(str, labels))} labels per input, and --mode predict takes one. Call "
            "its program, as the README.md of its export shows."
        )
    probabilities = jax.jit(lambda images: jax.nn.softmax(student.program.call(images)))
    pending = None
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), rows):
            batch = paths[start : start + rows]
            images = list(pool.map(functools.partial(_read, view=view), batch))
            padded = np.zeros((rows, *view.shape), np.uint8)
            for row, image in zip(padded, images, strict=False):
                row[...] = 0 if isinstance(image, Exception) else image
            with contextlib.nullcontext() if pending else waiting("compiling the student"):
                dispatched = probabilities(padded)
            if pending:
                yield from _best(student.labels, *pending, top)
            pending = batch, images, dispatched
        if pending:
            yield from _best(student.labels, *pending, top)


def _read(path: str, view: View) -> np.ndarray | BrokenImageError | OSError:
    try:
        return view(epath.Path(path).read_bytes())
    except (BrokenImageError, OSError) as error:
        return error


def _best(
    labels: Sequence[str],
    paths: Sequence[str],
    images: Sequence[np.ndarray | BrokenImageError | OSError],
    probabilities: jax.Array,
    top: int,
) -> Iterator[tuple[str, Found]]:
    for path, image, row in zip(paths, images, np.asarray(probabilities), strict=False):
        if isinstance(image, BrokenImageError | OSError):
            yield path, image
            continue
        best = np.argsort(-row, kind="stable")[:top]
        yield path, [Guess(int(i), labels[i], float(row[i])) for i in best]


def problem(path: str, error: Exception) -> str:
    """Formats the reason why an image has no prediction as one line.

    Example:
      >>> problem("scan.png", BrokenImageError("not an image (5 bytes)"))
      'scan.png is broken or not in a supported image format: not an image (5 bytes)'
      >>> problem("scan.png", FileNotFoundError(2, "No such file or directory"))
      'scan.png cannot be read: No such file or directory'
    """
    if isinstance(error, OSError):
        return f"{path} cannot be read: {error.strerror or error}"
    return f"{path} is broken or not in a supported image format: {error}"


def line(path: str, guesses: Iterable[Guess]) -> str:
    """Formats an image's classes as one line.

    Example:
      >>> line("scan.png", [Guess(7, "seven", 0.91), Guess(1, "one", 0.0512)])
      'scan.png  seven 91.00 %, one 5.12 %'
    """
    return f"{path}  " + ", ".join(f"{guess.name} {100 * guess.probability:.2f} %" for guess in guesses)


@contextlib.contextmanager
def output(file: str | None) -> Iterator[Callable[[str, Iterable[Guess]], None]]:
    """Yields a function that takes an image's path and classes: it prints a line, or adds rows to a file.

    The file is written under another name and gets its own at the end of the block. After an error, what was there
    before is untouched.

    Args:
      file: FILE.csv, FILE.jsonl or FILE.parquet, with a row per image and rank and the columns `COLUMNS`; None prints.

    Raises:
      UserError: if the file has another ending, is a link or lies in no folder, or pyarrow is not installed.
    """
    if file is None:
        yield lambda path, guesses: answer(line(path, guesses))
        return
    target = epath.Path(file)
    if target.suffix not in _WRITERS:
        raise UserError(f"--output must end in one of {', '.join(_WRITERS)}, got {file!r}.")
    if is_link(target):
        raise UserError(f"{file} is a link, and nothing is written through one. Remove it.")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} for --output. Create it.")
    count = 0
    with replacing(target) as opened, _WRITERS[target.suffix](opened) as write:

        def add(path: str, guesses: Iterable[Guess]) -> None:
            nonlocal count
            count += 1
            write([(_text(path), rank, g.label, _text(g.name), g.probability) for rank, g in enumerate(guesses, 1)])

        yield add
    say(f"{file}: {count} images")


def _text(text: str) -> str:
    """Escapes what is no Unicode: a file name may hold any bytes."""
    return text.encode(errors="backslashreplace").decode()


Write = Callable[[list[Row]], object]


@contextlib.contextmanager
def _csv(file: IO[bytes]) -> Iterator[Write]:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    try:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        yield writer.writerows
    finally:
        text.detach()


@contextlib.contextmanager
def _json_lines(file: IO[bytes]) -> Iterator[Write]:
    yield lambda rows: file.writelines(f"{json.dumps(dict(zip(COLUMNS, row, strict=True)))}\n".encode() for row in rows)


@contextlib.contextmanager
def _parquet(file: IO[bytes]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise UserError("a .parquet file takes pyarrow: pip install pyarrow, or write a .csv or .jsonl file.") from None
    types = (pa.string(), pa.int32(), pa.int32(), pa.string(), pa.float32())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    waiting_rows: list[Row] = []

    def flush() -> None:
        columns = list(zip(*waiting_rows, strict=True)) or [()] * len(COLUMNS)
        writer.write_table(pa.table([pa.array(c, t) for c, t in zip(columns, types, strict=True)], schema=schema))
        waiting_rows.clear()

    def write(rows: list[Row]) -> None:
        waiting_rows.extend(rows)
        if len(waiting_rows) >= _ROWS_IN_A_GROUP:
            flush()

    with ParquetWriter(file, schema) as writer:
        yield write
        flush()


_WRITERS = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
