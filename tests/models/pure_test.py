"""Models of any library as pure functions: in the mode of the call, and with padding left out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from ldrld_jax.models.pure import pure

IMAGES = np.ones((2, 3), np.float32)


class Inner(nn.Module):
    """Returns 1 in training."""

    @nn.compact
    def __call__(self, x, train=False):
        return jnp.full(len(x), train) + self.param("zero", nn.initializers.zeros, ())


class Wrapped(nn.Module):
    inner: nn.Module

    def __call__(self, *arguments, **options):
        return self.inner(*arguments, **options)


class InnerNNX(nnx.Module):
    def __call__(self, x, *, train=False):
        return jnp.full(len(x), train)


class WrappedNNX(nnx.Module):
    def __init__(self):
        self.inner = InnerNNX()

    def __call__(self, *arguments, **options):
        return self.inner(*arguments, **options)


class Switched(nnx.Module):
    """Has modes of its own, and no layer that Flax would switch."""

    def __init__(self):
        self.training = None

    def train(self, **attributes):
        self.training = True

    def eval(self, **attributes):
        self.training = False

    def __call__(self, x):
        return jnp.full(len(x), self.training)


def wrapped() -> tuple[nn.Module, dict]:
    module = Wrapped(Inner())
    return module, module.init(jax.random.key(0), IMAGES)


class Training(nnx.Module):
    def __call__(self, x, *, training=False):
        return jnp.full(len(x), training)


MODELS = {
    "function": lambda: (lambda v, x, **options: v["w"] + options["train"], {"w": np.zeros(2, np.float32)}),
    "function with the name of a mode": lambda: (
        lambda v, x, deterministic, **options: v["w"] + (not deterministic) + len(options),
        {"w": np.zeros(2, np.float32)},
    ),
    "Linen": wrapped,
    "NNX": WrappedNNX,
    "NNX within Flax's own": lambda: nnx.Sequential(Training(), jnp.logical_not, jnp.logical_not),
    "Linen within NNX": lambda: nnx.bridge.ToNNX(Inner(), rngs=nnx.Rngs(0)).lazy_init(IMAGES),
    "NNX with train() and eval()": Switched,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_called_in_the_mode_of_the_pass(name):
    model = pure(MODELS[name]())
    for train in (True, False):
        found, _ = model.apply(model.params, model.batch_stats, IMAGES, train=train)
        assert found.tolist() == [train, train]


def test_layers_that_know_no_mode_get_none():
    """Flax's own containers take options of any name, and pass them on to their first layer."""
    model = pure(nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    found, _ = model.apply(model.params, {}, IMAGES, train=True, key=jax.random.key(0))
    assert (np.asarray(found) == 0).any()
    module = nn.Sequential([nn.Dense(3)])
    model = pure((module, module.init(jax.random.key(0), IMAGES)))
    assert model.apply(model.params, {}, IMAGES, train=True)[0].shape == (2, 3)


def test_the_apply_of_a_linen_module_is_refused_for_the_module():
    module, variables = wrapped()
    for function in (module.apply, jax.jit(module.apply)):
        with pytest.raises(
            UserError, match=r"method apply of the Linen module Wrapped, .* Give .*: \(module, variables\)"
        ):
            pure((function, variables))


class Keyed(nnx.Module):
    def __init__(self):
        self.noise = nnx.Variable(jax.random.key(0))


def test_a_key_among_the_variables_is_refused_by_name():
    with pytest.raises(UserError, match=r"^noise of the model is a key of jax\.random\.key, which no checkpoint holds"):
        pure(Keyed())


class Derived(nnx.BatchNorm):
    pass


class Doubled(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class DoubledLinen(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return 2 * super().__call__(x, use_running_average)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return DoubledLinen(momentum=0.0)(x, use_running_average=not train)


@pytest.mark.parametrize("kind", [Derived, Doubled, DoubledLinen])
def test_padding_enters_no_statistic_of_a_normalisation_derived_from_flaxs(kind, rng):
    if kind is DoubledLinen:
        variables = Normalised().init(jax.random.key(0), IMAGES, train=False)
        model = pure((Normalised(), {"params": {}, **variables}))
    else:
        model = pure(nnx.Sequential(kind(3, momentum=0.0, rngs=nnx.Rngs(0))))
    images = rng.normal(size=(6, 3)).astype(np.float32)
    padded = np.concatenate([images, np.full((4, 3), 1e3, np.float32)])
    step = lambda x, where: model.apply(model.params, model.batch_stats, x, train=True, where=where)  # noqa: E731
    (logits, stats), (alone, kept) = step(padded, np.arange(10) < 6), step(images, None)
    np.testing.assert_allclose(logits[:6], alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, kept)


def test_variables_whose_paths_read_alike_are_refused():
    variables = {"a": {"b": np.ones(3, np.float32)}, "a/b": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=r"^the model has several variables that are named a/b\. Rename"):
        pure((lambda v, x, train: x, variables))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.linear(x))


class Scanned(nnx.Module):
    """Layers under `nnx.scan`, each with a random stream of its own."""

    def __init__(self, layers):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.blocks)


def test_layers_that_are_scanned_draw_from_streams_of_their_own():
    model = pure(Scanned(2))
    kernel = np.stack([np.eye(3, dtype=np.float32)] * 2)
    params = jax.tree.map(lambda leaf: kernel if leaf.ndim == 3 else np.zeros_like(leaf), model.params)
    images = np.ones((1, 3), np.float32)
    out = lambda seed: model.apply(params, model.batch_stats, images, train=True, key=jax.random.key(seed))[0]  # noqa: E731
    found = np.stack([out(seed)[0] for seed in range(64)])
    assert set(np.unique(found)) == {0.0, 4.0}  # kept by both layers, or dropped by one
    assert 0.1 < (found == 4.0).mean() < 0.4  # a quarter; half, if both drew the same numbers
    np.testing.assert_array_equal(found[0], out(0)[0])
    np.testing.assert_array_equal(model.apply(params, model.batch_stats, images, train=False)[0], images)
