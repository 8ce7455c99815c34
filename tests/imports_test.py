"""Imports run one way, and the public package is light."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "ldrld_jax"

# Module or subpackage: what it may import of ours. `losses`, `models`, `data`, `report` and `sweep` are whole.
ALLOWED = {
    "errors": set(),
    "losses": {"errors"},
    "models": {"errors"},
    "data": {"errors"},
    "files": {"errors"},
    "events": {"files"},
    "metrics": {"errors", "events", "files"},
    "optim": {"errors"},
    "mesh": {"errors"},
    "console": set(),
    "runtime.signals": set(),
    "runtime.hosts": {"console", "errors", "runtime.signals"},
    "runtime.watchdog": set(),
    "runtime.compile_cache": set(),
    "runtime.devices": set(),
    "runtime.profiling": {"console"},
    "purify": set(),
    "checkpoint.checksum": set(),
    "checkpoint.note": {"files"},
    "checkpoint.orbax_io": {"checkpoint.note", "files"},
    "checkpoint.folder": {"checkpoint.checksum", "checkpoint.note", "checkpoint.orbax_io", "errors"},
    "model_table": {"models", "purify"},
    "identity": set(),
    "torch_files": {"errors"},
    "torch_import": {"errors", "models", "purify", "torch_files"},
    "config": {"errors", "files", "identity", "losses"},
    "objective": {"config", "errors", "losses"},
    "train_step": {"errors", "losses", "metrics", "objective"},
    "recorder": {"console", "metrics"},
    "precision": {"errors"},
    "networks": {
        *("checkpoint.folder", "config", "errors", "models", "precision", "purify", "torch_import", "train_step"),
    },
    "evaluator": {"data", "mesh", "metrics", "train_step"},
    "logit_store.store": {"errors", "files", "identity"},
    "run": {
        *("checkpoint.folder", "config", "data", "errors", "files", "logit_store.store", "mesh", "metrics"),
        *("networks", "objective", "optim", "runtime.hosts", "train_step"),
    },
    "logit_store.feed": {"console", "errors", "logit_store.store", "mesh", "run", "train_step"},
    "dispatch": {"data", "logit_store.feed", "mesh", "metrics", "run", "train_step"},
    "loop": {
        *("checkpoint.folder", "config", "console", "dispatch", "errors", "evaluator", "files", "logit_store.feed"),
        *("mesh", "objective", "optim", "recorder", "run", "runtime.hosts", "runtime.profiling", "runtime.signals"),
        *("runtime.watchdog", "train_step"),
    },
    "trainer": {
        *("config", "console", "errors", "evaluator", "logit_store.feed", "loop", "precision", "run"),
        *("runtime.compile_cache", "runtime.hosts", "runtime.signals", "train_step"),
    },
    "aot.hlo": set(),
    "aot.targets": {"errors", "runtime.devices"},
    "aot.programs": {
        *("config", "data", "dispatch", "evaluator", "logit_store.feed", "loop", "mesh", "metrics", "optim", "run"),
        "train_step",
    },
    "aot.cost": {"aot.hlo", "aot.programs", "aot.targets"},
    "aot.report": {
        *("aot.cost", "aot.programs", "aot.targets", "config", "console", "errors", "files", "precision", "run"),
    },
    "deploy.preprocessing": {"data", "train_step"},
    "deploy.model_card": set(),
    "deploy.export": {
        *("config", "data", "deploy.model_card", "deploy.preprocessing", "errors", "files", "networks", "precision"),
        *("runtime.hosts", "torch_import", "train_step"),
    },
    "deploy.predict": {"data", "deploy.export", "deploy.preprocessing", "errors"},
    # Finding runs and the table import none of these; only `outputs` runs networks.
    "report": {
        *("checkpoint.folder", "config", "data", "errors", "files", "identity", "loop", "losses", "mesh"),
        *("precision", "run", "runtime.compile_cache", "train_step"),
    },
    "bench.result": set(),
    "bench.step": {
        *("bench.result", "config", "data", "dispatch", "loop", "mesh", "metrics", "optim"),
        *("precision", "run", "runtime.devices", "runtime.profiling", "train_step"),
    },
    "sweep": {"config", "errors", "files", "main", "metrics", "report"},
    "main": {
        *(
            "aot.report",
            "bench.step",
            "config",
            "console",
            "data",
            "deploy.export",
            "deploy.predict",
            "errors",
            "runtime.hosts",
        ),
        "trainer",
    },
}


def imports_of(path):
    """The parts of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (part_of(name.removeprefix("ldrld_jax.")) for name in names if name.startswith("ldrld_jax."))


def part_of(name):
    """Of `logit_store.feed.LogitFeed` the module or subpackage that is in the table."""
    two = ".".join(name.split(".")[:2])
    return two if two in ALLOWED else name.split(".")[0]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    path = PACKAGE / part.replace(".", "/")
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    imported = {name for file in files for name in imports_of(file)}
    assert imported - {part} <= ALLOWED[part]


def test_every_module_is_in_the_table():
    modules = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    parts = {part_of(".".join(module.parts)) for module in modules if not module.name.startswith("_")}
    assert parts == set(ALLOWED)


def test_importing_the_package_loads_not_even_jax_and_the_losses_load_nothing_else():
    """Its own share of an import is a millisecond; a test in seconds would measure the machine."""
    code = "import sys, ldrld_jax; print([*sys.modules]); ldrld_jax.ldrld_loss; print([*sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    package, losses = ({name.partition(".")[0] for name in ast.literal_eval(line)} for line in printed.splitlines())
    heavy = {"flax", "orbax", "tensorflow_datasets", "tensorflow", "grain", "matplotlib", "torch", "optax", "sklearn"}
    heavy |= {"PIL", "ml_collections", "safetensors", "tensorboardX", "tensorstore", "tqdm"}
    assert "jax" in losses
    assert not (heavy | {"jax", "numpy"}) & package
    assert not heavy & losses


def test_every_public_name_resolves():
    import ldrld_jax

    for name in ldrld_jax.__all__:
        assert getattr(ldrld_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ldrld_jax.nothing
