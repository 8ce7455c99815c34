"""Runs one piece of work in its own process: `python -m stages.smoke PIECE --folder DIR ...`."""

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from stages import record

Values = dict[str, Any]
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton")


@dataclasses.dataclass(frozen=True)
class Work:
    """The input of a piece.

    Attributes:
      folder: the work folder; a piece writes everything except its record to `scratch`.
      shrink: True for a rehearsal on a CPU with tiny sizes and the same code.
      seconds: approximate time limit.
      before: the values that an earlier, incomplete attempt measured.
    """

    name: str
    folder: pathlib.Path
    shrink: bool
    seconds: float
    before: Values

    @functools.cached_property
    def scratch(self) -> pathlib.Path:
        folder = self.folder / "scratch" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


Piece = Callable[[Work], Iterator[Values]]


def main(stage: str, pieces: Mapping[str, Piece]) -> None:
    """Runs the piece named on the command line and records each dict of results so far that it yields."""
    parser = argparse.ArgumentParser()
    parser.add_argument("piece", choices=pieces)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--shrink", action="store_true")
    flags = parser.parse_args()
    begun, name = time.monotonic(), f"{stage}.{flags.piece}"
    before = record.read(flags.folder, name).get("values", {})
    about = provenance()
    values: Values = before
    for values in pieces[flags.piece](Work(name, flags.folder, flags.shrink, flags.seconds, dict(before))):
        _keep(flags, name, about, begun, values, complete=False)
    _keep(flags, name, about, begun, values, complete=True)


def _keep(flags: argparse.Namespace, name: str, about: Values, begun: float, values: Values, *, complete: bool) -> None:
    seconds = round(time.monotonic() - begun, 1)
    record.write(flags.folder, name, {"complete": complete, **about, "seconds": seconds, "values": values})


def provenance() -> Values:
    """Returns the device, versions, commit and command that belong to every figure."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "commit": os.environ.get("BENCHMARK_COMMIT", "unknown"),
        "command": os.environ.get("BENCHMARK_COMMAND", " ".join(sys.argv)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
