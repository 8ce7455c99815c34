"""Trains runs in parallel in time slices; each slice continues from the last checkpoints."""

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from stages import plan, record
from stages.plan import Job, Progress, Setting
from stages.processes import Minutes, Task

LEAST_SECONDS = 40.0  # for imports, cached compilation and an epoch
TRIAL_SECONDS = 100.0
_LINES = 4  # log lines (one per epoch) that a trial waits for
_BATCH = 64

Launch = Callable[..., dict[str, int | None]]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs in a work folder.

    Attributes:
      folder: the work folder.
      precision: the config's precision; each precision has its own runs.
      shrink: True for a rehearsal with tiny networks, data and epochs, and the same code.
    """

    folder: pathlib.Path
    precision: str = "float32"
    shrink: bool = False

    @property
    def pairs(self) -> Sequence[str]:
        return ("resnet8-resnet8",) if self.shrink else plan.PAIRS

    @property
    def seeds(self) -> Sequence[int]:
        return plan.SEEDS[:1] if self.shrink else plan.SEEDS

    @property
    def together(self) -> Sequence[int]:
        return plan.TOGETHER[:2] if self.shrink else plan.TOGETHER

    @property
    def steps(self) -> int:
        return 6 * 4 if self.shrink else 240 * 782

    def place(self, job: Job) -> pathlib.Path:
        return self.folder / "runs" / self.precision / job.name

    def jobs(self) -> list[Job]:
        """Returns all jobs, finished or not."""
        return plan.order(Progress(self.steps, {}, frozenset(), {}), self.pairs, self.seeds)

    def progress(self) -> Progress:
        """Reads progress and speeds from the runs' folders."""
        done, finished, seconds = dict[str, int](), set[str](), dict[str, float]()
        for job in self.jobs():
            place = self.place(job)
            done[job.name] = last_step(place)
            if (place / "summary.json").exists():
                finished.add(job.name)
            if speeds := list(self.speeds(job)):
                seconds[job.kind] = _BATCH / speeds[-1]
        return Progress(self.steps, done, frozenset(finished), seconds)

    def speeds(self, job: Job) -> Iterator[float]:
        """Yields the images/s of each training line of a run's log."""
        for line in log_lines(self.place(job)):
            speed = line["values"].get("examples_per_second", 0.0)
            if line["split"] == "train" and speed > 0:
                yield speed

    def command(self, job: Job) -> list[str]:
        """Returns the command line of a run with the published recipe."""
        teacher, student = job.networks
        overrides = {
            "data.data_dir": self.folder / "data",
            "data.loader": "resident",
            "precision": self.precision,
            "steps_per_dispatch": 71,  # 11 dispatches cover the full batches of an epoch
            "eval_every_epochs": 5,
            "log.every_steps": 782,
            "log.tensorboard": False,
            "checkpoint.keep_last": 1,
        }
        if self.shrink:
            overrides |= {"data.train_split": "train[:64]", "data.eval_split": "test[:64]", "batch_size": 16}
            overrides |= {"epochs": 6, "steps_per_dispatch": 2, "log.every_steps": 1, "teacher.epochs": 6}
        if job.method == plan.TEACHER:
            student = teacher
            overrides |= {"method": "ce", "optim.warmup": "none"}
        else:
            overrides |= {"method": job.method, "seed": job.seed, "teacher.workdir": self.place(job.teacher)}
        config = f"configs/cifar100.py:{teacher}-{student}"
        flags = [f"--config.{key}={value}" for key, value in overrides.items()]
        module = [sys.executable, "-m", "ldrld_jax.main", "--config", config, "--workdir", str(self.place(job))]
        return [*module, *flags]


