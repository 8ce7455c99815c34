"""A planned run: the parts of a checked config, with nothing written or computed yet."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data.source import fingerprint, spaced
from ldrld_jax.data.stream import Readable, TrainBatches
from ldrld_jax.errors import UserError, reason
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.logit_store import store as logit_store
from ldrld_jax.metrics import curve_of
from ldrld_jax.models import MODELS
from ldrld_jax.models.purify import check_finite, last_matrix_path
from ldrld_jax.record.reader import read_config
from ldrld_jax.runtime.mesh import make_mesh
from ldrld_jax.train.given import NOTHING, Given, check_num_classes
from ldrld_jax.train.input import batch_norm_groups, form_of, open_input
from ldrld_jax.train.networks import Networks, is_workdir
from ldrld_jax.train.objective import Objective, check_objective, make_objective
from ldrld_jax.train.optim import make_optimizer, make_schedule
from ldrld_jax.train.shapes import Forward, check_evaluation, check_metrics, check_training
from ldrld_jax.train.state import Placement, TrainState, Variables, schedule_free, trainable
from ldrld_jax.train.step import Network

_LOOKED_AT = 64  # images of each split


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run whose config has been checked; nothing is on disk or on a device yet.

    Attributes:
      forwards: the evaluations of `networks_used`.
      warnings: lines on what is odd and does not stop the run; its summary repeats them.
    """

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    eval_source: Readable
    batches: TrainBatches
    objective: Objective
    networks: Networks
    given: Given = NOTHING
    forwards: tuple[Forward, ...] = ()
    warnings: list[str] = dataclasses.field(default_factory=list, compare=False)

    @classmethod
    def plan(
        cls,
        config: ConfigDict,
        workdir: epath.Path,
        *,
        absent: Sequence[jax.Device] | None = None,
        given: Given = NOTHING,
    ) -> "Run":
        """Builds the parts of a resolved config and reports what is wrong with it before anything is written.

        Args:
          config: the resolved config.
          workdir: where the run's files lie.
          absent: devices to plan for that are not here; the data are then only described, and no image is read.
          given: parts that are objects.

        Raises:
          UserError: for the first thing that is wrong.
        """
        mesh = make_mesh(config.mesh.data, config.mesh.model, devices=absent)
        objective = make_objective(config, given.methods)
        for metric in given.metrics:
            if curve_of(metric).partition("/")[0] in {*objective.methods, "schedule"}:  # as in "ldrld/pairs"
                raise UserError(f"the metric {metric!r} has the name of a term of the loss. Choose another name.")
        logit_store.check(
            config,
            views=objective.views,
            last_layer=objective.needs_last_layer,
            teacher_changes=config_lib.teaches_itself(config),
            from_file=config_lib.teaches_from_file(config),
            top_needed=objective.top_needed,
        )
        if objective.needs_last_layer and len(models := config_lib.teacher_models(config)) > 1:
            raise UserError(
                f"method={config.method} takes the last layer of one teacher, and teacher.model names {len(models)}: "
                f"{config.teacher.model}. Set one."
            )
        _check_host_teacher(config, objective, given.host_teacher(config))
        given.check_writers(config)
        batches, eval_source = open_input(config, mesh, views=objective.views, absent=absent is not None, given=given)
        source = batches.source
        check_num_classes(given.num_classes, len(source.class_names))
        check_objective(objective, len(source.class_names), label_shape=source.label_shape, padded=batches.padded)
        logit_store.check_top_k(config, len(source.class_names))
        _check_images(config, source)
        networks = Networks.of(source, config.precision, given.models)
        run = cls(config, workdir, mesh, eval_source, batches, objective, networks, given)
        rows = batches.rows // config.accumulate * objective.views
        check_metrics(given.metrics, rows, source, config.precision, masked=batches.padded)
        check_metrics(given.metrics, config.eval_batch_size, eval_source, config.precision)
        optimizer = run.make_optimizer()
        network, variables = run.networks.outline(config.student.model, config.data)  # a wrong name shows here
        run = dataclasses.replace(run, forwards=tuple(run.check_evaluation(*fed) for fed in run.networks_used))
        if config.student.model not in MODELS:
            check_training(config.student.model, network, variables, source, masked=batches.padded)
        _check_optimizer(config, optimizer, trainable(variables, objective.init()))
        _check_average(config, variables)
        if objective.needs_last_layer:
            for teacher in run.forwards[1:]:
                last_matrix_path(teacher.params, len(source.class_names))
        return run

    @property
    def steps(self) -> int:
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def label_form(self) -> dict[str, Any]:
        """The arguments of a teacher outside of JAX that say which logits an example needs."""
        source = self.batches.source
        return {"classes": len(source.class_names), "label_shape": source.label_shape}

    @property
    def schedule(self) -> optax.Schedule:
        return make_schedule(self.config.optim, steps_per_epoch=self.batches.steps_per_epoch, epochs=self.config.epochs)

    def make_optimizer(self) -> optax.GradientTransformation:
        """Makes the optimizer of the config, or returns the one that is given."""
        return self.given.optimizer or make_optimizer(self.config.optim, self.schedule)

    @property
    def networks_used(self) -> list[tuple[str, ConfigDict]]:
        """The models that the step runs, the student first, each with the block that says how images are fed to it."""
        config, found = self.config, [(self.config.student.model, self.config.data)]
        if not self.objective.methods or config_lib.teaches_itself(config) or self.teacher_is_outside:
            return found
        models, paths = config_lib.teacher_models(config), config_lib.teacher_checkpoints(config)
        for model, path in itertools.zip_longest(models, paths[: len(models)], fillvalue=""):
            saved = read_config(path) if path and is_workdir(path) else None  # fed as that run was
            found.append((model, config.teacher.data if saved is None else ConfigDict(saved["data"])))
        return found

    @property
    def teacher_is_outside(self) -> bool:
        """True if the teacher is a function on the host or a file of logits, which no program runs."""
        return config_lib.teaches_from_file(self.config) or self.given.host_teacher(self.config) is not None

    def check_evaluation(self, model: str, data: ConfigDict) -> Forward:
        """Traces the evaluation of a model on both splits, and returns that of the training images.

        Raises:
          UserError: if it fails, or returns anything but logits.
        """
        train, evaluation = self.batches.source, self.eval_source
        forward = check_evaluation(self.networks, model, data.image_size, train)
        if tuple(train.image_shape) != tuple(evaluation.image_shape) or train.label_shape != evaluation.label_shape:
            check_evaluation(self.networks, model, data.image_size, evaluation)
        return forward

    @functools.cached_property
    def data_note(self) -> dict[str, Any]:
        """The data in brief, as data.json has it: class names, their form, and the size and digest of each split."""
        source = self.batches.source
        splits = {"train": fingerprint(source), "eval": fingerprint(self.eval_source)}
        return {"classes": list(source.class_names), "form": form_of(source), **splits}

    @functools.cached_property
    def given_weights(self) -> dict[str, str]:
        """Digests of a user's own models, as data.json has them: of a teacher's weights, if it teaches by them.

        Other models have a digest of their shapes: a resumed run does not use the weights that a student began with.
        Modules have one of their structure as well. A user's models are objects, or made by `module:function`.
        """
        config, found = self.config, dict[str, str]()
        names, student = (config.teacher.get("model") or "").split(","), config.student.model
        teachers = [name for name in names if self.networks.is_own(name)]
        if teachers:
            own = config.teacher.epochs is None and config.teacher.checkpoint is None
            digests = [self._checksum(name) if own else _shapes(self.networks.shapes(name)) for name in teachers]
            found["teacher.model"] = " ".join(digests)
        if self.networks.is_own(student):
            found["student.model"] = _shapes(self.networks.shapes(student))
        for key, models in (("teacher.structure", teachers), ("student.structure", [student])):
            if digests := self.structures(models):
                found[key] = " ".join(digests)
        return found

    def structures(self, models: Sequence[str]) -> list[str]:
        """Returns the digests of those models that are a user's modules, see `Networks.structure`."""
        return [digest for digest in map(self.networks.structure, models) if digest is not None]

    def _checksum(self, teacher: str) -> str:
        made = self.networks.pure(teacher, seed=self.config.teacher.seed)
        return logit_store.checksum(Variables(made.params, made.batch_stats))

    @property
    def placement(self) -> Placement:
        """The placement of weights on the mesh."""
        return Placement(self.mesh, self.config.mesh.fsdp)

    def for_counting(self) -> "Run":
        """Returns the run without microbatches and remat: XLA counts a loop body once, and recomputation is no work."""
        config = copy.deepcopy(self.config)
        config.accumulate, config.remat = 1, False
        return dataclasses.replace(self, config=config)

    def make_student(self) -> tuple[Network, Variables]:
        """Makes the student, with random weights or those of `student.checkpoint`."""
        config = self.config
        groups = batch_norm_groups(config)
        network, variables = self.networks.random(
            config.student.model, config.data, seed=config.seed, batch_norm_groups=groups
        )
        if "checkpoint_head" in config.student:
            variables = self.networks.without_head(
                config.student.checkpoint, config.student.model, config.data, variables
            )
        elif config.student.checkpoint is not None:
            _, variables = self.networks.restore(config.student.checkpoint, config.student.model, config.data)
        elif config.student.model not in MODELS:  # a user's weights, not random ones
            check_finite(variables.params, {}, f"the student {config.student.model}")
        return network, variables

    def read_samples(self) -> None:
        """Reads some images of both splits, so that what is broken shows before anything is trained.

        Raises:
          UserError: if one is broken, or with `data.on_error=skip` more than may be skipped.
        """
        for source in (self.batches.source, self.eval_source):
            source.read(spaced(len(source), _LOOKED_AT))

    def make_state(self, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """Makes the state before the first step, with its part of the optimizer's state and average on each device.

        Args:
          variables: the student's; their arrays may be donated.
          optimizer: of the run.
        """
        first = functools.partial(self._first_state, optimizer)
        placed, method_params = self.placement.put_variables(variables), self.objective.init()
        shardings = jax.tree.map(lambda struct: struct.sharding, self.state_shapes(variables, optimizer))
        return jax.jit(first, donate_argnums=0, out_shardings=shardings)(placed, method_params)

    def state_shapes(self, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state of a model as shapes, dtypes and shardings; `variables` may be shapes as well."""
        first = functools.partial(self._first_state, optimizer)
        return self.placement.shapes_of_state(jax.eval_shape(first, variables, self.objective.init()))

    def _first_state(self, optimizer: optax.GradientTransformation, variables: Variables, params: Any) -> TrainState:
        averaged = self.config.ema_decay is not None
        return TrainState.first(variables, optimizer, method_params=params, averaged=averaged)

    def of_microbatches(self, variables: Variables) -> str | None:
        """Returns a line that says how accumulation differs from one large batch; None if it does not."""
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
        """The interval in steps at which a checkpoint is kept for good; None for never."""
        epochs = self.config.checkpoint.keep_every_epochs
        return None if epochs is None else epochs * self.batches.steps_per_epoch

    def evaluates_at(self, step: int) -> bool:
        """Returns whether the student is evaluated after this step."""
        return step % (self.config.eval_every_epochs * self.batches.steps_per_epoch) == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Returns whether a checkpoint is due after this step, apart from those of evaluations."""
        return any(every and step % every == 0 for every in (self.config.checkpoint.every_steps, self.keep_every))


def _shapes(variables: Variables) -> str:
    """Returns a digest of the names, dtypes and shapes of a model's arrays."""
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", variables)
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:32]


def _check_images(config: ConfigDict, source: Readable) -> None:
    """Raises a UserError for images that a store cannot be of, and for channels-first ones."""
    if source.changes and "dir" in config.logits:
        raise UserError(
            "logits.dir keeps a teacher's logits for later epochs, but the training images differ each time they are "
            "read. Unset it, or give images without random transforms."
        )
    shape, models = source.image_shape, [config.student.model, *(config.teacher.get("model") or "").split(",")]
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[-1] in (1, 3, 4):
        return
    moved = config.data.flip or (config.data.augment == "pad_crop" and config.data.pad)  # rows and columns, wherever
    if not source.raw or moved or any(model in MODELS for model in models):
        raise UserError(
            f"the images have shape {shape}, which is channels first, and [height, width, channels] is needed: "
            f"images.transpose(0, 2, 3, 1){', or unset data.flip and data.pad' * bool(moved and source.raw)}."
        )


def _check_optimizer(config: ConfigDict, optimizer: optax.GradientTransformation, trained: Any) -> None:
    """Raises a UserError if an optimizer cannot be initialised, updated and saved as a run does it."""
    try:
        _, state = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), trained)
    except Exception as error:
        raise UserError(
            f"optim.name={config.optim.name} cannot update the student: {reason(error)}. A step calls, "
            "traced, init(parameters) and update(gradients, state, parameters) on a pair: the student's parameters and "
            "those that a method learns."
        ) from error
    if (free := schedule_free(state)) is not None:
        if config.ema_decay is not None:
            raise UserError(
                f"optim.name={config.optim.name} is schedule-free and averages the weights itself. Unset ema_decay."
            )
        structures: list[Any] = [jax.tree.structure(tree) for tree in (free.z, trained)]
        if structures[0] != structures[1]:
            raise UserError(
                f"optim.name={config.optim.name} is schedule-free for a part of the student only, whose average is not "
                "known here. Let schedule_free wrap the optimizers of the parts instead."
            )
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise UserError(
            f"the state of optim.name={config.optim.name} has a key of jax.random.key, which no checkpoint holds. "
            "Choose another optimizer, or keep jax.random.key_data(key) in the state."
        )


