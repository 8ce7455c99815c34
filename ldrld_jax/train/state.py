"""The state of training: what it holds, how it lies on a mesh, and its form in a checkpoint."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from ldrld_jax.runtime.mesh import model_shardings, replicated

Tree = Any


class Variables(NamedTuple):
    """A model's weights."""

    params: Tree
    batch_stats: Tree


class TrainState(NamedTuple):
    """The training state. Order and augmentation are functions of the seed and the step, not part of it.

    Attributes:
      step: steps done, a scalar int32.
      student: the weights.
      method_params: the parameters that methods learn, by method.
      opt_state: the optimizer's, over the student's parameters and `method_params` together.
      ema: the exponential moving average of the student's weights; None without one.
    """

    step: jax.Array
    student: Variables
    method_params: dict[str, Tree]
    opt_state: Tree
    ema: Variables | None = None

    @property
    def evaluated(self) -> Variables:
        """The weights that are evaluated and exported: the moving average if there is one.

        A schedule-free optimizer of optax has one in its state.
        """
        if self.ema is not None:
            return self.ema
        free = schedule_free(self.opt_state)
        if free is None or isinstance(self.step, jax.ShapeDtypeStruct):  # the average has the student's shapes
            return self.student
        params, _ = optax.contrib.schedule_free_eval_params(free, trainable(self.student, self.method_params))
        return self.student._replace(params=params)

    @classmethod
    def first(
        cls,
        variables: Variables,
        optimizer: optax.GradientTransformation,
        *,
        method_params: dict[str, Tree],
        averaged: bool,
    ) -> "TrainState":
        """Returns the state before the first step; its arrays are not placed yet.

        Args:
          variables: the student's.
          optimizer: of the run.
          method_params: the parameters that methods learn, see `Objective.init`.
          averaged: whether to keep a moving average of the student's weights.
        """
        return cls(
            step=jnp.zeros((), jnp.int32),
            student=variables,
            method_params=method_params,
            opt_state=optimizer.init(trainable(variables, method_params)),
            # A copy: the state's buffers are donated, none of them twice.
            ema=jax.tree.map(jnp.copy, variables) if averaged else None,
        )

    def to_trees(self) -> dict[str, Any]:
        """Returns the trees of a checkpoint: `model`, which others load, holds the evaluated weights."""
        training = {"step": self.step, "method_params": self.method_params, "opt_state": self.opt_state}
        if self.ema is not None or schedule_free(self.opt_state) is not None:
            training["student"] = self.student._asdict()
        return {"model": self.evaluated._asdict(), "training": training}

    @classmethod
    def from_trees(cls, trees: dict[str, Any]) -> "TrainState":
        """Returns the state whose `to_trees` gave `trees`."""
        evaluated, training = Variables(**trees["model"]), trees["training"]
        other = "student" in training
        return cls(
            step=training["step"],
            student=Variables(**training["student"]) if other else evaluated,
            method_params=training["method_params"],
            opt_state=training["opt_state"],
            ema=evaluated if other and schedule_free(training["opt_state"]) is None else None,
        )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Placement of weights and states on the devices of a mesh.

    Attributes:
      mesh: of `make_mesh`.
      fsdp: whether parameters and optimizer states are split over the data axis as well.
    """

    mesh: Mesh
    fsdp: bool = False

    def of_variables(self, variables: Variables) -> Variables:
        """Returns a sharding per leaf; the few statistics are whole on each device."""
        params = model_shardings(variables.params, self.mesh, fsdp=self.fsdp)
        return Variables(params, jax.tree.map(lambda _: replicated(self.mesh), variables.batch_stats))

    def of_state(self, state: TrainState) -> TrainState:
        """Returns a sharding per leaf."""
        everywhere: Any = replicated(self.mesh)
        return TrainState(
            step=everywhere,
            student=self.of_variables(state.student),
            method_params=jax.tree.map(lambda _: everywhere, state.method_params),
            opt_state=model_shardings(state.opt_state, self.mesh, fsdp=self.fsdp),
            ema=None if state.ema is None else self.of_variables(state.ema),
        )

    def shapes_of_state(self, state: TrainState) -> TrainState:
        """Returns a state of arrays or of their shapes as shapes, dtypes and shardings."""
        put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(put, state, self.of_state(state))

    def put_variables(self, variables: Variables) -> Variables:
        """Moves weights to the devices."""
        return jax.tree.map(_put, variables, self.of_variables(variables))


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Moves an array that every process has alike to the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)  # device_put would send all of it to every process, to compare them
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def schedule_free(opt_state: Tree) -> Any:
    """Returns the state of a schedule-free optimizer inside an optimizer's state; None if there is none."""
    is_free = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)  # noqa: E731
    return next((x for x in jax.tree.leaves(opt_state, is_leaf=is_free) if is_free(x)), None)


def trainable(student: Variables, method_params: dict[str, Tree]) -> tuple[Tree, dict[str, Tree]]:
    """Returns the tree that the optimizer updates."""
    return student.params, method_params
