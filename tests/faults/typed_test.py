"""Slips on the command line and in a config, and what an export and a sweep make of them."""

import json
import os
import re
import subprocess
import sys

import pytest
from etils import epath
from PIL import Image

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.errors import UserError
from ldrld_jax.train import trainer
from tests.conftest import ROOT, tiny_overrides


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--workdir", ""], "--workdir is empty, perhaps from an unset shell variable"),
        (["--config="], "--config is empty"),
        (["--config.method=KD"], "Did you mean 'kd'?"),
        (["--config.method=kd,ldrld"], "Several are written as a sum: method=kd+ldrld"),
        (["--config.optim.lr=1"], "Did you mean 'optim.learning_rate'?"),
        (["--config.optim.wd=1"], "Did you mean 'optim.weight_decay'?"),
        (["--config.student.model=resnet18", "--config.method=ce"], "Did you mean 'ResNet18'?"),
        (["--config.student.model=resnet101", "--config.method=ce"], "Did you mean 'imagenet_resnet101'?"),
        (["--config", "configs/nothing.py"], "Known: cifar100.py, cifar100_laptop.py, digits.py"),
        (["--config.teacher.checkpoint="], "teacher.checkpoint must be paths separated by commas, got ''"),
        (["--config.logits.dir="], "logits.dir must be a path, got ''"),
        (["--config.optim.momentum=1.5"], "optim.momentum must be at least 0 and below 1, got 1.5"),
        (["--config.optim.weight_decay=-1."], "optim.weight_decay must be at least 0, got -1.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line_that_names_the_near_one(flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main_lib.main(flags) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digits.py", "digits", "configs/digits.py", "configs/digits"])
def test_a_config_is_found_by_its_short_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load(name).data.name == "digits"


def test_a_colon_in_a_configs_path_is_part_of_it(tmp_path):
    text = (
        "from ml_collections import ConfigDict\ndef get_config(arg='1'):\n    return ConfigDict({'seed': int(arg)})\n"
    )
    place = tmp_path / "a:b"
    place.mkdir()
    (place / "mine.py").write_text(text)
    assert config_lib.load(str(place / "mine.py")).seed == 1
    assert config_lib.load(f"{place / 'mine.py'}:7").seed == 7


def test_a_comma_in_the_path_of_one_teacher_is_part_of_it(tiny, tmp_path):
    trainer.train(tiny("epochs=1"), tmp_path / "a,b")
    flags = ["method=kd", "teacher.model=tiny_net", f"teacher.checkpoint={tmp_path / 'a,b'}", "epochs=1"]
    assert trainer.train(tiny(*flags), tmp_path / "run")["teacher"] == "tiny_net"


def test_a_broken_image_among_many_is_named_and_the_others_are_predicted(tiny, tmp_path, data_dir, capsys):
    trainer.train(tiny("epochs=1"), tmp_path / "run")
    assert main_lib.main(["--mode", "export", "--workdir", str(tmp_path / "run")]) == 0
    for i in range(3):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"junk")
    capsys.readouterr()
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert main_lib.main(["--mode", "predict", "--workdir", str(tmp_path / "run/export"), *paths]) == 1
    out, err = capsys.readouterr()
    assert [line.partition("  ")[0] for line in out.splitlines()] == [paths[0], paths[2]]
    assert err.count("\n") == 1 and "1.png is broken" in err


