"""The parts of a comparison's page: each a heading, a line on how to read it, and its figures; None without data."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ldrld_jax.record.console import counted
from ldrld_jax.report import charts, curves, pictures
from ldrld_jax.report.collect import FoundRun
from ldrld_jax.report.groups import Comparison, Group, compare
from ldrld_jax.report.markup import Markup, figure, grid, html_table, join, tag
from ldrld_jax.report.published import EPOCHS, PAPERS, data_set, figures, name_of, protocol
from ldrld_jax.report.table import spread

Analyses = dict[str, dict[str, Any]]  # by folder
Known = list[tuple[str, list[dict[str, Any]]]]  # the label of each group that has analyses, and those of its seeds


class Section(NamedTuple):
    """A part of the page: anchor, heading, a line on how to read it, and figures."""

    anchor: str
    heading: str
    explanation: str
    content: Markup


def sections(comparison: Comparison, analyses: Analyses, number: int) -> list[Section]:
    """Returns every part for which there are data.

    Args:
      comparison: its groups.
      analyses: what `outputs.analyse` kept, of the runs that have one.
      number: of the comparison on its page.
    """
    found = [(g.label, [analyses[run.folder] for run in g.runs if run.folder in analyses]) for g in comparison.groups]
    known = [(label, seeds) for label, seeds in found if seeds]
    made = ((name, heading, told, make(comparison, known)) for name, heading, told, make in _PARTS)
    return [Section(f"c{number}-{name}", heading, told, content) for name, heading, told, content in made if content]


def drawable(run: FoundRun, analysis: dict[str, Any]) -> bool:
    """Returns whether every part can be drawn of an analysis, which may be anybody's file."""
    try:
        sections(compare([run])[0], {run.folder: analysis}, 0)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _overview(comparison: Comparison, known: Known) -> Markup | None:
    rows = curves.overview(comparison)
    if not rows:
        return None
    chart = charts.dot_chart(rows, f"Last-epoch accuracy, {comparison.title}", "top-1 % after the last epoch")
    notes = ["A diamond is the mean over seeds, with its deviation; a circle is a seed"]
    notes += ["a triangle is the published figure"] * any(row.published is not None for row in rows)
    data = [row._asdict() for row in rows]
    return figure(chart, "; ".join(notes) + ".", name=f"last-epoch accuracy, {comparison.title}", data=data)


def _learning(comparison: Comparison, known: Known) -> Markup | None:
    lines = curves.learning(comparison)
    if not lines:
        return None
    told = "Top-1 on the evaluation split, mean over seeds; the band is one deviation."
    return _lines(lines, f"Learning curves, {comparison.title}", "epoch", "top-1 %", told)


def _papers(comparison: Comparison, known: Known) -> Markup | None:
    """Returns the papers' table of each teacher, beside our best group of the method, whatever its recipe."""
    teachers: dict[str, list[Group]] = defaultdict(list)
    for group in comparison.groups:
        if group.method != "ce" and figures(group.first.config):
            teachers[str(group.first.teacher)].append(group)
    tables = []
    for teacher, groups in teachers.items():
        config, rows = groups[0].first.config, []
        ours = groups + [group for group in comparison.groups if group.method == "ce"]
        for name, figure_of in figures(config).items():
            mine = next((group for group in ours if name_of(group.first.config) == name), None)  # the best is first
            source, what = PAPERS[name]
            rows.append([name, figure_of, _joined(source, f"{EPOCHS[data_set(config)]} epochs", what), *_ours(mine)])
        header = ["method", "published %", "by", "ours %, last epoch", "by"]
        tables.append(html_table(header, rows, f"{comparison.student} from {teacher}"))
    return join(tables) if tables else None


def _ours(group: Group | None) -> list[str]:
    if group is None:
        return ["", "not trained"]
    runs = counted(len(group.runs), "run")
    return [spread(group.values("last_top1")), _joined(protocol(group.first.config), runs)]


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _sweeps(comparison: Comparison, known: Known) -> Markup | None:
    figures = [
        _lines(lines, f"Accuracy by {key}", key, "last top-1 %", f"By {key}, all else the same.")
        for key, lines in curves.sweeps(comparison.groups)
    ]
    return grid(figures, wide=True)


def _lines(lines: Sequence[charts.Series], title: str, x_label: str, y_label: str, caption: str) -> Markup:
    """Draws a chart with its legend, the line that ends highest first."""
    ordered = sorted(lines, key=lambda line: -line.points[-1].y)
    legend = charts.legend([(line.label, line.style) for line in ordered])
    data = {line.label: [point._asdict() for point in line.points] for line in ordered}
    return figure(charts.line_chart(ordered, title, x_label, y_label), caption, legend, name=title, data=data)


