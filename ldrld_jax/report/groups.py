"""Groups of runs that differ in the seed alone: their names, and the groups that they are compared with."""

import dataclasses
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ldrld_jax.report.collect import FoundRun, plausible

# Keys that define a method; all other keys are the conditions under which methods are compared.
_OF_METHOD = ("method", "loss.", "loss_weight.", "ce_weight", "kd_weight", "kd_warmup_epochs")


@dataclasses.dataclass
class Group:
    """Runs that differ in the seed alone.

    Attributes:
      runs: finished, at least one, by seed.
      settings: the keys in which it differs from others of its comparison, shortened where the method says the rest.
      shown: those of them that are not as in most runs.
    """

    runs: list[FoundRun]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> FoundRun:
        return self.runs[0]

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def setting(self) -> str:
        """The settings in which this group differs from most, as text."""
        return " ".join(f"{_short(key)}={value}" for key, value in self.shown.items())

    @property
    def label(self) -> str:
        """The method, and the settings in which this group differs from others of that method."""
        return f"{self.method} {self.setting}".strip()

    def values(self, field: str) -> list[float]:
        """Returns a number of the summaries, from the runs that have it."""
        found = [run.summary.get(field) for run in self.runs if run.summary]
        return [value for value in found if plausible(value)]

    def mean(self, field: str) -> float:
        return statistics.fmean(self.values(field))

    @property
    def ended(self) -> str:
        """The day (UTC) on which the last of the runs ended; "" for runs that do not say."""
        return max(run.ended for run in self.runs)[:10]


@dataclasses.dataclass
class Comparison:
    """The groups that train one student on one dataset, the best mean of last-epoch accuracy first.

    Attributes:
      running: of the same, the runs that have not ended.
      usual: the settings that most runs have, which the groups do not show.
    """

    data: str
    student: str
    groups: list[Group] = dataclasses.field(default_factory=list)
    running: list[FoundRun] = dataclasses.field(default_factory=list)
    usual: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        teachers = sorted(
            {run.teacher for run in [*(group.first for group in self.groups), *self.running] if run.teacher}
        )
        return f"{self.data}: {' → '.join([', '.join(teachers), self.student] if teachers else [self.student])}"

    def own_kd(self, group: Group) -> Group | None:
        """Returns the best group of plain KD under the same conditions; None if there is none, or it is the group."""
        if group.method == "kd":
            return None
        found = [
            other
            for other in self.groups
            if other.method == "kd" and other.first.copy == 1 and _comparable(group, other)
        ]
        return max(found, key=lambda other: other.mean("last_top1"), default=None)


def compare(runs: Iterable[FoundRun], running: Iterable[FoundRun] = ()) -> list[Comparison]:
    """Groups finished runs by dataset and student, and within that by all of their identity but the seed.

    A second run of a seed is in a group of its own, named by its number, that nothing is compared with.
    """
    groups: dict[tuple[str, int], Group] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.folder)):
        groups.setdefault((json.dumps(run.identity, sort_keys=True), run.copy), Group([])).runs.append(run)
    found: dict[tuple[str, str], Comparison] = {}
    for group in groups.values():
        _of(found, group.first).groups.append(group)
    for run in running:
        _of(found, run).running.append(run)
    for comparison in found.values():
        comparison.groups.sort(key=lambda group: (-group.mean("last_top1"), group.method))
        _name_settings(comparison)
    return [found[key] for key in sorted(found)]


def _of(found: dict[tuple[str, str], Comparison], run: FoundRun) -> Comparison:
    key = run.config["data.name"], run.student
    return found.setdefault(key, Comparison(*key))


def _name_settings(comparison: Comparison) -> None:
    groups = comparison.groups
    common = _differing([group.first.identity for group in groups], of_method=False)
    for method in {group.method for group in groups}:
        among = [group for group in groups if group.method == method]
        within = _differing([group.first.identity for group in among], of_method=True)
        for group in among:
            keys = {key: value for key, value in group.first.identity.items() if key in common or key in within}
            group.settings = {key.removeprefix(f"loss.{method}."): value for key, value in keys.items()}
        comparison.usual |= _usual(among)
    comparison.usual |= _usual(groups)
    for group in groups:
        group.shown = {key: value for key, value in group.settings.items() if comparison.usual.get(key, ...) != value}
        if group.first.copy > 1:
            group.shown["copy"] = group.first.copy


def _usual(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the values that more than half of the runs have, by key."""
    runs = [settings for group in groups for settings in [group.settings] * len(group.runs)]
    counts = Counter((key, json.dumps(value)) for settings in runs for key, value in settings.items())
    having = Counter(key for settings in runs for key in settings)
    return {key: json.loads(value) for (key, value), count in counts.items() if 2 * count > having[key]}


def _differing(identities: Sequence[dict[str, Any]], *, of_method: bool) -> set[str]:
    """Returns the keys whose values differ among the runs that have them, without teacher keys that are inherited."""
    values, own = defaultdict(set), defaultdict(set)
    for keys in identities:
        for key, value in keys.items():
            if key.startswith(_OF_METHOD) == of_method and key not in ("student.model", "data.name"):
                inherited = key.startswith("teacher.") and keys.get(key.removeprefix("teacher."), ...) == value
                values[key].add(json.dumps(value))
                own[key].add("inherited" if inherited else json.dumps(value))
    return {key for key, found in values.items() if len(found) > 1 and len(own[key]) > 1}


def _short(key: str) -> str:
    return key.removeprefix("data.").removeprefix("optim.")


def _comparable(group: Group, other: Group) -> bool:
    mine, theirs = group.first.identity, other.first.identity
    of_method = (*_OF_METHOD, "standardize", "loss_schedule.")
    shared = (key for key in mine.keys() & theirs.keys() if not key.startswith(of_method))
    return all(mine[key] == theirs[key] for key in shared)
