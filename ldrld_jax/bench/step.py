"""Measures how fast a config trains on this machine and how a step's time is spent, without writing a run."""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.bench.result import PARTS, Bench
from ldrld_jax.data.pipeline import made_by
from ldrld_jax.data.speed import warm_up
from ldrld_jax.identity import of_all
from ldrld_jax.metrics import by_step
from ldrld_jax.runtime.devices import peak_flops
from ldrld_jax.runtime.flops import count_flops
from ldrld_jax.runtime.hosts import check_same
from ldrld_jax.runtime.mesh import replicated, to_devices
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.profiling import Profile
from ldrld_jax.train.dispatch import Dispatcher, Step
from ldrld_jax.train.loop import make_step
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import TrainState
from ldrld_jax.train.teacher import NetworkTeacher, Teacher, teacher_at_hand, weights_of

_TURNS = 5
_ENDLESS = 10**9  # epochs


def measure(config: ConfigDict, *, seconds: float = 5.0, profile: str | None = None) -> Bench:
    """Measures the training that a config describes.

    Args:
      config: from `ldrld_jax.config.load`. A teacher that the run would train first has random weights.
      seconds: approximate duration of each measurement.
      profile: directory for a trace of some steps, see `Profile`; None records none.

    Raises:
      UserError: if the config is invalid.
    """
    config = config_lib.resolve(config)
    check_same(of_all(config))
    with precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config, epath.Path(""))
        return _Measurement(run, seconds).all(profile)


