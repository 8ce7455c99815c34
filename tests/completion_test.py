"""The completion scripts, in the shells that source them."""

import shutil
import subprocess

import pytest

from ldrld_jax import cli
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.identity import flat

ZSH = r"""
compdef() { print "compdef $@" }
compadd() { while [[ $1 != -- ]]; do shift; done; shift; print -rl -- ${(M)@:#$PREFIX*} }
_describe() { print -rl -- ${(M)${(P)2}:#$PREFIX*} }
_files() { print "files" }
source <(print -r -- "$SCRIPT")
words=(ldrld-jax "$@"); CURRENT=$#words; PREFIX=$words[-1]
_ldrld_jax
"""
BASH = r"""
source <(printf '%s' "$SCRIPT")
complete -p ldrld-jax
COMP_WORDS=(ldrld-jax "$@") COMP_CWORD=$#
_ldrld_jax
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def complete():
    """`complete(shell, *words)`: how the shell completes the last word of a command line."""
    scripts = {}

    def ask(shell, *words, capsys):
        path = shutil.which(shell)
        if path is None:
            pytest.skip(f"there is no {shell} here")
        if shell not in scripts:
            assert cli.main(["completion", shell]) == 0
            scripts[shell] = capsys.readouterr().out
        program = [path, *(["-f"] if shell == "zsh" else ["--norc"]), "-c", {"bash": BASH, "zsh": ZSH}[shell], shell]
        done = subprocess.run([*program, *words], capture_output=True, text=True, env={"SCRIPT": scripts[shell]})
        assert (done.returncode, done.stderr) == (0, "")
        registered, *found = done.stdout.splitlines()
        expected = {"bash": "complete -o default -F _ldrld_jax ldrld-jax", "zsh": "compdef _ldrld_jax ldrld-jax"}
        assert registered == expected[shell]
        return found

    return ask


MEANS = ["--config.data.max_skipped=", "--config.data.mean=", "--config.data.mixup="]
# the words, the completions of the last one; None for names of files
CASES = {
    "a command": (["be"], ["bench", "bench_data"]),
    "flags": (["predict", "--"], ["--help", *main_lib.flags_of("predict"), "--config."]),
    "a flag after others": (["predict", "--workdir", "x", "--to"], ["--top_k"]),
    "flags of the sweep": (["sweep", "--gr"], ["--grid"]),
    "flags of the report": (["report", "--"], ["--help", "--out", "--analyse", "--watch", "--data_dir"]),
    "where keys begin": (["train", "--config"], ["--config", "--config."]),
    "keys": (["train", "--config.data.m"], MEANS),
    "keys of the sweep": (["sweep", "--config.data.m"], MEANS),
    "no keys of the report": (["report", "--config.data.m"], []),
    "a key to explain": (["help", "data.me"], ["data.mean"]),
    "a shell": (["completion", ""], ["bash", "zsh"]),
    "a file": (["predict", "sc"], None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_flags_and_keys(shell, case, complete, capsys):
    words, expected = CASES[case]
    found = [word.partition(":")[0] for word in complete(shell, *words, capsys=capsys) if word]
    assert found == (expected if expected is not None else {"bash": [], "zsh": ["files"]}[shell])


def test_every_config_key_is_completed(complete, capsys):
    found = complete("bash", "train", "--config.", capsys=capsys)
    assert {word.removeprefix("--config.").rstrip("=") for word in found} == set(flat(config_lib.default().to_dict()))
