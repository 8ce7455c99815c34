"""Checks that the package behaves on this device as on a CPU."""

import concurrent.futures
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.deploy import export
from ldrld_jax.losses import METHODS
from ldrld_jax.record.reader import read_metrics
from ldrld_jax.train import trainer
from stages import piece
from stages.piece import Values, Work

SIZES = ((64, 100), (64, 10), (256, 1000))


def machine(work: Work) -> Iterator[Values]:
    """Records the machine's properties and checks that everything imports."""
    import grain  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    values: Values = {"devices": [device.device_kind for device in jax.devices()]}
    try:
        import torch

        values["torch_sees"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    except ImportError as error:
        values["torch_sees"] = f"torch is missing: {error}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        values["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        values["nvidia_smi"] = str(error)
    values["copy_gb_per_second"] = _copy_speed(2**20 if work.shrink else 2**28)
    yield values


def _copy_speed(count: int) -> float:
    """Returns the GB/s read and written by a program that adds 1 to `count` float32 values."""
    copy = jax.jit(lambda x: x + 1)
    x = jax.block_until_ready(copy(jnp.zeros(count)))
    begun = time.perf_counter()
    for _ in range(10):
        x = copy(x)
    jax.block_until_ready(x)
    return 10 * 8 * count / (time.perf_counter() - begun) / 1e9


def losses(work: Work) -> Iterator[Values]:
    """Compares value and gradient of every method, LDRLD first, with the CPU's; compiles programs in parallel."""
    values = work.before
    sizes = ((8, 10),) if work.shrink else SIZES
    cases = [(name, size) for size in sizes for name in sorted(METHODS, key=lambda name: (name != "ldrld", name))]
    cases = [case for case in cases if _title(*case) not in values]
    jax.config.update("jax_default_matmul_precision", "float32")  # a context manager would apply to this thread only
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for case, found in zip(cases, pool.map(lambda case: _against_cpu(*case), cases), strict=True):
            values[_title(*case)] = found
            yield values
    worst = max((found["error"] for found in values.values() if "error" in found), default=None)
    yield values | {"worst": {"error": worst, "failed": [n for n, found in values.items() if "failed" in found]}}


def _title(name: str, size: tuple[int, int]) -> str:
    return f"{name} {size[0]}x{size[1]}"


def _against_cpu(name: str, size: tuple[int, int]) -> Values:
    """Returns the larger relative error of value and gradient, or `failed` if it does not compile or run."""
    method = METHODS[name]
    cfg = method.config()
    rows, classes = size
    rng = np.random.default_rng(0)
    shape = (method.views(cfg), rows, classes) if method.views(cfg) > 1 else size
    teacher, student = (rng.standard_normal(shape, np.float32) * 4 for _ in range(2))
    labels = rng.integers(0, classes, rows).astype(np.int32)

    def loss(student: Any, teacher: Any, labels: Any) -> Any:
        params = method.init(cfg) if method.init else None
        if method.from_teacher is not None:
            params = method.from_teacher(jnp.eye(classes))
        return method.loss(teacher, student, labels, cfg, params=params)

    found = []
    try:
        for device in (jax.devices("cpu")[0], jax.devices()[0]):
            arrays = jax.device_put((student, teacher, labels), device)
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(*arrays)))
    except Exception as error:  # XLA raises many types; the next method may work
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    (expected, slope), (value, gradient) = found
    errors = [abs(value - expected) / abs(expected), np.linalg.norm(gradient - slope) / np.linalg.norm(slope)]
    return {"value": float(value), "error": float(np.max(errors))}


def _config(work: Work, *overrides: str) -> ConfigDict:
    return config_lib.load(_config_file(work), [*_overrides(work), *overrides])


def _config_file(work: Work) -> str:
    return "tests/tiny_config.py" if work.shrink else "configs/digits.py"


def _overrides(work: Work) -> list[str]:
    """Returns overrides for ResNet8 to ResNet8 on the digits, or for a tiny net that compiles in a second."""
    model = "tiny_net" if work.shrink else "resnet8"
    small = ["data.train_split=train[:128]", "data.eval_split=test[:64]"] if work.shrink else []
    return [
        *(f"data.data_dir={work.scratch / 'datasets'}", "method=ldrld", f"student.model={model}"),
        *(f"teacher.model={model}", "teacher.epochs=1", "teacher.min_top1=0.", "log.tensorboard=False", *small),
        *("epochs=2", "log.every_steps=1"),
    ]


