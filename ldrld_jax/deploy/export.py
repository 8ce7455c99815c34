"""Exports the best student of a run as files that do not need this package: `--mode export`, `Trainer.export`.

student.stablehlo is the program with its weights (StableHLO, as serialised by `jax.export`); student.safetensors
holds only the weights, for long-term storage; README.md is a model card.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.code import is_code
from ldrld_jax.deploy import preprocessing
from ldrld_jax.deploy.model_card import model_card
from ldrld_jax.errors import UserError, first_line, needs
from ldrld_jax.files import given_path, is_link, named, read_json, replace_bytes, replace_text
from ldrld_jax.interop.torch_import import save_torch_checkpoint
from ldrld_jax.record.console import TABLE_NUMBERS, printable
from ldrld_jax.record.reader import read_config, read_summary
from ldrld_jax.runtime.hosts import first
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.best import open_best
from ldrld_jax.train.given import NOTHING, Given
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network

PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _WEIGHTS = "student.stablehlo", "student.safetensors"
_LABELS, _PREPROCESSING = "labels.txt", "preprocessing.json"
_NOTED = "input", "before", "labels", "sha256"  # in the latter; `export` writes each


@dataclasses.dataclass(frozen=True)
class Student:
    """A student ready for deployment.

    Attributes:
      program: `program.call(images)` maps images `[n, height, width, channels]` uint8 to logits `[n, C]` float32, and
        raw inputs `[n, ...]` in their dtype to `[n, ..., C]`.
      preprocessing: how to turn any image into such an input, see `preprocessing.describe`.
      labels: names of the C classes.
    """

    program: jax.export.Exported
    preprocessing: dict[str, Any]
    labels: tuple[str, ...]


def export(
    config: ConfigDict, workdir: epath.PathLike, folder: epath.PathLike | None = None, *, given: Given = NOTHING
) -> epath.Path:
    """Writes a run's best student to a folder and returns that folder.

    Args:
      config: the run's config, see `ldrld_jax.config.load_run`.
      workdir: the run's folder.
      folder: a new or empty folder, or one of an earlier export; None for `workdir/export`.
      given: parts of the run that are objects.

    Raises:
      UserError: if the run does not exist or trained another model, if its dataset is missing (the class names are
        read from it), or if `folder` contains other files.
    """
    with needs("exporting a student", "export"):
        import flatbuffers  # noqa: F401  # jax.export writes by it
        import safetensors  # noqa: F401
    folder = epath.Path(workdir) / "export" if folder is None else epath.Path(given_path(folder))
    _check_free(folder)
    student, variables, saved = student_of(config, workdir, given=given)
    if not first():
        return folder
    if is_link(folder):
        raise UserError(f"{folder} is a link, and nothing is written through one. Remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    with named(folder):
        replace_bytes(folder / _PROGRAM, bytes(student.program.serialize()))
        save_torch_checkpoint(folder / _WEIGHTS, *variables)
    # For people and other programs; a name may hold a line's end, so that the names are in the JSON as well.
    replace_text(folder / _LABELS, "".join(f"{printable(label).replace(chr(10), ' ')}\n" for label in student.labels))
    digests = {name: sha256_of(folder / name) for name in (_PROGRAM, _WEIGHTS)}
    described = {**student.preprocessing, "labels": list(student.labels), "sha256": digests}
    replace_text(folder / _PREPROCESSING, json.dumps(described, indent=2) + "\n")
    replace_text(folder / "README.md", card_of(workdir, student, variables, saved))
    return folder


def card_of(
    workdir: epath.PathLike, student: Student, variables: Variables, saved: dict[str, Any], place: str | None = None
) -> str:
    """Returns the model card of what `student_of` returns; see `model_card` for `place`."""
    return model_card(
        saved,
        read_summary(workdir, numbers=TABLE_NUMBERS),
        described=student.preprocessing,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
        place=place,
    )


def _check_free(folder: epath.Path) -> None:
    """Raises a UserError if files that are not of an export could be overwritten in a folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and an export is a folder. Give a new folder.")
    if folder.exists() and any(folder.iterdir()) and not is_exported(folder):
        raise UserError(
            f"{folder} contains files that are not of an export. Give a new or empty folder, or one of an earlier "
            "export."
        )


