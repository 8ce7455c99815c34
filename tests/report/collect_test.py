"""Runs are found and read, whatever else lies beside them."""

import json
import subprocess
import sys

import pytest

from ldrld_jax import report
from ldrld_jax.report.__main__ import main
from tests.conftest import ROOT
from tests.report.folders import config, line, summary, write


def names(notes):
    return [note.partition(": ")[0].rpartition("/")[2] for note in notes]


def test_finished_running_broken_and_foreign_folders_are_told_apart(tmp_path, capsys):
    write(tmp_path, "a", 95.0)
    write(tmp_path, "b", 97.0, seed=1)
    running = write(tmp_path, "running", seed=2)
    (running / "summary.json").unlink()
    (running / "metrics.jsonl").write_text(line("teacher_eval", 0, 99.0) + line("eval", 3, 90.5) + '{"step": 4, "ep')
    (write(tmp_path, "torn") / "summary.json").write_text('{"last_top1": 9')
    (write(tmp_path, "empty") / "summary.json").write_text("{}")
    (write(tmp_path, "binary") / "config.json").write_bytes(b"\xff\xfe\x00")
    (write(tmp_path, "other") / "config.json").write_text('{"architectures": ["Bert"]}')
    (write(tmp_path, "typed") / "config.json").write_text((tmp_path / "a/config.json").read_text().replace("0,", "{},"))
    (write(tmp_path, "none") / "config.json").unlink()
    (tmp_path / "foreign" / "deeper").mkdir(parents=True)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert [row.split(" | ")[3:6] for row in out.splitlines()[2:]] == [["2", "97.00", "96.00 ± 1.41"]]
    notes = err.splitlines()[:-1]
    assert names(notes) == ["foreign", "binary", "empty", "none", "other", "running", "running", "torn", "typed"]
    for part in ("foreign: no run here", "no number best_top1", "no config.json", "lacks data.name", "1 torn line"):
        assert part in err
    assert "epoch 3.0 of 4, best top-1 so far 90.50, last written" in err
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(note.partition(": ")[0] in page for note in notes)
    assert (tmp_path / "out" / "report.md").read_text() == out


def test_sweeps_are_searched_and_teachers_are_no_runs_of_the_table(tmp_path):
    run = write(tmp_path, "sweep/method=kd,seed=0")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    write(run, "teacher", 99.0, method="ce")  # a run's own
    shared = write(tmp_path, "sweep/teacher", 99.0, method="ce")
    (shared / "metrics.jsonl").write_text(line("teacher_train", 1, 50.0))
    write(tmp_path, "1/2/3/4")
    found = report.collect([tmp_path, run])
    assert [summary.folder for summary in found.summaries] == [str(run)]
    assert names(found.notes) == ["1"]  # deeper than is looked


def test_a_run_by_several_paths_is_one(tmp_path, monkeypatch):
    run = write(tmp_path, "runs/live")
    (tmp_path / "runs/latest").symlink_to("live")
    monkeypatch.chdir(tmp_path)
    found = report.collect(["runs", str(run), "runs/../runs/live"])
    assert [(summary.folder, summary.copy) for summary in found.summaries] == [("runs/live", 1)]
    assert found.notes == []
    assert report.collect("runs").summaries == report.collect(["runs"]).summaries != []  # not the folders r, u, n, s


def test_nothing_to_report_is_a_failure_and_so_is_nowhere_to_write(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert not (tmp_path / "nothing").exists()
    write(tmp_path, "a")
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "file")]) == 2
    assert "Set --out." in capsys.readouterr().err


def test_a_file_that_is_no_report_is_not_written_over(tmp_path, capsys):
    write(tmp_path, "a")
    for name in ("report.md", "report.html"):
        (tmp_path / name).write_text("my own notes")
        assert main([str(tmp_path)]) == 2
        assert (
            f"{tmp_path / name} was not written by this program, and stays as it is. Set --out."
            in capsys.readouterr().err
        )
        assert (tmp_path / name).read_text() == "my own notes"
        (tmp_path / name).unlink()
    assert main([str(tmp_path)]) == main([str(tmp_path)]) == 0  # it writes over its own


