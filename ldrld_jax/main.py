"""The command line: flags, and one line for what a person can mend.

python -m ldrld_jax.main --config configs/cifar100.py:resnet32x4-resnet8x4 --workdir DIR --config.seed=1
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ldrld_jax.errors import UserError
from ldrld_jax.files import expand_home, split_argument

if TYPE_CHECKING:
    from ml_collections import ConfigDict

DEFAULT_CONFIG = "configs/digits.py"
MODES = ("train", "check", "eval", "predict", "export", "compile", "bench", "bench_data")
_FLAGS = (
    *("--config", "--workdir", "--mode", "--profile", "--distributed", "--coordinator", "--processes", "--process"),
    *("--target", "--json", "--help"),
)
LEAVE_WITHIN = 25.0  # seconds after SIGTERM; a machine that is taken away is gone after 30


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the `--config.key=value` overrides among them as `key=value`.

    Raises:
      UserError: if a flag is unknown or lacks its value.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ldrld_jax.main",
        allow_abbrev=False,
        exit_on_error=False,
        description="Distils a student from a teacher.",
        epilog="Any config key can be overridden: --config.seed=1 --config.optim.learning_rate=.1",
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help=f"{DEFAULT_CONFIG}; eval, predict, export: the workdir's own"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run's files lie (runs/<name of the config>)")
    hosts = parser.add_argument_group("a run of several processes, one a host")
    hosts.add_argument("--distributed", action="store_true", help="who they are says Slurm, Open MPI, GKE, a TPU pod")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: at process 0, the same for all")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many there are")
    hosts.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
    parser.add_argument("--mode", default="train", choices=MODES, help="%(default)s; predict takes IMAGE... at the end")
    ahead = parser.add_argument_group("compile: for devices that are not here")
    ahead.add_argument("--target", metavar="NAME", help="v5e:2x4, v5p:2x2x1, h100, a100:8, t4, cpu:8, ...")
    ahead.add_argument("--json", metavar="FILE", help="where to write the table for machines")
    parser.add_argument("--profile", metavar="DIR", help="with train or bench: a trace of ten steps, by jax.profiler")
    try:
        flags, key_flags = split_overrides(argv)
        args, rest = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if args.profile is not None and args.mode not in ("train", "bench"):
        raise UserError(
            f"--profile traces the steps of --mode train and bench, and --mode is {args.mode}. Leave it out."
        )
    if (args.mode == "compile") != (args.target is not None):
        raise UserError("--mode compile and --target NAME go together: --mode compile --target h100.")
    if args.json is not None and args.mode != "compile":
        raise UserError(f"--json is of --mode compile, and --mode is {args.mode}. Remove it.")
    given = [value is not None for value in (args.coordinator, args.processes, args.process)]
    if any(given) and (args.distributed or not all(given)):
        raise UserError("give --coordinator, --processes and --process, or --distributed alone.")
    if args.mode in ("predict", "check") and (args.distributed or any(given)):
        raise UserError(f"--mode {args.mode} is one process. Leave --distributed, --coordinator and the like out.")
    for flag, value in (("--config", args.config), ("--workdir", args.workdir)):
        if value == "":
            raise UserError(f"{flag} is empty, as by a variable of the shell that is not set. Name one, or remove it.")
    file, _ = split_argument(args.config or DEFAULT_CONFIG)
    args.workdir = expand_home(args.workdir or str(pathlib.Path("runs") / pathlib.Path(file).stem))
    args.images = []
    overrides = overrides_in([*rest, *key_flags], _FLAGS, args.images if args.mode == "predict" else None)
    if args.mode == "predict" and not args.images:
        raise UserError("--mode predict needs images: --mode predict --workdir DIR IMAGE...")
    return args, overrides


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into what argparse may see, and the flags of config keys, whose values may hold spaces.

    Example:
      >>> split_overrides(["--workdir", "w", "--config.seed", "1", "--config.data.data_dir=/my data"])
      (['--workdir', 'w'], ['--config.seed', '1', '--config.data.data_dir=/my data'])
    """
    flags, overrides, left = list[str](), list[str](), list(argv)
    while left:
        flag = left.pop(0)
        if not flag.startswith("--config."):
            flags.append(flag)
            continue
        overrides.append(flag)
        if "=" not in flag and left:
            overrides.append(left.pop(0))
    return flags, overrides


