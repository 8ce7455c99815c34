"""What holds for every model of the table."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax import UserError, models
from ldrld_jax.models import MODELS, create_model, layers
from ldrld_jax.models.summary import summarize
from ldrld_jax.purify import purify

FILES = sorted(pathlib.Path(models.__file__).parent.glob("*.py"))
QUICK = {"xla_backend_optimization_level": 0}
SHARED_FILES = ("layers", "residual")


def abstract(name, num_classes=7, in_channels=3, **dtypes):
    return purify(nnx.eval_shape(lambda: create_model(name, num_classes, in_channels, rngs=nnx.Rngs(0), **dtypes)))


@functools.cache
def real(name):
    """Parameters and statistics, initialised in one program that is quick to compile."""

    def init():
        rngs = nnx.Rngs(params=jax.random.key(0, impl="rbg"))
        return purify(create_model(name, 10, rngs=rngs))[1:]

    return jax.jit(init, compiler_options=QUICK)()


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


NORMAL = ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2"]
UNIFORM = ["ShuffleV1", "imagenet_mobilenetv1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMAL + UNIFORM)
def test_convolutions_start_as_the_published_code_starts_them(name):
    params, _ = real(name)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4 and leaf.size > 2000]
    assert kernels
    for kernel in kernels:
        height, width, fan_in, features = kernel.shape
        if name in NORMAL:
            std = (2 / (height * width * features)) ** 0.5
            assert jnp.abs(kernel).max() > 2.5 * std
        else:
            std = (3 * height * width * fan_in) ** -0.5
            assert jnp.abs(kernel).max() <= 3**0.5 * std
        np.testing.assert_allclose(kernel.std(), std, rtol=0.08)


@pytest.mark.parametrize(
    ("name", "head", "std", "bias"),
    [
        ("resnet8", "fc", (3 * 64) ** -0.5, True),
        ("wrn_16_1", "fc", (3 * 64) ** -0.5, False),
        ("vgg8", "classifier", 0.01, False),
    ],
)
def test_the_head_starts_as_the_published_code_starts_it(name, head, std, bias):
    linear = real(name)[0][head]
    np.testing.assert_allclose(linear["kernel"].std(), std, rtol=0.1)
    assert bool(jnp.any(linear["bias"])) is bias


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_families_are_short_and_know_nothing_of_each_other(file):
    source = file.read_text()
    assert source.count("\n") < 250
    imported = {
        node.module.removeprefix("ldrld_jax.models.")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldrld_jax.models.")
    }
    if file.stem not in ("__init__", "summary"):
        assert imported <= set(SHARED_FILES)
