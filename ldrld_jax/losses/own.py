"""A user's own loss as a method."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldrld_jax.losses.common import check_logits, check_rows, computed_in, mean_over_rows
from ldrld_jax.losses.divergence import AxisName


def own_parts(function: Callable[..., jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    """Returns the `parts` of a method from a user's loss.

    Args:
      function: `function(teacher_logits, student_logits, labels)` returns the loss of each example, `[...]`, or of
        the batch, a scalar. Logits are `[..., C]`. One that returns a scalar has to take `where`, `[...]` bool, to be
        used with batches that have padding.

    Example:
      >>> import jax.numpy as jnp
      >>> parts = own_parts(lambda teacher, student, labels: jnp.sum((teacher - student) ** 2, axis=-1))
      >>> float(parts(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int), None)[""])
      3.0
    """
    if inspect.isclass(function):
        raise ValueError(f"a loss must be a function, got the class {function.__name__}. Give {function.__name__}().")
    takes_where = "where" in inspect.signature(function).parameters

    def parts(
        teacher_logits: jax.Array,
        student_logits: jax.Array,
        labels: jax.Array,
        cfg: Any,
        *,
        params: Any = None,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
        axis_name: AxisName = None,
    ) -> dict[str, jax.Array]:
        del cfg, params
        teacher_logits, student_logits, labels = map(jnp.asarray, (teacher_logits, student_logits, labels))
        check_logits(teacher_logits, student_logits)
        dtype = computed_in(teacher_logits, student_logits)
        teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(dtype)
        student_logits = student_logits.astype(dtype)
        if where is not None:
            # The function may read these rows. What is not finite there would reach the gradient, 0 times NaN is NaN;
            # other logits stay, since rows of zeros are no better for a function that divides by their norm.
            kept = check_rows("where", where, labels.shape)[..., None]
            fixed = lambda z: jax.lax.stop_gradient(jnp.where(jnp.isfinite(z), z, jnp.zeros((), z.dtype)))  # noqa: E731
            teacher_logits, student_logits = (jnp.where(kept, z, fixed(z)) for z in (teacher_logits, student_logits))
        options = {"where": where} if takes_where else {}
        loss = function(teacher_logits, student_logits, labels, **options)
        name = getattr(function, "__name__", type(function).__name__)
        if not hasattr(loss, "shape"):
            raise ValueError(
                f"{name} returns a {type(loss).__name__}, and must return an array: a scalar or one loss per example."
            )
        # The mean of integers would take its weights as integers, and sums of bfloat16 lose digits.
        loss = jnp.asarray(loss).astype(dtype)
        if loss.shape == labels.shape:
            return {"": mean_over_rows(loss, where=where, weights=weights, axis_name=axis_name)}
        if loss.ndim:
            raise ValueError(
                f"{name} returns {loss.shape}, and must return a scalar or one loss per example, {labels.shape}."
            )
        if weights is not None or (where is not None and not takes_where):
            raise ValueError(
                f"{name} returns a scalar and does not take where, so that padding cannot be left out. Return one loss "
                "per example, or take where=None, or set data.remainder=drop."
            )
        if axis_name is not None:
            raise ValueError(
                f"{name} returns a scalar, of which the mean over {axis_name} is unknown. Return one loss per example."
            )
        return {"": loss}

    return parts
