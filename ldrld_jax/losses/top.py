"""Selection of the largest classes of a row of logits without a sort or a gather of rows or sharded classes."""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import platform_dependent

from ldrld_jax.losses.divergence import RULED_OUT, AxisName

Entry = tuple[jax.Array, jax.Array]  # a value and its class


class Top(NamedTuple):
    """The largest classes of one row, in descending order; ties go to the lower class.

    Attributes:
      values: `[k]` logits, -inf raised to `RULED_OUT`.
      classes: `[k]` in the dtype of the logits, whole numbers over all shards; exact up to 2^24 classes in float32.
    """

    values: jax.Array
    classes: jax.Array


def top_classes(logits: jax.Array, depth: int, axis_name: AxisName = None) -> Top:
    """Finds the `depth` largest of `logits` `[C]`, exactly.

    There is one selection for CPUs and one for all other platforms; each platform lowers its own.
    `lax.top_k` is avoided: it gathers a batch-sharded array onto every device, and on CPU it may turn
    into a full sort.

    Args:
      logits: `[C]`, float32 or float64 (half precision has too few whole numbers for classes); NaN makes every value
        NaN.
      depth: at most the number of classes over all shards.
      axis_name: mapped axes over which the classes are sharded; depth candidates of each shard are
        merged, and the logits stay in place.

    Example:
      >>> top = top_classes(jnp.array([1.0, 3.0, 3.0, 2.0]), 3)
      >>> top.classes.tolist(), top.values.tolist()
      ([1.0, 2.0, 3.0], [3.0, 3.0, 2.0])
    """
    local_depth = min(depth, logits.size)
    cpu, default = (functools.partial(select, depth=local_depth) for select in (_by_blocks, _by_rounds))
    top = platform_dependent(logits, cpu=cpu, default=default)
    if axis_name is None:
        return top
    top = top._replace(classes=top.classes + _first_class(logits, axis_name))
    return _largest(concatenated(top.values, axis_name), concatenated(top.classes, axis_name), depth)


def not_in_top(logits: jax.Array, top: Top, axis_name: AxisName = None) -> jax.Array:
    """Returns a mask `[C]` of the `logits` `[C]` that rank after the last of `top`.

    A class ranks after it if it is smaller, or equal with a higher index: three comparisons instead of a scatter.
    """
    last, last_class = top.values[-1], top.classes[-1]
    classes = jnp.arange(logits.size, dtype=logits.dtype)
    if axis_name is not None:
        classes = classes + _first_class(logits, axis_name)
    raised = jnp.maximum(logits, jnp.asarray(RULED_OUT, logits.dtype))
    # Where XLA computes the logits anew, the last class may come out smaller than its value: see `_by_rounds`.
    return ((raised < last) & (classes != last_class)) | ((raised == last) & (classes > last_class))


def ranks_of(logits: jax.Array, top: Top) -> jax.Array:
    """Counts the `logits` `[C]` that rank before each class of `top`, `[k]` int32; ties go to the lower class.

    `top` is of other logits of the same classes. One pass over `logits` says which of its classes are among
    the largest here, without a second selection.

    Example:
      >>> top = top_classes(jnp.array([1.0, 3.0, 3.0, 2.0]), 2)  # classes 1 and 2
      >>> ranks_of(jnp.array([0.0, 4.0, -1.0, 0.0]), top).tolist()
      [0, 3]
    """
    lowest = jnp.asarray(RULED_OUT, logits.dtype)
    own = jnp.maximum(take(logits, top), lowest)[:, None]
    raised, classes = jnp.maximum(logits, lowest)[None], jnp.arange(logits.size, dtype=logits.dtype)[None]
    # A class never ranks before itself, also where XLA computes the logits anew: see `_by_rounds`.
    above = (raised > own) & (classes != top.classes[:, None])
    before = above | ((raised == own) & (classes < top.classes[:, None])) | jnp.isnan(own)  # a NaN ranks last
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def take(logits: jax.Array, top: Top, axis_name: AxisName = None) -> jax.Array:
    """Returns the entries of `logits` `[C]` at `top`, `[k]`, across all shards.

    The derivative compares each class with the k chosen ones. It fuses with the rest of the gradient of the
    logits, while a scatter (the transpose of a gather) would need a pass of its own.
    """
    chosen = top.classes - _first_class(logits, axis_name)
    values = platform_dependent(logits, chosen, cpu=_gathered, default=_matched)
    return values if axis_name is None else jax.lax.psum(values, axis_name)


