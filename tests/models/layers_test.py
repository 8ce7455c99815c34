"""The shared layers against PyTorch's definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.models.initializers import torch_default
from ldrld_jax.models.layers import (
    BatchNorm,
    Mode,
    Sequential,
    average_pool,
    conv,
    global_average_pool,
    max_pool,
    shuffle_channels,
)
from ldrld_jax.models.normalisation import normalise

FLOAT32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def images(rng, n=6, size=5, channels=4, dtype=np.float32):
    return jnp.asarray(rng.standard_normal((n, size, size, channels)), dtype)


def test_batch_norm_trains_as_pytorchs(rng, strict_dtypes):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    x = images(rng)
    ours, theirs = BatchNorm(4, **FLOAT32), torch.nn.BatchNorm2d(4)
    for step in range(3):
        batch = x * (step + 1) + step
        output = ours(batch, Mode(train=True))
        expected = theirs(torch.tensor(np.asarray(batch).transpose(0, 3, 1, 2)))
        np.testing.assert_allclose(output, expected.detach().numpy().transpose(0, 2, 3, 1), atol=2e-6)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.running_var.numpy(), rtol=1e-5)


def test_batch_norm_keeps_the_unbiased_variance(rng):
    x, norm = images(rng), BatchNorm(4, **FLOAT32)
    norm(x, Mode(train=True))
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-6)


def test_batch_norm_does_not_lose_a_small_variance_beside_a_large_mean(rng):
    x = 100 + 0.01 * images(rng, n=64)
    output = BatchNorm(4, **FLOAT32)(x, Mode(train=True))
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(output, exact, atol=2e-2)  # half a float32 step at 100 is 4e-4 standard deviations


def test_batch_norm_evaluates_with_the_running_statistics(rng):
    x, norm = images(rng), BatchNorm(4, **FLOAT32)
    norm.mean[...], norm.var[...] = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    expected = (np.asarray(x) - np.arange(4)) / np.sqrt(np.arange(1, 5) + 1e-5)
    np.testing.assert_allclose(norm(x, Mode(train=False)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], np.arange(4))


def test_a_padded_batch_trains_as_the_batch_without_its_padding(rng, x64):
    x = images(rng, dtype=np.float64)
    padded = jnp.concatenate([x, 1e3 * x[:3]])
    where = jnp.arange(9) < 6

    def loss(x, where):
        norm = BatchNorm(4, dtype="float64", param_dtype="float64")
        output = norm(x, Mode(train=True, where=where))[:6]
        return jnp.sum(jnp.sin(output)), (output, norm.mean[...], norm.var[...])

    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(x, None)
    (_, aux_padded), gradient_padded = jax.value_and_grad(loss, has_aux=True)(padded, where)
    chex.assert_trees_all_close(aux_padded, aux, rtol=1e-12)
    np.testing.assert_allclose(gradient_padded[:6], gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(gradient_padded[6:], 0)


def test_batch_norm_computes_bfloat16_in_float32(rng):
    x = images(rng)
    norm = BatchNorm(4, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    output = norm(x.astype(jnp.bfloat16), Mode(train=True))
    assert output.dtype == jnp.bfloat16
    assert norm.mean.dtype == norm.var.dtype == jnp.float32
    exact = BatchNorm(4, **FLOAT32)(x.astype(jnp.bfloat16).astype(jnp.float32), Mode(train=True))
    np.testing.assert_allclose(output.astype(np.float32), exact, rtol=2**-8, atol=1e-6)  # one rounding, of the output


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_conv_and_pools_pad_as_pytorch(kernel, stride, rng, strict_dtypes):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    x = images(rng, size=8)
    nchw = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    layer = conv(4, 6, kernel, stride=stride, groups=2, rngs=nnx.Rngs(0), **FLOAT32)
    weight = torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
    pad = kernel // 2
    pairs = [
        (layer(x), torch.nn.functional.conv2d(nchw, weight, stride=stride, padding=pad, groups=2)),
        (max_pool(x, kernel, stride=stride, padding=pad), torch.nn.functional.max_pool2d(nchw, kernel, stride, pad)),
        (
            average_pool(x, kernel, stride=stride, padding=pad),
            torch.nn.functional.avg_pool2d(nchw, kernel, stride, pad),
        ),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_shuffle_deals_the_groups_in_turn():
    x = jnp.arange(6).reshape(1, 1, 1, 6)
    np.testing.assert_array_equal(shuffle_channels(x, 3).ravel(), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(shuffle_channels(x, 1), x)


def test_sequential_is_the_identity_when_empty_and_counts_functions_in_its_positions(rng):
    x = images(rng)
    assert Sequential()(x, Mode(train=True)) is x
    layers = Sequential(conv(4, 4, 1, rngs=nnx.Rngs(0), **FLOAT32), nnx.relu, BatchNorm(4, **FLOAT32))
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layers, nnx.Param))} == {0, 2}
    np.testing.assert_allclose(layers(x, Mode(train=False)), np.maximum(layers[0](x), 0) / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_global_average_pool_takes_any_size(rng):
    x = images(rng, size=3)
    np.testing.assert_allclose(global_average_pool(x), np.asarray(x).mean((1, 2)), rtol=1e-5, atol=1e-7)


def test_a_depthwise_convolution_starts_by_all_its_channels():
    kernel = conv(512, 512, 3, groups=512, rngs=nnx.Rngs(0), **FLOAT32).kernel[...]
    assert kernel.shape == (3, 3, 1, 512)
    np.testing.assert_allclose(kernel.std(), (2 / (3 * 3 * 512)) ** 0.5, rtol=0.05)


def test_the_default_initialisation_is_pytorchs():
    kernel = torch_default(jax.random.key(0), (3, 3, 20, 60))
    bound = (3 * 3 * 20) ** -0.5
    assert 0.99 * bound < jnp.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_derivative_of_batch_norm_is_that_of_its_formula(rng, x64, groups, masked):
    """Every row has a gradient, padding too: it reaches the moments of the examples that count."""
    x = jnp.asarray(rng.normal(2.0, 3.0, (6, groups, 2, 3, 4)))
    scale, bias, weights = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=4)), rng.normal(size=x.shape)
    kept = jnp.asarray(rng.random((6, groups)) < 0.7) if masked else None

    def formula(x, scale, bias):
        mask = None if kept is None else kept.reshape(6, groups, 1, 1, 1)
        mean = jnp.mean(x, (0, 2, 3), where=mask, keepdims=True)
        var = jnp.mean((x - mean) ** 2, (0, 2, 3), where=mask, keepdims=True)
        lead = (1,) * 4
        y = (x - mean) / jnp.sqrt(var + 1e-5) * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)
        return jnp.sum(y * weights)

    ours = jax.grad(lambda *args: jnp.sum(normalise(*args, kept)[0] * weights), (0, 1, 2))(x, scale, bias)
    chex.assert_trees_all_close(ours, jax.grad(formula, (0, 1, 2))(x, scale, bias), rtol=1e-10, atol=1e-12)


def test_a_group_of_padding_alone_has_no_say(rng):
    x = jnp.asarray(rng.normal(size=(3, 2, 1, 1, 4)), jnp.float32)
    kept = jnp.array([[True, False]] * 3)
    y, moments = normalise(x, jnp.ones(4), jnp.zeros(4), kept)
    assert moments.number.ravel().tolist() == [3, 0]
    assert bool(jnp.isfinite(y).all())


def test_a_batch_of_which_every_example_is_masked_leaves_the_statistics(rng):
    norm = BatchNorm(3, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm(jnp.asarray(rng.normal(size=(4, 2, 2, 3)), jnp.float32), Mode(train=True))
    before = norm.mean[...], norm.var[...]
    norm(jnp.ones((4, 2, 2, 3)), Mode(train=True, where=jnp.zeros(4, bool)))
    chex.assert_trees_all_equal((norm.mean[...], norm.var[...]), before)
    assert np.all(before[1] != 1)
