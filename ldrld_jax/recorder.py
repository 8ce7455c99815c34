"""What a run knows on the host while it trains: means, the best and the last evaluation, its speed."""

import collections
import math
import statistics
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.console import ProgressBar, evaluation_line, say
from ldrld_jax.metrics import Mean, Means, Writer, add, by_step


class NonFiniteError(RuntimeError):
    """A term of the loss is not finite any more; the message says which, and since which step."""

    exit_code = 1


class Recorder:
    """What a run knows on the host: the means since the last line, the best and the last evaluation.

    It is part of each checkpoint, so that a resumed run writes the same lines as one that never stopped.

    Args:
      workdir: of the run.
      config: of the run, resolved.
      role: "student" or "teacher"; a teacher's lines have splits of their own.
      host: what `to_json` gave at the step that the run resumes from; None for a new run.
      start: the step that the run resumes from.
      steps: the step that it ends at.
      steps_per_epoch: of its data.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: ConfigDict,
        role: str,
        host: dict[str, Any] | None = None,
        *,
        start: int,
        steps: int,
        steps_per_epoch: int,
    ):
        host = host or {"best": {}, "last": {}, "window": {}, "lines": 0}
        self.best: dict[str, float] = host["best"]
        self.last: dict[str, float] = host["last"]
        self._config, self._role, self._steps, self._steps_per_epoch = config, role, steps, steps_per_epoch
        self._window: Means = {name: Mean(*pair) for name, pair in host["window"].items()}
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=200)
        self._clock: float | None = None
        self._writer = Writer(workdir, lines=host["lines"], step=start, tensorboard=config.log.tensorboard)
        self._bar = ProgressBar(start, steps, f"{role} {config.student.model}")

    def to_json(self) -> dict[str, Any]:
        window = {name: list(mean) for name, mean in self._window.items()}
        return {"best": self.best, "last": self.last, "window": window, "lines": self._writer.lines}

    @property
    def examples_per_second(self) -> float:
        """Of the median of the last 200 steps, which leaves out compilation; 0 before there are two."""
        return self._config.batch_size / statistics.median(self._step_seconds) if self._step_seconds else 0.0

    def add(self, step: int, metrics: Means) -> None:
        """Takes in the metrics of a dispatch that ended with `step`: scalars of one step, `[k]` each of k.

        Raises:
          NonFiniteError: if a term is not finite; the first step of which that is so.
        """
        steps = by_step(metrics)
        self._tick(len(steps))
        for at, means in enumerate(steps, step - len(steps) + 1):
            self._add(at, means)

    def _add(self, step: int, means: Means) -> None:
        bad = [name for name, mean in means.items() if not math.isfinite(mean.total)]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} not finite at step {step} (loss {means['loss'].value}). The last checkpoint is "
                "untouched. Lower optim.learning_rate, or look at the data of that step."
            )
        self._window = add(self._window, means)
        if step % self._config.log.every_steps == 0 or step == self._steps:
            values = {name: mean.value for name, mean in self._window.items()}
            self.write(step, "train", values | {"examples_per_second": self.examples_per_second})
            self._window = {}
        shown = {"loss": means["loss"].value, "top1": means["top1"].value, "examples/s": self.examples_per_second}
        self._bar.update(step, shown)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Takes in an evaluation."""
        self.write(step, "eval", values)
        epoch = step / self._steps_per_epoch
        self.last = {**values, "epoch": epoch}
        if not self.best or values["top1"] >= self.best["top1"]:
            self.best = self.last
        say(evaluation_line(self._role, epoch, self._config.epochs, values, self.best["top1"]))
        self._clock = None  # the next interval is not a step's

    def evaluated_at(self, step: int) -> bool:
        """Whether the last evaluation was after this step."""
        return self.last.get("epoch") == step / self._steps_per_epoch

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        name = f"teacher_{split}" if self._role == "teacher" else split
        self._writer.write(step, step / self._steps_per_epoch, name, values)

    def _tick(self, steps: int) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self._step_seconds.extend([(now - self._clock) / steps] * steps)
        self._clock = now

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
