"""Strict numerics for the whole suite: rank promotion raises, warnings are errors, eight fake devices."""

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

# Before jax starts its backend. Runs started as subprocesses inherit all of it. Compiled programs
# are shared between tests, workers and subprocesses: most of the suite's time would be compilation.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") < "0.12":  # which has no such flag any more
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ldrld_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = ".05"  # smaller programs compile as soon as they are read
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # with those flags a small program compiles in a fifth of the time

import jax
import numpy as np
import pytest
from etils.epath import gpath
from jax._src import lru_cache

from tests.object_store import ObjectStore


def put_whole(cache: lru_cache.LRUCache, key: str, program: bytes) -> None:
    """Writes a program to JAX's compile cache in one step; after JAX's own, another process may read half of it."""
    place = cache.path / f"{key}{lru_cache._CACHE_SUFFIX}"
    if not place.exists():
        temporary = cache.path / f"{key}.{os.getpid()}"
        temporary.write_bytes(program)
        temporary.replace(place)


lru_cache.LRUCache.put = put_whole

jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8  # JAX starts now, before a test of `--target cpu:4` could start it with four
gc.set_threshold(50_000, 20, 20)  # see forget_programs

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Tests of the text that XLA compiles see what users get; and networks in notebooks compute more than they compile.
OPTIMISED = "aot/hlo_test.py", "aot/programs_test.py", "compiled", "notebooks_test.py"

# Compiler options of single programs elsewhere whose last digits are to be a user's.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if "fusion_emitters" in os.environ["XLA_FLAGS"]:
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


@pytest.fixture(autouse=True, scope="module")
def optimised(request):
    """Compiles the programs of some modules, and of their subprocesses, with all of XLA's optimisations."""
    few = not any(request.path.is_relative_to(ROOT / "tests" / path) for path in OPTIMISED)
    jax.config.update("jax_disable_most_optimizations", few)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(few))


@pytest.fixture(autouse=True, scope="session")
def two_cores():
    """Sets the number of cores by which threads and workers are chosen, so that the machine's own does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldrld_jax.data.ahead.available_cores", lambda: 2)
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees what a module traced and compiled; compiled programs stay on disk.

    Garbage collection takes 4 % of the CPU time, and 13 % with Python's thresholds and nothing frozen.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> pathlib.Path:
    """Makes a local folder that stands for gs://bucket, without gcsfs, wherever epath or a checkpoint's arrays go."""
    from ldrld_jax.checkpoint import orbax_io

    store = ObjectStore(tmp_path / "remote")
    monkeypatch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)

    def on_disk(call, path, *args, **options):
        return call(store.local(path) if str(path).startswith("gs://") else path, *args, **options)

    for name in ("save_checkpointables_async", "load_checkpointables"):
        call = getattr(orbax_io.ocp, name)
        monkeypatch.setattr(orbax_io.ocp, name, functools.partial(on_disk, call))
    return store.local("gs://bucket")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion raises, as it must never happen in our own losses, metrics and models."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """The folder in which the digits are prepared, once a worker."""
    from ldrld_jax.data.sources import open_source

    path = str(tmp_path_factory.mktemp("datasets"))
    open_source("digits", "train", path)
    return path


@pytest.fixture(scope="session")
def cifar100_dir() -> str:
    """The real CIFAR-100, as TFDS prepares it."""
    path = SHARED / "tensorflow_datasets"
    if not (path / "cifar100").is_dir():
        pytest.skip(f"CIFAR-100 is not there: prepare it with tfds build cifar100 --data_dir {path}")
    return str(path)


@pytest.fixture
def tiny(data_dir, monkeypatch):
    """`tiny(*overrides)`: the digits config cut to seconds, plain training of a net that compiles in one."""
    from ldrld_jax import config as config_lib
    from ldrld_jax.models import MODELS
    from tests.tiny_net import TinyNet

    monkeypatch.setitem(MODELS, "tiny_net", TinyNet)

    def make(*overrides: str):
        return config_lib.load("configs/digits.py", [*tiny_overrides(data_dir), "student.model=tiny_net", *overrides])

    return make


def tiny_overrides(data_dir: str) -> list[str]:
    return [
        f"data.data_dir={data_dir}",
        "data.train_split=train[:90]",
        "data.eval_split=test[:50]",
        "batch_size=40",  # two full batches and a remainder of ten
        "eval_batch_size=24",
        "epochs=2",
        "method=ce",
        "mesh.data=2",  # programs for eight devices take twice as long to compile; some tests ask for them
        "log.every_steps=1",
        "log.tensorboard=False",
        "teacher.model=tiny_net",
        "teacher.min_top1=0.",
    ]


@pytest.fixture(scope="session")
def teacher_dir(data_dir, tmp_path_factory) -> str:
    """The workdir of a plain run of TinyNet, once a worker."""
    from ldrld_jax import config as config_lib
    from ldrld_jax.models import MODELS
    from ldrld_jax.train import trainer
    from tests.tiny_net import TinyNet

    workdir = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        # A rate at which so small a net learns something in six steps.
        flags = [*tiny_overrides(data_dir), "student.model=tiny_net", "optim.learning_rate=.5", "optim.warmup=none"]
        trainer.train(config_lib.load("configs/digits.py", flags), workdir)
    return str(workdir)


def run_main(
    *args: str, timeout: float = 300, cwd: pathlib.Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The command line in a process of its own, with `env` added to the environment."""
    command = [sys.executable, "-m", "ldrld_jax.main", *map(str, args)]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd or ROOT, env=env)


def killed_copy(workdir: pathlib.Path, copy: pathlib.Path, step: int) -> pathlib.Path:
    """Copies a run as it would be if it had died before the first save after `step`; the record is ahead of it."""
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return copy


def comparable_lines(workdir: pathlib.Path | str) -> list[dict]:
    """The lines of `metrics.jsonl` without the values that measure time."""
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["values"] = {k: v for k, v in line["values"].items() if not k.endswith(("_per_second", "_seconds"))}
    return lines
