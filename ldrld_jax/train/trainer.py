"""Runs: training, with the teacher first, and evaluation; from a config, or as a `Trainer` from Python objects."""

import contextlib
import dataclasses
import functools
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.data import workers
from ldrld_jax.errors import UserError
from ldrld_jax.files import LockedError, given_path, is_locked
from ldrld_jax.identity import of_all
from ldrld_jax.record.console import counted, say, summary_table, waiting
from ldrld_jax.record.reader import read_metrics
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.runtime.hosts import catch_signals_of_all, check_same
from ldrld_jax.runtime.mesh import make_mesh
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.signals import Signals, catch_signals
from ldrld_jax.train.assemble import assemble, check_observers
from ldrld_jax.train.best import Best, open_best
from ldrld_jax.train.check import check
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.folder import RunFolder, pinned
from ldrld_jax.train.given import NOTHING, Callback, Given, LineWriter
from ldrld_jax.train.loop import fit
from ldrld_jax.train.opening import opening, teacher_warnings, warnings
from ldrld_jax.train.plan import Run
from ldrld_jax.train.shapes import check_metrics
from ldrld_jax.train.state import Placement
from ldrld_jax.train.step import Metric
from ldrld_jax.train.teacher import SelfTeacher, StoredTeacher, Teacher, checkpoints_of, obtain_teacher, top1_of

