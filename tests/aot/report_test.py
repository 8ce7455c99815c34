"""`--mode compile` on CPU devices: the programs are the run's own, and what does not fit gets a change that does."""

import dataclasses
import json
import sys

import jax
import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.aot import cost as cost_lib
from ldrld_jax.aot import report
from ldrld_jax.aot.programs import programs_of
from ldrld_jax.aot.targets import Target
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.devices import DEVICES
from ldrld_jax.train import trainer
from ldrld_jax.train.dispatch import Dispatcher
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.plan import Run
from tests.conftest import run_main

DIGITS = ("method=ldrld", "loss.ldrld.depth=4", "mesh.data=2")


@pytest.fixture
def described(tiny):
    """`described(*overrides)`: the tiny config as for a place where no data are."""

    def make(*overrides):
        return tiny(*DIGITS, "data.data_dir=/nowhere", "teacher.model=tiny_net", "teacher.epochs=1", *overrides)

    return make


def plan(config, devices=2):
    return Run.plan(config_lib.resolve(config), epath.Path(""), absent=jax.devices()[:devices])


@pytest.mark.parametrize(
    "overrides",
    [
        ("batch_size=40", "ema_decay=.9", "accumulate=2", "remat=True"),
        ("data.loader=resident", "steps_per_dispatch=2", "batch_size=30", "mesh.fsdp=True"),
        ("method=ldrld+ctkd", "data.on_error=skip", "data.cache_mb=0", "precision=bfloat16"),
        ("method=mlkd", "loss.mlkd.views=2", "batch_size=20"),
    ],
)
def test_the_programs_are_those_that_a_run_dispatches(overrides, tiny, described, tmp_path, monkeypatch):
    """Every program that a run calls has the shapes, dtypes and shardings of one that is compiled ahead."""
    called = {"one": [], "_several": [], "step": [], "split": []}
    for cls, attribute in ((Dispatcher, "one"), (Dispatcher, "_several"), (Evaluator, "step"), (Evaluator, "split")):
        record_calls(monkeypatch, cls, attribute, called[attribute])
    run = ("teacher.model=tiny_net", "teacher.epochs=1", "epochs=1", *overrides)
    trainer.train(tiny(*DIGITS, *run), tmp_path / "run")
    with report.precision_scope(described(*overrides).precision):
        ahead = [specs(tuple(program.arguments.values())) for program in programs_of(plan(described(*run)))]
    seen = [call for calls in called.values() for call in calls]
    for program in ahead[:1] + ahead[-1:]:
        assert program in seen
    assert not called["_several"] or ahead[1] in called["_several"]


def record_calls(monkeypatch, cls, attribute, calls):
    """Adds to `calls` what the program under an attribute is called with, in every object of a class."""
    make = cls.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        program = getattr(self, attribute, None)

        def recorded(*arguments):
            calls.append(specs(arguments))
            return program(*arguments)

        setattr(self, attribute, recorded)

    monkeypatch.setattr(cls, "__init__", init)


