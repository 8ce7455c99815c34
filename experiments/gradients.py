"""Measures each method's step size: the gradient norm of its weighted loss in one example's logits.

python experiments/gradients.py runs/logits
python experiments/gradients.py runs/logits --ranks

The teacher logits are the first 1,024 of a logit store's first epoch; the labels are the teacher's top classes. Two
students are simulated: an untrained one (noise of .3) and one half way (half the teacher's logits plus noise of 1).
Batches of 64.

--ranks prints how a method moves the logits of a student whose logits are all equal, by the teacher's rank: the mean
negative gradient for each of its five largest classes, and for one of the others, over all images of that epoch.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from ldrld_jax.losses import METHODS

# kd_weight, ce_weight and the method's own settings, as in configs/cifar100_laptop.py.
SETTINGS = {
    "ce": (0.0, 1.0, {}),
    "kd": (0.9, 0.1, {}),
    "dkd": (1.0, 1.0, {}),
    "dist": (2.0, 1.0, {}),
    "ldrld": (1.0, 1.0, dict(depth=7, temperature=4.0, alpha=10.5, beta=7.0)),
}
RANKED = {"bild": ("bild", {}), "dkd": ("dkd", {}), "dkd, top_k=5": ("dkd", {"top_k": 5})}
EXAMPLES, BATCH = 1024, 64


def mean_norm(method: str, teacher: jax.Array, student: jax.Array) -> float:
    kd_weight, ce_weight, settings = SETTINGS[method]

    def loss(student, teacher):
        labels = jnp.argmax(teacher, axis=-1)
        ce = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(student), labels[:, None], axis=-1))
        if not kd_weight:
            return ce_weight * ce
        distil = METHODS[method].loss(teacher, student, labels, METHODS[method].config(**settings))
        return kd_weight * distil + ce_weight * ce

    gradient = jax.jit(jax.grad(loss))
    batches = [slice(i, i + BATCH) for i in range(0, EXAMPLES, BATCH)]
    by_example = [BATCH * gradient(student[rows], teacher[rows]) for rows in batches]  # the loss is a mean
    return float(jnp.mean(jnp.linalg.norm(jnp.concatenate(by_example), axis=-1)))


def by_rank(method: str, settings: dict, teacher: jax.Array) -> list[float]:
    """Returns the mean negative gradient for the teacher's five largest classes, and for one of the others."""
    order = jnp.argsort(-teacher, axis=-1)
    cfg = METHODS[method].config(**settings)
    gradient = jax.jit(jax.grad(lambda student, teacher, labels: METHODS[method].loss(teacher, student, labels, cfg)))
    pull = gradient(jnp.zeros_like(teacher), teacher, order[:, 0])
    moved = -len(teacher) * jnp.take_along_axis(pull, order, axis=-1)
    means = [*jnp.mean(moved[:, :5], axis=0), jnp.mean(moved[:, 5:])]
    return [round(float(mean), 3) for mean in means]


def main(store: str, *, ranks: bool = False) -> None:
    place = {"driver": "file", "path": str(next(pathlib.Path(store).rglob("00000"))) + "/"}
    logits = tensorstore.open({"driver": "zarr3", "kvstore": place}).result().read().result()
    if ranks:
        every = jnp.asarray(logits, jnp.float32)
        print(json.dumps({name: by_rank(*each, every) for name, each in RANKED.items()}, indent=2))
        return
    teacher, rng = jnp.asarray(logits[:EXAMPLES], jnp.float32), np.random.default_rng(0)
    students = {
        "start": jnp.asarray(0.3 * rng.normal(size=teacher.shape), jnp.float32),
        "half way": 0.5 * teacher + jnp.asarray(rng.normal(size=teacher.shape), jnp.float32),
    }
    norms = {name: {m: round(mean_norm(m, teacher, s), 2) for m in SETTINGS} for name, s in students.items()}
    print(json.dumps(norms, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of a logit store")
    parser.add_argument("--ranks", action="store_true", help="print the gradients by the teacher's rank")
    given = parser.parse_args()
    main(given.store, ranks=given.ranks)
