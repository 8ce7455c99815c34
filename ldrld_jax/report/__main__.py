"""The command line: python -m ldrld_jax.report DIR... [--out DIR] [--analyse] [--data_dir DIR] [--watch]."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

from etils import epath

from ldrld_jax.errors import UserError, os_error
from ldrld_jax.files import check_remote, expand_home
from ldrld_jax.record.console import Parser, answer, printable
from ldrld_jax.report import cache
from ldrld_jax.report.collect import Report, collect
from ldrld_jax.report.groups import Comparison, compare
from ldrld_jax.report.table import fitting, markdown, results

_PROG = "python -m ldrld_jax.report"


def make_parser(prog: str = _PROG) -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = Parser(
        prog=prog, description="Compares runs, finished or not, in a Markdown table and on one HTML page with pictures."
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="read the runs in and below this folder")
    parser.add_argument(
        "--out", metavar="DIR", help="write report.html and report.md here (default: the first DIR that exists)"
    )
    parser.add_argument("--analyse", action="store_true", help="run students and teachers for pictures of their logits")
    parser.add_argument(
        "--watch", nargs="?", const=30.0, type=_seconds, metavar="SECONDS",
        help="write both files again and again until Ctrl-C, every 30 s or every SECONDS",
    )  # fmt: skip
    parser.add_argument("--data_dir", metavar="DIR", help="read the data here for --analyse, if they have moved")
    return parser


def _seconds(text: str) -> float:
    if not 1 <= (seconds := float(text)) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 86400 seconds")
    return seconds


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Prints the table and writes both files; returns 2 if there is no run, or no place to write."""
    try:
        return _run(make_parser(prog), argv)
    except OSError as error:
        print(os_error(error), file=sys.stderr)
        return 2


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    try:
        args.out, args.data_dir = (path and expand_home(path) for path in (args.out, args.data_dir))
        args.folders = list(map(expand_home, args.folders))
        for folder in filter(None, (*args.folders, args.out)):
            check_remote(folder)
    except UserError as error:
        parser.error(str(error))
    if args.watch is None:
        return _report(args)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _report(args)
            time.sleep(args.watch)
    return 0


def _report(args: argparse.Namespace) -> int:
    report = collect(args.folders)
    there = (folder for folder in args.folders if epath.Path(folder).is_dir())
    out = epath.Path(args.out or next(there, args.folders[0]))
    comparisons = compare(report.summaries, report.running)
    if args.analyse:
        from ldrld_jax.report import outputs

        report.notes += outputs.analyse(comparisons, out, args.data_dir)
    cells = results(comparisons)
    if args.watch is None or not comparisons:
        if cells.rows:
            answer(fitting(cells))
        for note in report.notes:
            print(printable(note), file=sys.stderr)
    if not comparisons:
        return 2
    return _write(out, report, comparisons, markdown(cells))


# What each file has in it if this program wrote it.
_MARKS = {"report.md": "| teacher | student | method |", "report.html": "python -m ldrld_jax.report"}


def _ours(path: epath.Path, mark: str) -> bool:
    """Returns whether a file may be written: there is none, it is empty, or this program wrote it."""
    content = path.read_bytes().decode(errors="replace").strip() if path.is_file() else ""
    return not content or mark in content


def _write(out: epath.Path, report: Report, comparisons: list[Comparison], text: str) -> int:
    from ldrld_jax.files import replace_text
    from ldrld_jax.report.page import page
    from ldrld_jax.report.sections import drawable

    analyses = {}
    for run in report.summaries:
        if (found := cache.read(run.folder, out)) is not None:
            if not drawable(run, found):
                report.notes.append(f"{run.folder}: its analysis.json cannot be drawn. Remove it, and analyse again.")
            elif (best := run.best_step) not in (None, found["step"]):
                report.notes.append(
                    f"{run.folder}: its analysis is of step {found['step']}, and its best checkpoint of step {best}. "
                    "Analyse again: --analyse."
                )
            else:
                analyses[run.folder] = found
    try:
        if stranger := next((out / name for name, mark in _MARKS.items() if not _ours(out / name, mark)), None):
            print(f"{stranger} was not written by this program, and stays as it is. Set --out.", file=sys.stderr)
            return 2
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "report.md", f"{text}\n")
        replace_text(out / "report.html", page(report, comparisons, analyses))
    except OSError as error:
        print(f"report.html cannot be written to {out} ({error.strerror or error}). Set --out.", file=sys.stderr)
        return 2
    counts = f"{len(report.summaries)} finished, {len(report.running)} not finished"
    print(printable(f"written: {out / 'report.html'} and report.md ({counts})"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
