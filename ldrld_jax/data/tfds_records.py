"""Random access to encoded images of TFDS classification datasets, without TensorFlow."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from ldrld_jax.data import decoded, folders
from ldrld_jax.data.digits import Digits
from ldrld_jax.errors import UserError, reason, unknown
from ldrld_jax.files import is_local

# What follows the [ of a slice, in images or percent.
_SLICE = re.compile(r"(?!:\])(-?\d+|-?\d+(\.\d+)?%)?:(-?\d+|-?\d+(\.\d+)?%)?\]")


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """A split of a TFDS dataset.

    Attributes:
      records: of TFDS, by index.
      title: the name in error messages.
      version: of the dataset, and the lengths of its shards.
      split: as TFDS reads it, such as `train[:90%]`.
      shards: the lengths of the shards of each split of the dataset.
    """

    records: Any
    title: str
    version: str = ""
    split: str = ""
    shards: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        try:
            if not isinstance(self.records, ArrayRecordDataSource):
                return self.records.__getitems__(list(indices))
            serialized = self.records.data_source.__getitems__(list(indices))
        except RuntimeError as error:  # from the reader of array_record files
            raise UserError(
                f"the files of {self.title} are damaged ({reason(error)}). Prepare or copy them again."
            ) from None
        return list(map(_parse, serialized))

    def name(self, index: int) -> str:
        record = self.records.__getitems__([index])[0]
        file = record.get("file_name", b"")
        return f"record {index} of {self.title}" + (f" ({file.decode()})" if isinstance(file, bytes) and file else "")

    def listing(self) -> Iterator[str]:
        """Yields the dataset's version with the lengths of its shards, and the split."""
        yield from (self.version, self.title)

    def overlaps(self, split: str) -> bool:
        """Returns whether another split of the dataset has images of this one."""
        try:
            others = ranges_of(split, self.shards)
        except ValueError:  # another version of the dataset may have other splits
            return False
        pairs = itertools.product(ranges_of(self.split, self.shards), others)
        return any(ours[0] == other[0] and max(ours[1], other[1]) < min(ours[2], other[2]) for ours, other in pairs)

    def labels(self) -> np.ndarray:
        """Reads the labels from all records, in blocks, because TFDS stores them with the images."""
        spans = (range(start, min(start + 256, len(self))) for start in range(0, len(self), 256))
        return np.array([record["label"] for span in spans for record in self.__getitems__(span)], np.int32)


def _parse(serialized: bytes) -> dict[str, Any]:
    """Returns the image and the label of a record; TFDS's own parser of any features takes ten times as long."""
    feature = tf_example_pb2.Example.FromString(serialized).features.feature
    return {"image": feature["image"].bytes_list.value[0], "label": feature["label"].int64_list.value[0]}


def open_tfds(name: str, split: str, data_dir: str | None) -> tuple[TfdsRecords, tuple[str, ...], tuple]:
    """Returns the records of a split, the class names, and the images' shape with None where it varies.

    Raises:
      UserError: see `sources.open_source`.
    """
    if data_dir is not None and not is_local(data_dir):
        raise UserError(
            f"the records of TFDS are read from a local disk, got data.data_dir={data_dir}. Copy {name} to a local "
            "folder, or set data.name to image_folder or arrays:FILE.npz."
        )
    builder = make_builder(name, data_dir)
    if name == "digits" and not _has_files(builder, ".array_record"):
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports a download, and there is none
            try:
                builder.download_and_prepare()
            except Exception:  # another process may have been faster; TFDS has no error of its own for that
                builder = make_builder(name, data_dir)
                if not _has_files(builder, ".array_record"):
                    raise
    return _open(name, split, builder, data_dir)


def open_builder(split: str, builder: tfds.core.DatasetBuilder) -> tuple[TfdsRecords, tuple[str, ...], tuple]:
    """Returns what `open_tfds` does of a builder that a user gives.

    Raises:
      UserError: if it is not prepared as array_record, its records lack an image or a label, there is no such split, or
        its files are damaged.
    """
    _check_features(builder.name, builder)
    return _open(builder.name, split, builder, None)


def _open(
    name: str, split: str, builder: tfds.core.DatasetBuilder, data_dir: str | None
) -> tuple[TfdsRecords, tuple[str, ...], tuple]:
    features = builder.info.features
    if not _has_files(builder, ".array_record"):
        raise _not_prepared(name, data_dir, builder)
    shards = {name: info.shard_lengths for name, info in builder.info.splits.items()}
    _check_split(name, split, shards)
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    version = f"{builder.info.version} {json.dumps(shards, sort_keys=True)}"
    opened = TfdsRecords(records, f"{name}, {split}", version, split, shards)
    opened.__getitems__(sorted({0, len(opened) - 1}))  # to report missing or damaged files before the run begins
    return opened, tuple(features["label"].names), features["image"].shape


def ranges_of(split: str, shards: Mapping[str, Sequence[int]]) -> list[tuple[str, int, int]]:
    """Returns the ranges of images in a split: of each, the split that it cuts, its start and its end.

    Args:
      split: such as `train[:90%]`, or a sum of them.
      shards: the lengths of the shards of each split.

    Raises:
      ValueError: if there is no such split.

    Example:
      >>> ranges_of("train[:10%]+test", {"train": [600, 400], "test": [10]})
      [('train', 0, 100), ('test', 0, 10)]
    """
    if split in shards:
        return [(split, 0, sum(shards[split]))]
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[*of], num_bytes=0) for name, of in shards.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except NotImplementedError as error:  # what TFDS itself raises for a slice of `all`
        raise ValueError(str(error)) from None
    ends = (sum(shards[part.splitname]) if part.to is None else part.to for part in parts)
    return [(part.splitname, part.from_ or 0, end) for part, end in zip(parts, ends, strict=True)]


