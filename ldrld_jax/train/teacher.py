"""Teachers: their kinds, the choice that a config makes, and the source of their weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.logit_store.feed import LogitFeed, missing_epochs, teacher_program
from ldrld_jax.logit_store.store import LogitStore, make_key
from ldrld_jax.record.console import say
from ldrld_jax.record.reader import check_classes
from ldrld_jax.runtime.signals import Signals
from ldrld_jax.train.evaluator import Evaluator
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
      logits: gives them, from a store.
      top1: in percent on the evaluation split.
    """

    logits: LogitFeed
    top1: float


@dataclasses.dataclass(frozen=True)
class SelfTeacher:
    """The student's own moving average, whose weights are in the state.

    Attributes:
      network: the student.
    """

    network: Network


Teacher = NetworkTeacher | StoredTeacher | SelfTeacher


def network_of(teacher: Teacher | None) -> Network | Ensemble | None:
    """Returns the network that the step runs as the teacher."""
    return None if teacher is None or isinstance(teacher, StoredTeacher) else teacher.network


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
    config = run.config.teacher
    if not run.objective.methods:
        return None
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    if config.checkpoint is None:
        for recipe, place in config_lib.teacher_runs(run.config, run.workdir):
            train(recipe, place)
    paths = checkpoints_of(run)
    teacher = restored(run, paths)
    store = open_store(run, teacher) if run.config.logits else None
    top1 = store.teacher_top1(run.config.data.eval_split) if store else None
    missing = missing_epochs(store, run.batches, run.config.epochs) if store else None
    if missing != [] or top1 is None:  # else nobody runs it
        teacher = placed(run, teacher)
    if top1 is None:
        evaluate = Evaluator(teacher.network, run.eval_source, run.config, run.mesh)
        try:
            top1 = evaluate(teacher.variables, signals.check)["top1"]
        except NonFiniteError as error:
            raise UserError(f"the teacher in {', '.join(paths)} is refused: {error}") from error
    if top1 < config.min_top1:
        raise UserError(
            f"the teacher in {', '.join(paths)} has top-1 {top1:.2f} %, and teacher.min_top1 demands "
            f"{config.min_top1:.2f} %. Check its checkpoint and teacher.data.mean and std, or lower "
            "teacher.min_top1."
        )
    say(f"teacher {config.model} from {', '.join(paths)}  top-1 {top1:.2f}")
    if store is None:
        return dataclasses.replace(teacher, top1=top1)
    store.create(teacher_top1=top1, eval_split=run.config.data.eval_split)
    program = teacher_program(teacher.network, store.dtype, run.mesh, store.top_k)
    teach = (lambda images: program(teacher.variables, images)) if missing else None
    feed = LogitFeed(store, run.batches, run.mesh, run.config.epochs, teach, threads=run.config.data.threads)
    return StoredTeacher(feed, top1)


def teacher_at_hand(run: Run, student: Network, paths: Sequence[str] | None = None) -> NetworkTeacher | SelfTeacher:
    """Returns a run's teacher with its weights on the devices, without training or measuring it.

    Args:
      run: the plan, of a run with a teacher.
      student: its network.
      paths: of the teacher's checkpoints; None for those of the config, or random weights if it names none.
    """
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    if paths is not None or run.config.teacher.checkpoint is not None:
        return placed(run, restored(run, checkpoints_of(run) if paths is None else paths))
    config = run.config.teacher
    models = config_lib.teacher_models(run.config)
    return placed(run, _together(run, [run.networks.random(m, config.data, seed=config.seed) for m in models]))


def outlined(run: Run, student: Network) -> NetworkTeacher | SelfTeacher:
    """Returns a run's teacher with shapes in place of its weights, as they lie on the mesh."""
    if config_lib.teaches_itself(run.config):
        return SelfTeacher(student)
    teacher = _together(
        run, [run.networks.outline(m, run.config.teacher.data) for m in config_lib.teacher_models(run.config)]
    )
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return _each(teacher, lambda v: jax.tree.map(shape, v, run.placement.of_variables(v)))


def checkpoints_of(run: Run) -> list[str]:
    """Returns the paths of a run's teachers: the checkpoints of its config, or the workdirs they train in."""
    given = run.config.teacher.checkpoint
    if given and len(config_lib.teacher_models(run.config)) == 1:
        return [given]  # a comma is part of its name
    return given.split(",") if given else [str(place) for _, place in config_lib.teacher_runs(run.config, run.workdir)]


def restored(run: Run, paths: Sequence[str]) -> NetworkTeacher:
    """Loads the networks of `teacher.model`, several as one; their weights stay on the host.

    Raises:
      UserError: if one does not load, or there are not as many paths as models.
    """
    config, models = run.config.teacher, config_lib.teacher_models(run.config)
    if len(paths) != len(models):
        raise UserError(
            f"teacher.checkpoint must name a checkpoint for each of teacher.model ({len(models)}: "
            f"{config.model}), got {len(paths)}. Separate them by commas."
        )
    for path in paths:
        if "::" not in path and epath.Path(path).is_dir():
            check_classes(path, run.batches.source.class_names, whose="the teacher")
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


def open_store(run: Run, teacher: NetworkTeacher) -> LogitStore:
    """Returns the store of a run's teacher in `logits.dir`, which may not exist yet."""
    several = isinstance(teacher.network, Ensemble)
    source: Any = getattr(run.batches.source, "uncached", run.batches.source)
    key = make_key(
        run.config,
        classes=len(source.class_names),
        records=source.records,
        augment_seed=run.batches.augmented_by,
        networks=teacher.network.networks if several else [teacher.network],  # type: ignore[union-attr]
        weights=teacher.variables if several else [teacher.variables],
    )
    return LogitStore(run.config.logits.dir, key)
