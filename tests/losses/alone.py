"""Runs every loss where nothing but JAX and NumPy is installed: python tests/losses/alone.py"""

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax import METHODS, LDRLDConfig, ldrld_loss, ldrld_terms

teacher, student = jnp.array([[3.0, 1.0, 0.0, -2.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
terms = ldrld_terms(teacher, student, LDRLDConfig(depth=2))
np.testing.assert_allclose(np.concatenate(terms), [0.7569, 1.0993, 0.4848], atol=5e-5)
assert ldrld_loss(teacher, teacher, LDRLDConfig(depth=3)) == 0
rng = np.random.default_rng(0)
for name, method in METHODS.items():
    cfg = method.config()
    shape = (2,) * (method.views(cfg) == 2) + (6, 10)
    teacher, student = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    labels = jnp.broadcast_to(jnp.arange(6), shape[:-1])
    params = method.init(cfg) if method.init else method.from_teacher and method.from_teacher(jnp.eye(10))
    loss = lambda z: method.loss(teacher, z, labels, cfg, params=params)  # noqa: B023, E731
    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.any(gradient), name
print(f"{len(METHODS)} losses")
