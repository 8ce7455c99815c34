"""Sweeps: which runs there are, which share a teacher or a logit store, and that only what is missing runs."""

import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.files import locked
from ldrld_jax.losses import METHODS
from ldrld_jax.models import MODELS
from ldrld_jax.sweep.__main__ import _fitting, main, parse
from ldrld_jax.sweep.__main__ import jobs_of as jobs_in_shard
from ldrld_jax.sweep.plan import load, plan
from ldrld_jax.sweep.schedule import Sweep
from tests.conftest import ROOT, comparable_lines


def jobs_of(workdir, *overrides, **sweep):
    return plan({"config": "configs/digits.py"} | sweep, epath.Path(workdir), overrides)


def test_every_entry_of_runs_meets_every_combination_of_the_grid(tmp_path):
    jobs = jobs_of(
        tmp_path, "epochs=3", runs=[{"method": "kd"}, {"method": "ce"}], grid={"seed": [0, 1], "batch_size": [8]}
    )
    assert [job.name for job in jobs] == [
        *("method=kd,seed=0,batch_size=8", "method=kd,seed=1,batch_size=8"),
        *("method=ce,seed=0,batch_size=8", "method=ce,seed=1,batch_size=8"),
    ]
    assert [job.identity["epochs"] for job in jobs] == [3] * 4
    assert jobs[1].command[-3:-1] == ["--config.seed=1", "--config.batch_size=8"]


def test_runs_share_a_teacher_where_its_recipe_is_the_same(tmp_path):
    runs = [{"method": "kd"}, {"loss.ldrld.depth": 3}, {"optim.learning_rate": 0.1}, {"teacher.data.imbalance": 10.0}]
    teachers = [job.teachers for job in jobs_of(tmp_path, runs=runs)]
    assert teachers[0] == teachers[1]
    # the teacher's unset recipe is the student's
    assert len({str(places) for places in teachers}) == 3
    assert all(str(place).startswith(f"{tmp_path}/teachers/resnet20-") for (place,) in teachers)


def test_runs_on_data_of_several_folders_share_neither_teacher_nor_logits(tmp_path):
    folders = {"data.data_dir": ["a", "b"]}
    jobs = jobs_of(tmp_path, "teacher.epochs=1", "logits.dir=store", grid=folders | {"method": ["kd", "dkd"]})
    places = [(job.teachers, [flag for flag in job.command if "logits.dir=store/" in flag]) for job in jobs]
    assert places[0] == places[1] != places[2] == places[3]
    assert not {*places[0][0], *places[0][1]} & {*places[2][0], *places[2][1]}


def test_runs_share_a_logit_store_where_the_teacher_sees_the_same(tmp_path):
    runs = [{"method": "kd"}, {"method": "ldrld", "data.label_noise": "symmetric"}, {"seed": 1}, {"data.pad": 2}]
    jobs = jobs_of(tmp_path, "logits.dir=/store", "teacher.checkpoint=x", "data.augment_seed=0", runs=runs)
    stores = [next(flag for flag in job.command if "logits.dir=/store/" in flag) for job in jobs]
    assert stores[0] == stores[1] == stores[2] != stores[3]
    (anew,) = jobs_of(tmp_path, "logits.dir=/store", "teacher.checkpoint=x", runs=[{"seed": 1}])
    assert stores[2] not in anew.command
    exact = jobs_of(
        tmp_path, "logits.dir=/store", "teacher.checkpoint=x", grid={"matmul_precision": ["default", "float32"]}
    )
    assert len({flag for job in exact for flag in job.command if "logits.dir=/store/" in flag}) == 2


