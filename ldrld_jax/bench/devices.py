"""What a device can do at most: the makers' figures, to compare a measured speed with."""

# Device kind as its runtime names it: dense FLOP/s in bfloat16, TF32 and plain float32. From NVIDIA's data sheets,
# without sparsity, and from cloud.google.com/tpu/docs. A TPU multiplies bfloat16, float32 in three or six passes of it.
_GPUS = {
    "NVIDIA A100": (312e12, 156e12, 19.5e12),
    "NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12, 66.9e12),
    "NVIDIA H100 PCIe": (756e12, 378e12, 51.2e12),
    "NVIDIA H200": (989.4e12, 494.7e12, 66.9e12),
}
_TPUS = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
_PEAKS = {**_GPUS, **{name: (peak, peak / 3, peak / 6) for name, peak in _TPUS.items()}}
_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # also in use


def peak_flops(kind: str, precision: str, products: str = "default") -> float | None:
    """The most floating point operations a second of one device; None where it is not known.

    Args:
      kind: `jax.devices()[0].device_kind`.
      precision: a config's.
      products: its `matmul_precision`, of float32; "default" is TF32 on a GPU and one bfloat16 pass on a TPU.

    Example:
      >>> peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16"), peak_flops("cpu", "float32")
      (312000000000000.0, None)
    """
    kind = "NVIDIA A100" if kind.startswith("NVIDIA A100") else _NAMES.get(kind, kind)  # all its forms are equally fast
    if kind not in _PEAKS or precision not in ("bfloat16", "float32"):
        return None
    if precision == "bfloat16" or (products == "default" and kind in _TPUS):
        return _PEAKS[kind][0]
    return _PEAKS[kind][2 if products == "float32" else 1]
