"""Properties of every model of the table."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax import UserError, models
from ldrld_jax.models import MODELS, create_model, layers, outline
from ldrld_jax.models.purify import purify
from ldrld_jax.models.table import summarize, traced

FILES = sorted(pathlib.Path(models.__file__).parent.glob("*.py"))
SHARED_FILES = ("convolution", "initializers", "layers", "normalisation", "residual")
ANY_MODEL = ("__init__", "pure", "purify", "table")  # they work with all families
FAMILIES = [file for file in FILES if file.stem not in ANY_MODEL]


def abstract(name, num_classes=7, in_channels=3, **dtypes):
    return purify(outline(name, num_classes, in_channels, **dtypes))


def images(n, size, channels=3, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((n, size, size, channels), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_forward_pass_at_another_size(name, dtype):
    """Logits are of the model's dtype, parameters and statistics float32."""
    with jax.numpy_dtype_promotion("strict" if dtype == jnp.float32 else "standard"):
        apply, params, stats = abstract(name, in_channels=1, dtype=dtype)
        logits, after = jax.eval_shape(lambda *args: apply(*args, train=True), params, stats, images(2, 64, 1))
    assert (logits.shape, logits.dtype) == ((2, 7), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, after))} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, stats)


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_told_the_mode_and_the_padding(name, monkeypatch):
    modes = []
    monkeypatch.setattr(layers.BatchNorm, "__call__", lambda self, x, mode: (modes.append(mode), x)[1])
    apply, params, stats = abstract(name)
    where = jax.ShapeDtypeStruct((2,), jnp.bool_)
    jax.eval_shape(lambda *args: apply(*args[:3], train=True, where=args[3]), params, stats, images(2, 32), where)
    means = [path for path, _ in jax.tree.leaves_with_path(stats) if path[-1].key == "mean"]
    assert len(modes) == len(means)
    assert all(mode.train and mode.where is not None for mode in modes)


@pytest.fixture
def initializers(monkeypatch):
    """`initializers(name)`: those of every convolution's kernel, and of the head's kernel and bias."""

    def collect(name):
        found = {nnx.Conv: [], nnx.Linear: []}
        for layer, calls in found.items():
            make = layer.__init__

            def record(self, *args, make=make, calls=calls, **kwargs):
                calls.append((args, kwargs))
                make(self, *args, **kwargs)

            monkeypatch.setattr(layer, "__init__", record)
        outline(name, 7)
        (fan_in, *_), head = (found[nnx.Linear] or found[nnx.Conv])[-1]  # the head may be a 1x1 convolution
        return {kwargs["kernel_init"] for _, kwargs in found[nnx.Conv]}, fan_in, head["kernel_init"], head["bias_init"]

    return collect


@pytest.mark.parametrize("name", MODELS)
def test_weights_start_as_the_published_code_starts_them(name, initializers):
    key, kernel_shape = jax.random.key(0), (3, 3, 20, 60)
    convs, fan_in, head_kernel, head_bias = initializers(name)
    for init in convs:
        kernel = init(key, kernel_shape, jnp.float32)
        if name.startswith(("Shuffle", "imagenet_mobilenet", "tinyimagenet_mobilenet", "vit")):
            assert jnp.abs(kernel).max() <= (3 * 3 * 20) ** -0.5
            np.testing.assert_allclose(kernel.std(), (3 * 3 * 3 * 20) ** -0.5, rtol=0.03)
        else:
            assert jnp.abs(kernel).max() > 3 * kernel.std()  # normal, not uniform
            np.testing.assert_allclose(kernel.std(), (2 / (3 * 3 * 60)) ** 0.5, rtol=0.03)
    default = (3 * fan_in) ** -0.5
    std = {"vgg": 0.01, "Mob": 0.01, "vit": 0.02}.get(name[:3], (3 * 200) ** -0.5)
    np.testing.assert_allclose(head_kernel(key, (200, 50), jnp.float32).std(), std, rtol=0.03)
    bias_std = 0 if name.startswith(("vgg", "MobileNetV2", "wrn", "vit")) else default
    np.testing.assert_allclose(head_bias(key, (10_000,), jnp.float32).std(), bias_std, rtol=0.03)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'wrn_16_2'"):
        create_model("wrn16_2", 10, rngs=nnx.Rngs(0))


# Multiply-adds in millions as torchvision and the papers give them.
@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [
        ("imagenet_resnet18", 1814),
        ("imagenet_resnet50", 4089),
        ("imagenet_mobilenetv1", 569),
        ("MobileNetV2", 6.5),
        ("resnet56", 125.75),
        ("vit_small_patch16_224", 4600),
    ],
)
def test_flops_are_twice_the_published_multiply_adds(name, multiply_adds):
    assert summarize(name).flops / 2e6 == pytest.approx(multiply_adds, rel=5e-3)


def test_a_scanned_layer_counts_as_often_as_it_runs():
    layers, x = jnp.ones((5, 8, 8)), jnp.ones((3, 8))

    def scanned(layers, x):
        return jax.lax.scan(lambda x, layer: (x @ layer, None), x, layers)[0]

    def unrolled(layers, x):
        for layer in layers:
            x = x @ layer
        return x

    counted = [traced(forward, layers, x.shape)[0] for forward in (scanned, unrolled)]
    assert counted == [5 * 2 * 3 * 8 * 8] * 2


@pytest.mark.parametrize("file", FAMILIES, ids=lambda file: file.stem)
def test_families_are_short_and_know_nothing_of_each_other(file):
    source = file.read_text()
    assert source.count("\n") < 250
    imported = {
        node.module.removeprefix("ldrld_jax.models.")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldrld_jax.models.")
    }
    assert imported <= set(SHARED_FILES)
