"""Files of a run: links, lines that are missing, checkpoints under another name, teachers that are shared."""

import json
import shutil
import threading

import numpy as np
import pytest
import tensorstore
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints, _compared
from ldrld_jax.errors import UserError
from ldrld_jax.files import locked, replace_text
from ldrld_jax.interop.host_teacher import LogitsFile
from ldrld_jax.interop.torch_files import write_safetensors
from ldrld_jax.record.console import TABLE_NAMES, TABLE_NUMBERS
from ldrld_jax.record.reader import read_metrics
from ldrld_jax.sweep.plan import plan
from ldrld_jax.train import loop, trainer
from ldrld_jax.train.folder import RunFolder
from ldrld_jax.train.plan import Run


def test_nothing_is_written_through_a_link(tiny, tmp_path):
    """Starts in somebody else's run, where names that a run writes are links to a file of ours."""
    ours = tmp_path / "ours"
    ours.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("summary.json", "data.json", "config.json.tmp", "metrics.jsonl.tmp", ".lock"):
        (run / name).symlink_to(ours)
    with pytest.raises((UserError, OSError)):
        trainer.train(tiny("epochs=1"), run)
    for name in ("summary.json", "data.json", ".lock"):
        (run / name).unlink()
    trainer.train(tiny("epochs=1"), run)
    assert ours.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(ours)
    replace_text(epath.Path(link), "new")
    assert (ours.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)


def test_lines_that_are_missing_at_a_resume_are_said(tiny, tmp_path, capsys):
    trainer.train(tiny("epochs=2", "optim.schedule=constant"), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "summary.json").unlink()
    trainer.train(tiny("epochs=3", "optim.schedule=constant"), tmp_path)
    assert f"lacks {len(lines) - 2} of the {len(lines)} lines that had been written, after step 2" in (
        capsys.readouterr().out
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 7, 8, 9, 9]


def test_a_checkpoint_under_another_steps_name_is_not_taken_for_it(tiny, tmp_path, caplog):
    trainer.train(tiny("optim.schedule=constant"), tmp_path)
    (tmp_path / "checkpoints/6").rename(tmp_path / "checkpoints/5")
    trainer.train(tiny("epochs=3", "optim.schedule=constant"), tmp_path)
    assert "checkpoint" in caplog.text and "it was saved at step 6: its folder has another name" in caplog.text
    assert (tmp_path / "checkpoints/5.corrupt").is_dir()


def test_metrics_that_cannot_be_read_are_said_on_the_screen_of_a_sweep(tmp_path):
    (job,) = plan({"config": "configs/digits.py", "runs": [{"method": "ce"}]}, epath.Path(tmp_path))
    job.state = "running"
    (job.workdir / "metrics.jsonl").mkdir(parents=True)
    assert "Is a directory" in job.line()


def test_a_summary_that_lacks_what_the_table_shows_is_one_line(tiny, tmp_path):
    summary = trainer.train(tiny("epochs=1"), tmp_path)
    shown = {*TABLE_NUMBERS, *TABLE_NAMES}
    assert shown <= set(summary)
    for name in ("best_top1", "last_epoch", "student"):
        (tmp_path / "summary.json").write_text(json.dumps({key: summary[key] for key in summary if key != name}))
        with pytest.raises(UserError, match=rf"summary\.json (has no number|lacks) {name}\. "):
            trainer.train(tiny("epochs=1"), tmp_path)


def test_a_run_that_shares_a_teacher_waits_for_the_one_that_trains_it(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "_POLL_SECONDS", 0.01)
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=1", f"teacher.workdir={tmp_path / 'teacher'}"]
    (tmp_path / "teacher").mkdir()
    held, free = threading.Event(), threading.Event()

    def hold():
        with locked(epath.Path(tmp_path / "teacher")):
            held.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    threading.Timer(3.0, free.set).start()
    trainer.train(tiny(*flags, "epochs=1"), tmp_path / "student")
    thread.join()
    assert f"another run trains the teacher in {tmp_path / 'teacher'}: waiting for it" in capsys.readouterr().out
    assert (tmp_path / "teacher/summary.json").exists()