def specs(tree):
    """Returns the arguments of a program: shapes, dtypes and shardings, in order, and the structure."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, str(leaf.dtype), getattr(leaf, "sharding", None)) for leaf in leaves]


def test_the_memory_is_the_compilers(described):
    config = described()
    target = Target.find("cpu:2")
    costs = list(report.costs_of(config, target))
    assert [cost.name for cost in costs] == ["train step", "evaluation"]
    program = next(programs_of(plan(config)))
    compiled = program.jitted.lower(*program.arguments.values()).compile()
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    own += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    assert costs[0].total_bytes == own + costs[0].beside_bytes
    assert sum(costs[0].arguments.values()) == memory.argument_size_in_bytes
    assert costs[0].flops == pytest.approx(program.count_flops("cpu") / 2)
    assert costs[0].collectives[0].kind == "all-reduce"


def test_flops_do_not_depend_on_how_a_batch_is_taken(described):
    ways = (), ("accumulate=2", "remat=True")
    flops = [next(programs_of(plan(described(*how)))).count_flops("cpu") for how in ways]
    assert flops[0] == flops[1] > 5e5
    resident = described("data.loader=resident", "steps_per_dispatch=2", "batch_size=30")
    by_name = {program.name: program for program in programs_of(plan(resident))}
    one, two = (by_name[name].count_flops("cpu") for name in ("train step", "2 train steps"))
    assert two == 2 * one


def small(memory):
    """Two CPU devices that claim to be GPUs with so much memory."""
    facts = dataclasses.replace(DEVICES["h100"], memory=int(memory / 0.75))
    return Target("small:2", jax.devices()[:2], facts, {})


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, 0.75),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, 0.5),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".25"}, 0.25),
        ({"XLA_CLIENT_MEM_FRACTION": ".5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}, 0.5),
    ],
)
def test_a_run_may_use_the_share_of_a_gpu_that_jax_reserves(environment, share, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cost_lib.usable_memory(small(0.75 * 2**30)) == share * 2**30


@pytest.mark.parametrize("overrides", [("batch_size=80",), ("batch_size=80", "remat=True", "mesh.fsdp=True")])
def test_a_run_that_does_not_fit_gets_a_change_that_fits(overrides, described, monkeypatch, capsys, tmp_path):
    config = described(*overrides, "data.cache_mb=0", "eval_batch_size=2", "data.remainder=drop")
    needed = next(report.costs_of(config, small(1e12))).total_bytes
    monkeypatch.setattr(Target, "find", lambda name: small(0.9 * needed))
    with pytest.raises(
        report.DoesNotFitError, match=r"the train step needs .* With --config\.(\S+).* it fits"
    ) as error:
        report.report(config, "small:2", str(tmp_path / "costs.json"))
    change = [word.removeprefix("--config.") for word in str(error.value).split() if word.startswith("--config.")]
    assert next(report.costs_of(config_lib.overridden(config, change), small(0.9 * needed))).fits
    assert "DOES NOT FIT" in capsys.readouterr().out
    programs = json.loads((tmp_path / "costs.json").read_text())["programs"]
    assert [program["fits"] for program in programs] == [False, True]


def test_a_report_that_compiles_nothing_leaves_that_of_before(described, tmp_path):
    (tmp_path / "costs.json").write_text("good")
    with pytest.raises(UserError, match="there is no model 'nonet'"):
        report.report(described("student.model=nonet"), "cpu:2", str(tmp_path / "costs.json"))
    assert (tmp_path / "costs.json").read_text() == "good"


def test_a_program_that_the_compiler_refuses_is_no_traceback(described, monkeypatch):
    measure = report.measure

    def refuse(program, *rest):
        if program.arguments["batch"]["image"].shape[0] > 24:
            raise cost_lib.TooLargeError(program.name, 1000, None)
        return measure(program, *rest)

    monkeypatch.setattr(report, "measure", refuse)
    monkeypatch.setattr(Target, "find", lambda name: small(1e12))
    with pytest.raises(report.DoesNotFitError, match=r"needs more than the .* With --config\.batch_size=20 it fits"):
        report.report(described("eval_batch_size=2", "data.cache_mb=0"), "small:2")


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("tpu", "there is no target 'tpu'"),
        ("h100:x", "--target h100:x asks for 'x' GPUs. Give a number: h100:8."),
        ("cpu:0", "--target cpu:0 asks for '0' CPU devices"),
        ("cpu:999", "this process has started with 8 CPU devices"),
    ],
)
def test_a_wrong_target_is_one_line(target, line):
    with pytest.raises(UserError) as error:
        Target.find(target)
    assert line in str(error.value)


@pytest.mark.parametrize(("target", "package"), [("v5e:2x4", "libtpu"), ("a100", "jax_cuda12_plugin")])
def test_a_missing_compiler_names_its_extra(target, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"--target {target} needs {package}: pip install 'ldrld_jax\[compile\]'\.$"):
        Target.find(target)


def test_an_unknown_data_set_asks_for_what_is_missing(tiny):
    folder = ("data.name=image_folder", "data.data_dir=/nowhere", "data.crop_size=8", "data.mean=(.5,)")
    for key, value in (("classes", "3"), ("train_images", "90"), ("eval_images", "50")):
        with pytest.raises(UserError, match=rf"gives compile\.{key}\. Set --config\.compile\.{key}"):
            plan(tiny(*folder))
        folder += (f"compile.{key}={value}",)
    run = plan(tiny(*folder))
    assert (len(run.batches.source), len(run.eval_source), len(run.batches.source.class_names)) == (90, 50, 3)
    with pytest.raises(UserError, match="only described"):
        run.eval_source.read(jax.numpy.arange(2))


def test_the_command_line_compiles_without_data(tmp_path):
    done = run_main("--mode", "compile", "--target", "cpu:4", "--config.data.data_dir=/nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train step: compiled in" in done.stdout
    assert "4 x cpu" in done.stdout
    assert "x all-reduce" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--mode", "compile"], ["--target", "h100"]])
def test_the_mode_and_its_target_go_together(flags, capsys):
    assert main_lib.main(flags) == 2
    assert "go together" in capsys.readouterr().err