def student_of(
    config: ConfigDict, workdir: epath.PathLike, *, given: Given = NOTHING
) -> tuple[Student, Variables, dict[str, Any]]:
    """Returns the best student of a run, its weights and the run's config; see `export` for the arguments.

    Raises:
      UserError: in the cases of `export`.
    """
    with precision_scope(config.precision, config.matmul_precision):
        best = open_best(config, workdir, given)
        source, network, variables = best.source, best.network, best.variables
        # On the host: device arrays would tie the program to the number of devices.
        variables = jax.tree.map(np.asarray, variables)
        try:
            program = make_program(network, variables, source.image_shape, source.dtype)
        except Exception as error:  # JAX raises many types
            if not (is_code(config.student.model) or config.student.model in given.models):
                raise
            raise UserError(
                f"{config.student.model} cannot be traced for batches of any size: {first_line(error)}. In the model, "
                "write x.shape[0] in place of len(x), and do not compare batch sizes."
            ) from error
    shapes: dict[str, Any] = dict(dtype=source.dtype, label_shape=source.label_shape)
    described = preprocessing.describe(network, config.data, source.image_shape, len(source.class_names), **shapes)
    saved = read_config(workdir)  # resolved when the run's method was known
    assert saved is not None  # its checkpoint has been read by it
    saved["precision"] = config.precision  # of the program
    return Student(program, described, tuple(source.class_names)), variables, saved


def make_program(network: Network, variables: Variables, shape: tuple[int, ...], dtype: Any) -> jax.export.Exported:
    """Returns the program that maps any number of inputs of a shape and dtype to logits."""

    def student(images: jax.Array) -> jax.Array:
        constants = jax.tree.map(jnp.asarray, variables)  # as jax.Arrays, because a model may use .at
        return network(constants, images, train=False)[0].astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), dtype)
    return jax.export.export(jax.jit(student), platforms=PLATFORMS)(images)


def is_exported(folder: epath.PathLike) -> bool:
    """Returns True if `export` wrote `folder`, and False for a run's workdir."""
    return (epath.Path(folder) / _PROGRAM).exists()


def read_student(folder: epath.PathLike) -> Student:
    """Reads the student that `export` wrote to `folder`. It contains a program: read only files that you trust.

    Raises:
      UserError: if a file is missing or corrupt, or this version of JAX cannot read the program.
    """
    with needs("reading an exported student", "export"):
        import flatbuffers  # noqa: F401  # jax.export reads by it
    folder = epath.Path(folder)
    described = read_json(folder / _PREPROCESSING, "Beside an exported student", keys=_NOTED)
    try:
        expected, noted = described["sha256"][_PROGRAM], described["input"]["shape"][1:]
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{folder / _PREPROCESSING} is not of an export ({type(error).__name__}: {error}). Export it again, by "
            "--mode export."
        ) from None
    if sha256_of(folder / _PROGRAM) != expected:
        raise UserError(
            f"{folder / _PROGRAM} has changed since it was exported: its SHA-256 is not {expected}. Export it again, "
            "by --mode export."
        )
    try:
        program = jax.export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
        _, *shape = program.in_avals[0].shape
        # A program from a newer JAX deserialises, but fails when it is lowered.
        jax.jit(program.call).lower(jax.ShapeDtypeStruct((1, *shape), program.in_avals[0].dtype))
    except Exception as error:  # flatbuffers and JAX raise many types for corrupt bytes
        raise UserError(
            f"{folder / _PROGRAM} is truncated, or JAX {jax.__version__} cannot read its version: {error}. "
            "Export it again with --mode export."
        ) from error
    if described["before"] is not None:
        preprocessing.view_of(described)
    if noted != list(shape):
        raise UserError(
            f"{folder / _PREPROCESSING} is of another student: its inputs are not {shape}. Export it again."
        )
    labels, classes = described["labels"], program.out_avals[0].shape[-1]
    if not isinstance(labels, list) or len(labels) != classes:
        raise UserError(f"{folder} has no name for each of its {classes} classes. Export it again, by --mode export.")
    return Student(program, described, tuple(map(str, labels)))


def sha256_of(path: epath.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
