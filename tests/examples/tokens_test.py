"""The causal language model and its config: what the texts leave out, and every command."""

import sys

import numpy as np
import pytest

from ldrld_jax import main as main_lib
from ldrld_jax.config import load_run
from ldrld_jax.deploy.export import read_student
from ldrld_jax.errors import UserError
from ldrld_jax.examples.tokens import LENGTH, texts
from ldrld_jax.report.__main__ import main as report
from tests.train.trainer_test import values

MODULE = "ldrld_jax.examples.tokens"
BIGRAMS = """
import numpy as np

def bigrams(num_classes):
    rng = np.random.default_rng(0)
    return lambda w, tokens, train: w[tokens], rng.normal(size=(num_classes, num_classes)).astype(np.float32)
"""


def test_the_texts_are_what_the_library_wants_of_any_python():
    train, test = texts("train"), texts("test")
    assert 5_000 < len(train) < 12_000
    assert len(test) == (len(train) + len(test)) // 10
    shares = []
    for i in range(0, len(test), 7):
        title, text = test.pieces[i]
        tokens, labels = test[i]
        assert (tokens.shape, labels.shape) == ((LENGTH,), (LENGTH,))
        assert (tokens.min() >= 0, tokens.max() < 128, labels.min()) == (True, True, -1)
        kept = labels >= 0
        assert bytes(labels[kept].tolist()).decode() == text
        assert bytes(tokens[: int(kept.argmax()) + 1].tolist()).decode() == f"{title}: "
        shares.append(kept.mean())
    assert 0.7 < np.mean(shares) < 0.9


def test_the_config_trains_evaluates_reports_and_exports_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Uses a fiftieth of the texts, and a teacher that compiles at once."""
    (tmp_path / "own.py").write_text(BIGRAMS)
    monkeypatch.chdir(tmp_path)
    flags = {"epochs": 1, "teacher.epochs": 1, "teacher.model": "own:bigrams", "data.fraction": 0.02}
    flags |= {"data.held_out": 0.02, "mesh.data": 1, "log.tensorboard": False}

    def run(*arguments):
        return main_lib.main([*arguments, "--workdir", "run"])

    assert run("--config", "configs/tokens.py", *(f"--config.{key}={value}" for key, value in flags.items())) == 0
    printed = capsys.readouterr().out
    assert " to evaluate on (0.02 of train), 128 classes, 64" in printed
    assert "have no image to evaluate on" not in printed
    (last,) = values(tmp_path / "run", "eval", "ce")
    assert 2 < last < 4.85  # guessing gives log(128)
    again = [f"--config.student.model={MODULE}:small", f"--config.data.name={MODULE}:texts"]
    assert run("--mode", "eval", *again) == 0
    assert f"ce {last:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"This names code in a module\. Repeat it .*={MODULE}:small"):
        load_run("run")
    assert report(["run", "--out", "page"]) in (0, None)
    assert f"{MODULE}:small" in (tmp_path / "page/report.html").read_text()

    assert run("--mode", "export", *again) == 0
    student = read_student("run/export")
    tokens = np.stack([texts("test")[3][0]] * 2)
    tokens[1, 40:] += 1
    logits = np.asarray(student.program.call(tokens))
    assert logits.shape == (2, LENGTH, 128)
    np.testing.assert_array_equal(*logits[:, :40])  # no token sees the next
    assert np.abs(logits[0, 40:] - logits[1, 40:]).max(axis=-1).min() > 0.01
    assert student.preprocessing["output"]["shape"] == ["batch", LENGTH, 128]
    assert "normalises the pixels" not in (tmp_path / "run/export/README.md").read_text()
    (tmp_path / "text.txt").write_text("pi: 3.14")
    capsys.readouterr()
    assert main_lib.main(["--mode", "predict", "--workdir", "run/export", "text.txt"]) == 2
    error = capsys.readouterr().err
    assert "the student takes int32 inputs [batch, 64] as they are, and no image files. Call its program" in error
    assert error.count("\n") == 1
    sys.modules.pop("own")
