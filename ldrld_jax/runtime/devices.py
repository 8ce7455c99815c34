"""Properties of accelerators: memory, peak rates, and the GPU properties that a compiler needs.

Rates are dense, without sparsity. Sources: for GPUs, NVIDIA's data sheets and the table of compute capabilities in the
CUDA programming guide; for TPUs, cloud.google.com/tpu/docs.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that XLA compiles for.

    Attributes:
      capability: compute capability, `(major, minor)`.
      cores: number of streaming multiprocessors.
      fpus: float32 units per core.
      clock_ghz: maximum clock rate.
      l2_bytes: size of the L2 cache, which all cores share.
      shared_bytes: shared memory per core.
      threads: maximum resident threads per core.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Device:
    """Memory and peak rates of one device.

    Attributes:
      kind: `jax.Device.device_kind`, as the runtime reports it.
      memory: size of the main memory in bytes.
      bandwidth: memory bandwidth in bytes/s.
      bfloat16, tensorfloat32, float32: peak FLOP/s of matrix products in that precision.
      gpu: properties that a compiler needs; None for a TPU.
    """

    kind: str
    memory: int
    bandwidth: float
    bfloat16: float
    tensorfloat32: float
    float32: float
    gpu: Gpu | None = None

    def flops(self, precision: str, products: str = "default") -> float | None:
        """Returns the peak in FLOP/s; None for float64.

        Args:
          precision: the config's `precision`.
          products: its `matmul_precision` for float32; "default" is TF32 on a GPU and one bfloat16 pass on a TPU.
        """
        if precision not in ("bfloat16", "float32"):
            return None
        if precision == "bfloat16" or (products == "default" and self.gpu is None):
            return self.bfloat16
        return self.float32 if products == "float32" else self.tensorfloat32


def _tpu(kind: str, gib: int, bandwidth: float, bfloat16: float) -> Device:
    """Returns a TPU, which multiplies float32 in three (19 bits) or six (exact) bfloat16 passes."""
    return Device(kind, gib * 2**30, bandwidth, bfloat16, bfloat16 / 3, bfloat16 / 6)


_HOPPER = Gpu((9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10, 2048)
_HOPPER_PCIE = dataclasses.replace(_HOPPER, cores=114, clock_ghz=1.755)
_AMPERE = Gpu((8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10, 2048)
_ADA = Gpu((8, 9), 58, 128, 2.04, 48 * 2**20, 100 * 2**10, 1536)
_TURING = Gpu((7, 5), 40, 64, 1.59, 4 * 2**20, 64 * 2**10, 1024)

DEVICES = {
    "t4": Device("Tesla T4", 15_843_721_216, 320e9, 8.1e12, 8.1e12, 8.1e12, _TURING),  # neither bfloat16 nor TF32
    "l4": Device("NVIDIA L4", 23_034 * 2**20, 300e9, 121e12, 60e12, 30.3e12, _ADA),
    "a100": Device("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 312e12, 156e12, 19.5e12, _AMPERE),
    "h100": Device("NVIDIA H100 80GB HBM3", 84_929_347_584, 3.352e12, 989.4e12, 494.7e12, 66.9e12, _HOPPER),
    "h100_pcie": Device("NVIDIA H100 PCIe", 84_929_347_584, 2.039e12, 756e12, 378e12, 51.2e12, _HOPPER_PCIE),
    "h200": Device("NVIDIA H200", 151_397_597_184, 4.8e12, 989.4e12, 494.7e12, 66.9e12, _HOPPER),
    "v4": _tpu("TPU v4", 32, 1.228e12, 275e12),
    "v5e": _tpu("TPU v5 lite", 16, 819e9, 197e12),
    "v5p": _tpu("TPU v5", 95, 2.765e12, 459e12),
    "v6e": _tpu("TPU v6 lite", 32, 1.64e12, 918e12),
}
_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # alternative names


def peak_flops(kind: str, precision: str, products: str = "default") -> float | None:
    """Returns the peak FLOP/s of one device; None if unknown.

    Args:
      kind: `jax.devices()[0].device_kind`.
      precision: the config's `precision`.
      products: its `matmul_precision`, see `Device.flops`.

    Example:
      >>> peak_flops("NVIDIA A100-PCIE-40GB", "bfloat16"), peak_flops("cpu", "float32")
      (312000000000000.0, None)
    """
    by_kind = {device.kind: device for device in DEVICES.values()}
    kind = DEVICES["a100"].kind if kind.startswith("NVIDIA A100") else _NAMES.get(kind, kind)  # all equally fast
    return by_kind[kind].flops(precision, products) if kind in by_kind else None
