"""The command line: what wrong input gets is one line that names it, and an untouched disk."""

import importlib.util
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file as save

from ldrld_jax import config as config_lib
from ldrld_jax import load_torch_checkpoint
from ldrld_jax import main as main_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.deploy import export
from ldrld_jax.errors import UserError
from ldrld_jax.models import MODELS
from ldrld_jax.models.purify import purify
from ldrld_jax.train import trainer
from ldrld_jax.train.networks import Networks
from tests.checkpoint.saved import contents, largest
from tests.conftest import run_main, tiny_overrides
from tests.tiny_net import TinyNet
from tests.train.trainer_test import saved as all_arrays


def test_overrides_are_told_from_flags():
    args, overrides = main_lib.parse(["--config", "c.py:arg", "--config.seed=1", "--workdir=w", "--config.epochs", "3"])
    assert (args.config, args.workdir, args.mode) == ("c.py:arg", "w", "train")
    assert overrides == ["seed=1", "epochs=3"]


def test_without_flags_it_is_the_digits_run():
    args, overrides = main_lib.parse([])
    assert (args.config or main_lib.DEFAULT_CONFIG, args.workdir) == ("configs/digits.py", "runs/digits")
    assert (args.mode, overrides) == ("train", [])


# flags, and what the one line must say
WRONG = [
    (["--config.seedd=1"], "there is no config key 'seedd'. Did you mean 'seed'?"),
    (["--config.loss.ldrld.deph=3"], "Did you mean 'loss.ldrld.depth'?"),
    (["--config.optim=3"], "optim is a block: set one of optim.clip_norm, optim.decay_epochs"),
    (["--config.seed=1.5"], "seed must be of type int, got 1.5"),
    (["--config.seed=one"], "seed must be of type int, got 'one'"),
    (["--config.seed={{[]:1}}"], "seed must be of type int, got '{{[]:1}}'"),
    (["--config.seed=" + 9000 * "-" + "1"], "seed must be of type int, got '--"),
    (["--config.data.flip=3"], "data.flip must be of type bool, got 3"),
    (["--config.seed"], "--config.seed needs a value"),
    (["--config.data.flip", "--profile", "x"], "--config.data.flip needs a value: --config.data.flip=VALUE"),
    (["--confg=x.py"], "there is no flag '--confg=x.py'"),
    (["train"], "there is no flag 'train'"),
    (["--mode=eval", "--profile=x"], "--profile is a flag of train and bench, and not of eval. Remove it."),
    (["--mode=bench", "--config.student.model=resnet9"], "there is no model 'resnet9'"),
    (["--mode=trian"], "invalid choice: 'trian'"),
    (["--config=configs/nope.py"], "there is no config file 'configs/nope.py'"),
    (["--config=mine/digits.py"], "there is no config file 'mine/digits.py'"),  # which is not configs/digits.py
    (["--config=configs/digits.py:vgg8"], "configs/digits.py takes no argument, got 'vgg8'"),
    (["--config=experiments/methods.py"], "experiments/methods.py defines no get_config()"),
    (["--config.teacher.model=logits", "--config.method=kd"], "set teacher.checkpoint to its path"),
    (["--config.method=ce+kd"], "every method already adds the cross-entropy, weighted by ce_weight. Set method=kd."),
    (["--config.mesh.data=-1", "--config.mesh.model=9"], "mesh.model must be between 1 and the number of devices (8)"),
    (["--config.student.model=resnet9"], "there is no model 'resnet9'. Did you mean"),
    (["--config.method=ldrd"], "there is no method 'ldrd'. Did you mean 'ldrld'?"),
    (["--config.method=kd+kd"], "names a method twice"),
    (["--config.method=kd", "--config.teacher.epochs=None"], "method 'kd' needs a teacher"),
    (["--config.data.name=cifra100"], "there is no dataset 'cifra100'. Did you mean 'cifar100'?"),
    (["--config.data.name=cifar100"], "tfds build cifar100 --file_format array_record --data_dir"),
    (["--config.data.train_split=training"], "there is no split of digits 'training'. Did you mean 'train'?"),
    (["--config.data.mean=(.1,.2)"], "data.mean must have one number (the image's channels), got 2"),
    (["--config.data.loader=residnet"], "there is no data.loader 'residnet'"),
    (["--config.data.remainder=pad"], "there is no data.remainder 'pad'"),
    (["--config.data.threads=0"], "data.threads must be at least 1, got 0"),
    (["--config.method=ldrld", "--config.loss.ldrld.depth=1"], "depth must be at least 2, got 1"),
    (["--config.method=ldrld", "--config.loss.ldrld.depth=11"], "between 2 and the number of classes (10), got 11"),
    (["--config.method=ldrld", "--config.loss.ldrld.temperature=0"], "temperature must be finite and above 0, got 0"),
    (["--config.method=ldrld", "--config.loss.ldrld.rank_by=label"], "rank_by must be one of student, teacher"),
    (["--config.method=ldrld", "--config.loss_weight.ldrld=-1"], "loss_weight.ldrld must be at least 0, got -1"),
    (["--config.label_smoothing=1"], "label_smoothing must be at least 0 and below 1, got 1"),
    (["--config.epochs=0"], "epochs must be at least 1, got 0"),
    (["--config.log.every_steps=0"], "log.every_steps must be at least 1, got 0"),
    (["--config.checkpoint.every_steps=0"], "checkpoint.every_steps must be at least 1, got 0"),
    (["--config.checkpoint.keep_last=0"], "checkpoint.keep_last must be at least 1, got 0"),
    (["--config.log.watchdog_seconds=-1."], "log.watchdog_seconds must be at least 0, got -1"),
    (["--config.batch_size=0"], "batch_size must be at least 1, got 0"),
    (["--config.steps_per_dispatch=0"], "steps_per_dispatch must be at least 1, got 0"),
    (["--config.steps_per_dispatch=8"], "Set data.loader=resident, or steps_per_dispatch=1"),
    (["--config.batch_size=100", "--config.data.remainder=drop"], "number of training images (90)"),
    (["--config.data.mixup=.2"], "data.mixup blends the images of a batch, which may hold no padding: got 0.2"),
    (["--config.data.mixup=-1."], "data.mixup must be at least 0, got -1.0"),
    (["--config.accumulate=3"], "accumulate must be at least 1 and divide batch_size (40), got 3"),
    (["--config.batch_norm_group=7"], "batch_norm_group must be at least 1 and divide batch_size / accumulate (40)"),
    (["--config.non_finite=ignore"], "there is no non_finite 'ignore'"),
    (["--config.matmul_precision=tf32"], "there is no matmul_precision 'tf32'. Did you mean"),
    (["--config.optim.clip_norm=0."], "optim.clip_norm must be above 0, got 0.0"),
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


def tear(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_config(run: pathlib.Path, **changes) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def colour(run: pathlib.Path) -> None:
    data = json.loads((run / "config.json").read_text())["data"]
    change_config(run, data=data | {"mean": [0.5] * 3, "std": [0.2] * 3})


def tear_the_first_line(run: pathlib.Path) -> None:
    first, rest = (run / "metrics.jsonl").read_text().split("\n", 1)
    (run / "metrics.jsonl").write_text(f"{first[:-9]}\n{rest}")


def checkpoints_of(run: pathlib.Path) -> list[pathlib.Path]:
    return sorted((run / "checkpoints").iterdir())


def save_other_arrays(run: pathlib.Path, change) -> None:
    """The newest checkpoint, with its arrays changed and saved as this very run's."""
    newest = checkpoints_of(run)[-1]
    saved = Checkpoints(newest.parent)
    other = Checkpoints(newest.parent, run=saved.run(int(newest.name)))
    trees = jax.tree.map(change, all_arrays(run, int(newest.name)))
    other.save(99, trees, saved.host(int(newest.name)))
    other.close()


def images(folder: pathlib.Path, *classes: str) -> None:
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(folder / split / name / "1.png")


def digits(place: pathlib.Path, data_dir: str, pattern: str, do) -> None:
    shutil.copytree(data_dir, place / "data")
    for path in (place / "data").rglob(pattern):
        do(path)


FOLDER = ["--config.data.name=image_folder", "--config.data.data_dir={place}/data"]
FOLDER += ["--config.data.train_split=train", "--config.data.eval_split=val", "--config.data.crop_size=16"]
TEACHER = [
    "--workdir={place}/new",
    "--config.method=kd",
    "--config.teacher.model=resnet8",
    "--config.teacher.checkpoint={place}/teacher",
]
COPIED = ["--config.data.data_dir={place}/data"]
EVAL = ["--mode=eval"]

# what is on disk before: of (place, run, data_dir), where `run` holds a finished run less its summary; flags; the line
ON_DISK = {
    "workdir, a file": (
        lambda p, run, _: [shutil.rmtree(run), run.write_text("")],
        [],
        "run is a file. Choose another",
    ),
    "workdir, nowhere to write": (lambda *_: None, ["--workdir=/proc/run"], "No such file or directory: /proc/run"),
    "config, torn": (lambda p, run, _: tear(run / "config.json"), [], "config.json is truncated or not JSON"),
    "config, a list": (
        lambda p, run, _: (run / "config.json").write_text("[]"),
        [],
        "config.json holds no JSON object",
    ),
    "config, of another run": (lambda p, run, _: change_config(run, seed=5), [], "seed (5 there, 0 here)"),
    "config to evaluate, torn": (
        lambda p, run, _: tear(run / "config.json"),
        EVAL,
        "config.json is truncated or not JSON",
    ),
    "config to evaluate, a key": (lambda p, run, _: change_config(run, sed=1), EVAL, "there is no config key 'sed'"),
    "summary, torn": (
        lambda p, run, _: (run / "summary.json").write_text('{"st'),
        [],
        "summary.json is truncated or not JSON",
    ),
    "metrics, torn": (lambda p, run, _: tear_the_first_line(run), [], "line 1 of {place}/run/metrics.jsonl is torn"),
    "checkpoints, files missing": (
        lambda p, run, _: [shutil.rmtree(c / "training") for c in checkpoints_of(run)],
        [],
        "is whole (6: it cannot be",
    ),
    "checkpoints, truncated": (
        lambda p, run, _: [tear(largest(c)) for c in checkpoints_of(run)],
        [],
        "is whole (6: it cannot be read",
    ),
    "checkpoints to evaluate, truncated": (
        lambda p, run, _: [tear(largest(c)) for c in checkpoints_of(run)],
        EVAL,
        "is damaged (it cannot be read",
    ),
    "checkpoints, without notes": (
        lambda p, run, _: [tear(c / "_CHECKPOINT_METADATA") for c in checkpoints_of(run)],
        [],
        "_METADATA is torn; ",
    ),
    "checkpoints, another dtype": (
        lambda p, run, _: save_other_arrays(run, lambda x: x.astype(np.float16)),
        [],
        "is float16[16] there and float",
    ),
    "checkpoints, another shape": (
        lambda p, run, _: save_other_arrays(run, lambda x: np.stack([x, x])),
        [],
        "is float32[2, 16] there and float",
    ),
    "checkpoints, of another run": (
        lambda p, run, _: change_config(run, seed=5),
        ["--config.seed=5"],
        "another config: seed (0 there, 5 here)",
    ),
    "checkpoints to evaluate, of another run": (
        lambda p, run, _: change_config(run, seed=5),
        EVAL,
        "belongs to another run than the config beside it",
    ),
    "checkpoints, a file": (
        lambda p, run, _: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")],
        [],
        "checkpoints",
    ),
    "teacher, truncated": (
        lambda p, *_: [save({"fc.weight": np.zeros((9, 9))}, p / "teacher"), tear(p / "teacher")],
        TEACHER,
        "truncated",
    ),
    "teacher, text": (
        lambda p, *_: (p / "teacher").write_text("<html> there is no such page"),
        TEACHER,
        "text that begins '<html",
    ),
    "teacher, an empty folder": (lambda p, *_: (p / "teacher").mkdir(), TEACHER, "holds no run (no config.json)"),
    "teacher, a folder for the Hub": (
        lambda p, *_: [(p / "teacher").mkdir(), (p / "teacher/model.safetensors").write_bytes(b"")],
        TEACHER,
        "is an exported network, not the workdir of a run. Give the file in it: {place}/teacher/model.safetensors.",
    ),
    "teacher, an exported program": (
        lambda p, *_: (p / "t.stablehlo").write_bytes(b"StableHLO"),
        [*TEACHER, "--config.teacher.checkpoint={place}/t.stablehlo"],
        "is a program, not a checkpoint. Give the student.safetensors that lies beside it",
    ),
    "teacher, of images with other channels": (
        lambda p, run, _: colour(shutil.copytree(run, p / "teacher")),
        [*TEACHER, "--config.teacher.model=tiny_net"],
        "the run in {place}/teacher was trained on images of 3 channels, and those here have 1. Name another run.",
    ),
    "teacher, other weights": (
        lambda p, *_: save({"fc.weight": np.zeros((9, 9))}, p / "teacher"),
        TEACHER,
        "does not fit resnet8 with 10",
    ),
    "data, a file": (lambda p, *_: (p / "data").write_text(""), COPIED, "Not a directory: {place}/data"),
    "data, nowhere to write": (lambda *_: None, ["--config.data.data_dir=/proc/data"], "/proc/data"),
    "data, truncated": (
        lambda p, _, data: digits(p, data, "*array_record*", tear),
        COPIED,
        "digits, train[:90] are damaged",
    ),
    "data, a missing file": (
        lambda p, _, data: digits(p, data, "*test.array_record*", pathlib.Path.unlink),
        COPIED,
        "digits, test[:50] are",
    ),
    "data, a torn description": (
        lambda p, _, data: digits(p, data, "dataset_info.json", tear),
        COPIED,
        "the description of digits in",
    ),
    "data, strangers' code": (lambda *_: None, ["--config.data.name=someone:digits"], "there is no module 'someone'"),
    "images, nowhere": (lambda *_: None, FOLDER, "there is no folder {place}/data/train"),
    "images, none": (
        lambda p, *_: [images(p / "data", "a", "b"), *map(pathlib.Path.unlink, (p / "data").rglob("*.png"))],
        FOLDER,
        "there is no image in {place}/data/train",
    ),
    "images, one class": (lambda p, *_: images(p / "data", "a"), FOLDER, "has 1 classes, and there is nothing to tell"),
    "images, an empty class": (
        lambda p, *_: [images(p / "data", "a", "b"), (p / "data/train/b/1.png").unlink()],
        FOLDER,
        "no image of b in",
    ),
}


@pytest.fixture(scope="module")
def a_run(data_dir, tmp_path_factory):
    """A run of TinyNet, and the flags that made it."""
    workdir = tmp_path_factory.mktemp("made")
    flags = [f"--config.{override}" for override in (*tiny_overrides(data_dir), "student.model=tiny_net")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        assert main_lib.main(["--workdir", str(workdir), *flags]) == 0
    (workdir / "summary.json").unlink()
    return workdir, flags


@pytest.mark.parametrize("case", [*(" ".join(flags) for flags, _ in WRONG), *ON_DISK])
def test_wrong_input_gets_one_line_and_touches_nothing(case, a_run, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny_net", TinyNet)
    made, right = a_run
    run = tmp_path / "run"
    if case in ON_DISK:
        prepare, wrong, expected = ON_DISK[case]
        shutil.copytree(made, run)
        prepare(tmp_path, run, data_dir)
    else:
        wrong, expected = next(pair for pair in WRONG if " ".join(pair[0]) == case)
    before = contents(tmp_path)
    wrong = [flag.format(place=tmp_path) for flag in wrong]
    assert main_lib.main(["--workdir", str(run), *([] if wrong == EVAL and run.exists() else right), *wrong]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ldrld_jax: ")
    assert expected.format(place=tmp_path) in line
    assert contents(tmp_path) == before


IN_A_PROCESS = {
    "flag": (["--config.sed=1"], {}, "Did you mean 'seed'?"),
    "config": (["--config=nowhere.py"], {}, "there is no config file 'nowhere.py'"),
    "checkpoint": (["--mode=eval"], {}, "there is no checkpoint of a run in"),
    "platform": ([], {"JAX_PLATFORMS": "nonsense"}, "JAX finds no device for JAX_PLATFORMS='nonsense'"),
    "plugin": ([], {"JAX_PLATFORMS": "cuda"}, "JAX finds no device for JAX_PLATFORMS='cuda'"),
    "variable": ([], {"JAX_ENABLE_X64": "maybe"}, "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
}


@pytest.mark.parametrize("case", IN_A_PROCESS)
def test_wrong_input_to_a_process_of_its_own(case, data_dir, tmp_path):
    if case == "plugin" and importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("with its plugin installed, JAX prints the reason why it does not start")
    wrong, environment, expected = IN_A_PROCESS[case]
    right = [] if case == "checkpoint" else [f"--config.{override}" for override in tiny_overrides(data_dir)]
    done = run_main("--workdir", tmp_path / "run", *right, *wrong, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_config_that_sets_an_unknown_key_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'epoch': 3})\n")
    assert main_lib.main([f"--config={path}"]) == 2
    assert "there is no config key 'epoch'. Did you mean 'epochs'?" in capsys.readouterr().err


def test_a_teacher_of_another_model_is_refused(teacher_dir, data_dir, tmp_path, capsys):
    tiny = [f"--config.{override}" for override in tiny_overrides(data_dir)]
    flags = ["--config.method=kd", f"--config.teacher.checkpoint={teacher_dir}", "--config.teacher.model=resnet14"]
    assert main_lib.main(["--workdir", str(tmp_path / "run"), *tiny, *flags]) == 2
    assert "trained tiny_net, not resnet14" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")  # has TinyNet in MODELS
def test_a_checkpoint_of_other_shapes_is_refused(teacher_dir, data_dir, tmp_path, capsys):
    """A net for ten classes, asked for as one for a hundred classes."""
    data = config_lib.load("configs/digits.py").data
    with pytest.raises(UserError, match="does not fit"):
        Networks(100, 1, "float32").restore(teacher_dir, "tiny_net", data)


@pytest.mark.usefixtures("tiny")
def test_a_run_is_evaluated_and_exported_from_its_workdir_alone(teacher_dir, capsys):
    assert main_lib.main(["--mode=eval", "--workdir", teacher_dir]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    summary = json.loads(pathlib.Path(teacher_dir, "summary.json").read_text())
    assert printed["top1"] == f"{summary['best_top1']:.4f}"
    assert main_lib.main(["--mode=export", "--workdir", teacher_dir]) == 0
    folder = capsys.readouterr().out.strip()
    module = load_torch_checkpoint(f"{folder}/student.safetensors", "tiny_net", num_classes=10, in_channels=1)
    config = config_lib.load_run(teacher_dir)
    _, ours = Networks(10, 1, "float32").restore(teacher_dir, "tiny_net", config.data)
    _, params, batch_stats = purify(module)
    chex.assert_trees_all_equal((params, batch_stats), tuple(ours))


def test_a_pytorch_file_teaches(teacher_dir, tiny, tmp_path):
    exported = export.export(config_lib.load_run(teacher_dir), teacher_dir) / "student.safetensors"
    tops = [
        trainer.train(tiny("method=kd", "epochs=1", f"teacher.checkpoint={path}"), tmp_path / name)["teacher_top1"]
        for name, path in (("ours", teacher_dir), ("theirs", exported))
    ]
    assert tops[0] == tops[1]


def test_help_in_a_process_of_its_own():
    shown = run_main("--help")
    assert shown.returncode == 0
    assert "--config.seed=1" in shown.stdout
