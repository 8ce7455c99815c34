"""The environment changes no result of a config."""

import jax
import numpy as np
import pytest

from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.step import Mixup


@pytest.mark.parametrize(
    "environment", [jax.default_prng_impl("rbg"), jax.threefry_partitionable(False)], ids=["rbg", "not partitionable"]
)
def test_random_numbers_are_those_of_the_seed(environment):
    def drawn():
        with precision_scope("float32"):
            _, (_, share) = Mixup(0.3, seed=7)(np.zeros((2, 1, 1, 1)), np.zeros(2, int), np.int32(5))
            return [float(share), *jax.random.normal(jax.random.key(3), (5,)).tolist()]

    expected = drawn()
    with environment:
        assert drawn() == expected
