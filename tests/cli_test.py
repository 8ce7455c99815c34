"""The command `ldrld-jax`: a table of commands, each with its own help, over the code that `python -m` runs."""

import os
import subprocess
import sys
import tomllib

import pytest

from ldrld_jax import cli
from ldrld_jax import main as main_lib
from tests.conftest import ROOT


def test_the_list_of_commands_has_a_line_for_each(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"], ["help", "--help"]):
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "usage: ldrld-jax COMMAND [FLAG...]"
        assert [line.split()[0] for line in lines[5:-3]] == [*main_lib.MODES, "sweep", "report", "help", "completion"]
        assert max(map(len, lines)) <= 100
    assert "  predict     Names the most likely classes of images" in lines


def flags_shown(text: str) -> set[str]:
    return {line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")}


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.parser is not None])
def test_the_help_of_a_command_is_the_same_by_both_ways_and_shows_its_own_flags_alone(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert cli.main(["help", name]) == 0
    assert capsys.readouterr().out == text
    assert text.startswith(f"usage: ldrld-jax {name} ")
    if name in main_lib.MODES:
        assert flags_shown(text) == set(main_lib.flags_of(name))


def test_the_help_of_predict_is_plain_english(capsys):
    assert cli.main(["help", "predict"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: ldrld-jax predict [FLAG...] [--config.KEY=VALUE...] IMAGE... Names the most likely")
    assert "--top_k N name the N most likely classes (default: 5)" in text
    assert "IMAGE is a file, a pattern such as 'a/**/*.png', a folder (every image in and below it), or -" in text


def test_every_flag_belongs_to_a_mode_and_its_help_begins_with_a_verb():
    assert {flag for mode in main_lib.MODES for flag in main_lib.flags_of(mode)} == set(main_lib.FLAGS)
    verbs = {"take", "keep", "write", "name", "choose", "join", "resize", "set"}
    assert {options["help"].split()[0] for options in main_lib.FLAGS.values()} <= verbs


KEY = """\
data.mean
  type     tuple of float
  default  (0.5,)
  range    at least 0 and at most 1 each
  meaning  mean per channel of pixels scaled to 0..1, which is subtracted
"""


def test_help_explains_a_key_a_block_and_a_command_without_flags(capsys):
    for name in ("data.mean", "--config.data.mean"):
        assert cli.main(["help", name]) == 0
        assert capsys.readouterr().out == KEY
    assert cli.main(["help", "mesh"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "mesh.data",
        "mesh.fsdp",
        "mesh.model",
    ]
    assert cli.main(["help", "completion"]) == 0
    assert capsys.readouterr().out == "Prints the completion script for bash or zsh.\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "there is no command 'trian'. Did you mean 'train'? Known: train, check, "),
        (["help", "data.maen"], "there is no config key 'data.maen'. Did you mean 'data.mean'? Known: data.augment, "),
        (["help", "optm"], "there is no command or config key 'optm'. Did you mean 'optim'? Known: train, "),
        (["help", "a", "b"], "help takes one command or config key, got a b."),
        (["completion"], "completion takes one of bash, zsh: source <(ldrld-jax completion bash)."),
        (["completion", "fish"], "completion takes one of bash, zsh: "),
        (["eval", "--profile=x"], "--profile is a flag of train and bench, and not of eval. Remove it."),
        (["eval", "--mode=train"], "there is no flag '--mode=train'. Known: --config.KEY=VALUE, --config, --workdir, "),
        (["train", "scan.png"], "there is no flag 'scan.png'"),
        (["predict", "--top_k=0", "scan.png"], "argument --top_k: must be at least 1, got 0"),
        (["compile"], "--mode compile and --target NAME go together"),
        (["sweep"], "a sweep needs a FILE with a get_sweep(), or --config and --grid."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_is_one_line_that_names_the_near_one(argv, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.partition(": ")[2].startswith(line)
    assert not list(tmp_path.iterdir())


def test_a_command_is_the_mode_of_its_name(monkeypatch, tmp_path):
    given = {}
    for name in ("train", "bench_data"):
        mode = main_lib.MODES[name]._replace(run=lambda args, config: given.update({args.mode: (args, config.seed)}))
        monkeypatch.setitem(main_lib.MODES, name, mode)
    for name in ("train", "bench_data"):
        assert cli.main([name, "--workdir", str(tmp_path), "--config", "configs/digits.py", "--config.seed=7"]) == 0
        args, seed = given[name]
        assert (args.workdir, args.config, seed) == (str(tmp_path), "configs/digits.py", 7)
        assert main_lib.main(["--mode", name, "--workdir", str(tmp_path), "--config.seed=7"]) == 0
        assert given[name][0].mode == name


def test_the_installed_script_is_this_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ldrld-jax": "ldrld_jax.cli:script"}
    done = subprocess.run(
        [sys.executable, "-c", "from ldrld_jax.cli import script; script()", "xyz"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ldrld_jax: there is no command 'xyz'. Known: train, check, eval,")
