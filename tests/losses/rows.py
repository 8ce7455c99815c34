"""Any method as a function of rows of logits: two views, and what a loss is given, are made from the rows."""

import functools
import operator

import jax.numpy as jnp
import numpy as np


def from_teacher(method, classes):
    """The parameters that a teacher gives the loss, by name; the same for so many classes."""
    if method.from_teacher is None:
        return {}
    return {"params": method.from_teacher(jnp.asarray(np.cos(1.0 + np.arange(4.0 * classes)).reshape(classes, 4)))}


def given(method, cfg, classes):
    """Returns the parameters of a loss at the start of a run: learnt ones, or a teacher's; None without any."""
    return from_teacher(method, classes).get("params") if method.init is None else method.init(cfg)


def lead(method, cfg, rows):
    """Returns the leading axes of so many rows: a first one of 2 for a loss that compares two views."""
    return (2, rows) if method.views(cfg) == 2 else (rows,)


def both_views(rows, flip):
    """A stack of the rows and of what `flip` makes of them."""
    return None if rows is None else jnp.stack([jnp.asarray(rows), jnp.asarray(flip(rows))])


def parts_of_rows(method):
    """`parts(teacher, student, labels, cfg, **rows)` of rows `[..., C]`; a second view has the classes reversed."""

    def parts(teacher, student, labels, cfg, **rows):
        classes = student.shape[-1]
        rows = from_teacher(method, classes) | rows
        if method.views(cfg) == 2:
            teacher, student = (both_views(z, lambda z: z[..., ::-1]) for z in (teacher, student))
            labels = both_views(labels, lambda y: classes - 1 - y)
            rows = {k: v if k == "params" else both_views(v, lambda v: v) for k, v in rows.items()}
        return method.parts(teacher, student, labels, cfg, **rows)

    return parts


def loss_of_rows(method):
    """`loss(teacher, student, labels, cfg, **rows)`, the sum of `parts_of_rows`."""
    parts = parts_of_rows(method)
    return lambda *arguments, **rows: functools.reduce(operator.add, parts(*arguments, **rows).values())
