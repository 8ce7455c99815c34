"""What a device can do at most: the makers' figures, to compare a measured speed with."""

# Device kind as its runtime names it: dense FLOP/s at bfloat16, and at float32 as JAX multiplies it by default (TF32 on
# a GPU, one bfloat16 pass on a TPU). From NVIDIA's data sheets, without sparsity, and from cloud.google.com/tpu/docs.
_PEAKS = {
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H200": (989.4e12, 494.7e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),
    "TPU v6 lite": (918e12, 918e12),
}
_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # also in use


def peak_flops(kind: str, precision: str) -> float | None:
    """The most floating point operations a second of one device; None where it is not known.

    Args:
      kind: `jax.devices()[0].device_kind`.
      precision: a config's.

    Example:
      >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16"), peak_flops("cpu", "float32")
      (312000000000000.0, None)
    """
    kind = "NVIDIA A100" if kind.startswith("NVIDIA A100") else _NAMES.get(kind, kind)  # all its forms are equally fast
    column = {"bfloat16": 0, "float32": 1}.get(precision)
    return None if column is None or kind not in _PEAKS else _PEAKS[kind][column]
