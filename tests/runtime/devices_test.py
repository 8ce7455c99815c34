"""The table of peaks: what a runtime calls a device finds its row, and nothing else does."""

import pytest

from ldrld_jax.runtime.devices import peak_flops


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 494.7e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5e", "float32", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6e", "bfloat16", 918e12),
        ("TPU v5 lite", "float64", None),
        ("NVIDIA GeForce RTX 4090", "float32", None),
        ("cpu", "float32", None),
    ],
)
def test_a_device_finds_its_peak(kind, precision, expected):
    assert peak_flops(kind, precision) == expected


@pytest.mark.parametrize(
    ("kind", "products", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "tensorfloat32", 156e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5e12),
        ("TPU v5e", "default", 197e12),
        ("TPU v4", "tensorfloat32", 275e12 / 3),
        ("TPU v6e", "float32", 153e12),
    ],
)
def test_the_peak_of_float32_is_that_of_how_it_is_multiplied(kind, products, expected):
    assert peak_flops(kind, "float32", products) == expected
    assert peak_flops(kind, "bfloat16", products) == peak_flops(kind, "bfloat16")
