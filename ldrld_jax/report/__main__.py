"""The command line: python -m ldrld_jax.report DIR... [--out DIR] [--analyse] [--data_dir DIR]."""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from ldrld_jax.record.console import printable
from ldrld_jax.report import cache
from ldrld_jax.report.collect import Report, collect
from ldrld_jax.report.groups import Comparison, compare
from ldrld_jax.report.table import markdown, results


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes both files; returns 2 if there is no run, or no place to write."""
    parser = argparse.ArgumentParser(
        prog="python -m ldrld_jax.report",
        description="Compares runs, finished or not: a Markdown table, and one HTML page with the pictures.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run's workdir, or a folder of them")
    parser.add_argument("--out", metavar="DIR", help="where report.html and report.md go; the first DIR that is there")
    parser.add_argument("--analyse", action="store_true", help="run students and teachers for the pictures of logits")
    parser.add_argument("--data_dir", metavar="DIR", help="with --analyse: where the data lie, if they have moved")
    args = parser.parse_args(argv)
    report, out = collect(args.folders), epath.Path(args.out or _first_there(args.folders))
    comparisons = compare(report.summaries, report.running)
    if args.analyse:
        from ldrld_jax.report import outputs

        report.notes += outputs.analyse(comparisons, out, args.data_dir)
    cells = results(comparisons)
    if cells.rows:
        print(printable(markdown(cells)))
    for note in report.notes:
        print(printable(note), file=sys.stderr)
    if not comparisons:
        return 2
    return _write(out, report, comparisons, markdown(cells))


def _first_there(folders: Sequence[str]) -> str:
    return next((folder for folder in folders if epath.Path(folder).is_dir()), folders[0])


def _write(out: epath.Path, report: Report, comparisons: list[Comparison], text: str) -> int:
    from ldrld_jax.files import replace_text
    from ldrld_jax.report.page import page

    runs = [run.folder for run in report.summaries]
    analyses = {folder: found for folder in runs if (found := cache.read(folder, out)) is not None}
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "report.md", f"{text}\n")
        replace_text(out / "report.html", page(report, comparisons, analyses))
    except OSError as error:
        print(f"report.html cannot be written to {out} ({error.strerror or error}). Set --out.", file=sys.stderr)
        return 2
    print(printable(f"written: {out / 'report.html'} and report.md"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
