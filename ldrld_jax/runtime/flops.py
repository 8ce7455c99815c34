"""Counts the floating point operations of a program."""

from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any, platform: str | None = None) -> float | None:
    """Returns the floating point operations of a function as written, over all devices; None if XLA cannot count them.

    The CPU's backend counts them for every platform. The plugins for GPUs and TPUs do not analyse a program before it
    is compiled, and a program compiled for a GPU counts none in its library calls, which are its convolutions. A loop
    body counts once.

    Args:
      function: the function, which need not be jitted.
      arguments: trees of arrays or of their shapes and dtypes.
      platform: the platform that the function is for, `cpu`, `cuda` or `tpu`; None for that of the default device.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.dot, jnp.ones((8, 16)), jnp.ones((16, 4)))
      1024.0
    """
    platform = platform or jax.local_devices()[0].platform
    platform = "cuda" if platform == "gpu" else platform
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names a GPU or TPU alone
        return None
    with jax.default_device(cpu):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
    return (lowered.cost_analysis() or {}).get("flops")
