"""A run is a run on its data: other data are refused by name."""

import os
import pathlib

import pytest
from PIL import Image

from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import fingerprint
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError
from ldrld_jax.train import trainer
from tests.conftest import comparable_lines


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


CHANGES = {
    "renamed": (rename, "class 0 is 'bird' there and 'cat' here"),
    "grown": (add, "the train data of the run in .* have changed: 24 images there, 29 here"),
    "shrunk": (lambda folder: (folder / "val/dog/1.png").unlink(), "the eval data .* 9 images there, 8 here"),
    "swapped": (swap, "the train data .* another list of images"),
    "replaced": (another_of_the_same_name, "the eval data .* another list of images"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("epochs", [2, 3], ids=["finished", "longer"])
def test_a_run_whose_data_have_changed_is_refused_by_name(on_folder, folder, tmp_path, change, epochs):
    trainer.train(on_folder("optim.schedule=constant"), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    do, expected = CHANGES[change]
    do(folder)
    with pytest.raises(UserError, match=expected):
        trainer.train(on_folder("optim.schedule=constant", f"epochs={epochs}"), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_the_same_data_elsewhere_are_the_same(on_folder, folder, tmp_path):
    trainer.train(on_folder("epochs=1", "optim.schedule=constant"), tmp_path / "run")
    moved = folder.rename(tmp_path / "moved")
    trainer.train(on_folder("optim.schedule=constant", f"data.data_dir={moved}"), tmp_path / "run")
    trainer.train(on_folder("optim.schedule=constant", f"data.data_dir={moved}"), tmp_path / "straight")
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "straight")


@pytest.mark.parametrize("mode", ["eval", "export", "predict"])
def test_a_class_that_was_renamed_is_no_label_of_a_run_from_before(on_folder, folder, tmp_path, mode, capsys):
    trainer.train(on_folder("epochs=1"), tmp_path / "run")
    rename(folder)
    images = [str(folder / "val/cat/0.png")] if mode == "predict" else []
    assert main_lib.main(["--mode", mode, "--workdir", str(tmp_path / "run"), *images]) == 2
    assert "told other classes apart: class 0 is 'bird' there and 'cat' here" in capsys.readouterr().err


def test_a_teacher_of_other_classes_is_refused_and_a_run_without_a_note_says_so(on_folder, folder, tmp_path, capsys):
    trainer.train(on_folder("epochs=1"), tmp_path / "teacher")
    rename(folder)
    flags = ["method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={tmp_path / 'teacher'}"]
    with pytest.raises(UserError, match=r"the teacher in .* told other classes apart: class 0"):
        trainer.train(on_folder(*flags), tmp_path / "student")
    (tmp_path / "teacher/data.json").unlink()
    trainer.train(on_folder(*flags, "epochs=1"), tmp_path / "student")
    (tmp_path / "student/data.json").unlink()
    trainer.train(on_folder(*flags, "epochs=1"), tmp_path / "student")
    assert "student has no data.json: whether its data are those of the start cannot be told" in capsys.readouterr().out


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
