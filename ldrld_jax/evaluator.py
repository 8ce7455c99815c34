"""Evaluation of a network on a whole split."""

from typing import Any

import jax
from ml_collections import ConfigDict

from ldrld_jax.data.stream import Readable, eval_batches
from ldrld_jax.mesh import Mesh, replicated, shares, to_devices
from ldrld_jax.metrics import Means, add, on_host
from ldrld_jax.train_step import Ensemble, Network, make_eval_step


class Evaluator:
    """Evaluates a network on every example of a source, once each."""

    def __init__(self, network: Network | Ensemble, source: Readable, config: ConfigDict, mesh: Mesh):
        self._step = jax.jit(make_eval_step(network), out_shardings=replicated(mesh))
        self._source, self._config, self._mesh = source, config, mesh

    def __call__(self, variables: Any) -> dict[str, float]:
        """Cross-entropy in nats, top-1 and top-5 in percent."""
        batches = eval_batches(
            self._source, self._config.eval_batch_size, threads=self._config.data.threads, **shares(self._mesh)
        )
        total: Means = {}
        pending: Means = {}
        for batch in to_devices(batches, self._mesh):
            means = self._step(variables, batch)  # dispatched before the last one is waited for
            total, pending = add(total, on_host(pending)), means
        total = add(total, on_host(pending))
        return {name: mean.value for name, mean in total.items()}
