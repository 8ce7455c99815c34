"""`--mode compile`: compiles a config for absent devices and reports memory, time bounds and whether it fits."""

import copy
import dataclasses
import functools
import json
import operator
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.aot.cost import Cost, TooLargeError, measure, usable_memory
from ldrld_jax.aot.programs import programs_of
from ldrld_jax.aot.targets import Target
from ldrld_jax.errors import UserError
from ldrld_jax.files import replace_text
from ldrld_jax.record.console import answer, say
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.plan import Run


class DoesNotFitError(Exception):
    """Error for a run that needs more memory than a device has."""

    exit_code = 1


def report(config: ConfigDict, target: str, json_file: str | None = None) -> None:
    """Compiles the programs of a config for a target and prints the memory and cost of each.

    Args:
      config: from `ldrld_jax.config.load`.
      target: a target's name, see `Target.find`.
      json_file: path for the same report as JSON; None writes none. It stays as it is if no program was compiled.

    Raises:
      UserError: if the config or the target is invalid.
      DoesNotFitError: if a program needs more memory than a device has; the message names a change that fits.
    """
    found = Target.find(target)
    answer(_title(config, found))
    costs: list[Cost] = []
    try:
        for cost in costs_of(config, found):
            costs.append(cost)
            answer(f"\n{table(cost)}")
    except TooLargeError as error:
        raise DoesNotFitError(_refusal(config, found, len(costs), error)) from None
    finally:
        if json_file is not None and costs:
            content = {"target": target, "jax": jax.__version__, "programs": [cost.to_json() for cost in costs]}
            replace_text(epath.Path(json_file), json.dumps(content, indent=2) + "\n")
    for index, cost in enumerate(costs):
        if not cost.fits:
            raise DoesNotFitError(_refusal(config, found, index, cost))


def costs_of(config: ConfigDict, target: Target, only: int | None = None) -> Iterator[Cost]:
    """Yields the costs of a config's programs, in the order of `programs_of`.

    Args:
      config: from `ldrld_jax.config.load`.
      target: the devices to compile for.
      only: index of the single program to compile; None for all.

    Raises:
      UserError: if the config is invalid.
      TooLargeError: if the compiler refuses a program for its size.
    """
    with precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config_lib.resolve(config), epath.Path(""), absent=target.devices)
        programs = list(programs_of(run))
        for index, program in enumerate(programs):
            if only in (None, index):
                yield measure(program, programs, run.config, target)


def table(cost: Cost) -> str:
    """Returns a program's cost as a readable table."""
    rows = [("", _size(size), name) for name, size in cost.arguments.items() if size]
    rows.append(("", _size(cost.output_bytes - cost.alias_bytes), "output that takes no argument's place"))
    rows.append(("", _size(cost.temp_bytes), "temporaries"))
    if cost.beside_bytes:
        rows.append(("", _size(cost.beside_bytes), "kept beside this program"))
    room = "" if cost.memory is None else f" of {_size(cost.memory)}: {'fits' if cost.fits else 'DOES NOT FIT'}"
    rows.append(("memory", _size(cost.total_bytes), f"on a device{room}"))
    if cost.flops is not None:
        rows.append(("compute", f"{cost.flops / 1e9:.4g} GFLOP", _at_best(cost.compute_seconds)))
    rows.append(("traffic", _size(cost.bytes_moved), _at_best(cost.memory_seconds)))
    rows.append(("kernels", f"{cost.kernels:,}", "one after another"))
    for collective in cost.collectives:
        rows.append(("transfers", _size(collective.bytes), f"{collective.count} x {collective.kind}"))
    if not cost.collectives:
        rows.append(("transfers", "none", "between devices"))
    lines = [f"{name:12}{value:>14}  {how}".rstrip() for name, value, how in rows]
    return "\n".join([f"{cost.name}: compiled in {cost.compile_seconds:.1f} s", *lines, *_bound(cost)])


def _bound(cost: Cost) -> list[str]:
    """Returns a line with the lower bound on a dispatch's time and its cause; no line if nothing is known."""
    bounds = {"compute": cost.compute_seconds, "traffic": cost.memory_seconds}
    known = {name: seconds for name, seconds in bounds.items() if seconds is not None}
    if not known or cost.flops is None:
        return []
    name = max(known, key=lambda name: known[name])
    rate = f"{cost.examples / known[name]:,.0f} images/s"
    return [f"{'bound':12}{1e3 * known[name]:>11.3f} ms  at least, by {name}: at most {rate} on all devices"]


