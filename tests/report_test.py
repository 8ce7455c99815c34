"""The comparison table comes from the files of runs, whatever else lies beside them."""

import json

from ldrld_jax import report


def summary(**changes):
    run = dict(method="kd", seed=0, student="resnet8", teacher="resnet20", teacher_top1=99.0)
    return run | dict(best_top1=97.0, last_top1=96.0, examples_per_second=1000.0) | changes


def write(folder, name, **changes):
    workdir = folder / name
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    (workdir / "summary.json").write_text(json.dumps(summary(**changes)))
    return workdir


def test_runs_are_grouped_over_seeds_and_ordered_by_the_last_epoch(tmp_path, capsys):
    for seed, last in ((0, 95.0), (1, 97.0), (2, 96.0)):
        write(tmp_path, f"kd{seed}", seed=seed, last_top1=last)
    write(tmp_path, "ldrld", method="ldrld", last_top1=98.25)
    write(tmp_path, "ce", method="ce", teacher=None, teacher_top1=None, last_top1=90.0)
    assert report.main([str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2] for row in rows] == ["ldrld", "kd", "ce"]
    assert rows[1][3:6] == ["3", "97.00", "96.00 ± 1.00"]  # the deviation of 95, 96, 97
    assert rows[2][0] == "| none"


def test_unfinished_broken_and_foreign_folders_are_named(tmp_path, capsys):
    good = write(tmp_path, "good")
    (write(tmp_path, "running") / "summary.json").unlink()
    (write(tmp_path, "torn") / "summary.json").write_text('{"method": "k')
    (write(tmp_path, "other") / "summary.json").write_text('{"method": "kd"}')
    (tmp_path / "foreign").mkdir()
    assert report.main([str(tmp_path), str(tmp_path / "foreign")]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    notes = err.splitlines()
    assert [note.partition(": ")[0].rpartition("/")[2] for note in notes] == ["other", "running", "torn", "foreign"]
    assert "KeyError: 'seed'" in notes[0]
    assert "not finished" in notes[1]
    assert report.collect([good]).summaries == [summary()]


def test_nothing_to_report_is_a_failure(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert report.main([]) == 2
    assert "usage" in capsys.readouterr().err
