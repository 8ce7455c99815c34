"""A run is a run on its data: other data are refused by name."""

import os
import pathlib
import shutil
import time

import chex
import pytest
from PIL import Image

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import fingerprint
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError
from ldrld_jax.models import MODELS
from ldrld_jax.train import trainer
from ldrld_jax.train.given import Callback, Given
from tests.conftest import comparable_lines, tiny_overrides
from tests.faults.conftest import make_folder
from tests.tiny_net import TinyNet
from tests.train.trainer_test import saved


def swap(folder: pathlib.Path) -> None:
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "x")
        (folder / split / "dog").rename(folder / split / "cat")
        (folder / split / "x").rename(folder / split / "dog")


def rename(folder: pathlib.Path) -> None:
    for split in ("train", "val"):
        (folder / split / "bird").rename(folder / split / "zbird")


def add(folder: pathlib.Path) -> None:
    for i in range(5):
        Image.new("RGB", (9, 9)).save(folder / "train" / "cat" / f"new{i}.png")


def another_of_the_same_name(folder: pathlib.Path) -> None:
    Image.new("RGB", (40, 40), "red").save(folder / "val" / "dog" / "0.png")


def touch(place: pathlib.Path) -> None:
    """Changes what no image depends on: times of modification, a file that is no image, a hidden one."""
    for image in (place / "images").rglob("*.png"):
        os.utime(image, (1, 1))
    (place / "images/train/cat/notes.txt").write_text("no image")
    (place / "images/val/.hidden.png").write_bytes(b"")


def retrain(place: pathlib.Path) -> None:
    """Puts a teacher with other weights where the run's teacher lay."""
    shutil.rmtree(place / "teacher")
    (place / "another").rename(place / "teacher")


