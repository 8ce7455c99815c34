"""The best student of a run as files that need nothing of this package: `--mode export`.

student.stablehlo is a program, `jax.export`'s form of StableHLO, with the weights in it; student.safetensors
the weights alone, for keeping; README.md a model card.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data.pipeline import make_eval_source
from ldrld_jax.deploy import preprocessing
from ldrld_jax.deploy.model_card import model_card
from ldrld_jax.errors import UserError
from ldrld_jax.files import named, read_json, replace_text
from ldrld_jax.interop.torch_import import save_torch_checkpoint
from ldrld_jax.record.reader import read_summary
from ldrld_jax.runtime.hosts import first
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network

PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _LABELS, _PREPROCESSING = "student.stablehlo", "labels.txt", "preprocessing.json"


@dataclasses.dataclass(frozen=True)
class Student:
    """A student as it is deployed.

    Attributes:
      program: `program.call(images)` gives logits `[n, C]` float32 of images `[n, height, width, channels]` uint8.
      preprocessing: what makes such an image of any other, see `preprocessing.describe`.
      labels: the names of the C classes.
    """

    program: jax.export.Exported
    preprocessing: dict[str, Any]
    labels: tuple[str, ...]


def export(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Writes a run's best student into `workdir/export`; gives that folder.

    Args:
      config: of the run, see `ldrld_jax.config.load_run`.
      workdir: of the run.

    Raises:
      UserError: if there is no such run, it trained another model, or its data set, which has the labels, is not there.
    """
    student, variables = student_of(config, workdir)
    folder = epath.Path(workdir) / "export"
    if not first():
        return folder
    folder.mkdir(exist_ok=True)
    with named(folder):
        (folder / _PROGRAM).write_bytes(bytes(student.program.serialize()))
        save_torch_checkpoint(folder / "student.safetensors", *variables)
    replace_text(folder / _LABELS, "".join(f"{label}\n" for label in student.labels))
    replace_text(folder / _PREPROCESSING, json.dumps(student.preprocessing, indent=2) + "\n")
    card = model_card(
        config_lib.resolve(config).to_dict(),
        read_summary(workdir),
        shape=student.preprocessing["input"]["shape"][1:],
        classes=len(student.labels),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
    )
    replace_text(folder / "README.md", card)
    return folder


def student_of(config: ConfigDict, workdir: epath.PathLike) -> tuple[Student, Variables]:
    """The best student of a run, and its weights.

    Raises:
      UserError: as `export`.
    """
    with precision_scope(config.precision, config.matmul_precision):
        source = make_eval_source(config.data)
        networks = Networks(len(source.class_names), source.image_shape[-1], config.precision)
        network, variables = networks.restore(str(workdir), config.student.model, config.data)
        # On the host: an array of a device would tie the program to the number of devices.
        variables = jax.tree.map(np.asarray, variables)
        program = _program(network, variables, source.image_shape)
    described = preprocessing.describe(network, config.data, source.image_shape, len(source.class_names))
    return Student(program, described, tuple(source.class_names)), variables


def _program(network: Network, variables: Variables, shape: tuple[int, ...]) -> jax.export.Exported:
    def student(images: jax.Array) -> jax.Array:
        return network(variables, images, train=False)[0].astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
    return jax.export.export(jax.jit(student), platforms=PLATFORMS)(images)


def is_exported(folder: epath.PathLike) -> bool:
    """Whether `folder` is what `export` wrote, rather than a run's workdir."""
    return (epath.Path(folder) / _PROGRAM).exists()


def read_student(folder: epath.PathLike) -> Student:
    """The student that `export` wrote into `folder`. It is a program that is then run: read only what you trust.

    Raises:
      UserError: if a file is missing or torn, or this version of JAX does not read the program any more.
    """
    folder = epath.Path(folder)
    described = read_json(folder / _PREPROCESSING, "Beside an exported student", keys={"input", "before"})
    labels = tuple((folder / _LABELS).read_text().splitlines())
    try:
        program = jax.export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
        _, *shape = program.in_avals[0].shape
        # Of a newer JAX a program deserialises, and is not understood when it is lowered.
        jax.jit(program.call).lower(jax.ShapeDtypeStruct((1, *shape), jnp.uint8))
    except Exception as error:  # of flatbuffers and of JAX, of many kinds, at bytes that are not as they should be
        raise UserError(
            f"{folder / _PROGRAM} is torn, or of a version of JAX too far from {jax.__version__}: {error}. "
            "Export it again, by --mode export."
        ) from error
    return Student(program, described, labels)