def test_an_export_is_refused_once_a_bit_or_a_name_of_it_has_changed(tiny, tmp_path, capsys):
    from ldrld_jax.deploy.export import read_student

    trainer.train(tiny("epochs=1"), tmp_path / "run")
    assert main_lib.main(["--mode", "export", "--workdir", str(tmp_path / "run")]) == 0
    export = tmp_path / "run/export"
    assert len(read_student(export).labels) == 10
    program = (export / "student.stablehlo").read_bytes()
    changed = bytearray(program)
    changed[len(changed) // 2] ^= 1
    (export / "student.stablehlo").write_bytes(bytes(changed))
    with pytest.raises(UserError, match="has changed since it was exported"):
        read_student(export)
    (export / "student.stablehlo").write_bytes(program)
    described = json.loads((export / "preprocessing.json").read_text())
    (export / "preprocessing.json").write_text(json.dumps(described | {"labels": described["labels"][1:]}))
    with pytest.raises(UserError, match="has no name for each of its 10 classes"):
        read_student(export)


def test_a_class_whose_name_ends_a_line_keeps_its_place_in_the_export(on_folder, folder, tmp_path):
    from ldrld_jax.deploy.export import read_student

    for split in ("train", "val"):
        (folder / split / "bird").rename(folder / split / "bird\nof prey\u2028")
    trainer.train(on_folder("epochs=1"), tmp_path / "run")
    assert main_lib.main(["--mode", "export", "--workdir", str(tmp_path / "run")]) == 0
    assert read_student(tmp_path / "run/export").labels == ("bird\nof prey\u2028", "cat", "dog")
    assert (tmp_path / "run/export/labels.txt").read_text().split("\n") == ["bird of prey\\u2028", "cat", "dog", ""]


def test_a_class_whose_name_is_no_utf8_is_escaped_wherever_it_is_written(tmp_path, folder):
    from ldrld_jax.data.folders import open_folder
    from ldrld_jax.files import replace_text
    from ldrld_jax.report.markup import tag

    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / os.fsdecode(b"caf\xe9"))
    records, classes, _ = open_folder("image_folder", "train", str(folder))
    assert classes == ("bird", "caf\udce9", "dog") and len(records.__getitems__([8])[0]["image"]) > 50
    replace_text(epath.Path(tmp_path / "page.html"), str(tag("p", classes[1])))
    assert (tmp_path / "page.html").read_text() == "<p>caf\\udce9</p>"


def test_a_sweep_takes_a_path_with_a_space_and_quotes_what_it_prints(tmp_path):
    sweep = [sys.executable, "-m", "ldrld_jax.sweep", "--config", "configs/digits.py", "--dry_run"]
    flags = ["--grid", "optim.decay_epochs=(1,2),(3,4)", f"--config.data.data_dir={tmp_path}/my data"]
    done = subprocess.run([*sweep, *flags, "--workdir", str(tmp_path / "w")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert f"'--config.data.data_dir={tmp_path}/my data'" in lines[0]
    assert "'--config.optim.decay_epochs=(1,2)'" in lines[0]


def test_one_torn_run_does_not_stop_a_sweep(tmp_path):
    from ldrld_jax.sweep.plan import plan

    jobs = plan(
        {"config": "configs/digits.py", "runs": [{"method": "ce"}], "grid": {"seed": [0, 1]}}, epath.Path(tmp_path)
    )
    jobs[0].workdir.mkdir(parents=True)
    (jobs[0].workdir / "summary.json").write_text('{"epochs": ')
    for job in jobs:
        job.look()
    assert [job.state for job in jobs] == ["failed", "waiting"]
    assert "summary.json is truncated or not JSON" in jobs[0].line()
    jobs[1].workdir.mkdir(parents=True)
    (jobs[1].workdir / "metrics.jsonl").write_text('{"step": \n{"step": 2}\n')
    assert re.search(r"^waiting +method=ce,seed=1  .*metrics\.jsonl", jobs[1].line())


README = ROOT / "README.md"


def test_the_readmes_own_method_trains_and_its_run_is_evaluated_exported_and_reported(
    tiny, tmp_path, data_dir, monkeypatch, capsys
):
    """Uses processes without the config, in which METHODS does not have the method."""
    from ldrld_jax.losses import METHODS
    from ldrld_jax.report import __main__ as report

    code = next(block for block in README.read_text().split("```python\n") if "class MatchConfig" in block)
    (tmp_path / "match.py").write_text(code.partition("```")[0])
    flags = [*tiny_overrides(data_dir), "student.model=tiny_net", "teacher.model=tiny_net", "teacher.epochs=1"]
    flags = [flag for flag in flags if flag != "method=ce"] + ["epochs=1"]
    tiny()  # makes the model known
    monkeypatch.setitem(METHODS, "match", METHODS["kd"])  # removed after the test
    config = config_lib.load(str(tmp_path / "match.py"), flags)
    assert config.loss.match.scale == 0.5
    trainer.train(config, tmp_path / "run")
    monkeypatch.delitem(METHODS, "match")
    capsys.readouterr()
    for mode in ("eval", "export"):
        assert main_lib.main(["--mode", mode, "--workdir", str(tmp_path / "run")]) == 0
    assert "the method match of the run in" in capsys.readouterr().out
    assert "| method | match" in (tmp_path / "run/export/README.md").read_text()
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "match" in capsys.readouterr().out


def test_help_says_which_config_each_mode_takes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main_lib.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "from this Python file (default: configs/digits.py; eval, predict and export: that of the run)" in said
    with pytest.raises(UserError, match="there is no checkpoint of a run"):
        main_lib.run(*main_lib.parse(["--mode", "eval", "--workdir", str(tmp_path)]))
