"""The figures of experiments/README.md are those of the logs beside it, which name no folder of a machine."""

import json
import re
import runpy

import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.logit_store import store
from ldrld_jax.report import collect, table
from ldrld_jax.sweep.plan import plan
from ldrld_jax.train.objective import make_objective
from tests.conftest import ROOT, tiny_overrides

README = (ROOT / "experiments/README.md").read_text()
# A command that reports a folder, and the next table.
TABLES = dict(re.findall(r"ldrld_jax\.report experiments/([\w/]+)[^\n]*\n.*?\n((?:\|[^\n]*\n)+)", README, re.DOTALL))


# What the page says of the warnings of a folder's runs.
NOTED = {"every": (": warning: loss.ldrld.", ": warning: teacher.optim.learning_rate is set and not read, because ")}
NOTES = ": warning: optim.", ": warning: the teacher's batches of"


@pytest.mark.parametrize("folder", TABLES)
def test_a_table_is_what_the_report_prints_of_its_folder(folder):
    report = collect([ROOT / "experiments" / folder])
    assert all(any(text in note for text in NOTED.get(folder, NOTES)) for note in report.notes)
    assert TABLES[folder].strip() == table(report.summaries)


def test_every_run_on_a_fifth_of_cifar_can_use_the_store_that_its_command_names():
    sweep = runpy.run_path(str(ROOT / "experiments/every_method.py"))["get_sweep"]("laptop")
    stored = 0
    for own in sweep["runs"]:
        flags = {"logits.dir": "x", "teacher.checkpoint": "x"} | own
        config = config_lib.resolve(
            config_lib.load(sweep["config"], [f"{key}={value}" for key, value in flags.items()])
        )
        objective = make_objective(config)
        changes, last = dict(teacher_changes=False, from_file=False), objective.needs_last_layer
        store.check(config, views=objective.views, last_layer=last, top_needed=objective.top_needed, **changes)
        stored += "dir" in config.logits
    assert stored == len(sweep["runs"]) - 4  # ce has no teacher; wkd, crld and sld do without


@pytest.mark.parametrize(
    "grid",
    [
        {"teacher.data.label_noise_rate": [0.1, 0.4]},
        {"data.label_noise": ["symmetric"], "data.label_noise_rate": [0.1, 0.4]},  # which the teacher's data inherit
        {"eval_every_epochs": [1, 2]},  # the teacher is its best epoch's
        {"seed": [0, 1], "data.augment_seed": [0]},
    ],
)
def test_runs_with_several_trained_teachers_have_as_many_logit_stores(grid, tmp_path):
    overrides = {"teacher.epochs": 2, "teacher.data.label_noise": "symmetric", "logits.dir": "store"}
    sweep = {"config": "configs/digits.py", "overrides": overrides, "grid": grid}
    jobs = plan(sweep, epath.Path(tmp_path), [])
    stores = {flag for job in jobs for flag in job.command if "logits.dir=store/" in flag}
    assert len(stores) == len({str(job.teachers) for job in jobs})


def test_the_ablation_of_noisy_teachers_has_a_logit_store_for_each(tmp_path):
    sweep = runpy.run_path(str(ROOT / "experiments/ablations.py"))["get_sweep"]("noisy_teacher")
    jobs = plan(sweep, epath.Path(tmp_path), ["logits.dir=store"])
    stores = {flag for job in jobs for flag in job.command if "logits.dir=store/" in flag}
    assert len(stores) == len({str(job.teachers) for job in jobs}) == 4


def test_every_folder_of_logs_has_its_table():
    folders = {path.parent.parent.name for path in (ROOT / "experiments").glob("*/*/summary.json")}
    assert folders == set(TABLES)


