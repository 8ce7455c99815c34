"""The command line: the table of modes, their flags, and one line for an error that the user can fix.

python -m ldrld_jax.main --config configs/cifar100.py:resnet32x4-resnet8x4 --workdir DIR --config.seed=1
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ldrld_jax.errors import UserError, os_error
from ldrld_jax.files import check_remote, expand_home, split_argument
from ldrld_jax.record.console import Parser, ProgressBar, answer, counted, printable, say

if TYPE_CHECKING:
    from ml_collections import ConfigDict

DEFAULT_CONFIG = "configs/digits.py"
LEAVE_WITHIN = 25.0  # seconds after SIGTERM; a machine that is taken away is gone after 30


class Mode(NamedTuple):
    """An entry of `MODES`.

    Attributes:
      does: its line in --help.
      run: runs it with the flags and the config (None for an exported student), and returns the exit status; None is 0.
      flags: of `FLAGS`, those that it takes besides --config.
      of_run: whether it takes the config of the run in --workdir unless --config names another.
    """

    does: str
    run: Callable[[argparse.Namespace, Any], int | None]
    flags: tuple[str, ...]
    of_run: bool = False


def make_parser(mode: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m ldrld_jax.main`, or the one of `ldrld-jax MODE`, whose help is of that mode."""
    prog = "python -m ldrld_jax.main" if mode is None else f"ldrld-jax {mode}"
    words = {None: " [IMAGE...]", "predict": " IMAGE..."}.get(mode, "")
    epilog = "Any config key is a flag as well: --config.seed=1 --config.optim.learning_rate=.1\n"
    epilog += "Explain a key: ldrld-jax help optim.learning_rate"
    parser = Parser(
        prog=prog,
        usage=f"{prog} [FLAG...] [--config.KEY=VALUE...]{words}",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Distils a student from a teacher." if mode is None else f"{MODES[mode].does}.",
        epilog=f"{_IMAGES}\n\n{epilog}" if words else epilog,
    )
    if mode is None:
        parser.add_argument(
            "--mode", default="train", choices=MODES, metavar="MODE", help="choose one (default: train)"
        )
        width = max(map(len, MODES))
        modes = "\n".join(f"  {name:{width}}  {entry.does}" for name, entry in MODES.items())
        parser.epilog = f"modes:\n{modes}\n\n{parser.epilog}"
    else:
        parser.set_defaults(mode=mode)
    hosts = parser.add_argument_group("a run of several processes, one per host")
    for flag, options in FLAGS.items():
        (hosts if flag in _HOSTS else parser).add_argument(flag, **{**options, "help": _help(flag, mode)})
    return parser


def _help(flag: str, mode: str | None) -> str:
    """Returns the help of a flag in that of a mode, or in that of all, which names the modes that take it."""
    text, takers = FLAGS[flag]["help"], _takers(flag)
    if flag == "--config":
        of_run = _listed(name for name, entry in MODES.items() if entry.of_run)
        default = DEFAULT_CONFIG if mode is None or not MODES[mode].of_run else "that of the run"
        return f"{text} (default: {default}{f'; {of_run}: that of the run' if mode is None else ''})"
    if mode is None:
        return text if flag in ("--workdir", *_HOSTS) else f"{_listed(takers)}: {text}"
    return text if mode in takers else argparse.SUPPRESS


def _takers(flag: str) -> list[str]:
    return [name for name in MODES if flag in flags_of(name)]


