"""The public API stands in golden/public_api.txt: a change of it is seen here before its users see it.

`python -m tests.api_test` writes that file anew.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

import ldrld_jax
from ldrld_jax import cli, losses
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib

GOLDEN = pathlib.Path(__file__).parent / "golden" / "public_api.txt"
ON_PURPOSE = """The public API is not what tests/golden/public_api.txt says:

{difference}

Changed on purpose? Run `python -m tests.api_test` and add a line to CHANGELOG.md under Unreleased. What is removed or
renamed, takes other arguments or does something else by default breaks those who use it: the next version is then a
new major one (before 1.0 a new minor one). What is only added makes it a new minor one."""


def public_api() -> Iterator[str]:
    """A line for each thing that others write against, the same on every version of Python and JAX."""
    for module in (ldrld_jax, losses):
        for name in sorted(module.__all__):
            yield f"{module.__name__}.{name}{_described(getattr(module, name))}"
    yield f"ldrld_jax.losses.Method.loss{_described(losses.Method.loss)}"
    for name, method in sorted(_ours(ldrld_jax.METHODS, lambda method: method.config)):
        yield f"METHODS[{name!r}].config: {method.config.__name__}"
    yield from (f"MODELS[{name!r}]" for name, _ in sorted(_ours(ldrld_jax.MODELS, _class)))
    yield from (f"--mode {mode}" for mode in main_lib.MODES)
    yield from (f"ldrld-jax {command}" for command in cli.COMMANDS)
    yield from sorted(set(re.findall(r"--[a-z][\w-]*", _help())))
    for key, (kind, value) in sorted(_keys(config_lib.default())):
        if not key.startswith(("loss.", "loss_weight.", "teacher.data.", "teacher.optim.")):  # made of the others
            yield f"--config.{key}: {kind.__name__} = {value!r}"


def _described(thing: Any) -> str:
    """Fields of a dataclass or named tuple, parameters of anything else that is called; without annotations."""
    if isinstance(thing, dict):
        return ": dict"
    if dataclasses.is_dataclass(thing):
        return f"({', '.join(map(_field, dataclasses.fields(thing)))})"
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f": {thing.__base__.__name__}"
    parameters = inspect.signature(thing).parameters.values()
    plain = [p.replace(annotation=p.empty, default=_plain(p.default)) for p in parameters]
    return str(inspect.Signature(plain))


def _field(field: dataclasses.Field) -> str:
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={_plain(field.default)!r}"


def _plain(value: Any) -> Any:
    """A value that reads alike everywhere: what is none of Python's own becomes `...`."""
    known = value is None or value is inspect.Parameter.empty or isinstance(value, bool | int | float | str | tuple)
    return value if known else ...


def _ours(table: dict[str, Any], of: Any) -> list[tuple[str, Any]]:
    """Leaves out what other tests have entered."""
    return [(name, entry) for name, entry in table.items() if of(entry).__module__.startswith("ldrld_jax.")]


def _class(model: Any) -> Any:
    return getattr(model, "func", model)


def _keys(block: Any, prefix: str = "") -> Iterator[tuple[str, tuple[type, Any]]]:
    for name in block:
        if hasattr(block[name], "get_type"):
            yield from _keys(block[name], f"{prefix}{name}.")
        else:
            yield prefix + name, (block.get_type(name), block[name])


def _help() -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main_lib.parse(["--help"])
    return text.getvalue()


def test_the_public_api_changes_only_on_purpose():
    before, now = GOLDEN.read_text().splitlines(), list(public_api())
    difference = [line for line in difflib.ndiff(before, now) if line.startswith(("+ ", "- "))]
    if difference:
        pytest.fail(ON_PURPOSE.format(difference="\n".join(difference)), pytrace=False)


def test_the_version_and_what_is_not_released_stand_in_the_changelog():
    changelog = (GOLDEN.parents[2] / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = [heading.split(" - ") for heading in headings[1:]]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) and date for version, date in released)
    assert re.fullmatch(r"\d+\.\d+\.\d+", ldrld_jax.__version__)
    assert [version for version, _ in released[:1]] in ([], [ldrld_jax.__version__])


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{line}\n" for line in public_api()))
