"""Compilation for accelerators that are not here, for the tests of this folder."""

import functools
import os
from collections.abc import Callable

import jax
import pytest

from ldrld_jax.aot import hlo
from ldrld_jax.aot.targets import Target
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh, replicated

TARGETS = "h100", "v5e:2x2"
# Everything instead of what CI compiles: hours instead of minutes.
ALL = os.environ.get("LDRLD_JAX_COMPILE") == "all"


@functools.cache
def target(name: str) -> Target:
    """Returns a target; skips the test where its compiler is not installed."""
    try:
        return Target.find(name)
    except UserError as error:
        pytest.skip(str(error))


def compiled(
    function: Callable, name: str, *shapes: tuple[tuple[int, ...], jax.typing.DTypeLike], split: bool = False
) -> hlo.CompiledText:
    """Compiles a function for one device of a target, or for all with the first axis of the arrays split over them."""
    devices = target(name).devices
    place = batch_sharding(make_mesh(devices=devices)) if split else replicated(make_mesh(devices=devices[:1]))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    options = dict(target(name).options)
    return hlo.CompiledText(jax.jit(function).lower(*arrays).compile(compiler_options=options).as_text())