def _ranks(comparison: Comparison, known: Known) -> Markup | None:
    names = ("IRW: near ranks weigh more", "ERD: high ranks weigh more", "Their product, the weight of a pair")
    blocks = []
    for labels, weights in curves.rank_matrices(comparison.groups):
        drawn = [
            figure(pictures.matrix(values, name), name, name=f"{name}, {labels}", data=values)
            for values, name in zip(weights, names, strict=True)
        ]
        blocks.append((labels, grid(drawn)))
    return _folded(blocks)


def _folded(blocks: Sequence[tuple[str, Markup | None]]) -> Markup | None:
    """Shows the first block, and the others behind their labels; None without blocks."""
    if len(blocks) < 2:
        return blocks[0][1] if blocks else None
    (label, first), *others = blocks
    return join([tag("p", label), first, *(tag("details", tag("summary", name), block) for name, block in others)])


def _classes(comparison: Comparison, known: Known) -> Markup | None:
    """Returns the accuracies by class, those first in which the best group is furthest behind its teacher."""
    first = next((one for _, seeds in known for one in seeds if one.get("names")), None)  # earlier versions had none
    if first is None:
        return None
    names, images = first["names"], first["class_images"]
    same = [(label, [one for one in seeds if one.get("names") == names]) for label, seeds in known]
    told = [(label, seeds) for label, seeds in same if seeds]
    columns = {
        label: [statistics.fmean(tops) for tops in zip(*(one["class_top1"] for one in seeds), strict=True)]
        for label, seeds in told
    }
    best = next(iter(columns.values()))
    taught = [one["teacher"]["class_top1"] for _, seeds in told for one in seeds[:1] if one["teacher"]][:1]
    shown = [*taught, *columns.values()]
    order = sorted(
        (i for i, count in enumerate(images) if count), key=lambda i: best[i] - (taught[0][i] if taught else 0)
    )
    rows = [[_said(names[i]), str(images[i]), *(f"{column[i]:.1f}" for column in shown)] for i in order[:_MOST_CLASSES]]
    header = ["class", "images", *["teacher %"] * len(taught), *(f"{label} %" for label in columns)]
    caption = f"Top-1 by class, {len(rows)} of {len(order)}, mean over seeds"
    data = {"names": names, "images": images, "teacher": taught[0] if taught else None, "students": columns}
    lost = "is furthest behind the teacher" if taught else "is least accurate"
    return figure(
        html_table(header, rows, caption),
        f"The classes in which {told[0][0]} {lost} come first.",
        name="accuracy by class",
        data=data,
    )


def _confusion(comparison: Comparison, known: Known) -> Markup | None:
    blocks = []
    for label, one in [(label, seeds[0]) for label, seeds in known if seeds[0].get("confusion")]:
        found = [(label, one["confusion"])]
        found += [(f"teacher of {label}", one["teacher"]["confusion"])] if one["teacher"] else []
        blocks.append((label, grid([_class_figure(who, part, "confusion", most=100, digits=0) for who, part in found])))
    return _folded(blocks)


def _class_figure(who: str, found: dict[str, Any], what: str, *, most: float, digits: int) -> Markup:
    return figure(pictures.class_table(found, who, most=most, digits=digits), "", name=f"{what}, {who}", data=found)


def _images(comparison: Comparison, known: Known) -> Markup | None:
    found = [(label, one["images_shown"]) for label, seeds in known for one in seeds if one.get("images_shown")]
    told = {"differing": "teacher and student differ most", "uncertain": "the student is least certain"}
    return _folded(
        [
            (label, grid([_sheet(label, shown[kind], text) for kind, text in told.items() if kind in shown], wide=True))
            for label, shown in found
        ]
    )


def _sheet(label: str, images: Sequence[dict[str, Any]], told: str) -> Markup:
    items = []
    for image in images:
        lines = [f"true: {_said(image['label'])}"]
        lines += [
            f"{who}: {_said(image[who][0])}, {image[who][1]:.0f} %" for who in ("teacher", "student") if who in image
        ]
        picture = pictures.photograph(image["png"], f"image {image['index']}, {'; '.join(lines)}")
        items.append(tag("li", picture, *(tag("span", line) for line in lines)))
    sheet = tag("ul", *items, class_="sheet")
    return figure(sheet, f"{label}: where {told}.", name=f"images, {label}, where {told}", data=list(images))


def _said(name: Any) -> str:
    return str(name).replace("_", " ")


_MOST_CLASSES = 100


def _closeness(comparison: Comparison, known: Known) -> Markup | None:
    rows = []
    for label, seeds in known:
        taught = [one for one in seeds if one["teacher"]]
        agreement, distance = ([one[key] for one in taught] for key in ("agreement", "correlation_mean"))
        eces = ([one["calibration"]["ece"] for one in of] for of in (seeds, [one["teacher"] for one in taught]))
        rows.append([label, spread(agreement), spread(distance, 4), *map(spread, eces)])
    header = ["method", "agreement %", "mean |Δ correlation|", "ECE %", "teacher's ECE %"]
    return html_table(header, rows, "Of the best checkpoints, over seeds") if rows else None