def test_a_run_of_many_settings_has_a_name_of_its_own_that_a_file_may_have(schedule, tmp_path, monkeypatch):
    decays = [f"({','.join(map(str, range(1, last)))})" for last in (88, 89)]  # alike in the first 251 bytes
    model = "é" * 118 + "x"  # with its key 251 bytes
    monkeypatch.setitem(MODELS, model, MODELS["resnet8"])
    jobs = jobs_of(
        tmp_path,
        "method=ce",
        "epochs=90",
        runs=[*({"optim.decay_epochs": d} for d in decays), {"student.model": model}],
    )
    first, second, longest = [job.name for job in jobs]
    for name, whole in zip((first, second), decays, strict=True):
        assert len(name) == 251
        assert f"optim.decay_epochs={whole}".startswith(name[:242])
        assert re.fullmatch(r"-[0-9a-f]{8}", name[242:])
    assert first != second
    assert longest == f"student.model={model}"
    for job in jobs:
        assert str(tmp_path / job.name) in job.command
        job.workdir.mkdir()
    schedule(jobs, 3)._turn()
    assert {path.name for path in tmp_path.glob("*.txt")} == {f"{name}.txt" for name in (first, second, longest)}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"runs": [{"seed": 0}, {"seed": 0}]}, r"names a run twice: seed=0\."),
        (
            {"grid": {"optim.learning_rate": [".1", "0.1"]}},
            r"names a run twice: optim\.learning_rate=\.1, optim\.learning_rate=0\.1\.",
        ),
        (
            {"grid": {"teacher.model": ["resnet20", "resnet2O"]}},
            r"there is no model 'resnet2O'\. Did you mean",
        ),
        ({"grid": {"student.model": ["resnet8x5"]}}, "there is no model 'resnet8x5'"),
        ({"runs": [{"sede": 0}]}, "there is no config key 'sede'. Did you mean 'seed'?"),
        ({"grid": {"seed": 3}}, "a list of values for each key"),
        ({"seeds": [3]}, "got config, seeds"),
        ({"grid": [3]}, "a list of values for each key"),
        ({"grid": {"seed": []}}, "a list of values for each key"),
        ({"runs": []}, "runs are a list of dicts"),
        ({"overrides": ["seed=3"]}, "overrides are a dict"),
        ({"runs": {"seed": 3}}, "runs are a list of dicts"),
        ({"runs": [{"loss.ldrld.depth": 1}]}, "loss.ldrld: depth"),
        ({"config": None}, r"a sweep's config is the text FILE\[:ARG\], got None. Name its file, or set --config."),
        ({"config": {"seed": 3}}, r"a sweep's config is the text FILE\[:ARG\], got {'seed': 3}. Name its file"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path, sweep, message):
    with pytest.raises(UserError, match=message):
        jobs_of(tmp_path, **sweep)


def test_runs_whose_settings_differ_in_a_slash_alone_have_folders_of_their_own(tmp_path):
    places = ["a/b", "a_b", "a\\b", "a\udcffb"]
    for order in (places, places[::-1]):
        jobs = jobs_of(tmp_path, "method=ce", grid={"student.checkpoint": order})
        names = dict(zip(order, (job.name for job in jobs), strict=True))
        assert names.pop("a_b") == "student.checkpoint=a_b"
        assert all(re.fullmatch(r"student\.checkpoint=a_b-[0-9a-f]{8}", name) for name in names.values())
        assert len(set(names.values())) == 3


def test_a_sweep_into_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--config", "configs/digits.py", "--workdir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"ldrld_jax.sweep: {tmp_path}/file is a file. Choose another workdir.\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs a FILE"),
        (["nothing.py"], "there is no sweep file 'nothing.py'"),
        (["configs/digits.py"], "configs/digits.py defines no get_sweep(). Add it, or give a config by --config."),
        (["experiments/ablations.py:depht"], "there is no ablation 'depht'"),
        (["experiments/methods.py", "--shard", "4/4"], "--shard is I/N with 0 <= I < N, got 4/4."),
        (["experiments/methods.py", "--jobs", "0"], "--jobs must be at least 1"),
        (["experiments/methods.py", "--grid", "seed"], "--grid is KEY=VALUE"),
        (["experiments/methods.py", "--gird", "seed=1"], "there is no flag '--gird'"),
        (["experiments/methods.py", "--grid", "seed=1", "--grid", "seed=2"], "Give its values in one: --grid seed="),
        (
            ["experiments/methods.py", "--config.seed=7"],
            "--config.seed=7 changes no run: each run of the sweep sets seed",
        ),
        (
            ["experiments/methods.py", "--config.method=ce"],
            "changes no run: each run of the sweep sets method itself",
        ),
        (["experiments/methods.py", "--workdir="], "--workdir is empty"),
        (["experiments/methods.py", "--gpus=0,"], "--gpus=0, has an empty name. Name GPUs, as in --gpus=0,1"),
    ],
)
def test_wrong_flags_get_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*argv, *(["--dry_run"] if argv else [])]) == 2
    assert message in capsys.readouterr().err


