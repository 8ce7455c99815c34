"""`Trainer.export` writes the best student of a run of objects as a program that needs only JAX."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import load_file

from ldrld_jax.deploy.export import read_student
from ldrld_jax.errors import UserError
from ldrld_jax.interop.torch_import import to_state_dict
from tests.train.conftest import linear
from tests.train.library_test import Drop

ELSEWHERE = """
import pathlib, sys
import numpy as np
from jax import export
student = export.deserialize(bytearray(pathlib.Path("student.stablehlo").read_bytes()))
np.save("logits.npy", student.call(np.load("inputs.npy")))
print(*{"flax", "ldrld_jax", "orbax", "optax", "PIL"} & set(sys.modules))
"""


def flat(variables, images, train):
    del train
    return images.reshape(images.shape[0], -1) @ variables["w"]


def table(variables, tokens, train):
    del train
    return variables["w"][tokens]


def weights(seed, *shape):
    return {"w": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def texts(count):
    tokens = np.random.default_rng(count).integers(0, 11, (count, 6))
    return tokens, np.where(np.arange(6) < 2, -1, tokens[:, ::-1])


RUNS = {
    "NNX": lambda: dict(student=Drop(nnx.Rngs(0)), config={"data.mean": (0.3,), "data.std": (0.4,)}),
    "function": lambda: dict(student=(flat, weights(2, 64, 10))),
    "tokens": lambda: dict(
        student=(table, weights(0, 11, 11)),
        teacher=(table, weights(1, 11, 11)),
        train=texts(40),
        evaluation=texts(21),
        num_classes=11,
    ),
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_exported_object_gives_the_logits_of_predict_with_jax_alone(make, digits, tmp_path, kind):
    trainer = make(**RUNS[kind]())
    trainer.fit()
    inputs = texts(5)[0].astype(np.int32) if kind == "tokens" else digits["evaluation"][0][:5]
    expected = trainer.predict(inputs)
    folder = trainer.export()
    assert folder == tmp_path / "run/export"
    student = read_student(folder)
    assert expected.shape == ((5, 6, 11) if kind == "tokens" else (5, 10)) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(student.program.call(inputs), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(student.program.call(inputs[:2]), expected[:2], rtol=0, atol=1e-5)
    np.save(folder / "inputs.npy", inputs)
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    np.testing.assert_allclose(np.load(folder / "logits.npy"), expected, rtol=0, atol=1e-5)


def test_an_export_of_objects_has_their_weights_and_a_card_without_markup(make, digits, tmp_path):
    trainer = make(student=(flat, weights(2, 64, 10)), epochs=1)
    trainer.fit()
    folder = trainer.export(tmp_path / "a/new/folder")
    assert folder == tmp_path / "a/new/folder" and not (tmp_path / "run/export").exists()
    assert trainer.export(str(folder)) == folder  # over the earlier one
    (array,) = load_file(folder / "student.safetensors").values()
    images = digits["evaluation"][0][:5]
    pixels = (images.reshape(5, -1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_allclose(pixels @ array, trainer.predict(images), rtol=0, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "# flat on arrays, distilled from linear\n" in card
    assert "under the model's own names" in card and "load_torch_checkpoint" not in card
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["arrays"]
    assert json.loads((folder / "preprocessing.json").read_text())["labels"] == list("0123456789")


def test_weights_that_would_have_one_name_keep_their_own():
    tree = {"norm": {"kernel": jnp.zeros((2, 3)), "scale": jnp.ones(3)}, "fc": {"kernel": jnp.zeros((2, 3))}}
    shapes = {key: value.shape for key, value in to_state_dict(tree, {}).items()}
    assert shapes == {"norm.kernel": (3, 2), "norm.scale": (3,), "fc.weight": (3, 2)}


def test_what_cannot_be_exported_is_one_line(make, tmp_path):
    with pytest.raises(UserError, match=r"run has no checkpoint yet\. Train the run first\.$"):
        make().export()
    trainer = make(student=(linear, weights(0, 64, 10)), epochs=1)
    trainer.fit()
    with pytest.raises(
        UserError, match=r"<linear> cannot be traced .* write x\.shape\[0\] in place of len\(x\)"
    ) as error:
        trainer.export()
    assert "\n" not in str(error.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    with pytest.raises(UserError, match=r"mine contains files that are not of an export\. Give a new or empty folder"):
        trainer.export(tmp_path / "mine")
    with pytest.raises(UserError, match=r"README\.md is a file, and an export is a folder"):
        trainer.export(tmp_path / "mine/README.md")
    assert (tmp_path / "mine/README.md").read_text() == "mine"
