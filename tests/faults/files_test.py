"""Files of a run: links, lines that are missing, checkpoints under another name, teachers that are shared."""

import pathlib
import shutil
import threading

import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.files import locked, replace_text
from ldrld_jax.interop.torch_import import save_torch_checkpoint
from ldrld_jax.record.reader import read_metrics
from ldrld_jax.train import trainer
from ldrld_jax.train.plan import Run


def test_nothing_is_written_through_a_link(tiny, tmp_path):
    """In a run's folder from elsewhere, names that a run writes are links to a file of ours."""
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


@pytest.mark.parametrize("place", ["slash", "moved", "file"])
def test_a_teacher_that_has_moved_is_the_same_and_one_with_other_weights_is_not(tiny, tmp_path, place):
    """The content of a teacher counts, not its path; a run's own checkpoints keep the path of their time."""
    trainer.train(tiny("epochs=1"), tmp_path / "t")
    kd = ["method=kd", "teacher.model=tiny_net", "optim.schedule=constant"]
    old = new = f"{tmp_path / 't'}"
    if place == "file":
        old, new = f"{tmp_path / 'a.safetensors'}", f"{tmp_path / 'b.safetensors'}"
        network = Run.plan(config_lib.resolve(tiny()), tmp_path / "x").networks
        save_torch_checkpoint(old, *network.restore(str(tmp_path / "t"), "tiny_net", tiny().data)[1])
    trainer.train(tiny(*kd, f"teacher.checkpoint={old}", "epochs=1"), tmp_path / "run")
    if place == "slash":
        new += "/"
    else:
        new = f"{tmp_path / 'moved.safetensors'}"
        pathlib.Path(old).rename(new)
    config = tiny(*kd, f"teacher.checkpoint={new}", "epochs=2")
    assert trainer.train(config, tmp_path / "run")["steps"] == 6
    assert trainer.evaluate(config, tmp_path / "run")["top1"] >= 0
    trainer.train(tiny("epochs=1", "seed=1"), tmp_path / "other")
    with pytest.raises(UserError, match=r"teacher\.checkpoint .*there.* here"):
        trainer.train(tiny(*kd, f"teacher.checkpoint={tmp_path / 'other'}", "epochs=2"), tmp_path / "run")
    if place == "slash":
        shutil.rmtree(tmp_path / "t")
        (tmp_path / "other").rename(tmp_path / "t")
        with pytest.raises(UserError, match="the weights there are not those that it began with"):
            trainer.train(config, tmp_path / "run")
