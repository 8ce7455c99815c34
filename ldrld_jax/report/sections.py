"""The parts of a comparison's page: each a heading, a line on how to read it, and its figures; None without data."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ldrld_jax.report import charts, curves, pictures
from ldrld_jax.report.groups import Comparison, Group
from ldrld_jax.report.markup import Markup, figure, grid, html_table, join, scrolling, tag
from ldrld_jax.report.table import spread

Analyses = dict[str, dict[str, Any]]  # by folder


class Section(NamedTuple):
    """A part of the page: its anchor, its heading, how to read it, and its figures."""

    anchor: str
    heading: str
    explanation: str
    content: Markup


def sections(comparison: Comparison, analyses: Analyses, number: int) -> list[Section]:
    """Every part for which there are data.

    Args:
      comparison: its groups.
      analyses: what `outputs.analyse` kept, of the runs that have one.
      number: of the comparison on its page.
    """
    made = ((name, heading, told, make(comparison, analyses)) for name, heading, told, make in _PARTS)
    return [Section(f"c{number}-{name}", heading, told, content) for name, heading, told, content in made if content]


def _overview(comparison: Comparison, analyses: Analyses) -> Markup | None:
    rows = curves.overview(comparison)
    if not rows:
        return None
    chart = charts.dot_chart(rows, f"Last-epoch accuracy, {comparison.title}", "top-1 % after the last epoch")
    notes = ["A diamond is the mean over seeds, with its deviation; a circle is a seed"]
    notes += ["a triangle is the published figure"] * any(row.published is not None for row in rows)
    return figure(chart, "; ".join(notes) + ".")


def _learning(comparison: Comparison, analyses: Analyses) -> Markup | None:
    lines = curves.learning(comparison)
    if not lines:
        return None
    chart = charts.line_chart(lines, f"Learning curves, {comparison.title}", "epoch", "top-1 %")
    labels = charts.legend([(line.label, line.style) for line in lines])
    return figure(chart, "Top-1 on the evaluation split, mean over seeds; the band is one deviation.", labels)


def _sweeps(comparison: Comparison, analyses: Analyses) -> Markup | None:
    figures = []
    for key, lines in curves.sweeps(comparison.groups):
        chart = charts.line_chart(lines, f"Accuracy by {key}", key, "last top-1 %")
        figures.append(
            figure(chart, f"By {key}, all else the same.", charts.legend([(s.label, s.style) for s in lines]))
        )
    return grid(figures, wide=True)


def _ranks(comparison: Comparison, analyses: Analyses) -> Markup | None:
    found = curves.rank_matrices(comparison.groups)
    blocks = []
    for _, weights in found:
        most = [max(map(max, values)) for values in weights]
        names = ("IRW: near ranks weigh more", "ERD: high ranks weigh more", "Their product, the weight of a pair")
        drawn = [
            pictures.matrix(values, name, most=top) for values, name, top in zip(weights, names, most, strict=True)
        ]
        blocks.append(grid([figure(picture, name) for picture, name in zip(drawn, names, strict=True)]))
    if len(blocks) > 1:
        named = zip(found[1:], blocks[1:], strict=True)
        others = [tag("details", tag("summary", labels), block) for (labels, _), block in named]
        return join([tag("p", found[0][0]), blocks[0], *others])
    return join(blocks) if blocks else None


def _closeness(comparison: Comparison, analyses: Analyses) -> Markup | None:
    rows = []
    for group in comparison.groups:
        known = [analyses[run.folder] for run in group.runs if run.folder in analyses]
        if known:
            taught = [one for one in known if one["teacher"]]
            rows.append(
                [
                    group.label,
                    spread([one["agreement"] for one in taught]),
                    spread([one["correlation_mean"] for one in taught], 4),
                    spread([one["calibration"]["ece"] for one in known]),
                    spread([one["teacher"]["calibration"]["ece"] for one in taught]),
                ]
            )
    header = ["method", "agreement %", "mean |Δ correlation|", "ECE %", "teacher's ECE %"]
    return html_table(header, rows, "Of the best checkpoints, over seeds") if rows else None


def _correlation(comparison: Comparison, analyses: Analyses) -> Markup | None:
    known = [(group, one) for group, one in _first(comparison, analyses) if one["teacher"]]
    if not known:
        return None
    most = max(max(map(max, one["correlation"])) for _, one in known)
    figures = []
    for group, one in known:
        told = f"Mean {one['correlation_mean']:.4f} over {one['classes']} x {one['classes']} classes."
        picture = pictures.heat_map(
            one["correlation"], f"|corr(teacher) - corr(student)|, {group.label}", told, most=most
        )
        figures.append(figure(picture, f"{group.label}: mean {one['correlation_mean']:.4f}"))
    bar = tag("div", pictures.colour_bar(most, "Colours of the heat maps"), class_="bar-of-colours")
    return join([bar, grid(figures)])


def _pairs(comparison: Comparison, analyses: Analyses) -> Markup | None:
    known = [(group, one["pairs"]) for group, one in _first(comparison, analyses) if one["teacher"]]
    most = max((pair["kl"] for _, pairs in known for pair in pairs), default=0)
    return grid([_pair_table(group, pairs, most) for group, pairs in known])


def _pair_table(group: Group, pairs: list[dict[str, Any]], most: float) -> Markup:
    rows = []
    for pair in pairs:
        bar = tag("span", style=f"--share:{pair['kl'] / most if most else 0:.3f}", class_="bar", aria_hidden="true")
        cells = (f"{pair['kl']:.3f}", f"{100 * pair['teacher']:.0f}", f"{100 * pair['student']:.0f}")
        name = tag("th", " / ".join(pair[side].replace("_", " ") for side in ("first", "second")), bar, scope="row")
        rows.append(tag("tr", name, *(tag("td", cell, class_="number") for cell in cells)))
    header = tag("tr", *(tag("th", name, scope="col") for name in ("pair", "KL", "teacher %", "student %")))
    return scrolling(
        tag("table", tag("caption", tag("span", group.label)), tag("thead", header), tag("tbody", *rows)), group.label
    )


def _features(comparison: Comparison, analyses: Analyses) -> Markup | None:
    known = [(group.label, one, one["embedding"]) for group, one in _first(comparison, analyses) if one["embedding"]]
    teachers = [one for _, one, _ in known if one["teacher"] and one["teacher"]["embedding"]]
    if teachers:
        known.append(("teacher", teachers[0], teachers[0]["teacher"]["embedding"]))
    if not known:
        return None
    figures = []
    for label, one, embedding in known:
        picture = pictures.scatter(embedding, one["embedded"], f"t-SNE of features, {label}")
        figures.append(figure(picture, f"{label}: silhouette {embedding['silhouette']:.3f}"))
    names = list(dict.fromkeys(known[0][1]["embedded"]))
    return join(
        [grid(figures), charts.legend([(name.replace("_", " "), i) for i, name in enumerate(names)], lines=False)]
    )


def _calibration(comparison: Comparison, analyses: Analyses) -> Markup | None:
    figures, teacher = [], None
    for group in comparison.groups:
        known = [analyses[run.folder] for run in group.runs if run.folder in analyses]
        if known:
            eces = spread([one["calibration"]["ece"] for one in known])
            figures.append(_reliability(known[0]["calibration"], f"{group.label}: ECE {eces} %"))
            teacher = teacher or known[0]["teacher"]
    if teacher:
        figures.append(_reliability(teacher["calibration"], f"teacher: ECE {teacher['calibration']['ece']:.2f} %"))
    return grid(figures)


def _reliability(found: dict[str, Any], title: str) -> Markup:
    return figure(pictures.reliability(found, title), title)


def _first(comparison: Comparison, analyses: Analyses) -> Iterator[tuple[Group, dict[str, Any]]]:
    """The analysis of each group's first seed."""
    return ((g, analyses[g.first.folder]) for g in comparison.groups if g.first.folder in analyses)


