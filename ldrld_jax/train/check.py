"""A check of a run before it trains: its data, its models and a step, and the time and the disk that it will take."""

import copy
import dataclasses
import functools
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data import workers
from ldrld_jax.data.ahead import makers
from ldrld_jax.data.pipeline import make_train_batches
from ldrld_jax.data.source import Selected, Source, spaced, too_many, whole_of
from ldrld_jax.data.stream import Readable
from ldrld_jax.errors import NonFiniteError, UserError, one_line
from ldrld_jax.files import free_bytes, human_bytes, is_local
from ldrld_jax.logit_store.feed import missing_epochs
from ldrld_jax.metrics import by_step
from ldrld_jax.record.console import ProgressBar, counted, duration, say
from ldrld_jax.record.recorder import check_finite
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.runtime.mesh import make_mesh
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.signals import Signals, catch_signals
from ldrld_jax.train.dispatch import Dispatcher
from ldrld_jax.train.evaluator import Evaluator
from ldrld_jax.train.folder import RunFolder, pinned
from ldrld_jax.train.given import NOTHING, Given
from ldrld_jax.train.input import open_evaluation, opener
from ldrld_jax.train.loop import make_step
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.objective import make_objective
from ldrld_jax.train.opening import no_images, opening, teacher_warnings, warnings
from ldrld_jax.train.optim import make_optimizer
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network
from ldrld_jax.train.teacher import (
    NetworkTeacher,
    Teacher,
    check_store,
    check_top1,
    checkpoints_of,
    obtain_teacher,
    open_store,
    recipes,
    teacher_at_hand,
    top1_of,
    weights_of,
)

T = TypeVar("T")

_AT_ONCE = 64  # images that a thread decodes before the bar moves
_MOST_SHOWN = 10  # broken images of a split
_TIMED_SECONDS = 3.0


def check(config: ConfigDict, workdir: epath.PathLike, *, given: Given = NOTHING) -> list[str]:
    """Checks what a run needs and says what it finds; trains nothing, and writes nothing to the workdir.

    Every image of both splits is decoded, or `check.images` of each. Models and checkpoints are loaded, a step is
    taken forward and back, student and teacher are evaluated, and the run's time and disk are reckoned from that. A
    teacher that the run would train first is checked as a run of its own; until it is trained, the step is timed with
    random weights in its place.

    Args:
      config: of `ldrld_jax.config.load`.
      workdir: the folder that the run's files would lie in.
      given: parts that are objects.

    Returns:
      The problems, a line each; empty if the run can start.

    Raises:
      UserError: if the config contradicts itself.
      Interrupted: on SIGTERM or SIGINT.
    """
    config = config_lib.resolve(config, given.methods)
    problems = _Lines()
    scope = precision_scope(config.precision, config.matmul_precision)
    with keep_compiled(config.compile_cache), scope, workers.scope(), catch_signals() as signals:
        place = epath.Path(workdir)
        run = problems.from_(lambda: Run.plan(pinned(config, place), place, given=given))
        if run is None:
            _check_parts(config, given, problems)
        elif seconds := _Check(run, "student", problems, signals).all():
            say(f"in all    {duration(round(seconds))}")
    return list(problems)


class _Lines:
    """Lines on what is wrong, each once, in order."""

    def __init__(self) -> None:
        self._lines = dict[str, None]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def add(self, *lines: str) -> None:
        """Adds lines, each with single blanks between its words."""
        self._lines |= dict.fromkeys(" ".join(line.split()) for line in lines)

    def from_(self, work: Callable[[], T]) -> T | None:
        """Returns what `work` returns; None after an error of the input, which becomes a line."""
        try:
            return work()
        except (UserError, NonFiniteError, OSError) as error:
            self.add(str(error))
            return None


def _check_parts(config: ConfigDict, given: Given, problems: _Lines) -> None:
    """Looks for problems beside the first, at which the plan stopped: in each part by itself."""
    data = dict(batch_size=config.batch_size, seed=config.seed, open_source=opener(given.train))
    problems.from_(lambda: make_mesh(config.mesh.data, config.mesh.model))
    problems.from_(lambda: make_objective(config, given.methods))
    problems.from_(lambda: given.optimizer or make_optimizer(config.optim, jnp.zeros_like))
    views = problems.from_(lambda: config_lib.views(config, given.methods)) or 1
    batches = problems.from_(lambda: make_train_batches(config.data, views=views, **data))  # type: ignore[arg-type]
    evaluated = problems.from_(lambda: open_evaluation(config, given))
    source = batches.source if batches is not None else evaluated
    if source is None:
        return
    networks = Networks.of(source, config.precision, given.models)
    student, teacher = config.student, config.teacher
    models = [(student.model, student.checkpoint, config.data)]
    outside = config_lib.teaches_from_file(config) or given.host_teacher(config) is not None
    if teacher and not config_lib.teaches_itself(config) and not outside:
        names = config_lib.teacher_models(config)
        paths: list[Any] = config_lib.teacher_checkpoints(config) or [None] * len(names)
        models += [(name, path, teacher.data) for name, path in zip(names, paths, strict=False)]
    for name, path, block in models:
        load = networks.outline if path is None else functools.partial(networks.restore, path)
        problems.from_(functools.partial(load, name, block))