def test_a_run_that_goes_on_after_its_end_is_not_finished(tmp_path):
    run = write(tmp_path, "a", epochs=8)
    (run / "summary.json").write_text(json.dumps(summary(epochs=4)))
    found = report.collect([tmp_path])
    assert (found.summaries, [one.folder for one in found.running]) == ([], [str(run)])
    (run / "summary.json").write_text(json.dumps(summary(epochs=8)))
    assert [one.folder for one in report.collect([tmp_path]).summaries] == [str(run)]


def test_a_running_run_alone_has_a_page(tmp_path, capsys):
    (write(tmp_path, "a") / "summary.json").unlink()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert "a (not finished)" in (tmp_path / "report.html").read_text()


def test_a_page_that_is_watched_is_written_again_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt
        write(tmp_path, f"run{len(waits)}", 90.0 + len(waits), seed=len(waits))

    monkeypatch.setattr("time.sleep", sleep)
    assert main([str(tmp_path), "--watch", "5"]) == 0
    assert waits == [5.0, 5.0, 5.0]
    out, err = capsys.readouterr()
    assert out == ""
    first, *written = err.splitlines()
    assert "no run here" in first
    assert [line.rpartition("(")[2] for line in written] == [
        "1 finished, 0 not finished)",
        "2 finished, 0 not finished)",
    ]
    assert "91.50 ± 0.71" in (tmp_path / "report.html").read_text()
    for wrong in ("0", "nan", "soon"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--watch", wrong])


def test_the_table_and_the_page_say_when_runs_ended_and_how_long_they_took(tmp_path, capsys):
    times = {"train_seconds": 7200, "ended": "2026-11-20T10:00:00+00:00"}, {"train_seconds": 7800, "ended": "<b>"}, {}
    for seed, more in enumerate(times):
        path = write(tmp_path, f"a{seed}", seed=seed) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert main([str(tmp_path)]) == 0
    header, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(header, row, strict=True))
    assert (cells["time"], cells["ended"]) == ("2 h 05 min", "2026-11-20")
    page = (tmp_path / "report.html").read_text()
    assert "ended 2026-11-20 (UTC), 4 h 10 min of training in all" in page
    assert "3 runs finished, 0 not finished, 0 notes" in page
    assert "<b>" not in page


def test_collecting_and_the_table_load_no_big_library(tmp_path):
    write(tmp_path, "a")
    code = "import sys; from ldrld_jax import report; print(report.table(report.collect(sys.argv[1:]).summaries)); "
    code += "print([name for name in ('jax', 'numpy', 'flax', 'sklearn') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert out[-1] == "[]"
    assert len(out) == 4


