"""Runs students and teachers over their evaluation split, and keeps the data of the report's pictures."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.code import is_code
from ldrld_jax.data import workers
from ldrld_jax.data.pipeline import made_by
from ldrld_jax.data.stream import Readable, eval_batches
from ldrld_jax.errors import UserError
from ldrld_jax.identity import is_object
from ldrld_jax.report import analysis, cache, pictures
from ldrld_jax.report.collect import FoundRun
from ldrld_jax.report.groups import Comparison
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.runtime.mesh import shares, to_devices
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network
from ldrld_jax.train.teacher import SelfTeacher, checkpoints_of, teacher_at_hand

_HEADS = ("fc", "linear", "classifier", "head")  # what the models call their last layer


class Outputs(NamedTuple):
    """The outputs of a network over the evaluation split, in its order.

    Attributes:
      logits: `[n, C]`.
      labels: `[n]`, -1 for an image that was skipped.
      embedding: of the last layer's input, for the images that `analysis.chosen` takes; None if it is not known, or
        has no t-SNE.
    """

    logits: np.ndarray
    labels: np.ndarray
    embedding: dict[str, Any] | None


def analyse(comparisons: list[Comparison], out: epath.Path, data_dir: str | None = None) -> list[str]:
    """Analyses every run without an analysis: the pictures of features for the first seed of each experiment.

    Args:
      comparisons: of `groups.compare`.
      out: where an analysis is kept if its run's folder cannot be written to.
      data_dir: where the data lie, if not where they lay when the run was trained.

    Returns:
      A line for every run, or teacher, of which it was not possible: why.
    """
    notes: list[str] = []
    teachers: dict[str, Outputs] = {}
    for group in (group for comparison in comparisons for group in comparison.groups):
        for found in group.runs:
            try:
                _analyse(found, out, data_dir, teachers, notes, features=found is group.first)
            except (UserError, OSError) as error:
                notes.append(f"{found.folder}: no analysis: {error}")
    return notes


def _analyse(
    found: FoundRun,
    out: epath.Path,
    data_dir: str | None,
    teachers: dict[str, Outputs],
    notes: list[str],
    *,
    features: bool,
) -> None:
    step = Checkpoints(epath.Path(found.folder) / "checkpoints").best_step
    known = cache.read(found.folder, out)
    if known and known["version"] == cache.VERSION and known["step"] == step and (known["features"] or not features):
        return
    for key in ("student.model", "data.name"):
        if is_code(value := found.config[key]) or is_object(value):
            notes.append(f"{found.folder}: no analysis: {key} is {value}, and the report executes no code of a run.")
            return
    print(f"analysing {found.folder}", file=sys.stderr)
    config = _config(found.folder, data_dir)
    with keep_compiled(config.compile_cache), precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config, epath.Path(found.folder))
        network, variables = run.networks.restore(found.folder, config.student.model, config.data)
        student = outputs(run, network, run.placement.put_variables(variables), features=features)
        teacher = None
        if run.objective.methods:
            try:
                teacher = _teacher(run, network, teachers)
            except (UserError, OSError) as error:
                notes.append(f"{found.folder}: analysed without its teacher: {error}")
    result = described(student, teacher, run.batches.source.class_names)
    if features:
        result["images_shown"] = shown_images(student, teacher, run.batches.source.class_names, run.eval_source)
    cache.write(found.folder, out, {"step": step, "features": features, **result})


def _config(folder: str, data_dir: str | None) -> ConfigDict:
    """Returns the run's config, resolved, for one device and without its store of logits."""
    config = config_lib.load_run(folder)
    config.data.data_dir = data_dir or config.data.data_dir
    config.data.loader, config.steps_per_dispatch = "stream", 1
    config.mesh.data, config.mesh.model, config.mesh.fsdp = 1, 1, False
    config.logits.dir = None
    return config_lib.resolve(config)


def _teacher(run: Run, student: Network, known: dict[str, Outputs]) -> Outputs | None:
    """Returns the outputs of a run's teacher, which many runs may share; None if it is the student's average."""
    paths = checkpoints_of(run)
    key = repr((paths, run.config.teacher.ensemble, run.config.teacher.data.to_dict(), run.config.data.to_dict()))
    if key not in known:
        teacher = teacher_at_hand(run, student, paths)
        if isinstance(teacher, SelfTeacher):
            return None
        known[key] = outputs(run, teacher.network, teacher.variables, features=isinstance(teacher.network, Network))
    return known[key]


