"""Folders as runs leave them, for the tests of the report."""

import json
import pathlib
from typing import Any

from ldrld_jax.report import FoundRun


def config(**changes: Any) -> dict[str, Any]:
    """A resolved config in brief; `changes` are dotted keys, with a double underscore for each dot."""
    keys: dict[str, Any] = {"seed": 0, "epochs": 4, "method": "kd", "student": {"model": "resnet8"}}
    keys |= {"data": {"name": "digits", "fraction": 1.0, "label_noise": "none", "label_noise_rate": 0.0}}
    keys |= {"teacher": {"model": "resnet20"}}
    for name, value in changes.items():
        *path, last = name.split("__")
        block = keys
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    return keys


def summary(**changes: Any) -> dict[str, Any]:
    return dict(teacher_top1=99.0, best_top1=97.0, last_top1=96.0, examples_per_second=1000.0) | changes


def write(folder: pathlib.Path, name: str, last: float = 96.0, **changes: Any) -> pathlib.Path:
    """A finished run: its three files."""
    workdir = folder / name
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config(**changes)))
    (workdir / "summary.json").write_text(json.dumps(summary(last_top1=last)))
    tops = [line("eval", epoch, last - 4 + epoch) for epoch in (2, 4)]
    (workdir / "metrics.jsonl").write_text("".join(tops))
    return workdir


def line(split: str, epoch: float, top1: float) -> str:
    return json.dumps({"step": 10 * epoch, "epoch": epoch, "split": split, "values": {"top1": top1}}) + "\n"


def found(name: str = "", last: float = 96.0, curve: tuple = (), **changes: Any) -> FoundRun:
    """A finished run, as if it had been read."""
    from ldrld_jax.identity import flat

    return FoundRun(name, flat(config(**changes)), summary(last_top1=last), curve)
