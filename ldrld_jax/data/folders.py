"""Files of images: a folder per class, the layout of the Tiny-ImageNet-200 zip, or a list of files with labels."""

import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldrld_jax.data.decode import BrokenImageError
from ldrld_jax.data.source import check_count_from_0
from ldrld_jax.errors import UserError, listed, unknown
from ldrld_jax.files import is_local

logger = logging.getLogger("ldrld_jax")

_MOST_NAMED = 5  # classes
_MOST_DIGITS = 100  # of a label; int() refuses some thousand
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"),
    ".webp",
)


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Image files and their labels `[n]` int32."""

    paths: Sequence[str]  # strings, because a million path objects take half a gigabyte
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [{"image": _read(self.paths[i]), "label": int(self.targets[i])} for i in indices]

    def name(self, index: int) -> str:
        return self.paths[index]

    def labels(self) -> np.ndarray:
        return self.targets

    def listing(self) -> Iterator[str]:
        """Yields each file's path below their common folder with its label and, if it is local, its size in bytes.

        A file that is missing has no size, so that the list is another one as soon as it is there.
        """
        root = os.path.commonprefix([min(self.paths), max(self.paths)])  # noqa: RUF071  # any prefix will do
        for path, label in zip(self.paths, self.targets.tolist(), strict=True):
            yield f"{path.removeprefix(root)} {label} {_size(path)}"


def _size(path: str) -> int | str:
    """Returns the size of a local file, and nothing of one that is remote or missing."""
    try:
        return os.stat(path).st_size if "://" not in path else ""  # noqa: PTH116  # a million Paths take seconds
    except OSError:  # its reader says so
        return ""


def _read(path: str) -> bytes | BrokenImageError:
    """Returns the content of a file, or why it cannot be read."""
    try:
        if "://" in path:
            return epath.Path(path).read_bytes()
        # A Path takes twice the time of `open`, under the interpreter lock.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()
    except OSError as error:  # the reader of the record raises or skips it
        return BrokenImageError(f"it cannot be read ({error.strerror or error})")


def open_folder(
    name: str, split: str, data_dir: str | None, *, train_split: str = "train", on_error: str = "raise"
) -> tuple[FolderRecords, tuple[str, ...], tuple]:
    """Returns the images of a split, the class names, both sorted by folder name, and the images' shape.

    Args:
      name: a key of `FOLDERS`.
      split: of an image folder, the name of a folder in `data_dir`; of Tiny-ImageNet, "train" or "val".
      data_dir: the folder that holds both splits.
      train_split: the split whose folders are the classes of an image folder. If there is no such folder, and those
        in `data_dir` hold images, they are the classes.
      on_error: a class without images stops the run ("raise") or is logged once ("skip").

    Raises:
      UserError: if the folder does not exist or has another layout.
    """
    if data_dir is None:
        raise UserError(f"{name} needs a folder. Set data.data_dir to the one that holds train and val.")
    files, class_names = FOLDERS[name](epath.Path(data_dir), split, train_split)
    if len(class_names) < 2:
        raise UserError(
            f"{data_dir} has {len(class_names)} classes, and there is nothing to tell apart. Check its layout."
        )
    empty = sorted(set(range(len(class_names))) - {label for _, label in files}) if split == train_split else []
    if not files:
        raise UserError(f"there is no image in {data_dir}/{split}. Supported are {', '.join(SUFFIXES)}.")
    if empty:
        named = listed([class_names[i] for i in empty], _MOST_NAMED)
        message = f"there is no image of {named} in {data_dir}/{split}"
        if on_error == "raise":
            is_list = name == "file_list"
            mend = "Labels that are numbers count from 0: renumber them" if is_list else "Remove the folders"
            raise UserError(f"{message}. {mend}, or set data.on_error=skip.")
        logger.warning("%s: training sees no image of these classes", message)
    paths, labels = zip(*files, strict=True)
    side = 64 if name == "tiny_imagenet" else None
    return FolderRecords(paths, np.array(labels, np.int32)), class_names, (side, side, 3)


def _image_folder(root: epath.Path, split: str, train_split: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    train, folder = root / train_split, root / split
    if not train.is_dir() and _holds_classes(root):
        if split != train_split:
            raise UserError(
                f"{root} holds the classes themselves, and no folder {split} to evaluate on. Set data.held_out=.1 to "
                "evaluate on a tenth of the images that is kept out of training."
            )
        train = folder = root
    for place in (train, folder):
        if not place.is_dir():
            held = ", ".join(_folders(root)[:10]) if root.is_dir() else ""
            layout = " and ".join(dict.fromkeys(f"{part}/CLASS/*.jpg" for part in (train, folder)))
            raise UserError(
                f"there is no folder {place}. Lay images out as {layout}, or set data.data_dir, and data.train_split "
                f"and data.eval_split to folders that are in it: {held or 'none'}."
            )
    class_names = _folders(train)
    strangers = sorted(set(_folders(folder)) - set(class_names))
    if strangers:
        raise unknown("class of the training images", strangers[0], class_names)
    return list(_by_class(folder, class_names)), class_names


def _holds_classes(root: epath.Path) -> bool:
    """Returns whether a folder in `root` has an image in it, and not only further folders."""
    within = (root / name for name in _folders(root)) if root.is_dir() else ()
    return any(path.suffix.lower() in SUFFIXES for folder in within for path in _entries(folder))


def _tiny_imagenet(root: epath.Path, split: str, _: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    if split not in ("train", "val"):
        raise unknown("split of tiny_imagenet", split, ("train", "val"))
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (root / "wnids.txt").exists():
        raise UserError(
            f"there is no Tiny-ImageNet in {root} (no wnids.txt). Get it: curl -LO "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip -q tiny-imagenet-200.zip, then set "
            "data.data_dir=tiny-imagenet-200."
        )
    # Sorted, as generic folder readers number classes, and so as existing checkpoints do.
    wnids = sorted(_name(wnid, root / "wnids.txt") for line in _lines(root / "wnids.txt") for wnid in line.split())
    words = dict(_pairs(root / "words.txt", "the words of a class"))
    class_names = tuple(words.get(wnid, wnid) for wnid in wnids)
    annotations = root / "val" / "val_annotations.txt"
    sorted_by_class = not annotations.exists() or any((root / split / wnid).is_dir() for wnid in wnids)
    if split == "train" or sorted_by_class:  # which some tools do with val
        return list(_by_class(root / split, wnids)), class_names
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    files = []
    for file, rest in _pairs(annotations, "the class of an image"):
        wnid = rest.split()[0]
        _name(file, annotations)
        if wnid not in label_of:
            raise UserError(f"{annotations} gives {file} the class {wnid}, which is not in wnids.txt.")
        files.append((str(root / "val" / "images" / file), label_of[wnid]))
    return sorted(files), class_names


def _file_list(root: epath.Path, split: str, train_split: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Reads `root/SPLIT.csv` or `root/SPLIT.jsonl`; the classes are those of the training list, sorted."""
    lists = {name: _read_list(root, name) for name in (train_split, split)}
    labels = {label for _, label in lists[train_split]}
    if not labels:
        raise UserError(f"the list {train_split} of {root} lists no image. Write one line per image below its header.")
    # Numbers are labels from 0; "007" is a name, as it is of a folder.
    numbers = all(map(_is_whole, labels))
    what, instead = f"the list {train_split} of {root}", ", or make them names, such as id7"
    if numbers:
        if (digits := max(map(len, labels))) > _MOST_DIGITS:
            raise UserError(
                f"{what} has a label of {digits:,} digits, and numbers count from 0. Renumber them{instead}."
            )
        check_count_from_0(max(map(int, labels)), len(labels), what, instead=instead)
    elif odd := _odd_number(labels):
        path = next(path for path, label in lists[train_split] if label == odd)
        raise UserError(
            f"{what} gives {path} the label {odd[:_MOST_DIGITS]!r} among whole numbers, which count from 0 as 0, 1, 2. "
            f"Renumber the labels{instead}."
        )
    class_names = tuple(map(str, range(1 + max(map(int, labels))))) if numbers else tuple(sorted(labels))
    label_of = {name: label for label, name in enumerate(class_names)}
    for path, label in lists[split]:
        if label not in label_of:
            raise UserError(f"{split} gives {path} the class {label!r}, which no training image has.")
    return [(path, label_of[label]) for path, label in lists[split]], class_names


