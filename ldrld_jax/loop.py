"""The training loop: from a run's last checkpoint, or its first step, to its summary."""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldrld_jax.checkpoint import Checkpoints
from ldrld_jax.console import say
from ldrld_jax.dispatch import Dispatcher
from ldrld_jax.evaluator import Evaluator
from ldrld_jax.mesh import replicated
from ldrld_jax.metrics import replace_text
from ldrld_jax.optim import make_optimizer
from ldrld_jax.recorder import Recorder
from ldrld_jax.run import Run
from ldrld_jax.signals import Interrupted, Signals
from ldrld_jax.train_step import Ensemble, Mixup, Network, TrainState, Variables, make_train_step, trainable


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
    evaluate_weights = Evaluator(network, run.eval_source, config, run.mesh)

    run.workdir.mkdir(parents=True, exist_ok=True)
    replace_text(run.workdir / "config.json", config.to_json(indent=2) + "\n")
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run.workdir / "checkpoints")))
        start = checkpoints.latest_step or 0
        span = dict(start=start, steps=run.steps, steps_per_epoch=run.batches.steps_per_epoch)
        recorder = stack.enter_context(contextlib.closing(Recorder(run.workdir, config, role, **span)))
        if start:
            state = _state(checkpoints.restore(start, _trees(state)))
            recorder.restore(checkpoints.host(start))
            say(f"resuming the {role} at step {start} of {run.steps}")
        elif teacher and teacher.top1 is not None:
            recorder.write(0, "teacher_eval", {"top1": teacher.top1})
        advance = Dispatcher(run, step_fn, start, replicated(run.mesh))
        frozen = teacher.variables if teacher else None
        step, pending = start, None
        while step < run.steps:
            # Dispatched, not waited for; meanwhile the host looks at the dispatch before.
            step, state, metrics = advance(step, state, frozen)
            if pending is not None:
                recorder.add(*pending)
            pending = step, metrics
            rated = run.evaluates_at(step)
            if rated or run.saves_at(step) or signals.received:
                recorder.add(*pending)
                pending = None
                if rated:
                    recorder.evaluated(step, evaluate_weights(state.evaluated))
                top1 = recorder.last["top1"] if rated else None
                checkpoints.save(step, _trees(state), recorder.to_json(), top1)
            if signals.received and step < run.steps:
                raise Interrupted(signals.received, step)
    summary = _summary(run, teacher, recorder)
    replace_text(run.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


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
