"""The scope of a run's precision, whatever the caller set for the process or for its thread."""

import threading

import jax
import jax.numpy as jnp
import pytest

from ldrld_jax.runtime.precision import precision_scope


def here_and_in_a_thread() -> list[str]:
    """Returns the dtype of a new array in this thread and in another."""
    found = [str(jnp.ones(2).dtype)]
    thread = threading.Thread(target=lambda: found.append(str(jnp.ones(2).dtype)))
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("callers", [None, False, True])
@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("float32", "float32"), ("float64", "float64")])
def test_a_run_has_its_precision_and_the_caller_gets_its_own_back(callers, process, precision, dtype):
    jax.config.update("jax_enable_x64", process)
    try:
        before = here_and_in_a_thread()
        if callers is None:
            with precision_scope(precision):
                inside = here_and_in_a_thread()
        else:
            with jax.enable_x64(callers), precision_scope(precision):
                inside = here_and_in_a_thread()
        assert inside == [dtype, dtype]
        assert here_and_in_a_thread() == before == [f"float{64 if process else 32}"] * 2
    finally:
        jax.config.update("jax_enable_x64", False)
