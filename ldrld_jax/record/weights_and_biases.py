"""The writer of a run's metrics to Weights & Biases."""

import secrets
from collections.abc import Mapping
from typing import Any

from etils import epath

from ldrld_jax.errors import UserError, needs, reason
from ldrld_jax.files import named, replace_text


class WeightsAndBiases:
    """Writer to a run of Weights & Biases; a resumed training run continues the same one.

    wandb's own environment variables, such as `WANDB_MODE=offline`, say whether and where it sends data.

    Args:
      workdir: of the run; its name is the run's name there, and `wandb_id` in it the run's id.
      project: the project's name, or `entity/project`.
      config: what is shown as the run's config.

    Raises:
      UserError: if wandb is not installed, or refuses the run.
    """

    def __init__(self, workdir: epath.Path, project: str, config: Mapping[str, Any]):
        with needs("log.wandb.project", "wandb"):
            import wandb

        self._exit_code = 0
        place = workdir / "wandb_id"
        with named(place):
            if not place.exists():
                replace_text(place, secrets.token_hex(8))
            name = place.read_text()
        entity, _, project = project.rpartition("/")
        try:
            self._run = wandb.init(
                project=project,
                entity=entity or None,
                dir=str(workdir),
                id=name,
                name=workdir.name,
                resume="allow",
                # An active run is the user's own, which goes on; without one, wandb.log in a callback reaches this run.
                reinit="create_new" if wandb.run is not None else None,
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases refuses the run: {reason(error)}. Log in by `wandb login`, set "
                "WANDB_MODE=offline, or unset log.wandb.project."
            ) from error

    def write(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, each value as `split/name`."""
        self._run.log({f"{split}/{name}": value for name, value in values.items()} | {"epoch": epoch}, step=step)

    def fail(self, _: BaseException) -> None:
        """Notes that the run did not end well."""
        self._exit_code = 1

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)