def _is_whole(label: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", label) is not None


def _odd_number(labels: Iterable[str]) -> str | None:
    """Returns a label by which whole numbers would become names, in the order of text; None if there is none.

    All labels are names if one of them is not a number, or if they are identifiers padded to one width, such as 007 and
    100.

    Example:
      >>> _odd_number(["0", "1", "-1"]), _odd_number(["9", "010"]), _odd_number(["007", "100"])
      ('-1', '010', None)
    """
    whole, others = [[label for label in sorted(labels) if _is_whole(label) == kind] for kind in (True, False)]
    if not whole or not all(map(_is_number, others)):
        return None
    shortest = min(map(len, whole))
    padded = (re.fullmatch("0[0-9]+", label) is not None and len(label) <= shortest for label in others)
    return next((label for label, is_padded in zip(others, padded, strict=True) if not is_padded), None)


def _is_number(label: str) -> bool:
    try:
        return "_" not in label and float(label) is not None  # Python reads 1_0 as 10
    except ValueError:
        return False


def _read_list(root: epath.Path, split: str) -> list[tuple[str, str]]:
    """Reads the paths and the classes of a list; paths are relative to its folder."""
    found = [root / f"{split}{suffix}" for suffix in (".csv", ".jsonl") if (root / f"{split}{suffix}").exists()]
    if not found:
        raise UserError(
            f"there is no {root / split}.csv or .jsonl. Write one line per image: `path,label` below a header with "
            'these names, or {"path": ..., "label": ...}.'
        )
    try:
        rows = _csv_rows(found[0]) if found[0].suffix == ".csv" else [json.loads(line) for line in _lines(found[0])]
        for number, row in enumerate(rows, 1):
            if any(row[key] is None or not str(row[key]).strip() for key in ("path", "label")):
                raise ValueError(f"in image {number}, which has no path or no label")
            if not isinstance(row["path"], str):
                raise ValueError(f"in image {number}, whose path {row['path']!r} is not text")
            if None in row:
                raise ValueError(f"in image {number}, which has more fields than the header: quote a path with a comma")
            if not isinstance(row["label"], str | int) or isinstance(row["label"], bool) or _is_fraction(row["label"]):
                raise ValueError(
                    f"in image {number}, whose label {row['label']!r} is neither a name nor a whole number: write 1 "
                    "for 1.0, or a name such as id1"
                )
            if "\n" in str(row["label"]).strip():
                raise ValueError(f"in image {number}, whose label has several lines: close its quotation mark")
            if any(not _can_name_a_file(str(row[key])) for key in ("path", "label")):
                raise ValueError(f"in image {number}, whose path or label has characters that no file's name can have")
        return [(str(root / row["path"].strip()), str(row["label"]).strip()) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{found[0]} is not a valid list of images: {type(error).__name__} {error}. Each line needs `path` and "
            "`label`."
        ) from error


def _csv_rows(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the rows of a CSV file that are not blank; a quoted field may have several lines."""
    reader = csv.DictReader(io.StringIO(_text(path).lstrip(), newline=""), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    return [row for row in reader if None not in row.values() or any(map(str.strip, filter(None, row.values())))]


def _can_name_a_file(text: str) -> bool:
    """Returns whether a file's name may have all characters of a text: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_fraction(label: str | int) -> bool:
    """Returns whether a label is a number as floating-point columns have it, such as 3.0, which would sort as text."""
    return isinstance(label, str) and re.fullmatch(r"\s*-?\d+\.\d*([eE][-+]?\d+)?\s*", label) is not None


FOLDERS: dict[str, Callable[[epath.Path, str, str], tuple[list[tuple[str, int]], tuple[str, ...]]]] = {
    "file_list": _file_list,
    "image_folder": _image_folder,
    "tiny_imagenet": _tiny_imagenet,
}


def _text(path: epath.Path) -> str:
    """Returns the text of a file; what is no UTF-8 is Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # Excel writes a mark of the byte order first
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _lines(path: epath.Path) -> list[str]:
    """Returns the lines of a text file that are not blank."""
    return [line for line in map(str.strip, _text(path).split("\n")) if line]


def _pairs(path: epath.Path, second: str) -> Iterator[tuple[str, str]]:
    """Yields the first word of each line of a text file, and the others, which name what `second` says."""
    for line in _lines(path):
        first, *others = line.split(None, 1)
        if not others:
            raise UserError(f"{path} is torn: its line {line!r} lacks {second}. Get the dataset again.")
        yield first, others[0]


def _name(text: str, place: epath.Path) -> str:
    if "/" in text or text.startswith("."):
        raise UserError(f"{place} names {text!r}, which leads out of the dataset. Get the dataset again.")
    return text


def _folders(folder: epath.Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in _entries(folder) if p.is_dir() and not p.name.startswith(".")))


def _entries(folder: epath.Path) -> Iterable[epath.Path]:
    """Returns all that is in a folder; epath leaves out names that end in ~."""
    return (folder / path.name for path in pathlib.Path(folder).iterdir()) if is_local(folder) else folder.iterdir()


def _by_class(folder: epath.Path, class_names: Sequence[str]) -> Iterator[tuple[str, int]]:
    others: list[epath.Path] = []
    for label, name in enumerate(class_names):
        if (folder / name).is_dir():
            yield from ((path, label) for path in images_below(folder / name, others))
    if others:
        logger.warning(
            "%d files in %s are left out, %s for example: images end in %s",
            len(others), folder, others[0], ", ".join(SUFFIXES),
        )  # fmt: skip


def images_below(folder: epath.Path, others: list[epath.Path], above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the images below a folder, each once, and adds other files to `others`.

    A link to a folder above it is not followed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    above |= {real, *map(str, pathlib.PurePath(real).parents)}
    for path in sorted(_entries(folder)):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            yield str(path)
        elif path.is_dir():
            yield from images_below(path, others, above)
        else:
            others.append(path)
