"""Compilation for accelerators that are not here, for the tests of this folder."""

import functools
import os
from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldrld_jax.aot import hlo
from ldrld_jax.aot.targets import Target
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.mesh import make_mesh

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


def mesh(name: str) -> Mesh:
    """Returns one of a target's devices as a mesh."""
    return make_mesh(devices=target(name).devices[:1])


def compiled(function: Callable, name: str, *shapes: tuple[tuple[int, ...], jax.typing.DTypeLike]) -> hlo.Program:
    """Compiles a function for one device of a target, for arrays of the shapes and dtypes."""
    place = NamedSharding(mesh(name), PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    options = dict(target(name).options)
    return hlo.Program(jax.jit(function).lower(*arrays).compile(compiler_options=options).as_text())
