"""The command line: what wrong input gets is one line that names it, and an untouched disk."""

import json
import os
import pathlib
import shlex

import chex
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import load_torch_checkpoint, trainer
from ldrld_jax import main as main_lib
from ldrld_jax.errors import UserError
from ldrld_jax.networks import load_network
from ldrld_jax.purify import purify
from tests.conftest import readme_blocks, run_main, tiny_overrides


def test_overrides_are_told_from_flags():
    args, overrides = main_lib.parse(["--config", "c.py:arg", "--config.seed=1", "--workdir=w", "--config.epochs", "3"])
    assert (args.config, args.workdir, args.mode) == ("c.py:arg", "w", "train")
    assert overrides == ["seed=1", "epochs=3"]


def test_without_flags_it_is_the_digits_run():
    args, overrides = main_lib.parse([])
    assert (args.config or main_lib.DEFAULT_CONFIG, args.workdir) == ("configs/digits.py", "runs/digits")
    assert (args.mode, overrides) == ("train", [])


def test_the_readmes_five_lines_run():
    scope: dict = {}
    exec(readme_blocks("python")[0], scope)
    assert float(scope["loss"]) == 0  # both sides' logits are equal classes
    assert scope["gradient"].shape == (8, 100)


def test_every_command_of_the_readme_parses():
    lines = [line for block in readme_blocks("") for line in block.splitlines() if "ldrld_jax.main" in line]
    assert len(lines) == 5
    for line in lines:
        args, overrides = main_lib.parse(shlex.split(line.rpartition("ldrld_jax.main")[2]))
        config = config_lib.load(args.config or main_lib.DEFAULT_CONFIG, overrides)
        assert config_lib.resolve(config).method == "ldrld"


# flags, and what the one line must say
WRONG = [
    (["--config.seedd=1"], "there is no config key 'seedd'. Did you mean 'seed'?"),
    (["--config.loss.ldrld.deph=3"], "Did you mean 'loss.ldrld.depth'?"),
    (["--config.optim=3"], "optim is a block: set one of optim.decay_epochs"),
    (["--config.seed=1.5"], "seed must be a int, got 1.5"),
    (["--config.seed=one"], "seed must be a int, got 'one'"),
    (["--config.data.flip=3"], "data.flip must be a bool, got 3"),
    (["--config.seed"], "--config.seed needs a value"),
    (["--confg=x.py"], "there is no flag '--confg=x.py'"),
    (["train"], "there is no flag 'train'"),
    (["--mode=eval", "--profile=x"], "--profile traces the steps of --mode train and bench, and --mode is eval"),
    (["--mode=bench", "--config.student.model=resnet9"], "there is no model 'resnet9'"),
    (["--mode=trian"], "invalid choice: 'trian'"),
    (["--config=configs/nope.py"], "there is no config file 'configs/nope.py'"),
    (["--config=configs/digits.py:x"], "config configs/digits.py:x failed"),
    (["--config.student.model=resnet9"], "there is no model 'resnet9'. Did you mean"),
    (["--config.method=ldrd"], "there is no method 'ldrd'. Did you mean 'ldrld'?"),
    (["--config.method=kd+kd"], "names a method twice"),
    (["--config.method=kd", "--config.teacher.epochs=None"], "method 'kd' needs a teacher"),
    (["--config.data.name=cifra100"], "there is no dataset 'cifra100'. Did you mean 'cifar100'?"),
    (["--config.data.name=cifar100"], "tfds build cifar100 --file_format array_record --data_dir"),
    (["--config.data.train_split=training"], "there is no split of digits 'training'. Did you mean 'train'?"),
    (["--config.data.mean=(.1,.2)"], "data.mean must have 1 or 1 numbers"),
    (["--config.data.loader=residnet"], "there is no data.loader 'residnet'"),
    (["--config.data.remainder=pad"], "there is no data.remainder 'pad'"),
    (["--config.data.threads=0"], "data.threads at least 1, got 1 and 0"),
    (["--config.method=ldrld", "--config.loss.ldrld.depth=1"], "depth must be at least 2, got 1"),
    (["--config.method=ldrld", "--config.loss.ldrld.depth=11"], "between 2 and the number of classes (10), got 11"),
    (["--config.method=ldrld", "--config.loss.ldrld.temperature=0"], "temperature must be finite and above 0, got 0"),
    (["--config.method=ldrld", "--config.loss.ldrld.rank_by=label"], "rank_by must be one of student, teacher"),
    (["--config.method=ldrld", "--config.loss_weight.ldrld=-1"], "loss_weight.ldrld must not be negative, got -1"),
    (["--config.label_smoothing=1"], "label_smoothing must not be negative, and below 1, got 1"),
    (["--config.epochs=0"], "epochs must be at least 1, got 0"),
    (["--config.batch_size=0"], "batch_size must be at least 1, got 0"),
    (["--config.steps_per_dispatch=0"], "steps_per_dispatch must be at least 1, got 0"),
    (["--config.steps_per_dispatch=8"], "Set data.loader=resident, or steps_per_dispatch=1"),
    (["--config.batch_size=100", "--config.data.remainder=drop"], "number of training images (90)"),
    (["--config.data.mixup=.2"], "data.mixup blends the images of a batch, which may hold no padding: got 0.2"),
    (["--config.data.mixup=-1."], "data.mixup blends"),
    (["--config.ema_decay=1."], "ema_decay must be at least 0 and below 1, got 1.0"),
    (["--config.method=kd", "--config.teacher.ensemble=vote"], "there is no teacher.ensemble 'vote'"),
    (["--config.precision=float16"], "there is no precision 'float16'"),
    (["--config.mesh.data=9"], "between 1 and the number of devices (8), got 9 x 1"),
    (["--config.optim.name=sgdd"], "there is no optim.name 'sgdd'. Did you mean 'sgd'?"),
    (["--config.optim.schedule=steps"], "Did you mean 'step'?"),
    (["--config.optim.warmup=oficial"], "Did you mean 'official'?"),
    (["--config.teacher.checkpoint=/nowhere", "--config.method=kd"], "there is no checkpoint /nowhere"),
    (["--config.student.checkpoint=/nowhere"], "there is no checkpoint /nowhere"),
    (["--mode=eval"], "there is no checkpoint"),
]


