"""Evaluation of a network on a whole split."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ldrld_jax.data.pipeline import made_by
from ldrld_jax.data.source import InMemory
from ldrld_jax.data.stream import Batch, Readable, eval_batches
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.metrics import Means, Packed, add, by_step, pack
from ldrld_jax.runtime.mesh import Mesh, replicated, shares, to_devices
from ldrld_jax.train.step import Ensemble, Metric, Network, make_eval_step

NOTHING_LEFT = "no image of the evaluation split is left: all were skipped. Look at data.eval_split."
_POLL_SECONDS = 5e-4, 0.01  # at first, and at most


class Evaluator:
    """Evaluator of a network on every example of a source, once each.

    A source that is kept in memory goes to the devices as a whole, at the first evaluation, and is then
    evaluated by one program; others stream through one batch at a time. The numbers are the same.

    Attributes:
      step: the program of one batch, `step(variables, batch)`.
      split: the program of a whole split, `split(variables, batches)`, `[batches, rows, ...]` each.
      doing: what the next dispatch does, for progress bar and watchdog: "compiling the evaluation" or "evaluating".
    """

    def __init__(
        self,
        network: Network | Ensemble,
        source: Readable,
        config: ConfigDict,
        mesh: Mesh,
        extra_metrics: Mapping[str, Metric] = MappingProxyType({}),
    ):
        self._source, self._config, self._mesh = source, config, mesh
        means = make_eval_step(network, extra_metrics)

        def evaluate_batch(variables: Any, batch: Mapping[str, jax.Array]) -> Packed:
            return pack(means(variables, batch))

        def evaluate_split(variables: Any, batches: Mapping[str, jax.Array]) -> Packed:
            return jax.lax.map(lambda batch: evaluate_batch(variables, batch), batches)

        self.step, self.split = (jax.jit(f, out_shardings=replicated(mesh)) for f in (evaluate_batch, evaluate_split))
        self._stored: dict[str, jax.Array] | None = None
        self.doing = "compiling the evaluation"

    def __call__(
        self, variables: Any, each: Callable[[], None] = lambda: None, waiting: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Returns the cross-entropy in nats, and top-1 and top-5 in percent.

        Args:
          variables: of the network.
          each: called before each dispatch; it may raise.
          waiting: called again and again while a whole split is evaluated; it may raise.

        Raises:
          UserError: if no image is left to evaluate, or a user's metric is not finite.
          NonFiniteError: if the cross-entropy is not finite.
        """
        total: Means = {}
        each()
        for dispatched in self._dispatches(variables, waiting):
            self.doing = "evaluating"
            each()
            for means in by_step(dispatched):
                total = add(total, means)
        values = {name: mean.value for name, mean in total.items()}
        if not total["ce"].count:
            raise UserError(NOTHING_LEFT)
        if not math.isfinite(values["ce"]):
            raise NonFiniteError(
                f"the cross-entropy of the evaluation is {values['ce']}: the network's logits are not finite. Look at "
                "its weights, and at data.mean and data.std."
            )
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            raise UserError(f"{', '.join(bad)} of the evaluation is not finite. Fix the metric that computes it.")
        return values

    def _dispatches(self, variables: Any, waiting: Callable[[], None]) -> Iterator[Packed]:
        """Yields the means of the whole split at once, `[batches]` each, or batch by batch, one dispatch ahead."""
        if isinstance(self._source, InMemory):
            if self._stored is None:
                self._stored = self._to_devices()
            whole = self.split(variables, self._stored)
            seconds = _POLL_SECONDS[0]
            while not whole.values.is_ready():
                waiting()
                time.sleep(seconds)
                seconds = min(2 * seconds, _POLL_SECONDS[1])
            yield whole
            return
        pending = None
        for batch in to_devices(self._batches(), self._mesh):
            means = self.step(variables, batch)
            if pending is not None:
                yield pending
            pending = means
        if pending is not None:
            yield pending

    def _batches(self) -> Iterator[Batch]:
        config = self._config
        return eval_batches(self._source, config.eval_batch_size, **made_by(config.data), **shares(self._mesh))

    def _to_devices(self) -> dict[str, jax.Array]:
        """Returns all batches, `[batches, rows, ...]`, with their rows split over the devices."""
        sharding = NamedSharding(self._mesh, PartitionSpec(None, "data"))
        batches = list(self._batches())
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in stacked.items()}
