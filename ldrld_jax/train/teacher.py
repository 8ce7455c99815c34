"""Teachers: their kinds, the choice that a config makes, and the source of their weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data.pipeline import made_by
from ldrld_jax.data.stream import eval_batches
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.interop.host_teacher import HostTeacher, LogitsFile
from ldrld_jax.logit_store.feed import DeviceBatch, LogitFeed, missing_epochs, teacher_program
from ldrld_jax.logit_store.store import LogitStore, check_new, make_key
from ldrld_jax.record.console import say, waiting
from ldrld_jax.record.reader import check_class_names
from ldrld_jax.runtime.mesh import batch_sharding
from ldrld_jax.runtime.signals import Signals
from ldrld_jax.train.evaluator import NOTHING_LEFT, Evaluator
from ldrld_jax.train.networks import is_workdir
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Ensemble, Network

Weights = Variables | tuple[Variables, ...]  # of a network, or of an ensemble's


@dataclasses.dataclass(frozen=True)
class NetworkTeacher:
    """A teacher that the step runs.

    Attributes:
      network: frozen, in evaluation mode.
      variables: its weights.
      top1: in percent on the evaluation split; None before it is measured.
    """

    network: Network | Ensemble
    variables: Weights
    top1: float | None = None


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose stored logits accompany each batch; the step runs no teacher.

    Attributes:
      logits: gives them, from a store or a file.
      top1: in percent on the evaluation split; None for a file, which has no logits of it.
      top1_in_training: in percent on the training images, of a file.
    """

    logits: LogitFeed
    top1: float | None
    top1_in_training: float | None = None


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A teacher that runs on the host beside the steps, and whose logits accompany each batch.

    Attributes:
      teacher: a user's function.
      top1: in percent on the evaluation split.
    """

    teacher: HostTeacher
    top1: float


@dataclasses.dataclass(frozen=True)
class SelfTeacher:
    """The student's own moving average, whose weights are in the state.

    Attributes:
      network: the student.
    """

    network: Network


Teacher = NetworkTeacher | StoredTeacher | OnHost | SelfTeacher


def network_of(teacher: Teacher | None) -> Network | Ensemble | None:
    """Returns the network that the step runs as the teacher."""
    return teacher.network if isinstance(teacher, NetworkTeacher | SelfTeacher) else None


def weights_of(teacher: Teacher | None) -> Weights | None:
    """Returns the weights to pass to the step; None if it needs none or has them in its state."""
    return teacher.variables if isinstance(teacher, NetworkTeacher) else None


def top1_of(teacher: Teacher | None) -> float | None:
    """Returns the teacher's top-1 in percent, if it was measured."""
    return None if teacher is None or isinstance(teacher, SelfTeacher) else teacher.top1


def obtain_teacher(
    run: Run, student: Network, signals: Signals, train: Callable[[ConfigDict, epath.Path], object]
) -> Teacher | None:
    """Loads a run's teacher, after training it if it has a recipe, and measures it; None for plain training.

    Args:
      run: the plan.
      student: its network.
      signals: polled while the teacher is measured.
      train: `train(recipe, workdir)` trains a teacher in its workdir unless it is trained already.

    Raises:
      UserError: if it does not load, or scores less than `teacher.min_top1`.
    """
    if not run.objective.methods:
        return None
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    if config_lib.teaches_from_file(run.config):
        return _from_file(run)
    if (function := run.given.host_teacher(run.config)) is not None:
        return _on_host(run, function, signals)
    check_store(run)  # before a teacher is trained
    for recipe, place in recipes(run):
        train(recipe, place)
    teacher, origin = restored(run, checkpoints_of(run)), _origin(run)
    store, top1, missing = _opened_store(run, teacher)
    if missing != [] or top1 is None:  # else nobody runs it
        teacher = placed(run, teacher)
    if top1 is None:
        evaluate = Evaluator(teacher.network, run.eval_source, run.config, run.mesh)
        try:
            with waiting("evaluating the teacher") as at:

                def each() -> None:
                    signals.check()
                    at(f"teacher: {evaluate.doing}")

                top1 = evaluate(teacher.variables, each, signals.check)["top1"]
        except NonFiniteError as error:
            raise UserError(f"the teacher {origin} is refused: {error}") from error
    _introduce(run, origin, top1)
    if store is None:
        return dataclasses.replace(teacher, top1=top1)
    program = teacher_program(teacher.network, store.dtype, run.mesh, store.top_k)
    return _stored(run, store, top1, (lambda batch: program(teacher.variables, batch["image"])) if missing else None)


def recipes(run: Run) -> list[tuple[ConfigDict, epath.Path]]:
    """Returns the teachers that a run trains before its student: the recipe and the workdir of each."""
    config, outside = run.config.teacher, config_lib.teaches_itself(run.config) or run.teacher_is_outside
    if not run.objective.methods or outside or config.checkpoint is not None or config.epochs is None:
        return []
    return config_lib.teacher_runs(run.config, run.workdir)


