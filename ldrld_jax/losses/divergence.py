"""KL divergences with closed-form derivatives, differentiable any number of times in either mode."""

import functools

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None

RULED_OUT = -1e30
"""Replaces logits of -inf: the class has probability 0 beside any other, and arithmetic on it stays finite."""


@jax.custom_jvp
def bernoulli_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    r"""Computes the KL divergence of two Bernoulli distributions from their logits.

    .. math:: \mathrm{KL}(\sigma(t) \,\|\, \sigma(s)), \quad \frac{\partial}{\partial s} = \sigma(s) - \sigma(t)

    Args:
      teacher: `[...]`, floating; no gradient flows into it.
      student: `[...]`, the same shape and dtype.

    Returns:
      `[...]`, in nats, of the same dtype.

    Example:
      >>> print(f"{bernoulli_kl(jnp.array(2.0), jnp.array(0.0)):.4f}")
      0.3278
    """
    return bernoulli_kl_and_slope(teacher, student)[0]


@bernoulli_kl.defjvp
def _(primals, tangents):
    return bernoulli_kl(*primals), bernoulli_kl_and_slope(*primals)[1] * tangents[1]


def bernoulli_kl_and_slope(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes `bernoulli_kl` and its derivative with respect to the student, with one exponential per side.

    The KL is the same with the signs of both logits changed. With the teacher's positive, the formulas subtract
    small numbers, not numbers near 1, so that saturated pairs keep their precision.
    """
    sign = jnp.where(teacher < 0, -jnp.ones_like(teacher), jnp.ones_like(teacher))
    teacher, student = sign * teacher, sign * student
    # abs would not do: its derivative at 0 is 0, and would become the slope's derivative there.
    teacher_exp, student_exp = jnp.exp(-teacher), jnp.exp(jnp.where(student >= 0, -student, student))
    teacher_unlikely = teacher_exp / (1 + teacher_exp)
    student_unlikely = jnp.where(student >= 0, student_exp, jnp.ones_like(student)) / (1 + student_exp)
    softplus = jnp.maximum(-student, 0.0) + jnp.log1p(student_exp)
    value = softplus - jnp.log1p(teacher_exp) - teacher_unlikely * (teacher - student)
    return value, sign * (teacher_unlikely - student_unlikely)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def masked_kl(
    teacher: jax.Array,
    student: jax.Array,
    kept: jax.Array,
    teacher_max: jax.Array,
    student_max: jax.Array,
    temperature: float,
    class_axis_name: AxisName = None,
) -> jax.Array:
    r"""Computes the KL divergence of two softmaxes over the classes that a mask keeps.

    With :math:`p, q` the softmaxes of t / T and s / T over the kept classes:

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_c p_c \log(p_c / q_c), \quad \frac{\partial}{\partial s} = (q - p) / T

    Autodiff would keep several arrays of size C for the backward pass; this keeps only q - p.

    Args:
      teacher: `[C]`, floating; no gradient flows into it.
      student: `[C]`, the same dtype.
      kept: `[C]` bool, at least one True.
      teacher_max: scalar, the largest kept teacher logit (at least `RULED_OUT`); no gradient flows into it.
      student_max: scalar, the largest kept student logit, with the same bound.
      temperature: T > 0.
      class_axis_name: mapped axes over which the classes are sharded; the maxima must then cover all shards.

    Returns:
      A scalar in nats, not times T^2.
    """
    p, _, p_sum, q_sum = _exponentials(teacher, student, kept, teacher_max, student_max, temperature, class_axis_name)
    # p is 0 outside the mask, where RULED_OUT and the halves keep the difference finite. The expression shares no array
    # with _exponentials, not even a broadcast maximum: XLA fuses unshared arrays into the sum and writes
    # shared ones to memory (3.4 arrays instead of 1.4 on CPU).
    shifted = [
        0.5 * jnp.maximum(z + minus_max, RULED_OUT + minus_max)
        for z, minus_max in ((teacher, -teacher_max), (student, -student_max))
    ]
    difference = shifted[0] - shifted[1]
    mean_difference = _sum(p * difference, class_axis_name) / (0.5 * p_sum * temperature)
    return mean_difference - jnp.log(p_sum) + jnp.log(q_sum)


@masked_kl.defjvp
def _(temperature, class_axis_name, primals, tangents):
    p, q, p_sum, q_sum = _exponentials(*primals, temperature, class_axis_name)
    slope = q * (1 / (temperature * q_sum)) - p * (1 / (temperature * p_sum))
    return masked_kl(*primals, temperature, class_axis_name), _sum(slope * tangents[1], class_axis_name)


def _exponentials(teacher, student, kept, teacher_max, student_max, temperature, class_axis_name):
    """Computes exp((z - max) / T) of both sides, 0 where `kept` is False, and their sums."""
    floor = jnp.asarray(RULED_OUT, teacher.dtype)
    p, q = (
        jnp.exp(jnp.where(kept, jnp.maximum(z, floor) - z_max, floor) * (1 / temperature))
        for z, z_max in ((teacher, teacher_max), (student, student_max))
    )
    return p, q, _sum(p, class_axis_name), _sum(q, class_axis_name)


def _sum(values: jax.Array, axis_name: AxisName) -> jax.Array:
    total = jnp.sum(values)
    return total if axis_name is None else jax.lax.psum(total, axis_name)