@pytest.mark.parametrize(("flags", "expected"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_input_gets_one_line_and_touches_nothing(flags, expected, data_dir, tmp_path, capsys):
    workdir = tmp_path / "run"
    tiny = [f"--config.{override}" for override in tiny_overrides(data_dir)]
    assert main_lib.main(["--workdir", str(workdir), *tiny, *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ldrld_jax: ")
    assert expected in line
    assert not workdir.exists()


def test_a_config_that_sets_an_unknown_key_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'epoch': 3})\n")
    assert main_lib.main([f"--config={path}"]) == 2
    assert "there is no config key 'epoch'. Did you mean 'epochs'?" in capsys.readouterr().err


def test_a_teacher_of_another_model_is_refused(teacher_dir, data_dir, tmp_path, capsys):
    tiny = [f"--config.{override}" for override in tiny_overrides(data_dir)]
    flags = ["--config.method=kd", f"--config.teacher.checkpoint={teacher_dir}", "--config.teacher.model=resnet14"]
    assert main_lib.main(["--workdir", str(tmp_path / "run"), *tiny, *flags]) == 2
    assert "trained resnet8, not resnet14" in capsys.readouterr().err


def test_a_checkpoint_of_other_shapes_is_refused(teacher_dir, data_dir, tmp_path, capsys):
    """A resnet8 for ten classes, asked for as one for three-channel images of a hundred classes."""
    data = config_lib.load("configs/digits.py").data
    with pytest.raises(UserError, match="does not fit"):
        load_network(teacher_dir, "resnet8", data, num_classes=100, channels=1, precision="float32")


@pytest.mark.skipif(os.geteuid() == 0 and not pathlib.Path("/proc").is_dir(), reason="root may write anywhere")
def test_a_workdir_that_cannot_be_written_is_one_line(data_dir, capsys):
    tiny = [f"--config.{override}" for override in tiny_overrides(data_dir)]
    assert main_lib.main(["--workdir", "/proc/run", *tiny]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/proc/run" in line


def test_a_run_is_evaluated_and_exported_from_its_workdir_alone(teacher_dir, capsys):
    assert main_lib.main(["--mode=eval", "--workdir", teacher_dir]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    summary = json.loads(pathlib.Path(teacher_dir, "summary.json").read_text())
    assert printed["top1"] == f"{summary['best_top1']:.4f}"
    assert main_lib.main(["--mode=export", "--workdir", teacher_dir]) == 0
    path = capsys.readouterr().out.strip()
    module = load_torch_checkpoint(path, "resnet8", num_classes=10, in_channels=1)
    config = config_lib.load_run(teacher_dir)
    _, ours = load_network(teacher_dir, "resnet8", config.data, num_classes=10, channels=1, precision="float32")
    _, params, batch_stats = purify(module)
    chex.assert_trees_all_equal((params, batch_stats), tuple(ours))


def test_a_pytorch_file_teaches(teacher_dir, tiny, tmp_path):
    exported = trainer.export(config_lib.load_run(teacher_dir), teacher_dir)
    tops = [
        trainer.train(tiny("method=kd", "epochs=1", f"teacher.checkpoint={path}"), tmp_path / name)["teacher_top1"]
        for name, path in (("ours", teacher_dir), ("theirs", exported))
    ]
    assert tops[0] == tops[1]


def test_help_and_a_typo_in_a_process_of_their_own(tmp_path):
    shown = run_main("--help")
    assert shown.returncode == 0
    assert "--config.seed=1" in shown.stdout
    wrong = run_main("--config.sed=1", "--workdir", tmp_path / "run")
    assert (wrong.returncode, wrong.stderr.count("\n"), wrong.stdout) == (2, 1, "")
    assert "Did you mean 'seed'?" in wrong.stderr
    assert not (tmp_path / "run").exists()
