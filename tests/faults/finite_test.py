"""Numbers that are not finite are never passed for good."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax import load_torch_checkpoint
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.interop.torch_import import save_torch_checkpoint
from ldrld_jax.metrics import classification, in_top
from ldrld_jax.models import MODELS, create_model
from ldrld_jax.models.purify import purify
from ldrld_jax.train import trainer
from tests.tiny_net import TinyNet
from tests.train.trainer_test import saved


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_row_whose_label_cannot_be_compared_is_never_right(bad):
    logits = jnp.array([[0.0, 2.0, 1.0], [bad, 0.0, 0.0], [0.0, bad, 0.0]])
    right = in_top(logits, jnp.array([1, 0, 1]), 1)
    assert right.tolist() == [True, False, False]
    assert not in_top(logits, jnp.array([1, 0, 1]), 3)[1:].any()


def test_a_nan_beside_the_label_is_not_right_either_and_a_class_that_is_ruled_out_is_fine():
    logits = jnp.array([[1.0, jnp.nan, 0.0], [1.0, -jnp.inf, 0.0]])
    assert in_top(logits, jnp.array([0, 0]), 1).tolist() == [False, True]
    all_nan = classification(jnp.full((4, 3), jnp.nan), jnp.arange(4) % 3)
    assert (all_nan["top1"].value, all_nan["top5"].value) == (0.0, 0.0)


class Exploding(TinyNet):
    """A network whose loss stays finite while its statistics do not."""

    def __call__(self, x, *, train, where=None):
        logits = super().__call__(x, train=train, where=where)
        if train:
            self.bn.var[...] = self.bn.var[...] * jnp.inf
        return logits


@pytest.mark.parametrize("model", ["tiny_net", "exploding"])
def test_weights_or_statistics_that_are_not_finite_stop_a_run_whose_loss_is(tiny, tmp_path, monkeypatch, model):
    monkeypatch.setitem(MODELS, "exploding", Exploding)
    # The loss before such a step is finite, the weights after it are not.
    flags = ["optim.learning_rate=1e30", "optim.weight_decay=1e10"] if model == "tiny_net" else []
    with pytest.raises(NonFiniteError, match="the weights are not finite at step 1"):
        trainer.train(tiny(*flags, f"student.model={model}", "optim.warmup=none"), tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert not list((tmp_path / "checkpoints").glob("[0-9]*")) if (tmp_path / "checkpoints").exists() else True


def test_with_skip_such_a_step_changes_nothing(tiny, tmp_path):
    flags = ["optim.learning_rate=1e30", "optim.weight_decay=1e10", "optim.warmup=none", "non_finite=skip", "epochs=1"]
    summary = trainer.train(tiny(*flags), tmp_path)
    assert summary["skipped_steps"] == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(tmp_path, 3)["model"]))


def poisoned(tmp_path: pathlib.Path, name: str, value: float) -> str:
    """A PyTorch file of a ResNet8 in which one number is `value`."""
    model = create_model("resnet8", 10, 1, rngs=nnx.Rngs(0))
    _, params, stats = purify(model)
    tree = {"kernel": params["fc"], "mean": stats["bn1"], "bias": params["fc"]}[name]
    tree[name] = tree[name].at[(0,) * tree[name].ndim].set(value)
    path = tmp_path / f"{name}.safetensors"
    save_torch_checkpoint(path, params, stats)
    return str(path)


@pytest.mark.parametrize(("name", "value"), [("kernel", np.nan), ("mean", np.inf), ("bias", -np.inf)])
def test_a_file_with_a_number_that_is_not_finite_is_refused_by_its_name(tiny, tmp_path, name, value):
    path = poisoned(tmp_path, name, value)
    with pytest.raises(UserError, match=rf"not finite: 1 of \d+ numbers of .*{name}"):
        load_torch_checkpoint(path, "resnet8", 10, in_channels=1)
    with pytest.raises(UserError, match="not finite"):
        trainer.train(tiny("method=kd", "teacher.model=resnet8", f"teacher.checkpoint={path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
