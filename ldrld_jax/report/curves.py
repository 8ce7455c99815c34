"""The lines of the charts, from groups of runs."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from ldrld_jax.record.reader import is_number
from ldrld_jax.report.charts import Point, Row, Series
from ldrld_jax.report.groups import Comparison, Group
from ldrld_jax.report.published import published


def styles(groups: Sequence[Group]) -> dict[str, int]:
    """Returns the number of each label's style, which depends on the name alone: a group keeps its colour."""
    return {label: i for i, label in enumerate(sorted({group.label for group in groups}))}


def learning(comparison: Comparison) -> list[Series]:
    """Returns top-1 by epoch: a line for each group, the mean over its seeds, and one for each unfinished run."""
    style = styles(comparison.groups)
    lines = [(group.label, style[group.label], [run.curve for run in group.runs]) for group in comparison.groups]
    for i, run in enumerate(comparison.running, start=len(style)):
        lines.append((f"{PurePath(run.folder).name} (not finished)", i, [run.curve]))
    return [Series(label, points, i) for label, i, curves in lines if (points := _mean_curve(curves))]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[Point]:
    at = defaultdict(list)
    for curve in curves:
        for epoch, top1 in curve:
            at[epoch].append(top1)
    most = max(map(len, at.values()), default=0)  # where some seeds were not evaluated the mean would jump
    return [_point(epoch, values) for epoch, values in sorted(at.items()) if len(values) == most]


def _point(x: float, values: Sequence[float]) -> Point:
    return Point(x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def overview(comparison: Comparison) -> list[Row]:
    """Returns the last-epoch top-1 of every group beside the published figure."""
    rows = []
    for group in comparison.groups:
        values = group.values("last_top1")
        point, figure = _point(0, values), published(group.first.config)
        known = float(figure) if figure.replace(".", "", 1).isdigit() else None
        rows.append(Row(group.label, values, point.y, point.deviation, known))
    return rows


def sweeps(groups: Sequence[Group]) -> Iterator[tuple[str, list[Series]]]:
    """Yields each key whose number varies alone, with the lines of last-epoch top-1 over it.

    Label noise of rate 0 is of every kind.
    """
    keys = {key for group in groups for key, value in group.settings.items() if is_number(value)}
    for key in sorted(key for key in keys if not key.endswith("seed")):
        kind = key.removesuffix("_rate") if key.endswith("label_noise_rate") else ""
        lines: dict[tuple[str, ...], list[Point]] = defaultdict(list)
        for group in groups:
            value: Any = group.settings.get(key)
            if is_number(value):
                rest = {name: other for name, other in group.shown.items() if name not in (key, kind)}
                of_kind = str(group.settings.get(kind, "")) if value else ""
                lines[group.method, _said(rest), of_kind].append(_point(value, group.values("last_top1")))
        for method, others, of_kind in list(lines):
            if of_kind:
                lines[method, others, of_kind] += lines.get((method, others, ""), [])
        drawn = {" ".join(filter(None, name)): sorted(points) for name, points in lines.items() if len(points) > 1}
        if drawn:
            yield key, [Series(label, points, i) for i, (label, points) in enumerate(sorted(drawn.items()))]


def _said(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def rank_matrices(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """Returns the three matrices of each LDRLD config among the groups, with the labels of those that use it.

    One too large to be drawn is left out.
    """
    from ldrld_jax.losses.ldrld_config import LDRLDConfig, host_rank_weights

    found: dict[str, tuple[list[str], list[Any]]] = {}
    for group in groups:
        prefix = "loss.ldrld."
        fields = {
            key.removeprefix(prefix): value for key, value in group.first.config.items() if key.startswith(prefix)
        }
        fields = {key: fields[key] for key in _OF_RANKS if key in fields}
        if fields:
            irw, erd = ({**fields, off: False} for off in ("use_erd", "use_irw"))
            try:
                configs = [LDRLDConfig(**kept) for kept in (irw, erd, fields)]
            except (TypeError, ValueError):  # a config.json that somebody wrote by hand
                continue
            if configs[0].depth > _MOST_RANKS:
                continue
            weights = [host_rank_weights(cfg).tolist() for cfg in configs]
            found.setdefault(json.dumps(fields), ([], weights))[0].append(group.label)
    return [(", ".join(labels), weights) for labels, weights in found.values()]


_MOST_RANKS = 100  # of a matrix whose every cell is drawn
_OF_RANKS = ("depth", "irw_epsilon", "erd_scale", "erd_decay", "use_irw", "use_erd")
