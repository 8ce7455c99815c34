"""LDRLD written for reading: what the fast version in `ldrld.py` is compared with, in tests and benchmarks.

One example at a time, differentiated by JAX. Six times slower on CPU (docs/loss_speed.md).
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.losses.common import prepare_logits
from ldrld_jax.losses.ldrld import parts_of_terms
from ldrld_jax.losses.ldrld_config import LDRLDConfig, LDRLDTerms, rank_weights


def ldrld_loss(teacher_logits: jax.Array, student_logits: jax.Array, cfg: LDRLDConfig) -> jax.Array:
    """Computes `ldrld_jax.ldrld_loss` for finite logits `[..., C]`."""
    terms = ldrld_terms(teacher_logits, student_logits, cfg)
    return functools.reduce(operator.add, parts_of_terms(terms, cfg).values())


def ldrld_terms(teacher_logits: jax.Array, student_logits: jax.Array, cfg: LDRLDConfig) -> LDRLDTerms:
    """Computes `ldrld_jax.ldrld_terms` for finite logits `[..., C]`."""
    teacher, student = prepare_logits(teacher_logits, student_logits)
    rows = [z.reshape(-1, z.shape[-1]) for z in (teacher, student)]
    terms = jax.vmap(lambda t, s: _example_terms(t, s, cfg))(*rows)
    return jax.tree.map(lambda term: term.reshape(student.shape[:-1]), terms)


def _example_terms(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> LDRLDTerms:
    """The three parts for one example, logits `[C]`."""
    ranking = teacher if cfg.rank_by == "teacher" else jax.lax.stop_gradient(student)
    top, taken = _top(ranking, cfg.depth)
    teacher, student = teacher / cfg.temperature, student / cfg.temperature

    i, j = np.triu_indices(cfg.depth, k=1)
    weights = rank_weights(cfg)[i, j].astype(student.dtype)
    pair_kls = _pair_kl(teacher[top[i]] - teacher[top[j]], student[top[i]] - student[top[j]])

    terms = LDRLDTerms(
        pairs=jnp.sum(weights * pair_kls),
        integrity=_kl(teacher[top], student[top]),
        # Over one class or none the KL is 0; log_softmax of nothing would be NaN.
        remainder=_kl(teacher, student, where=~taken) if student.size - cfg.depth > 1 else jnp.zeros((), student.dtype),
    )
    return jax.tree.map(lambda term: cfg.temperature**2 * term, terms)


def _top(logits: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """The largest of `logits` `[C]`: indices `[d]`, descending, and a mask `[C]` over them.

    Of tied logits the lower index comes first.
    """
    taken = jnp.zeros(logits.shape, bool)
    indices = []
    for _ in range(depth):
        indices.append(jnp.argmax(jnp.where(taken, -jnp.inf, logits)))
        taken = taken | (jnp.arange(logits.size) == indices[-1])
    return jnp.stack(indices), taken


def _kl(teacher: jax.Array, student: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over the classes `[C]` that `where` keeps."""
    log_p = jax.nn.log_softmax(teacher, where=where)
    log_q = jax.nn.log_softmax(student, where=where)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), where=where)


def _pair_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL of the two-way softmaxes over a pair with the scaled logit differences `teacher` and `student`.

    A two-way softmax is a Bernoulli distribution whose logit is the difference, hence log_sigmoid.
    """
    p = jax.nn.sigmoid(teacher)
    first = jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student)
    second = jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student)
    return p * first + (1 - p) * second
