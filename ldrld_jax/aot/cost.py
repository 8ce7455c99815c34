"""Memory and run-time costs of a program on an absent device, as its compiler reports them."""

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
_GPU_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"), 0.75  # its new name and its old one
# Arguments that stay on the devices for the whole run. The "variables" of an evaluation are part of the state.
_KEPT = ("state", "teacher", "images", "draws", "split")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of a compiled program, per device unless noted otherwise.

    Attributes:
      name: the program's name.
      compile_seconds: time to trace, lower and compile on this machine.
      arguments: bytes of each argument, without the compiler's padding.
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: from `Compiled.memory_analysis()`;
        aliased outputs reuse the memory of donated arguments.
      beside_bytes: bytes that the run keeps on the device and that are not arguments of this program.
      memory: bytes that a run may use; None if unknown.
      flops: floating point operations per dispatch; None if they are not counted.
      bytes_moved: bytes read from and written to memory per dispatch, see `hlo.CompiledText.bytes_moved`.
      kernels: kernels per dispatch, see `hlo.CompiledText.kernels`.
      peak_flops, bandwidth: peak FLOP/s and memory bytes/s of the device; None if unknown.
      collectives: transfers between devices per dispatch.
      examples: images per dispatch, over all devices.
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
        """The bytes in use on the device while the program runs."""
        own = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes
        return own + self.beside_bytes

    @property
    def lasting_bytes(self) -> int:
        """The bytes of the arguments and of what the run keeps beside them."""
        return self.argument_bytes + self.beside_bytes

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total_bytes <= self.memory

    @property
    def compute_seconds(self) -> float | None:
        """The time of a dispatch at peak FLOP/s; None if unknown."""
        return None if self.flops is None or self.peak_flops is None else self.flops / self.peak_flops

    @property
    def memory_seconds(self) -> float | None:
        """The time of a dispatch at full memory bandwidth; None if unknown."""
        return None if self.bandwidth is None else self.bytes_moved / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        derived = ("total_bytes", "fits", "compute_seconds", "memory_seconds")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class TooLargeError(Exception):
    """The compiler's refusal of a program that needs more memory than a device has.

    Attributes:
      name: the program's name.
      lasting_bytes: bytes per device of its arguments and of what the run keeps beside them.
      total_bytes: all bytes that it would need; None if the compiler does not report them.
    """

    def __init__(self, name: str, lasting_bytes: int, total_bytes: float | None):
        super().__init__(name, lasting_bytes, total_bytes)
        self.name, self.lasting_bytes, self.total_bytes = name, lasting_bytes, total_bytes


def measure(program: Program, beside: Sequence[Program], config: ConfigDict, target: Target) -> Cost:
    """Compiles a program and returns its costs.

    Args:
      program: the program to compile.
      beside: all programs of the run; their lasting arguments occupy the devices too.
      config: the run's config.
      target: the devices to compile for.

    Raises:
      TooLargeError: if the compiler cannot fit the program into the device's memory.
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
    memory, text = compiled.memory_analysis(), hlo.CompiledText(compiled.as_text())
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
    """Returns the bytes of a device that a run may use (on a GPU, the share that JAX reserves); None if unknown."""
    if target.facts is None:
        return None
    if target.facts.gpu is None:
        return target.facts.memory
    names, default = _GPU_SHARE
    share = next((os.environ[name] for name in names if os.environ.get(name)), default)
    return int(float(share) * target.facts.memory)


def _beside(program: Program, programs: Sequence[Program]) -> int:
    """Returns the bytes that stay on a device for the whole run and are not arguments of `program`."""
    kept: dict[str, int] = {}
    for other in programs:
        kept |= {name: size for name, size in other.argument_bytes().items() if name in _KEPT and size}
    own = program.argument_bytes()
    missing = sum(size for name, size in kept.items() if name not in own)
    return missing - (own.get("variables", 0) if "state" not in own else 0)
