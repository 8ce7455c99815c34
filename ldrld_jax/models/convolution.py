"""The convolution of all models, written such that XLA for CPU selects its faster kernel.

XLA for CPU has two kernels, Eigen's and YNNPACK's, and uses the latter for float32. It runs many shapes on one thread
and is several times slower in the gradient with respect to the weights (docs/train_speed.md). XLA does not give
YNNPACK a convolution whose input is dilated, so the rows of input and kernel are both spaced two apart: the same sum.
Both kernels are many times slower than a matrix product on images of a few pixels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_NHWC = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 8  # below this, as in a stem for three colours, YNNPACK is faster in the forward pass
_FEW_PIXELS = 4  # up to this, as in the last stage of a net on 8 x 8 pixels, a matrix product is faster

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, *, feature_group_count: int = 1, **options: Any
) -> jax.Array:
    """Replaces `jax.lax.conv_general_dilated` in `nnx.Conv`, with a faster program where one is known.

    Grouped convolutions, dtypes other than float32, layouts other than that of images, dilations, a precision, GPUs and
    TPUs use the plain convolution. A program lowered for several platforms holds both versions. The faster version
    supports reverse mode only, once.

    Args:
      x: `[N, H, W, C]`, or as `dimension_numbers` has it.
      kernel: `[height, width, C / groups, features]`, or as `dimension_numbers` has it.
      strides, padding: for rows and columns.
      feature_group_count: the number of groups.
      options: further keywords of `jax.lax.conv_general_dilated`, with its defaults.
    """
    if feature_group_count == 1 and x.dtype == jnp.float32 and _is_plain(x, kernel, padding, **options):
        y = _convolution(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    else:
        options["feature_group_count"] = feature_group_count
        y = lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return checkpoint_name(y, "convolution")  # the name under which `jax.checkpoint` policies can keep it


def _is_plain(x: jax.Array, kernel: jax.Array, padding: Any, *, dimension_numbers: Any = None, **options: Any) -> bool:
    """Returns whether the arguments ask for no more than `plain` computes; of wrong ones, JAX says what is wrong."""
    if isinstance(padding, str) or x.ndim != 4 or kernel.ndim != 4:
        return False
    of_images, given = (lax.conv_dimension_numbers(x.shape, kernel.shape, n) for n in (_NHWC, dimension_numbers))
    dilations = [options.pop(name, None) for name in ("lhs_dilation", "rhs_dilation")]
    return (
        given == of_images
        and all(dilation is None or tuple(dilation) == (1, 1) for dilation in dilations)
        and options.pop("batch_group_count", 1) == 1
        and all(value is None for value in options.values())
    )


def plain(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Computes the unmodified convolution."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


def spread(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Computes the same convolution with a row of zeros between the rows of `x` and `kernel`, at twice the stride.

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


def product(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    """Computes the same convolution as one product of the kernel with the patches of `x` side by side.

    Example:
      >>> x, kernel = jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.arange(9.0).reshape(3, 3, 1, 1)
      >>> at = (1, 1), ((1, 1), (1, 1))
      >>> bool((product(x, kernel, *at) == plain(x, kernel, *at)).all())
      True
    """
    height, width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # The kernel has so many places; none if it is larger than the image.
    rows, columns = max(x.shape[1] - height + 1, 0), max(x.shape[2] - width + 1, 0)
    patches = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]] for i in range(height) for j in range(width)
    ]
    flat = kernel.reshape(height * width * channels, features)
    return lax.dot_general(jnp.concatenate(patches, axis=-1), flat, (((3,), (0,)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    def forward(conv: Callable, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(x, kernel, strides, padding)

    return _by_platform(forward, x, kernel, on_cpu=_on_cpu(x, kernel))


def _on_cpu(x: jax.Array, kernel: jax.Array, strides: Pair = (1, 1)) -> Callable:
    """Returns the form of the forward pass on a CPU, or with `strides` that of the gradient by the input."""
    if x.shape[1] * x.shape[2] <= _FEW_PIXELS and kernel.shape[:2] != (1, 1):
        return product
    # With a stride, the gradient with respect to the input is already a dilated convolution.
    return spread if strides == (1, 1) and x.shape[-1] >= _FEW_CHANNELS else plain


def _forward(x, kernel, strides, padding):
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, gradient):
    def by_x(conv, x, kernel, gradient):
        return jax.linear_transpose(lambda x: conv(x, kernel, strides, padding), x)(gradient)[0]

    def by_kernel(conv, x, kernel, gradient):
        if conv is spread:
            x = _written_down(x, kernel)
        return jax.linear_transpose(lambda kernel: conv(x, kernel, strides, padding), kernel)(gradient)[0]

    return _by_platform(by_x, *saved, gradient, on_cpu=_on_cpu(*saved, strides)), _by_platform(
        by_kernel, *saved, gradient, on_cpu=spread
    )


def _written_down(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns x, forced into memory as an array; `other` is any array that each device has.

    Eigen reads it transposed. XLA would otherwise fuse everything since the previous convolutions into the
    transposition and recompute it element by element in the wrong order, which took two thirds of a resnet20's
    step. It fuses nothing across the borders of a conditional.
    """
    number = other[(0,) * other.ndim] >= -jnp.inf  # True except for NaN, which XLA cannot rule out
    return lax.cond(number, lambda x: x, lambda x: 2 * x, x)


_convolution.defvjp(_forward, _backward)


def _by_platform(function: Callable, *arrays: jax.Array, on_cpu: Callable) -> jax.Array:
    """Calls `function(on_cpu or plain, *arrays)`; the choice is made when the program is lowered."""
    if on_cpu is plain:
        return function(plain, *arrays)
    return lax.platform_dependent(
        *arrays, cpu=functools.partial(function, on_cpu), default=functools.partial(function, plain)
    )