def _on_host(run: Run, function: HostTeacher, signals: Signals) -> OnHost | StoredTeacher:
    """Returns a teacher that runs on the host, or the store of its logits, after measuring it."""
    config, shape = run.config, run.label_form
    store, top1, missing = _opened_store(run, function)
    if top1 is None:
        right = count = 0
        with waiting("evaluating the teacher"):
            for batch in eval_batches(run.eval_source, config.eval_batch_size, **made_by(config.data)):
                signals.check()
                best = np.argmax(function.of_batch(batch, **shape), axis=-1)
                right += int(np.sum((best == batch["label"]) & batch["mask"]))
                count += int(np.sum(batch["mask"]))
        if not count:
            raise UserError(NOTHING_LEFT)
        top1 = 100 * right / count
    _introduce(run, "on the host", top1)
    if store is None:
        return OnHost(function, top1)
    program = teacher_program(lambda _, logits, train: (logits, ()), store.dtype, run.mesh, store.top_k)

    def teach(batch: DeviceBatch) -> Any:
        looked_at = {key: np.asarray(value) for key, value in batch.items() if key in ("image", "mask")}
        logits = function.of_batch(looked_at, **shape)
        return program(None, jax.device_put(logits, batch_sharding(run.mesh)))

    return _stored(run, store, top1, teach if missing else None)


def _from_file(run: Run) -> StoredTeacher:
    """Returns the teacher whose logits of the training images are in a file.

    Raises:
      UserError: if the file does not fit the images, or they are augmented in ways that it cannot know.
    """
    config, batches = run.config, run.batches
    path, source = config.teacher.checkpoint, batches.source
    file = LogitsFile.open(path, images=len(source), **run.label_form)
    views = config.logits.get("views")
    if views is None and (batches.pad or batches.flip or source.uncached.view.random or source.changes):
        raise UserError(
            f"{path} holds logits of images as they are stored, and the run augments them. Set data.pad=0, "
            "data.flip=False and no random view, or compute a view for each of logits.views epochs."
        )
    if file.views != (views or 1):
        raise UserError(
            f"{path} holds {file.views} views of each image, and logits.views is {views}. Set it to {file.views}."
        )
    if config.teacher.min_top1:
        raise UserError(
            f"teacher.min_top1 is checked on the evaluation split, but {path} has logits of the training images only. "
            "Unset it."
        )
    labels = source.uncached.records.labels()
    right = 100 * float(np.mean((np.argmax(file.read(0), axis=-1) == labels)[labels >= 0]))
    say(f"teacher logits from {path}  top-1 {right:.2f} on the training images")
    return StoredTeacher(LogitFeed(file, batches, run.mesh, config.epochs, **made_by(config.data)), None, right)


def _origin(run: Run) -> str:
    """Describes where the weights of a run's teacher come from."""
    paths = checkpoints_of(run)
    return f"from {', '.join(paths)}" if paths else "with its own weights"


def _introduce(run: Run, origin: str, top1: float) -> None:
    """Prints a teacher's top-1, or raises a UserError if `teacher.min_top1` demands a better one."""
    check_top1(run, top1, origin)
    say(f"teacher {run.config.teacher.model} {origin}  top-1 {top1:.2f}")


def check_top1(run: Run, top1: float, origin: str = "") -> None:
    """Raises a UserError if `teacher.min_top1` demands a better teacher than one of this top-1 in percent."""
    config = run.config.teacher
    if top1 < config.min_top1:
        raise UserError(
            f"the teacher {config.model} {origin}{' ' * bool(origin)}has top-1 {top1:.2f} %, and teacher.min_top1 "
            f"demands {config.min_top1:.2f} %. Check {to_check(run)}, or lower teacher.min_top1."
        )


def _opened_store(
    run: Run, teacher: NetworkTeacher | HostTeacher
) -> tuple[LogitStore | None, float | None, list[int] | None]:
    """Returns the store of a run's teacher, the top-1 in it and the epochs that it lacks; each may be None."""
    if not run.config.logits:
        return None, None, None
    store = open_store(run, teacher)
    return store, store.teacher_top1(_evaluated(run)), missing_epochs(store, run.batches, run.config.epochs)


def check_store(run: Run) -> None:
    """Raises a UserError if a run's logit store cannot have the epochs that it lacks, whatever its teacher is."""
    if folder := run.config.logits.get("dir"):
        if not (epath.Path(folder) / "key.json").exists():
            check_new(folder)
        missing_epochs(open_store(run), run.batches, run.config.epochs, quiet=True)


def to_check(run: Run) -> str:
    """Names what may be wrong with a weak teacher."""
    if config_lib.teaches_from_file(run.config):
        return "the file and the order of its rows"
    if run.teacher_is_outside:
        return "its function and the images that it gets"
    if not (paths := checkpoints_of(run)):
        return "its weights and teacher.data.mean and std"
    fed = all(map(is_workdir, paths))  # by the numbers that it was trained with
    return "its checkpoint" if fed else "its checkpoint and teacher.data.mean and std"


