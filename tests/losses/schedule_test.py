"""Numbers of a loss that change by epoch."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.config.keys import LossSchedule
from ldrld_jax.losses import METHODS, ldrld_terms
from ldrld_jax.losses.schedule import Schedule, with_values
from ldrld_jax.train.objective import Objective, Term
from tests.losses.rows import given, lead

SCHEDULED = {f.name for f in dataclasses.fields(LossSchedule)} - {"kd_weight"}
FIELDS = {
    name: fields
    for name, method in METHODS.items()
    if (
        fields := [
            f.name for f in dataclasses.fields(method.config) if f.name in SCHEDULED and f.name not in method.fixed
        ]
    )
}
NONE = """
4
linear
linear:1@1
linear:1:2
linear:1@0:2@3
linear:1@5:2@3
linear:1@3:2@3
cubic:1@1:2@2
linear:nan@1:2@2
linear:1@1:inf@2
steps:1@1.5:2@2
linear:1@1:2@2:
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linear:1@1:10.5@20", {1: 1.0, 10: 1 + 9.5 * 9 / 19, 20: 10.5, 21: 10.5}),
        ("linear:0@2:4@4:1@7", {1: 0.0, 2: 0.0, 3: 2.0, 4: 4.0, 5: 3.0, 7: 1.0, 8: 1.0}),
        ("cosine:1@150:0@240", {149: 1.0, 172: 0.5 + 0.5 * math.cos(math.pi * 22 / 90), 195: 0.5, 240: 0.0, 241: 0.0}),
        ("steps:4@1:2@100:1@150", {1: 4.0, 99: 4.0, 100: 2.0, 149: 2.0, 150: 1.0, 200: 1.0}),
    ],
)
def test_a_schedule_has_the_values_of_its_formula(text, expected):
    schedule = jax.jit(Schedule.parse(text))
    for epoch, value in expected.items():
        np.testing.assert_allclose(schedule(jnp.int32(epoch)), value, atol=1e-6)


@pytest.mark.parametrize("text", ["", *NONE.split()])
def test_what_is_no_schedule_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"must be a schedule by epoch, such as linear:1@1:10\.5@20"):
        Schedule.parse(text)


@pytest.mark.parametrize("name", FIELDS)
def test_a_method_computes_with_traced_fields_what_it_does_with_numbers(name, rng, strict_dtypes):
    method = METHODS[name]
    cfg = method.config()
    values = {field: 0.75 * getattr(cfg, field) + 0.1 for field in FIELDS[name]}
    shape, params = lead(method, cfg, 6), given(method, cfg, 10)
    teacher, student = (jnp.asarray(3 * rng.normal(size=(*shape, 10)), jnp.float32) for _ in range(2))
    labels = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), shape)
    where = jnp.ones(shape, bool).at[..., 2].set(False)

    @jax.value_and_grad
    def loss(student, values):
        chosen = with_values(cfg, values) if isinstance(values, dict) else values
        return method.loss(teacher, student, labels, chosen, params=params, where=where)

    numbers = {**{field: jnp.float32(value) for field, value in values.items()}, "no_field": jnp.float32(1)}
    expected = jax.jit(lambda z: loss(z, dataclasses.replace(cfg, **values)))(student)
    chex.assert_trees_all_close(jax.jit(loss)(student, numbers), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_class_ruled_out_by_infinity_counts_the_same_at_a_scheduled_temperature(implementation, rng):
    """ldrld takes -inf on the student's side alone for -1e30, before the division by the temperature."""
    teacher, student = (rng.normal(size=(6, 10)).astype(np.float32) for _ in range(2))
    student[1, 3], teacher[2, 4], teacher[3, :2], student[3, :2] = -np.inf, -np.inf, -np.inf, -np.inf
    cfg = METHODS["ldrld"].config(depth=4)

    def terms(temperature=None):
        used = cfg if temperature is None else with_values(cfg, {"temperature": temperature})
        return ldrld_terms(teacher, student, used, implementation=implementation)

    found, expected = jax.jit(terms)(jnp.float32(cfg.temperature)), jax.jit(terms)()
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)
    assert max(expected.pairs[1], expected.integrity[1], expected.remainder[1]) > 1e28


def test_fields_that_decide_what_is_computed_are_all_named():
    """A schedule of another field is an error of JAX's, which no user should see."""
    names = [(name, field) for name, method in METHODS.items() for field in method.fixed]
    assert names == [("abkd", "alpha"), ("abkd", "beta"), ("topk_tail", "beta")]
    assert FIELDS["ldrld"] == ["temperature", "alpha", "beta"]
    assert FIELDS["wkd"] == ["temperature", "gamma"]


def test_a_config_without_such_a_field_is_itself():
    cfg = METHODS["ttm"].config()
    assert with_values(cfg, {"temperature": jnp.float32(1)}) is cfg


def test_a_scheduled_temperature_needs_what_each_of_its_values_does():
    """topk_tail's bucket at another temperature than 1 is not stored with a teacher's largest logits."""
    term = Term(METHODS["topk_tail"], METHODS["topk_tail"].config(top_k=5))
    scheduled = lambda text: Objective({"topk_tail": term}, schedules={"temperature": Schedule.parse(text)})  # noqa: E731
    assert Objective({"topk_tail": term}).top_needed == {"topk_tail": 5}
    assert scheduled("steps:1@1:1@9").top_needed == {"topk_tail": 5}
    assert scheduled("steps:1@1:4@100").top_needed == {"topk_tail": None}