def train(
    runs: Runs,
    minutes: Minutes,
    launch: Launch,
    about: Mapping[str, Any],
    *,
    publish: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Trains as long as time allows; progress is kept in the runs' folders and in this stage's record.

    The first slices are trials: their training counts, and their speeds decide the setting of the later slices.

    Args:
      runs: the runs.
      minutes: the time available.
      launch: `launch(tasks, seconds, enough)`, see `Launcher`.
      about: device, versions and commit, for the record.
      publish: called after each slice.
      say: called with a line for each slice.
    """
    name = f"training.{runs.precision}"
    kept = record.read(runs.folder, name).get("values", {})
    slices = list(kept.get("slices", ()))
    while minutes.left() >= (1.0 if runs.shrink else LEAST_SECONDS):
        progress = runs.progress()
        jobs = plan.order(progress, runs.pairs, runs.seeds)
        if not jobs:
            break
        measured = rates(one for one in slices if one["device"] == about["device"])
        setting, is_trial = plan.next_setting(measured, runs.together)
        chosen = plan.runnable(jobs, progress, setting.together)
        if is_trial and len(chosen) < setting.together:  # too few jobs for a trial
            setting, is_trial = max(measured, key=lambda known: measured[known]), False
            chosen = chosen[: setting.together]
        say(f"{', '.join(job.name for job in chosen)}: {setting.together} together, flags {setting.flags or 'none'}")
        one = _slice(runs, chosen, setting, is_trial, minutes, launch)
        slices.append({**one, "device": about["device"]})
        after = runs.progress()
        ended = {job.name: _ended(runs, job) for job in runs.jobs() if job.name in after.finished}
        todo = plan.order(after, runs.pairs, runs.seeds)
        values = {"slices": slices, "ended": ended, "seconds_left": sum(map(after.remaining, todo))}
        record.write(runs.folder, name, {**about, "complete": not todo, "values": values})
        publish()
        if one["error"]:
            say(one["error"])
            if setting == plan.PLAIN or not is_trial:
                break  # a repetition would fail again


def _slice(
    runs: Runs, jobs: Sequence[Job], setting: Setting, is_trial: bool, minutes: Minutes, launch: Launch
) -> dict[str, Any]:
    """Runs jobs in parallel for one slice; returns its record, with their combined speed."""
    before = runs.progress()
    known = {job.name: len(list(runs.speeds(job))) for job in jobs}

    def new(job: Job) -> list[float]:
        return list(runs.speeds(job))[known[job.name] :]

    def enough() -> bool:
        if is_trial:
            return all(len(new(job)) >= _LINES for job in jobs)
        if not any((runs.place(job) / "summary.json").exists() for job in jobs):
            return False
        # Restart with a replacement for a finished run, unless the other runs, which restart too, end soon.
        now = runs.progress()
        running = [job for job in jobs if job.name not in now.finished]
        jobs_then = plan.runnable(plan.order(now, runs.pairs, runs.seeds), now, setting.together)
        return len(jobs_then) > len(running) and all(now.remaining(job) > LEAST_SECONDS for job in running)

    # JAX refuses the variable beside its old name.
    env = {"XLA_CLIENT_MEM_FRACTION": f"{0.9 / len(jobs):.2f}", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}
    env |= {"XLA_FLAGS": setting.flags} if setting.flags else {}
    begun = minutes.left()
    seconds = min(begun, TRIAL_SECONDS) if is_trial else begun
    tasks = [Task(job.name, runs.command(job), seconds, 0.0, env) for job in jobs]
    codes = launch(tasks, seconds, enough)
    after = runs.progress()
    failed = [job.name for job in jobs if codes[job.name] not in (0, None)]
    rate = None
    if all(map(new, jobs)) and not failed:
        rate = sum(plan.prior(job) * new(job)[-1] / _BATCH for job in jobs)
    elif is_trial and (seconds >= TRIAL_SECONDS or (failed and setting != plan.PLAIN)):
        rate = 0.0  # do not try it again
    return {
        "jobs": {job.name: after.done[job.name] - before.done[job.name] for job in jobs},
        "flags": setting.flags,
        "together": setting.together,
        "seconds": round(begun - minutes.left(), 1),
        "step_ms": {job.name: 1e3 * _BATCH / new(job)[-1] for job in jobs if new(job)},
        "rate": rate,
        "error": f"{', '.join(failed)} failed: {[codes[name] for name in failed]}" if failed else None,
        "commands": {job.name: shlex.join(["python", *runs.command(job)[1:]]) for job in jobs},
    }


def rates(slices: Iterable[Mapping[str, Any]]) -> dict[Setting, float]:
    """Returns the last measured work per second of each setting; a step's work is its cost by `plan.prior`."""
    return {Setting(one["flags"], one["together"]): one["rate"] for one in slices if one["rate"] is not None}


def _ended(runs: Runs, job: Job) -> dict[str, Any]:
    return json.loads((runs.place(job) / "summary.json").read_text())


def last_step(place: pathlib.Path) -> int:
    """Returns the last saved step; 0 if there is none."""
    return max((int(path.name) for path in place.glob("checkpoints/*") if path.name.isdigit()), default=0)


def log_lines(place: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a run's log; a half-written last line is dropped."""
    try:
        text = (place / "metrics.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]
