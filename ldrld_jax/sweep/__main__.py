"""The command line of a sweep."""

import argparse
import contextlib
import pathlib
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

from etils import epath

from ldrld_jax.errors import UserError, os_error
from ldrld_jax.files import check_remote, check_writable, expand_home, is_local, split_argument
from ldrld_jax.main import check_all_known, fail, split_overrides
from ldrld_jax.record.console import Parser, answer, on_terminal, say
from ldrld_jax.report import collect
from ldrld_jax.report.groups import compare
from ldrld_jax.report.table import fitting, results
from ldrld_jax.sweep.plan import Job, load, parse_grid, plan
from ldrld_jax.sweep.schedule import Sweep
from ldrld_jax.sweep.slurm import script

_NAME = "ldrld_jax.sweep"
_PROG = f"python -m {_NAME}"


class _Screen:
    """Display of the jobs: redrawn in place on a terminal, elsewhere one line per change of state."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._height = 0

    def __call__(self, jobs: Iterable[Job]) -> None:
        if on_terminal():
            lines = _fitting(list(jobs), *shutil.get_terminal_size())
            with contextlib.suppress(OSError):  # the terminal has gone
                print(f"\x1b[{self._height}F\x1b[J" * bool(self._height) + "\n".join(lines), flush=True)
            self._height = len(lines)
            return
        for job in jobs:
            if self._states.get(job.name) != job.state:
                self._states[job.name] = job.state
                say(job.line())


def _fitting(jobs: list[Job], columns: int, rows: int) -> list[str]:
    """Returns a line per job; if they do not fit the terminal, a count of done jobs and the active ones."""
    lines = [job.line() for job in jobs]
    if len(lines) >= rows:
        done = sum(job.state == "done" for job in jobs)
        active = [line for job, line in zip(jobs, lines, strict=True) if job.state not in ("done", "waiting")]
        lines = [f"{done} of {len(jobs)} done", *active][: rows - 1]
    return [line[: columns - 1] for line in lines]


def make_parser(prog: str = _PROG) -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [FILE[:ARG]] [FLAG...] [--config.KEY=VALUE...]",
        allow_abbrev=False,
        exit_on_error=False,
        description="Runs a config with many values of its keys, and resumes.",
    )
    parser.add_argument(
        "sweep",
        metavar="FILE[:ARG]",
        nargs="?",
        help="take the runs from get_sweep() of this file: experiments/methods.py",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="use this config instead of the sweep's own")
    parser.add_argument(
        "--grid", metavar="KEY=V,V", action="append", default=[], help="run every combination of these values"
    )
    parser.add_argument("--workdir", metavar="DIR", help="keep the runs in this folder (default: runs/NAME-sweep)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="run N at a time, each on its share of the cores (default: 1)"
    )
    parser.add_argument("--gpus", metavar="I,J", help="run one at a time on each of these GPUs")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="run every N-th from the I-th, for a Slurm array")
    parser.add_argument(
        "--launcher",
        default="local",
        choices=("local", "slurm"),
        metavar="local|slurm",
        help="run here, or print a script for sbatch with a task for each missing run (default: local)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands of the missing runs, and run nothing"
    )
    return parser


def parse(argv: Sequence[str], prog: str = _PROG) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line into flags and the overrides of every run.

    Raises:
      UserError: if a flag is unknown or lacks its value.
    """
    try:
        flags, overrides = split_overrides(argv)
        parser = make_parser(prog)
        args, rest = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if not args.sweep and not args.config:
        raise UserError("a sweep needs a FILE with a get_sweep(), or --config and --grid.")
    name = pathlib.Path(split_argument(args.sweep or args.config)[0]).stem
    if args.workdir == "":
        raise UserError("--workdir is empty. Name a folder, or leave the flag out.")
    args.workdir = expand_home(args.workdir or str(pathlib.Path("runs") / f"{name}-sweep"))
    if args.gpus is not None and not all(args.gpus.split(",")):
        raise UserError(f"--gpus={args.gpus} has an empty name. Name GPUs, as in --gpus=0,1, or leave the flag out.")
    if args.jobs < 1 or (args.gpus and args.jobs > 1):
        raise UserError("--jobs must be at least 1, and cannot be given with --gpus, which runs one per GPU.")
    try:
        index, count = map(int, args.shard.split("/"))
        if not 0 <= index < count:
            raise ValueError
    except ValueError:
        raise UserError(f"--shard is I/N with 0 <= I < N, got {args.shard}.") from None
    args.shard = index, count
    if args.launcher == "slurm" and (args.gpus or args.dry_run or count > 1 or not is_local(epath.Path(args.workdir))):
        raise UserError("--launcher slurm takes a local --workdir, and none of --gpus, --shard and --dry_run.")
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    check_all_known(rest, known)
    return args, overrides


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Runs the command line; returns 0 if every run is complete, 1 if one failed, 2 for invalid input."""
    try:
        return run(*parse(sys.argv[1:] if argv is None else argv, prog))
    except UserError as error:
        return fail(str(error), 2, _NAME)
    except OSError as error:
        return fail(os_error(error), 2, _NAME)
    except KeyboardInterrupt:
        return fail("interrupted, the runs have saved; the same command resumes", 130, _NAME)


def jobs_of(args: argparse.Namespace, overrides: list[str]) -> list[Job]:
    """Returns the jobs of this shard.

    Raises:
      UserError: if the sweep or one of its configs is invalid.
    """
    sweep = load(args.sweep) if args.sweep else {}
    if args.config:
        sweep["config"] = args.config
    grid = list(map(parse_grid, args.grid))
    if twice := [key for i, (key, _) in enumerate(grid) if key in dict(grid[:i])]:
        raise UserError(f"--grid {twice[0]} is given twice. Give its values in one: --grid {twice[0]}=VALUE,VALUE.")
    sweep["grid"] = sweep.get("grid", {}) | dict(grid)
    index, count = args.shard
    return plan(sweep, epath.Path(args.workdir), overrides)[index::count]


def _again(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Returns the arguments of the sweep, to run a part of it."""
    file = [args.sweep] if args.sweep else []
    config = ["--config", args.config] if args.config else []
    grid = [word for each in args.grid for word in ("--grid", each)]
    return [*file, *config, *grid, "--workdir", args.workdir, *(f"--config.{override}" for override in overrides)]


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the missing jobs, or prints their commands or a script for Slurm; returns the exit status."""
    check_remote(args.workdir)
    workdir = epath.Path(args.workdir)
    jobs = jobs_of(args, overrides)
    for job in jobs:
        job.look()
    if args.dry_run:
        for job in jobs:
            answer(f"{job.state:9}  {shlex.join(job.command)}", verbatim=True)
        return 0
    logs = (workdir if is_local(workdir) else epath.Path("runs") / workdir.name) / "logs"
    check_writable(logs, "workdir")
    logs.mkdir(parents=True, exist_ok=True)
    if args.launcher == "slurm":
        text = script(jobs, _again(args, overrides), pathlib.Path(logs).absolute(), args.jobs)
        answer(text.rstrip("\n"), verbatim=True)
        return 0
    gpus = args.gpus.split(",") if args.gpus else []
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}] * args.jobs
    Sweep(jobs, slots, logs, _Screen()).run()
    say(f"\n{fitting(results(compare(collect([workdir]).summaries)))}")
    for job in jobs:
        if job.state == "failed":
            print(f"failed: {job.name}: {logs / job.name}.txt", file=sys.stderr)
    return 1 if any(job.state == "failed" for job in jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