def _check_split(name: str, split: str, shards: Mapping[str, Sequence[int]]) -> None:
    """Raises a UserError if a split is unknown, goes beyond its images or shards, or has no images."""
    count = 0
    for part in map(str.strip, split.split("+")):
        whole, _, cut = part.partition("[")
        number = len(shards.get(whole, ()))
        highest = number if ":" in cut else number - 1  # the end of a slice, or a shard's own index
        # TFDS would silently take the shards that there are.
        if whole in shards and any(not -number <= int(at) <= highest for at in re.findall(r"(-?\d+)shard", cut)):
            raise UserError(
                f"the split {part} of {name} goes beyond the {number:,} shard{'s' * (number > 1)} of {whole}. Choose a "
                "slice within them."
            )
        try:
            sizes = [end - start for _, start, end in ranges_of(part, shards)]
        except ValueError:
            if whole not in shards:
                raise unknown(f"split of {name}", split, shards) from None
            if _SLICE.fullmatch(cut) is None:
                raise UserError(
                    f"the split {part} of {name} is not a valid slice. Write {whole}[:90%], "
                    f"{whole}[100:200] or {whole}[:2shard]."
                ) from None
            raise UserError(
                f"the split {part} of {name} goes beyond the {sum(shards[whole]):,} images of {whole}. Choose a slice "
                "within them."
            ) from None
        if min(sizes, default=0) < 0:  # TFDS takes an end before the start off the other parts
            raise UserError(f"the split {part} of {name} has no images. Choose another slice.")
        count += sum(sizes)
    if not count:
        raise UserError(f"the split {split} of {name} has no images. Choose another slice.")


def make_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of an image classification dataset, whether it is prepared or not.

    Raises:
      UserError: if the dataset is unknown, its description is damaged, or its records lack an image or a label.
    """
    # data_source reads array_record only. TFDS warns at each use of another format and of Pillow.
    logging.getLogger("absl").setLevel(logging.ERROR)
    _check_name(name)
    try:
        digits = name == "digits"
        builder = Digits(data_dir=data_dir, file_format="array_record") if digits else _builder(name, data_dir)
    except tfds.core.DatasetNotFoundError:
        raise _unknown(name) from None
    except json_format.ParseError as error:
        raise UserError(f"the description of {name} in {data_dir} is damaged ({error}). Prepare it again.") from None
    _check_features(name, builder)
    return builder


def _check_features(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Raises a UserError unless a dataset's records have an image and a label of known classes."""
    features = builder.info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    held = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(isinstance(held.get(key), kind) for key, kind in kinds.items()):
        shown = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in held.items()) or features
        raise UserError(
            f"dataset {name} has {shown}, but needs image (Image) and label (ClassLabel). Choose a classification "
            "dataset, or prepare this one with such features."
        )
    if features["label"].num_classes is None:
        raise UserError(f"dataset {name} does not say how many classes its label has. Choose another.")
    channels = features["image"].shape[-1]
    if channels not in (1, 3):
        raise UserError(f"dataset {name} has images of {channels} channels; supported are 1 and 3. Choose another.")


def _check_name(name: str) -> None:
    """Rejects names of the form `namespace:dataset`, for which TFDS downloads and runs third-party code."""
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name):
        raise _unknown(name)


def _unknown(name: str) -> UserError:
    known = [decoded.NAME, "digits", *folders.FOLDERS, *tfds.list_builders(with_community_datasets=False)]
    return unknown("dataset", name, known)


def _check_imports(folder: epath.Path) -> None:
    """Rejects dataset descriptions that name foreign modules, because TFDS imports the modules they name.

    Raises:
      UserError: if a module outside TFDS is named, or the description is damaged.
    """
    versions = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    places = versions + [path for version in versions for path in version.iterdir()]
    for path in (path for place in places if (path := place / "features.json").exists()):
        try:
            named = set(_class_names(json.loads(path.read_text())))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}). Prepare the dataset again.") from None
        for foreign in sorted(name for name in named if not name.startswith("tensorflow_datasets.core.features.")):
            raise UserError(f"{path} asks to import {foreign!r}, which is refused. Prepare the dataset yourself.")


def _class_names(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        yield from (str(content[key]) for key in ("pythonClassName", "python_class_name") if key in content)
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _class_names(value)


def _builder(name: str, data_dir: str | None) -> Any:
    _check_imports(epath.Path(data_dir or tfds.core.constants.DATA_DIR) / re.split("[/:]", name)[0])
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise
        return tfds.builder(name, data_dir=data_dir)  # a copy in another format; `open_tfds` rejects it


def _has_files(builder: Any, kind: str) -> bool:
    """Returns whether a builder's folder has files of a kind. TFDS and epath read a folder "a[1]" as a pattern."""
    return builder.data_path.is_dir() and any(kind in path.name for path in builder.data_path.iterdir())


def _not_prepared(name: str, data_dir: str | None, builder: Any) -> UserError:
    where = f" --data_dir {data_dir}" if data_dir else ""
    path = builder.data_path
    if _has_files(builder, ".tfrecord"):
        command = f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        return UserError(
            f"dataset {name} in {path} consists of TFRecord files, which have no random access. Convert them: "
            f"pip install 'ldrld_jax[tf]' && {command}"
        )
    return UserError(
        f"dataset {name} is not prepared in {path}. Set data.data_dir to its folder, or prepare "
        f"it: pip install 'ldrld_jax[tf]' && tfds build {name} --file_format array_record{where}"
    )