def test_every_sweep_of_the_experiments_plans(tmp_path):
    ablations = runpy.run_path(str(ROOT / "experiments/ablations.py"))["ABLATIONS"]
    every = [f"every_method.py:{name}" for name in ("digits", "laptop")]
    for sweep in ["methods.py", "laptop.py", *every, *(f"ablations.py:{name}" for name in ablations)]:
        jobs = plan(load(f"{ROOT}/experiments/{sweep}"), epath.Path(tmp_path))
        assert len(jobs) > 1
        # one teacher for all, or one for each bias
        assert len({str(job.teachers) for job in jobs if job.teachers}) == {
            "noisy_teacher": 4,
            "long_tailed_teacher": 3,
        }.get(sweep.partition(":")[2], 1)


def test_the_sweep_of_every_method_leaves_none_out_and_scales_what_depends_on_the_epoch():
    sweep = load(f"{ROOT}/experiments/every_method.py:digits")
    assert {name for run in sweep["runs"] for name in run["method"].split("+")} == {"ce", *METHODS}
    runs = {run["method"]: run for run in sweep["runs"]}
    assert runs["dkd"]["kd_warmup_epochs"] == 3  # 20 of 240
    assert runs["sld"]["loss.sld.student_swap_epoch"] == 25  # 150 of 240
    assert runs["wkd"]["loss_schedule.gamma"] == "cosine:600@25:0@40"


class _Instant:
    """A stand-in for a process, which leaves what a run leaves as soon as it starts."""

    started: ClassVar[list[str]] = []

    def __init__(self, command, **_):
        self.pid = os.getpid()
        self.workdir = pathlib.Path(command[command.index("--workdir") + 1])
        self.started.append(self.workdir.name)

    def poll(self):
        return 0


def finish(job):
    job.workdir.mkdir(parents=True, exist_ok=True)
    nested = {}
    for key, value in job.identity.items():
        *path, last = key.split(".")
        block = nested
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    (job.workdir / "config.json").write_text(json.dumps(nested))
    (job.workdir / "summary.json").write_text(json.dumps({"epochs": job.identity["epochs"]}))


@pytest.fixture
def schedule(monkeypatch, tmp_path):
    """A sweep's turns over jobs whose processes end at once, and what was started."""
    monkeypatch.setattr(subprocess, "Popen", _Instant)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    _Instant.started = []
    return lambda jobs, slots=1: Sweep(jobs, [{}] * slots, epath.Path(tmp_path), lambda _: None)


def test_what_is_complete_is_not_started_and_what_left_nothing_has_failed(schedule, tmp_path):
    jobs = jobs_of(tmp_path, "method=ce", grid={"seed": [0, 1]})
    finish(jobs[0])
    sweep = schedule(jobs)
    while sweep._turn():
        pass
    assert _Instant.started == ["seed=1"]
    assert [job.state for job in jobs] == ["done", "failed"]


def test_a_sweep_that_fails_leaves_no_run_without_it(schedule, tmp_path, monkeypatch):
    """Such as by a pipe that its reader has closed."""
    stopped = []
    monkeypatch.setattr(_Instant, "poll", lambda self: None)
    monkeypatch.setattr(_Instant, "send_signal", lambda self, number: stopped.append(number), raising=False)
    monkeypatch.setattr(_Instant, "wait", lambda self: 0, raising=False)

    def show(jobs):
        raise BrokenPipeError

    sweep = schedule(jobs_of(tmp_path, "method=ce", grid={"seed": [0, 1]}), 2)
    sweep.show = show
    with pytest.raises(BrokenPipeError):
        sweep.run()
    assert stopped == [signal.SIGTERM] * 2


@pytest.mark.parametrize("handled", [True, False])
def test_a_closed_terminal_stops_the_runs_unless_it_is_ignored(schedule, tmp_path, monkeypatch, handled):
    stopped, before = [], signal.signal(signal.SIGHUP, signal.SIG_DFL if handled else signal.SIG_IGN)
    monkeypatch.setattr(_Instant, "poll", lambda self: None)
    monkeypatch.setattr(_Instant, "send_signal", lambda self, number: stopped.append(number), raising=False)
    monkeypatch.setattr(_Instant, "wait", lambda self: 0, raising=False)
    sweep = schedule(jobs_of(tmp_path, "method=ce", grid={"seed": [0, 1]}), 2)

    def show(jobs):
        signal.raise_signal(signal.SIGHUP)
        raise BrokenPipeError  # where it was ignored

    sweep.show = show
    try:
        with pytest.raises(SystemExit if handled else BrokenPipeError) as ended:
            sweep.run()
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_DFL if handled else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not handled or ended.value.code == 129
    assert stopped == [signal.SIGTERM] * 2


