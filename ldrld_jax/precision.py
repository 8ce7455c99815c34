"""What `precision` means: the dtypes of computation and parameters, and double precision where it is asked for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ldrld_jax.errors import unknown

# precision: dtype of the computation, dtype of the parameters
_DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


def dtypes(precision: str) -> dict[str, Any]:
    """`dtype` and `param_dtype` of a precision.

    Raises:
      UserError: if there is no such precision.
    """
    if precision not in _DTYPES:
        raise unknown("precision", precision, _DTYPES)
    return dict(zip(("dtype", "param_dtype"), _DTYPES[precision], strict=True))


@contextlib.contextmanager
def precision_scope(precision: str) -> Iterator[None]:
    """Double precision where a config asks for it: everything that touches its arrays runs inside.

    Raises:
      UserError: if there is no such precision.
    """
    before = jax.config.read("jax_enable_x64")
    # Not the context manager, which holds for one thread: orbax would restore float32 in its own.
    jax.config.update("jax_enable_x64", dtypes(precision)["param_dtype"] == jnp.float64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
