"""PyTorch's initialisations, drawn by few programs.

The numbers are those of `nnx.initializers`: bit for bit by jax 0.10, by jax 0.12 but for the last bit, which XLA rounds
by the shape. But there a draw is a program of its own for each shape, and its compilation is most of what a network's
initialisation takes: here all shapes up to a power of 4 share one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def normal(deviation: float) -> nnx.Initializer:
    """N(0, deviation^2)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return _drawn(jax.random.normal, key, shape, dtype, np.asarray(deviation, dtype))

    return init


def kaiming_normal_fan_out(key, shape, dtype=jnp.float32, out_sharding=None):
    """N(0, 2 / (k^2 C_out)), PyTorch's kaiming_normal_(mode="fan_out"), of a kernel `[k, k, C_in, C_out]`."""
    del out_sharding
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return _drawn(jax.random.normal, key, shape, dtype, np.sqrt(np.asarray(2 / fan_out, dtype)))


def torch_default(key, shape, dtype=jnp.float32, out_sharding=None):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for weights `[..., C_in, C_out]`."""
    del out_sharding
    three, variance = np.asarray(3, dtype), np.asarray(1 / 3 / math.prod(shape[:-1]), dtype)
    return _drawn(_uniform(1.0), key, shape, dtype, np.sqrt(three * variance))


def torch_uniform(fan_in: int) -> nnx.Initializer:
    """The same for biases, which only the weight's fan-in bounds."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return _drawn(_uniform(fan_in**-0.5), key, shape, dtype)

    return init


def _uniform(bound: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _drawn(draw: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: Any = None):
    """`draw(key, shape, dtype) * scale`: JAX gives the i-th number of a key alike, however many are drawn."""
    size = math.prod(shape)
    even_bits = -(-(size - 1).bit_length() // 2) * 2
    values: Any = draw(key, (2**even_bits,), dtype)
    if not isinstance(values, jax.core.Tracer):
        values = np.asarray(values)  # cut and scaled on the host, where no program is compiled for it
    values = values[:size].reshape(shape)
    return jnp.asarray(values if scale is None else values * scale)
