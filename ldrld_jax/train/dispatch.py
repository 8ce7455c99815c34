"""Dispatch of train steps to the devices: one at a time, or several in one program over resident images."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ldrld_jax.data.pipeline import made_by
from ldrld_jax.data.resident import ResidentBatches
from ldrld_jax.data.speed import watched
from ldrld_jax.metrics import Means, Packed, packed
from ldrld_jax.runtime.mesh import replicated, to_devices
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import Batch, TrainState
from ldrld_jax.train.teacher import OnHost, StoredTeacher, Teacher

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Means]]


class Dispatcher:
    """Dispatcher of a run's steps, in order: up to `steps_per_dispatch` of them in one program.

    Such a program is a scan whose body makes a batch from the images on the devices and takes the train
    step. It covers `steps_per_dispatch` whole batches of one epoch, starts at a multiple of that number in
    the epoch, and spans no checkpoint; every other step is dispatched alone. A resumed run therefore
    groups its steps exactly as an uninterrupted one.

    Args:
      run: the plan.
      step: of `make_train_step`.
      state: of the run.
      teacher: whose logits accompany the batches, unless the step runs it; None for plain training.
      start: steps done.
      tell: called with a description of what comes next, for the watchdog.

    Attributes:
      one: the program of a single step, `one(state, teacher, batch)`; the state is donated.
    """

    def __init__(
        self,
        run: Run,
        step: Step,
        state: TrainState,
        teacher: Teacher | None,
        start: int,
        tell: Callable[[str], None],
    ):
        self._run, self._tell, self._compiled = run, tell, set[int]()
        self._logits = teacher.logits if isinstance(teacher, StoredTeacher) else None
        shardings = run.placement.of_state(state), replicated(run.mesh)
        jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
        one = packed(step)
        self.one = jit(one)
        if isinstance(run.batches, ResidentBatches):
            images = run.batches.on_devices()
            self._batch, self._at = images.batch, images.at
            self._several = jit(several_steps(one, images.whole, run.config.steps_per_dispatch))
        else:
            endless = run.batches.iterate(start, **made_by(run.config.data))
            made: Iterator[Any] = itertools.islice(endless, run.steps - start)
            if isinstance(teacher, OnHost):
                made = teacher.teacher.beside(made, views=run.batches.views, **run.label_form)
            batches = to_devices(watched(made), run.mesh)
            self._batch = lambda step: next(batches)

    def __call__(self, step: int, state: TrainState, teacher: Any) -> tuple[int, TrainState, Packed]:
        """Dispatches the steps after `step` without waiting for them.

        Returns:
          The number of steps then done, the state after them, and their metrics.
        """
        count = count_steps(self._run, step)
        self._tell(f"waiting for the input of step {step + 1}")
        inputs = self._inputs(step, count)
        self._tell(f"running step {step + 1}" if count in self._compiled else "compiling the train step")
        self._compiled.add(count)
        return step + count, *(self._several if count > 1 else self.one)(state, teacher, *inputs)

    def _inputs(self, step: int, count: int) -> tuple[Any, ...]:
        """Returns the arguments of the program of `count` steps after the state and the teacher."""
        if count > 1:
            beside = self._logits.several(step, count, self._batch, self._tell) if self._logits else {}
            return beside, *self._at(step)
        batch = self._batch(step)
        return ({**batch, **self._logits(step, batch, self._tell)} if self._logits else batch,)


def count_steps(run: Run, step: int) -> int:
    """Returns the number of steps in the next dispatch: `steps_per_dispatch`, or 1 where those do not fit."""
    together, position = run.config.steps_per_dispatch, step % run.batches.steps_per_epoch
    whole = position + together <= len(run.batches.source) // run.batches.batch_size
    saved = any(run.saves_at(step + i) for i in range(1, together))
    return together if whole and position % together == 0 and not saved else 1


def several_steps(
    step: Callable[..., tuple[TrainState, Any]], make: Callable[..., Batch], count: int
) -> Callable[..., tuple[TrainState, Any]]:
    """Returns `steps(state, teacher, beside, images, draws, first)`, which takes `count` steps from batch `first` on.

    `beside` holds the parts of the batches that are not made from the images, `[count, ...]` each.
    """

    def steps(
        state: TrainState, teacher: Any, beside: Batch, images: Any, draws: Any, first: jax.Array
    ) -> tuple[TrainState, Any]:
        def one(state, at):
            position, beside = at
            return step(state, teacher, {**make(images, draws, position), **beside})

        return jax.lax.scan(one, state, (first + jnp.arange(count, dtype=jnp.int32), beside))

    return steps
