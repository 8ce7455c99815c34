"""A run from its config to its summary: wires the parts together and owns the loop."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint import Checkpoints
from ldrld_jax.console import say, summary_table
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.speed import watched
from ldrld_jax.data.stream import Readable, TrainBatches, eval_batches
from ldrld_jax.errors import UserError
from ldrld_jax.mesh import batch_sharding, make_mesh, replicated, to_devices
from ldrld_jax.metrics import Means, add, on_host, replace_text
from ldrld_jax.networks import create_network, dtypes, load_network
from ldrld_jax.objective import Objective, check_classes, make_objective
from ldrld_jax.optim import first_decay_epoch, make_optimizer, make_schedule
from ldrld_jax.recorder import Recorder
from ldrld_jax.signals import Interrupted, Signals, catch_signals
from ldrld_jax.torch_import import save_torch_checkpoint
from ldrld_jax.train_step import (
    Ensemble,
    Mixup,
    Network,
    TrainState,
    Variables,
    make_eval_step,
    make_train_step,
    trainable,
)


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


def export(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Writes a run's best student as `student.safetensors`, a PyTorch state_dict under the published names.

    Raises:
      UserError: if there is no such run, or it trained another model.
    """
    path = epath.Path(workdir) / "student.safetensors"
    with precision_scope(config.precision):
        run = Run.plan(config_lib.resolve(config), epath.Path(workdir))
        _, variables = run.load(str(workdir), config.student.model, config.data)
        save_torch_checkpoint(path, *variables)
    return path


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Double precision where a config asks for it: everything that touches its arrays runs inside.

    Raises:
      UserError: if there is no such precision.
    """
    before = jax.config.read("jax_enable_x64")
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
        summary = run.fit(student, run.obtain_teacher(student[0], signals), signals, role)
    if role == "student":
        say(f"\n{summary_table(summary, str(workdir))}")
    return summary


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
        if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, got {config.ema_decay}.")
        mesh = make_mesh(config.mesh.data, config.mesh.model)
        objective = make_objective(config)
        batches = make_train_batches(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            views=objective.views,
            sharding=batch_sharding(mesh),
            **_shares(mesh),
        )
        padded = not batches.drop_remainder or batches.masked or config.batch_size % batches.divisor
        if config.data.mixup < 0 or (config.data.mixup and padded):
            raise UserError(
                f"data.mixup blends the images of a batch, which may hold no padding: got {config.data.mixup}. Set "
                "data.remainder=drop, data.on_error=raise and a batch_size that the devices divide, or data.mixup=0."
            )
        eval_source = make_eval_source(config.data)
        check_classes(objective, len(batches.source.class_names))
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

    def obtain_teacher(self, student: Network, signals: Signals) -> Teacher | None:
        """The teacher, loaded or trained, and measured; None for plain training.

        Raises:
          UserError: if it does not load, or scores less than `teacher.min_top1`.
        """
        config = self.config.teacher
        if not self.objective.methods:
            return None
        if config.model == config_lib.SELF:
            return Teacher(student)
        models = config_lib.teacher_models(self.config)
        paths = config.checkpoint.split(",") if config.checkpoint else self._train_teachers(models, signals)
        if len(paths) != len(models):
            raise UserError(
                f"teacher.checkpoint must name a checkpoint for each of teacher.model ({len(models)}: "
                f"{config.model}), got {len(paths)}. Separate them by commas."
            )
        loaded = [self.load(path, model, config.data) for path, model in zip(paths, models, strict=True)]
        networks, variables = zip(*loaded, strict=True)
        teacher: tuple[Network | Ensemble, Any] = loaded[0]
        if len(models) > 1:
            teacher = Ensemble(networks, config.ensemble), variables
        network, weights = teacher
        top1 = Evaluator(network, self.eval_source, self.config, self.mesh)(weights)["top1"]
        if top1 < config.min_top1:
            raise UserError(
                f"the teacher in {', '.join(paths)} has top-1 {top1:.2f} %, and teacher.min_top1 demands "
                f"{config.min_top1:.2f} %. Check its checkpoint and teacher.data.mean and std, or lower "
                "teacher.min_top1."
            )
        say(f"teacher {config.model} from {', '.join(paths)}  top-1 {top1:.2f}")
        return Teacher(network, weights, top1)

    def _train_teachers(self, models: list[str], signals: Signals) -> list[str]:
        """Trains each teacher in its workdir, or finds it trained; gives the workdirs."""
        root = epath.Path(self.config.teacher.workdir or self.workdir / "teacher")
        places = [root] if len(models) == 1 else [root / f"{i}-{model}" for i, model in enumerate(models)]
        for i, (place, model) in enumerate(zip(places, models, strict=True)):
            recipe = config_lib.teacher_recipe(self.config, model)
            recipe.seed += i  # an ensemble of one model is one of several seeds
            _train(recipe, place, signals, role="teacher")
        return [str(place) for place in places]

    def initial_state(self, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step, on all devices."""
        methods = self.objective.methods.items()
        learnt = {name: method.init(cfg) for name, (method, cfg, _) in methods if method.init is not None}
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            student=variables,
            method_params=learnt,
            opt_state=optimizer.init(trainable(variables, learnt)),
            # A copy: the state's buffers are donated, none of them twice.
            ema=None if self.config.ema_decay is None else jax.tree.map(jnp.copy, variables),
        )
        return jax.device_put(state, replicated(self.mesh))

    def fit(
        self, student: tuple[Network, Variables], teacher: Teacher | None, signals: Signals, role: str
    ) -> dict[str, Any]:
        """Trains from the last checkpoint, or from `student`, to the end; gives the summary."""
        config, (network, variables) = self.config, student
        optimizer = make_optimizer(config.optim, self.schedule)
        state = self.initial_state(variables, optimizer)
        step_fn = jax.jit(
            make_train_step(
                network,
                teacher.network if teacher else None,
                self.objective,
                optimizer,
                schedule=self.schedule,
                steps_per_epoch=self.batches.steps_per_epoch,
                ema_decay=config.ema_decay,
                mixup=Mixup(config.data.mixup, config.seed) if config.data.mixup else None,
            ),
            donate_argnums=0,
            out_shardings=replicated(self.mesh),
        )
        evaluate_weights = Evaluator(network, self.eval_source, config, self.mesh)

        self.workdir.mkdir(parents=True, exist_ok=True)
        replace_text(self.workdir / "config.json", config.to_json(indent=2) + "\n")
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(self.workdir / "checkpoints")))
            start = checkpoints.latest_step or 0
            span = dict(start=start, steps=self.steps, steps_per_epoch=self.batches.steps_per_epoch)
            recorder = stack.enter_context(contextlib.closing(Recorder(self.workdir, config, role, **span)))
            if start:
                state = _state(checkpoints.restore(start, _trees(state)))
                recorder.restore(checkpoints.host(start))
                say(f"resuming the {role} at step {start} of {self.steps}")
            elif teacher and teacher.top1 is not None:
                recorder.write(0, "teacher_eval", {"top1": teacher.top1})
            batches = to_devices(watched(self.batches.iterate(start, threads=config.data.threads)), self.mesh)
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
                        recorder.evaluated(step, evaluate_weights(state.evaluated))
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

    def __init__(self, network: Network | Ensemble, source: Readable, config: ConfigDict, mesh: Mesh):
        self._step = jax.jit(make_eval_step(network), out_shardings=replicated(mesh))
        self._source, self._config, self._mesh = source, config, mesh

    def __call__(self, variables: Any) -> dict[str, float]:
        """Cross-entropy in nats, top-1 and top-5 in percent."""
        batches = eval_batches(
            self._source, self._config.eval_batch_size, threads=self._config.data.threads, **_shares(self._mesh)
        )
        total: Means = {}
        pending: Means = {}
        for batch in to_devices(batches, self._mesh):
            means = self._step(variables, batch)  # dispatched before the last one is waited for
            total, pending = add(total, on_host(pending)), means
        total = add(total, on_host(pending))
        return {name: mean.value for name, mean in total.items()}


def _shares(mesh: Mesh) -> dict[str, int]:
    return dict(divisor=mesh.shape["data"], host=jax.process_index(), hosts=jax.process_count())


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
