"""Arguments that `ldrld_jax.Trainer` cannot use get one line, and leave no workdir."""

import numpy as np
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from tests.train.conftest import linear
from tests.train.library_test import Drop, Linen

WRONG = {
    "no model": (dict(student=3), "a model must be an nnx.Module"),
    "a Linen module alone": (dict(student=Linen()), "with its variables"),
    "no teacher": (dict(teacher=None), "needs a teacher"),
    "paths and models": (dict(teacher=["a", Drop]), "all paths or all models"),
    "a file of what": (dict(teacher="net.pth"), "does not say what model"),
    "no workdir": (dict(teacher="."), r"holds no run \(no config.json\)"),
    "a number as a method": (dict(method=3), "a method must be a name"),
    "an unknown method": (dict(method="ldrdl"), "Did you mean 'ldrld'"),
    "labels of another length": (dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(4, int))), "a label an image"),
    "one-hot labels": (dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.eye(3))), "argmax"),
    "a missing axis": (dict(train=(np.zeros((3, 8, 8), np.uint8), np.zeros(3, int))), "Add the axis"),
    "a label out of range": (
        dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 12])), num_classes=10),
        "label 12 of example 2 of the training data is out of range",
    ),
    "a label below 0": (dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, -1]))), "label -1 of example 2"),
    "not finite": (dict(train=(np.full((3, 8), np.nan), np.zeros(3, int))), "not finite"),
    "no evaluation": (dict(evaluation=None), "data.held_out"),
    "other classes": (
        dict(evaluation=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 11])), num_classes=10),
        "label 11 of example 2 of the evaluation data",
    ),
    "no optimizer": (dict(optimizer=3), "the optimizer must be one of optax"),
    "no writer": (dict(writers=[3]), "a writer must have write"),
    "no callback": (dict(callbacks=[print]), "a callback must be an ldrld_jax.Callback"),
    "an unknown key": (dict(config={"data.maen": 1.0}), "Did you mean 'data.mean'"),
    "logits of other classes": (
        dict(student=(lambda v, x, train: x.reshape(len(x), -1) @ v, np.ones((64, 7), np.float32))),
        r"returns \(2, 7\) for 2 images, and must return logits \(2, 10\)",
    ),
    "another shape": (
        dict(student=(linear, {"w": np.ones((49, 10), np.float32)})),
        r"fails on images \(2, 8, 8, 1\) uint8",
    ),
    "groups of Flax's normalisation": (
        dict(student=Drop(nnx.Rngs(0)), config={"batch_norm_group": 20}),
        "known to this package's BatchNorm alone",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_run_can_use_is_one_line_and_no_workdir(make, tmp_path, wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as error:
        make(**arguments).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
