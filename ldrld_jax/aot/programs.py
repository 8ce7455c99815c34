"""Builds the programs of a run from shapes alone, without reading an image or allocating a weight."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.data.resident import Images, ResidentBatches
from ldrld_jax.data.source import InMemory
from ldrld_jax.data.stream import padded_rows
from ldrld_jax.logit_store.feed import teacher_program
from ldrld_jax.logit_store.top import TopLogits, top_logits
from ldrld_jax.metrics import packed
from ldrld_jax.runtime.flops import count_flops
from ldrld_jax.runtime.mesh import replicated
from ldrld_jax.train.dispatch import several_steps
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.input import batch_norm_groups
from ldrld_jax.train.loop import make_step
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import Network, make_eval_step
from ldrld_jax.train.teacher import NetworkTeacher, outlined, weights_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One program that a run dispatches.

    Attributes:
      name: a short description, such as "train step".
      jitted: the jitted function that the run uses.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, by argument name.
      examples: images per dispatch, over all devices.
      times: iterations of `one` in the program's loop.
      one: a loop-free function to count operations in, and its arguments; None if they are not counted.
    """

    name: str
    jitted: Any
    arguments: dict[str, Tree]
    examples: int
    times: int = 1
    one: tuple[Any, dict[str, Tree]] | None = None

    def count_flops(self, platform: str) -> float | None:
        """Returns the floating point operations of a dispatch over all devices; None if they are not counted."""
        if self.one is None:
            return None
        function, arguments = self.one
        flops = count_flops(function, *arguments.values(), platform=platform)
        return None if flops is None else self.times * flops

    def argument_bytes(self) -> dict[str, int]:
        """Returns the bytes of each argument on one device, without the compiler's padding."""
        return {name: sum(map(_local_bytes, jax.tree.leaves(tree))) for name, tree in self.arguments.items()}


def programs_of(run: Run) -> Iterator[Program]:
    """Yields the programs of a run that was planned for absent devices, the train step first."""
    config, mesh = run.config, run.mesh
    groups = batch_norm_groups(config)
    network, variables = run.networks.outline(config.student.model, config.data, batch_norm_groups=groups)
    outside = run.teacher_is_outside
    teacher = outlined(run, network) if run.objective.methods and not outside else None
    optimizer = run.make_optimizer()
    state = run.state_shapes(variables, optimizer)
    out = run.placement.of_state(state), replicated(mesh)
    step = packed(make_step(run, network, teacher, optimizer))
    jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=out)
    batch = _batch(run)
    stored = bool(config.logits) or outside
    weights: dict[str, Tree] = {"state": state, "teacher": None if stored else weights_of(teacher)}
    beside = {"teacher_logits": _logits(run)} if stored else {}
    arguments = {**weights, "batch": batch | beside}
    one = make_step(run.for_counting(), network, teacher, optimizer), arguments
    yield Program("train step", jit(step), arguments, config.batch_size, one=one)
    if isinstance(run.batches, ResidentBatches):
        count, scalar = config.steps_per_dispatch, jax.ShapeDtypeStruct((), jnp.int32)  # host scalars: no sharding
        images = Images(run.batches, None)
        if count > 1:
            several = jit(several_steps(step, images.whole, count))
            stacked = jax.tree.map(lambda x: _stacked(x, count), beside)
            arguments = {**weights, "beside": stacked, **_resident(run), "first": scalar}
            yield Program(f"{count} train steps", several, arguments, count * config.batch_size, count, one)
        made = {**_resident(run), "start": scalar, "count": scalar}
        yield Program("batch of resident images", images.make, made, config.batch_size)
    if stored and isinstance(teacher, NetworkTeacher):
        program = teacher_program(teacher.network, config.logits.dtype, mesh, config.logits.top_k)
        taught = {"teacher": teacher.variables, "batch": batch["image"]}
        yield Program("teacher of the logit store", program, taught, config.batch_size, one=(program, taught))
    yield _evaluation(run, network, state.evaluated)


def _evaluation(run: Run, network: Network, variables: Tree) -> Program:
    """Returns the evaluation program: over the whole split if it is kept in memory, else over one batch."""
    evaluator = Evaluator(network, run.eval_source, run.config, run.mesh)
    rows = padded_rows(run.config.eval_batch_size, run.mesh.shape["data"])
    shape, labels = (rows, *run.eval_source.image_shape), (rows, *run.eval_source.label_shape)
    batch = {
        "image": _struct(shape, run.eval_source.dtype, run, "data"),
        "label": _struct(labels, jnp.int32, run, "data"),
        "mask": _struct(labels, jnp.bool_, run, "data"),
    }
    arguments = {"variables": variables, "batch": batch}
    one = make_eval_step(network), arguments
    if not isinstance(run.eval_source, InMemory):
        return Program("evaluation", evaluator.step, arguments, rows, one=one)
    batches = -(-len(run.eval_source) // run.config.eval_batch_size)
    split = {name: _stacked(x, batches) for name, x in batch.items()}
    return Program(
        "evaluation", evaluator.split, {"variables": variables, "split": split}, batches * rows, batches, one
    )


def _batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a full batch with its rows split over the devices."""
    batches, rows = run.batches, run.batches.rows
    views = (batches.views,) if batches.views > 1 else ()
    labels = (rows, *batches.source.label_shape)
    batch = {
        "image": _struct((rows, *views, *batches.source.image_shape), batches.source.dtype, run, "data"),
        "label": _struct(labels, jnp.int32, run, "data"),
    }
    if batches.padded:
        batch["mask"] = _struct(labels, jnp.bool_, run, "data")
    return batch


def _logits(run: Run) -> jax.ShapeDtypeStruct | TopLogits:
    """Returns a batch of the teacher's logits as stored, or as a teacher outside of JAX gives them."""
    rows, *labels = _batch(run)["label"].shape
    views = [run.batches.views] if run.batches.views > 1 else []
    shape = (rows, *views, *labels, len(run.batches.source.class_names))
    dtype, top_k = jnp.dtype(run.config.logits.get("dtype", "float32")), run.config.logits.get("top_k")
    if top_k is None:
        return _struct(shape, dtype, run, "data")
    kinds = jax.eval_shape(lambda z: top_logits(z, top_k, dtype), jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(lambda x: _struct(x.shape, x.dtype, run, "data"), kinds)


def _resident(run: Run) -> dict[str, Tree]:
    """Returns the training set as stored on each device, and the random draws of an epoch."""
    batches = run.batches
    images = len(batches.source), math.prod(batches.source.image_shape)
    stored = _struct(images, jnp.uint8, run), _struct(images[:1], jnp.int32, run)
    draws = jax.tree.map(lambda values: _struct(values.shape, jnp.int32, run), batches.draws(0))
    return {"images": stored, "draws": draws}


def _struct(shape: tuple[int, ...], dtype: Any, run: Run, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(run.mesh, PartitionSpec(*axes)))


def _stacked(x: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """Returns the struct of `count` stacked copies of `x`; the new leading axis is not sharded."""
    assert isinstance(x.sharding, NamedSharding)
    sharding = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
    return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize
