"""Parts of a run that are given as objects, where a config has only names for them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.code import call, is_code, load_object
from ldrld_jax.data.source import Source
from ldrld_jax.errors import UserError, needs
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.losses import Method
from ldrld_jax.record.mlflow_run import MLflowRun
from ldrld_jax.record.weights_and_biases import WeightsAndBiases
from ldrld_jax.record.writer import LineWriter, close_all
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Metric


@dataclasses.dataclass(frozen=True)
class Callback:
    """Functions called between two steps.

    They get the weights as a pair `(params, batch_stats)` of trees. Copy what is to be kept: the next step reuses the
    arrays.

    Attributes:
      after_evaluation: called with the step, the evaluation's values by name, and the evaluated weights.
      after_save: called with the step and the evaluated weights, once a checkpoint has its copy of them; it may be
        written later.
    """

    after_evaluation: Callable[[int, Mapping[str, float], Variables], None] | None = None
    after_save: Callable[[int, Variables], None] | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """Objects of a run; all are empty for a run that its config describes in full.

    A name in angle brackets stands for each in the config, such as `student.model="<MyNet>"`.

    Attributes:
      models: by that name, see `models.pure.pure`.
      teacher: one that runs on the host.
      methods: by that name.
      train, evaluation: the splits.
      num_classes: the number of classes that the data must have; None for any.
      optimizer: in place of `optim`.
      writers: in addition to metrics.jsonl and TensorBoard's.
      callbacks: see `Callback`.
      metrics: in training and evaluations, by name.
    """

    models: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: HostTeacher | None = None
    methods: Mapping[str, Method] = dataclasses.field(default_factory=dict)
    train: Source | None = None
    evaluation: Source | None = None
    num_classes: int | None = None
    optimizer: optax.GradientTransformation | None = None
    writers: Sequence[LineWriter] = ()
    callbacks: Sequence[Callback] = ()
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)

    @property
    def incomparable(self) -> list[str]:
        """The parts that nothing tells apart from others of the same name."""
        named = [f"the method {name}" for name in self.methods]
        return [*named, *["the optimizer"] * bool(self.optimizer), *["the teacher on the host"] * bool(self.teacher)]

    def host_teacher(self, config: ConfigDict) -> HostTeacher | None:
        """Returns the teacher that runs on the host: the one given, or the one that `teacher.model` names in code."""
        name = config.teacher.get("model")
        if self.teacher is None and name is not None and is_code(name):
            found = load_object(name)
            return found if isinstance(found, HostTeacher) else None
        return self.teacher

    def all_writers(self, config: ConfigDict, workdir: epath.Path) -> list[LineWriter]:
        """Returns the writers that are given, and those that `log` names, made for a workdir.

        If one cannot be made, those made before it are closed.
        """
        made: list[LineWriter] = []
        try:
            if project := config.log.wandb.project:
                made.append(WeightsAndBiases(workdir, project, config.to_dict()))
            if experiment := config.log.mlflow:
                made.append(MLflowRun(workdir, experiment, config.to_dict()))
            for name in _named_writers(config):
                writer = call(name, str(workdir))
                check_writer(writer, f"the writer that {name} of log.writers returns")
                made.append(writer)
        except BaseException as error:
            close_all(made, error)
            raise
        return [*self.writers, *made]

    def check_writers(self, config: ConfigDict) -> None:
        """Raises a UserError unless the writers that the config names can be imported."""
        if config.log.wandb.project:
            with needs("log.wandb.project", "wandb"):
                import wandb  # noqa: F401
        if config.log.mlflow:
            with needs("log.mlflow", "mlflow"):
                import mlflow  # noqa: F401
        for name in _named_writers(config):
            load_object(name)

    def for_teacher(self) -> "Given":
        """Returns the parts for the run of a teacher that is trained first, on the same data."""
        return Given(models=self.models, train=self.train, evaluation=self.evaluation)


def check_num_classes(num_classes: int | None, found: int) -> None:
    """Raises a UserError if `Trainer(num_classes=...)` is not the number of classes found in the training data."""
    if num_classes not in (None, found):
        raise UserError(
            f"num_classes is {num_classes}, and the training data have {found} classes. Remove num_classes, or correct "
            "the data."
        )


def check_writer(writer: Any, what: str = "a writer") -> None:
    """Raises a UserError if a run cannot write to it."""
    if isinstance(writer, type):
        raise UserError(f"{what} must be an object, got the class {writer.__name__}. Give {writer.__name__}().")
    if not hasattr(writer, "write"):
        raise UserError(f"{what} must have write(step, epoch, split, values), and {type(writer).__name__} has not.")


def _named_writers(config: ConfigDict) -> list[str]:
    return config.log.writers.split(",") if config.log.writers else []


NOTHING = Given()
"""The parts of a run that its config describes in full."""
