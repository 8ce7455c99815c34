"""Helpers shared by all losses: validated configs, checked logits, the mean over the rows of a mask."""

import dataclasses
import functools
import math
import typing
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.losses.divergence import AxisName
from ldrld_jax.losses.top import concatenated

Positive = Annotated[float, "positive"]


class Between(NamedTuple):
    """The bounds of a number, both allowed: `Annotated[int, Between(2)]` as the type of a config's field.

    Example:
      >>> str(Between(2)), str(Between(0, 1))
      ('at least 2', 'between 0 and 1')
    """

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"


def bounds_of(kind: Any) -> Between | None:
    """Returns the bounds of a field's type, if it has any."""
    found = [extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Between)]
    return found[0] if found else None


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """Converts `value` to `kind`, or raises a ValueError that states the allowed values."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a plain value, got a traced array: configs are static under jit.")
    if isinstance(value, np.bool_ | jax.Array) and value.dtype == jnp.bool_ and value.ndim == 0:
        value = bool(value)
    if type(None) in get_args(kind):
        return None if value is None else _coerce(name, value, get_args(kind)[0])
    if bounds := bounds_of(kind):
        value = _coerce(name, value, get_args(kind)[0])
        if not bounds.low <= value <= bounds.high:
            raise ValueError(f"{name} must be {bounds}, got {value}.")
        return value
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(value, bool) or np.ndim(value) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        return choices[choices.index(value)]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
        return value
    try:
        if isinstance(value, bool | str) or np.ndim(value) or np.asarray(value).dtype.kind not in "iufO":
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # NumPy's for a ragged list
        raise ValueError(f"{name} must be a number, got {value!r}.") from None
    if kind is int:
        if not number.is_integer() or number < 0:
            raise ValueError(f"{name} must be a whole number and not negative, got {value!r}.")
        return int(value)
    value = number
    positive = kind is Positive
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "finite and above 0" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {allowed}, got {value}.")
    return value


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base class of the method configs: coerces each field to its annotated type and checks it.

    Floats must be finite and not negative (`Positive`: above 0), so that a typo fails here and not as
    a NaN thousands of steps later. A field annotated `KIND | None` may be None. Subclasses must be
    registered static, to pass through `jax.jit` and `jax.vmap` as arguments; they cannot be traced.

    Raises:
      ValueError: if a field is out of its range.
    """

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, _coerce(name, getattr(self, name), kind))


@functools.cache
def _kinds(config: type[MethodConfig]) -> dict[str, Any]:
    """Returns the types of a config's fields; `from __future__ import annotations` makes them text."""
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    if any(isinstance(kind, str) for kind in kinds.values()):
        hints = typing.get_type_hints(config, include_extras=True)
        kinds = {name: hints[name] for name in kinds}
    return kinds


def check_logits(teacher_logits: jax.Array, student_logits: jax.Array) -> None:
    """Raises a ValueError unless both are floating arrays of the same shape `[..., C]`."""
    for side, logits in (("teacher", teacher_logits), ("student", student_logits)):
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"{side}_logits must be floating, got {logits.dtype}. Pass logits, not labels.")
        if logits.ndim == 0:
            raise ValueError(f"{side}_logits must have shape [..., classes], got a scalar.")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            "teacher_logits and student_logits must have one shape [..., classes], "
            f"got {teacher_logits.shape} and {student_logits.shape}."
        )


def computed_in(*logits: jax.Array) -> Any:
    """Returns the dtype that a loss is computed in: float64 if any of the logits are, otherwise float32."""
    return jnp.float64 if any(z.dtype == jnp.float64 for z in logits) else jnp.float32