def _refusal(config: ConfigDict, target: Target, index: int, large: Cost | TooLargeError) -> str:
    """Returns the error text for a program that does not fit, with the mildest change that makes it compile to fit."""
    memory = usable_memory(target)
    assert memory is not None
    needed = "more than" if large.total_bytes is None else f"{_size(large.total_bytes)} of"
    line = f"the {large.name} needs {needed} the {_size(memory)} that a run may use of a device's memory."
    for change in _changes(config, len(target.devices), large.name):
        if not change.might_fit(large, memory):
            continue
        say(f"trying {change}")
        try:
            (cost,) = costs_of(config_lib.overridden(copy.deepcopy(config), change.overrides), target, only=index)
        except (UserError, TooLargeError):
            continue
        if cost.fits:
            return f"{line} With {change} it fits ({_size(cost.total_bytes)})."
    return f"{line} No batch size fits. Use a larger device, more devices, or a smaller network."


@dataclasses.dataclass(frozen=True)
class _Change:
    """Overrides that save memory, with the largest saving they can bring.

    Attributes:
      overrides: a tuple of `key=value`.
      lasting: fraction of the memory held for the whole run that remains, at best.
      passing: fraction of all other memory that remains, at best.
    """

    overrides: tuple[str, ...]
    lasting: float = 1.0
    passing: float = 1.0

    def __str__(self) -> str:
        return " ".join(f"--config.{override}" for override in self.overrides)

    def might_fit(self, large: Cost | TooLargeError, memory: int) -> bool:
        """Returns False if the change cannot save enough, so that it need not be compiled."""
        if large.total_bytes is None:
            return True
        passing = max(0, large.total_bytes - large.lasting_bytes)
        return self.lasting * large.lasting_bytes + self.passing * passing <= memory

    def __add__(self, other: "_Change") -> "_Change":
        return _Change(self.overrides + other.overrides, self.lasting * other.lasting, self.passing * other.passing)


def _changes(config: ConfigDict, devices: int, program: str) -> Iterator[_Change]:
    """Yields changes that save memory, from those that leave a run's results unchanged to smaller batches."""
    split_up = [_Change(("mesh.fsdp=True",), lasting=1 / devices)] if devices > 1 and not config.mesh.fsdp else []
    if config.data.loader == "resident":
        yield _Change(("data.loader=stream", "steps_per_dispatch=1"), lasting=0)
    if program == "evaluation":
        yield from split_up
        batch = config.eval_batch_size // 2
        while batch >= devices:
            change = _Change((f"eval_batch_size={batch}",), passing=batch / config.eval_batch_size)
            yield change
            yield change + _Change(("data.cache_mb=0",), lasting=0)  # without the split on the devices
            batch //= 2
        return
    same = split_up + ([] if config.remat else [_Change(("remat=True",), passing=0.2)])
    yield from same
    parts = 2 * config.accumulate
    while config.batch_size % parts == 0 and config.batch_size // parts >= devices:
        split = _Change((f"accumulate={parts}",), passing=config.accumulate / parts)
        yield split
        yield functools.reduce(operator.add, [*same, split])
        parts *= 2
    if config.precision == "float32":
        yield _Change(("precision=bfloat16",), passing=0.5)
    batch = config.batch_size // 2
    while batch >= devices * config.accumulate:
        yield _Change((f"batch_size={batch}",), passing=batch / config.batch_size)
        batch //= 2


def _title(config: ConfigDict, target: Target) -> str:
    resolved = config_lib.resolve(config)
    teacher = f" from {resolved.teacher.model}" if resolved.teacher else ""
    kind = target.devices[0].device_kind
    mesh = f"{len(target.devices)} x {kind}" + (", fsdp" if config.mesh.fsdp else "")
    batch = f"batch {config.batch_size}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
    how = f"{batch}, {config.precision}, loader {config.data.loader}" + (", remat" if config.remat else "")
    return f"{config.student.model}, {config.method}{teacher}\n{how}; {mesh}, jax {jax.__version__}"


def _at_best(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f} ms at the device's best"


def _size(size: float) -> str:
    """Formats a number of bytes.

    Example:
      >>> _size(1536), _size(3 * 2**30)
      ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