def _correlation(comparison: Comparison, known: Known) -> Markup | None:
    taught = [(label, seeds[0]) for label, seeds in known if seeds[0]["teacher"]]
    if not taught:
        return None
    most = max(max(map(max, one["correlation"])) for _, one in taught)
    figures = []
    for label, one in taught:
        values, names, title = one["correlation"], one.get("names", []), f"|corr(teacher) - corr(student)|, {label}"
        if 0 < len(names) <= _NAMED:
            picture = pictures.class_table({"names": names, "values": values}, title, most=most, digits=2)
        else:
            told = f"Mean {one['correlation_mean']:.4f} over {one['classes']} x {one['classes']} classes."
            picture = pictures.heat_map(values, title, told, most=most)
        figures.append(figure(picture, f"{label}: mean {one['correlation_mean']:.4f}", name=title, data=values))
    bar = tag("div", pictures.colour_bar(most, "Colours of the heat maps"), class_="bar-of-colours")
    return join([bar, grid(figures)])


_NAMED = 12  # a matrix of more classes has no room for names and numbers


def _pairs(comparison: Comparison, known: Known) -> Markup | None:
    taught = [(label, seeds[0]["pairs"]) for label, seeds in known if seeds[0]["teacher"]]
    most = max((pair["kl"] for _, pairs in taught for pair in pairs), default=0)
    tables = []
    for label, pairs in taught:
        rows = [
            [_said(f"{pair['first']} / {pair['second']}"), f"{pair['kl']:.3f}",
             *(f"{100 * pair[who]:.0f}" for who in ("teacher", "student"))]
            for pair in pairs
        ]  # fmt: skip
        shares = [pair["kl"] / most if most else 0 for pair in pairs]
        tables.append(html_table(["pair", "KL, nats", "teacher %", "student %"], rows, label, shares))
    maps = [(label, seeds[0]["pair_map"]) for label, seeds in known if seeds[0].get("pair_map")]
    most = max((value for _, found in maps for row in found["values"] for value in row), default=0)
    drawn = [_class_figure(label, found, "KL of pairs", most=most, digits=2) for label, found in maps]
    return join([grid(tables), grid(drawn)]) if taught else None


def _features(comparison: Comparison, known: Known) -> Markup | None:
    embedded = [(label, seeds[0], seeds[0]["embedding"]) for label, seeds in known if seeds[0]["embedding"]]
    if not embedded:
        return None
    taught = [one for _, one, _ in embedded if one["teacher"] and one["teacher"]["embedding"]]
    embedded += [("teacher", one, one["teacher"]["embedding"]) for one in taught[:1]]
    figures = []
    for label, one, embedding in embedded:
        title = f"t-SNE of features, {label}"
        picture = pictures.scatter(embedding, one["embedded"], title)
        data = {**embedding, "classes": one["embedded"]}
        figures.append(figure(picture, f"{label}: silhouette {embedding['silhouette']:.3f}", name=title, data=data))
    names = dict.fromkeys(embedded[0][1]["embedded"])
    labels = [(name.replace("_", " "), i) for i, name in enumerate(names)]
    return join([grid(figures), charts.legend(labels, lines=False)])


def _calibration(comparison: Comparison, known: Known) -> Markup | None:
    drawn = [(f"{label}: ECE {spread([one['calibration']['ece'] for one in of])} %", of[0]) for label, of in known]
    teachers = [one["teacher"] for _, one in drawn if one["teacher"]][:1]
    drawn += [(f"teacher: ECE {one['calibration']['ece']:.2f} %", one) for one in teachers]
    return grid(
        [
            figure(pictures.reliability(one["calibration"], title), title, name=f"calibration, {title}",
                   data=one["calibration"])
            for title, one in drawn
        ]
    )  # fmt: skip


_PARTS: tuple[tuple[str, str, str, Callable[[Comparison, Known], Markup | None]], ...] = (
    ("overview", "Accuracy at a glance", "", _overview),
    ("curves", "Learning curves", "", _learning),
    (
        "papers",
        "The papers' figures beside ours",
        "Compare figures of the same protocol only: all epochs and all data. The papers' were never measured here.",
        _papers,
    ),
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
        "between these two, in nats, and what each gives the true one. Then the KL of all pairs of the worst classes.",
        _pairs,
    ),
    (
        "classes",
        "Accuracy by class",
        "Top-1 in percent of each class's images in the evaluation split, best checkpoints.",
        _classes,
    ),
    (
        "confusion",
        "Confusion of the classes",
        "Rows are true classes, columns the network's answers, in percent of the row's images; first seed. Of many "
        "classes, those that the student confuses most.",
        _confusion,
    ),
    (
        "images",
        "Images: most different, least certain",
        "From the evaluation split, first seed: by KL(teacher || student), and by the student's largest probability.",
        _images,
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