def resume(work: Work) -> Iterator[Values]:
    """Compares a run that is killed and resumed with an uninterrupted run."""
    more = [f"epochs={8 if work.shrink else 24}", f"teacher.workdir={work.scratch / 'teacher'}", "data.cache_mb=0"]
    more.append("checkpoint.min_seconds=0.")  # else a fast device writes its first checkpoints after the last step
    flags = [f"--config.{override}" for override in [*_overrides(work), *more]]
    command = [sys.executable, "-m", "ldrld_jax.main", "--config", _config_file(work), *flags, "--workdir"]
    attempt = len(list(work.scratch.glob("*.straight")))
    straight, killed = (work.scratch / f"{attempt}.{name}" for name in ("straight", "killed"))
    subprocess.run([*command, str(straight)], check=True)
    process = subprocess.Popen([*command, str(killed)])
    while process.poll() is None and len(_steps(killed)) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError("the run had ended before it could be killed.")
    values: Values = {"killed_with": max(_steps(killed))}
    last = max(_steps(straight))
    if values["killed_with"] == last:
        raise RuntimeError("the run was killed after its last step: nothing is left to resume.")
    subprocess.run([*command, str(killed)], check=True)
    arrays = [Checkpoints(path / "checkpoints").arrays(last, "model") for path in (straight, killed)]
    differing = sum(arrays[0][name] != arrays[1].get(name) for name in arrays[0])
    values |= {"steps": last, "arrays": len(arrays[0]), "arrays_differing": differing}
    values["largest_difference_logged"] = _difference(straight, killed)
    yield values | {"bitwise": differing == 0 and values["largest_difference_logged"] == 0}


def _steps(workdir: pathlib.Path) -> list[int]:
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def _difference(one: pathlib.Path, other: pathlib.Path) -> float:
    """Returns the largest difference between the logged values of two runs, except for speeds."""
    lines = [read_metrics(workdir) for workdir in (one, other)]
    differences = [
        abs(left["values"][name] - right["values"][name])
        for left, right in zip(*lines, strict=True)
        for name in left["values"]
        if not name.endswith(("_per_second", "_seconds"))
    ]
    return max(differences)


def several(work: Work) -> Iterator[Values]:
    """Compares several steps per dispatch with one step per dispatch."""
    both = [work.scratch / "one", work.scratch / "several"]
    for workdir, count in zip(both, (1, 2 if work.shrink else 11), strict=True):
        shared = (f"teacher.workdir={work.scratch / 'teacher'}", "data.loader=resident", f"steps_per_dispatch={count}")
        summary = trainer.train(_config(work, *shared), workdir)
    yield {"largest_difference_logged": _difference(*both), "last_top1": summary["last_top1"]}


def bfloat16(work: Work) -> Iterator[Values]:
    """Trains in bfloat16 and compares the exported student on this device with the CPU."""
    config = _config(work, "precision=bfloat16")
    summary = trainer.train(config, work.scratch / "run")
    values: Values = {"last_top1": summary["last_top1"], "teacher_top1": summary["teacher_top1"]}
    yield values
    student = export.read_student(export.export(config, work.scratch / "run"))
    shape = student.program.in_avals[0].shape[1:]
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), np.uint8)
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        found.append(np.asarray(jax.jit(student.program.call)(jax.device_put(images, device))))
    values["exported_error"] = float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1]))
    yield values | {"exported_same_class_percent": 100 * float(np.mean(found[0].argmax(1) == found[1].argmax(1)))}


def store(work: Work) -> Iterator[Values]:
    """Trains a run that writes the teacher's logits, and one that only reads them."""
    values: Values = {}
    shared = [f"logits.dir={work.scratch / 'logits'}", "logits.views=1", f"teacher.workdir={work.scratch / 'teacher'}"]
    for name, more in (("writes", []), ("reads", ["seed=1", "data.augment_seed=0"])):
        summary = trainer.train(_config(work, *shared, *more), work.scratch / name)
        values[name] = {key: summary[key] for key in ("last_top1", "teacher_top1")}
        yield values


PIECES = {
    **{function.__name__: function for function in (machine, losses, resume, several, bfloat16, store)},
    "resume_deterministic": resume,  # under --xla_gpu_deterministic_ops
}

if __name__ == "__main__":
    piece.main("smoke", PIECES)
