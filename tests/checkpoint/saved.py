"""Small checkpoints for the tests, what lies on disk of them, and damage."""

import pathlib

import jax.numpy as jnp

from ldrld_jax.checkpoint.folder import Checkpoints


def trees(step: int):
    value = float(step)
    model = {"params": {"w": jnp.full((3, 2), value)}, "batch_stats": {"mean": jnp.full(2, -value)}}
    return {"model": model, "training": {"step": jnp.int32(step), "opt_state": ({"trace": jnp.zeros(3)}, ())}}


def save(path, *checkpoints, **policy):
    saver = Checkpoints(path, run={"seed": 0, "epochs": 1}, **policy)
    for step, top1 in checkpoints:
        saver.save(step, trees(step), {"note": step / 3}, top1)
    saver.close()
    return names(path)


def names(path):
    return sorted(p.name for p in path.iterdir())


def contents(path):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}


def flip(path: pathlib.Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def largest(checkpoint: pathlib.Path) -> pathlib.Path:
    return max((checkpoint / "model").rglob("d/*"), key=lambda path: path.stat().st_size)