def flags_of(mode: str) -> tuple[str, ...]:
    """Returns the flags that a mode takes."""
    return ("--config", *MODES[mode].flags)


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def parse(argv: Sequence[str], mode: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags, and returns the `--config.key=value` overrides among them as `key=value`.

    Args:
      argv: the command line.
      mode: the mode that it is of; None if --mode says it.

    Raises:
      UserError: if a flag is unknown, lacks its value or is of another mode.
    """
    try:
        flags, overrides = split_overrides(argv)
        args, rest = make_parser(mode).parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    _check_flags(args)
    file, _ = split_argument(args.config or DEFAULT_CONFIG)
    args.workdir = expand_home(args.workdir or str(pathlib.Path("runs") / pathlib.Path(file).stem))
    for name in ("hub", "json", "output", "profile"):
        setattr(args, name, getattr(args, name) and expand_home(getattr(args, name)))
    args.images = [word for word in rest if word == "-" or not word.startswith("-")] if args.mode == "predict" else []
    known = [*(["--mode", *FLAGS] if mode is None else flags_of(mode)), "--help"]
    check_all_known([word for word in rest if word not in args.images], known)
    if args.mode == "predict" and not args.images:
        raise UserError("predict needs images: --workdir DIR IMAGE...")
    return args, overrides


def _check_flags(args: argparse.Namespace) -> None:
    if (args.mode == "compile") != (args.target is not None):
        raise UserError("--mode compile and --target NAME go together: --mode compile --target h100.")
    for flag in FLAGS:
        value = getattr(args, flag[2:])
        # A workdir is tolerated where none is used: scripts give it to every mode.
        if value not in (None, False) and args.mode not in _takers(flag) and flag != "--workdir":
            raise UserError(f"{flag} is a flag of {_listed(_takers(flag))}, and not of {args.mode}. Remove it.")
        if value == "":
            raise UserError(f"{flag} is empty, perhaps from an unset shell variable. Give it a value, or remove it.")
    given = [value is not None for value in (args.coordinator, args.processes, args.process)]
    if any(given) and (args.distributed or not all(given)):
        raise UserError("give --coordinator, --processes and --process, or --distributed alone.")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into what argparse may see, and the `key=value` of `--config.key` flags.

    Raises:
      UserError: if a key has no value.

    Example:
      >>> split_overrides(["--workdir", "w", "--config.seed", "1", "--config.data.data_dir=/my data"])
      (['--workdir', 'w'], ['seed=1', 'data.data_dir=/my data'])
    """
    flags, overrides, left = list[str](), list[str](), list(argv)
    while left:
        flag = left.pop(0)
        if not flag.startswith("--config."):
            flags.append(flag)
            continue
        if "=" not in flag:
            if not left or left[0].startswith("--"):
                raise UserError(f"{flag} needs a value: {flag}=VALUE.")
            flag = f"{flag}={left.pop(0)}"
        overrides.append(flag.removeprefix("--config."))
    return flags, overrides


def check_all_known(rest: Sequence[str], known: Sequence[str]) -> None:
    """Raises a UserError if a parser that knows the flags `known` left arguments over."""
    if rest:
        raise UserError(f"there is no flag {rest[0]!r}. Known: {', '.join(['--config.KEY=VALUE', *known])}.")


def main(argv: Sequence[str] | None = None, mode: str | None = None) -> int:
    """Runs the command line of one mode, or of all; returns 0, 2 for wrong input, or 128 + signal."""
    try:
        return run(*parse(sys.argv[1:] if argv is None else argv, mode))
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(os_error(error), 2)
    except (KeyboardInterrupt, Exception) as error:
        if (code := getattr(error, "exit_code", None)) is not None:
            return fail(str(error), code)
        if isinstance(error, KeyboardInterrupt):
            return fail("interrupted", 130)
        raise


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Runs what the flags say, and returns the exit status."""
    _check_environment()
    for path in filter(None, (args.workdir, args.json, args.output, args.profile, *args.images)):
        check_remote(path)
    config = _config(args, overrides)
    with _among_others(args):
        return MODES[args.mode].run(args, config) or 0


def _config(args: argparse.Namespace, overrides: list[str]) -> "ConfigDict | None":
    from ldrld_jax import config as config_lib

    if args.mode == "predict":
        from ldrld_jax.deploy import export, hub

        if hub.is_hub(args.workdir) or export.is_exported(args.workdir):
            if args.config or overrides:
                raise UserError(f"{args.workdir} holds an exported student, which no config changes. Remove --config.")
            return None
    if args.config or not MODES[args.mode].of_run:
        return config_lib.load(args.config or DEFAULT_CONFIG, overrides)
    return config_lib.load_run(args.workdir, overrides)


def _among_others(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Joins this process to the others of the run, if the flags say that there are any."""
    if not args.distributed and args.coordinator is None:
        return contextlib.nullcontext()
    from ldrld_jax.runtime import hosts

    return hosts.joined(args.coordinator, args.processes, args.process)


# Each imports what it takes, so that a wrong flag is answered at once.


def _train(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.train.trainer import Trainer

    file = args.config or DEFAULT_CONFIG
    Trainer.from_config(config, args.workdir).fit(leave_within=LEAVE_WITHIN, profile=args.profile, file=file)


def _check(args: argparse.Namespace, config: "ConfigDict") -> int:
    from ldrld_jax.train.trainer import Trainer

    if problems := Trainer.from_config(config, args.workdir).check():
        answer("\n".join(f"problem: {problem}" for problem in problems))
        return fail(f"{counted(len(problems), 'problem')} would stop this run, see above.", 1)
    answer("this run can start.")
    return 0


def _eval(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.train.trainer import Trainer

    for name, value in Trainer.from_config(config, args.workdir).evaluate().items():
        answer(f"{name} {value:.4f}")


def _predict(args: argparse.Namespace, config: "ConfigDict | None") -> int:
    from ldrld_jax.deploy import export, hub, predict

    paths = predict.find(args.images)
    with predict.output(args.output) as write:
        if config is not None:
            student = export.student_of(config, args.workdir)[0]
        else:
            student = (hub if hub.is_hub(args.workdir) else export).read_student(args.workdir)
        broken = 0
        for path, found in predict.predict(student, paths, args.top_k or 5):
            if not isinstance(found, Exception):
                write(path, found)
                continue
            broken += 1
            if broken == len(paths):
                raise UserError(predict.problem(path, found))  # and leaves the file of an earlier prediction
            fail(predict.problem(path, found), 1)
    return 1 if broken else 0


def _export(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.deploy import export, hub

    say(hub.export(config, args.workdir, args.hub) if args.hub else str(export.export(config, args.workdir)))


def _compile(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.aot import report

    report.report(config, args.target, args.json)


def _bench(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.bench import step

    answer(str(step.measure(config, profile=args.profile)))


def _bench_data(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax import config as config_lib
    from ldrld_jax.data import speed

    answer(speed.report(config.data, batch_size=config.batch_size, views=config_lib.views(config)))


def _decode(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax.data.decoding import Decoding

    if args.decoded is None:
        raise UserError("decode needs a folder to write to: --decoded DIR.")
    decoding = Decoding(config.data, args.decoded, short_side=args.short_side, quality=args.quality)
    say(decoding.describe())
    bar = ProgressBar(decoding.done, decoding.total, "decode", unit="image")
    try:
        for done in decoding.write():
            bar.update(done, {})
    finally:
        bar.close()
    say(f"done. To read them: --config.data.name=decoded --config.data.data_dir={args.decoded}")


def _check_environment() -> None:
    try:
        import jax  # noqa: F401
    except ValueError as error:  # it reads its variables when it is imported
        raise UserError(f"JAX does not start: {error}. Correct or unset that environment variable.") from None


def leave(code: int) -> NoReturn:
    """Ends the process; one of several that has failed waits for no other."""
    if "ldrld_jax.runtime.hosts" in sys.modules:
        sys.modules["ldrld_jax.runtime.hosts"].exit_with(code)
    sys.exit(code)


def fail(message: str, code: int, prog: str = "ldrld_jax") -> int:
    """Prints an error of a program as one line, and returns its exit status."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{prog}: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


FLAGS: dict[str, dict[str, Any]] = {
    "--config": dict(metavar="FILE[:ARG]", help="take the config from this Python file"),
    "--workdir": dict(
        metavar="DIR", help="keep or find the run in this folder (default: runs/NAME for a config NAME.py)"
    ),
    "--profile": dict(metavar="DIR", help="write a trace of ten steps by jax.profiler to this folder"),
    "--top_k": dict(type=_count, metavar="N", help="name the N most likely classes (default: 5)"),
    "--output": dict(metavar="FILE", help="write a table to FILE.csv, .jsonl or .parquet instead of printing lines"),
    "--hub": dict(metavar="TARGET", help="write for the Hugging Face Hub: to a folder, or upload to hf://OWNER/NAME"),
    "--decoded": dict(metavar="DIR", help="write the decoded images to this folder"),
    "--short_side": dict(
        type=_count,
        metavar="N",
        help="resize larger images to N pixels on the shorter side (default: data.resize_size, or 256)",
    ),
    "--quality": dict(type=_count, metavar="Q", help="write JPEGs of this quality, up to 100, instead of pixels"),
    "--target": dict(metavar="NAME", help="choose the devices: v5e:2x4, v5p:2x2x1, h100, a100:8, t4, cpu:8, ..."),
    "--json": dict(metavar="FILE", help="write the result to this file as well, as JSON"),
    "--distributed": dict(action="store_true", help="join the processes started by Slurm, Open MPI, GKE or a TPU pod"),
    "--coordinator": dict(metavar="HOST:PORT", help="join processes started by hand; process 0 has this address"),
    "--processes": dict(type=int, metavar="N", help="set the number of processes started by hand"),
    "--process": dict(type=int, metavar="I", help="set the index of this process, from 0"),
}
_HOSTS = ("--distributed", "--coordinator", "--processes", "--process")
_IMAGES = """IMAGE is a file, a pattern such as 'a/**/*.png', a folder (every image in and below
it), or - for paths on standard input. --workdir is a run's folder, an export, or hf://OWNER/NAME."""

MODES = {
    "train": Mode(
        "Trains a student, its teacher first if need be, or resumes", _train, ("--workdir", "--profile", *_HOSTS)
    ),
    "check": Mode("Checks the data, models, workdir and disk of a run without training", _check, ("--workdir",)),
    "eval": Mode("Evaluates the best checkpoint of a run", _eval, ("--workdir", *_HOSTS), of_run=True),
    "predict": Mode(
        "Names the most likely classes of images", _predict, ("--workdir", "--top_k", "--output"), of_run=True
    ),
    "export": Mode(
        "Writes the best student of a run as StableHLO and safetensors",
        _export,
        ("--workdir", "--hub", *_HOSTS),
        of_run=True,
    ),
    "compile": Mode(
        "Compiles for devices that are not present, and reports memory and speed limits",
        _compile,
        ("--target", "--json"),
    ),
    "bench": Mode("Measures how a step spends its time", _bench, ("--profile", *_HOSTS)),
    "bench_data": Mode("Measures the speed of the input alone", _bench_data, _HOSTS),
    "decode": Mode(
        "Writes images decoded and smaller, for runs that read them faster",
        _decode,
        ("--decoded", "--short_side", "--quality"),
    ),
}


if __name__ == "__main__":
    leave(main())
