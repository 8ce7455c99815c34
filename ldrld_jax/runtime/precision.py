"""Implements `precision` and `matmul_precision`: the dtypes of a run and the precision of its products."""

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

# precision: dtype of the computation, dtype of the parameters
_DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


def dtypes(precision: str) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` of a precision."""
    return dict(zip(("dtype", "param_dtype"), _DTYPES[precision], strict=True))


@contextlib.contextmanager
def precision_scope(precision: str, products: str = "tensorfloat32") -> Iterator[None]:
    """Applies a config's precisions to everything computed inside the block; enables x64 for float64.

    Inside it random numbers come from partitionable threefry, whatever the environment selects, so that they depend
    on the run's seed alone.

    Args:
      precision: float32, bfloat16 or float64.
      products: of float32 matrix products and convolutions on a GPU or TPU; the losses' own are always exact.
    """
    wanted = dtypes(precision)["param_dtype"] == jnp.float64
    # jax.enable_x64 as a context holds for one thread: orbax would restore float32 in its threads. If the caller is
    # inside such a context, this thread sees the caller's value; a new thread sees the process's, which is restored.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        before = thread.submit(jax.config.read, "jax_enable_x64").result()
    jax.config.update("jax_enable_x64", wanted)
    callers = jax.config.read("jax_enable_x64") != wanted
    try:
        with (
            jax.enable_x64(wanted) if callers else contextlib.nullcontext(),
            jax.default_matmul_precision(products),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
        ):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)