def _check_average(config: ConfigDict, variables: Variables) -> None:
    """Raises a UserError if a moving average of weights would be lost in their rounding."""
    floats = (leaf.dtype for leaf in jax.tree.leaves(variables.params) if jnp.issubdtype(leaf.dtype, jnp.floating))
    if config.ema_decay is not None and (low := {str(dtype) for dtype in floats if dtype.itemsize < 4}):
        raise UserError(
            f"ema_decay averages weights in their own dtype, and {config.student.model} has some of "
            f"{' and '.join(sorted(low))}, which rounds the average away. Make them float32 (param_dtype), or unset "
            "ema_decay."
        )


def _check_host_teacher(config: ConfigDict, objective: Objective, teacher: HostTeacher | None) -> None:
    """Raises a UserError if a run of this config cannot have a teacher on the host."""
    if teacher is None:
        return
    for wrong, why in (
        (config.data.mixup, "data.mixup blends images on the devices, where it does not see them"),
        (config.data.loader == "resident", "data.loader=resident makes the batches on the devices"),
        (objective.needs_last_layer, f"method={config.method} takes the teacher's last layer"),
        (config.logits and not teacher.name, "logits.dir needs a name for it: HostTeacher(function, name=...)"),
    ):
        if wrong:
            raise UserError(f"the teacher {teacher.shown} runs on the host, and {why}. Change one of them.")
