"""The exported files and predictions: they say what the Flax student says, in a process that knows nothing of it."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from PIL import Image

from ldrld_jax import Trainer, load_torch_checkpoint
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import _eval_view, make_eval_source
from ldrld_jax.deploy import export
from ldrld_jax.deploy.model_card import model_card
from ldrld_jax.deploy.preprocessing import describe, view_of
from ldrld_jax.errors import UserError
from ldrld_jax.models import MODELS
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train import trainer
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.step import Network
from tests.conftest import tiny_overrides
from tests.pages import PAGES, blocks
from tests.tiny_net import TinyNet

# What a service would do; it says which of these it has loaded.
ELSEWHERE = """
import pathlib, sys
import numpy as np
from jax import export
student = export.deserialize(bytearray(pathlib.Path("export/student.stablehlo").read_bytes()))
images = np.load("images.npy")
np.save("all.npy", student.call(images))
np.save("parts.npy", np.concatenate([student.call(images[:100]), student.call(images[100:])]))
print(*{"flax", "ldrld_jax", "orbax", "optax", "tensorflow_datasets", "PIL"} & set(sys.modules))
"""


@pytest.fixture(scope="module")
def tiny_net():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        yield


def trained(workdir: pathlib.Path, data_dir: str, *overrides: str) -> pathlib.Path:
    """A run of one step, exported."""
    few = ["student.model=tiny_net", "data.train_split=train[:40]", "data.eval_split=test[:256]", "epochs=1"]
    trainer.train(config_lib.load("configs/digits.py", [*tiny_overrides(data_dir), *few, *overrides]), workdir)
    assert export.export(config_lib.load_run(str(workdir)), workdir) == workdir / "export"
    return workdir


@pytest.fixture(scope="module")
def run(tiny_net, data_dir, tmp_path_factory) -> pathlib.Path:
    """Uses each option that makes the evaluated weights differ from the trained ones, on many devices."""
    return trained(tmp_path_factory.mktemp("run"), data_dir, "ema_decay=.5", "mesh.data=8", "mesh.fsdp=True")


@pytest.fixture
def cifar_run(tiny_net, cifar100_dir, tmp_path) -> pathlib.Path:
    return trained(
        tmp_path, cifar100_dir, "mesh.data=1", "data.name=cifar100", "data.mean=(.51,.49,.44)", "data.std=(.27,.26,.28)"
    )


@pytest.mark.parametrize("name", ["run", "cifar_run"])
def test_in_a_process_without_flax_the_exported_student_equals_the_flax_student(name, request):
    workdir = request.getfixturevalue(name)
    config = config_lib.load_run(str(workdir))
    images, _ = make_eval_source(config.data).read(np.arange(256))
    module = load_torch_checkpoint(
        workdir / "export/student.safetensors",
        "tiny_net",
        num_classes=len((workdir / "export/labels.txt").read_text().splitlines()),
        in_channels=images.shape[-1],
    )
    expected = module(
        (images / np.float32(255) - np.float32(config.data.mean)) / np.float32(config.data.std), train=False
    )
    np.save(workdir / "images.npy", images)
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}  # one device, not the suite's eight
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE], cwd=workdir, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(np.load(workdir / "all.npy"), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.load(workdir / "parts.npy"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_student_of_images_that_no_file_holds_is_exported_and_predicts_arrays(
    channels, tiny_net, tmp_path, rng, capsys
):
    arrays = {"x_train": rng.integers(0, 256, (40, 8, 8, channels), np.uint8), "y_train": np.arange(40) % 10}
    np.savez(tmp_path / "d.npz", **arrays, x_test=arrays["x_train"][:10], y_test=arrays["y_train"][:10])
    names = [f"data.name=arrays:{tmp_path / 'd.npz'}", "data.train_split=train", "data.eval_split=test"]
    workdir = trained(tmp_path / "run", "unused", "mesh.data=1", *names)
    described = json.loads((workdir / "export/preprocessing.json").read_text())
    assert described["input"] == {"dtype": "uint8", "shape": ["batch", 8, 8, channels]}
    assert described["before"] is None
    assert described["inside"] == {"scale": 1 / 255, "resize": None, "mean": [0.305], "std": [0.376]}
    logits = export.read_student(workdir / "export").program.call(arrays["x_train"])
    best = Trainer.from_config(config_lib.load_run(str(workdir)), workdir)
    np.testing.assert_allclose(logits, best.predict(arrays["x_train"]), rtol=0, atol=1e-5)
    card = (workdir / "export/README.md").read_text()
    assert "It takes any number of images and normalises the pixels itself" in card
    assert "--mode predict" not in card
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for place in ("run", "run/export"):
        assert main_lib.main(["--mode=predict", "--workdir", str(tmp_path / place), str(tmp_path / "a.png")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"ldrld_jax: the student takes uint8 inputs [batch, 8, 8, {channels}] as they are, and no image files. "
            "Call its program, as the README.md of its export shows."
        )


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_a_student_of_another_precision_gives_float32_logits_without_it(precision, run):
    config = config_lib.load_run(str(run), [f"precision={precision}"])
    images, _ = make_eval_source(config.data).read(np.arange(5))
    student, *_ = export.student_of(config, run)
    program = jax.export.deserialize(student.program.serialize())
    with precision_scope(precision):
        network, variables = Networks(10, 1, precision).restore(str(run), "tiny_net", config.data)
        # The conversion is part of the program: XLA keeps more digits than bfloat16 has where it may.
        logits_of = jax.jit(lambda x: network(variables, x, train=False)[0].astype(np.float32))
        expected = np.asarray(logits_of(images))
    logits = program.call(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_a_network_that_resizes_its_images_is_exported_with_the_resizing(run):
    config = config_lib.load_run(str(run))
    network, variables = Networks(10, 1, "float32").restore(str(run), "tiny_net", config.data)
    network = dataclasses.replace(network, image_size=12)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    program = export.make_program(network, jax.tree.map(np.asarray, variables), (8, 8, 1), np.uint8)
    np.testing.assert_allclose(program.call(images), network(variables, images, train=False)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("overrides", [[], ["crop_size=16", "resize_size=20"], ["crop_size=16", "exif=False"]], ids=str)
def test_what_preprocessing_json_describes_is_what_evaluation_does(overrides, rng):
    data = config_lib.load("configs/digits.py", [f"data.{override}" for override in overrides]).data
    exif, encoded = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(encoded, "png", exif=exif)
    view = _eval_view((40, 40, 3), data)
    described = describe(Network(lambda: None, mean=(0.5,), std=(0.5,)), data, view.shape, classes=10)
    again = view_of(json.loads(json.dumps(described)))
    assert again.shape == view.shape
    np.testing.assert_array_equal(again(encoded.getvalue()), view(encoded.getvalue()))


def test_one_file_serves_all_platforms_and_is_as_large_as_its_weights(run):
    student = export.read_student(run / "export")
    assert student.program.platforms == ("cpu", "cuda", "tpu")
    assert student.program.nr_devices == 1
    assert student.labels == tuple("0123456789")
    weights = (run / "export/student.safetensors").stat().st_size
    assert (run / "export/student.stablehlo").stat().st_size < weights + 20_000


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"sha256": {}}, "is not of an export (KeyError: 'student.stablehlo')"),
        ({"sha256": None}, "is not of an export (TypeError"),
        ({"input": 5, "before": None}, "is not of an export (TypeError"),
        ({"input": {"shape": 3}}, "is not of an export (TypeError"),
        (["labels", "sha256"], "lacks labels, sha256"),
    ],
)
def test_a_preprocessing_json_that_export_did_not_write_is_refused_in_one_line(run, tmp_path, changed, line):
    shutil.copytree(run / "export", tmp_path / "export")
    path = tmp_path / "export/preprocessing.json"
    content = json.loads(path.read_text())
    content = (
        {key: content[key] for key in content if key not in changed} if isinstance(changed, list) else content | changed
    )
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        export.read_student(tmp_path / "export")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_summary_that_lacks_a_number_of_the_card_is_named(run, tmp_path):
    student, variables, saved = export.student_of(config_lib.load_run(str(run)), run)
    summary = json.loads((run / "summary.json").read_text())
    del summary["last_top5"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="has no number last_top5"):
        export.card_of(tmp_path, student, variables, saved)


def test_the_models_card_says_what_the_run_was(run):
    card = (run / "export/README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["datasets"] == ["digits"]
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test[:256]"
    assert result["metrics"][0] == {"type": "accuracy", "name": "best top1", "value": summary["best_top1"]}
    assert f"| accuracy, last epoch | top-1 {summary['last_top1']:.2f} %" in card
    assert "| teacher | none |" in card
    assert "CC BY 4.0" in card


def test_the_models_card_of_a_distilled_student_names_teacher_method_and_seeds(tiny):
    overrides = ["method=ldrld+kd", "teacher.model=resnet20", "teacher.checkpoint=/home/me/r20.pth", "seed=3"]
    config = config_lib.resolve(tiny(*overrides, "data.name=someones")).to_dict()
    described = describe(Network(lambda: None, mean=(0.5,), std=(0.5,)), ConfigDict(config["data"]), (8, 8, 1), 10)
    card = model_card(config, None, described=described, parameters=1234)
    assert "# tiny_net on someones, distilled from resnet20" in card
    assert "| teacher | resnet20, from r20.pth |" in card
    assert "| student | tiny_net, 1,234 parameters, 10 classes, float32 |" in card
    assert "ldrld (alpha 10.5, beta 7.0, depth 7," in card
    assert "; kd (" in card and "temperature 4.0" in card and ") times 0.9; ce_weight 1, kd_weight 1" in card
    assert "| seeds | 3 |" in card
    assert "| licence of the data | not known to this software |" in card
    assert "| accuracy, best epoch | the run had not ended |" in card
    config["standardize"], config["loss_schedule"]["kd_weight"] = True, "linear:0@1:5@20"
    config["method"] = "ldrld+mymod:mine"
    card = model_card(config, None, described=described, parameters=1234)
    assert "; mymod:mine (own code); of standardised logits; ce_weight 1, kd_weight 1, kd_warmup_epochs 0; " in card
    assert "; kd_weight by epoch linear:0@1:5@20 instead |" in card
    config["teacher"]["checkpoint"] = "/home/me/run,1"  # a comma is part of a single teacher's path
    card = model_card(config, None, described=described, parameters=1234)
    assert "| teacher | resnet20, from run,1 |" in card
    config["data"]["name"] = "cifar100:3.0.2"
    card = model_card(config, None, described=described, parameters=1234)
    assert "| licence of the data | its authors name none; they ask to cite Krizhevsky, 2009 |" in card


def test_the_lines_of_the_models_card_run(run, monkeypatch, capsys):
    monkeypatch.chdir(run / "export")
    (block,) = blocks(pathlib.Path("README.md"), "python")
    exec(block.code, {})
    (label,) = yaml.safe_load(capsys.readouterr().out)
    assert label in "0123456789"


def test_the_python_of_the_page_about_deploying_runs(run, images, monkeypatch):
    monkeypatch.chdir(run)
    scope: dict = {}
    for block in blocks(PAGES["docs/deploy.md"], "python"):
        exec(compile(block.code, f"docs/deploy.md:{block.line}", "exec"), scope)
    paths, probabilities = images
    assert scope["answer"]([path.read_bytes() for path in paths]) == [str(i) for i in probabilities.argmax(axis=-1)]


@pytest.fixture
def images(run, tmp_path) -> tuple[list[pathlib.Path], np.ndarray]:
    """Two scans of the test images as files, and the probabilities that the student gives them."""
    scans, _ = make_eval_source(config_lib.load_run(str(run)).data).read(np.arange(2))
    paths = [tmp_path / "a.png", tmp_path / "b.bmp"]
    for path, scan in zip(paths, scans, strict=True):
        Image.fromarray(scan[..., 0]).save(path)
    return paths, np.asarray(jax.nn.softmax(export.read_student(run / "export").program.call(scans)))


@pytest.mark.parametrize("place", ["", "export"])
def test_predictions_by_a_run_and_by_its_export_are_the_students_top_five(place, run, images, capsys):
    paths, probabilities = images
    assert main_lib.main(["--mode=predict", "--workdir", str(run / place), *map(str, paths)]) == 0
    for path, row, line in zip(paths, probabilities, capsys.readouterr().out.splitlines(), strict=True):
        best = sorted(range(10), key=lambda i: -row[i])[:5]
        assert line == f"{path}  " + ", ".join(f"{i} {100 * row[i]:.2f} %" for i in best)


def test_any_picture_is_predicted_and_a_pattern_names_many(run, images, tmp_path, capsys):
    Image.new("RGBA", (300, 70), "red").save(tmp_path / "c.webp")
    assert main_lib.main(["--mode=predict", f"--workdir={run}/export", f"{tmp_path}/*.*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / name) for name in ("a.png", "b.bmp", "c.webp")]


# what is asked for, in a folder with a text and a copy of the export; the line
WRONG = {
    "nothing": ([], "predict needs images: --workdir DIR IMAGE..."),
    "a missing file": (["{place}/x.png"], "there is no image {place}/x.png"),
    "a folder": (["{place}"], "there is no image in {place}. Supported are .bmp, .gif,"),
    "a text": (["{place}/a.txt"], "{place}/a.txt is broken or not in a supported image format: not an image (5 bytes)"),
    "no run": (["--workdir={place}/nothing", "{place}/a.txt"], "there is no checkpoint of a run in {place}/nothing"),
    "a config": (["--config.seed=1", "{place}/a.txt"], "holds an exported student, which no config changes"),
    "another flag": (["--top=3", "{place}/a.txt"], "there is no flag '--top=3'"),
    "processes": (
        ["--distributed", "{place}/a.txt"],
        "--distributed is a flag of train, eval, export",
    ),
    "a torn program": (
        ["--workdir={place}/torn", "{place}/a.txt"],
        "student.stablehlo has changed since it was exported: its SHA-256 is not",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_predicted_is_said_in_one_line(case, run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello")
    shutil.copytree(run / "export", tmp_path / "torn")
    (tmp_path / "torn/student.stablehlo").write_bytes((run / "export/student.stablehlo").read_bytes()[:999])
    flags, expected = WRONG[case]
    flags = [flag.format(place=tmp_path) for flag in flags]
    assert main_lib.main(["--mode=predict", f"--workdir={run}/export", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected.format(place=tmp_path) in line