def test_an_analysis_of_another_step_than_the_best_is_left_out_and_named(tmp_path, capsys):
    calibration = {"ece": 1.0, "examples": [1], "confidence": [0.5], "accuracy": [0.5]}
    found = {"version": 1, "features": True, "calibration": calibration, "embedding": None, "embedded": []}
    for step, name in ((40, "kd"), (30, "dkd")):
        run = write(tmp_path, name, method=name)
        summary = json.loads((run / "summary.json").read_text())
        epochs = json.loads((run / "config.json").read_text())["epochs"]
        summary |= {"best_epoch": epochs / 2, "steps": 80, "epochs": epochs}
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "analysis.json").write_text(json.dumps(found | {"step": step, "teacher": None}))
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    assert (
        "dkd</code> its analysis is of step 30, and its best checkpoint of step 40. Analyse again: --analyse." in page
    )
    assert "kd: ECE 1.00 %" in page and "dkd: ECE" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": None},
        {"calibration": {"ece": 1, "examples": [1, 2], "confidence": [0.5], "accuracy": [0.5]}},
        {"embedding": {"xy": [[0, "1"]], "silhouette": 0}, "embedded": ["a"]},
        {"teacher": 3},
        {"images_shown": {"uncertain": [[]]}},
        {"names": ["a"], "class_images": {"a": 1}, "class_top1": [1]},
        {"confusion": {"names": ["a"], "values": [["<b>"]]}},
    ],
)
def test_an_analysis_that_is_none_is_left_out_and_named(tmp_path, capsys, changes):
    calibration = {"ece": 1.0, "examples": [1], "confidence": [0.5], "accuracy": [0.5]}
    whole = {"version": 1, "step": 1, "features": True, "calibration": calibration, "embedding": None, "embedded": []}
    for name, more in (("good", {}), ("bad", changes)):
        run = write(tmp_path, name, method="ce" if name == "bad" else "kd")
        (run / "analysis.json").write_text(json.dumps(whole | {"teacher": None} | more))
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    assert "bad</code> its analysis.json cannot be drawn" in page
    assert "kd: ECE 1.00 %" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", '{"seed": "0"}'),
        ("config.json", json.dumps(config(teacher__model=["resnet20"]))),
        ("config.json", json.dumps(config(student__model={"a": 1}))),
        ("summary.json", '{"best_top1": NaN, "last_top1": "96", "examples_per_second": true}'),
        ("summary.json", "null"),
        ("summary.json", json.dumps(summary(last_top1=1e308, best_top1=-1e308))),
        ("metrics.jsonl", '[]\n"eval"\n{"epoch": "1"}\n{"epoch": 1, "split": "eval", "values": 3}\n' + "[" * 100_000),
    ],
)
def test_no_content_of_a_file_stops_the_report(tmp_path, capsys, file, content):
    write(tmp_path, "good")
    (write(tmp_path, "bad", seed=1) / file).write_text(content)
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert names(err.splitlines())[0] == "bad"


def test_objects_of_one_name_are_told_apart_by_what_is_in_them(tmp_path):
    objects = dict(data__name="<arrays>", teacher__model="<Net>")
    runs = {"a": ("1f", "ee", "a0"), "b": ("2f", "ee", "a0"), "c": ("1f", "e5", "a0"), "d": ("1f", "ee", "a0 b0")}
    for name, (train, evaluation, weights) in runs.items():
        note = {split: {"images": 90, "digest": 16 * two} for split, two in (("train", train), ("eval", evaluation))}
        note |= {
            "classes": ["x"],
            "form": {},
            "weights": {"teacher.model": " ".join(16 * two for two in weights.split())},
        }
        (write(tmp_path, name, **objects) / "data.json").write_text(json.dumps(note))
    write(tmp_path, "e", **objects)  # has no data.json
    write(tmp_path, "f", **objects)
    for name, content in (("torn", "{"), ("typed", json.dumps({**note, "weights": 3}))):
        (write(tmp_path, name, seed=7) / "data.json").write_text(content)
    found = report.collect([tmp_path])
    keys = "data.images", "data.eval_images", "teacher.weights"
    of_objects = [tuple(run.config.get(key) for key in keys) for run in found.summaries if run.seed == 0]
    assert of_objects == [
        *[("1f1f1f1f", "eeeeeeee", "a0a0a0a0"), ("2f2f2f2f", "eeeeeeee", "a0a0a0a0")],
        *[("1f1f1f1f", "e5e5e5e5", "a0a0a0a0"), ("1f1f1f1f", "eeeeeeee", "a0a0a0a0 b0b0b0b0")],
        *[(None, None, None)] * 2,
    ]
    torn, typed, *copies = found.notes
    assert "torn/data.json is truncated or not JSON" in torn
    assert "typed/data.json is not a valid data.json" in typed
    assert names(copies) == ["f", "typed"]
