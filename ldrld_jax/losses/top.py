"""The largest classes of a row of logits: without a sort, without a gather of rows or of sharded classes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldrld_jax.losses.divergence import RULED_OUT

AxisName = str | tuple[str, ...] | None


class Top(NamedTuple):
    """The largest classes of one row, in descending order; of equal logits the lower class comes first.

    Attributes:
      values: `[k]` logits, -inf raised to `RULED_OUT`.
      classes: `[k]` in the dtype of the logits, whole numbers over all shards; exact up to 2^24 classes in float32.
    """

    values: jax.Array
    classes: jax.Array


def top_classes(logits: jax.Array, depth: int, axis_name: AxisName = None) -> Top:
    """The `depth` largest of `logits` `[C]`, exactly.

    The d largest lie in the d blocks of classes with the largest maxima, so one pass finds the
    blocks' maxima and the rest is done on about sqrt(C) numbers. `lax.top_k` gathers a
    batch-sharded array onto every device, and on CPU it may turn into a full sort.

    Args:
      logits: `[C]`, floating; NaN makes every value NaN.
      depth: at most the number of classes over all shards.
      axis_name: mapped axes over which the classes are sharded; depth candidates of each shard
        are merged, the logits stay where they are.

    Example:
      >>> top = top_classes(jnp.array([1.0, 3.0, 3.0, 2.0]), 3)
      >>> top.classes.tolist(), top.values.tolist()
      ([1.0, 2.0, 3.0], [3.0, 3.0, 2.0])
    """
    classes = jnp.arange(logits.size, dtype=logits.dtype)
    local_depth = min(depth, logits.size)
    block = _block_size(logits.size, depth)
    if block == 1:
        top = _largest(logits, classes, local_depth)
    else:
        whole = logits.size // block * block
        maxima = jnp.max(logits[:whole].reshape(-1, block), axis=-1)
        if whole < logits.size:
            maxima = jnp.append(maxima, jnp.max(logits[whole:]))
        blocks = _largest(maxima, jnp.arange(maxima.size, dtype=logits.dtype), depth).classes
        candidates = (blocks.astype(jnp.int32)[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None, :]).reshape(
            -1
        )
        # The last block may reach past the end.
        values = logits.at[candidates].get(mode="fill", fill_value=-jnp.inf)
        top = _largest(values, candidates.astype(logits.dtype), depth)
    if axis_name is None:
        return top
    shard = jax.lax.axis_index(axis_name)
    top = top._replace(classes=top.classes + (shard * logits.size).astype(logits.dtype))
    return _largest(_concatenate(top.values, axis_name), _concatenate(top.classes, axis_name), depth)


def not_in_top(logits: jax.Array, top: Top, axis_name: AxisName = None) -> jax.Array:
    """Which of `logits` `[C]` rank after the last of `top`, a mask `[C]`.

    Two comparisons a class instead of a scatter: what ranks after is smaller, or equal and a higher class.
    """
    last, last_class = top.values[-1], top.classes[-1]
    classes = jnp.arange(logits.size, dtype=logits.dtype)
    if axis_name is not None:
        classes = classes + (jax.lax.axis_index(axis_name) * logits.size).astype(logits.dtype)
    raised = jnp.maximum(logits, jnp.asarray(RULED_OUT, logits.dtype))
    return (raised < last) | ((raised == last) & (classes > last_class))


def take(logits: jax.Array, top: Top, axis_name: AxisName = None) -> jax.Array:
    """The entries of `logits` `[C]` at `top`, `[k]`, whichever shard they lie on."""
    classes = top.classes.astype(jnp.int32)
    if axis_name is None:
        return logits[classes]
    classes = classes - jax.lax.axis_index(axis_name) * logits.size
    mine = (classes >= 0) & (classes < logits.size)
    values = logits[jnp.clip(classes, 0, logits.size - 1)]
    return jax.lax.psum(jnp.where(mine, values, jnp.zeros_like(values)), axis_name)


def _block_size(classes: int, depth: int) -> int:
    """A power of two near sqrt(C / d), which balances the blocks against what lies in d of them; 1: no blocks."""
    block = 2 ** round(math.log2(math.sqrt(classes / depth)))
    return block if block >= 4 and classes >= 4 * block * depth else 1


def _largest(values: jax.Array, classes: jax.Array, depth: int) -> Top:
    """The `depth` largest of `values` `[n]` by repeated maximum, of equal ones the lowest of `classes` `[n]` first.

    The classes are floats because XLA vectorises a float maximum on CPU and not an argmax (6 times slower).
    """
    values = jnp.maximum(values, jnp.asarray(RULED_OUT, values.dtype))
    found = []
    for _ in range(depth):
        value = jnp.max(values)
        lowest = -jnp.max(jnp.where(values == value, -classes, -jnp.inf))
        found.append((value, lowest))
        values = jnp.where(classes == lowest, -jnp.inf, values)
    return Top(*(jnp.stack(column) for column in zip(*found, strict=True)))


def _concatenate(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """The `[k]` of every shard one after another, the same on all: a psum, so that it counts as replicated."""
    shard, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    mine = (jnp.arange(shards) == shard)[:, None]
    slots = jnp.where(mine, values[None, :], jnp.zeros((), values.dtype))
    return jax.lax.psum(slots, axis_name).reshape(-1)
