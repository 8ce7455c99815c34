"""docs/troubleshooting.md quotes messages that the program prints, as an example of each: this file finds them all."""

import ast
import errno
import inspect
import os
import re

import pytest
from jax._src import compiler, xla_bridge

from tests.conftest import ROOT
from tests.pages import PAGES, blocks

PAGE = PAGES["docs/troubleshooting.md"]
MESSAGES = [" ".join(block.code.split()) for block in blocks(PAGE, "text")]
# Of pip, of XLA's C++ and of the operating system.
ELSEWHERE = {
    "ERROR: Package 'ldrld-jax' requires a different Python: 3.10.12 not in '<3.14,>=3.11'",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.",
    f"[Errno {errno.EMFILE}] {os.strerror(errno.EMFILE)}",
}


def patterns(source: str) -> list[re.Pattern[str]]:
    """Regular expressions of the texts in a file of Python that say something: anything may stand for a placeholder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values=values):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in values]
            case ast.Constant(value=str(text)):
                parts = [part for text in re.split("%[-.0-9]*[a-z]", text) for part in (text, None)][:-1]
            case _:
                continue
        said = "".join(filter(None, parts))
        if len(said) >= 18 and "\n" not in said:  # enough to tell it from others, and no docstring
            found.append(re.compile("".join(".*" if part is None else re.escape(part) for part in parts)))
    return found


@pytest.fixture(scope="module")
def said():
    sources = [path.read_text() for path in (ROOT / "ldrld_jax").rglob("*.py")]
    return [
        pattern
        for source in [*sources, *map(inspect.getsource, (compiler, xla_bridge))]
        for pattern in patterns(source)
    ]


def test_a_pattern_takes_the_messages_of_its_text_alone():
    (pattern,) = patterns('f"there is no {kind} {name!r}.{hint} Known: {known}."')
    assert pattern.fullmatch("there is no flag '--seed'. Known: --mode.")
    assert not pattern.fullmatch("there is a flag '--seed'. Known: --mode.")
    (logged,) = patterns('"%s: only %d steps are left"')
    assert logged.pattern == r".*:\ only\ .*\ steps\ are\ left"


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_program_prints(message, said):
    assert message in ELSEWHERE or any(pattern.fullmatch(message) for pattern in said)


def test_no_message_is_quoted_twice_and_each_has_an_answer():
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert {*MESSAGES} >= ELSEWHERE
    answers = re.split(r"```text\n.*?\n```\n", PAGE.read_text(), flags=re.DOTALL)[1:]
    assert all(len(answer.split()) >= 5 for answer in answers)
