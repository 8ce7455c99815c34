"""PyTorch's initialisers, with few compiled programs.

The numbers equal those of `nnx.initializers`: bit for bit with jax 0.10; with jax 0.12 up to the last bit, whose
rounding in XLA depends on the shape. `nnx.initializers` compiles one program per shape, which takes most of the time of
a network's initialisation; here all shapes up to a power of 4 share one program.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def normal(deviation: float) -> nnx.Initializer:
    """Returns an initialiser that draws from N(0, deviation^2)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return _drawn(jax.random.normal, key, shape, dtype, np.asarray(deviation, dtype))

    return init


def kaiming_normal_fan_out(key, shape, dtype=jnp.float32, out_sharding=None):
    """Draws a kernel `[k, k, C_in, C_out]` from N(0, 2 / (k^2 C_out)), PyTorch's kaiming_normal_(mode="fan_out")."""
    del out_sharding
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return _drawn(jax.random.normal, key, shape, dtype, np.sqrt(np.asarray(2 / fan_out, dtype)))


def torch_default(key, shape, dtype=jnp.float32, out_sharding=None):
    """Draws weights `[..., C_in, C_out]` from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default."""
    del out_sharding
    three, variance = np.asarray(3, dtype), np.asarray(1 / 3 / math.prod(shape[:-1]), dtype)
    return _drawn(_uniform(1.0), key, shape, dtype, np.sqrt(three * variance))


def torch_uniform(fan_in: int) -> nnx.Initializer:
    """Returns an initialiser that draws biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), given the weights' fan-in."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return _drawn(_uniform(fan_in**-0.5), key, shape, dtype)

    return init


def _uniform(bound: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _drawn(draw: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: Any = None):
    """Computes `draw(key, shape, dtype) * scale`; for a given key, JAX's i-th number does not depend on the count."""
    size = math.prod(shape)
    even_bits = -(-(size - 1).bit_length() // 2) * 2
    values: Any = draw(key, (2**even_bits,), dtype)
    if not isinstance(values, jax.core.Tracer):
        values = np.asarray(values)  # cut and scale on the host, where this compiles no program
    values = values[:size].reshape(shape)
    return jnp.asarray(values if scale is None else values * scale)