def test_what_is_kept_of_a_run_is_its_figures_without_its_places(tmp_path):
    keep = runpy.run_path(str(ROOT / "experiments/keep.py"))["main"]
    run = tmp_path / "runs/method=kd,loss_schedule.kd_weight=linear:0@1:1@9"
    run.mkdir(parents=True)
    config = {"seed": 3, "compile_cache": "~/x", "data": {"data_dir": "/x"}, "logits": {}}
    teacher = {"model": "resnet20", "checkpoint": "/x,y/resnet,20.pth"}  # of one model: no comma parts it
    (run / "config.json").write_text(json.dumps(config | {"teacher": teacher}))
    lines = [{"step": 1, "split": "train"}, {"step": 2, "split": "eval", "values": {"top1": 5.0}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text('{"last_top1": 5.0}')
    (tmp_path / "runs/method=ce").mkdir()  # not finished
    keep(str(tmp_path / "runs"), str(tmp_path / "kept"))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["method=kd,loss_schedule.kd_weight=linear_0@1_1@9"]
    kept = {path.name: path.read_text() for path in next((tmp_path / "kept").iterdir()).iterdir()}
    assert set(kept) == {"config.json", "metrics.jsonl", "summary.json"}
    expected = {"seed": 3, "compile_cache": None, "data": {"data_dir": None}, "logits": {}}
    assert json.loads(kept["config.json"]) == expected | {"teacher": teacher | {"checkpoint": "resnet,20.pth"}}
    assert json.loads(kept["metrics.jsonl"]) == lines[1]
    assert json.loads(kept["summary.json"]) == {"last_top1": 5.0}


def test_no_path_of_a_run_is_kept_and_a_torn_one_is_named(tmp_path):
    keep = runpy.run_path(str(ROOT / "experiments/keep.py"))["main"]
    teachers = {"model": "resnet20,resnet56", "checkpoint": "/x/r20.pth,/y/r56.pth"}
    config = {"student": {"checkpoint": "/x,y/a,b.pth"}, "teacher": teachers}
    config["data"] = {"name": "arrays:/x/b.npz"}
    for name in ("a", "b", "c"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config) if name != "b" else "{")
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("")
        (tmp_path / "runs" / name / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match=rf"^{tmp_path}/runs/b is left out: Expecting property name"):
        keep(str(tmp_path / "runs"), str(tmp_path / "kept"))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a", "c"]
    kept = json.loads((tmp_path / "kept/c/config.json").read_text())
    assert (kept["student"]["checkpoint"], kept["teacher"]["checkpoint"]) == ("a,b.pth", "r20.pth,r56.pth")
    assert kept["data"]["name"] == "arrays:b.npz"


def test_no_log_names_a_folder_of_a_machine():
    for path in (ROOT / "experiments").rglob("*.json"):
        assert not re.search(r'"/|://|~', path.read_text()), path


def test_a_search_goes_on_where_it_was_and_prunes_after_an_epoch(tiny, data_dir, teacher_dir, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    search = runpy.run_path(str(ROOT / "experiments/optuna_digits.py"))["search"]
    few = [*tiny_overrides(data_dir), "student.model=tiny_net", "method=ldrld", f"teacher.checkpoint={teacher_dir}"]
    few += ["data.held_out=.4", "eval_every_epochs=1"]
    (first,) = search(1, tmp_path, few).trials
    summary = json.loads((tmp_path / "trial-0/summary.json").read_text())
    assert first.value == summary["last_top1"] and list(first.intermediate_values) == [1, 2]
    saved = json.loads((tmp_path / "trial-0/config.json").read_text())["loss"]["ldrld"]
    assert {name: saved[name] for name in first.params} == first.params
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    again, second = search(2, tmp_path, few).trials
    assert again.value == first.value
    assert second.state == optuna.trial.TrialState.PRUNED and list(second.intermediate_values) == [1]


def test_a_trial_that_failed_is_made_up_for(tiny, data_dir, teacher_dir, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    search = runpy.run_path(str(ROOT / "experiments/optuna_digits.py"))["search"]
    few = [*tiny_overrides(data_dir), "student.model=tiny_net", "method=ldrld", f"teacher.checkpoint={teacher_dir}"]
    few += ["data.held_out=.4", "epochs=1"]
    with pytest.raises(UserError, match="batch_size"):
        search(1, tmp_path, [*few, "batch_size=0"])
    states = [trial.state.name for trial in search(1, tmp_path, few).trials]
    assert states == ["FAIL", "COMPLETE"]
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    with pytest.raises(UserError, match=r"no trial in .* has run to its end\. Name more by --trials"):
        search(1, tmp_path / "other", few)
