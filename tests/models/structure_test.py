"""The digest of what a module holds besides its arrays: equal for equal modules, another for another computation."""

import dataclasses
import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

from ldrld_jax.models.structure import structure


@dataclasses.dataclass
class Settings:
    window: int = 3


class Attention(nnx.Module):
    """Attention whose weights are the same for every number of heads, window and activation."""

    def __init__(self, heads=2, settings=None, activation=nnx.relu, rate=0.1, seed=0):
        rngs = nnx.Rngs(seed)
        self.attention = nnx.MultiHeadAttention(heads, 8, decode=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Dropout(rate, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)])
        self.settings, self.activation, self.table = settings or Settings(), activation, jnp.ones(3)

    def __call__(self, x):
        return self.blocks[1](self.blocks[0](self.activation(self.attention(x))))


class Dense(nn.Module):
    inner: nn.Module | None = None
    heads: int = 2
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Drawing(Attention):
    """A module that keeps its random streams, and a property that it has computed once."""

    def __init__(self, seed=0, names=("alpha", "beta", "gamma", "delta")):
        super().__init__()
        self.rngs, self.names = nnx.Rngs(seed), frozenset(names)

    @functools.cached_property
    def size(self):
        return len(self.names)


def sequential(activation=nnx.relu):
    return nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), activation, nnx.Linear(3, 3, rngs=nnx.Rngs(1)))


def convolution(padding="SAME"):
    return nnx.Conv(1, 2, (3, 3), padding=padding, rngs=nnx.Rngs(0))


def linen_sequential(activation=nn.relu):
    return nn.Sequential([nn.Dense(3), activation, nn.Dense(3)]), {"params": {}}


def linen(**fields) -> tuple[nn.Module, dict]:
    return Dense(**fields), {"params": {}}


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (Attention, [{"heads": 4}, {"settings": Settings(5)}, {"activation": nnx.gelu}, {"rate": 0.2}]),
        (linen, [{"heads": 4}, {"activation": nn.gelu}, {"inner": Dense()}, {"inner": Dense(heads=4)}]),
        (sequential, [{"activation": nnx.tanh}]),
        (linen_sequential, [{"activation": nn.tanh}]),
        (convolution, [{"padding": "VALID"}, {"padding": ((1, 1), (0, 0))}]),
        (Drawing, [{"names": ("alpha",)}]),
    ],
)
def test_each_attribute_counts(make, others):
    digests = [structure(make(**fields)) for fields in [{}, *others]]
    assert len(set(digests)) == 1 + len(others)
    assert digests == [structure(make(**fields)) for fields in [{}, *others]]


def test_weights_and_modes_do_not_count():
    training, evaluated = Attention(seed=1), Attention(seed=2)
    training.train()
    evaluated.eval()
    assert structure(training) == structure(evaluated) == structure(Attention())
    assert training.blocks[0].deterministic is False  # the caller's module stays as it is


def test_random_streams_and_kept_properties_do_not_count():
    drawn = Drawing(seed=1)
    drawn.rngs()
    assert drawn.size == 4
    assert structure(drawn) == structure(Drawing())


def test_another_process_finds_the_same():
    """Compares processes that hash text differently."""
    code = "from tests.models.structure_test import Drawing; from ldrld_jax.models.structure import structure; print("
    found = {
        subprocess.run(
            [sys.executable, "-c", f"{code}structure(Drawing()))"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {structure(Drawing())}


def test_an_address_in_memory_does_not_count():
    class Own:
        pass

    assert structure(Attention(settings=Own())) == structure(Attention(settings=Own()))


def test_a_function_has_none():
    assert structure((lambda variables, x, train: x, {"w": jnp.ones(3)})) is None
