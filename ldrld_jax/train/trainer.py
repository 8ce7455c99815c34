"""Runs of a config: training, with the teacher first, and evaluation."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.files import LockedError, is_locked
from ldrld_jax.record.console import say, summary_table
from ldrld_jax.record.reader import check_classes
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.runtime.hosts import catch_signals_of_all
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.signals import Signals, catch_signals
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.folder import RunFolder
from ldrld_jax.train.loop import fit
from ldrld_jax.train.opening import opening, teacher_warnings, warnings
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import SelfTeacher, checkpoints_of, obtain_teacher

_POLL_SECONDS = 1.0


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    leave_within: float | None = None,
    profile: str | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the student of a config, after its teacher if that has a recipe; resumes an interrupted run.

    Args:
      config: of `ldrld_jax.config.load`.
      workdir: the folder of the run's files: config.json, metrics.jsonl, summary.json, checkpoints/.
      leave_within: see `catch_signals`.
      profile: a directory for a trace of some of the student's steps.
      remarks: warnings of the caller's, said with the run's own.

    Returns:
      The content of summary.json.

    Raises:
      UserError: if the input is wrong; the workdir is untouched.
      NonFiniteError: if the loss is not finite.
      Interrupted: on SIGTERM or SIGINT, once the state is saved.
    """
    remarks = [*remarks, *config_lib.unread(config)]
    config = config_lib.resolve(config)
    keep_compiled(config.compile_cache)
    catching = catch_signals_of_all() if jax.distributed.is_initialized() else catch_signals(leave_within)
    with precision_scope(config.precision, config.matmul_precision), catching as signals:
        return _train(config, epath.Path(workdir), signals, "student", profile, remarks)


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Returns cross-entropy, top-1 and top-5 of a run's best checkpoint on the evaluation split of `config`.

    Raises:
      UserError: if there is no such run, or it trained another model.
    """
    config = config_lib.resolve(config)
    keep_compiled(config.compile_cache)
    with precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config, epath.Path(workdir))
        check_classes(workdir, run.batches.source.class_names, whose="the run")
        network, variables = run.networks.restore(str(workdir), config.student.model, config.data)
        return Evaluator(network, run.eval_source, run.config, run.mesh)(run.placement.put_variables(variables))


def _train(
    config: ConfigDict,
    workdir: epath.Path,
    signals: Signals,
    role: str,
    profile: str | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    run = Run.plan(config, workdir)
    folder = RunFolder(run)
    folder.check()
    if remark := folder.remark():
        say(remark)
    if (summary := folder.finished()) is not None:
        say(f"the {role}'s run in {workdir} is complete: {run.config.epochs} epochs, {run.steps} steps.")
    else:
        say(opening(run, role))
        _warn(run, [*remarks, *warnings(run)])
        student = run.make_student()  # first: a wrong student.checkpoint must not wait for a teacher
        run.look()
        teacher = obtain_teacher(run, student[0], signals, lambda recipe, place: _train_teacher(recipe, place, signals))
        if teacher is not None and not isinstance(teacher, SelfTeacher):
            _warn(run, teacher_warnings(run, checkpoints_of(run), teacher.top1))
        summary = fit(run, student, teacher, signals, role, profile)
    if role == "student":
        say(f"\n{summary_table(summary, str(workdir))}")
    return summary


def _warn(run: Run, lines: Iterable[str]) -> None:
    """Says warnings, and keeps them for the run's summary."""
    for line in lines:
        say(f"warning: {line}.")
        run.warnings.append(line)


def _train_teacher(recipe: ConfigDict, workdir: epath.Path, signals: Signals) -> None:
    """Trains a teacher, or finds it trained; of several runs that share it one trains, and the others wait."""
    waiting = False
    while True:
        try:
            _train(config_lib.resolve(recipe), workdir, signals, "teacher")
            return
        except LockedError:
            if jax.process_count() > 1:
                raise
        if not waiting:
            say(f"another run trains the teacher in {workdir}: waiting for it")
        waiting = True
        while is_locked(workdir):
            signals.check()
            time.sleep(_POLL_SECONDS)
