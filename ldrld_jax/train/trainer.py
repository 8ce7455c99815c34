"""What the command line does with a config: a run with its teacher before it, or an evaluation."""

import dataclasses
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.logit_store.feed import LogitFeed, missing_epochs, open_store
from ldrld_jax.record.console import say, summary_table
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.runtime.hosts import catch_signals_of_all
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.signals import Signals, catch_signals
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.loop import Teacher, fit
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import Network


def train(
    config: ConfigDict, workdir: epath.PathLike, *, leave_within: float | None = None, profile: str | None = None
) -> dict[str, Any]:
    """Trains the student of a config, its teacher first where that is a recipe; resumes what it finds.

    Args:
      config: of `ldrld_jax.config.load`.
      workdir: where the run's files lie: config.json, metrics.jsonl, summary.json, checkpoints/.
      leave_within: see `catch_signals`.
      profile: a directory for a trace of some of the student's steps.

    Returns:
      What stands in summary.json.

    Raises:
      UserError: if the input is wrong; the workdir has not been touched.
      NonFiniteError: if the loss is not finite.
      Interrupted: if SIGTERM or SIGINT came; the state is saved.
    """
    keep_compiled(config.compile_cache)
    catching = catch_signals_of_all() if jax.distributed.is_initialized() else catch_signals(leave_within)
    with precision_scope(config.precision, config.matmul_precision), catching as signals:
        return _train(config, epath.Path(workdir), signals, "student", profile)


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 of a run's best checkpoint on the evaluation split of `config`.

    Raises:
      UserError: if there is no such run, or it trained another model.
    """
    keep_compiled(config.compile_cache)
    with precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config_lib.resolve(config), epath.Path(workdir))
        network, variables = run.load(str(workdir), config.student.model, config.data)
        return Evaluator(network, run.eval_source, run.config, run.mesh)(variables)


def _train(
    config: ConfigDict, workdir: epath.Path, signals: Signals, role: str, profile: str | None = None
) -> dict[str, Any]:
    run = Run.plan(config_lib.resolve(config), workdir)
    run.check_workdir()
    if (summary := run.finished()) is not None:
        say(f"the {role}'s run in {workdir} is complete: {summary['epochs']} epochs, {summary['steps']} steps.")
    else:
        student = run.create()  # first: a wrong student.checkpoint must not wait for a teacher
        summary = fit(run, student, obtain_teacher(run, student[0], signals), signals, role, profile)
    if role == "student":
        say(f"\n{summary_table(summary, str(workdir))}")
    return summary


def obtain_teacher(run: Run, student: Network, signals: Signals) -> Teacher | None:
    """The teacher, loaded or trained, and measured; None for plain training.

    Raises:
      UserError: if it does not load, or scores less than `teacher.min_top1`.
    """
    config = run.config.teacher
    if not run.objective.methods:
        return None
    if config.model == config_lib.SELF:
        return Teacher(student)
    paths = config.checkpoint.split(",") if config.checkpoint else _train_teachers(run, signals)
    teacher = Teacher.read(run, paths)
    store = open_store(run, teacher.network, teacher.variables) if run.config.logits else None
    top1 = store.teacher_top1(run.config.data.eval_split) if store else None
    missing = missing_epochs(run, store) if store else None
    if missing != [] or top1 is None:  # else nobody runs it
        teacher = teacher.placed(run)
    if top1 is None:
        evaluate = Evaluator(teacher.network, run.eval_source, run.config, run.mesh)
        top1 = evaluate(teacher.variables, signals.check)["top1"]
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
    feed = LogitFeed(run, store, (teacher.network, teacher.variables) if missing else None)
    return Teacher(teacher.network, top1=top1, logits=feed)


def _train_teachers(run: Run, signals: Signals) -> list[str]:
    """Trains each teacher in its workdir, or finds it trained; gives the workdirs."""
    places = config_lib.teacher_workdirs(run.config, run.workdir)
    for i, (model, place) in enumerate(places):
        recipe = config_lib.teacher_recipe(run.config, model)
        recipe.seed += i  # an ensemble of one model is one of several seeds
        _train(recipe, place, signals, role="teacher")
    return [str(place) for _, place in places]
