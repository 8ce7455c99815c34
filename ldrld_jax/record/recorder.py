"""The host's record of a run in progress: means, the best and the last evaluation, the speed."""

import collections
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.errors import NonFiniteError
from ldrld_jax.identity import identity
from ldrld_jax.metrics import Mean, Means, Packed, add, by_step
from ldrld_jax.record.console import ProgressBar, evaluation_line, say
from ldrld_jax.record.writer import LineWriter, Writer

_MOST_SKIPPED = 100  # steps in a row


class Recorder:
    """The means since the last line, the best and the last evaluation, and the speed of a run.

    Each of several processes keeps a recorder, and the first one writes. Its state is part of each
    checkpoint, so that a resumed run writes the same lines as an uninterrupted one.

    Args:
      workdir: of the run.
      config: of the run, resolved.
      role: "student" or "teacher"; a teacher's lines have splits of their own.
      host: the result of `to_json` at the step that the run resumes from; None for a new run.
      writers: further ones, which get every line.
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
        writers: Sequence[LineWriter] = (),
        *,
        start: int,
        steps: int,
        steps_per_epoch: int,
    ):
        counts = {"lines": 0, "skipped": 0, "seconds": 0.0, "examples_per_second": 0.0}
        host = host or {"best": {}, "last": {}, "window": {}, **counts}
        self.best: dict[str, float] = host["best"]
        self.last: dict[str, float] = host["last"]
        self.skipped: int = host["skipped"]
        self._skipped_in_a_row = 0
        self._config, self._role, self._steps, self._steps_per_epoch = config, role, steps, steps_per_epoch
        self._window: Means = {name: Mean(*pair) for name, pair in host["window"].items()}
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=200)
        self._clock: float | None = None
        self._begun = time.perf_counter() - host["seconds"]
        self._speed_before: float = host["examples_per_second"]
        self._writer = None
        if jax.process_index() == 0:
            self._writer = Writer(
                workdir,
                lines=host["lines"],
                step=start,
                tensorboard=config.log.tensorboard,
                hparams={key: str(v) if isinstance(v, list) else v for key, v in identity(config).items()},
                others=writers,
            )
        self._bar = ProgressBar(start, steps, f"{role} {config.student.model}")

    def at(self, doing: str) -> None:
        """Notes what the run does, for whoever watches the bar."""
        self._bar.at(doing)

    def to_json(self) -> dict[str, Any]:
        window = {name: list(mean) for name, mean in self._window.items()}
        kept = {"best": self.best, "last": self.last, "skipped": self.skipped, "seconds": self.seconds}
        speed = {"examples_per_second": self.examples_per_second}
        return {**kept, **speed, "window": window, "lines": self._writer.lines if self._writer else 0}

    @property
    def seconds(self) -> float:
        """The time from the first step on, evaluations included; of a resumed run without pauses and repeated steps."""
        return time.perf_counter() - self._begun

    @property
    def examples_per_second(self) -> float:
        """The speed of the median of the last 200 steps, which leaves out compilation; 0 before the second step.

        Before its second step, a resumed run has the speed that it was saved with.
        """
        if not self._step_seconds:
            return self._speed_before
        return self._config.batch_size / statistics.median(self._step_seconds)

    def add(self, step: int, metrics: Packed) -> None:
        """Adds the metrics of a dispatch that ended with `step`.

        Raises:
          NonFiniteError: if a term is not finite, for the first such step.
        """
        steps = by_step(metrics)
        self._tick(len(steps))
        for at, means in enumerate(steps, step - len(steps) + 1):
            self._add(at, means)

    def _add(self, step: int, means: Means) -> None:
        self._count_skipped(step, means)
        check_finite(step, means)
        means.pop("non_finite", None)
        self._window = add(self._window, means)
        if step % self._config.log.every_steps == 0 or step == self._steps:
            values = {name: mean.value for name, mean in self._window.items() if mean.count}
            self.write(step, "train", values | {"examples_per_second": self.examples_per_second})
            self._window = {}
        shown = {"loss": means["loss"].value, "top1": means["top1"].value, "examples/s": self.examples_per_second}
        self._bar.update(step, shown)

    def _count_skipped(self, step: int, means: Means) -> None:
        """Counts the steps that `non_finite=skip` skipped, and raises a NonFiniteError after too many in a row."""
        if "skipped" not in means:
            return
        if not means["skipped"].total:
            self._skipped_in_a_row = 0
            return
        if not self.skipped:
            say(f"step {step} is skipped: its loss or its weights are not finite. Further ones are counted, not shown.")
        self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MOST_SKIPPED:
            raise NonFiniteError(
                f"the loss or the weights were not finite for {_MOST_SKIPPED} steps in a row, the last of them {step}. "
                "The last checkpoint is untouched. Lower optim.learning_rate, or set non_finite=stop to see the term."
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Adds an evaluation, writes it and prints it."""
        self.write(step, "eval", values)
        epoch = step / self._steps_per_epoch
        self.last = {**values, "epoch": epoch}
        if not self.best or values["top1"] >= self.best["top1"]:
            self.best = self.last
        say(evaluation_line(self._role, epoch, self._config.epochs, values, self.best["top1"]))

    def evaluated_at(self, step: int) -> bool:
        """Returns whether the last evaluation was after this step."""
        return self.last.get("epoch") == step / self._steps_per_epoch

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        name = f"teacher_{split}" if self._role == "teacher" else split
        if self._writer is not None:
            self._writer.write(step, step / self._steps_per_epoch, name, values)

    def go_on(self) -> None:
        """Starts the clock of the steps again after a pause, whose time is none of theirs."""
        if self._clock is not None:  # else the next interval has the compilation
            self._clock = time.perf_counter()

    def _tick(self, steps: int) -> None:
        now = time.perf_counter()
        if self._clock is not None:
            self._step_seconds.extend([(now - self._clock) / steps] * steps)
        self._clock = now

    def flush(self) -> None:
        """Brings the lines to the disk: the checkpoint that follows counts on them."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def check_finite(step: int, means: Means) -> None:
    """Raises a NonFiniteError unless the terms of a step and the weights after it are finite."""
    bad = [name for name, mean in means.items() if not math.isfinite(mean.total)]
    diverged = not math.isfinite(means["loss"].total) or ("non_finite" in means and means["non_finite"].total)
    if not bad and not diverged:
        return
    advice = "Lower optim.learning_rate, or look at the data of that step."
    if not diverged:
        advice = "The loss and the weights are finite: fix the metric that computes it."
    raise NonFiniteError(
        f"{', '.join(bad) or 'the weights'} {'is' if len(bad) == 1 else 'are'} not finite at step {step} (loss "
        f"{means['loss'].value}). The last checkpoint is untouched. {advice}"
    )
