"""Plans the runs of a sweep: the config, command and progress of each."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.code import call_of_file, is_code
from ldrld_jax.errors import UserError, unknown
from ldrld_jax.files import is_locked, split_argument
from ldrld_jax.identity import identity
from ldrld_jax.interop import hub
from ldrld_jax.record.reader import last_evaluation, read_config, read_summary

_KEYS = {"config", "overrides", "runs", "grid"}
_LONGEST = 251  # bytes of a run's name: those of a file's name, which ends in ".txt" for the run's log


def load(path: str) -> dict[str, Any]:
    """Returns the result of `get_sweep()` of a sweep file `FILE[:ARG]`.

    Raises:
      UserError: if the file is missing or fails.
    """
    file, arg = split_argument(path)
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"there is no sweep file {file!r}. The paper's are in experiments/; or give --config and --grid."
        )
    sweep = call_of_file(file, "get_sweep", arg, kind="sweep", instead="a config by --config")
    _check_form(sweep)
    return sweep


def parse_grid(text: str) -> tuple[str, list[str]]:
    """Splits `key=v1,v2` into the key and its values; commas within brackets do not separate values.

    Raises:
      UserError: if the text has another form.

    Example:
      >>> parse_grid("optim.decay_epochs=(2,3),(4,)")
      ('optim.decay_epochs', ['(2,3)', '(4,)'])
    """
    key, equals, values = text.partition("=")
    found = re.findall(r"(?:\([^)]*\)|\[[^]]*\]|[^,])+", values)
    if not equals or not found:
        raise UserError(f"--grid is KEY=VALUE,VALUE, got {text!r}.")
    return key, found


@dataclasses.dataclass
class Job:
    """One run of a sweep.

    Attributes:
      name: the run's overrides, which also name its workdir; of many the first, with a digest of all.
      workdir: the run's folder.
      command: the command that trains it.
      identity: the identity of its config, as the run will save it.
      teachers: workdirs of the teachers that it trains or reuses.
      state: waiting | running | elsewhere (another process has its workdir) | done | failed.
      reached: its last evaluation, as read by `line`; "" before that.
      config: a digest of its whole config.
    """

    name: str
    workdir: epath.Path
    command: list[str]
    identity: dict[str, Any]
    teachers: list[epath.Path]
    state: str = "waiting"
    reached: str = ""
    config: str = ""

    def look(self) -> None:
        """Sets the state from the files on disk, for a job that this process is not running."""
        self.reached = ""
        try:
            self.state = "done" if self._complete() else "elsewhere" if is_locked(self.workdir) else "waiting"
        except (UserError, OSError) as error:  # the other runs go on
            self.state, self.reached = "failed", str(error)

    def _complete(self) -> bool:
        summary = read_summary(self.workdir, numbers=("epochs",))
        saved = read_config(self.workdir) if summary else None
        if summary is None or saved is None:
            return False
        theirs, ours = identity(saved), dict(self.identity)
        for key in ("student.checkpoint", "teacher.checkpoint"):
            if ours.get(key) and theirs.get(key):
                ours[key] = hub.with_known_revisions(ours[key], theirs[key])  # a run pins what it takes from the Hub
        if ours != theirs:
            return False
        return summary["epochs"] == self.identity["epochs"]

    def line(self) -> str:
        """Returns a line with the state, the name and the last evaluation."""
        if self.state in ("running", "elsewhere") or not self.reached:  # finished jobs are read once
            try:
                found = last_evaluation(self.workdir)
            except (UserError, OSError) as error:  # a torn file: the run itself, or the report, says what to do
                found, self.reached = None, str(error)
            if found:
                self.reached = f"epoch {found['epoch']:g}/{self.identity['epochs']}  top-1 {found['top1']:.2f}"
        return f"{self.state:9}  {self.name}  {self.reached}".rstrip()


def plan(sweep: dict[str, Any], workdir: epath.Path, overrides: Sequence[str] = ()) -> list[Job]:
    """Returns the jobs of a sweep. All configs are loaded and resolved first, so errors appear before any run starts.

    Args:
      sweep: the result of `get_sweep()`.
      workdir: the sweep's folder.
      overrides: `key=value` overrides for every run.

    Raises:
      UserError: if a key or a value is not allowed, two runs are the same, or an override changes none.

    Example:
      >>> sweep = {"config": "configs/digits.py", "runs": [{"method": "ce"}], "grid": {"seed": [0, 1]}}
      >>> [job.name for job in plan(sweep, epath.Path("runs/digits"))]
      ['method=ce,seed=0', 'method=ce,seed=1']
    """
    _check_form(sweep, complete=True)
    grid = sweep.get("grid", {})
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = [run | point for run in sweep.get("runs", [{}]) for point in points]
    for override in overrides:
        key, _, value = override.partition("=")
        if all(key in run for run in runs):
            raise UserError(
                f"--config.{override} changes no run: each run of the sweep sets {key} itself. Give "
                f"--grid {key}={value}."
            )
    overrides = [*(f"{key}={value}" for key, value in sweep.get("overrides", {}).items()), *overrides]
    names = _names([",".join(f"{key}={value}" for key, value in run.items()) for run in runs])
    jobs = [_job(sweep["config"], workdir, overrides, run, name) for run, name in zip(runs, names, strict=True)]
    for job in jobs:
        if len(same := [other.name for other in jobs if other.config == job.config]) > 1:
            raise UserError(f"the sweep names a run twice: {', '.join(dict.fromkeys(same))}. Remove one of them.")
    return jobs


def _names(texts: Sequence[str]) -> list[str]:
    """Returns a folder name for each text; if two texts would share one, a text that had to be changed gets a digest.

    Example:
      >>> _names(["student.checkpoint=a/b", "student.checkpoint=a_b", "seed=0"])
      ['student.checkpoint=a_b-5cbca83d', 'student.checkpoint=a_b', 'seed=0']
      >>> _names(["student.checkpoint=a b", "student.checkpoint=ab", "optim.decay_epochs=(2, 3)"])
      ['student.checkpoint=ab-a93582b2', 'student.checkpoint=ab', 'optim.decay_epochs=(2,3)']
    """
    wanted = {text: text.replace(" ", "") or "run" for text in texts}
    names = {text: _file_name(re.sub(r"[/\\\ud800-\udfff]", "_", own)) for text, own in wanted.items()}
    shared = {name for name, count in collections.Counter(names.values()).items() if count > 1}
    changed = {text for text, name in names.items() if name in shared and name != text}
    return [_file_name(f"{names[text]}-{_short(text)}") if text in changed else names[text] for text in texts]


def _check_form(sweep: Any, *, complete: bool = False) -> None:
    """Raises a UserError if something is no sweep; one that is not complete may lack its config."""
    if not isinstance(sweep, dict) or (complete and "config" not in sweep) or not set(sweep) <= _KEYS:
        given = ", ".join(map(str, sweep)) if isinstance(sweep, dict) else repr(sweep)
        raise UserError(f"a sweep is a dict with config, and any of overrides, runs and grid, got {given}.")
    if complete and not isinstance(sweep["config"], str):
        raise UserError(
            f"a sweep's config is the text FILE[:ARG], got {sweep['config']!r}. Name its file, or set --config."
        )
    grid, overrides, runs = sweep.get("grid", {}), sweep.get("overrides", {}), sweep.get("runs", [{}])
    if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) and values for values in grid.values()):
        raise UserError(f"a sweep's grid takes a list of values for each key, got {grid}.")
    if not isinstance(overrides, dict):
        raise UserError(f"a sweep's overrides are a dict from keys to values, got {overrides}.")
    if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"a sweep's runs are a list of dicts from keys to values, got {runs}.")


def _job(file: str, workdir: epath.Path, overrides: Sequence[str], own: dict[str, Any], name: str) -> Job:
    given = [*overrides, *(f"{key}={value}" for key, value in own.items())]
    config = config_lib.resolve(config_lib.load(file, given))
    whole = _short(config.to_json(sort_keys=True))
    _check_models(config)
    # A path is no part of a run's identity, but a sweep over paths is one over data, and they share no teacher.
    paths = {key: own[key] for key in ("data.data_dir", "teacher.data.data_dir") if key in own}
    teachers = []
    if config.teacher.get("epochs") is not None:
        if config.teacher.workdir is None:
            recipes = _short(_recipes(config) + ([paths] if paths else []))
            config.teacher.workdir = str(workdir / "teachers" / f"{config.teacher.model}-{recipes}")
            given.append(f"teacher.workdir={config.teacher.workdir}")
        teachers = [place for _, place in config_lib.teacher_runs(config, workdir / name)]
    if config.logits.get("dir") is not None:
        given.append(f"logits.dir={epath.Path(config.logits.dir) / _short(_seen_by_the_teacher(config) | paths)}")
    command = [sys.executable, "-m", "ldrld_jax.main", "--config", file, "--workdir", str(workdir / name)]
    flags = [f"--config.{override}" for override in given]
    return Job(name, workdir / name, command + flags, identity(config), teachers, config=whole)


def _check_models(config: Any) -> None:
    """Raises a UserError if a run names a model that is neither of this package nor a user's code."""
    from ldrld_jax.models import MODELS  # loads Flax

    outside = not config.teacher or config_lib.teaches_itself(config) or config_lib.teaches_from_file(config)
    for name in [config.student.model, *([] if outside else config_lib.teacher_models(config))]:
        if not is_code(name) and name not in MODELS:
            raise unknown("model", name, MODELS)