def prepare_logits(
    teacher_logits: jax.Array, student_logits: jax.Array, where: jax.Array | None = None, *, infinite: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Checks both logits, raises them to float32 at least and stops the gradient into the teacher.

    Rows where `where` is False are set to 0, so that a NaN there reaches neither the value nor
    the gradient. If a row of either side holds an infinite logit or a NaN, the student's row becomes NaN, so that the
    value and the row's gradient are both NaN, unless `infinite` says that the loss gives a meaning to infinite logits.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.
    """
    teacher, student = jnp.asarray(teacher_logits), jnp.asarray(student_logits)
    check_logits(teacher, student)
    dtype = computed_in(teacher, student)
    teacher, student = jax.lax.stop_gradient(teacher).astype(dtype), student.astype(dtype)
    if where is not None:
        kept = check_rows("where", where, student.shape[:-1])[..., None]
        teacher, student = (jnp.where(kept, z, jnp.zeros((), dtype)) for z in (teacher, student))
    if not infinite:
        finite = jnp.all(jnp.isfinite(teacher) & jnp.isfinite(student), axis=-1, keepdims=True)
        student *= jnp.where(finite, jnp.ones((), dtype), jnp.nan)  # a factor also makes the gradient NaN
    return teacher, student


def check_rows(name: str, rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `rows` as an array; raises a ValueError unless it has one entry per row of logits, `shape`."""
    rows = jnp.asarray(rows)
    if rows.shape != shape:
        raise ValueError(f"{name} must have the shape of the logits without classes, {shape}, got {rows.shape}.")
    if name == "where" and rows.dtype != jnp.bool_:
        raise ValueError(f"where must be boolean, got {rows.dtype}. Compare it with 0, or pass it as weights.")
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real numbers, got {rows.dtype}.")
    return rows


def row_weights(
    weights: jax.Array | None, where: jax.Array | None, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns the weight of each row, `shape`: 1 without weights, and 0 where `where` is False.

    Raises:
      ValueError: if a shape differs, `where` is not boolean, or the weight of a row that counts is negative or not
        finite and its value is known; under `jit` it is not.
    """
    kept = jnp.ones(shape, dtype) if weights is None else check_rows("weights", weights, shape).astype(dtype)
    if where is not None:
        kept = jnp.where(check_rows("where", where, shape), kept, jnp.zeros((), dtype))
    if weights is not None and not isinstance(kept, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # the values are known, perhaps as constants of a function that is traced
            wrong = ~((kept >= 0) & (kept < jnp.inf))
            if wrong.any():
                raise ValueError(
                    f"weights must be finite and not negative, got {kept[wrong][0]}. Leave rows out by where."
                )
    return kept


def mean_over_rows(
    values: jax.Array,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    r"""Computes the weighted mean of per-example values over the rows that a mask keeps.

    .. math:: \sum_i w_i v_i / \sum_i w_i

    Args:
      values: `[...]`, floating.
      where: `[...]` bool; rows where it is False get weight 0.
      weights: `[...]`, finite and not negative.
      axis_name: mapped axes (`pmap`, `shard_map`) that both sums also run over.

    Returns:
      A scalar of the dtype of `values`; 0 if no row counts.

    Raises:
      ValueError: if the shape of `where` or `weights` differs from that of `values`, `where` is not boolean, or a
        weight is negative or not finite and its value is known; under `jit` such a NaN makes the mean NaN.
    """
    kept = row_weights(weights, where, values.shape, values.dtype)
    if where is not None:
        values = jnp.where(jnp.asarray(where), values, jnp.zeros((), values.dtype))  # 0 times NaN is NaN
    total, count = jnp.sum(values * kept), jnp.sum(kept)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    # The inner where keeps the division finite, so that the gradient of an empty mask is 0 and not NaN. A weight of NaN
    # is no empty mask.
    empty = count == 0
    return jnp.where(empty, jnp.zeros_like(total), total / jnp.where(empty, jnp.ones_like(count), count))


def batch_rows(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    where: jax.Array | None,
    weights: jax.Array | None,
    axis_name: AxisName = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Prepares the rows of a whole batch for a loss that compares them.

    Args:
      teacher_logits: `[..., C]`.
      student_logits: the same shape.
      where: `[...]` bool or None.
      weights: `[...]`, non-negative, or None.
      axis_name: mapped axes (`pmap`, `shard_map`) whose shards hold the rest of the batch, with equally many rows.

    Returns:
      Both logits as `[N, C]`, the weights `[N]` scaled to a mean of 1 over the rows that count (0 for
      the others), and the number of rows that count, a scalar. N is the number of rows over all shards.
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    shape, dtype = student.shape[:-1], student.dtype
    kept = row_weights(weights, where, shape, dtype)
    classes = student.shape[-1]
    teacher, student, kept = teacher.reshape(-1, classes), student.reshape(-1, classes), kept.reshape(-1)
    if axis_name is not None:
        teacher, student, kept = (concatenated(x, axis_name) for x in (teacher, student, kept))
    teacher, student, kept = (_whole(x) for x in (teacher, student, kept))
    count, total = jnp.sum(kept > 0, dtype=dtype), jnp.sum(kept)
    return teacher, student, kept * (count / jnp.where(total == 0, 1.0, total)), count


def _whole(x: jax.Array) -> jax.Array:
    """Returns an array with every row on every device, if its rows are split over explicit axes of a mesh.

    A product of rows with rows has no sharding of its own there; over automatic axes XLA chooses one.
    """
    split = any(axes is not None for axes in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.P()) if split else x


def check_views(method: str, remedy: str = "Stack the two views.", **arrays: jax.Array | None) -> None:
    """Raises a ValueError unless each given array has a first axis of 2, one entry per view of an image."""
    for name, array in arrays.items():
        if array is not None and (jnp.ndim(array) == 0 or jnp.shape(array)[0] != 2):
            raise ValueError(f"{method} needs {name} with a first axis of 2, got shape {jnp.shape(array)}. {remedy}")
