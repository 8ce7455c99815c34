"""A planned run: its config checked and its parts built, with nothing written and nothing computed yet."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data.described import Describer
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.stream import Readable, TrainBatches
from ldrld_jax.errors import UserError, unknown
from ldrld_jax.logit_store import store as logit_store
from ldrld_jax.runtime.hosts import in_turn
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh, shares
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.objective import Objective, check_classes, make_objective
from ldrld_jax.train.optim import Schedule, make_optimizer, make_schedule
from ldrld_jax.train.state import Placement, TrainState, Variables
from ldrld_jax.train.step import Network

_POSITIVE = (
    *("epochs", "batch_size", "eval_batch_size", "eval_every_epochs", "steps_per_dispatch", "log.every_steps"),
    *("checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every_epochs"),
)


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
    def plan(cls, config: ConfigDict, workdir: epath.Path, *, absent: Sequence[jax.Device] | None = None) -> "Run":
        """Builds the parts of a resolved config, and finds what is wrong with it before anything is written.

        Args:
          config: the resolved config.
          workdir: where the run's files lie.
          absent: devices to plan for that are not here: the data are then only described, and no image is read.

        Raises:
          UserError: the first thing that is wrong.
        """
        flat = config_lib.flat(config.to_dict())
        for key in _POSITIVE:
            if (value := flat[key]) is not None and value < 1:
                raise UserError(f"{key} must be at least 1, got {value}.")
        if config.steps_per_dispatch > 1 and config.data.loader != "resident":
            raise UserError(
                f"steps_per_dispatch={config.steps_per_dispatch} takes its batches from images on the devices. Set "
                "data.loader=resident, or steps_per_dispatch=1."
            )
        if config.log.watchdog_seconds < 0:
            raise UserError(f"log.watchdog_seconds must not be negative, got {config.log.watchdog_seconds}.")
        if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, got {config.ema_decay}.")
        if config.non_finite not in ("stop", "skip"):
            raise unknown("non_finite", config.non_finite, ("stop", "skip"))
        mesh = make_mesh(config.mesh.data, config.mesh.model, devices=absent)
        # Each device and each group takes as many rows of a microbatch as the others: some may be padding.
        divisor = config.accumulate * math.lcm(mesh.shape["data"], batch_norm_groups(config))
        objective = make_objective(config)
        logit_store.check(
            config,
            views=objective.views,
            last_layer=objective.needs_last_layer,
            teacher_changes=config_lib.teaches_itself(config),
        )
        if objective.needs_last_layer and len(models := config_lib.teacher_models(config)) > 1:
            raise UserError(
                f"method={config.method} takes the last layer of one teacher, and teacher.model names {len(models)}: "
                f"{config.teacher.model}. Set one."
            )
        with in_turn("data"):
            batches = make_train_batches(
                config.data,
                batch_size=config.batch_size,
                seed=config.seed,
                views=objective.views,
                cycle=config.logits.get("views"),
                sharding=batch_sharding(mesh),
                open_source=open_source if absent is None else Describer(config.compile, "train_images"),
                **(shares(mesh) | {"divisor": divisor}),
            )
            eval_source = make_eval_source(
                config.data, open_source=open_source if absent is None else Describer(config.compile, "eval_images")
            )
        padded = not batches.drop_remainder or batches.masked or config.batch_size % batches.divisor
        if config.data.mixup < 0 or (config.data.mixup and padded):
            raise UserError(
                f"data.mixup blends the images of a batch, which may hold no padding: got {config.data.mixup}. Set "
                "data.remainder=drop, data.on_error=raise and a batch_size that the devices divide, or data.mixup=0."
            )
        check_classes(objective, len(batches.source.class_names))
        run = cls(config, workdir, mesh, eval_source, batches, objective)
        make_optimizer(config.optim, run.schedule)
        run.networks.outline(config.student.model, config.data)  # a wrong name shows here
        return run

    @property
    def steps(self) -> int:
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.config.optim, steps_per_epoch=self.batches.steps_per_epoch, epochs=self.config.epochs)

    @property
    def networks(self) -> Networks:
        """Makes networks for the run's data."""
        source = self.batches.source
        return Networks(len(source.class_names), source.image_shape[-1], self.config.precision)

    @property
    def placement(self) -> Placement:
        """How weights lie on the mesh."""
        return Placement(self.mesh, self.config.mesh.fsdp)

    def make_student(self) -> tuple[Network, Variables]:
        """Makes the student before its first step: with random weights, or from `student.checkpoint`."""
        config = self.config
        groups = batch_norm_groups(config)
        network, variables = self.networks.random(
            config.student.model, config.data, seed=config.seed, batch_norm_groups=groups
        )
        if config.student.checkpoint is not None:
            _, variables = self.networks.restore(config.student.checkpoint, config.student.model, config.data)
        return network, variables

    def first_state(self, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state before the first step, wherever its arrays happen to lie."""
        averaged = self.config.ema_decay is not None
        return TrainState.first(variables, optimizer, method_params=self.objective.init(), averaged=averaged)

    def of_microbatches(self, variables: Variables) -> str | None:
        """What accumulation makes different from one large batch, in a line; None if nothing."""
        accumulate = self.config.accumulate
        parts = [name for name, term in self.objective.methods.items() if not term.method.decomposes]
        if variables.batch_stats and self.config.batch_norm_group is None:
            parts.append("BatchNorm")
        if accumulate == 1 or not parts:
            return None
        micro = self.config.batch_size // accumulate
        return (
            f"accumulate={accumulate}: {' and '.join(parts)} see a microbatch of {micro} examples at a time, which is "
            "not what one large batch gives."
        )

    @property
    def keep_every(self) -> int | None:
        """Every so many steps one checkpoint is kept for good; None keeps none."""
        epochs = self.config.checkpoint.keep_every_epochs
        return None if epochs is None else epochs * self.batches.steps_per_epoch

    def evaluates_at(self, step: int) -> bool:
        """Whether the student is evaluated after this step."""
        return step % (self.config.eval_every_epochs * self.batches.steps_per_epoch) == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step beside those of the evaluations."""
        return any(every and step % every == 0 for every in (self.config.checkpoint.every_steps, self.keep_every))


def batch_norm_groups(config: ConfigDict) -> int:
    """In how many groups of a microbatch batch normalisation takes its statistics.

    Raises:
      UserError: unless a batch divides into microbatches, and those into groups.
    """
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate must be at least 1 and divide batch_size ({config.batch_size}), got {config.accumulate}."
        )
    micro = config.batch_size // config.accumulate
    group = micro if config.batch_norm_group is None else config.batch_norm_group
    if group < 1 or micro % group:
        raise UserError(
            f"batch_norm_group must be at least 1 and divide batch_size / accumulate ({micro}), got {group}."
        )
    return micro // group
