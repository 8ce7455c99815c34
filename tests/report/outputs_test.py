"""The pictures of logits are of the run's best checkpoint and of its teacher, and are computed once."""

import base64
import contextlib
import io
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image

from ldrld_jax import config as config_lib
from ldrld_jax.data.given import as_source
from ldrld_jax.models.purify import purify
from ldrld_jax.report import collect, outputs
from ldrld_jax.report.__main__ import main
from ldrld_jax.report.groups import compare
from ldrld_jax.train import trainer
from ldrld_jax.train.folder import RunFolder
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import Variables
from tests.conftest import ROOT
from tests.tiny_net import TinyNet


def untrained(config, workdir: pathlib.Path) -> float:
    """A run that ended with the weights it began with; its top-1."""
    run = Run.plan(config_lib.resolve(config), epath.Path(workdir))
    with contextlib.closing(RunFolder(run).checkpoints()) as checkpoints:
        checkpoints.save(1, {"model": run.make_student()[1]._asdict()}, {}, top1=10.0)
    (workdir / "config.json").write_text(run.config.to_json())
    top1 = trainer.evaluate(config, workdir)["top1"]
    summary = {"best_top1": top1, "last_top1": top1, "examples_per_second": 1.0}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return top1


def analyse(folder, out):
    return outputs.analyse(compare(collect([folder]).summaries), epath.Path(out))


def test_an_analysis_is_of_the_best_checkpoint_and_its_teacher_and_made_once(tiny, tmp_path, capsys):
    workdir, teacher, out = tmp_path / "run", tmp_path / "teacher", tmp_path / "out"
    taught = untrained(tiny("seed=1", "mesh.data=1"), teacher)
    top1 = untrained(
        tiny("method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={teacher}", "mesh.data=1"), workdir
    )
    assert main([str(workdir), "--analyse", "--out", str(out)]) == 0
    capsys.readouterr()
    found = json.loads((workdir / "analysis.json").read_text())
    for expected, of in ((top1, found), (taught, found["teacher"])):
        right = np.dot(of["calibration"]["examples"], of["calibration"]["accuracy"])
        assert 100 * right / 50 == pytest.approx(expected, abs=0.02)
        assert np.shape(of["embedding"]["xy"]) == (50, 2)
    assert np.shape(found["correlation"]) == (10, 10)
    assert found["correlation_mean"] > 0
    assert {pair["first"] for pair in found["pairs"]} <= set("0123456789")
    counts = np.array(found["class_images"])
    assert counts.sum() == 50
    for expected, of in ((top1, found), (taught, found["teacher"])):
        assert counts @ of["class_top1"] / 50 == pytest.approx(expected, abs=0.01)
    assert len(found["images_shown"]["uncertain"]) == len(found["images_shown"]["differing"]) == 12
    page = (out / "report.html").read_text()
    assert page.count('<ul class="sheet">') == 2
    assert all(part in page for part in ("t-SNE of features, kd", "corr(student)|, kd", "teacher: ECE"))

    assert analyse(workdir, out) == []
    assert "analysing" not in capsys.readouterr().err

    shutil.rmtree(teacher)
    (workdir / "analysis.json").unlink()
    (workdir / "analysis.json").mkdir()  # a place that cannot be written to
    [note] = analyse(workdir, out)
    assert "analysed without its teacher" in note
    [kept] = (out / "analyses").iterdir()
    assert json.loads(kept.read_text())["calibration"] == found["calibration"]

    shutil.rmtree(workdir / "checkpoints")
    kept.unlink()
    [note] = analyse(workdir, out)
    assert "no analysis: there is no checkpoint" in note


