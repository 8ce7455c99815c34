"""A run from its config to its summary: wires the parts together and owns the loop."""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint import Checkpoints
from ldrld_jax.console import ProgressBar, evaluation_line, say, summary_table
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.stream import Readable, TrainBatches, eval_batches
from ldrld_jax.errors import UserError
from ldrld_jax.losses import LDRLDConfig
from ldrld_jax.mesh import batch_sharding, make_mesh, replicated, to_devices
from ldrld_jax.metrics import Mean, Means, Writer, add, replace_text
from ldrld_jax.networks import create_network, dtypes, load_network
from ldrld_jax.optim import first_decay_epoch, make_optimizer, make_schedule
from ldrld_jax.signals import Interrupted, Signals, catch_signals
from ldrld_jax.train_step import Network, Objective, TrainState, Variables, make_eval_step, make_train_step


class NonFiniteError(RuntimeError):
    """A term of the loss is not finite any more; the message says which, and since which step."""


def train(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Trains the student of a config, its teacher first where that is a recipe; resumes what it finds.

    Args:
      config: of `ldrld_jax.config.load`.
      workdir: where the run's files lie: config.json, metrics.jsonl, summary.json, checkpoints/.

    Returns:
      What stands in summary.json.

    Raises:
      UserError: if the input is wrong; the workdir has not been touched.
      NonFiniteError: if the loss is not finite.
      Interrupted: if SIGTERM or SIGINT came; the state is saved.
    """
    with precision_scope(config.precision), catch_signals() as signals:
        return _train(config, epath.Path(workdir), signals, role="student")


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 of a run's best checkpoint on the evaluation split of `config`.

    Raises:
      UserError: if there is no such run, or it trained another model.
    """
    with precision_scope(config.precision):
        run = Run.plan(config_lib.resolve(config), epath.Path(workdir))
        network, variables = run.load(str(workdir), config.student.model, config.data)
        return Evaluator(network, run.eval_source, run.config, run.mesh)(variables)


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Double precision where a config asks for it: everything that touches its arrays runs inside.

    Raises:
      UserError: if there is no such precision.
    """
    before = jax.config.jax_enable_x64
    # Not the context manager, which holds for one thread: orbax would restore float32 in its own.
    jax.config.update("jax_enable_x64", dtypes(precision)["param_dtype"] == jnp.float64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _train(config: ConfigDict, workdir: epath.Path, signals: Signals, role: str) -> dict[str, Any]:
    run = Run.plan(config_lib.resolve(config), workdir)
    run.check_identity()
    if (summary := run.finished()) is not None:
        say(f"the {role}'s run in {workdir} is complete: {summary['epochs']} epochs, {summary['steps']} steps.")
    else:
        student = run.create()  # first: a wrong student.checkpoint must not wait for a teacher
        summary = run.fit(student, run.obtain_teacher(signals), signals, role)
    if role == "student":
        say(f"\n{summary_table(summary, str(workdir))}")
    return summary


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network and its top-1 in percent on the evaluation split."""

    network: Network
    variables: Variables
    top1: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose config has been checked: its parts, and nothing on disk or device yet."""

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    eval_source: Readable
    batches: TrainBatches
    objective: Objective

    @classmethod
    def plan(cls, config: ConfigDict, workdir: epath.Path) -> "Run":
        """Builds the parts of a resolved config, and finds what is wrong with it before anything is written.

        Raises:
          UserError: the first thing that is wrong.
        """
        for key in ("epochs", "batch_size", "eval_batch_size", "eval_every_epochs"):
            if config[key] < 1:
                raise UserError(f"{key} must be at least 1, got {config[key]}.")
        mesh = make_mesh(config.mesh.data, config.mesh.model)
        batches = _train_batches(config, mesh)
        eval_source = make_eval_source(config.data)
        objective = _objective(config, len(batches.source.class_names))
        run = cls(config, workdir, mesh, eval_source, batches, objective)
        make_optimizer(config.optim, run.schedule)
        jax.eval_shape(lambda: create_network(config.student.model, config.data, seed=0, **run._like_data)[1])
        return run

    @property
    def steps(self) -> int:
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def schedule(self):
        return make_schedule(self.config.optim, steps_per_epoch=self.batches.steps_per_epoch, epochs=self.config.epochs)

    @property
    def _like_data(self) -> dict[str, Any]:
        """What the data and the precision ask of any network."""
        source = self.batches.source
        return dict(
            num_classes=len(source.class_names), channels=source.image_shape[-1], precision=self.config.precision
        )

    def create(self) -> tuple[Network, Variables]:
        """The student before its first step: freshly initialised, or from `student.checkpoint`."""
        config = self.config
        network, variables = create_network(config.student.model, config.data, seed=config.seed, **self._like_data)
        if config.student.checkpoint is not None:
            _, variables = self.load(config.student.checkpoint, config.student.model, config.data)
        return network, variables

    def load(self, path: str, model: str, data: ConfigDict) -> tuple[Network, Variables]:
        """A network from a checkpoint, its weights on all devices."""
        network, variables = load_network(path, model, data, **self._like_data)
        return network, jax.device_put(variables, replicated(self.mesh))

    def check_identity(self) -> None:
        """Raises a UserError unless the workdir is new or holds an earlier part of this very run."""
        path = self.workdir / "config.json"
        if not path.exists():
            return
        theirs, ours = config_lib.identity(json.loads(path.read_text())), config_lib.identity(self.config)
        differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if differing == ["epochs"] and ours["epochs"] > theirs["epochs"]:
            decay, done = first_decay_epoch(self.config.optim), self._saved_steps() / self.batches.steps_per_epoch
            if done < decay:
                return
            raise UserError(
                f"epochs may grow only before the first decay (epoch {decay}), and {self.workdir} is at epoch "
                f"{done:g}. Choose another workdir."
            )
        if differing:
            shown = ", ".join(f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)" for key in differing)
            raise UserError(f"{self.workdir} holds a run of another config: {shown}. Choose another workdir.")

    def _saved_steps(self) -> int:
        directory = self.workdir / "checkpoints"
        if not directory.exists():
            return 0
        with contextlib.closing(Checkpoints(directory, clean=False)) as checkpoints:
            return checkpoints.latest_step or 0

    def finished(self) -> dict[str, Any] | None:
        """The summary, if the run has ended."""
        path = self.workdir / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
        return summary if summary and summary["steps"] == self.steps else None

    def obtain_teacher(self, signals: Signals) -> Teacher | None:
        """The teacher, loaded or trained, and measured; None for plain training.

        Raises:
          UserError: if it does not load, or scores less than `teacher.min_top1`.
        """
        if not self.objective.methods:
            return None
        config = self.config.teacher
        path = config.checkpoint
        if path is None:
            path = config.workdir or str(self.workdir / "teacher")
            _train(config_lib.teacher_recipe(self.config), epath.Path(path), signals, role="teacher")
        network, variables = self.load(path, config.model, config.data)
        top1 = Evaluator(network, self.eval_source, self.config, self.mesh)(variables)["top1"]
        if top1 < config.min_top1:
            raise UserError(
                f"the teacher in {path} has top-1 {top1:.2f} %, and teacher.min_top1 demands {config.min_top1:.2f} %. "
                "Check its checkpoint and its teacher.data.mean and std, or lower teacher.min_top1."
            )
        say(f"teacher {config.model} from {path}  top-1 {top1:.2f}")
        return Teacher(network, variables, top1)

    def fit(
        self, student: tuple[Network, Variables], teacher: Teacher | None, signals: Signals, role: str
    ) -> dict[str, Any]:
        """Trains from the last checkpoint, or from `student`, to the end; gives the summary."""
        config, (network, variables) = self.config, student
        optimizer = make_optimizer(config.optim, self.schedule)
        state = TrainState(jnp.zeros((), jnp.int32), *variables, optimizer.init(variables.params))
        state = jax.device_put(state, replicated(self.mesh))
        step_fn = jax.jit(
            make_train_step(
                network,
                teacher.network if teacher else None,
                self.objective,
                optimizer,
                schedule=self.schedule,
                steps_per_epoch=self.batches.steps_per_epoch,
                depth=_diagnostics_depth(self.objective),
            ),
            donate_argnums=0,
            out_shardings=replicated(self.mesh),
        )
        evaluate_state = Evaluator(network, self.eval_source, config, self.mesh)

        self.workdir.mkdir(parents=True, exist_ok=True)
        replace_text(self.workdir / "config.json", config.to_json(indent=2) + "\n")
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(self.workdir / "checkpoints")))
            start = checkpoints.latest_step or 0
            recorder = stack.enter_context(contextlib.closing(Recorder(self, start, role)))
            if start:
                state = _state(checkpoints.restore(start, _trees(state)))
                recorder.restore(checkpoints.host(start))
                say(f"resuming the {role} at step {start} of {self.steps}")
            elif teacher:
                recorder.write(0, "teacher_eval", {"top1": teacher.top1})
            threads = config.data.threads
            batches = to_devices(self.batches.iterate(start, threads=threads), self.mesh)
            frozen = teacher.variables if teacher else None
            pending = None
            for step in range(start + 1, self.steps + 1):
                # Dispatched, not waited for; meanwhile the host looks at the step before.
                state, metrics = step_fn(state, frozen, next(batches))
                if pending is not None:
                    recorder.add(*pending)
                pending = step, metrics
                rated = self._evaluates_at(step)
                if rated or self._saves_at(step) or signals.received:
                    recorder.add(*pending)
                    pending = None
                    if rated:
                        recorder.evaluated(step, evaluate_state(Variables(state.params, state.batch_stats)))
                    top1 = recorder.last["top1"] if rated else None
                    checkpoints.save(step, _trees(state), recorder.to_json(), top1)
                if signals.received and step < self.steps:
                    raise Interrupted(signals.received, step)
        summary = self._summary(teacher, recorder)
        replace_text(self.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _evaluates_at(self, step: int) -> bool:
        return step % (self.config.eval_every_epochs * self.batches.steps_per_epoch) == 0 or step == self.steps

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def _summary(self, teacher: Teacher | None, recorder: "Recorder") -> dict[str, Any]:
        config, summary = self.config, dict[str, Any]()
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
            "steps": self.steps,
            "examples_per_second": recorder.examples_per_second,
        }


class Evaluator:
    """Evaluates a network on every example of a source, once each."""

    def __init__(self, network: Network, source: Readable, config: ConfigDict, mesh: Mesh):
        self._step = jax.jit(make_eval_step(network), out_shardings=replicated(mesh))
        self._source, self._config, self._mesh = source, config, mesh

    def __call__(self, variables: Variables) -> dict[str, float]:
        """Cross-entropy in nats, top-1 and top-5 in percent."""
        batches = eval_batches(
            self._source, self._config.eval_batch_size, threads=self._config.data.threads, **_shares(self._mesh)
        )
        means = [self._step(variables, batch) for batch in to_devices(batches, self._mesh)]
        total: Means = {}
        for batch_means in jax.device_get(means):
            total = add(total, _on_host(batch_means))
        return {name: mean.value for name, mean in total.items()}


class Recorder:
    """What a run knows on the host: the means since the last line, the best and the last evaluation.

    It is part of each checkpoint, so that a resumed run writes the same lines as one that never stopped.
    """

    def __init__(self, run: Run, start: int, role: str):
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._run, self._role = run, role
        self._window: Means = {}
        self._step_seconds: list[float] = []
        self._clock: float | None = None
        config = run.config
        self._writer = Writer(run.workdir, step=start, tensorboard=config.log.tensorboard)
        self._bar = ProgressBar(start, run.steps, f"{role} {config.student.model}")

    def restore(self, host: dict[str, Any]) -> None:
        self.best, self.last = host["best"], host["last"]
        self._window = {name: Mean(*pair) for name, pair in host["window"].items()}

    def to_json(self) -> dict[str, Any]:
        return {"best": self.best, "last": self.last, "window": {name: list(m) for name, m in self._window.items()}}

    @property
    def examples_per_second(self) -> float:
        """Of the median step, which leaves out compilation; 0 before there are two steps."""
        return self._run.config.batch_size / statistics.median(self._step_seconds) if self._step_seconds else 0.0

    def add(self, step: int, metrics: Means) -> None:
        """Takes in the metrics of a step; raises a NonFiniteError if a term is not finite."""
        means = _on_host(jax.device_get(metrics))
        self._tick()
        bad = [name for name, mean in means.items() if not math.isfinite(mean.total)]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} not finite at step {step} (loss {means['loss'].value}). The last checkpoint is "
                "untouched. Lower optim.learning_rate, or look at the data of that step."
            )
        self._window = add(self._window, means)
        if step % self._run.config.log.every_steps == 0 or step == self._run.steps:
            values = {name: mean.value for name, mean in self._window.items()}
            self.write(step, "train", values | {"examples_per_second": self.examples_per_second})
            self._window = {}
        shown = {"loss": means["loss"].value, "top1": means["top1"].value, "examples/s": self.examples_per_second}
        self._bar.update(step, shown)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Takes in an evaluation."""
        self.write(step, "eval", values)
        epoch = step / self._run.batches.steps_per_epoch
        self.last = {**values, "epoch": epoch}
        if not self.best or values["top1"] >= self.best["top1"]:
            self.best = self.last
        say(evaluation_line(self._role, epoch, self._run.config.epochs, values, self.best["top1"]))
        self._clock = None  # the next interval is not a step's

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        name = f"teacher_{split}" if self._role == "teacher" else split
        self._writer.write(step, step / self._run.batches.steps_per_epoch, name, values)

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self._step_seconds.append(now - self._clock)
        self._clock = now

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def _on_host(means: Means) -> Means:
    return {name: Mean(float(mean.total), float(mean.count)) for name, mean in means.items()}


def _train_batches(config: ConfigDict, mesh: Mesh) -> TrainBatches:
    return make_train_batches(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        sharding=batch_sharding(mesh),
        **_shares(mesh),
    )


def _shares(mesh: Mesh) -> dict[str, int]:
    return dict(divisor=mesh.shape["data"], host=jax.process_index(), hosts=jax.process_count())


def _objective(config: ConfigDict, classes: int) -> Objective:
    """The objective, tried on one row of logits: a depth above the number of classes shows here.

    Raises:
      UserError: if a weight or a method's field is not allowed.
    """
    weights = {key: config[key] for key in ("ce_weight", "kd_weight", "kd_warmup_epochs", "label_smoothing")}
    weights |= {f"loss_weight.{name}": weight for name, weight in config.loss_weight.items()}
    for key, value in weights.items():
        if value < 0 or (key == "label_smoothing" and value >= 1):
            raise UserError(f"{key} must not be negative{', and below 1' if 'smooth' in key else ''}, got {value}.")
    names = config_lib.method_names(config)
    objective = Objective(
        {name: (config_lib.method_config(config, name), config.loss_weight[name]) for name in names},
        config.ce_weight,
        config.kd_weight,
        config.kd_warmup_epochs,
        config.label_smoothing,
    )
    logits, labels = jax.ShapeDtypeStruct((2, classes), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        jax.eval_shape(lambda z, y: objective(z, z, y, epoch=jnp.ones((), jnp.int32)), logits, labels)
    except ValueError as error:
        raise UserError(str(error)) from error
    return objective


def _diagnostics_depth(objective: Objective) -> int:
    """The depth at which student and teacher are compared in the logs: LDRLD's, whatever the method."""
    cfg, _ = objective.methods.get("ldrld", (LDRLDConfig(), 1.0))
    return cfg.depth


def _trees(state: TrainState) -> dict[str, Any]:
    """A train state as the trees of a checkpoint: the model can be read without the optimizer."""
    return {
        "model": {"params": state.params, "batch_stats": state.batch_stats},
        "training": {"step": state.step, "opt_state": state.opt_state},
    }


def _state(trees: dict[str, Any]) -> TrainState:
    return TrainState(**trees["model"], **trees["training"])
