"""Batch normalisation as a function with a hand-written derivative, which passes over the activations less often."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-5


class Moments(NamedTuple):
    """Mean and biased variance of each group, `[1, groups, 1, .., C]`, and the number of values in each group."""

    mean: jax.Array
    var: jax.Array
    number: jax.Array  # [1, groups, 1, .., 1]


@jax.custom_vjp
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, kept: jax.Array | None) -> tuple[jax.Array, Moments]:
    r"""Normalises each group and channel by its own moments.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    The moments are computed in two passes, which loses no precision if the mean is large. Only y is
    differentiable, once, in reverse mode: with g the gradient with respect to y, and sums over a moment's values,

    .. math:: \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \Big(g - \frac1n \Big(\sum g +
              \frac{x - \mu}{\sigma^2 + \epsilon} \sum g (x - \mu)\Big)\Big)

    Args:
      x: `[n, groups, ..., C]`, float32 or float64.
      scale, bias: gamma and beta, `[C]`, of the same dtype.
      kept: `[n, groups]` bool, the examples that enter the moments; None for all.

    References:
      Ioffe, Szegedy, "Batch Normalization", 2015, section 3.

    Example:
      >>> y, moments = normalise(jnp.array([[[1.0]], [[3.0]]]), jnp.ones(1), jnp.zeros(1), None)
      >>> moments.mean.item(), moments.var.item(), y.round(3).ravel().tolist()
      (2.0, 1.0, [-1.0, 1.0])
    """
    return _forward(x, scale, bias, kept)[0]


def _forward(x, scale, bias, kept):
    mask = _mask(x, kept)
    pixels = math.prod(x.shape[2:-1])
    if mask is None:
        count = jnp.full((1, x.shape[1], *(1,) * (x.ndim - 2)), x.shape[0] * pixels, x.dtype)
    else:
        count = pixels * jnp.sum(mask, axis=0, keepdims=True, dtype=x.dtype)
    # In a group of padding alone nothing counts, so its moments are 0.
    mean = _total(x, mask) / jnp.maximum(count, 1)
    var = _total((x - mean) ** 2, mask) / jnp.maximum(count, 1)
    inverse = jax.lax.rsqrt(var + EPSILON)
    y = (x - mean) * (inverse * _per_channel(scale, x)) + _per_channel(bias, x)
    return (y, Moments(mean, var, count)), (x, scale, kept, mean, inverse, count)


def _backward(saved, gradients):
    x, scale, kept, mean, inverse, count = saved
    gradient, _ = gradients  # the moments go into running averages, which are not differentiated
    by_bias, by_scale = _total(gradient), _total(gradient * (x - mean)) * inverse
    mask = _mask(x, kept)
    through_moments = (by_bias + (x - mean) * (inverse * by_scale)) / jnp.maximum(count, 1)
    if mask is not None:
        through_moments = jnp.where(mask, through_moments, 0)
    by_x = (gradient - through_moments) * (inverse * _per_channel(scale, x))
    groups = tuple(range(x.ndim - 1))
    return by_x, jnp.sum(by_scale, groups), jnp.sum(by_bias, groups), None


normalise.defvjp(_forward, _backward)


def _total(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return jnp.sum(x, axis=(0, *range(2, x.ndim - 1)), keepdims=True, where=mask)


def _mask(x: jax.Array, kept: jax.Array | None) -> jax.Array | None:
    return None if kept is None else kept.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))


def _per_channel(values: jax.Array, x: jax.Array) -> jax.Array:
    return values.reshape(*(1,) * (x.ndim - 1), -1)