_POLL_SECONDS = 1.0
_training = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
      trainer: the `Trainer` that ran.
      summary: the content of summary.json.
      metrics: the lines of metrics.jsonl, `{"step": ..., "epoch": ..., "split": ..., "values": {...}}` each.
    """

    trainer: "Trainer" = dataclasses.field(repr=False)
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] = dataclasses.field(repr=False)

    @functools.cached_property
    def student(self) -> Any:
        """The student with its best weights, called as its own library calls it.

        It is an `nnx.Module` in evaluation mode, a bound Linen module, or the function with its variables,
        `student(images)`. Inputs are normalised as in training.
        """
        return self.trainer.student()


class Trainer:
    """Distillation of a student from a teacher: what `python -m ldrld_jax.main` runs, with objects in place of names.

    Args:
      student: an `nnx.Module`; `(module, variables)` of Flax Linen; `(apply, variables)` with
        `apply(variables, images, train=...)` returning logits; or a name of `MODELS` or `module:function`. It is not
        changed: the result has the trained one.
      teacher: the same; a run's workdir; a PyTorch file, with `config={"teacher.model": ...}`; a file of logits, .npy
        or .zarr; a list of models or paths for an ensemble; "ema" for the student's own moving average; a
        `HostTeacher`; None with method "ce".
      method: a name of `METHODS`, several as "ldrld+kd"; a method's config such as `LDRLDConfig(depth=5)`; a function
        `(teacher_logits, student_logits, labels)` that returns one loss per example; or a list of these, to
        be added.
      train: `(inputs, labels)`, images or token ids with labels `[n]`, or `[n, ...]` for one per token, where -1 is
        left out; a dataset object (see `ldrld_jax.data.given`), a `datasets.Dataset`, a builder of
        TFDS, a folder of class folders, or a name of TFDS.
      evaluation: the same; if `train` is a builder, a folder or a name, the name of a split, or None for the default.
      num_classes: C. None takes it from the dataset, or from the largest label of arrays.
      optimizer: an optax optimizer of the pair (student's parameters, parameters that a method learns); or a name,
        with its learning rate in `config={"optim.learning_rate": ...}`. None uses the `optim` block of `config`.
      epochs, batch_size, seed: as in a config; the batch is global.
      workdir: the run's folder, from which the same call resumes; None makes a temporary one.
      config: any other key of a config (docs/keys.md), `{"data.mean": (0.5,), "data.flip": True}`.
      writers: objects with `write(step, epoch, split, values)`, which get each line of metrics.jsonl.
      callbacks: called after evaluations and saves.
      metrics: `{name: function}` of `(logits, labels, where)`, which returns a number for each label, `[n]` or
        `[n, ...]`; the run takes the mean over those that the mask `where` keeps, which is None without padding.

    Raises:
      UserError: if a run cannot use an argument.

    Example:
      >>> from flax import nnx
      >>> images, labels = np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 2
      >>> apply = lambda w, x, train: x.reshape(x.shape[0], -1) @ w
      >>> trainer = Trainer(
      ...     student=(apply, np.zeros((16, 2), np.float32)),
      ...     teacher=(apply, np.ones((16, 2), np.float32)),
      ...     method="kd",
      ...     train=(images, labels),
      ...     evaluation=(images, labels),
      ... )
      >>> trainer.predict(images).shape  # doctest: +SKIP
      (8, 2)
    """

    # The network that `predict` used last, with its config and checkpoints; reused while both stay the same.
    _kept: tuple[Any, Best] | None = None

    def __init__(
        self,
        *,
        student: Any,
        teacher: Any = None,
        method: Any = "ldrld",
        train: Any,
        evaluation: Any = None,
        num_classes: int | None = None,
        optimizer: Any = None,
        epochs: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        workdir: epath.PathLike | None = None,
        config: Mapping[str, Any] | None = None,
        writers: Sequence[LineWriter] = (),
        callbacks: Sequence[Callback] = (),
        metrics: Mapping[str, Metric] | None = None,
    ):
        self.config, self.given = assemble(
            student=student,
            teacher=teacher,
            method=method,
            train=train,
            evaluation=evaluation,
            num_classes=num_classes,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            config=config or {},
            writers=writers,
            callbacks=callbacks,
            metrics=metrics or {},
        )
        if workdir is None and jax.distributed.is_initialized():
            raise UserError("a run of several processes needs one folder for all of them. Give Trainer(workdir=...).")
        self.workdir = epath.Path(tempfile.mkdtemp(prefix="ldrld_jax_") if workdir is None else given_path(workdir))

    def __repr__(self) -> str:
        return f"Trainer({self.config.student.model} by {self.config.method}, workdir={str(self.workdir)!r})"

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        workdir: epath.PathLike,
        *,
        writers: Sequence[LineWriter] = (),
        callbacks: Sequence[Callback] = (),
        metrics: Mapping[str, Metric] | None = None,
    ) -> "Trainer":
        """Returns the trainer of a config that describes the run in full, as `ldrld_jax.config.load` returns it.

        The other arguments are those of `Trainer`.

        Raises:
          UserError: if a writer, callback or metric is not usable, or a metric has the name of one of the run's own.
        """
        check_observers(writers, callbacks, metrics or {})
        trainer = cls.__new__(cls)
        trainer.config, trainer.workdir = config, epath.Path(given_path(workdir))
        trainer.given = Given(writers=tuple(writers), callbacks=tuple(callbacks), metrics=dict(metrics or {}))
        return trainer

    def fit(self, *, leave_within: float | None = None, profile: str | None = None, file: str | None = None) -> Result:
        """Trains to the last epoch, or resumes an interrupted run, and returns its `Result`.

        Args:
          leave_within: seconds that the step in flight may still take after a first SIGTERM, SIGINT or SIGHUP; then
            the process ends without saving. None sets no limit. Saving has none.
          profile: a directory for a trace of some of the student's steps.
          file: used by the command line: the config file, for warnings about what differs from it.

        Raises:
          UserError: if the input is wrong; the workdir is untouched.
          NonFiniteError: if the loss is not finite.
          Interrupted: on one of those signals, once the state is saved.
        """
        self._kept = None
        summary = train(
            self.config, self.workdir, leave_within=leave_within, profile=profile, file=file, given=self.given
        )
        return Result(self, summary, read_metrics(self.workdir))

    def check(self) -> list[str]:
        """Returns a line for each problem that would stop the run, without training; see `ldrld_jax.train.check`."""
        return check(self.config, self.workdir, given=self.given)

    def evaluate(self) -> dict[str, float]:
        """Returns cross-entropy (nats), top-1, top-5 (percent) and the run's own metrics, of the best checkpoint.

        They are means over the evaluation split.

        Raises:
          UserError: if there is no checkpoint yet, or the data are not of the form of the training data.
        """
        self._check_trained()
        return evaluate(self.config, self.workdir, given=self.given)

    def student(self) -> Any:
        """Returns the student with the weights of the best checkpoint, as `Result.student` has it.

        Raises:
          UserError: if there is no checkpoint yet.
        """
        with self._best() as best:
            return best.networks.pure(best.config.student.model).own(*jax.tree.map(jnp.copy, best.variables))

    def predict(self, images: Any) -> np.ndarray:
        """Returns the best checkpoint's logits, float32: `[n, C]` for images, `[n, length, C]` for texts.

        Args:
          images: `[n, ...]` as in the training data, before normalisation; or a list of images, as arrays or of
            Pillow's, or of encoded files' bytes, which are resized and cropped as those of the evaluation split are.

        Raises:
          UserError: if there is no checkpoint yet, or an image is broken, or has another shape or dtype, or a number
            that does not fit the dtype of the training data.
        """
        if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")) or isinstance(
            images, str | bytes | Mapping
        ):
            raise UserError(f"images must be an array [n, ...] or a list, got {type(images).__name__}. Make them one.")
        with self._best() as best:
            size, logits = best.config.eval_batch_size, []
            for start in range(0, len(images), size):
                rows = np.stack([best.input(i, images[i]) for i in range(start, min(start + size, len(images)))])
                padded = np.pad(rows, ((0, min(size, len(images)) - len(rows)), *((0, 0),) * (rows.ndim - 1)))
                logits.append(np.asarray(best.program(best.variables, padded), np.float32)[: len(rows)])
            empty = np.zeros((0, *best.source.label_shape, len(best.source.class_names)), np.float32)
            return np.concatenate([*logits, empty])

    def export(self, folder: epath.PathLike | None = None) -> epath.Path:
        """Writes the best student as files that do not need this package, as `--mode export` does; see docs/deploy.md.

        Args:
          folder: a new or empty folder, or one of an earlier export; None for `workdir/export`.

        Returns:
          The folder.

        Raises:
          UserError: if there is no checkpoint yet, the folder contains other files, or the model cannot be traced for
            batches of any size.
        """
        from ldrld_jax.deploy.export import export  # the only import that runs up, see tests/imports_test.py

        self._check_trained()
        return export(config_lib.resolve(self.config, self.given.methods), self.workdir, folder, given=self.given)

    def _check_trained(self) -> None:
        """Raises a UserError if there is no checkpoint yet."""
        if not Checkpoints(self.workdir / "checkpoints").steps:
            raise UserError(f"{self.workdir} has no checkpoint yet. Train the run first.")

    @contextlib.contextmanager
    def _best(self) -> Iterator[Best]:
        self._check_trained()
        config = config_lib.resolve(self.config, self.given.methods)
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        steps = checkpoints.by_preference()[:1]
        saved = [(step, checkpoints.arrays(step, "model")) for step in steps if step in checkpoints.readable_steps]
        with precision_scope(config.precision, config.matmul_precision):
            if self._kept is None or self._kept[0] != (config, saved) or not saved:
                self._kept = (config, saved), open_best(config, self.workdir, self.given)
            yield self._kept[1]


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    leave_within: float | None = None,
    profile: str | None = None,
    file: str | None = None,
    given: Given = NOTHING,
) -> dict[str, Any]:
    """Trains the student of a config, after its teacher if that has a recipe; resumes an interrupted run.

    Args:
      config: of `ldrld_jax.config.load`.
      workdir: the folder of the run's files: config.json, metrics.jsonl, summary.json, checkpoints/.
      leave_within: see `catch_signals`.
      profile: a directory for a trace of some of the student's steps.
      file: the config file that the config is of, for warnings about what differs from it.
      given: parts that are objects.

    Returns:
      The content of summary.json.

    Raises:
      UserError: if the input is wrong; the workdir is untouched.
      NonFiniteError: if the loss is not finite.
      Interrupted: on SIGTERM, SIGINT or SIGHUP, once the state is saved.
    """
    on_host = given.host_teacher(config) is not None
    remarks = config_lib.remarks(config, file, given.methods, on_host=on_host)
    config = pinned(config_lib.resolve(config, given.methods), epath.Path(workdir))
    check_same(of_all(config))
    catching = catch_signals_of_all() if jax.distributed.is_initialized() else catch_signals(leave_within)
    scope = precision_scope(config.precision, config.matmul_precision)
    with _alone(), keep_compiled(config.compile_cache), scope, workers.scope(), catching as signals:
        return _train(config, epath.Path(workdir), signals, "student", given, profile, remarks)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Refuses a run while another thread has one: precision and asynchronous checkpoints are the whole process's.

    A run within a callback of another, in its thread, is fine.
    """
    if not _training.acquire(blocking=False):
        raise UserError(
            "another thread of this process is training. Start one run after another, or each in a process of its own."
        )
    try:
        yield
    finally:
        _training.release()


def evaluate(config: ConfigDict, workdir: epath.PathLike, *, given: Given = NOTHING) -> dict[str, float]:
    """Returns cross-entropy, top-1 and top-5 of a run's best checkpoint on the evaluation split of `config`.

    Args:
      config: of the run, see `ldrld_jax.config.load_run`.
      workdir: the run's folder.
      given: parts that are objects; their metrics are measured as well.

    Raises:
      UserError: if there is no such run, or it trained another model.
    """
    config = config_lib.resolve(config, given.methods)
    check_same(of_all(config))
    scope = precision_scope(config.precision, config.matmul_precision)
    with keep_compiled(config.compile_cache), scope, workers.scope():
        mesh = make_mesh(config.mesh.data, config.mesh.model)
        best = open_best(config, workdir, given)
        check_metrics(given.metrics, config.eval_batch_size, best.source, config.precision)
        evaluator = Evaluator(best.network, best.source, config, mesh, given.metrics)
        variables = Placement(mesh, config.mesh.fsdp).put_variables(best.variables)
        with waiting(evaluator.doing) as at:
            return evaluator(variables, lambda: at(evaluator.doing))


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    signals: Signals,
    role: str,
    given: Given,
    profile: str | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    run = Run.plan(config, workdir, given=given)
    folder = RunFolder(run)
    folder.check()
    for remark in folder.remarks():
        say(remark)
    if (summary := folder.finished()) is not None:
        say(
            f"the {role}'s run in {workdir} is complete: {counted(run.config.epochs, 'epoch')}, "
            f"{counted(run.steps, 'step')}."
        )
    else:
        say(opening(run, role))
        _warn(run, [*remarks, *warnings(run)])
        with waiting(f"making the {role}"):
            student = run.make_student()  # first: a wrong student.checkpoint must not wait for a teacher
        run.read_samples()
        train_teacher = functools.partial(_train_teacher, signals=signals, given=given.for_teacher())
        teacher = obtain_teacher(run, student[0], signals, train_teacher)
        if teacher is not None and not isinstance(teacher, SelfTeacher):
            _warn(run, teacher_warnings(run, checkpoints_of(run), _measured(teacher)))
        summary = fit(run, student, teacher, signals, role, profile)
    if role == "student":
        say(f"\n{summary_table(summary, str(workdir))}")
    return summary


def _measured(teacher: Teacher) -> float | None:
    """Returns a teacher's top-1 in percent: on the evaluation split, or of a file of logits on the training images."""
    return teacher.top1_in_training if isinstance(teacher, StoredTeacher) and teacher.top1 is None else top1_of(teacher)


def _warn(run: Run, lines: Iterable[str]) -> None:
    """Says warnings, and keeps them for the run's summary."""
    for line in lines:
        say(f"warning: {line}.")
        run.warnings.append(line)


def _train_teacher(recipe: ConfigDict, workdir: epath.Path, *, signals: Signals, given: Given) -> None:
    """Trains a teacher, or finds it trained; of several runs that share it one trains, and the others wait."""
    told = False
    while True:
        try:
            _train(config_lib.resolve(recipe), workdir, signals, "teacher", given)
            signals.end()
            return
        except LockedError:
            if jax.process_count() > 1:
                raise
        if not told:
            say(f"another run trains the teacher in {workdir}: waiting for it")
        told = True
        while is_locked(workdir):
            signals.check()
            time.sleep(_POLL_SECONDS)
