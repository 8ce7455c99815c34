"""Runs of `ldrld_jax.Trainer` that compile at once, and a count of what they compile."""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

import ldrld_jax
from ldrld_jax.data.sources import open_source

QUICK = {
    "mesh.data": 1,
    "log.every_steps": 1,
    "log.tensorboard": False,
    "eval_batch_size": 24,
    "optim.weight_decay": 0.0,
}


def linear(variables, images, train):
    del train
    return images.reshape(len(images), -1) @ variables["w"]


@pytest.fixture
def programs() -> Iterator[Callable[[], dict[str, tuple[int, int]]]]:
    """`programs()`: how often a run's programs were traced, and compiled or loaded from the cache, since the last call.

    A run has `stepped`, one train step; `steps`, several in one dispatch; and `evaluate_batch` or `evaluate_split`.
    """
    counts = collections.Counter[tuple[str, str]]()

    def count(event: str, seconds: float, *, fun_name: str = "", **about: object) -> None:
        del seconds, about
        counts[event.rpartition("/")[2], fun_name.removeprefix("jit(").removesuffix(")")] += 1

    def since() -> dict[str, tuple[int, int]]:
        found = {}
        for name in ("stepped", "steps", "evaluate_batch", "evaluate_split"):
            traced, compiled = (counts[f"{event}_duration", name] for event in ("jaxpr_trace", "backend_compile"))
            found |= {name: (traced, compiled)} if traced or compiled else {}
        counts.clear()
        return found

    jax.monitoring.register_event_duration_secs_listener(count)
    yield since
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="session")
def digits(data_dir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images that `tiny` trains and evaluates on, as arrays."""
    splits = {"train": "train[:90]", "evaluation": "test[:50]"}
    sources = {name: open_source("digits", split, data_dir) for name, split in splits.items()}
    return {name: source.read(np.arange(len(source))) for name, source in sources.items()}


@pytest.fixture
def make(digits, tmp_path):
    """`make(**arguments)`: a trainer of two epochs of 90 digits, whose teacher is linear."""

    def make(**arguments):
        weights = {"w": np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)}
        defaults = dict(
            student=(linear, {"w": np.zeros((64, 10), np.float32)}),  # it compiles at once
            teacher=(linear, weights),
            method="kd",
            epochs=2,
            batch_size=40,
            workdir=tmp_path / "run",
            config=QUICK | arguments.pop("config", {}),
        )
        return ldrld_jax.Trainer(**digits | defaults | arguments)

    return make
