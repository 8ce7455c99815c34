"""The convolution under all models, written on a CPU such that XLA takes its faster kernel.

XLA for CPU has two: Eigen's and YNNPACK's, and gives float32 to the latter, which runs many shapes on one thread and
is up to eighteen times slower in the gradient by the weights (docs/train_speed.md). It keeps a convolution from
YNNPACK whose input is dilated. So the rows of input and kernel are both set two apart, which is the same sum.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_NHWC = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 8  # below, as in a stem of three colours, YNNPACK is the faster one forwards

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, *, feature_group_count: int = 1, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for `nnx.Conv`: the faster program where it is known, the plain one elsewhere.

    Groups and other dtypes than float32 go the plain way, as does everything on a GPU or TPU: a program lowered for
    several platforms has both. Where it is faster, only reverse mode is defined, once.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[height, width, C / groups, features]`.
      strides, padding: of the rows and of the columns.
      feature_group_count: the groups.
      options: more of `jax.lax.conv_general_dilated`'s.
    """
    if feature_group_count == 1 and x.dtype == jnp.float32:
        y = _convolution(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    else:
        options["feature_group_count"] = feature_group_count
        y = lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return checkpoint_name(y, "convolution")  # what `jax.checkpoint` may keep by this name


def plain(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """The convolution as it is."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


def spread(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """The same with a row of zeros between the rows of `x` and of `kernel`, visited at twice the stride.

    Example:
      >>> x, kernel = jnp.arange(25.0).reshape(1, 5, 5, 1), jnp.arange(9.0).reshape(3, 3, 1, 1)
      >>> at = (2, 2), ((1, 1), (1, 1))
      >>> bool((spread(x, kernel, *at) == plain(x, kernel, *at)).all())
      True
    """
    (top, bottom), columns = padding
    return lax.conv_general_dilated(
        x,
        kernel,
        (2 * strides[0], strides[1]),
        ((2 * top, 2 * bottom), columns),
        lhs_dilation=(2, 1),
        rhs_dilation=(2, 1),
        dimension_numbers=_NHWC,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    def forward(conv: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(x, kernel, strides, padding)

    return _by_platform(forward, x, kernel, spread_on_cpu=x.shape[-1] >= _FEW_CHANNELS)


def _forward(x, kernel, strides, padding):
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, gradient):
    def by_x(conv, x, kernel, gradient):
        return jax.linear_transpose(lambda x: conv(x, kernel, strides, padding), x)(gradient)[0]

    def by_kernel(conv, x, kernel, gradient):
        if conv is spread:
            x = _written_down(x, kernel)
        return jax.linear_transpose(lambda kernel: conv(x, kernel, strides, padding), kernel)(gradient)[0]

    # With a stride the gradient by the input is a dilated convolution already.
    by_x_spread = strides == (1, 1) and saved[0].shape[-1] >= _FEW_CHANNELS
    return _by_platform(by_x, *saved, gradient, spread_on_cpu=by_x_spread), _by_platform(
        by_kernel, *saved, gradient, spread_on_cpu=True
    )


def _written_down(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, as an array in memory; `other` is any array that each device has.

    Eigen takes it transposed. XLA would compute it anew inside of the transposition, with all that led to it since
    the convolutions before, element by element in the wrong order: two thirds of a resnet20's step. It fuses nothing
    over the borders of a condition.
    """
    number = other[(0,) * other.ndim] >= -jnp.inf  # always, but XLA cannot know: a NaN is not
    return lax.cond(number, lambda x: x, lambda x: 2 * x, x)


_convolution.defvjp(_forward, _backward)


def _by_platform(function: Callable, *arrays: jax.Array, spread_on_cpu: bool) -> jax.Array:
    """`function(plain or spread, *arrays)`, decided when the program is lowered."""
    if not spread_on_cpu:
        return function(plain, *arrays)
    return lax.platform_dependent(
        *arrays, cpu=functools.partial(function, spread), default=functools.partial(function, plain)
    )
