"""FLOPs are those that can be counted by hand, for every platform."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.runtime.flops import count_flops
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh


@pytest.mark.parametrize("devices", [1, 8])
def test_those_of_a_net_of_matrices(devices):
    """Two products forward, three backward, and the few elementwise operations."""
    mesh = make_mesh(data=devices)
    x = jax.device_put(jnp.ones((16, 32)), batch_sharding(mesh))
    weights = jax.device_put((jnp.ones((32, 64)), jnp.ones((64, 8))), NamedSharding(mesh, PartitionSpec()))
    products = 2 * 16 * (2 * 32 * 64 + 3 * 64 * 8)
    counted = count_flops(jax.grad(lambda w, x: jnp.sum((x @ w[0] @ w[1]) ** 2)), weights, x)
    assert products <= counted < 1.15 * products


@pytest.mark.parametrize("platform", [None, "cpu", "gpu", "cuda", "tpu"])
def test_a_convolution_counts_on_every_platform(platform):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = jax.ShapeDtypeStruct((2, 10, 10, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    assert count_flops(convolve, *shapes, platform=platform) == 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3


def test_without_a_cpu_nothing_is_counted(monkeypatch):
    def devices(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return jax.devices()

    monkeypatch.setattr(jax, "local_devices", devices)
    assert count_flops(jnp.sin, jnp.ones(3)) is None
