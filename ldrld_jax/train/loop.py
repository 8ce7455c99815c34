"""The training loop: from a run's last checkpoint, or its first step, to its summary."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.errors import UserError
from ldrld_jax.files import locked, replace_text
from ldrld_jax.logit_store.feed import LogitFeed
from ldrld_jax.record.console import say
from ldrld_jax.record.recorder import Recorder
from ldrld_jax.runtime.hosts import first, together
from ldrld_jax.runtime.mesh import model_shardings, replicated
from ldrld_jax.runtime.profiling import Profile
from ldrld_jax.runtime.signals import Interrupted, Signals
from ldrld_jax.runtime.watchdog import Watchdog
from ldrld_jax.train.dispatch import Dispatcher, Step
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.objective import Objective
from ldrld_jax.train.optim import make_optimizer
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import Ensemble, Mixup, Network, TrainState, Variables, make_train_step, trainable


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who teaches.

    Attributes:
      network: frozen, in evaluation mode.
      variables: its weights; None for the student's own moving average, and where `logits` has them.
      top1: in percent on the evaluation split; None for the student's own moving average.
      logits: gives its logits beside each batch, from a store; None where the step runs the network.
    """

    network: Network | Ensemble
    variables: Any = None
    top1: float | None = None
    logits: LogitFeed | None = None

    @classmethod
    def load(cls, run: Run, paths: Sequence[str] | None) -> "Teacher":
        """As `read`, the weights on all devices."""
        return cls.read(run, paths).placed(run)

    @classmethod
    def read(cls, run: Run, paths: Sequence[str] | None) -> "Teacher":
        """The networks of `teacher.model` from their checkpoints, of paths None with random weights; several as one.

        The weights are not on the mesh yet.

        Raises:
          UserError: if one does not load, or there are not as many paths as models.
        """
        config, models = run.config.teacher, config_lib.teacher_models(run.config)
        if paths is None:
            loaded = [run.fresh(model, config.data, config.seed) for model in models]
        elif len(paths) != len(models):
            raise UserError(
                f"teacher.checkpoint must name a checkpoint for each of teacher.model ({len(models)}: "
                f"{config.model}), got {len(paths)}. Separate them by commas."
            )
        else:
            loaded = [run.read(path, model, config.data) for path, model in zip(paths, models, strict=True)]
        networks, variables = zip(*loaded, strict=True)
        return cls(*loaded[0]) if len(loaded) == 1 else cls(Ensemble(networks, config.ensemble), variables)

    def placed(self, run: Run) -> "Teacher":
        """The teacher with its weights on all devices."""
        several = isinstance(self.network, Ensemble)
        variables = tuple(map(run.place, self.variables)) if several else run.place(self.variables)
        return dataclasses.replace(self, variables=variables)


def fit(
    run: Run,
    student: tuple[Network, Variables],
    teacher: Teacher | None,
    signals: Signals,
    role: str,
    profile: str | None = None,
) -> dict[str, Any]:
    """Trains from the last checkpoint, or from `student`, to the end; gives the summary.

    Args:
      run: the plan.
      student: before its first step.
      teacher: None for plain training.
      signals: looked at after each dispatch.
      role: "student" or "teacher", for what is shown and logged.
      profile: a directory for a trace of some steps, see `Profile`.

    Raises:
      NonFiniteError: if the loss is not finite.
      Interrupted: if a signal came; the state is saved.
    """
    config, (network, variables) = run.config, student
    optimizer = make_optimizer(config.optim, run.schedule)
    state = initial_state(run, variables, optimizer)
    step_fn = make_step(run, network, teacher, optimizer)
    if remark := run.of_microbatches(variables):
        say(remark)
    run.workdir.mkdir(parents=True, exist_ok=True)
    with locked(run.workdir) if first() else contextlib.nullcontext():
        run.check_workdir()  # again: nobody else can change it any more
        recorder = _train(run, role, state, step_fn, network, teacher, signals, profile)
        summary = _summary(run, teacher, recorder)
        if first():
            replace_text(run.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    together(f"the {role} is trained")
    return summary


def _train(
    run: Run,
    role: str,
    state: TrainState,
    step_fn: Step,
    network: Network,
    teacher: Teacher | None,
    signals: Signals,
    profile: str | None,
) -> Recorder:
    config = run.config
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.log.watchdog_seconds))
        checkpoints = stack.enter_context(contextlib.closing(run.checkpoints()))
        restored = checkpoints.resume(_trees(state))
        if first():
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
        frozen, logits = (teacher.variables, teacher.logits) if teacher else (None, None)
        shardings = placement(run, state), replicated(run.mesh)
        advance = Dispatcher(run, step_fn, start, shardings, watchdog.at, logits)
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


def make_step(run: Run, student: Network, teacher: Teacher | None, optimizer: optax.GradientTransformation) -> Step:
    """The train step that a run's config asks for."""
    config = run.config
    return make_train_step(
        student,
        teacher.network if teacher else None,
        run.objective,
        optimizer,
        schedule=run.schedule,
        steps_per_epoch=run.batches.steps_per_epoch,
        ema_decay=config.ema_decay,
        mixup=Mixup(config.data.mixup, config.seed) if config.data.mixup else None,
        remat=config.remat,
        accumulate=config.accumulate,
        skip_non_finite=config.non_finite == "skip",
        # XLA for CPU computes convolutions inside a loop several times slower than outside of one.
        unroll=run.mesh.devices.flat[0].platform == "cpu",
    )


def initial_state(run: Run, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, on all devices."""
    state = first_state(run, variables, optimizer)
    return jax.device_put(state, placement(run, state))


def first_state(run: Run, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, wherever its arrays happen to lie."""
    learnt = method_params(run.objective)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=variables,
        method_params=learnt,
        opt_state=optimizer.init(trainable(variables, learnt)),
        # A copy: the state's buffers are donated, none of them twice.
        ema=None if run.config.ema_decay is None else jax.tree.map(jnp.copy, variables),
    )


def placement(run: Run, state: TrainState) -> TrainState:
    """How a state lies on the mesh: a state of shardings."""
    everywhere: Any = replicated(run.mesh)
    return TrainState(
        step=everywhere,
        student=run.placement(state.student),
        method_params=jax.tree.map(lambda _: everywhere, state.method_params),
        opt_state=model_shardings(state.opt_state, run.mesh, fsdp=run.config.mesh.fsdp),
        ema=None if state.ema is None else run.placement(state.ema),
    )


def method_params(objective: Objective) -> dict[str, Any]:
    """What the methods learn, before the first step, by method."""
    methods = objective.methods.items()
    return {name: method.init(cfg) for name, (method, cfg, _) in methods if method.init is not None}


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
        "skipped_steps": recorder.skipped,
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
