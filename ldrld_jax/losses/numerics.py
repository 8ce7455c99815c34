"""Building blocks of the label-aware and correlation losses; none turns a finite input into NaN.

Differences of logits that the dtype cannot hold are cut off at its ends. A loss may still be too large for the dtype:
it is then infinite, and a gradient through it may be NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np


def label_mask(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Marks the class of each label: `[...]` integers to `[..., C]` bool, all False for a label out of range.

    It is a comparison with the class index, which XLA fuses into its consumer: no one-hot array is
    written, and the gradient needs no scatter, as it would for a gather.

    Raises:
      ValueError: unless there is one integer for each row of logits.
    """
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the logits without classes, {logits.shape[:-1]}, got {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integer classes, got {labels.dtype}.")
    if labels.dtype.itemsize > 4:  # a cast to 32 bits would turn 2^32 + k into class k
        labels = labels.clip(-1 if jnp.issubdtype(labels.dtype, jnp.signedinteger) else 0, logits.shape[-1])
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return classes == jnp.asarray(labels, jnp.int32)[..., None]


def with_labels(
    labels: jax.Array, student_logits: jax.Array, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the student's logits and `label_mask` of the labels, which must be classes where `where` is True.

    A label out of range is an error where its value is known. Under `jit` it is not: that row of the logits then
    becomes NaN, and with it the loss and the row's gradient, rather than the loss of another label.

    Args:
      labels: `[...]` integer classes; rows where `where` is False may have any label.
      student_logits: `[..., C]`.
      where: `[...]` bool.

    Raises:
      ValueError: unless there is one integer for each row of logits, or for a label out of range.
    """
    target = label_mask(labels, student_logits)
    stray = ~jnp.any(target, axis=-1)
    if where is not None:
        stray &= where
    if not isinstance(stray, jax.core.Tracer) and stray.any():
        wrong, last = np.asarray(labels)[np.asarray(stray)][0], student_logits.shape[-1] - 1
        raise ValueError(f"labels must be between 0 and {last}, got {wrong}. Mask rows without a label by where.")
    return student_logits * jnp.where(stray, jnp.nan, jnp.ones((), student_logits.dtype))[..., None], target


def pick(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the value at the single class that `mask` marks, `[..., C]` to `[...]`; 0 if it marks none."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def below_largest(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    r"""Computes the distances of logits to the largest of their row at a temperature, `[..., C]`, at most 0.

    .. math:: (z_c - \max_k z_k) / T

    A softmax depends on them alone. Subtracted before the division, close logits are apart by exactly their difference,
    however large they are. XLA would contract the division of z / T and a softmax's own subtraction into one operation
    that rounds only one of the two.
    """
    return _difference(logits, jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))) / temperature


def _difference(logits: jax.Array, peak: jax.Array) -> jax.Array:
    """Computes `logits - peak`, which of logits near the ends of their dtype could be minus infinity.

    A difference of just the minimum, as of a class masked by it, keeps its slope; `jnp.maximum` would halve it.
    """
    difference, lowest = logits - peak, jnp.finfo(logits.dtype).min
    return jnp.where(difference < lowest, lowest, difference)


def down_scale(logits: jax.Array) -> jax.Array:
    """Returns a factor for each row, `[..., 1]`: 1, or a power of two where squares of the logits could overflow.

    Multiplied by it, a row keeps its direction and its digits. A factor below 1 makes the largest about 2^40 (2^488 in
    float64).
    """
    half = jnp.finfo(logits.dtype).maxexp // 2
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(logits), axis=-1, keepdims=True))
    _, exponent = jnp.frexp(largest)
    one = jnp.ones_like(largest)
    return jnp.where(largest > 2.0 ** (half - 14), jnp.ldexp(one, half - 24 - exponent), one)


def log_softmax(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Computes the log-softmax of z / T, `[..., C]`."""
    distances = below_largest(logits, temperature)
    return distances - jnp.log(jnp.sum(jnp.exp(distances), axis=-1, keepdims=True))


def softmax(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Computes the softmax of z / T, `[..., C]`."""
    powers = jnp.exp(below_largest(logits, temperature))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


def log_ratio(logits: jax.Array, keep: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    r"""Compares every class with a set of classes K, `[..., C]`.

    .. math:: z_c / T - \log \sum_{k \in K} e^{z_k / T}

    Within K this is the log-softmax over K. For the one class outside K = all others, it is the log-odds
    :math:`\log (p_c / (1 - p_c))`. One log-sum-exp serves both, and no probability is subtracted from 1.

    Args:
      logits: `[..., C]`, floating.
      keep: `[..., C]` bool, the set K; at least one class of each row.
      temperature: T > 0.
    """
    kept = jnp.where(keep, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(kept, axis=-1, keepdims=True))
    mass = jnp.sum(jnp.exp((kept - peak) / temperature), axis=-1, keepdims=True)
    return _difference(logits, peak) / temperature - jnp.log(mass)  # the difference first: see below_largest


def expectation(log_p: jax.Array, values: jax.Array, keep: jax.Array) -> jax.Array:
    """Sums `exp(log_p) * values` over the classes that `keep` marks, `[..., C]` to `[...]`.

    Both factors are masked: a dropped class may have any log_p, and its exp must not overflow.
    """
    return jnp.sum(jnp.exp(jnp.where(keep, log_p, -jnp.inf)) * jnp.where(keep, values, 0.0), axis=-1)


def divergence(log_p: jax.Array, log_q: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    r"""Computes the KL of two distributions given by their logarithms, `[..., C]` to `[...]`, in nats.

    .. math:: \sum_c \big(p_c (\log p_c - \log q_c) + q_c - p_c\big)

    The last two sums are 1 each and cancel. They remove the rounding error of either log-sum-exp, which all
    classes share, to first order, and give equal distributions a gradient of exactly 0.

    Args:
      log_p: `[..., C]`.
      log_q: `[..., C]`.
      keep: `[..., C]` bool, the classes that the distributions cover; both may be anything at other classes.
    """
    if keep is None:
        p, q, difference = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    else:
        p, q = (jnp.exp(jnp.where(keep, x, -jnp.inf)) for x in (log_p, log_q))
        difference = jnp.where(keep, log_p - log_q, 0.0)
    return jnp.sum(p * difference + (q - p), axis=-1)


def kl(
    teacher: jax.Array, student: jax.Array, temperature: float | jax.Array, keep: jax.Array | None = None
) -> jax.Array:
    """Computes KL(softmax(teacher / T) || softmax(student / T)), `[..., C]` to `[...]`, in nats.

    Args:
      teacher: `[..., C]` logits.
      student: `[..., C]` logits.
      temperature: T > 0.
      keep: `[..., C]` bool, the classes that both softmaxes cover; the KL of a row with none is 0.
    """
    if keep is None:
        return divergence(log_softmax(teacher, temperature), log_softmax(student, temperature))
    # An empty set has no log-sum-exp: use that of all classes, and sum over none.
    domain = keep | ~jnp.any(keep, axis=-1, keepdims=True)
    return divergence(log_ratio(teacher, domain, temperature), log_ratio(student, domain, temperature), keep)


def sqrt(x: jax.Array) -> jax.Array:
    """Computes the square root of x >= 0 with slope 0 at 0; the true slope is infinite and would give NaN."""
    positive = ~(x <= 0)  # or NaN, which stays one
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def check_class_count(method: str, logits: jax.Array, least: int) -> None:
    """Raises a ValueError if there are fewer than `least` classes."""
    if logits.shape[-1] < least:
        raise ValueError(f"{method} needs at least {least} classes, got {logits.shape[-1]}. Use kd instead.")
