"""The convolution of the models against XLA's own, and that a CPU alone gets another program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.models.convolution import _convolution, conv_general_dilated, plain, product, spread
from ldrld_jax.models.layers import conv
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh
from tests.collectives import transfers

NHWC = ("NHWC", "HWIO", "NHWC")
# Height, width, channels, features, kernel, stride, groups.
SHAPES = [
    (8, 8, 8, 12, 3, 1, 1),
    (8, 8, 8, 12, 3, 2, 1),
    (7, 9, 8, 4, 3, 1, 1),
    (5, 4, 8, 4, 3, 2, 1),
    (3, 1, 8, 4, 3, 1, 1),
    (1, 6, 8, 4, 3, 2, 1),
    (6, 6, 8, 4, 1, 1, 1),
    (7, 6, 8, 4, 1, 2, 1),
    (6, 6, 8, 4, 5, 1, 1),
    (9, 9, 3, 8, 7, 2, 1),
    (2, 2, 8, 4, 3, 2, 1),
    (6, 6, 8, 8, 3, 2, 8),
    (6, 6, 12, 6, 1, 1, 3),
]


def in_each_way(functions, shape, rng, dtype):
    """Computes outputs and gradients of some functions at one shape, by one program."""
    height, width, channels, features, kernel, stride, groups = shape
    x = jnp.asarray(rng.standard_normal((3, height, width, channels)), dtype)
    w = jnp.asarray(rng.standard_normal((kernel, kernel, channels // groups, features)), dtype)
    at = (stride, stride), ((kernel // 2,) * 2,) * 2

    def results(function):
        y, pull = jax.vjp(lambda x, w: function(x, w, *at), x, w)
        return y, *pull(jnp.cos(y))

    return jax.jit(lambda: [results(function) for function in functions])()


def assert_equal(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert jnp.abs(ours - theirs).max() <= tolerance * jnp.abs(theirs).max()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] == 1])
def test_rows_set_apart_and_a_product_give_the_same_convolution_and_gradients(shape, rng, x64):
    expected, *found = in_each_way((plain, spread, product, _convolution), shape, rng, jnp.float64)
    for results in found:
        assert_equal(results, expected, 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[::3] + SHAPES[-2:])
def test_what_the_models_call_agrees_with_lax_in_every_dtype(shape, dtype, rng):
    options = dict(dimension_numbers=NHWC, feature_group_count=shape[-1])
    functions = [functools.partial(f, **options) for f in (conv_general_dilated, jax.lax.conv_general_dilated)]
    assert_equal(*in_each_way(functions, shape, rng, dtype), {"float32": 1e-5, "bfloat16": 0}[dtype])


@pytest.mark.parametrize(
    "options",
    [
        dict(rhs_dilation=(2, 2)),
        dict(lhs_dilation=(1, 2)),
        dict(precision=jax.lax.Precision.HIGHEST),
        dict(preferred_element_type=jnp.float64),
        dict(batch_group_count=2),
        dict(padding="SAME"),
        dict(dimension_numbers=("NHWC", "HWOI", "NHWC")),
        dict(dimension_numbers=None),
    ],
    ids=str,
)
def test_what_is_asked_beyond_a_convolution_of_images_is_left_to_lax(options, x64):
    options = dict(padding=((7, 7), (7, 7)), dimension_numbers=NHWC) | options
    x, kernel = (jnp.zeros((n, 8, 8, 8), jnp.float32) for n in (4, 8))  # in any layout

    def asked(function):
        jaxpr = jax.make_jaxpr(lambda x, kernel: function(x, kernel, (1, 1), **options))(x, kernel)
        return [str(eqn.params) for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]

    assert len(asked(jax.lax.conv_general_dilated)) == 1
    assert asked(conv_general_dilated) == asked(jax.lax.conv_general_dilated)


def test_the_models_call_it():
    """With options that leave its own program."""
    layer = conv(8, 8, 3, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert layer.conv_general_dilated is conv_general_dilated
    calls = [eqn.primitive.name for eqn in jax.make_jaxpr(layer)(jnp.zeros((2, 6, 6, 8))).eqns]
    assert "custom_vjp_call" in calls and "conv_general_dilated" not in calls


def gradient_of(function):
    """A value-and-gradient of both arguments."""
    return jax.grad(lambda kernel, x: jnp.sum(jnp.sin(function(x, kernel, (1, 1), ((1, 1), (1, 1))))), argnums=(0, 1))


def operands(rng, n=8):
    return jnp.asarray(rng.standard_normal((3, 3, 8, 8)), jnp.float32), jnp.asarray(
        rng.standard_normal((n, 6, 6, 8)), jnp.float32
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowered_for_an_accelerator_it_is_the_plain_convolution(platform, rng):
    kernel, x = operands(rng)
    ours, theirs = (
        jax.jit(gradient_of(function)).trace(kernel, x).lower(lowering_platforms=(platform,)).as_text()
        for function in (_convolution, plain)
    )

    def convolutions(text):
        return sorted(re.findall(r"stablehlo\.convolution.*", re.sub(r"%\w+", "%", text)))

    assert len(convolutions(ours)) == 3
    assert convolutions(ours) == convolutions(theirs)


def test_on_a_cpu_all_three_convolutions_have_dilated_inputs_and_none_goes_to_ynnpack(rng):
    kernel, x = operands(rng)
    compiled = jax.jit(gradient_of(_convolution)).lower(kernel, x).compile().as_text()
    windows = re.findall(r" convolution\(.*?window=\{(.*?)\}", compiled)
    assert len(windows) == 3
    assert all("lhs_dilate=2x1" in window for window in windows)


def test_a_kernel_larger_than_the_image_leaves_nothing():
    x, kernel = jnp.ones((2, 1, 1, 8)), jnp.ones((3, 3, 8, 4))
    at = (1, 1), ((0, 0), (0, 0))
    assert _convolution(x, kernel, *at).shape == plain(x, kernel, *at).shape == (2, 0, 0, 4)


@pytest.mark.parametrize(("height", "products"), [(2, 2), (3, 0)])  # output and gradient by the input
def test_on_a_cpu_images_of_four_pixels_go_through_matrix_products(height, products, rng):
    kernel, x = operands(rng)
    lowered = jax.jit(gradient_of(_convolution)).lower(kernel, x[:, :height, :2]).as_text()
    assert [lowered.count(f"stablehlo.{name}") for name in ("dot_general", "convolution")] == [products, 3 - products]


def test_one_export_serves_cpu_and_cuda(rng):
    kernel, x = operands(rng)
    exported = jax.export.export(jax.jit(gradient_of(_convolution)), platforms=("cpu", "cuda"))(kernel, x)
    assert "lhs_dilate = [2, 1]" in exported.mlir_module()
    for result, theirs in zip(exported.call(kernel, x), gradient_of(plain)(kernel, x), strict=True):
        np.testing.assert_allclose(result, theirs, rtol=1e-4, atol=1e-4)


def test_it_works_under_vmap_checkpoint_and_shard_map(rng):
    kernel, x = operands(rng)
    expected = gradient_of(plain)(kernel, x)
    ours = gradient_of(_convolution)

    def close(results):
        for result, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, theirs, rtol=1e-4, atol=1e-4)

    close(gradient_of(jax.checkpoint(_convolution, static_argnums=(2, 3)))(kernel, x))
    each = jax.vmap(ours, (None, 0))(kernel, x[:, None])
    close((each[0].sum(0), each[1][:, 0]))
    mesh = make_mesh(data=2)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        lambda kernel, x: (
            jax.lax.psum(ours(jax.lax.pcast(kernel, "data", to="varying"), x)[0], "data"),
            ours(kernel, x)[1],
        ),
        mesh=mesh,
        in_specs=(whole, rows),
        out_specs=(whole, rows),
    )
    close(jax.jit(mapped)(kernel, x))


def test_of_a_split_batch_the_gradient_is_all_reduced_and_nothing_else_travels(rng):
    kernel, x = operands(rng)
    mesh = make_mesh()
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        gradient_of(_convolution),
        in_shardings=(whole, batch_sharding(mesh)),
        out_shardings=(whole, batch_sharding(mesh)),
    )
    assert transfers(step.lower(kernel, x).compile()) == [("all-reduce", [(3, 3, 8, 8)])]
    for result, theirs in zip(step(kernel, x), gradient_of(plain)(kernel, x), strict=True):
        np.testing.assert_allclose(result, theirs, rtol=1e-4, atol=1e-4)
