"""The training loop, from the last checkpoint or the first step to the summary."""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.data import workers
from ldrld_jax.errors import NonFiniteError
from ldrld_jax.files import locked, replace_text
from ldrld_jax.losses import LDRLDConfig
from ldrld_jax.record.console import say
from ldrld_jax.record.recorder import Recorder
from ldrld_jax.record.writer import closing_all
from ldrld_jax.runtime.hosts import first, together
from ldrld_jax.runtime.profiling import Profile
from ldrld_jax.runtime.signals import Interrupted, Signals
from ldrld_jax.runtime.watchdog import Watchdog
from ldrld_jax.train.dispatch import Dispatcher, Step
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.folder import RunFolder
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import TrainState, Variables
from ldrld_jax.train.step import Mixup, Network, make_train_step
from ldrld_jax.train.teacher import Teacher, network_of, top1_of, weights_of


def fit(
    run: Run,
    student: tuple[Network, Variables],
    teacher: Teacher | None,
    signals: Signals,
    role: str,
    profile: str | None = None,
) -> dict[str, Any]:
    """Trains from the last checkpoint, or from `student`, to the end, and returns the summary.

    Args:
      run: the plan.
      student: before its first step.
      teacher: None for plain training.
      signals: looked at after each dispatch.
      role: "student" or "teacher", named in messages and logs.
      profile: a directory for a trace of some steps, see `Profile`.

    Raises:
      NonFiniteError: if the loss is not finite.
      Interrupted: if a signal came; the state is saved.
    """
    network, variables = student
    optimizer = run.make_optimizer()
    step_fn = make_step(run, network, teacher, optimizer)
    if remark := run.of_microbatches(variables):
        say(remark)
    run.workdir.mkdir(parents=True, exist_ok=True)
    with locked(run.workdir) if first() else contextlib.nullcontext():
        folder = RunFolder(run)
        folder.check()  # again: nobody else can change it any more
        recorder = _train(folder, role, student, optimizer, step_fn, teacher, signals, profile)
        summary = _summary(run, teacher, recorder)
        if first():
            replace_text(run.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    together(f"the {role} is trained")
    return summary


def _train(
    folder: RunFolder,
    role: str,
    student: tuple[Network, Variables],
    optimizer: optax.GradientTransformation,
    step_fn: Step,
    teacher: Teacher | None,
    signals: Signals,
    profile: str | None,
) -> Recorder:
    run, config, (network, variables) = folder.run, folder.run.config, student
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.log.watchdog_seconds, others=workers.describe))
        checkpoints = stack.enter_context(contextlib.closing(folder.checkpoints()))
        restored = checkpoints.resume(run.state_shapes(variables, optimizer).to_trees())
        # Only one of the two is made: a second state would occupy the devices until the run ends.
        state = TrainState.from_trees(restored.trees) if restored else run.make_state(variables, optimizer)
        if first():
            folder.write()
        start, host = (restored.step, restored.host) if restored else (0, None)
        span = dict(start=start, steps=run.steps, steps_per_epoch=run.batches.steps_per_epoch)
        writers = stack.enter_context(closing_all(run.given.all_writers(config, run.workdir) if first() else []))
        recorder = stack.enter_context(contextlib.closing(Recorder(run.workdir, config, role, host, writers, **span)))
        evaluate = Evaluator(network, run.eval_source, config, run.mesh, run.given.metrics)

        def at(doing: str) -> None:
            watchdog.at(doing)
            recorder.at(doing)

        pause = _Pause(run, evaluate, recorder, checkpoints, signals, at)
        if restored:
            say(f"resuming the {role} at step {start} of {run.steps}")
            if run.evaluates_at(start) and not recorder.evaluated_at(start):  # a signal had cut that short
                pause(start, state)
        elif (top1 := top1_of(teacher)) is not None:
            recorder.write(0, "teacher_eval", {"top1": top1})
        frozen, advance = weights_of(teacher), Dispatcher(run, step_fn, state, teacher, start, at)
        trace = stack.enter_context(contextlib.closing(Profile(profile, start=start, steps=run.steps)))
        step, pending = start, None
        while step < run.steps:
            # Dispatched, not waited for; meanwhile the host looks at the dispatch before.
            step, state, metrics = advance(step, state, frozen)
            trace.at(step, metrics)
            if pending is not None:
                recorder.add(*pending)
            pending = step, metrics
            stop = signals.stop_at(step)  # asked after every dispatch: several hosts agree on one
            if stop or run.evaluates_at(step) or run.saves_at(step):
                recorder.add(*pending)
                pending = None
                pause(step, state)
            checkpoints.write_due()
        checkpoints.wait()  # here: the writers are closed before the checkpoints, as those of a run that ended well
    return recorder