@pytest.mark.parametrize("labels", [range(10), [3] * 10], ids=["one of each class", "a single class"])
def test_evaluation_images_without_a_silhouette_are_analysed_without_pictures_of_features(
    tiny, tmp_path, rng, labels, capsys
):
    images = rng.integers(0, 256, (20, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=[*range(10)] * 2, x_test=images[:10], y_test=[*labels])
    names = [f"data.name=arrays:{tmp_path / 'd.npz'}", "data.train_split=train", "data.eval_split=test"]
    untrained(tiny(*names, "mesh.data=1"), tmp_path / "run")
    assert main([str(tmp_path / "run"), "--analyse", "--out", str(tmp_path / "out")]) == 0
    assert "no analysis" not in capsys.readouterr().err
    found = json.loads((tmp_path / "run/analysis.json").read_text())
    assert (found["images"], found["embedding"], found["embedded"]) == (10, None, [])
    page = (tmp_path / "out/report.html").read_text()
    assert "accuracy by class" in page.lower()
    assert "t-SNE of features," not in page


@pytest.mark.parametrize(("key", "value"), [("student.model", "own:net"), ("data.name", "<Items>")])
def test_a_run_of_a_users_code_is_not_analysed_and_executes_nothing(tiny, tmp_path, capsys, key, value):
    untrained(tiny("mesh.data=1"), tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    block, last = key.split(".")
    config[block][last] = value
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    [note] = analyse(tmp_path / "run", tmp_path / "out")
    assert note == f"{tmp_path / 'run'}: no analysis: {key} is {value}, and the report executes no code of a run."
    assert capsys.readouterr() == ("", "")


def test_an_image_that_cannot_be_read_is_a_note_and_the_other_runs_are_analysed(tiny, tmp_path, monkeypatch):
    for name in ("a", "b"):
        untrained(tiny("mesh.data=1", f"seed={ord(name)}"), tmp_path / "runs" / name)
    plan = Run.plan

    def missing_for_a(config, workdir, **given):
        if workdir.name == "a":
            raise FileNotFoundError(2, "No such file or directory", "images/7.png")
        return plan(config, workdir, **given)

    monkeypatch.setattr(Run, "plan", missing_for_a)
    [note] = analyse(tmp_path / "runs", tmp_path / "out")
    assert note == f"{tmp_path / 'runs/a'}: no analysis: [Errno 2] No such file or directory: 'images/7.png'"
    assert (tmp_path / "runs/b/analysis.json").exists()


def test_the_images_shown_are_the_least_certain_and_those_that_differ_most():
    pixels = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 80, 40, 3), np.uint8)
    labels = np.array([0, 1, 0, 1, -1, 0])
    student = np.array([[9.0, 0], [0, 0.5], [9, 0], [0, 3], [0, 0], [0, 2]])
    teacher = np.array([[9.0, 0], [0, 0.5], [0, 9], [0, 3], [0, 9], [9, 0]])
    source = as_source((pixels, np.maximum(labels, 0)), title="pictures")
    both = outputs.Outputs(student, labels, None), outputs.Outputs(teacher, labels, None)
    shown = outputs.shown_images(*both, ("cat", "dog"), source, most=2)
    assert [image["index"] for image in shown["uncertain"]] == [1, 5]  # not 4, which was skipped
    assert [image["index"] for image in shown["differing"]] == [2, 5]
    first = shown["differing"][0]
    assert (first["label"], first["student"], first["teacher"]) == ("cat", ["cat", 100.0], ["dog", 100.0])
    with Image.open(io.BytesIO(base64.b64decode(first["png"]))) as image:
        assert (image.size, image.getpixel((0, 0))) == ((32, 64), (2, 2, 2))
    assert set(outputs.shown_images(both[0], None, ("cat", "dog"), source)) == {"uncertain"}
    tokens = as_source((np.zeros((6, 4), np.int32), np.maximum(labels, 0)), title="tokens")
    assert outputs.shown_images(*both, ("cat", "dog"), tokens) == {}


def test_features_are_what_the_last_layer_reads(rng):
    apply, params, stats = purify(TinyNet(10, 1, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32))
    images = jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32)
    headless = outputs.headless(Variables(params, stats))
    features, logits = (
        np.asarray(apply(weights, stats, images, train=False)[0]) for weights in (headless.params, params)
    )
    kernel, bias = (np.asarray(params["fc"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(features @ kernel + bias, logits, atol=1e-6)
    assert outputs.headless(Variables({"conv": {}}, stats)) is None


def test_the_last_layer_of_every_model_has_a_name_that_is_known():
    files = (ROOT / "tests" / "golden" / f"{name}.json" for name in ("torch_models", "torch_models_more"))
    models = {name: keys for file in files for name, keys in json.loads(file.read_text()).items()}
    for name, keys in models.items():  # as published, and as ours are named
        last = [key for key, shape in keys.items() if len(shape) == 2][-1]
        assert last.partition(".")[0] in outputs._HEADS, name
    assert len(models) >= 28
