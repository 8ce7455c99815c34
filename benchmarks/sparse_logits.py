"""Measures what a sparse logit store takes and what it changes: LDRLD's terms and gradient for several K.

python benchmarks/sparse_logits.py --cifar_dir DIR --teacher resnet20.pth --student RUN     # docs/logit_store.md

RUN is the workdir of a ResNet8 that was trained on CIFAR-100 by `configs/cifar100.py`. Teacher and student see the
same augmented training images. For each K the teacher's logits are written to a real store and read back; the loss of
the rows made of them is compared with that of the whole rows in the same dtype.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax import LDRLDConfig, ldrld_loss, ldrld_terms
from ldrld_jax import config as config_lib
from ldrld_jax.logit_store.store import LogitStore
from ldrld_jax.logit_store.top import top_logits
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import restored


def logits_of(args: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    """Returns the teacher's and the student's logits `[n, C]` of augmented training images."""
    overrides = [f"data.data_dir={args.cifar_dir}", f"teacher.checkpoint={args.teacher}", "batch_size=250"]
    config = config_lib.resolve(config_lib.load("configs/cifar100.py:resnet20-resnet8", overrides))
    with tempfile.TemporaryDirectory() as workdir:
        run = Run.plan(config, pathlib.Path(workdir))  # type: ignore[arg-type]
    teacher = restored(run, [args.teacher])
    networks = (teacher.network, teacher.variables), run.networks.restore(args.student, "resnet8", config.data)
    programs: list[Any] = [
        jax.jit(lambda v, x, network=network: network(v, x, train=False)[0]) for network, _ in networks
    ]
    images = [run.batches[step]["image"] for step in range(-(-args.images // 250))]
    teacher_logits, student_logits = (
        jnp.concatenate([program(variables, x) for x in images])[: args.images]
        for program, (_, variables) in zip(programs, networks, strict=True)
    )
    return teacher_logits, student_logits


def stored(logits: jax.Array, top_k: int) -> tuple[jax.Array, int]:
    """Returns the rows that a store of float16 gives back, `[n, C]` float32, and its bytes on disk."""
    key = {"dtype": "float16", "classes": logits.shape[1], "data": {"records": len(logits)}, "top_k": top_k}
    with tempfile.TemporaryDirectory() as directory:
        store = LogitStore(directory, key)
        store.write(0, jax.device_get(top_logits(logits, top_k, jnp.float16)))
        size = sum(path.stat().st_size for path in pathlib.Path(directory, "00000").rglob("*") if path.is_file())
        return jax.tree.map(jnp.asarray, store.read(0)).dense(jnp.float32), size


def line(whole: jax.Array, student: jax.Array, top_k: int, temperature: float) -> str:
    """Returns a line of the table."""
    cfg = LDRLDConfig(temperature=temperature)
    sparse, size = stored(whole, top_k)
    rows = lambda z: [np.asarray(term).mean() for term in ldrld_terms(z, student, cfg)]  # noqa: E731
    terms = [f"{100 * (ours / exact - 1):+.2f}" for ours, exact in zip(rows(sparse), rows(whole), strict=True)]
    gradient = jax.grad(lambda student, teacher: ldrld_loss(teacher, student, cfg))
    ours, exact = gradient(student, sparse), gradient(student, whole)
    error = 100 * float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    mass = 100 * float(jnp.mean(jnp.sum(jnp.sort(jax.nn.softmax(whole))[:, -top_k:], axis=-1)))
    largest = np.argsort(-np.asarray(whole))[:, :top_k]
    held = [set(a) <= set(b) for a, b in zip(np.argsort(-np.asarray(student))[:, : cfg.depth], largest, strict=True)]
    figures = [f"{size / len(whole):.2f}", f"{mass:.1f}", f"{100 * np.mean(held):.1f}", *terms, f"{error:.2f}"]
    return f"| {top_k} | {temperature:g} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar_dir", required=True, help="the folder that holds cifar100 as prepared by TFDS")
    parser.add_argument("--teacher", required=True, help="a PyTorch checkpoint of ResNet20 for CIFAR-100")
    parser.add_argument("--student", required=True, help="the workdir of a run that trained ResNet8 on CIFAR-100")
    parser.add_argument("--images", type=int, default=5000)
    args = parser.parse_args()
    teacher, student = logits_of(args)
    whole = teacher.astype(jnp.float16).astype(jnp.float32)
    print(f"{args.images} images of CIFAR-100; bytes with the metadata; mass at temperature 1; errors in percent")
    print("| K | T | bytes an image | mass | top 7 within K | pairs | integrity | remainder | gradient |")
    print("| ---: " * 9 + "|")
    for temperature in (1.0, 4.0):
        for top_k in (8, 16, 32, 64):
            print(line(whole, student, top_k, temperature))


if __name__ == "__main__":
    main()
