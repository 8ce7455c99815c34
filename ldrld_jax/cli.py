"""The command `ldrld-jax`: the modes of `ldrld_jax.main`, sweep and report, the help, and the completion of a shell.

ldrld-jax train --config configs/cifar100.py:resnet32x4-resnet8x4 --workdir DIR --config.seed=1
"""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from ldrld_jax import completion
from ldrld_jax import main as main_lib
from ldrld_jax.completion import SHELLS
from ldrld_jax.errors import UserError, os_error, unknown
from ldrld_jax.record.console import answer


class Command(NamedTuple):
    """An entry of `COMMANDS`.

    Attributes:
      does: its line in --help.
      run: runs it with the rest of the command line, and returns the exit status.
      parser: makes the parser of its flags; None if it has none.
      keys: whether it takes config keys as flags.
    """

    does: str
    run: Callable[[Sequence[str]], int]
    parser: Callable[[], argparse.ArgumentParser] | None = None
    keys: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, or 2 if there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    try:
        if name in ("-h", "--help"):
            return _help(rest)
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        return COMMANDS[name].run(rest)
    except UserError as error:
        return main_lib.fail(str(error), 2)
    except OSError as error:
        return main_lib.fail(os_error(error), 2)


def script() -> NoReturn:
    """Runs the command line of the process, and ends the process."""
    main_lib.leave(main())


def overview() -> str:
    """Returns the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    head = "usage: ldrld-jax COMMAND [FLAG...]\n\nDistils a student from a teacher.\n\ncommands:"
    tail = "Show the flags of a command: ldrld-jax COMMAND --help\nExplain a config key: ldrld-jax help data.mean"
    return "\n".join([head, *lines, "", tail])


def _help(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"help takes one command or config key, got {' '.join(argv)}.")
    name = argv[0].removeprefix("--config.") if argv else "--help"
    if name in COMMANDS:
        parser = COMMANDS[name].parser
        answer(f"{COMMANDS[name].does}." if parser is None else parser().format_help().rstrip("\n"))
    else:
        answer(overview() if name in ("-h", "--help") else _explained(name))
    return 0


def _explained(key: str) -> str:
    from ldrld_jax.config import describe

    try:
        return describe.explain(key)
    except UserError:
        if "." in key:
            raise  # it names the keys of that block
        tops = {name.partition(".")[0] for name in describe.described()}
        raise unknown("command or config key", key, [*COMMANDS, *sorted(tops)]) from None


def _completion(argv: Sequence[str]) -> int:
    from ldrld_jax.config.describe import described

    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(f"completion takes one of {', '.join(SHELLS)}: source <(ldrld-jax completion bash).")
    words = {name: _flags(command) for name, command in COMMANDS.items()}
    words |= {"help": [*COMMANDS, *described()], "completion": [*SHELLS]}
    does = {name: command.does for name, command in COMMANDS.items()}
    answer(completion.script(argv[0], does, words, [*described()]).rstrip("\n"), verbatim=True)
    return 0


def _flags(command: Command) -> list[str]:
    """Returns the flags that the help of a command shows, and `--config.` if it takes config keys."""
    if command.parser is None:
        return []
    shown = [action for action in command.parser()._actions if action.help != argparse.SUPPRESS]
    flags = [flag for action in shown for flag in action.option_strings if flag.startswith("--")]
    return [*flags, *(["--config."] if command.keys else [])]


def _of_package(name: str, does: str, *, keys: bool = False) -> Command:
    """Returns the command of a package with a command line of its own, which this command alone imports."""
    program = f"ldrld-jax {name}"

    def package() -> Any:
        return importlib.import_module(f"ldrld_jax.{name}.__main__")

    return Command(does, lambda argv: package().main(argv, program), lambda: package().make_parser(program), keys)


def _of_mode(name: str) -> Command:
    parser = functools.partial(main_lib.make_parser, name)
    return Command(main_lib.MODES[name].does, functools.partial(main_lib.main, mode=name), parser, keys=True)


COMMANDS = {
    **{name: _of_mode(name) for name in main_lib.MODES},
    "sweep": _of_package("sweep", "Runs a grid or a list of configs, and resumes", keys=True),
    "report": _of_package("report", "Compares runs in a table and on an HTML page"),
    "help": Command("Explains a command or a config key", _help),
    "completion": Command("Prints the completion script for bash or zsh", _completion),
}


if __name__ == "__main__":
    script()
