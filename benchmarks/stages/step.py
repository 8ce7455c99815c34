"""Measures the step table of `benchmarks/train.py`, and how the time of a real run's step is spent."""

import dataclasses
import functools
import gzip
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import train as benchmark  # benchmarks/train.py

from ldrld_jax import config as config_lib
from ldrld_jax.bench.step import measure
from stages import piece
from stages.piece import Values, Work

NAMES = ("ours", "several", "torch plain", "torch strong", "torch compiled")
TOGETHER = 71  # steps per dispatch: an epoch of CIFAR has 781 = 11 x 71 full batches of 64


def pair(
    work: Work, models: str, *, size: int, batch: int, precision: str, steps: int, names: Sequence[str] = NAMES
) -> Iterator[Values]:
    """Measures a line of the table; contestants that fail to start are recorded, the others take turns."""
    if work.shrink:
        models, size, batch, steps = "resnet8,resnet8", 16, 8, 2
        names = [name for name in names if name != benchmark.COMPILED]
    recipe = benchmark.make_recipe(models, batch=batch, size=size, precision=precision)
    made, flops, values = {}, None, Values(recipe=dataclasses.asdict(recipe), steps_a_turn=steps)
    for name in names:
        try:
            one, counted = benchmark.contestants(recipe, [name], batch * steps, steps=steps)
        except Exception as error:  # compilers raise many types; the others may work
            values[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        if not one:
            values[name] = {"failed": "PyTorch is not installed, or has no such network."}
        made |= one
        flops = counted if name == "ours" else flops
        yield values
    taken = benchmark.measure(made, 0.5 if work.shrink else work.seconds / 4, steps)
    yield values | {"flops": flops, **benchmark.figures(recipe, taken, flops)}


def where(work: Work) -> Iterator[Values]:
    """Measures the parts of a CIFAR-100 step, traces ten steps and lists kernels; then 71 steps per dispatch."""
    models, overrides = "resnet32x4-resnet8x4", [f"data.data_dir={work.folder / 'data'}", "data.loader=resident"]
    if work.shrink:
        models, overrides = "resnet8-resnet8", [*overrides, "batch_size=8", "data.train_split=train[:64]"]
    trace = work.folder / "profile"
    values: Values = {}
    for together in (1, 2 if work.shrink else TOGETHER):
        config = config_lib.load(f"configs/cifar100.py:{models}", [*overrides, f"steps_per_dispatch={together}"])
        profile = str(work.scratch / "profile") if together == 1 else None
        seconds = 0.2 if work.shrink else 4.0 / (1 + (together > 1))  # the second time the parts are known
        try:
            bench = measure(config, seconds=seconds, profile=profile)
        except Exception as error:  # the profiler may lack a library or permission: go on without
            if profile is None:
                raise
            values["trace_of_ten_steps"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            bench, profile = measure(config, seconds=seconds), None
        found = dataclasses.asdict(bench) | {"mfu_percent": bench.peak_share, "shares": bench.shares}
        values[f"steps_per_dispatch={together}"] = found
        yield values
        if profile is not None:
            trace.mkdir(exist_ok=True)
            for path in pathlib.Path(profile).rglob("*.trace.json.gz"):
                shutil.copyfile(path, trace / "step.trace.json.gz")
                values["trace_of_ten_steps"] = kernels(trace / "step.trace.json.gz")
            yield values


def kernels(trace: pathlib.Path) -> Values:
    """Returns count and duration of the kernels in a device trace of ten steps; empty for a CPU's trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named: dict[tuple[str, Any], str] = {
        (event["name"], (event["pid"], event.get("tid")) if event["name"] == "thread_name" else event["pid"]): (
            event["args"].get("name", "")
        )
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    ran = [
        event
        for event in events
        if event.get("ph") == "X"
        and "/device:" in named.get(("process_name", event["pid"]), "")
        and named.get(("thread_name", (event["pid"], event.get("tid"))), "").startswith("Stream")
    ]
    if not ran:
        return {}
    begun, ended = min(e["ts"] for e in ran), max(e["ts"] + e.get("dur", 0) for e in ran)
    busy: dict[str, float] = {}
    for event in ran:
        busy[event["name"]] = busy.get(event["name"], 0.0) + event.get("dur", 0)
    most = dict(sorted(busy.items(), key=lambda item: -item[1])[:15])
    return {
        "events": len(ran),
        "device_busy_percent": 100 * sum(busy.values()) / (ended - begun),
        "milliseconds_by_name": {name[:80]: round(1e-3 * micro, 3) for name, micro in most.items()},
    }


_CIFAR = functools.partial(pair, models="resnet32x4,resnet8x4", size=32)
_LARGE = functools.partial(pair, models="imagenet_resnet34,imagenet_resnet18", size=224, precision="bfloat16", steps=5)
PIECES = {
    "cifar64": functools.partial(_CIFAR, batch=64, precision="float32", steps=TOGETHER),
    "cifar64_bfloat16": functools.partial(_CIFAR, batch=64, precision="bfloat16", steps=TOGETHER),
    "cifar1024": functools.partial(_CIFAR, batch=1024, precision="bfloat16", steps=10),
    "imagenet": functools.partial(_LARGE, batch=256, names=("ours", "torch plain", "torch compiled")),
    "where": where,
}

if __name__ == "__main__":
    piece.main("step", PIECES)
