"""A run is checked before it trains: everything that would stop it is named at once, and nothing is written."""

import re
import shutil

import numpy as np
import pytest

from ldrld_jax import main as main_lib
from ldrld_jax.data.folders import FolderRecords
from ldrld_jax.errors import UserError
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.train import check as check_lib
from ldrld_jax.train import trainer
from ldrld_jax.train.check import check
from tests.conftest import tiny_overrides
from tests.faults.conftest import make_folder


def test_a_run_that_can_start_has_no_problem_and_leaves_no_file(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_lib, "_TIMED_SECONDS", 0.0)
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=1", "checkpoint.keep_last=3"]
    assert check(tiny(*flags), tmp_path / "run") == []
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert said.count("images    training: 90 of 90 decoded; ") == 1  # the teacher's are the same
    assert "images    evaluation: 50 of 50 decoded; " in said
    assert "teacher tiny_net is not trained yet: random weights stand in for its own" in said
    assert re.search(r"time      .* for the teacher: 3 steps of .* ms, 1 evaluation of .* s", said)
    assert re.search(r"time      .* for the student: 6 steps of .* ms, 2 evaluations of .* s", said)
    assert re.search(r"^in all    \d+ s$", said, re.MULTILINE)
    # 16 * 9 + 2 * 16 weights and statistics, 170 of the head; beside the weights their momentum and the step.
    parameters, statistics = 16 * 9 + 2 * 16 + 16 * 10 + 10, 2 * 16
    size = 4 * (2 * parameters + statistics)
    assert f"disk      up to {4 * size / 1000:.1f} kB: 4 checkpoints of {size / 1000:.1f} kB; " in said


def test_a_sample_is_looked_at_and_its_time_is_that_of_the_whole(tiny, tmp_path, capsys):
    assert check(tiny("check.images=7", "epochs=1"), tmp_path / "run") == []
    said = capsys.readouterr().out
    assert "training: 7 of 90 decoded; " in said
    assert "evaluation: 7 of 50 decoded; " in said
    assert "have no image" not in said  # seven of ten classes at most, which says nothing


@pytest.fixture
def faulty(tmp_path):
    """A folder with two broken images to train on, one to evaluate on, and a class that is not evaluated."""
    root = make_folder(tmp_path / "images")
    for broken in ("train/cat/1.png", "train/dog/3.png", "val/bird/0.png"):
        (root / broken).write_bytes(b"no image")
    for image in (root / "val/dog").iterdir():
        image.unlink()
    return root


def test_all_problems_are_found_at_once(tiny, faulty, tmp_path, capsys):
    trainer.train(tiny("epochs=1"), tmp_path / "run")  # of other data
    before = sorted(tmp_path.rglob("*"))
    folder = ["data.name=image_folder", f"data.data_dir={faulty}", "data.train_split=train", "data.eval_split=val"]
    missing = tmp_path / "net.pth"
    flags = [*folder, "data.crop_size=8", "method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={missing}"]
    problems = check(tiny(*flags), tmp_path / "run")
    expected = [
        r"holds a run of another config: .*data\.name",
        r"train/cat/1\.png is broken: ",
        r"train/dog/3\.png is broken: ",
        r"val/bird/0\.png is broken: ",
        rf"{missing}",
    ]
    assert len(problems) == len(expected)
    for problem, pattern in zip(problems, expected, strict=True):
        assert re.search(pattern, problem)
        assert "\n" not in problem
    assert "warning: 1 of 3 classes have no image to evaluate on: dog." in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_beside_what_the_plan_stops_at_each_part_is_looked_at(tiny, tmp_path):
    flags = ["data.name=image_folder", f"data.data_dir={tmp_path}", "data.eval_split=val", "mesh.data=9"]
    problems = check(tiny(*flags, "method=ldrld", "teacher.model=resnet8", "teacher.checkpoint=t"), tmp_path / "run")
    assert [bool(re.search(pattern, problem)) for pattern, problem in zip(
        (r"mesh\.data", r"there is no folder", r"there is no folder .*val"), problems, strict=True
    )] == [True] * 3  # fmt: skip
    wrong = ["student.model=resnet9", "teacher.model=resnet8x5", "teacher.checkpoint=t", "method=kd"]
    first, second = check(tiny(*wrong), tmp_path / "run")
    assert first.startswith("there is no model 'resnet9'")
    assert second.startswith("there is no model 'resnet8x5'")


HOST = HostTeacher(lambda images: np.zeros((len(images), 10), np.float32), name="host")


