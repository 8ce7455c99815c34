"""The training loop: from a run's last checkpoint, or its first step, to its summary."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldrld_jax.checkpoint import Checkpoints
from ldrld_jax.console import say
from ldrld_jax.dispatch import Dispatcher
from ldrld_jax.evaluator import Evaluator
from ldrld_jax.files import locked, replace_text
from ldrld_jax.mesh import replicated
from ldrld_jax.optim import make_optimizer
from ldrld_jax.recorder import Recorder
from ldrld_jax.run import Run
from ldrld_jax.signals import Interrupted, Signals
from ldrld_jax.train_step import Ensemble, Mixup, Network, TrainState, Variables, make_train_step, trainable
from ldrld_jax.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who teaches.

    Attributes:
      network: frozen, in evaluation mode.
      variables: its weights; None for the student's own moving average.
      top1: in percent on the evaluation split; None likewise.
    """

    network: Network | Ensemble
    variables: Any = None
    top1: float | None = None


def fit(
    run: Run, student: tuple[Network, Variables], teacher: Teacher | None, signals: Signals, role: str
) -> dict[str, Any]:
    """Trains from the last checkpoint, or from `student`, to the end; gives the summary.

    Args:
      run: the plan.
      student: before its first step.
      teacher: None for plain training.
      signals: looked at after each dispatch.
      role: "student" or "teacher", for what is shown and logged.

    Raises:
      NonFiniteError: if the loss is not finite.
      Interrupted: if a signal came; the state is saved.
    """
    config, (network, variables) = run.config, student
    optimizer = make_optimizer(config.optim, run.schedule)
    state = initial_state(run, variables, optimizer)
    step_fn = make_train_step(
        network,
        teacher.network if teacher else None,
        run.objective,
        optimizer,
        schedule=run.schedule,
        steps_per_epoch=run.batches.steps_per_epoch,
        ema_decay=config.ema_decay,
        mixup=Mixup(config.data.mixup, config.seed) if config.data.mixup else None,
    )
    run.workdir.mkdir(parents=True, exist_ok=True)
    with locked(run.workdir):
        run.check_workdir()  # again: nobody else can change it any more
        recorder = _train(run, role, state, step_fn, network, teacher, signals)
        summary = _summary(run, teacher, recorder)
        replace_text(run.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _train(
    run: Run,
    role: str,
    state: TrainState,
    step_fn: Callable[..., Any],
    network: Network,
    teacher: Teacher | None,
    signals: Signals,
) -> Recorder:
    config = run.config
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.log.watchdog_seconds))
        checkpoints = stack.enter_context(contextlib.closing(run.checkpoints()))
        restored = checkpoints.resume(_trees(state))
        replace_text(run.workdir / "config.json", config.to_json(indent=2) + "\n")
        start, host = (restored.step, restored.host) if restored else (0, None)
        span = dict(start=start, steps=run.steps, steps_per_epoch=run.batches.steps_per_epoch)
        recorder = stack.enter_context(contextlib.closing(Recorder(run.workdir, config, role, host, **span)))
        evaluate = Evaluator(network, run.eval_source, config, run.mesh)
        pause = _Pause(run, evaluate, recorder, checkpoints, signals, watchdog)
        if restored:
            state = _state(restored.trees)
            say(f"resuming the {role} at step {start} of {run.steps}")
            if run.evaluates_at(start) and not recorder.evaluated_at(start):  # a signal had cut that short
                pause(start, state)
        elif teacher and teacher.top1 is not None:
            recorder.write(0, "teacher_eval", {"top1": teacher.top1})
        advance = Dispatcher(run, step_fn, start, replicated(run.mesh), watchdog.at)
        frozen = teacher.variables if teacher else None
        step, pending = start, None
        while step < run.steps:
            # Dispatched, not waited for; meanwhile the host looks at the dispatch before.
            step, state, metrics = advance(step, state, frozen)
            if pending is not None:
                recorder.add(*pending)
            pending = step, metrics
            if run.evaluates_at(step) or run.saves_at(step) or signals.stop_at(step):
                recorder.add(*pending)
                pending = None
                pause(step, state)
    return recorder


@dataclasses.dataclass
class _Pause:
    """What a run does between two steps: it evaluates where that is due, saves, and stops after a signal."""

    run: Run
    evaluate: Evaluator
    recorder: Recorder
    checkpoints: Checkpoints
    signals: Signals
    watchdog: Watchdog

    def __call__(self, step: int, state: TrainState) -> None:
        """Raises Interrupted once the state is saved, if a signal came; unless the run has ended with this step."""
        top1 = self._rate(step, state) if self.run.evaluates_at(step) else None
        self.signals.in_time = True
        self.watchdog.at(f"saving after step {step}")
        self.checkpoints.save(step, _trees(state), self.recorder.to_json(), top1)
        ended = step == self.run.steps and top1 is not None
        if self.signals.received is not None and not ended:
            raise Interrupted(self.signals.received, step)
        self.signals.in_time = False

    def _rate(self, step: int, state: TrainState) -> float | None:
        """The top-1; None if a signal came: a long evaluation is left to the run that resumes."""
        try:
            values = self.evaluate(state.evaluated, lambda: self._each_batch(step))
        except Interrupted:
            return None
        self.recorder.evaluated(step, values)
        return values["top1"]

    def _each_batch(self, step: int) -> None:
        self.watchdog.at(f"evaluating after step {step}")
        self.signals.check()


def initial_state(run: Run, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, on all devices."""
    methods = run.objective.methods.items()
    learnt = {name: method.init(cfg) for name, (method, cfg, _) in methods if method.init is not None}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        student=variables,
        method_params=learnt,
        opt_state=optimizer.init(trainable(variables, learnt)),
        # A copy: the state's buffers are donated, none of them twice.
        ema=None if run.config.ema_decay is None else jax.tree.map(jnp.copy, variables),
    )
    return jax.device_put(state, replicated(run.mesh))


def _summary(run: Run, teacher: Teacher | None, recorder: Recorder) -> dict[str, Any]:
    config, summary = run.config, dict[str, Any]()
    for when, evaluation in (("best", recorder.best), ("last", recorder.last)):
        summary |= {f"{when}_{name}": evaluation[name] for name in ("top1", "top5", "epoch")}
    return {
        "method": config.method,
        "seed": config.seed,
        "student": config.student.model,
        "teacher": config.teacher.model if teacher else None,
        "teacher_top1": teacher.top1 if teacher else None,
        **summary,
        "epochs": config.epochs,
        "steps": run.steps,
        "examples_per_second": recorder.examples_per_second,
    }


def _trees(state: TrainState) -> dict[str, Any]:
    """A train state as the trees of a checkpoint: `model`, which others load, holds the evaluated weights."""
    training = {"step": state.step, "method_params": state.method_params, "opt_state": state.opt_state}
    if state.ema is not None:
        training["student"] = state.student._asdict()
    return {"model": state.evaluated._asdict(), "training": training}


def _state(trees: dict[str, Any]) -> TrainState:
    evaluated, training = Variables(**trees["model"]), trees["training"]
    averaged = "student" in training
    return TrainState(
        step=training["step"],
        student=Variables(**training["student"]) if averaged else evaluated,
        method_params=training["method_params"],
        opt_state=training["opt_state"],
        ema=evaluated if averaged else None,
    )