# To do in the folder of the images, the teacher and the run; and the error, or the keys to pass to go on as if nothing
# had been.
CHANGES = {
    "nothing": (lambda place: None, {}),
    "touched": (touch, {}),
    "images moved": (lambda place: (place / "images").rename(place / "m"), {"data.data_dir": "m"}),
    "teacher moved": (lambda place: (place / "teacher").rename(place / "m"), {"teacher.checkpoint": "m"}),
    "another teacher": (retrain, r"teacher\.checkpoint"),
    "renamed": (lambda place: rename(place / "images"), "class 0 is 'bird' there and 'cat' here"),
    "grown": (lambda place: add(place / "images"), "the train data of the run in .* changed: 24 images there, 29 here"),
    "shrunk": (lambda place: (place / "images/val/dog/1.png").unlink(), "the eval data .* 9 images there, 8 here"),
    "swapped": (lambda place: swap(place / "images"), "the train data .* another list of images"),
    "replaced": (
        lambda place: another_of_the_same_name(place / "images"),
        "the eval data .* another list of images",
    ),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> pathlib.Path:
    """A folder with `images`, `teacher`, `another` teacher, a `finished` run of five epochs and a `killed` one.

    The killed one is a copy of its files after a save in the third epoch: what kill -9 leaves.
    """
    place = tmp_path_factory.mktemp("begun")
    make_folder(place / "images")

    def copy(step: int, weights: object) -> None:
        if step == 8:
            while not (place / "finished/checkpoints/8").is_dir():  # it is being written
                time.sleep(0.01)
            shutil.copytree(place / "finished", place / "killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        for seed, name in enumerate(("teacher", "another")):
            trainer.train(five_epochs(place, method="ce", epochs=1, seed=seed), place / name)
        trainer.train(five_epochs(place), place / "finished", given=Given(callbacks=[Callback(after_save=copy)]))
    return place


def files_of(run: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def five_epochs(place: pathlib.Path, **keys):
    teacher = {"method": "kd", "teacher.model": "tiny_net", "teacher.checkpoint": place / "teacher"}
    kept = {
        "epochs": 5,
        "optim.schedule": "constant",
        "checkpoint.every_steps": 4,
        "checkpoint.min_seconds": 0.0,
        **({} if keys.get("method") == "ce" else teacher),
        **keys,
    }
    given = {"student.model": "tiny_net", "data.crop_size": 8, "batch_size": 8, "mesh.data": 1, **kept}
    folder = {"data.name": "image_folder", "data.train_split": "train", "data.eval_split": "val"}
    settings = {"data.data_dir": place / "images", **folder, **given}
    flags = [flag for flag in tiny_overrides("") if flag.partition("=")[0] not in settings]
    return config_lib.load("configs/digits.py", [*flags, *(f"{key}={value}" for key, value in settings.items())])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ["finished", "killed"])
def test_a_run_goes_on_bit_for_bit_or_is_refused_by_the_name_of_what_changed(begun, tiny, tmp_path, state, change):
    del tiny  # has TinyNet in MODELS
    place, (do, expected) = tmp_path / "here", CHANGES[change]
    shutil.copytree(begun, place)
    run, before = place / state, files_of(begun / state)
    do(place)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            trainer.train(five_epochs(place), run)
        assert files_of(run) == before
        return
    trainer.train(five_epochs(place, **{key: place / value for key, value in expected.items()}), run)
    assert comparable_lines(run) == comparable_lines(begun / "finished")
    chex.assert_trees_all_equal(saved(run, 15), saved(begun / "finished", 15))


def test_a_run_grows_longer_on_its_own_data_alone(begun, tiny, tmp_path):
    del tiny
    shutil.copytree(begun, tmp_path / "here")
    add(tmp_path / "here/images")
    with pytest.raises(UserError, match="24 images there, 29 here"):
        trainer.train(five_epochs(tmp_path / "here", epochs=6), tmp_path / "here/finished")


@pytest.mark.parametrize("mode", ["eval", "export", "predict"])
def test_a_class_that_was_renamed_is_no_label_of_a_run_from_before(on_folder, folder, tmp_path, mode, capsys):
    trainer.train(on_folder("epochs=1"), tmp_path / "run")
    rename(folder)
    images = [str(folder / "val/cat/0.png")] if mode == "predict" else []
    assert main_lib.main(["--mode", mode, "--workdir", str(tmp_path / "run"), *images]) == 2
    assert "was trained on other classes: class 0 is 'bird' there and 'cat' here" in capsys.readouterr().err


def test_a_teacher_of_other_classes_is_refused_and_a_run_without_a_note_says_so(on_folder, folder, tmp_path, capsys):
    trainer.train(on_folder("epochs=1"), tmp_path / "teacher")
    rename(folder)
    flags = ["method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={tmp_path / 'teacher'}"]
    with pytest.raises(UserError, match=r"the teacher in .* was trained on other classes: class 0"):
        trainer.train(on_folder(*flags), tmp_path / "student")
    (tmp_path / "teacher/data.json").unlink()
    trainer.train(on_folder(*flags, "epochs=1"), tmp_path / "student")
    (tmp_path / "student/data.json").unlink()
    trainer.train(on_folder(*flags, "epochs=1"), tmp_path / "student")
    assert "student has no data.json: it cannot be checked whether the data have changed." in capsys.readouterr().out


def test_a_fingerprint_depends_on_names_labels_and_sizes_alone(folder, tmp_path, data_dir):
    source = open_source("image_folder", "train", str(folder))
    first = fingerprint(source)
    assert first["images"] == 24
    folder = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(open_source("image_folder", "train", str(folder))) == first
    os.utime(folder / "train/cat/0.png")
    assert fingerprint(open_source("image_folder", "train", str(folder))) == first
    (folder / "train/cat/0.png").rename(folder / "train/cat/99.png")
    assert fingerprint(open_source("image_folder", "train", str(folder))) != first
    digits = [fingerprint(open_source("digits", split, data_dir)) for split in ("train", "train[:90]", "test")]
    assert [d["images"] for d in digits] == [1438, 90, 359]
    assert len({d["digest"] for d in digits}) == 3


def test_the_parts_of_a_folder_have_the_names_that_the_keys_give(folder):
    for old, new in (("train", "training"), ("val", "testing")):
        (folder / old).rename(folder / new)
    (folder / "testing/dog").rename(folder / "dog")  # the training images name the classes, whatever else is there
    asked = dict(data_dir=str(folder), train_split="training")
    assert open_source("image_folder", "training", **asked).class_names == ("bird", "cat", "dog")
    testing = open_source("image_folder", "testing", **asked)
    assert (testing.class_names, len(testing)) == (("bird", "cat", "dog"), 6)


def test_a_folder_of_classes_alone_is_trained_on_and_evaluated_on_what_is_held_out(folder, tiny):
    data = tiny("data.name=image_folder", f"data.data_dir={folder / 'train'}", "data.crop_size=8").data
    data.train_split, data.held_out = "train", 0.25
    batches, held_out = make_train_batches(data, batch_size=6, seed=0), make_eval_source(data)
    assert (len(batches.source), len(held_out)) == (18, 6)
    data.held_out, data.eval_split = 0.0, "val"
    with pytest.raises(UserError, match=r"holds the classes themselves, and no folder val .* Set data\.held_out=\.1"):
        make_eval_source(data)


@pytest.mark.parametrize(
    ("split", "there", "expected"),
    [("train", "training", "training, val"), ("val", "test", "test, train")],
)
def test_a_missing_part_is_one_line_with_the_folders_that_are_there_and_the_keys(folder, split, there, expected):
    (folder / split).rename(folder / there)
    with pytest.raises(UserError, match=rf"data\.train_split and data\.eval_split to .* in it: {expected}\."):
        open_source("image_folder", split, str(folder))