def test_a_teacher_on_the_host_is_no_model_whatever_else_is_wrong(tiny, tmp_path):
    config = tiny("method=kd", f"teacher.model={__name__}:HOST", "data.mixup=.2", "optim.name=nosuch")
    mixup, optimizer = check(config, tmp_path / "run")
    assert mixup.startswith("the teacher host runs on the host, and data.mixup blends")
    assert optimizer.startswith("there is no optim.name 'nosuch'")


@pytest.mark.parametrize(("on_error", "count"), [("raise", 12), ("skip", 12), ("skip", 1)])
def test_more_broken_images_than_may_be_skipped_are_a_problem(tiny, tmp_path, on_error, count, capsys):
    root = make_folder(tmp_path / "images", train=20)
    for i in range(count):
        (root / f"train/cat/{i}.png").write_bytes(b"no image")
    folder = ["data.name=image_folder", f"data.data_dir={root}", "data.train_split=train", "data.eval_split=val"]
    problems = check(tiny(*folder, "data.crop_size=8", f"data.on_error={on_error}", "epochs=1"), tmp_path / "run")
    if on_error == "skip" and count == 1:
        assert problems == []
        return
    assert len([p for p in problems if re.search(r"cat/\d+\.png is broken: ", p)]) == 10
    assert f"{count - 10} more training images are broken." in problems
    assert f"60 of 60 decoded; 8 to 20 of each of 3 classes; {count} broken" in capsys.readouterr().out


def test_a_step_that_is_not_finite_and_a_weak_teacher_are_problems(make, tmp_path):
    images = np.full((90, 8, 8, 1), 3e38, np.float32)
    evaluation = np.zeros((50, 8, 8, 1), np.float32), np.arange(50) % 10
    trainer = make(train=(images, np.arange(90) % 10), evaluation=evaluation)
    assert any("not finite at step 1" in problem for problem in trainer.check())
    weak = make(config={"teacher.min_top1": 99.0}).check()
    assert any("has top-1" in problem and "teacher.min_top1 demands 99.00 %" in problem for problem in weak)
    assert not list(tmp_path.iterdir())


def test_each_folder_that_cannot_be_made_is_a_problem(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=1", "epochs=1", "data.flip=False"]
    problems = check(
        tiny(*flags, f"teacher.workdir={tmp_path}/file/t", f"logits.dir={tmp_path}/file/l"), tmp_path / "file/w"
    )
    line = f"{tmp_path}/file is a file. Choose another"
    assert problems == [f"{line} workdir.", f"{line} logits.dir."]  # the teacher's place is the same one


def test_a_place_to_write_is_looked_for_as_far_as_something_is_to_be_written(make, tmp_path, monkeypatch):
    """A finished run, and a store of all epochs, may be read from where nothing can be written."""
    trainer = make(config={"logits.dir": str(tmp_path / "logits")})
    monkeypatch.setattr("ldrld_jax.files.os.access", lambda path, mode: not path.is_relative_to(tmp_path))
    refused = "is not writable. Choose another"
    assert [p.partition(f" {refused} ")[::2] for p in trainer.check()] == [
        (str(tmp_path), "workdir, or change its permissions."),
        (str(tmp_path), "logits.dir, or change its permissions."),
    ]
    monkeypatch.undo()
    trainer.fit()
    monkeypatch.setattr("ldrld_jax.files.os.access", lambda path, mode: False)
    assert trainer.check() == []


def test_a_store_that_the_disk_has_no_room_for_is_a_problem(make, tmp_path, monkeypatch):
    monkeypatch.setattr("ldrld_jax.logit_store.store.free_bytes", lambda path: 100)
    monkeypatch.setattr(check_lib, "free_bytes", lambda path: 100)
    store, place = make(config={"logits.dir": str(tmp_path / "logits")}).check()
    assert "the logit store" in store
    assert "3.6 kB more, and 100.0 bytes are free" in store
    assert "and 100.0 bytes are free. Choose a workdir on a larger disk" in place
    assert not list(tmp_path.iterdir())


def test_a_file_of_several_views_is_no_problem(make, tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 90, 10), np.float32))
    trainer = make(teacher=str(tmp_path / "two.npy"), config={"logits.views": 2, "data.flip": True})
    assert trainer.check() == []