def test_a_sweep_file_that_returns_nothing_is_refused(tmp_path):
    (tmp_path / "sweep.py").write_text("def get_sweep():\n    {}\n")
    with pytest.raises(UserError, match=r"a sweep is a dict with config, .* got None"):
        load(str(tmp_path / "sweep.py"))


def test_a_longer_run_is_missing_again(tmp_path):
    finish(jobs_of(tmp_path, "method=ce", "epochs=2")[0])
    (longer,) = jobs_of(tmp_path, "method=ce", "epochs=3")
    longer.look()
    assert longer.state == "waiting"


def test_a_teacher_is_trained_by_one_run_while_the_others_wait(schedule, tmp_path):
    jobs = jobs_of(tmp_path, grid={"method": ["kd", "dkd", "ce"]})
    sweep = schedule(jobs, slots=3)
    sweep._turn()
    assert _Instant.started == ["method=kd", "method=ce"]  # ce has no teacher
    (place,) = jobs[0].teachers
    place.mkdir(parents=True)
    with locked(place):  # by another process
        sweep._turn()
        assert "method=dkd" not in _Instant.started
    (place / "summary.json").write_text("{}")
    sweep._turn()
    assert _Instant.started[-1] == "method=dkd"


def test_a_teachers_folder_is_one_by_any_path(schedule, tmp_path):
    runs = [{"method": "kd", "teacher.workdir": tmp_path / "t"}, {"teacher.workdir": tmp_path / "runs/../t"}]
    schedule(jobs_of(tmp_path, runs=runs), slots=2)._turn()
    assert len(_Instant.started) == 1


def test_a_run_of_another_process_is_waited_for(schedule, tmp_path):
    (job,) = jobs_of(tmp_path, "method=ce")
    job.workdir.mkdir(parents=True)
    sweep = schedule([job])
    with locked(job.workdir):
        assert sweep._turn()
        assert (job.state, _Instant.started) == ("elsewhere", [])
    finish(job)
    assert not sweep._turn()
    assert (job.state, _Instant.started) == ("done", [])


def test_shards_are_disjoint_and_together_all():
    shards = [parse(["x.py", "--shard", f"{i}/3"])[0].shard for i in range(3)]
    assert shards == [(0, 3), (1, 3), (2, 3)]
    jobs = list(range(8))
    assert sorted(job for index, count in shards for job in jobs[index::count]) == jobs