def overrides_in(rest: Sequence[str], known: Sequence[str], words: list[str] | None = None) -> list[str]:
    """The `--config.key=value` flags that a parser left over, as `key=value`.

    Args:
      rest: what it left.
      known: its flags, for the error.
      words: is given what is no flag; None if there may be no such thing.

    Raises:
      UserError: if there is another flag, or a value is missing.

    Example:
      >>> overrides_in(["--config.seed=1", "--config.method", "kd"], [])
      ['seed=1', 'method=kd']
    """
    rest, overrides = list(rest), []
    while rest:
        flag = rest.pop(0)
        if words is not None and not flag.startswith("-"):
            words.append(flag)
            continue
        if not flag.startswith("--config."):
            raise UserError(f"there is no flag {flag!r}. Known: {', '.join(['--config.KEY=VALUE', *known])}.")
        override = flag.removeprefix("--config.")
        if "=" not in override:
            if not rest:
                raise UserError(f"{flag} needs a value: {flag}=VALUE.")
            override = f"{override}={rest.pop(0)}"
        overrides.append(override)
    return overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit status: 0, 2 for wrong input, 128 + signal for an interruption."""
    try:
        run(*parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        return _fail(str(error), code)
    return 0


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Does what the flags say; imports what that takes, so that a wrong one is answered at once."""
    _check_environment()
    if args.mode == "predict":
        _predict(args, overrides)
        return
    config = _config(args, overrides)
    with _among_others(args):
        _do(args, config)


def _config(args: argparse.Namespace, overrides: list[str]) -> "ConfigDict":
    from ldrld_jax import config as config_lib

    if args.mode in ("train", "check", "compile", "bench", "bench_data") or args.config:
        return config_lib.load(args.config or DEFAULT_CONFIG, overrides)
    return config_lib.load_run(args.workdir, overrides)


def _among_others(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """This process as one of several, if the flags say so."""
    if not args.distributed and args.coordinator is None:
        return contextlib.nullcontext()
    from ldrld_jax.runtime import hosts

    return hosts.joined(args.coordinator, args.processes, args.process)


def _predict(args: argparse.Namespace, overrides: list[str]) -> None:
    """By a run's best student, or by an exported one, which takes neither data set nor config."""
    from ldrld_jax.deploy import export, predict
    from ldrld_jax.record.console import say

    paths = predict.find(args.images)
    if not export.is_exported(args.workdir):
        student, _ = export.student_of(_config(args, overrides), args.workdir)
    elif args.config or overrides:
        raise UserError(f"{args.workdir} holds an exported student, which no config changes. Leave --config out.")
    else:
        student = export.read_student(args.workdir)
    broken = []
    for path, found in predict.predict(student, paths):
        if isinstance(found, Exception):
            broken.append(f"{path} is broken or no image that is known: {found}")
        else:
            say(predict.line(path, found))
    if broken:
        raise (UserError if len(broken) == len(paths) else predict.BrokenImagesError)("; ".join(broken))


def _do(args: argparse.Namespace, config: "ConfigDict") -> None:
    from ldrld_jax import config as config_lib
    from ldrld_jax.aot import report as ahead
    from ldrld_jax.bench import step as bench
    from ldrld_jax.data import speed
    from ldrld_jax.deploy import export
    from ldrld_jax.record.console import say
    from ldrld_jax.train.check import ProblemsError
    from ldrld_jax.train.trainer import Trainer

    match args.mode:
        case "train":
            remarks = config_lib.remarks(args.config or DEFAULT_CONFIG, config)
            Trainer.of_config(config, args.workdir).fit(LEAVE_WITHIN, profile=args.profile, remarks=remarks)
        case "check":
            if problems := Trainer.of_config(config, args.workdir).check():
                say("\n".join(f"problem: {problem}" for problem in problems))
                raise ProblemsError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in this run's way, see above.")
            say("this run can start.")
        case "eval":
            for name, value in Trainer.of_config(config, args.workdir).evaluate().items():
                say(f"{name} {value:.4f}")
        case "export":
            say(str(export.export(config, args.workdir)))
        case "compile":
            ahead.report(config, args.target, args.json)
        case "bench":
            say(bench.report(config, profile=args.profile))
        case "bench_data":
            say(speed.report(config.data, batch_size=config.batch_size))


def _check_environment() -> None:
    try:
        import jax  # noqa: F401
    except ValueError as error:  # it reads its variables when it is imported
        raise UserError(f"JAX does not start: {error}. Correct or unset that variable of the environment.") from None


def _leave(code: int) -> NoReturn:
    if "ldrld_jax.runtime.hosts" in sys.modules:
        sys.modules["ldrld_jax.runtime.hosts"].exit_with(code)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    from ldrld_jax.record.console import printable

    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"ldrld_jax: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    _leave(main())