class _Measurement:
    """Timings of the parts of a run."""

    def __init__(self, run: Run, seconds: float):
        self._run, self._seconds = run, seconds
        self._network, self._variables = run.make_student()
        self._teacher = teacher_at_hand(run, self._network) if run.objective.methods else None
        self._frozen = weights_of(self._teacher)

    def all(self, profile: str | None) -> Bench:
        run, devices = self._run, self._run.mesh.devices.size
        parts, batch = self._time_input()
        step, state = self._step(run, self._teacher)
        endless = copy.deepcopy(run.config)
        endless.epochs = _ENDLESS  # it is timed for so many seconds, whatever the number of its steps
        advance = Dispatcher(dataclasses.replace(run, config=endless), step, state, self._teacher, 0, lambda what: None)
        begun = time.perf_counter()
        compiled = advance.one.lower(state, self._frozen, batch).compile()  # the jitted function reuses it
        compile_seconds = time.perf_counter() - begun
        one = _Stepping(advance.one, state, self._frozen, batch)
        parts["step"] = self._time(one)
        parts["host"] = statistics.median(_until_it_returns(one) for _ in range(4 * _TURNS))
        run_seconds = self._time_run(advance, one.state, profile)
        in_use = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        parts |= self._time_alone(batch)
        peak = peak_flops(jax.devices()[0].device_kind, run.config.precision, run.config.matmul_precision)
        return Bench(
            title=self._title(),
            compile_seconds=compile_seconds,
            run_seconds=run_seconds,
            batch_size=run.config.batch_size,
            part_seconds={name: parts[name] for name in PARTS if name in parts},
            flops=self._flops(batch),
            peak=None if peak is None else peak * devices,
            program_bytes=_program_bytes(compiled),
            peak_bytes=in_use,
        )

    def _flops(self, batch: Any) -> float | None:
        """Counts the FLOPs of a step, see `Run.for_counting`."""
        step, state = self._step(self._run.for_counting(), self._teacher)
        return count_flops(step, state, self._frozen, batch)

    def _time_input(self) -> tuple[dict[str, float], Any]:
        """Times the loader; also returns an epoch's first batch, which is full if any is."""
        run = self._run
        batches = to_devices(run.batches.iterate(**made_by(run.config.data)), run.mesh)
        first = next(batches)
        warm_up(batches, run.batches)
        return {"input": self._time(lambda: next(batches))}, first

    def _step(self, run: Run, teacher: Teacher | None) -> tuple[Step, TrainState]:
        """Returns a run's step and a fresh state, since the step donates its state."""
        optimizer = run.make_optimizer()
        state = run.make_state(jax.tree.map(jnp.copy, self._variables), optimizer)
        return make_step(run, self._network, teacher, optimizer), state

    def _time_run(self, advance: Dispatcher, state: TrainState, profile: str | None) -> float:
        """Returns the seconds per step of the real loop; traces afterwards, because tracing costs time."""
        step = 0
        pending: list[Any] = []

        def dispatch() -> Any:
            nonlocal step, state
            step, state, metrics = advance(step, state, self._frozen)
            pending.append(metrics)
            if len(pending) > 1:
                by_step(pending.pop(0))
            return metrics

        warm = 2 * self._run.config.steps_per_dispatch  # compiles both the single and the several-step program
        while step < warm:
            dispatch()
        jax.block_until_ready(pending)
        begun = time.perf_counter()
        jax.block_until_ready(dispatch())
        calls = self._calls(time.perf_counter() - begun)
        rates = []
        for _ in range(_TURNS):
            begun, first = time.perf_counter(), step
            for _ in range(calls):
                dispatch()
            jax.block_until_ready(pending)
            rates.append((time.perf_counter() - begun) / (step - first))
        with contextlib.closing(Profile(profile, start=step, steps=step)) as trace:
            while trace.wanted:
                trace.at(step, dispatch())
        return statistics.median(rates)

    def _time_alone(self, batch: Any) -> dict[str, float]:
        """Times the student without a teacher, the teacher alone, and the loss alone."""
        plain = dataclasses.replace(self._run, objective=dataclasses.replace(self._run.objective, methods={}))
        step, state = self._step(plain, None)
        step = jax.jit(step, donate_argnums=0, out_shardings=(plain.placement.of_state(state), replicated(plain.mesh)))
        parts = {"student": self._time(_Stepping(step, state, None, batch))}
        if self._teacher is not None:
            network, variables = self._teacher.network, self._variables if self._frozen is None else self._frozen
            shape = self._run.batches.source.image_shape
            images = batch["image"].reshape(-1, *shape)  # one row per view, as in the step
            labels = jnp.repeat(batch["label"], len(images) // len(batch["label"]), axis=0)
            forward = jax.jit(lambda variables, images: network(variables, images, train=False)[0])
            loss, logits = jax.jit(_loss_and_gradient(self._run)), forward(variables, images)
            parts["teacher"] = self._time(lambda: forward(variables, images))
            parts["loss"] = self._time(lambda: loss(logits, -logits, labels))
        return parts

    def _time(self, work: Callable[[], Any]) -> float:
        """Returns the seconds per call: the median over turns that dispatch several calls and wait for the last."""
        jax.block_until_ready(work())
        begun = time.perf_counter()
        jax.block_until_ready(work())
        calls = self._calls(time.perf_counter() - begun)
        turns = []
        for _ in range(_TURNS):
            begun = time.perf_counter()
            for _ in range(calls):
                done = work()  # frees the previous result: memory holds two batches, not all
            jax.block_until_ready(done)
            turns.append((time.perf_counter() - begun) / calls)
        return statistics.median(turns)

    def _calls(self, seconds: float) -> int:
        """Returns how many calls of so many seconds make a turn; the same number in every process."""
        calls = max(1, int(self._seconds / _TURNS / seconds))
        # A process that dispatched more steps than the others would wait for them for ever.
        return calls if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(calls)))

    def _title(self) -> str:
        config, device = self._run.config, jax.devices()[0]
        taught = f"{config.student.model}, {config.method}"
        if self._teacher is not None:
            random = config.teacher.checkpoint is None and isinstance(self._teacher, NetworkTeacher)
            taught += f" from {config.teacher.model}" + (" (random weights: its recipe is not run)" if random else "")
        how = f"batch {config.batch_size}, {config.precision}, loader {config.data.loader}"
        how += f", {config.steps_per_dispatch} steps a dispatch" if config.steps_per_dispatch > 1 else ""
        return f"{taught}\n{how}; {self._run.mesh.devices.size} x {device.device_kind}, jax {jax.__version__}"


class _Stepping:
    """A train step that repeats on one batch."""

    def __init__(self, step: Callable[..., Any], state: TrainState, frozen: Any, batch: Any):
        self._step, self.state, self._rest = step, state, (frozen, batch)

    def __call__(self) -> Any:
        self.state, metrics = self._step(self.state, *self._rest)
        return metrics


def _until_it_returns(work: Callable[[], Any]) -> float:
    """Returns the seconds until the call returns, with no other work in flight."""
    begun = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - begun
    jax.block_until_ready(done)
    return seconds


def _loss_and_gradient(run: Run) -> Callable[..., Any]:
    objective, epoch = run.objective, jnp.int32(1)
    learnt = objective.init()

    def loss(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> jax.Array:
        last_layer = jnp.eye(student.shape[-1])  # its values do not affect the time
        return objective(teacher, student, labels, epoch=epoch, method_params=learnt, last_layer=last_layer)[0]

    gradient = jax.value_and_grad(loss)
    return lambda teacher, student, labels: gradient(student, teacher, labels)


def _program_bytes(compiled: Any) -> int | None:
    """Returns the bytes a program holds on a device: inputs, outputs that reuse no input, and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    inputs, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return inputs + outputs + memory.temp_size_in_bytes
