"""The writer of a run's metrics to MLflow."""

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from ldrld_jax.errors import UserError, needs, reason
from ldrld_jax.files import named, replace_text
from ldrld_jax.identity import identity

logger = logging.getLogger("ldrld_jax")

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_PARAMETERS = 100  # of a request
_LENGTH = 500  # of a parameter's text, which every version takes


class MLflowRun:
    """Writer to an MLflow run; a resumed training run continues the same one.

    MLflow's environment variables, such as `MLFLOW_TRACKING_URI`, say where it is stored.

    Args:
      workdir: of the run; its name is the run's name there, and `mlflow_id` in it the run's id.
      experiment: the experiment's name, made if there is none.
      config: of the run; the keys that identify it are the run's parameters there.

    Raises:
      UserError: if mlflow is not installed, or refuses the run.
    """

    def __init__(self, workdir: epath.Path, experiment: str, config: Mapping[str, Any]):
        with needs("log.mlflow", "mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException

        place, self._metric = workdir / "mlflow_id", Metric
        self._refusals, self._warned, self._status = MlflowException, False, "FINISHED"
        try:
            with needs("log.mlflow", "mlflow"):
                self._client = MlflowClient()  # it opens its store, by SQLAlchemy for a local one
            if place.exists():
                self._run = place.read_text()
                self._client.update_run(self._run, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(experiment)
            where = found.experiment_id if found else self._client.create_experiment(experiment)
            self._run = self._client.create_run(where, run_name=workdir.name).info.run_id
            params = [Param(key, str(value)[:_LENGTH]) for key, value in identity(config).items()]
            for start in range(0, len(params), _PARAMETERS):
                self._client.log_batch(self._run, params=params[start : start + _PARAMETERS])
        except MlflowException as error:
            raise UserError(
                f"MLflow refuses the run: {reason(error)}. Set MLFLOW_TRACKING_URI, or unset log.mlflow."
            ) from error
        with named(place):
            replace_text(place, self._run)

    def write(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, each value as `split/name`."""
        now = int(1000 * time.time())
        named_values = {f"{split}/{name}": value for name, value in values.items()} | {"epoch": epoch}
        metrics = [self._metric(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in named_values.items()]
        with self._warning():
            self._client.log_batch(self._run, metrics=metrics)

    def fail(self, error: BaseException) -> None:
        """Notes that the run did not end well: a signal killed it, or an error."""
        self._status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

    def close(self) -> None:
        with self._warning():
            self._client.set_terminated(self._run, self._status)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Logs what MLflow refuses once: metrics.jsonl has every line, and a server that is away ends no run."""
        try:
            yield
        except self._refusals as error:
            if not self._warned:
                logger.warning("MLflow did not take a line of metrics: %s. The run goes on.", reason(error))
            self._warned = True
