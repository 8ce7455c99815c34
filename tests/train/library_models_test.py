"""Models that `ldrld_jax.Trainer` is given: what they may hold and return."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from tests.train.conftest import linear


class Masked(nnx.Module):
    """Holds a mask of minus infinity, as attention does."""

    def __init__(self):
        self.head = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
        self.mask = nnx.Variable(jnp.where(jnp.tril(jnp.ones((3, 3))) > 0, 0, -jnp.inf))

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))


def test_a_mask_of_minus_infinity_is_kept_and_stops_no_run(make):
    trainer = make(student=Masked(), method="ce", teacher=None, epochs=1, config={"ema_decay": 0.9})
    result = trainer.fit()
    assert (result.summary["steps"], result.summary["skipped_steps"]) == (3, 0)
    np.testing.assert_array_equal(result.student.mask[...], Masked().mask[...])
    assert trainer.evaluate()["top1"] == result.summary["best_top1"]


def test_weights_that_are_not_finite_from_the_start_are_named(make, tmp_path):
    student = linear, {"w": np.full((64, 10), -np.inf, np.float32)}
    with pytest.raises(
        UserError, match=r"^the student <linear> holds weights that are not finite: 640 of 640 numbers of params/w"
    ):
        make(student=student).fit()
    assert not list(tmp_path.iterdir())


def test_wkd_takes_a_last_layer_of_any_name(make):
    assert make(method="wkd", epochs=1).fit().summary["steps"] == 3