def test_the_command_line_ends_with_1_after_all_problems_and_with_0_without(tiny, data_dir, tmp_path, capsys):
    del tiny  # has tiny_net in MODELS
    flags = [f"--config.{flag}" for flag in tiny_overrides(data_dir)]
    common = ["--mode", "check", "--workdir", str(tmp_path / "run"), "--config.check.images=20", "--config.epochs=1"]
    assert main_lib.main([*common, *flags, "--config.student.model=tiny_net"]) == 0
    assert capsys.readouterr().out.endswith("this run can start.\n")
    assert main_lib.main([*common, *flags, "--config.student.model=resnet9"]) == 1
    said = capsys.readouterr()
    assert "problem: there is no model 'resnet9'." in said.out
    assert said.err == "ldrld_jax: 1 problem would stop this run, see above.\n"
    assert main_lib.main([*common, "--distributed"]) == 2


def test_a_broken_image_is_found_wherever_it_lies(tiny, tmp_path):
    """A run looks at 64 images when it starts; here are more."""
    root = make_folder(tmp_path / "images", train=60)
    (root / "train/cat/31.png").write_bytes(b"")
    folder = ["data.name=image_folder", f"data.data_dir={root}", "data.train_split=train", "data.eval_split=val"]
    (problem,) = check(tiny(*folder, "data.crop_size=8", "epochs=1"), tmp_path / "run")
    assert "train/cat/31.png" in problem


def test_an_error_of_a_dataset_object_is_skipped_or_raised_as_a_run_does(make, capsys):
    class Faulty:
        num_classes = 10

        def __init__(self, faults):
            self.faults = faults

        def __len__(self):
            return 20

        def __getitem__(self, i):
            if i >= 20 - self.faults:
                raise KeyError("no such key")
            return np.full((8, 8, 1), i, np.uint8), i % 10

    skip = {"data.on_error": "skip", "data.max_skipped": 0.5}
    assert not make(train=Faulty(1), evaluation=Faulty(0), config=skip).check()
    assert "1 broken" in capsys.readouterr().out
    problems = make(train=Faulty(12), evaluation=Faulty(0), config=skip).check()
    assert "training data[13] is broken: KeyError: 'no such key'." in problems
    assert "2 more training images are broken." in problems
    with pytest.raises(KeyError, match="no such key"):
        make(train=Faulty(1), evaluation=Faulty(0)).check()


@pytest.fixture
def listed(tmp_path):
    """Flags of lists of the images of a folder, two of which are missing."""
    root = make_folder(tmp_path / "images", train=20)
    for split in ("train", "val"):
        rows = [f"{image.relative_to(root)},{image.parent.name}\n" for image in sorted(root.glob(f"{split}/*/*.png"))]
        (root / f"{split}.csv").write_text("".join(["path,label\n", *rows]))
    for missing in ("train/cat/3.png", "train/dog/5.png"):
        (root / missing).unlink()
    lists = ["data.name=file_list", f"data.data_dir={root}", "data.train_split=train", "data.eval_split=val"]
    return root, [*lists, "data.crop_size=8", "epochs=1"]


def test_each_missing_image_of_a_list_is_a_problem_and_may_be_skipped(tiny, listed, tmp_path, capsys):
    root, flags = listed
    why = "is broken: it cannot be read (No such file or directory). Repair or remove it, or set data.on_error=skip."
    problems = check(tiny(*flags), tmp_path / "run")
    assert problems == [f"{root}/train/cat/3.png {why}", f"{root}/train/dog/5.png {why}"]
    assert "60 of 60 decoded; 19 to 20 of each of 3 classes; 2 broken" in capsys.readouterr().out
    assert check(tiny(*flags, "data.on_error=skip"), tmp_path / "run") == []


def test_what_the_system_says_of_the_data_is_a_problem_and_the_check_goes_on(tiny, listed, tmp_path, monkeypatch):
    """Raises as a disk that fails does, or a dataset object that opens a file that is not there."""
    _, flags = listed
    read = FolderRecords.__getitems__

    def failing(records, indices):
        if any("cat/7" in records.paths[i] for i in indices):
            raise OSError(5, "Input/output error")
        return read(records, indices)

    def listing(records):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(FolderRecords, "__getitems__", failing)
    monkeypatch.setattr(FolderRecords, "listing", listing)
    problems = check(tiny(*flags, "data.on_error=skip"), tmp_path / "run")
    assert problems == ["[Errno 116] Stale file handle", "[Errno 5] Input/output error"]


def test_a_folder_that_is_missing_as_a_whole_is_a_single_problem(tiny, listed, tmp_path):
    root, flags = listed
    shutil.rmtree(root)
    assert check(tiny(*flags, "data.on_error=skip"), tmp_path / "run")[0].startswith(f"there is no {root}/train.csv or")


def test_a_config_that_contradicts_itself_is_an_error_of_its_own(tiny, tmp_path):
    with pytest.raises(UserError, match="there is no method"):
        check(tiny("method=ldrdl"), tmp_path / "run")