class _Check:
    """The check of a planned run.

    Args:
      run: the plan.
      role: "student" or "teacher".
      problems: takes what is found.
      signals: looked at between images and batches.
    """

    def __init__(self, run: Run, role: str, problems: _Lines, signals: Signals):
        self._run, self._role, self._problems, self._signals = run, role, problems, signals
        self._warnings = _Lines()
        self._data = problems.from_(lambda: run.data_note)  # of the whole splits

    def all(self, decoded: Any = None) -> float:
        """Checks everything and returns the seconds that the run will take, 0 where that is not known.

        Args:
          decoded: the note of the data that a check before this one has decoded.
        """
        run, problems = self._run, self._problems
        say(opening(run, self._role))
        self._warnings.add(*(problems.from_(lambda: list(warnings(run))) or []))
        problems.from_(RunFolder(run).check)
        if self._data is None or self._data != decoded:
            self._look_at_images("training", run.batches.source)
            self._look_at_images("evaluation", run.eval_source)
        if run.config.check.images is not None:  # from here on, only the sample is evaluated
            self._run = run = dataclasses.replace(run, eval_source=self._sample(run.eval_source))
        seconds = 0.0
        if (student := problems.from_(run.make_student)) is not None:
            teacher, seconds = problems.from_(lambda: self._teacher(student[0])) or (None, 0.0)
            if teacher is not None or not run.objective.methods:
                seconds += problems.from_(lambda: self._time(student, teacher)) or 0.0
        for warning in self._warnings:
            say(f"warning: {warning}.")
        return seconds

    def _sample(self, split: Readable) -> Source:
        """Returns the images of a split that are looked at."""
        source = split.uncached
        count = min(self._run.config.check.images or len(source), len(source))
        chosen = spaced(len(source), count)
        return source.of(Selected(source.records, chosen), source.view)

    def _look_at_images(self, split: str, source: Readable) -> None:
        """Decodes the images of a split; a broken one is a problem, unless so many may be skipped."""
        data, whole, names = self._run.config.data, len(source), source.class_names
        sample = dataclasses.replace(self._sample(source), on_error="raise")
        broken = list[str]()

        def read(start: int) -> np.ndarray:
            labels = [np.zeros(0, int)]
            for index in range(start, min(start + _AT_ONCE, len(sample))):
                try:
                    labels.append(sample.read(np.array([index]), (self._run.config.seed, 0))[1].ravel())
                except UserError as error:
                    broken.append(str(error))
                except OSError as error:  # which data.on_error=skip does not skip
                    self._problems.add(str(error))
                except Exception as error:  # of a user's dataset
                    broken.append(f"{sample.records.name(index)} is broken: {one_line(error)}")
            return np.concatenate(labels)

        labels = [np.zeros(0, int)]
        bar = ProgressBar(0, len(sample), f"{split} images", unit="image")
        pool = ThreadPoolExecutor(makers(source, data.threads, 0).threads)
        try:
            for done, some in enumerate(pool.map(read, range(0, len(sample), _AT_ONCE)), 1):
                self._signals.check()
                labels.append(some)
                bar.update(min(done * _AT_ONCE, len(sample)), {"broken": len(broken)})
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()
        told = np.concatenate(labels)
        counts = np.bincount(told[told >= 0], minlength=len(names))  # a token whose label is -1 is left out
        left_out = f", {count:,} left out by the data block" if (count := _left_out(source)) else ""
        say(
            f"images    {split}: {len(sample):,} of {whole:,} decoded{left_out}; {counts.min():,} to {counts.max():,} "
            f"of each of {len(names)} classes; {len(broken)} broken"
        )
        if len(sample) == whole and not sample.label_shape and (missing := np.flatnonzero(counts == 0).tolist()):
            purpose = "to evaluate on" if split == "evaluation" else "to train on"
            self._warnings.add(no_images(purpose, missing, names))
        if data.on_error == "raise" or too_many(len(broken), len(sample), data.max_skipped):
            self._problems.add(*sorted(broken)[:_MOST_SHOWN])
            if len(broken) > _MOST_SHOWN:
                self._problems.add(f"{len(broken) - _MOST_SHOWN:,} more {split} images are broken.")

    def _teacher(self, student: Network) -> tuple[Teacher | None, float]:
        """Returns the teacher, measured, or with random weights if it must be trained, and the seconds that takes."""
        config = copy.deepcopy(self._run.config)
        if not config_lib.teaches_from_file(config):
            config.logits = ConfigDict()  # obtaining a teacher would begin its store
        if config.teacher:
            config.teacher.min_top1 = 0.0  # looked at below: a weak teacher is no reason to look at nothing else
        run = dataclasses.replace(self._run, config=config)
        untrained = []
        for recipe, place in recipes(run):
            recipe.check.images = config.check.images
            planned = Run.plan(config_lib.resolve(recipe), place, given=run.given.for_teacher())
            if RunFolder(planned).finished() is None:
                untrained.append(_Check(planned, "teacher", self._problems, self._signals))
        if untrained:
            seconds = sum(check.all(self._data) for check in untrained)
            self._problems.from_(lambda: check_store(self._run))  # its teacher's logits are not there yet
            say(f"teacher {config.teacher.model} is not trained yet: random weights stand in for its own")
            return teacher_at_hand(run, student), seconds
        teacher = obtain_teacher(run, student, self._signals, lambda recipe, place: None)
        if (top1 := top1_of(teacher)) is not None:
            self._warnings.add(*teacher_warnings(run, checkpoints_of(run), top1))
            if config.check.images is None:  # a sample does not tell
                self._problems.from_(lambda: check_top1(self._run, top1))
        if self._run.config.logits and isinstance(teacher, NetworkTeacher):
            self._problems.from_(lambda: self._look_at_store(teacher))
        return teacher, 0.0

    def _look_at_store(self, teacher: NetworkTeacher) -> None:
        """Looks for problems with the logit store: another teacher's, or more than the disk has room for."""
        run = self._run
        store = open_store(run, teacher)
        store.check_key()
        missing = missing_epochs(store, run.batches, run.config.epochs)
        say(f"logits    {len(missing)} epochs to write of {human_bytes(store.bytes_per_epoch)} each")
        store.check_space(len(missing))

    def _time(self, student: tuple[Network, Variables], teacher: Teacher | None) -> float:
        """Takes steps and an evaluation, says what the run will take, and returns its seconds."""
        run, config, (network, variables) = self._run, self._run.config, student
        optimizer = run.make_optimizer()
        state = run.make_state(variables, optimizer)
        self._look_at_disk(state.to_trees())
        step_fn = make_step(run, network, teacher, optimizer)
        advance = Dispatcher(run, step_fn, state, teacher, 0, lambda _: None)
        step, each, compiled, timed = 0, list[float](), 0.0, 0.0
        while step < run.steps and (len(each) < 2 or timed < _TIMED_SECONDS):
            self._signals.check()
            start, before = time.perf_counter(), step
            step, state, metrics = advance(step, state, weights_of(teacher))
            for done, means in enumerate(by_step(metrics), before + 1):
                check_finite(done, means)
            seconds = time.perf_counter() - start
            compiled, timed = (compiled, timed + seconds) if each else (seconds, 0.0)  # the first dispatch compiles
            each.append(seconds / (step - before))
        one = float(np.median(each[1:] or each))
        evaluate = Evaluator(network, run.eval_source, config, run.mesh, run.given.metrics)
        rated = min(timeit.repeat(lambda: evaluate(state.evaluated, self._signals.check), repeat=2, number=1))
        if config.check.images is not None:
            rated *= len(open_evaluation(config, run.given)) / len(run.eval_source)
        evaluations = -(-config.epochs // config.eval_every_epochs)
        total = compiled + run.steps * one + evaluations * rated
        say(
            f"time      {duration(round(total))} for the {self._role}: {run.steps:,} steps of {1000 * one:,.1f} ms, "
            f"{counted(evaluations, 'evaluation')} of {rated:,.2f} s"
        )
        return total

    def _look_at_disk(self, trees: Any) -> None:
        config, place = self._run.config, str(self._run.workdir)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees) if hasattr(leaf, "nbytes"))
        every = config.checkpoint.keep_every_epochs
        kept = config.checkpoint.keep_last + 1 + (config.epochs // every if every else 0)
        free = free_bytes(place) if is_local(self._run.workdir) else None
        needed = f"up to {human_bytes(kept * size)}"
        room = "" if free is None else f"; {human_bytes(free)} are free"
        say(f"disk      {needed}: {kept} checkpoints of {human_bytes(size)}{room}")
        if free is not None and kept * size > free:
            self._problems.add(
                f"{place} needs {needed}, and {human_bytes(free)} are free. Choose a workdir on a larger disk, or keep "
                "fewer checkpoints: checkpoint.keep_last, checkpoint.keep_every_epochs."
            )


def _left_out(source: Readable) -> int:
    """Returns the number of records that the data block leaves out of a split."""
    records = source.uncached.records
    return len(whole_of(records)) - len(records)