def test_what_a_terminal_shows_fits_it(tmp_path):
    jobs = jobs_of(tmp_path, "method=ce", grid={"seed": list(range(9))})
    assert len(_fitting(jobs, 80, 10)) == 9
    jobs[0].state, jobs[1].state, jobs[2].state = "done", "running", "failed"
    jobs[1].workdir.mkdir()
    line = {"step": 3, "epoch": 1.0, "split": "eval", "values": {"top1": 12.345}}
    (jobs[1].workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert _fitting(jobs, 48, 9) == [
        "1 of 9 done",
        "running    seed=1  epoch 1/20  top-1 12.35"[:47],
        "failed     seed=2",
    ]
    assert _fitting(jobs, 20, 3) == ["1 of 9 done", "running    seed=1  "]


def test_the_closing_table_has_means_and_deviations_over_seeds(tmp_path, capsys, monkeypatch):
    for job in jobs_of(tmp_path, grid={"method": ["ce", "kd"], "seed": [0, 1, 2]}):
        finish(job)
        top1 = (90.0 if job.identity["method"] == "kd" else 80.0) + job.identity["seed"]
        numbers = {"best_top1": top1 + 1, "last_top1": top1, "teacher_top1": 99.0, "examples_per_second": 1e3}
        path = job.workdir / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    command = ["--config=configs/digits.py", "--grid=method=ce,kd", "--grid=seed=0,1,2", f"--workdir={tmp_path}"]
    monkeypatch.chdir(ROOT)
    assert main(command) == 0
    table = capsys.readouterr().out.partition("\n\n")[2]
    rows = [line.split(" | ") for line in table.splitlines()]
    assert [row[2:6] for row in rows] == [
        ["method", "seeds", "best top-1 %", "last top-1 %"],
        ["---"] * 4,
        ["kd", "3", "92.00 ± 1.00", "91.00 ± 1.00"],
        ["ce", "3", "82.00 ± 1.00", "81.00 ± 1.00"],
    ]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "\nmethod           kd\nseeds            3\nbest top-1 %     92.00 ± 1.00\n" in shown
    assert max(map(len, re.split(r"[\r\n]+|\x1b\[\w+", shown))) <= 40


@pytest.mark.slow
def test_a_killed_sweep_runs_only_what_is_missing(data_dir, tmp_path):
    """Real processes: the first run of two is complete when the sweep is killed, the second goes on."""
    command = [sys.executable, "-m", "ldrld_jax.sweep", "--config", "tests/tiny_config.py"]
    command += ["--grid", "seed=0,1", "--workdir", str(tmp_path), "--config.method=ce"]
    command += [f"--config.data.data_dir={data_dir}", "--config.data.train_split=train[:40]"]
    command += ["--config.data.eval_split=test[:40]", "--config.mesh.data=1"]
    first = tmp_path / "seed=0/summary.json"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as sweep:
        deadline = time.monotonic() + 120
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        sweep.send_signal(signal.SIGKILL)
    written = first.stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stderr) == (0, "")
    assert "done       seed=0" in again.stdout
    assert "done       seed=1" in again.stdout
    assert first.stat().st_mtime_ns == written
    losses = [comparable_lines(tmp_path / f"seed={seed}")[-2]["values"]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_a_run_whose_teacher_is_pinned_on_the_hub_is_complete(tmp_path):
    (job,) = jobs_of(tmp_path, "method=kd", "teacher.checkpoint=hf://me/net", runs=[{"seed": 1}])
    saved = config_lib.resolve(config_lib.load("configs/digits.py", ["method=kd", "seed=1", "teacher.checkpoint=_"]))
    job.workdir.mkdir()
    (job.workdir / "summary.json").write_text(json.dumps({"epochs": 20}))
    for name, state in (("hf://me/net@" + 40 * "a", "done"), ("hf://me/other@" + 40 * "a", "waiting")):
        saved.teacher.checkpoint = name
        (job.workdir / "config.json").write_text(saved.to_json())
        job.look()
        assert job.state == state


def test_a_slurm_array_has_a_task_for_each_missing_run_that_runs_that_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldrld_jax.sweep.plan.Job._complete", lambda job: "seed=1" in job.name)
    flags = [
        "--config",
        "configs/digits.py",
        "--grid",
        "method=ce,kd",
        "--grid",
        "seed=0,1",
        "--workdir",
        f"{tmp_path}/s",
    ]
    assert main([*flags, "--jobs=2", "--launcher=slurm", "--config.student.model=resnet8"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0,2%2\n" in text
    assert f"#SBATCH --output={tmp_path}/s/logs/slurm-%A_%a.txt\n" in text and (tmp_path / "s/logs").is_dir()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    *_, line = text.splitlines()
    words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "2"))
    assert words[:4] == ["exec", sys.executable, "-m", "ldrld_jax.sweep"]
    (job,) = jobs_in_shard(*parse(words[4:]))
    assert job.name == "method=kd,seed=0" and "--config.student.model=resnet8" in job.command


def test_a_complete_sweep_and_flags_of_this_machine_make_no_slurm_array(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldrld_jax.sweep.plan.Job._complete", lambda job: True)
    flags = ["--config", "configs/digits.py", "--workdir", f"{tmp_path}/s", "--launcher=slurm"]
    assert main(flags) == 2
    assert "every run of the sweep is complete" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of --gpus, --shard and --dry_run"):
        parse([*flags, "--shard=0/2"])


def test_a_home_directory_that_the_shell_leaves_alone_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, _ = parse(["experiments/methods.py", "--workdir=~/runs/s"])
    assert args.workdir == f"{tmp_path}/runs/s"
