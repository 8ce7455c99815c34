"""Charts as inline SVG: they scale with the page, take its colours, and say in words what they show.

Series are told apart by marker and dash as well as by colour; the classes `s0` to `s9` are coloured by the style sheet.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ldrld_jax.report.markup import Markup, join, tag

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 48
_DASHES = (None, "7 3", "2 3")


class Point(NamedTuple):
    """A point of a line, with the deviation over seeds."""

    x: float
    y: float
    deviation: float = 0.0


class Series(NamedTuple):
    """A line of a chart; `style` is its number in the legend."""

    label: str
    points: Sequence[Point]
    style: int


class Scale:
    """Map of numbers onto pixels from `start` to `end`; the axis starts and ends where the numbers do.

    Attributes:
      ticks: round numbers; with `own`, the numbers themselves if they are few and not too close.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, own: bool = False):
        several = sorted({min(max(value, -1e15), 1e15) for value in values})  # finite differences, whatever a file says
        low, high = several[0], several[-1]
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        self.ticks = [round(i * step, 10) for i in range(first, last + 1)]
        if own and len(several) <= 8 and all(b - a > rough / 2 for a, b in itertools.pairwise(several)):
            self.ticks = several
        self._low, self._start, self._per = low, start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._per


def line_chart(series: Sequence[Series], title: str, x_label: str, y_label: str) -> Markup:
    """Draws lines with markers, each in a band as wide as the deviations."""
    points = [point for line in series for point in line.points]
    x = Scale([point.x for point in points], _LEFT, _WIDTH - _RIGHT, own=True)
    spans = [point.y + sign * point.deviation for point in points for sign in (-1, 1)]
    y = Scale(spans, _HEIGHT - _BOTTOM - 6, _TOP)
    last = "; ".join(f"{line.label}: {line.points[-1].y:.2f} at {line.points[-1].x:g}" for line in series)
    drawn = [_line(line, x, y, crowded=max(len(line.points) for line in series) > 40) for line in series]
    axes = _axes(x, y, x_label, y_label)
    return svg(_WIDTH, _HEIGHT, title, f"{y_label} over {x_label}. {last}.", axes, *drawn, class_="chart")


def _line(line: Series, x: Scale, y: Scale, *, crowded: bool) -> Markup:
    places = [(x(point.x), y(point.y)) for point in line.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    upper, lower = ([f"{x(p.x):.1f} {y(p.y + s * p.deviation):.1f}" for p in line.points] for s in (1, -1))
    marks = "".join(marker(line.style, a, b, 3.5) for a, b in (places[-1:] if crowded else places))
    return tag(
        "g",
        tag("title", line.label),
        tag("path", d=path, class_="line", stroke_dasharray=_DASHES[line.style % 3]),
        tag("path", d="M" + "L".join(upper + lower[::-1]) + "z", class_="band")
        if any(point.deviation for point in line.points)
        else None,
        tag("path", d=marks, class_="mark"),
        class_=f"s{line.style % 10}",
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    grid = "".join(f"M{_LEFT} {y(tick):.1f}H{right}" for tick in y.ticks)
    return join(
        [
            tag("path", d=grid, class_="rule"),
            *(tag("text", f"{tick:g}", x=_LEFT - 6, y=y(tick) + 4, text_anchor="end") for tick in y.ticks),
            *(tag("text", f"{tick:g}", x=x(tick), y=bottom + 18, text_anchor="middle") for tick in x.ticks),
            tag("text", x_label, x=(_LEFT + right) / 2, y=_HEIGHT - 6, text_anchor="middle", class_="axis"),
            tag("text", y_label, transform=f"translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)",
                text_anchor="middle", class_="axis"),
        ]
    )  # fmt: skip


class Row(NamedTuple):
    """A row of a dot chart: one value per seed, and the published figure if it is one number."""

    label: str
    values: Sequence[float]
    mean: float
    deviation: float
    published: float | None


def dot_chart(rows: Sequence[Row], title: str, x_label: str) -> Markup:
    """Draws a row for each experiment: its mean with the deviation, each seed, and what was published."""
    marks = [row.published for row in rows if row.published is not None]
    spans = [row.mean + sign * row.deviation for row in rows for sign in (-1, 1)]
    x = Scale([*marks, *spans, *(value for row in rows for value in row.values)], 16, _WIDTH - 28)
    height = 40 * len(rows) + 54
    grid = "".join(f"M{x(tick):.1f} 6V{height - 46}" for tick in x.ticks)
    parts = [tag("path", d=grid, class_="rule")]
    parts += [tag("text", f"{tick:g}", x=x(tick), y=height - 27, text_anchor="middle") for tick in x.ticks]
    parts.append(tag("text", x_label, x=_WIDTH / 2, y=height - 6, text_anchor="middle", class_="axis"))
    parts += [_dots(row, x, 40 * i) for i, row in enumerate(rows)]
    told = "; ".join(f"{row.label}: {row.mean:.2f} ± {row.deviation:.2f}" for row in rows)
    return svg(_WIDTH, height, title, f"{x_label}. {told}.", *parts, class_="chart")


def _dots(row: Row, x: Scale, top: float) -> Markup:
    y = top + 29
    bar = f"M{x(row.mean - row.deviation):.1f} {y}H{x(row.mean + row.deviation):.1f}"
    seeds = "".join(marker(0, x(value), y, 3) for value in row.values)
    return tag(
        "g",
        tag("text", row.label, x=16, y=top + 17),
        tag("path", d=f"M16 {y}H{_WIDTH - 28}", class_="rule"),
        tag("path", d=bar, class_="wide"),
        tag("path", d=seeds, class_="seed") if len(row.values) > 1 else None,
        tag("path", d=marker(3, x(row.mean), y, 6), class_="mark"),
        tag("path", d=marker(2, x(row.published), y - 1, 6), class_="published") if row.published is not None else None,
        class_="s0",
    )


def legend(labels: Sequence[tuple[str, int]], *, lines: bool = True) -> Markup:
    """Returns the legend of a chart's styles; without `lines` it shows markers alone."""
    return tag("ul", *(tag("li", _swatch(style, lines), label) for label, style in labels), class_="legend")


def _swatch(style: int, lines: bool) -> Markup:
    line = tag("path", d="M1 6H27", class_="line", stroke_dasharray=_DASHES[style % 3]) if lines else None
    mark = tag("path", d=marker(style, 14, 6, 3.5), class_="mark")
    return tag("svg", line, mark, viewBox="0 0 28 12", class_=f"swatch s{style % 10}", aria_hidden="true")


def marker(style: int, x: float, y: float, r: float) -> str:
    """Returns the outline of a circle, square, triangle or diamond, for the `d` of a path."""
    return (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x - r:.1f} {y + r:.1f}h{2 * r}l{-r} {-2 * r}z",
        f"M{x - r:.1f} {y:.1f}l{r} {-r}l{r} {r}l{-r} {r}z",
    )[style % 4]


def svg(
    width: float, height: float, title: str, description: str, *parts: Markup | None, class_: str | None = None
) -> Markup:
    """Draws a picture with a text for those who do not see it."""
    return tag("svg", tag("title", title), tag("desc", description), *parts, viewBox=f"0 0 {width:g} {height:g}",
               role="img", aria_label=f"{title}. {description}", class_=class_)  # fmt: skip