def outputs(run: Run, network: Any, variables: Any, *, features: bool) -> Outputs:
    """Runs a network over the evaluation split of a run, and over the chosen images once more for its features."""
    source, size = run.eval_source, run.config.eval_batch_size
    forward = jax.jit(lambda variables, images: network(variables, images, train=False)[0].astype(jnp.float32))
    logits, labels = [], []
    with workers.scope():
        batches = eval_batches(source, size, **made_by(run.config.data), **shares(run.mesh))
        for start, batch in zip(range(0, len(source), size), to_devices(batches, run.mesh), strict=True):
            rows = min(size, len(source) - start)  # the others are padding
            logits.append(np.asarray(forward(variables, batch["image"]))[:rows])
            labels.append(np.where(batch["mask"], batch["label"], -1)[:rows])
    result = Outputs(np.concatenate(logits), np.concatenate(labels), None)
    identity = headless(variables) if features else None
    if identity is None:
        return result
    chosen = analysis.chosen(result.labels)
    parts = np.array_split(chosen, max(1, len(chosen) // 50))
    found = np.concatenate([np.asarray(forward(identity, source.read(part)[0])) for part in parts])
    return result._replace(embedding=analysis.embedding(found, result.labels[chosen]))


def headless(variables: Variables) -> Variables | None:
    """Returns weights with which a model outputs the input of its last layer, `[n, F]`; None for an unknown name.

    The logits are affine in it: an identity takes the place of the kernel, zeros that of the bias.
    """
    name = next((name for name in _HEADS if name in variables.params), None)
    if name is None:
        return None
    head = variables.params[name]
    width = next(leaf.shape[0] for leaf in jax.tree.leaves(head) if leaf.ndim == 2)
    identity = lambda leaf: jnp.eye(width, dtype=leaf.dtype) if leaf.ndim == 2 else jnp.zeros(width, leaf.dtype)  # noqa: E731
    return variables._replace(params={**variables.params, name: jax.tree.map(identity, head)})


def described(student: Outputs, teacher: Outputs | None, names: Sequence[str]) -> dict[str, Any]:
    """Returns the content of an analysis, over the images that were not skipped."""
    kept = student.labels >= 0
    logits, labels = student.logits[kept], student.labels[kept]
    chosen = analysis.chosen(student.labels)
    said = analysis.confusion(logits, labels)
    taught = teacher.logits[kept] if teacher else None
    result: dict[str, Any] = {
        "images": len(labels),
        "classes": len(names),
        "calibration": analysis.calibration(logits, labels),
        "embedding": student.embedding,
        "embedded": [names[label] for label in student.labels[chosen]] if student.embedding else [],
        "names": names,
        "class_images": np.bincount(labels, minlength=len(names)).tolist(),
        "class_top1": said.diagonal().round(2).tolist(),
        "confusion": _part(said, names),
        "teacher": None,
    }
    if teacher is None or taught is None:
        return result
    means, difference = analysis.pair_means(taught, logits, labels), analysis.correlation_difference(taught, logits)
    taught_said = analysis.confusion(taught, labels)
    return result | {
        "agreement": analysis.agreement(taught, logits),
        "correlation": analysis.shrunk(difference).round(3).tolist(),
        "correlation_mean": round(float(difference.mean()), 5),
        "pairs": analysis.disagreeing_pairs(means, names),
        "pair_map": _part(means.kl, names, digits=4),
        "teacher": {
            "calibration": analysis.calibration(taught, labels),
            "embedding": teacher.embedding,
            "class_top1": taught_said.diagonal().round(2).tolist(),
            "confusion": _part(taught_said, names, analysis.striking(said)),  # of the same classes
        },
    }


def _part(matrix: np.ndarray, names: Sequence[str], kept: np.ndarray | None = None, digits: int = 1) -> dict[str, Any]:
    """Returns the rows and columns of the striking classes, or of those that are `kept`, with their names."""
    kept = analysis.striking(matrix) if kept is None else kept
    return {"names": [names[i] for i in kept], "values": matrix[np.ix_(kept, kept)].round(digits).tolist()}


def shown_images(
    student: Outputs, teacher: Outputs | None, names: Sequence[str], source: Readable, most: int = 12
) -> dict[str, list[dict[str, Any]]]:
    """Returns the images on which the student is least certain, and those on which it differs most from its teacher.

    Args:
      student, teacher: their outputs over `source`.
      names: of the classes.
      source: the evaluation split; without pictures, such as of text, nothing is returned.
      most: images of each kind.

    Returns:
      `uncertain` and `differing`, each a list of images, the most striking first: its `index` in the split, its
      `label`, the class and the percentage of `student` and `teacher`, and `png`, at most 64 pixels a side.
    """
    if source.raw or student.labels.ndim != 1 or len(source.image_shape) != 3 or source.image_shape[2] not in (1, 3):
        return {}
    kept = np.flatnonzero(student.labels >= 0)
    ranks = {"uncertain": analysis.log_softmax(student.logits[kept]).max(axis=1)}
    if teacher:
        ranks["differing"] = -analysis.divergence(teacher.logits[kept], student.logits[kept])
    found = {}
    for name, rank in ranks.items():
        indices = kept[np.argsort(rank, kind="stable")[:most]]
        found[name] = [
            {
                "index": int(i),
                "label": names[student.labels[i]],
                **{who: _said(of.logits[i], names) for who, of in (("student", student), ("teacher", teacher)) if of},
                "png": pictures.thumbnail(image),
            }
            for i, image in zip(indices, source.read(indices)[0], strict=True)
        ]
    return found


def _said(logits: np.ndarray, names: Sequence[str]) -> list[Any]:
    """Returns the first class and its percentage."""
    shares = analysis.log_softmax(logits[None])[0]
    return [names[shares.argmax()], round(100 * float(np.exp(shares.max())), 1)]
