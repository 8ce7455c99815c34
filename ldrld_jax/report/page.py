"""The page: one HTML file that loads nothing, for phones and desktops, in light and dark."""

import datetime
import pathlib
from collections.abc import Sequence

from ldrld_jax.record.console import counted, duration
from ldrld_jax.report.collect import Report, plausible
from ldrld_jax.report.groups import Comparison
from ldrld_jax.report.markup import Markup, html_table, tag
from ldrld_jax.report.sections import Analyses, Section, sections
from ldrld_jax.report.table import for_phones, results, spread

_STYLE = pathlib.Path(__file__).parent / "style.css"


def page(report: Report, comparisons: Sequence[Comparison], analyses: Analyses) -> str:
    """Returns the whole document.

    Args:
      report: what was found.
      comparisons: of its runs.
      analyses: what `outputs.analyse` kept, by folder.
    """
    parts = [(c, sections(c, analyses, i)) for i, c in enumerate(comparisons)]
    title, made = "Distillation report", datetime.datetime.now(datetime.UTC)
    counts = f"{counted(len(report.summaries), 'run')} finished, {len(report.running)} not finished"
    counts += f", {counted(len(report.notes), 'note')}"
    links = [("results", "Results")] * bool(report.summaries)
    links += [(part.anchor, part.heading) for _, found in parts[:1] for part in found]
    links += [(f"c{i}", c.title) for i, (c, _) in enumerate(parts)][1:]
    links += [("notes", "Notes")] * bool(report.notes)
    body = [
        tag("a", "Skip to the results", href="#main", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("p", "; ".join(c.title for c in comparisons)),
            tag("p", counts),
            _when(report),
        ),
        tag("nav", tag("ul", *(tag("li", tag("a", text, href=f"#{to}")) for to, text in links)), aria_label="Contents"),
        tag(
            "main", _results(comparisons), *map(_comparison, range(len(parts)), parts), _notes(report.notes), id="main"
        ),
        tag(
            "footer", tag("p", f"Made on {made:%Y-%m-%d at %H:%M} UTC by python -m ldrld_jax.report; it loads nothing.")
        ),
    ]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Markup(_STYLE.read_text())),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), "\n", tag("body", *body), lang="en") + "\n"


def _when(report: Report) -> Markup | None:
    """Returns when the runs ended and how long they took; None for runs that do not say."""
    ends = sorted({run.ended[:10] for run in report.summaries if run.ended})
    times = [run.summary["train_seconds"] for run in report.summaries if run.summary and "train_seconds" in run.summary]
    if not ends:
        return None
    span = f"ended {' to '.join(dict.fromkeys((ends[0], ends[-1])))} (UTC)"
    return tag("p", f"{span}, {duration(sum(filter(plausible, times)))} of training in all")


def _results(comparisons: Sequence[Comparison]) -> Markup | None:
    cells = results(comparisons)
    if not cells.rows:
        return None
    caption = "Top-1 on the evaluation split, mean ± deviation over seeds; best epoch and last epoch"
    told = ["Against our kd: the difference of the last-epoch means, to our own KD under the same conditions."]
    cards = [card for comparison in comparisons[:1] for card in _cards(comparison)]
    for comparison in comparisons:
        if comparison.usual:
            usual = ", ".join(f"{key}={value}" for key, value in comparison.usual.items())
            told.append(f"Not shown in the settings of {comparison.title}, as in most runs: {usual}.")
    content = [tag("div", *cards, class_="cards"), html_table(*for_phones(cells), caption)]
    content += [tag("p", text) for text in told]
    return tag("section", tag("h2", "Results"), *content, id="results", class_="results")


def _cards(comparison: Comparison) -> list[Markup]:
    """Returns the cards at the top: the best method, its lead, and the distance to the teacher."""
    if not comparison.groups:
        return []
    best = comparison.groups[0]
    cards = [(f"{best.label}, last epoch", f"{spread(best.values('last_top1'))} %")]
    if kd := comparison.own_kd(best):
        cards.append(("ahead of our kd", f"{best.mean('last_top1') - kd.mean('last_top1'):+.2f}"))
    if best.values("teacher_top1"):
        cards.append((f"the teacher, {best.first.teacher}", f"{spread(best.values('teacher_top1'))} %"))
    cards.append(("seeds", str(len({run.seed for run in best.runs}))))
    return [tag("div", tag("strong", value), tag("span", name), class_="card") for name, value in cards]


def _comparison(number: int, found: tuple[Comparison, list[Section]]) -> Markup:
    comparison, parts = found
    made = [
        tag("section", tag("h3", part.heading), tag("p", part.explanation) if part.explanation else None, part.content,
            id=part.anchor)
        for part in parts
    ]  # fmt: skip
    hint = tag("p", "The pictures of logits and features take running the networks: add --analyse.", class_="hint")
    seen = {part.anchor.partition("-")[2] for part in parts}
    return tag(
        "section",
        tag("h2", comparison.title),
        *made,
        None if "calibration" in seen else hint,
        id=f"c{number}",
        class_="comparison",
    )


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    items = (tag("li", tag("code", note.partition(": ")[0]), " ", note.partition(": ")[2]) for note in notes)
    told = tag("p", "Folders that are in no table, or only in part.")
    return tag("section", tag("h2", "Notes"), told, tag("ul", *items), id="notes")
