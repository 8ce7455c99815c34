"""Programs of a run with a logit store, from shapes alone: the teacher gives what the step takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.aot import cost
from ldrld_jax.aot.programs import programs_of
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.train.plan import Run


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("top_k", [None, 4])
def test_the_step_takes_logits_in_the_form_in_which_the_teacher_stores_them(tiny, tmp_path, top_k, together):
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.checkpoint=untrained", f"logits.dir={tmp_path / 'logits'}"]
    flags += ["data.loader=resident", f"steps_per_dispatch={together}"]
    flags += [] if top_k is None else [f"logits.top_k={top_k}", "logits.spread_rest=True"]
    programs = {p.name: p for p in programs_of(Run.plan(config_lib.resolve(tiny(*flags)), tmp_path / "run"))}
    teacher = programs["teacher of the logit store"]
    stored = jax.eval_shape(teacher.jitted, *teacher.arguments.values())
    taken = programs["train step"].arguments["batch"]["teacher_logits"]
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(stored) == shapes(taken)
    whole = [((40, 10), jnp.float16)]
    largest = [((40, 4), jnp.float16), ((40, 4), jnp.uint16), ((40,), jnp.float32)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(stored)] == (whole if top_k is None else largest)
    step = programs["train step" if together == 1 else "2 train steps"]
    state, _ = jax.eval_shape(step.jitted, *step.arguments.values())
    assert shapes(state) == shapes(step.arguments["state"])


HOST = HostTeacher(lambda images: np.zeros((len(images), 10), np.float32), name="host")


@pytest.mark.parametrize(("method", "views"), [("kd", ()), ("sld", (2,)), ("kd+sld", (2,))])
def test_the_step_takes_a_host_teachers_logits_of_each_view(tiny, tmp_path, method, views):
    config = config_lib.resolve(tiny(f"method={method}", f"teacher.model={__name__}:HOST"))
    step = next(p for p in programs_of(Run.plan(config, tmp_path / "run")) if p.name == "train step")
    assert step.arguments["batch"]["teacher_logits"].shape == (40, *views, 10)
    jax.eval_shape(step.jitted, *step.arguments.values())


def test_what_a_store_leaves_in_memory_beside_a_program_is_counted_once(tiny, tmp_path):
    """Counts the resident training set, which one batch replaced: the teacher's argument had the same name."""
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.checkpoint=untrained", "data.loader=resident"]
    run = Run.plan(config_lib.resolve(tiny(*flags, f"logits.dir={tmp_path / 'logits'}")), tmp_path / "run")
    programs = list(programs_of(run))
    resident = next(p for p in programs if p.name == "batch of resident images").argument_bytes()["images"]
    for program in programs:
        expected = 0 if program.name == "batch of resident images" else resident
        assert cost._beside(program, programs) >= expected
    teacher = next(p for p in programs if p.name == "teacher of the logit store")
    assert "images" not in teacher.argument_bytes()
