"""Named compilation targets: devices that XLA compiles for without having them."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from ldrld_jax.errors import UserError, first_line, needs, unknown
from ldrld_jax.runtime.devices import DEVICES, Device


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: the name as given, such as "v5e:2x4".
      devices: the devices that programs are placed on; they cannot run anything.
      facts: properties of one device; None for a CPU.
      options: XLA compiler options for `Lowered.compile`.
    """

    name: str
    devices: Sequence[jax.Device]
    facts: Device | None
    options: Mapping[str, Any]

    @classmethod
    def find(cls, name: str) -> "Target":
        """Returns the target of a name.

        Args:
          name: a TPU slice ("v5e:2x4", "v5p:2x2x1"), GPUs of one host ("h100", "a100:8"), or CPU devices ("cpu:8").

        Raises:
          UserError: if the target is unknown or its compiler is not installed.
        """
        kind, _, shape = name.partition(":")
        jax.config.update("jax_platforms", "cpu")  # leave a local accelerator alone
        if kind == "cpu":
            return cls(name, _cpus(name, shape), None, {})
        if kind not in DEVICES:
            raise unknown("target", name, [*DEVICES, "cpu"])
        facts = DEVICES[kind]
        if facts.gpu is None:
            return cls(name, _tpus(kind, name, shape), facts, {})
        if not re.fullmatch(r"([1-9]\d*)?", shape):
            raise UserError(f"--target {name} asks for {shape!r} GPUs. Give a number: {kind}:8.")
        # XLA cannot time candidate kernels without a device: level 0 takes each default.
        return cls(name, _gpus(facts, kind, int(shape or 1)), facts, {"xla_gpu_autotune_level": 0})


def _cpus(name: str, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"([1-9]\d*)?", shape):
        raise UserError(f"--target {name} asks for {shape!r} CPU devices. Give a number: cpu:8.")
    count = int(shape or 1)
    with contextlib.suppress(RuntimeError):  # JAX has already started: use the devices it has
        jax.config.update("jax_num_cpu_devices", count)
    if count > (here := jax.device_count("cpu")):
        raise UserError(f"--target {name}: this process has started with {here} CPU devices. Start a new one.")
    return jax.devices("cpu")[:count]


def _tpus(kind: str, name: str, shape: str) -> list[jax.Device]:
    with needs(f"--target {name}", "compile"):
        import libtpu  # noqa: F401
    if not shape:
        raise UserError(f"--target {name} names no slice. Give its chips: {kind}:2x4 for example.")
    # By default libtpu queries a cloud machine's metadata and locks a file for one process.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    # JAX treats the two cores of a v4 chip as one device.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # libtpu's error for a slice that does not exist
        raise UserError(
            f"--target {name}: {_reason(error)}. Give a slice that exists: {kind}:2x4 for example."
        ) from None


def _gpus(facts: Device, kind: str, count: int) -> list[jax.Device]:
    with needs(f"--target {kind}", "compile"):
        import jax_cuda12_plugin  # noqa: F401
    return list(
        topologies.get_topology_desc(
            platform="cuda", topology_name=kind, topology=f"1x1x{count}", target_config=_description(facts)
        ).devices
    )


def _description(device: Device) -> str:
    """Returns the GpuTargetConfigProto of a GPU in text format."""
    gpu = device.gpu
    assert gpu is not None
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_bytes - (2**10 if major >= 8 else 0)}
  shared_memory_per_core: {gpu.shared_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(device.bandwidth)}
  l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {device.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{device.kind}"
"""


def _reason(error: Exception) -> str:
    """Returns the first line of an error without its status code.

    Example:
      >>> _reason(RuntimeError("NOT_FOUND: no slice.")), _reason(RuntimeError("no slice")), _reason(AssertionError())
      ('no slice', 'no slice', 'AssertionError')
    """
    line = first_line(error)
    return line.partition(": ")[2] or line
