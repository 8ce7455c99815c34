"""Models of any library as pure functions: in the mode of the call, and with padding left out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.models.pure import pure

IMAGES = np.ones((2, 3), np.float32)


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


MODELS = {
    "NNX with train() and eval()": Switched,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_called_in_the_mode_of_the_pass(name):
    model = pure(MODELS[name]())
    for train in (True, False):
        found, _ = model.apply(model.params, model.batch_stats, IMAGES, train=train)
        assert found.tolist() == [train, train]


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
