"""Metrics: means as (sum, count) pairs, which add up over steps, devices and hosts."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A mean that can be accumulated over steps, devices and hosts."""

    total: Any
    count: Any

    def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


Means = dict[str, Mean]

MEASURED = frozenset(
    {"loss", "ce", "ce_term", "top1", "top5", "agreement", "top_d_overlap", "label_in_top_d"}
    | {"learning_rate", "skipped", "non_finite", "examples_per_second", "epoch", "step"}
)
"""Names that each run measures or counts; the terms of a user's loss and a user's metrics have others."""


def curve_of(name: str) -> str:
    """Returns a metric's name as TensorBoard shows it; names that MLflow shows alike are alike here too.

    Example:
      >>> curve_of("of class 3/f-1")
      'of_class_3/f-1'
    """
    return re.sub(r"[^\w\-./]", "_", name)


def mean_of(values: jax.Array, where: jax.Array | None = None) -> Mean:
    """Returns the mean of `values` `[...]` where `where` `[...]` is True, in float32 (float64 for float64).

    Raises:
      ValueError: if `where` has another shape than `values`, or is not boolean.
    """
    if where is not None and (where.shape != values.shape or where.dtype != jnp.bool_):
        raise ValueError(f"where must be boolean {values.shape}, got {where.dtype} {where.shape}.")
    values = at_least_float32(values)
    kept = jnp.ones(values.shape, bool) if where is None else where
    return Mean(jnp.sum(jnp.where(kept, values, 0)), jnp.sum(kept, dtype=values.dtype))


def at_least_float32(x: jax.Array) -> jax.Array:
    """Casts to float32, unless the array is float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _percent(shares: jax.Array, where: jax.Array | None) -> Mean:
    """Returns the mean of `[...]` shares or booleans, in percent; float64 under x64."""
    return mean_of(100 * shares.astype(float), where)


def add(left: Means, right: Means) -> Means:
    """Adds two sets of means; a name that only one of them has is kept.

    Example:
      >>> add({"loss": Mean(1.0, 1)}, {"loss": Mean(3.0, 1)})["loss"].value
      2.0
    """
    both = left | right
    return both | {name: left[name] + right[name] for name in left.keys() & right.keys()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Means in a single array, because each transfer from an accelerator costs as much as many numbers.

    Attributes:
      values: `[2, names]`, totals and counts; `[k, 2, names]` for k steps.
      names: names of the means.
    """

    values: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def pack(means: Means) -> Packed:
    """Packs means of scalars into one array, float64 if any of them is float64, otherwise float32."""
    wide = any(number.dtype == jnp.float64 for mean in means.values() for number in mean)
    dtype = jnp.float64 if wide else jnp.float32
    rows = [[getattr(mean, part).astype(dtype) for mean in means.values()] for part in Mean._fields]
    return Packed(jnp.stack([jnp.stack(row) for row in rows]), tuple(means))


def packed(step: Callable[..., tuple[Any, Means]]) -> Callable[..., tuple[Any, Packed]]:
    """Wraps a train step so that it returns packed metrics."""

    def stepped(*arguments: Any) -> tuple[Any, Packed]:
        state, means = step(*arguments)
        return state, pack(means)

    return stepped


def by_step(metrics: Packed) -> list[Means]:
    """Transfers the means of one or several steps to the host, one set per step; waits for the device.

    Example:
      >>> by_step(pack({"loss": Mean(jnp.array(6.0), jnp.array(2.0))}))[0]["loss"].value
      3.0
    """
    values = np.asarray(metrics.values)
    steps = values if values.ndim == 3 else values[None]
    return [{name: Mean(*map(float, pair)) for name, pair in zip(metrics.names, step.T, strict=True)} for step in steps]


def at_labels(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the value of each row at its label, `[..., C]` floats to `[...]`; NaN for a label out of range.

    Example:
      >>> at_labels(jnp.array([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]), jnp.array([1, -1, 2])).tolist()
      [0.75, nan, nan]
    """
    if labels.dtype.itemsize > 4:  # a cast to 32 bits would turn 2^32 + k into class k
        labels = labels.clip(-1 if jnp.issubdtype(labels.dtype, jnp.signedinteger) else 0, values.shape[-1])
    labels = jnp.asarray(labels, jnp.int32)  # a small dtype need not hold C
    labels = jnp.where(labels < 0, values.shape[-1], labels)  # negative indices would count from the end
    return jnp.take_along_axis(values, labels[..., None], axis=-1, mode="fill")[..., 0]


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns whether each label `[...]` is among the k largest logits `[..., C]`; ties go to the lower class.

    A row with a NaN, a label out of range or a logit of the label that is not finite is never right. It counts
    the logits above the label's, which needs no sort.

    Example:
      >>> in_top(jnp.array([[0.1, 0.7, 0.2]]), jnp.array([2]), 2).tolist()
      [True]
    """
    own = at_labels(logits, labels)[..., None]
    classes = jnp.arange(logits.shape[-1]).reshape(*(1,) * labels.ndim, -1)
    # A class never ranks before itself, also where XLA computes the logits anew and rounds them differently.
    above = (logits > own) & (classes != labels[..., None])
    before = above | ((logits == own) & (classes < labels[..., None]))
    comparable = jnp.isfinite(own[..., 0]) & ~jnp.any(jnp.isnan(logits), axis=-1)
    return (jnp.sum(before, axis=-1) < k) & comparable


def classification(logits: jax.Array, labels: jax.Array, where: jax.Array | None = None) -> Means:
    """Computes the cross-entropy in nats, and top-1 and top-5 in percent, over the rows that a mask keeps.

    Args:
      logits: `[..., C]`.
      labels: `[...]`.
      where: `[...]` bool.

    Example:
      >>> logits = jnp.zeros((1, 3, 8)).at[0, :, 2].set(1.0)  # of a text of three tokens
      >>> found = classification(logits, jnp.array([[2, 3, 0]]), jnp.array([[True, True, False]]))
      >>> found["top1"].value, found["top1"].count.item()
      (50.0, 2.0)
    """
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    nll = -at_labels(log_p, labels)
    tops = {f"top{k}": _percent(in_top(logits, labels, k), where) for k in (1, 5)}
    return {"ce": mean_of(nll, where), **tops}


def agreement(labels: jax.Array, classes: jax.Array, ranks: jax.Array, where: jax.Array | None = None) -> Means:
    """Compares student and teacher, in percent.

    `agreement`: both have the same largest class. `top_d_overlap`: the share of the student's d largest
    classes that are among the teacher's. `label_in_top_d`: the label is among the student's d largest.

    Args:
      labels: `[...]`.
      classes: `[..., d]` floats, the student's d largest classes in descending order.
      ranks: `[..., d]`, the rank of each of them in the teacher's logits, 0 for the largest.
      where: `[...]` bool; rows where it is False are ignored.

    Example:
      >>> found = agreement(jnp.array([2]), classes=jnp.array([[1.0, 0.0]]), ranks=jnp.array([[0, 2]]))
      >>> {name: mean.value for name, mean in found.items()}
      {'agreement': 100.0, 'top_d_overlap': 50.0, 'label_in_top_d': 0.0}
    """
    depth = classes.shape[-1]
    shared = _percent(jnp.sum(ranks < depth, axis=-1), where)  # divided at the end: float32 has no third
    return {
        "agreement": _percent(ranks[..., 0] == 0, where),
        "top_d_overlap": shared._replace(count=shared.count * depth),
        "label_in_top_d": _percent(jnp.any(classes == labels[..., None].astype(classes.dtype), axis=-1), where),
    }
