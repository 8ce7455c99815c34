"""The needs and costs of a program on a device that is not here, by its compiler."""

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from ldrld_jax.aot import hlo
from ldrld_jax.aot.programs import Program
from ldrld_jax.aot.targets import Target

# JAX reserves this share of a GPU's memory when it starts, unless the variable says otherwise.
_GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75
# What lies on the devices from a run's start to its end; a network's variables are part of the state.
_KEPT = ("state", "teacher", "images", "draws", "split")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Needs and costs of a compiled program, on each device.

    Attributes:
      name: of the program.
      compile_seconds: tracing, lowering and compilation on this machine.
      arguments: bytes by argument, without the compiler's padding.
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: as `Compiled.memory_analysis()` gives them;
        aliased outputs take the place of donated arguments.
      beside_bytes: of what the run keeps on the device meanwhile and is not among the arguments.
      memory: bytes that a run may take there; None where it is not known.
      flops: in a dispatch; None where none count.
      bytes_moved: from and to memory in a dispatch, see `hlo.Program.bytes_moved`.
      kernels: in a dispatch, see `hlo.Program.kernels`.
      peak_flops, bandwidth: of the device, a second; None where they are not known.
      collectives: transfers between devices in a dispatch.
      examples: images in a dispatch, on all devices.
    """

    name: str
    compile_seconds: float
    arguments: dict[str, int]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    beside_bytes: int
    memory: int | None
    flops: float | None
    bytes_moved: int
    kernels: int
    peak_flops: float | None
    bandwidth: float | None
    collectives: list[hlo.Collective]
    examples: int

    @property
    def total_bytes(self) -> int:
        """All that is on the device while the program runs."""
        own = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes
        return own + self.beside_bytes

    @property
    def lasting_bytes(self) -> int:
        """The arguments, and what the run keeps beside them."""
        return self.argument_bytes + self.beside_bytes

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total_bytes <= self.memory

    @property
    def compute_seconds(self) -> float | None:
        """The shortest time for the arithmetic of a dispatch; None where it is not known."""
        return None if self.flops is None or self.peak_flops is None else self.flops / self.peak_flops

    @property
    def memory_seconds(self) -> float | None:
        """The shortest time for the bytes of a dispatch; None where it is not known."""
        return None if self.bandwidth is None else self.bytes_moved / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        derived = ("total_bytes", "fits", "compute_seconds", "memory_seconds")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class TooLargeError(Exception):
    """A program that the compiler itself refuses, since it needs more memory than a device has.

    Attributes:
      name: of the program.
      lasting_bytes: its arguments on a device and what the run keeps beside them.
      total_bytes: all that it would need; None where the compiler does not say.
    """

    def __init__(self, name: str, lasting_bytes: int, total_bytes: float | None):
        super().__init__(name, lasting_bytes, total_bytes)
        self.name, self.lasting_bytes, self.total_bytes = name, lasting_bytes, total_bytes


def measure(program: Program, beside: Sequence[Program], config: ConfigDict, target: Target) -> Cost:
    """Compiles a program and reads what it costs.

    Args:
      program: to compile.
      beside: all programs of the run, whose lasting arguments lie on the devices as well.
      config: of the run.
      target: what to compile for.

    Raises:
      TooLargeError: if the compiler finds no way to keep it within the device's memory.
    """
    begun, lasting = time.perf_counter(), _beside(program, beside)
    try:
        compiled = program.jitted.lower(*program.arguments.values()).compile(compiler_options=dict(target.options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        total = float(used.group(1)) * 2 ** (10 * (1 + "KMGT".index(used.group(2)))) if used else None
        raise TooLargeError(program.name, lasting + sum(program.argument_bytes().values()), total) from None
    seconds = time.perf_counter() - begun
    memory, text = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    facts, devices = target.facts, len(target.devices)
    platform = "cuda" if facts is not None and facts.gpu is not None else target.devices[0].platform
    flops = program.count_flops(platform)
    return Cost(
        name=program.name,
        compile_seconds=seconds,
        arguments=program.argument_bytes(),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        beside_bytes=lasting,
        memory=usable_memory(target),
        flops=None if flops is None else flops / devices,
        bytes_moved=text.bytes_moved,
        kernels=text.kernels,
        peak_flops=None if facts is None else facts.flops(config.precision, config.matmul_precision),
        bandwidth=None if facts is None else facts.bandwidth,
        collectives=text.collectives,
        examples=program.examples,
    )


def usable_memory(target: Target) -> int | None:
    """Returns the bytes of a device that a run may take: on a GPU what JAX reserves; None where it is not known."""
    if target.facts is None:
        return None
    variable, default = _GPU_SHARE
    share = float(os.environ.get(variable, default)) if target.facts.gpu is not None else 1.0
    return int(share * target.facts.memory)


def _beside(program: Program, programs: Sequence[Program]) -> int:
    """Returns the bytes that last through the run and are not among a program's arguments."""
    kept: dict[str, int] = {}
    for other in programs:
        kept |= {name: size for name, size in other.argument_bytes().items() if name in _KEPT and size}
    own = program.argument_bytes()
    missing = sum(size for name, size in kept.items() if name not in own)
    return missing - (own.get("variables", 0) if "state" not in own else 0)