@take.defjvp
def _(axis_name, primals, tangents):
    return take(*primals, axis_name), _tangent_at(tangents[0], primals[1], axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def take_own(logits: jax.Array, top: Top, axis_name: AxisName = None) -> jax.Array:
    """Returns the entries of `logits` `[C]` at their own `top`, `[k]`, which are its values, without a second pass.

    The derivative is that of `take`, and 0 for an entry that was raised to `RULED_OUT`.
    """
    return top.values


@take_own.defjvp
def _(axis_name, primals, tangents):
    values = take_own(*primals, axis_name)
    tangent = _tangent_at(tangents[0], primals[1], axis_name)
    return values, jnp.where(values == RULED_OUT, jnp.zeros_like(tangent), tangent)


def _tangent_at(tangent: jax.Array, top: Top, axis_name: AxisName) -> jax.Array:
    """Returns the tangent of logits, `[C]`, at `top`, `[k]`, across all shards."""
    # Recomputed in the backward pass, so that its residuals are the classes and not k masks of size C.
    matched = jax.checkpoint(_matched, prevent_cse=False)
    values = matched(tangent, top.classes - _first_class(tangent, axis_name))
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def _gathered(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns `logits` `[C]` at `classes` `[k]`, 0 for a class outside the shard."""
    index = classes.astype(jnp.int32)
    inside = (index >= 0) & (index < logits.size)
    return jnp.where(inside, logits[jnp.clip(index, 0, logits.size - 1)], jnp.zeros((), logits.dtype))


def _matched(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Computes `_gathered` by comparisons: an accelerator reads the logits faster than it gathers."""
    own = jnp.arange(logits.size, dtype=logits.dtype)
    zero = jnp.zeros((), logits.dtype)
    return jnp.stack([jnp.sum(jnp.where(own == classes[k], logits, zero)) for k in range(classes.size)])


def _first_class(logits: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the index of the shard's first class, a scalar in the dtype of `logits` `[C]`."""
    shard = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    return jnp.asarray(shard * logits.size, logits.dtype)


def _by_rounds(logits: jax.Array, depth: int) -> Top:
    """Finds the four largest remaining classes in each pass over `logits` `[C]`.

    A pass is one reduction over values and classes, and writes only its result. Eight per pass would save another
    pass, but an accelerator's compiler takes much longer over them (docs/loss_speed.md).
    """
    classes = jnp.arange(logits.size, dtype=logits.dtype)
    logits = jnp.maximum(logits, jnp.asarray(RULED_OUT, logits.dtype))
    lowest, highest = jnp.asarray(-jnp.inf, logits.dtype), jnp.asarray(jnp.inf, logits.dtype)
    nothing = jnp.broadcast_to(lowest, logits.shape), jnp.broadcast_to(highest, logits.shape)
    found: list[Entry] = []
    while len(found) < depth:
        # By class and not by value: a program may compute its logits on the way, by scaling and shifting others, and
        # XLA does so anew in each pass. Where it contracts one into the other they round differently.
        remain = ~_is_one_of(classes, [c for _, c in found])
        candidates = jnp.where(remain, logits, lowest)
        missing = depth - len(found)
        number = missing if missing <= 2 else 4  # a power of two, as the merge needs
        entries = (candidates, classes), *(nothing,) * (number - 1)
        flat = jax.lax.reduce(_flat(entries), (lowest, highest) * number, _best_of_both, (0,))
        found += _entries(flat)
    values, of_values = zip(*found[:depth], strict=True)
    first = values[0]  # where there is a NaN, it is one
    return Top(jnp.stack([jnp.where(jnp.isnan(first), first, value) for value in values]), jnp.stack(of_values))


def _is_one_of(classes: jax.Array, some: Iterable[jax.Array]) -> jax.Array:
    """Returns which of `classes` `[C]` are one of `some`, by a comparison with each; XLA fuses them."""
    return functools.reduce(jnp.logical_or, (classes == c for c in some), jnp.zeros(classes.shape, bool))


def _best_of_both(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Merges two rankings `(value, class, value, class, ...)` of 1, 2 or 4 entries into their best, as many as one has.

    The better one of each entry and its opposite (the first with the last) are the best of both. They come in
    bitonic order, which compares and swaps at halving distances sort.
    """
    best = [_in_order(a, b)[0] for a, b in zip(_entries(one), reversed(_entries(other)), strict=True)]
    distance = len(best) // 2
    while distance:
        for k in range(len(best)):
            if not k & distance:
                best[k], best[k + distance] = _in_order(best[k], best[k + distance])
        distance //= 2
    return _flat(best)


def _in_order(one: Entry, other: Entry) -> tuple[Entry, Entry]:
    """Returns the entry that ranks first, and then the other; NaN ranks before all, and ties go to the lower class."""
    (value, c), (other_value, other_c) = one, other
    ahead = (value > other_value) | jnp.isnan(value) | ((value == other_value) & (c < other_c))
    first = jnp.where(ahead, value, other_value), jnp.where(ahead, c, other_c)
    return first, (jnp.where(ahead, other_value, value), jnp.where(ahead, other_c, c))


def _flat(entries: Iterable[Entry]) -> tuple[jax.Array, ...]:
    return tuple(itertools.chain.from_iterable(entries))


def _entries(flat: tuple[jax.Array, ...]) -> list[Entry]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _by_blocks(logits: jax.Array, depth: int) -> Top:
    """Finds the largest in one pass over `logits` `[C]` and d rounds over about sqrt(C) numbers.

    The d largest lie in the d blocks of classes with the largest maxima. This is the fastest method on CPU. On
    an accelerator the gather of the blocks costs more than d passes.
    """
    block = _block_size(logits.size, depth)
    if block == 1:
        return _largest(logits, jnp.arange(logits.size, dtype=logits.dtype), depth)
    whole = logits.size // block * block
    maxima = jnp.max(logits[:whole].reshape(-1, block), axis=-1)
    if whole < logits.size:
        maxima = jnp.append(maxima, jnp.max(logits[whole:]))
    blocks = _largest(maxima, jnp.arange(maxima.size, dtype=logits.dtype), depth).classes
    candidates = (blocks.astype(jnp.int32)[:, None] * block + jnp.arange(block, dtype=jnp.int32)[None, :]).reshape(-1)
    # The last block may reach past the end.
    values = logits.at[candidates].get(mode="fill", fill_value=-jnp.inf)
    return _largest(values, candidates.astype(logits.dtype), depth)


def _block_size(classes: int, depth: int) -> int:
    """Returns a power of two near sqrt(C / d), which balances the blocks against d blocks' entries; 1: no blocks."""
    block = 2 ** round(math.log2(math.sqrt(classes / depth)))
    return block if block >= 4 and classes >= 4 * block * depth else 1


def _largest(values: jax.Array, classes: jax.Array, depth: int) -> Top:
    """Finds the `depth` largest of `values` `[n]` by repeated maximum; ties go to the lowest of `classes` `[n]`.

    The classes are floats because on CPU XLA vectorises a float maximum but not an argmax (6 times slower).
    """
    values = jnp.maximum(values, jnp.asarray(RULED_OUT, values.dtype))
    found = []
    for k in range(depth):
        value = jnp.max(values)
        lowest = -jnp.max(jnp.where(values == value, -classes, -jnp.inf))
        lost = jnp.isnan(value)
        lowest = jnp.where(lost, classes[k], lowest)  # a NaN equals nothing, and its class is any
        found.append((value, lowest))
        values = jnp.where(classes == lowest, jnp.where(lost, value, -jnp.inf), values)
    return Top(*(jnp.stack(column) for column in zip(*found, strict=True)))


def concatenated(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Returns the `[n, ...]` of all shards in one; a psum marks the result as replicated, unlike an all-gather."""
    shard, shards = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    mine = (jnp.arange(shards) == shard).reshape(-1, *(1,) * x.ndim)
    slots = jnp.where(mine, x[None], jnp.zeros((), x.dtype))
    return jax.lax.psum(slots, axis_name).reshape(-1, *x.shape[1:])


def top_mask(logits: jax.Array, depth: int) -> jax.Array:
    """Marks the `depth` largest of each row, `[..., C]` to `[..., C]` bool; ties go to the lower class.

    Example:
      >>> top_mask(jnp.array([[1.0, 3.0, 3.0, 2.0]]), 1).tolist()
      [[False, True, False, False]]
    """
    rows = logits.reshape(-1, logits.shape[-1])
    return jax.vmap(lambda z: ~not_in_top(z, top_classes(z, depth)))(rows).reshape(logits.shape)