@dataclasses.dataclass
class _Pause:
    """The work due between two steps: evaluation, checkpointing, stopping on a signal."""

    run: Run
    evaluate: Evaluator
    recorder: Recorder
    checkpoints: Checkpoints
    signals: Signals
    at: Callable[[str], None]

    def __call__(self, step: int, state: TrainState) -> None:
        """Evaluates if that is due, saves, and raises Interrupted if a signal came before the last step."""
        try:
            top1 = self._rate(step, state) if self.run.evaluates_at(step) else None
        except NonFiniteError:
            raise
        except Exception:  # of the images or of a user's writer, not of the weights
            if jax.process_count() == 1:  # the other processes are in the evaluation, and cannot save with this one
                self._save(step, state, None)
                self.checkpoints.wait()
            raise
        self._save(step, state, top1)
        self._call_back(step, state, rated=top1 is not None)
        ended = step == self.run.steps and top1 is not None
        if self.signals.received is not None and not ended:
            raise Interrupted(self.signals.received, step)
        self.signals.in_time = ended  # what is left then is to write the record
        self.recorder.go_on()

    def _call_back(self, step: int, state: TrainState, *, rated: bool) -> None:
        for callback in self.run.given.callbacks:
            self.at(f"a callback after step {step}")
            if rated and callback.after_evaluation is not None:
                callback.after_evaluation(step, dict(self.recorder.last), state.evaluated)
            if callback.after_save is not None:
                callback.after_save(step, state.evaluated)

    def _save(self, step: int, state: TrainState, top1: float | None) -> None:
        self.signals.in_time = True
        self.at(f"saving after step {step}")
        self.recorder.flush()
        self.checkpoints.save(step, state.to_trees(), self.recorder.to_json(), top1)

    def _rate(self, step: int, state: TrainState) -> float | None:
        """Returns the top-1; None if a signal came, which leaves the evaluation to the run that resumes."""
        try:
            values = self.evaluate(state.evaluated, lambda: self._each_batch(step), self.signals.check)
        except Interrupted:
            return None
        except NonFiniteError as error:
            raise NonFiniteError(f"after step {step}: {error} The last checkpoint is untouched.") from error
        self.recorder.evaluated(step, values)
        return values["top1"]

    def _each_batch(self, step: int) -> None:
        self.at(f"{self.evaluate.doing} after step {step}")
        self.signals.check()


def make_step(run: Run, student: Network, teacher: Teacher | None, optimizer: optax.GradientTransformation) -> Step:
    """Returns the train step of a run's config."""
    config = run.config
    return make_train_step(
        student,
        network_of(teacher),
        run.objective,
        optimizer,
        schedule=None if run.given.optimizer is not None else run.schedule,
        seed=config.seed,
        extra_metrics=run.given.metrics,
        steps_per_epoch=run.batches.steps_per_epoch,
        ema_decay=config.ema_decay,
        mixup=Mixup(config.data.mixup, config.seed) if config.data.mixup else None,
        remat=config.remat,
        accumulate=config.accumulate,
        skip_non_finite=config.non_finite == "skip",
        watch_optimizer=config.optim.name != "sgd",  # whose weights show what their gradients were
        # XLA for CPU computes convolutions inside a loop several times slower than outside of one.
        unroll=run.mesh.devices.flat[0].platform == "cpu",
        compared_depth=_compared_depth(config),
    )


def _compared_depth(config: ConfigDict) -> int:
    """Returns the number of largest classes that the metrics compare: LDRLD's depth, if so many are stored."""
    depth, stored = config.loss.get("ldrld", LDRLDConfig()).depth, config.logits.get("top_k")
    return depth if stored is None else min(depth, stored)


def _summary(run: Run, teacher: Teacher | None, recorder: Recorder) -> dict[str, Any]:
    config, summary = run.config, dict[str, Any]()
    for when, evaluation in (("best", recorder.best), ("last", recorder.last)):
        summary |= {f"{when}_{name}": evaluation[name] for name in ("top1", "top5", "epoch")}
    return {
        "method": config.method,
        "seed": config.seed,
        "student": config.student.model,
        "teacher": config.teacher.model if teacher else None,
        "teacher_top1": top1_of(teacher),
        **summary,
        "epochs": config.epochs,
        "steps": run.steps,
        "skipped_steps": recorder.skipped,
        "examples_per_second": recorder.examples_per_second,
        "train_seconds": recorder.seconds,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "warnings": run.warnings,
    }
