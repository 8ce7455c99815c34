"""Imports run one way, and the public package is light."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "ldrld_jax"

# Folder, or module beside the folders: what it may import of ours, from the ground up.
ALLOWED = {
    "errors": set(),
    "code": {"errors"},
    "identity": set(),
    "metrics": set(),
    "examples": set(),
    "files": {"errors"},
    "losses": {"errors"},
    "models": {"code", "errors"},
    "data": {"code", "errors", "files"},
    "checkpoint": {"errors", "files"},
    "interop": {"errors", "files", "models"},
    "record": {"errors", "files", "identity", "metrics"},
    "runtime": {"errors", "files", "record"},
    "config": {"code", "errors", "files", "identity", "losses", "record"},
    "logit_store": {"errors", "files", "identity", "record", "runtime"},
    "train": {
        *("checkpoint", "code", "config", "data", "errors", "files", "identity", "interop", "logit_store", "losses"),
        *("metrics", "models", "record", "runtime"),
    },
    "aot": {"config", "data", "errors", "files", "logit_store", "metrics", "record", "runtime", "train"},
    "bench": {"config", "data", "identity", "metrics", "runtime", "train"},
    "deploy": {"code", "config", "data", "errors", "files", "interop", "models", "record", "runtime", "train"},
    "report": {
        *("checkpoint", "code", "config", "data", "errors", "files", "identity", "losses", "record", "runtime"),
        "train",
    },
    "main": {"aot", "bench", "config", "data", "deploy", "errors", "files", "record", "runtime", "train"},
    "sweep": {"code", "config", "errors", "files", "identity", "interop", "main", "models", "record", "report"},
    "completion": set(),
    "cli": {"completion", "config", "errors", "main", "record", "report", "sweep"},
}

# Imports that run up, each inside a function, so that importing the lower part does not load the higher one.
LATE = {"train": {"deploy.export.export"}}  # of Trainer.export


def imports_of(path, *, late=True):
    """Yields the modules of ours that a file imports, as `train.step`; those inside functions only if `late`."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node in inside and not late:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("ldrld_jax.") for name in names if name.startswith("ldrld_jax."))


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    path = PACKAGE / part
    files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    found, at_once = ({name for file in files for name in imports_of(file, late=late)} for late in (True, False))
    assert LATE.get(part, set()) <= found - at_once
    imported = {name.partition(".")[0] for name in found - LATE.get(part, set())}
    assert imported - {part} <= ALLOWED[part]


def test_every_folder_and_module_is_in_the_table_below_what_imports_it():
    parts = {path.stem for path in PACKAGE.iterdir() if (path.is_dir() or path.suffix == ".py") and path.stem[0] != "_"}
    assert parts == set(ALLOWED)
    above = list(ALLOWED)
    assert all(above.index(lower) < above.index(part) for part, lowers in ALLOWED.items() for lower in lowers)


def test_no_module_imports_itself_by_way_of_others():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in modules.items():
        imported = {f"{found}." for found in imports_of(path)}  # `losses.ldrld.ldrld_loss.` imports `losses.ldrld`
        graph[name] = {other for other in modules if any(found.startswith(f"{other}.") for found in imported)} - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_importing_the_package_loads_not_even_jax_and_the_losses_load_nothing_else():
    """Checks names, since the package's own share is a millisecond: a test in seconds would measure the machine."""
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
