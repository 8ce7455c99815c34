"""The code in the pages: what stands between fences, and the commands in it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "experiments").rglob("*.md")),
    )
}
SHELL = ("", "bash", "sh")
_OURS = r"(?:python -m ldrld_jax|ldrld-jax )"
_STAND_INS = {"COMMAND": "eval", "KEY": "seed", "IMAGE...": "image.png", "DIR...": "runs", "NOTEBOOK": "a.ipynb"}


class Block(NamedTuple):
    """Code between fences: where it begins, in which language, and itself."""

    line: int
    language: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, of some languages or of all; "" is that of a fence that names none."""
    text = page.read_text()
    fences = re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    found = [Block(text.count("\n", 0, fence.start(3)) + 1, fence[2].strip(), fence[3]) for fence in fences]
    return [block for block in found if not languages or block.language in languages]


def quoted(page: Path) -> Iterator[list[str]]:
    """The commands in a page's sentences, with words for their placeholders, and ours in its blocks of `text`."""
    prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"(?<!`)`((?:python|ldrld-jax|pip|--mode|tfds|jupyter|hf)\s[^`]+)`", prose)
    found = [*spans, *re.findall(rf"^(?:source <\()?({_OURS}[^>)\n]*)", _text(page), re.MULTILINE)]
    for span in found:
        for command in commands(" ".join(span.split())):
            yield [_STAND_INS.get(word, word) for word in command]


def _text(page: Path) -> str:
    return "\n".join(block.code for block in blocks(page, "text"))


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block: a loop's once for each value, without comments and line ends."""
    code = re.sub(r"(^|\s)#.*$", r"\1", code.replace("\\\n", " "), flags=re.MULTILINE)
    code = re.sub(r"for (\w+) in ([^;\n]+)[;\n]\s*do\b(.*?)\bdone\b", _unrolled, code, flags=re.DOTALL)
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    command: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set(";&|\n"):
            command.append(token)
        elif command:
            yield _without_variables(command)
            command = []


def _unrolled(loop: re.Match) -> str:
    return "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())


def _without_variables(command: list[str]) -> list[str]:
    while re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command
