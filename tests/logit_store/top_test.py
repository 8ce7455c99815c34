"""The largest logits and the mass of the rest: what is exact in a row made of them, and for which methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.logit_store.top import TopLogits, top_logits, top_logits_on
from ldrld_jax.losses import METHODS, standardized
from ldrld_jax.losses.ldrld import ldrld_terms
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh

K, CLASSES = 6, 20


@pytest.fixture
def rows(rng):
    """Logits `[5, C]`, float32, of a teacher and of a student whose 4 largest are among the teacher's K largest."""
    teacher = rng.normal(0, 3, (5, CLASSES)).astype(np.float32)
    student = rng.normal(0, 1, (5, CLASSES)).astype(np.float32)
    order = np.argsort(-teacher)
    for row, top in zip(student, order, strict=True):
        row[top[1:5]] = 6 + rng.normal(0, 1, 4)
    return jnp.asarray(teacher), jnp.asarray(student)


def test_the_largest_come_in_order_with_their_classes_and_the_mass_of_the_others(rng):
    logits = rng.normal(0, 4, (50, CLASSES))
    logits[:, 3] = logits[:, 7]  # a tie goes to the lower class
    top = top_logits(jnp.asarray(logits, jnp.float32), K, jnp.float16)
    rounded = logits.astype(np.float32).astype(np.float16)
    order = np.argsort(-rounded, kind="stable")[:, :K]
    assert (top.values.dtype, top.classes.dtype, top.rest.dtype, top.total) == (
        *(jnp.float16, jnp.uint16, jnp.float32),
        CLASSES,
    )
    np.testing.assert_array_equal(top.classes, order)
    np.testing.assert_array_equal(top.values, np.take_along_axis(rounded, order, -1))
    others = np.exp(rounded.astype(np.float64))
    np.put_along_axis(others, order, 0, -1)
    np.testing.assert_allclose(top.rest, np.log(others.sum(-1)), rtol=1e-6, atol=1e-6)


def test_a_row_made_of_them_has_the_exact_probabilities_and_mass(rows):
    teacher, _ = rows
    dense = top_logits(teacher, K, jnp.float32).dense(jnp.float32)
    p, q = (np.asarray(jax.nn.softmax(z.astype(jnp.float32)), np.float64) for z in (teacher, dense))
    stored = np.asarray(jnp.argsort(-teacher)[:, :K])
    np.testing.assert_allclose(q.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(q, stored, -1), np.take_along_axis(p, stored, -1), rtol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(dense, stored, -1), np.take_along_axis(teacher, stored, -1))
    rest = np.delete(q[0], stored[0])
    np.testing.assert_allclose(rest, np.delete(p[0], stored[0]).sum() / (CLASSES - K), rtol=1e-5)


def test_all_but_one_logit_are_all_logits(rows):
    teacher, _ = rows
    np.testing.assert_allclose(top_logits(teacher, CLASSES - 1, jnp.float32).dense(jnp.float32), teacher, rtol=1e-6)


def test_more_classes_than_16_bits_count_have_indices_of_32():
    logits = jnp.zeros((1, 70_000)).at[0, 69_999].set(1.0)
    top = top_logits(logits, 1, jnp.float32)
    assert (top.classes.dtype, int(top.classes[0, 0])) == (jnp.uint32, 69_999)


def test_the_selection_stays_on_the_device_of_its_rows(rows):
    mesh = make_mesh(data=2)
    logits = jax.device_put(jnp.concatenate([rows[0], rows[0][:3]]), batch_sharding(mesh))
    select = jax.jit(lambda z: top_logits_on(mesh, z, K, jnp.float32), out_shardings=batch_sharding(mesh))
    jax.tree.map(np.testing.assert_array_equal, select(logits), top_logits(logits, K, jnp.float32))
    program = select.lower(logits).compile().as_text()
    assert "all-gather" not in program
    assert "TopK" in program and " sort(" not in program  # XLA for CPU may turn a selection into a sort of whole rows
    dense = jax.jit(lambda top: top.dense(jnp.float32))
    assert "all-gather" not in dense.lower(select(logits)).compile().as_text()


def test_ldrld_is_exact_where_the_students_largest_are_stored_but_for_the_spread_of_the_remainder(rows):
    teacher, student = rows
    sparse = top_logits(teacher, K, jnp.float32).dense(jnp.float32)
    cfg = METHODS["ldrld"].config(depth=4, temperature=4.0)

    def part(name):
        return jax.value_and_grad(lambda z, teacher: jnp.sum(getattr(ldrld_terms(teacher, z, cfg), name)))

    for name in ("pairs", "integrity"):
        for ours, exact in zip(part(name)(student, sparse), part(name)(student, teacher), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
    # At T = 1 the remainder's teacher has the exact mass in each stored class, and the same in the others together.
    flat = dataclasses.replace(cfg, temperature=1.0)
    gradient = jax.grad(lambda z, teacher: jnp.sum(ldrld_terms(teacher, z, flat).remainder))
    ours, exact = (np.asarray(gradient(student, z)) for z in (sparse, teacher))
    stored = np.asarray(jnp.argsort(-teacher)[:, :K])
    np.testing.assert_allclose(*(np.take_along_axis(g, stored, -1) for g in (ours, exact)), rtol=1e-4, atol=1e-6)
    assert np.abs(ours - exact).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ldrld", {"depth": 4, "use_remainder": False}),
        ("bild", {"top_k": 4}),
        ("topk_tail", {"top_k": 4}),
        ("topk_tail", {"top_k": 4, "beta": 0.0}),
        ("topk_tail", {"top_k": 4, "beta": 0.5}),
        ("topk_tail", {"top_k": 4, "temperature": 2.0, "tail": False}),
    ],
)
def test_methods_that_need_the_largest_alone_give_the_loss_and_gradient_of_whole_rows(rows, name, settings):
    teacher, student = rows
    method, cfg = METHODS[name], METHODS[name].config(**settings)
    assert method.top_needed(cfg) == 4
    sparse = top_logits(teacher, K, jnp.float32).dense(jnp.float32)
    loss = jax.value_and_grad(lambda z, teacher: method.loss(teacher, z, jnp.zeros(5, jnp.int32), cfg))
    for ours, exact in zip(loss(student, sparse), loss(student, teacher), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
    assert np.abs(loss(student, teacher)[1]).max() > 1e-2


def test_all_other_methods_need_every_logit():
    some = {name: method for name, method in METHODS.items() if method.top_needed is not None}
    needed = {name: method.top_needed(method.config()) for name, method in some.items()}
    assert needed == {"ldrld": None, "bild": 8, "topk_tail": 1}
    assert METHODS["topk_tail"].top_needed(METHODS["topk_tail"].config(temperature=2.0)) is None
    assert standardized(METHODS["bild"]).top_needed is None


def test_padding_of_zeros_is_a_finite_row():
    padding = TopLogits(np.zeros((2, 3), np.float16), np.zeros((2, 3), np.uint16), np.zeros(2, np.float32), 10)
    assert bool(jnp.isfinite(padding.dense(jnp.float32)).all())
