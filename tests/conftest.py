"""Strict numerics for the whole suite: rank promotion raises, warnings are errors, eight fake devices."""

import os

# Before jax starts its backend. Runs started as subprocesses inherit it.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion raises, as it must never happen in our own losses, metrics and models."""
    with jax.numpy_dtype_promotion("strict"):
        yield
