"""Initialisations: the numbers that Flax's give, up to XLA's rounding by shape, by few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.models import initializers as ours

theirs = nnx.initializers
SHAPE = (3, 3, 2, 7)  # 126 of 256 that are drawn
PAIRS = {
    "normal": (ours.normal(0.01), theirs.normal(0.01)),
    "kaiming_normal_fan_out": (ours.kaiming_normal_fan_out, theirs.variance_scaling(2.0, "fan_out", "normal")),
    "torch_default": (ours.torch_default, theirs.variance_scaling(1 / 3, "fan_in", "uniform")),
    "torch_uniform": (ours.torch_uniform(20), lambda *args: jax.random.uniform(*args, -(20**-0.5), 20**-0.5)),
}


def assert_same(name, drawn, expected):
    """Bit for bit; but jax 0.12 rounds a normal draw's last two bits by its shape."""
    wide = np.asarray(drawn, np.float64), np.asarray(expected, np.float64)
    if "normal" in name and jax.__version_info__ >= (0, 11):
        np.testing.assert_allclose(*wide, rtol=2 * float(jnp.finfo(drawn.dtype).eps), atol=0)
    else:
        np.testing.assert_array_equal(*wide)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in PAIRS), ("normal", "float64"), ("torch_default", "bfloat16")]
)
def test_the_numbers_are_those_of_flax(x64, name, dtype):
    init, other = PAIRS[name]
    drawn, expected = (draw(jax.random.key(3), SHAPE, jnp.dtype(dtype)) for draw in (init, other))
    assert (drawn.shape, drawn.dtype) == (SHAPE, dtype)
    assert_same(name, drawn, expected)


def test_they_are_the_same_in_a_program():
    init, key = ours.kaiming_normal_fan_out, jax.random.key(3)
    assert_same("normal", jax.jit(lambda key: init(key, SHAPE))(key), init(key, SHAPE))


def test_as_many_are_drawn_as_the_next_power_of_four():
    drawn = []

    def draw(key, shape, dtype):
        drawn.append(shape)
        return np.arange(shape[0], dtype=dtype)

    for shape in [(1,), (2,), (4, 4), (17,), (4096,), (4097,), (2**21 + 1,)]:
        values = ours._drawn(draw, jax.random.key(0), shape, np.float32, np.float32(2))
        np.testing.assert_array_equal(values.ravel(), 2 * np.arange(values.size))
    assert drawn == [(1,), (4,), (16,), (64,), (4096,), (16384,), (2**22,)]
