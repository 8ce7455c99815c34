"""Imports run one way, and the public package is light."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "ldrld_jax"

# module or subpackage: what it may import of ours
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
    "signals": set(),
    "hosts": {"console", "errors", "signals"},
    "watchdog": set(),
    "console": set(),
    "compile_cache": set(),
    "profiling": {"console"},
    "devices": set(),
    "purify": set(),
    "checksum": set(),
    "notes": {"files"},
    "orbax_io": {"notes"},
    "checkpoint": {"checksum", "errors", "notes", "orbax_io"},
    "model_table": {"models", "purify"},
    "identity": set(),
    "torch_files": {"errors"},
    "torch_import": {"errors", "models", "purify", "torch_files"},
    "config": {"errors", "files", "identity", "losses"},
    "objective": {"config", "errors", "losses"},
    "train_step": {"losses", "metrics", "objective"},
    "recorder": {"console", "metrics"},
    "precision": {"errors"},
    "networks": {"errors", "checkpoint", "config", "models", "precision", "purify", "torch_import", "train_step"},
    "evaluator": {"data", "mesh", "metrics", "train_step"},
    "logit_store": {"errors"},
    "run": {
        *("checkpoint", "config", "data", "errors", "files", "hosts", "logit_store", "mesh", "metrics", "networks"),
        *("objective", "optim", "train_step"),
    },
    "logit_feed": {"console", "errors", "logit_store", "mesh", "run", "train_step"},
    "dispatch": {"data", "logit_feed", "mesh", "metrics", "run", "train_step"},
    "loop": {
        *("checkpoint", "config", "console", "dispatch", "errors", "evaluator", "files", "hosts", "logit_feed"),
        *("mesh", "objective", "optim", "profiling", "recorder", "run", "signals", "train_step", "watchdog"),
    },
    "trainer": {
        *("compile_cache", "config", "console", "errors", "evaluator", "hosts", "logit_feed", "loop", "precision"),
        *("run", "signals", "train_step"),
    },
    "preprocessing": {"data", "train_step"},
    "model_card": set(),
    "export": {
        *("config", "data", "errors", "files", "hosts", "model_card", "networks", "precision", "preprocessing"),
        *("torch_import", "train_step"),
    },
    "predict": {"data", "errors", "export", "preprocessing"},
    # Finding runs and the table import none of these; only `outputs` runs networks.
    "report": {
        *("checkpoint", "compile_cache", "config", "data", "errors", "files", "identity", "loop", "losses", "mesh"),
        *("precision", "run", "train_step"),
    },
    "bench_result": set(),
    "bench": {
        *("bench_result", "config", "data", "devices", "dispatch", "loop", "mesh", "metrics", "optim"),
        *("precision", "profiling", "run", "train_step"),
    },
    "sweep": {"config", "errors", "files", "main", "metrics", "report"},
    "main": {"bench", "config", "console", "data", "errors", "export", "hosts", "predict", "trainer"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "ldrld_jax":
            names = [f"ldrld_jax.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name and name.startswith("ldrld_jax."))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    files = (PACKAGE / part).rglob("*.py") if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    imported = {name for path in files if path.exists() for name in imports_of(path)}
    assert imported - {part} <= ALLOWED[part]


def test_every_module_is_in_the_table():
    modules = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {name for name in modules if not name.startswith("_")} <= set(ALLOWED)


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