def _stored(run: Run, store: LogitStore, top1: float, teach: Callable[[DeviceBatch], Any] | None) -> StoredTeacher:
    """Returns the teacher in a store; `teach` computes the logits that it lacks."""
    store.create(teacher_top1=top1, evaluated=_evaluated(run))
    feed = LogitFeed(store, run.batches, run.mesh, run.config.epochs, teach, **made_by(run.config.data))
    return StoredTeacher(feed, top1)


def _evaluated(run: Run) -> dict[str, Any]:
    """Returns a description of the images that a teacher's top-1 is of, for a logit store."""
    return {"split": run.config.data.eval_split, **run.data_note["eval"]}


def teacher_at_hand(run: Run, student: Network, paths: Sequence[str] | None = None) -> NetworkTeacher | SelfTeacher:
    """Returns a run's teacher with its weights on the devices, without training or measuring it.

    Args:
      run: the plan, of a run with a teacher.
      student: its network.
      paths: of the teacher's checkpoints; None for those of the config, or random weights if it names none.

    Raises:
      UserError: if the teacher is no network of ours.
    """
    if run.teacher_is_outside:
        raise UserError(f"the teacher {run.config.teacher.model} runs outside of JAX. Choose a run with another one.")
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    return placed(run, restored(run, config_lib.teacher_checkpoints(run.config) if paths is None else paths))


def outlined(run: Run, student: Network) -> NetworkTeacher | SelfTeacher:
    """Returns a run's teacher with shapes in place of its weights, as they lie on the mesh."""
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    teacher = _together(run, [run.networks.outline(model, data) for model, data in run.networks_used[1:]])
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return _each(teacher, lambda v: jax.tree.map(shape, v, run.placement.of_variables(v)))


def checkpoints_of(run: Run) -> list[str]:
    """Returns the paths of a run's teachers: the checkpoints of its config, or the workdirs they train in.

    Teachers that are objects or a user's code may have none, and come with their weights.
    """
    return config_lib.teacher_checkpoints(run.config) or [str(place) for _, place in recipes(run)]


def restored(run: Run, paths: Sequence[str]) -> NetworkTeacher:
    """Loads the networks of `teacher.model`, several as one; their weights stay on the host.

    Raises:
      UserError: if one does not load, or there are not as many paths as models, or none for models with weights of
        their own.
    """
    config, models = run.config.teacher, config_lib.teacher_models(run.config)
    if not paths:
        return _together(run, [run.networks.random(m, config.data, seed=config.seed) for m in models])
    if len(paths) != len(models):
        raise UserError(
            f"teacher.checkpoint must name a checkpoint for each of teacher.model ({len(models)}: "
            f"{config.model}), got {len(paths)}. Separate them by commas."
        )
    for path in paths:
        if is_workdir(path):
            check_class_names(path, run.batches.source.class_names, whose="the teacher")
    return _together(run, [run.networks.restore(path, m, config.data) for path, m in zip(paths, models, strict=True)])


def placed(run: Run, teacher: NetworkTeacher) -> NetworkTeacher:
    """Moves a teacher's weights to the devices."""
    return _each(teacher, run.placement.put_variables)


def _together(run: Run, parts: Sequence[tuple[Network, Variables]]) -> NetworkTeacher:
    if len(parts) == 1:
        return NetworkTeacher(*parts[0])
    networks, variables = zip(*parts, strict=True)
    return NetworkTeacher(Ensemble(networks, run.config.teacher.ensemble), variables)


def _each(teacher: NetworkTeacher, change: Callable[[Variables], Variables]) -> NetworkTeacher:
    """Returns the teacher with the weights of each of its networks changed."""
    several, variables = isinstance(teacher.network, Ensemble), teacher.variables
    changed = tuple(map(change, variables)) if several else change(variables)  # type: ignore[arg-type]
    return dataclasses.replace(teacher, variables=changed)


def open_store(run: Run, teacher: NetworkTeacher | HostTeacher | None = None) -> LogitStore:
    """Returns the store of a run's teacher in `logits.dir`, which may not exist yet.

    Without the teacher its key is not that of any store, but its size is known.
    """
    source = run.batches.source.uncached
    parts: dict[str, Any] = {}
    if isinstance(teacher, HostTeacher):
        parts = {"name": teacher.name, "fed": {"mean": teacher.mean, "std": teacher.std}}
    elif teacher is not None and isinstance(teacher.network, Ensemble):
        parts = {"networks": teacher.network.networks, "weights": teacher.variables}
    elif teacher is not None:
        parts = {"networks": [teacher.network], "weights": [teacher.variables]}
    key = make_key(
        run.config,
        classes=len(source.class_names),
        label_shape=source.label_shape,
        records=source.records,
        listing=run.data_note["train"]["digest"],
        augment_seed=run.batches.augmented_by,
        structures=run.structures((run.config.teacher.model or "").split(",")),
        **parts,
    )
    return LogitStore(run.config.logits.dir, key)