_PARTS: tuple[tuple[str, str, str, Callable[[Comparison, Analyses], Markup | None]], ...] = (
    ("overview", "Accuracy at a glance", "", _overview),
    ("curves", "Learning curves", "", _learning),
    ("sweeps", "What one number changes", "Top-1 after the last epoch, mean over seeds.", _sweeps),
    (
        "ranks",
        "Rank weights of the pairs",
        "LDRLD compares each pair of the student's largest classes, weighted by their ranks: row and column.",
        _ranks,
    ),
    (
        "closeness",
        "How close the student is to its teacher",
        "Agreement: both name the same class. Δ correlation: how far the correlations of the classes' logits are "
        "apart. ECE: by how much confidence and accuracy differ.",
        _closeness,
    ),
    (
        "correlation",
        "Where the logits correlate differently",
        "|corr(teacher logits) - corr(student logits)| of every two classes over the evaluation split, first seed: the "
        "darker, the closer the student has come to its teacher.",
        _correlation,
    ),
    (
        "pairs",
        "The pairs of classes they disagree on",
        "Over the images of the two classes, first seed: the KL divergence of the teacher's and the student's choice "
        "between these two, in nats, and what each gives the true one.",
        _pairs,
    ),
    (
        "features",
        "Features of the last layer but one",
        "t-SNE of the same images for all, first seed. Distances between far clusters mean nothing; the silhouette (1: "
        "classes lie apart, 0: they overlap) is of the features themselves.",
        _features,
    ),
    (
        "calibration",
        "Calibration",
        "Grey bars are accuracy by confidence; on the dashed line both would be equal. A red cap up to the line: surer "
        "than right; a blue one beyond it: less sure than right. First seed; the ECE is over all.",
        _calibration,
    ),
)