def _file_name(name: str) -> str:
    """Returns a name that a file may have: a longer one is cut, and gets a digest of the whole.

    Example:
      >>> _file_name("seed=0"), len(_file_name("seed=0," * 100))
      ('seed=0', 251)
    """
    if len(whole := name.encode(errors="surrogateescape")) <= _LONGEST:
        return name
    digest = f"-{_short(name)}"
    return whole[: _LONGEST - len(digest)].decode(errors="ignore") + digest


def _recipes(config: Any) -> list[dict[str, Any]]:
    """Returns the identities of a run's teacher recipes; runs with equal ones share their teachers."""
    models = config_lib.teacher_models(config)
    return [identity(config_lib.resolve(config_lib.teacher_recipe(config, model))) for model in models]


def _seen_by_the_teacher(config: Any) -> dict[str, Any]:
    """Returns the keys that runs sharing a logit store must agree on; a superfluous key only costs another store."""
    keys = identity(config)
    seed = config.seed if config.data.augment_seed is None else config.data.augment_seed
    seen = {k: v for k, v in keys.items() if k.startswith(("teacher.", "data.", "logits.")) and "label_noise" not in k}
    seen |= {"data.augment_seed": seed, "precision": config.precision, "matmul_precision": config.matmul_precision}
    if config.teacher.get("epochs") is not None:  # its weights depend on all of its recipe, label noise as well
        seen["recipes"] = _recipes(config)
    return seen


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
