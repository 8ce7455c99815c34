"""Checks of what a run is given by tracing it on shapes, before anything is computed: models and metrics."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldrld_jax.data.stream import Readable
from ldrld_jax.errors import UserError, one_line
from ldrld_jax.models.purify import path_name
from ldrld_jax.models.table import traced
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Metric, Network

_IMAGES = 2  # in a traced pass: with one, a shape that lacks the axis of the examples could be taken for logits


@dataclasses.dataclass(frozen=True)
class Forward:
    """A network's evaluation of images of one shape.

    Attributes:
      params: the shapes of its parameters.
      flops: of the forward pass of one image, see `models.table.traced`.
      logits: what it returns, as shapes.
    """

    params: Any
    flops: int
    logits: Any

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def check_evaluation(networks: Networks, model: str, image_size: int | None, source: Readable) -> Forward:
    """Traces a model's evaluation of the images of a split.

    Args:
      networks: the factory of networks for the run's data.
      model: its name.
      image_size: of the block that says how images are fed.
      source: the split.

    Raises:
      UserError: if it fails, or returns anything but logits `[n, C]`, `[n, ..., C]` for several labels each.
    """
    trace = _trace if model in networks.given else _trace_once
    shape, dtype = tuple(source.image_shape), source.dtype
    try:
        forward = trace(networks, model, shape, dtype, image_size)
    except UserError:
        raise
    except Exception as error:
        raise _failure(model, "fails", source, error) from error
    _check_logits(model, "returns", forward.logits, source)
    return forward


def _trace(networks: Networks, model: str, shape: tuple[int, ...], dtype: Any, image_size: int | None) -> Forward:
    block = ConfigDict({"mean": (0.0,), "std": (1.0,), "image_size": image_size})
    network, variables = networks.outline(model, block)
    forward = lambda v, x: network(v, x, train=False)[0]  # noqa: E731
    flops, logits = traced(forward, variables, (_IMAGES, *shape), dtype)
    return Forward(variables.params, flops // _IMAGES, logits)


_trace_once = functools.lru_cache(maxsize=64)(_trace)  # the runs of a process share their models; some take seconds


def check_training(model: str, network: Network, variables: Variables, source: Readable, *, masked: bool) -> None:
    """Traces a training pass of a user's own model.

    Args:
      model: its name.
      network, variables: the student.
      source: the training split.
      masked: whether batches have padding.

    Raises:
      UserError: if a step could not train it.
    """
    if not jax.tree.leaves(variables.params):
        raise UserError(f"the model {model} has no parameters, so that there is nothing to train. Give it some.")
    dotted = collections.Counter(
        path_name(path).replace("/", ".") for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    )
    if twice := [name for name, count in dotted.items() if count > 1]:
        raise UserError(
            f"the model {model} has two variables of the path {twice[0]}, where a name may not hold a dot, so that a "
            "checkpoint would mix them up. Rename one."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(
                f"the model {model} has parameters {path_name(path)} of {leaf.dtype}, which no gradient changes. Make "
                "them an nnx.Variable, or of Linen another collection."
            )

    def forward(variables: Variables, images: jax.Array) -> tuple[Any, Any, Any]:
        where = jnp.ones(_IMAGES, bool) if masked else None
        key = jax.random.key(0) if network.random else None
        logits, after = network(variables, images, train=True, where=where, key=key)
        return logits, variables.batch_stats, after

    images = jax.ShapeDtypeStruct((_IMAGES, *source.image_shape), source.dtype)
    try:
        logits, *stats = jax.eval_shape(forward, variables, images)
    except UserError:
        raise
    except Exception as error:
        raise _failure(model, "fails in training", source, error) from error
    _check_logits(model, "in training returns", logits, source)
    before, after = ({path_name(path): _form(x) for path, x in jax.tree_util.tree_leaves_with_path(s)} for s in stats)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            raise UserError(
                f"the model {model} changes its variables in training: {name} is {after.get(name, 'not there')} after "
                f"a pass, and was {before.get(name, 'not there')}. A checkpoint needs the same ones after each step. "
                "Leave out what adds them, such as sow, or give Linen's variables without that collection."
            )


def _failure(model: str, fails: str, source: Readable, error: Exception) -> UserError:
    cause, shape = one_line(error), (_IMAGES, *source.image_shape)
    hint = " A model that passes **options on must name those that it takes." * ("unexpected keyword arg" in cause)
    return UserError(f"the model {model} {fails} on images {shape} {source.dtype}: {cause}{hint}")


def _check_logits(model: str, returns: str, logits: Any, source: Readable) -> None:
    wanted = (_IMAGES, *source.label_shape, len(source.class_names))
    shape = getattr(logits, "shape", None)
    if shape == wanted and jnp.issubdtype(logits.dtype, jnp.floating):
        return
    labels = f" and labels [n, {', '.join(map(str, source.label_shape))}]" if source.label_shape else ""
    shown = type(logits).__name__ if shape is None else _form(logits)
    raise UserError(
        f"the model {model} {returns} {shown} for {_IMAGES} images, and must return logits {wanted}: the data have "
        f"{wanted[-1]} classes{labels}."
    )


def check_metrics(
    metrics: Mapping[str, Metric],
    rows: int,
    source: Readable,
    precision: str,
    *,
    masked: bool = True,
) -> None:
    """Traces a user's metrics.

    Args:
      metrics: by name.
      rows: of a batch.
      source: the split.
      precision: of the run.
      masked: whether batches have a mask.

    Raises:
      UserError: if one fails, or returns anything but a real number, integer or boolean for each label.
    """
    labels = jax.ShapeDtypeStruct((rows, *source.label_shape), jnp.int32)
    dtype = jnp.float64 if precision == "float64" else jnp.float32
    logits = jax.ShapeDtypeStruct((*labels.shape, len(source.class_names)), dtype)
    where = jax.ShapeDtypeStruct(labels.shape, bool) if masked else None
    for name, metric in metrics.items():
        given = f"logits {logits.shape}, labels {labels.shape} and {'a mask' if masked else 'where=None'}"
        try:
            found = jax.eval_shape(metric, logits, labels, where)
        except Exception as error:
            raise UserError(f"the metric {name!r} fails on {given}: {one_line(error)}") from error
        real = (jnp.floating, jnp.integer, jnp.bool)
        if getattr(found, "shape", None) != labels.shape or not any(jnp.issubdtype(found.dtype, kind) for kind in real):
            shown = _form(found) if hasattr(found, "shape") else type(found).__name__
            raise UserError(
                f"the metric {name!r} returns {shown} for {given}, and must return a real number, an integer or a "
                f"boolean for each label, {labels.shape}. The run takes the mean."
            )


def _form(array: Any) -> str:
    return f"{array.dtype} {tuple(array.shape)}"