def test_a_teacher_that_has_moved_is_the_same_and_one_with_other_weights_is_not(tiny, tmp_path):
    """The content of a teacher counts, not its path."""

    def folder(teacher):
        config = tiny("method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={teacher}")
        return RunFolder(Run.plan(config_lib.resolve(config), epath.Path(tmp_path / "run")))

    checkpoints = Checkpoints(tmp_path / "t/checkpoints", run={})
    checkpoints.save(1, {"model": {"w": np.zeros(3, np.float32)}}, {}, 50.0)
    checkpoints.close()
    (tmp_path / "run").mkdir()
    folder(tmp_path / "t").write()
    folder(f"{tmp_path / 't'}/").check()
    (tmp_path / "t").rename(tmp_path / "moved")
    folder(tmp_path / "moved").check()
    folder(tmp_path / "t").check()  # a run that has ended needs no teacher any more
    for old, new in (("a.safetensors", "b.safetensors"), ("b.safetensors", "c,d")):
        write_safetensors(tmp_path / old, {"w": np.zeros(3, np.float32)})
        folder(tmp_path / old).write()
        (tmp_path / old).rename(tmp_path / new)
        folder(tmp_path / new).check()
    with pytest.raises(UserError, match=r"teacher\.checkpoint \(.* there, .* here\)"):
        folder(tmp_path / "moved").check()
    write_safetensors(tmp_path / "b.safetensors", {"w": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"teacher\.checkpoint of the run .* not those that it began with"):
        folder(tmp_path / "b.safetensors").check()


def test_logits_in_a_zarr_folder_are_those_that_a_run_began_with(tiny, tmp_path):
    path = tmp_path / "logits.zarr"
    config = tiny("method=kd", "teacher.model=logits", f"teacher.checkpoint={path}")

    def folder() -> RunFolder:
        """Returns the folder as a start of the run sees it."""
        return RunFolder(Run.plan(config_lib.resolve(config), epath.Path(tmp_path / "run")))

    def write(logits: np.ndarray) -> None:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        array = tensorstore.open(spec, create=True, delete_existing=True, dtype="float32", shape=logits.shape).result()
        array.write(logits).result()

    logits = np.random.default_rng(0).normal(size=(90, 10)).astype(np.float32)
    write(logits)
    (tmp_path / "run").mkdir()
    folder().write()
    folder().check()
    write(-logits)
    with pytest.raises(UserError, match=r"teacher\.checkpoint of the run .* not those that it began with"):
        folder().check()


def test_a_file_of_logits_that_does_not_fit_is_shown_as_it_is(tmp_path):
    for array, line in (
        (
            np.zeros((6, 3), np.int32),
            r"holds int32 \[6, 3\], and logits are floating-point numbers\. Save them as float32",
        ),
        (
            np.zeros((5, 3), np.float32),
            r"holds float32 \[5, 3\], and the training images need logits \[6, 3\] or \[views",
        ),
    ):
        np.save(tmp_path / "z.npy", array)
        with pytest.raises(UserError, match=line):
            LogitsFile.open(str(tmp_path / "z.npy"), images=6, classes=3)


def test_a_checkpoint_of_before_a_teacher_moved_is_of_the_run_beside_it():
    run = {"method": "kd", "epochs": 3, "teacher.checkpoint": "a", "student.checkpoint": "b"}
    assert _compared(run) == _compared({**run, "epochs": 4, "teacher.checkpoint": "c"}) == {"method": "kd"}


@pytest.mark.parametrize("at", ["_save", "_rate"])
def test_a_workdir_that_is_deleted_while_the_run_goes_on_is_one_error(tiny, tmp_path, monkeypatch, caplog, at):
    whole = getattr(loop._Pause, at)

    def deleted(pause, *arguments):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return whole(pause, *arguments)

    monkeypatch.setattr(loop._Pause, at, deleted)
    with pytest.raises(OSError, match="No such file or directory") as error:
        trainer.train(tiny("epochs=1"), tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)
    assert not caplog.records
