"""The pages: code that runs, commands that their programs understand, keys that exist, a site without a warning."""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import runpy
import sys
import tomllib
import warnings

import pytest

import ldrld_jax
from ldrld_jax import cli, losses
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.code import is_code, load_object
from ldrld_jax.config import describe
from ldrld_jax.identity import flat
from ldrld_jax.losses import METHODS
from ldrld_jax.models import MODELS
from ldrld_jax.sweep import __main__ as sweep_lib
from tests.conftest import ROOT
from tests.pages import PAGES, SHELL, blocks, commands, quoted
from tests.train.methods_test import methods_restored

PYTHON = [name for name, page in PAGES.items() if blocks(page, "python")]
PYTHON.remove("docs/deploy.md")  # it takes an exported student: tests/deploy/export_test.py runs it
COMMANDS = [name for name, page in PAGES.items() if blocks(page, *SHELL)]
# Programs that no test starts from a page, with the reason, which a reader finds there too.
NOT_RUN = dict(re.findall(r"^\| `([\w./ -]+)` \| (.+) \|$", PAGES["docs/tests.md"].read_text(), re.MULTILINE))
OF_REPOSITORY = re.compile(r"(?:benchmarks|configs|docs|experiments|tests)/[^:]+")
FILES = (".json", ".py", ".npz", ".safetensors", ".stablehlo")
KEYS = set(flat(config_lib.default().to_dict()))


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    """Runs the blocks in order in one scope; a block that defines a config is also read as a config file."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "page"}
    with methods_restored():
        for block in blocks(PAGES[name], "python"):
            if "torch" in block.code and importlib.util.find_spec("torch") is None:
                continue  # an extra
            exec(compile(block.code, f"{name}:{block.line}", "exec"), scope)
            if "def get_config" in block.code:
                (tmp_path / "mine.py").write_text(block.code)
                config_lib.resolve(config_lib.load("mine.py", ["teacher.model=resnet8", "teacher.epochs=1"]))
    if name == "README.md":
        assert float(scope["loss"]) == 0  # both sides' logits are equal classes
        assert scope["gradient"].shape == (8, 100)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_of_a_page_are_understood_by_their_programs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(PAGES[name], *SHELL):
        for command in commands(block.code):
            with _named(f"{name}:{block.line}: {' '.join(command)}"):
                _check(command, monkeypatch)


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_in_a_pages_sentences_are_understood_by_their_programs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in quoted(PAGES[name]):
        with _named(f"{name}: {' '.join(command)}"):
            match command:
                case ["--mode", mode]:
                    assert mode in main_lib.MODES
                case ["--mode", *_]:
                    _check_main(command)
                case ["ldrld-jax", program]:
                    assert program in cli.COMMANDS or program == "--help"
                case ["python", "-m", "ldrld_jax.sweep" | "ldrld_jax.report"]:
                    pass  # the program is named, and not how it is called
                case _:
                    _check(command, monkeypatch)


def test_every_command_of_ours_has_a_line_in_the_pages_that_is_understood():
    """And every reason why a program is not run is that of a program in some page."""
    found = [command for page in PAGES.values() for block in blocks(page, *SHELL) for command in commands(block.code)]
    assert {command[1] for command in found if command[0] == "ldrld-jax"} >= {*cli.COMMANDS}
    found += [command for page in PAGES.values() for command in quoted(page)]
    assert {*NOT_RUN} <= {" ".join(command[:words]) for command in found for words in (1, 3)}


@pytest.mark.parametrize(
    "path",
    [path for folder in ("configs", "experiments", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))],
    ids=lambda path: path.name,
)
def test_the_commands_of_a_docstring_are_understood_by_their_programs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", " ")
    found = [line for line in text.splitlines() if line.startswith("python ")]
    assert found or path.name in {"torch_step.py", "torch_parts.py"}  # parts of other programs
    for command in commands("\n".join(found)):
        with _named(f"{path.name}: {' '.join(command)}"):
            _check(command, monkeypatch)


@contextlib.contextmanager
def _named(where):
    try:
        yield
    except (Exception, SystemExit) as error:
        pytest.fail(f"{where}\n{type(error).__name__}: {error}")


def _check(command, monkeypatch):
    """Runs a command if it is quick, or parses it and loads the config that it asks for; fails at any other."""
    values = [word.partition("=")[2] if word.startswith("-") and "=" in word else word for word in command]
    assert all((ROOT / path[0]).exists() for path in map(OF_REPOSITORY.match, values) if path)
    match command:
        case ["python", "-m", "ldrld_jax.main", "--help"] | ["ldrld-jax", _, "--help"]:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main([*command[1:2], "--help"]) if command[0] == "ldrld-jax" else main_lib.parse(["--help"])
        case ["python", "-m", "ldrld_jax.main", *flags]:
            _check_main(flags)
        case ["ldrld-jax", mode, *flags] if mode in main_lib.MODES:
            _check_main(flags, mode)
        case ["ldrld-jax", "sweep", *flags] | ["python", "-m", "ldrld_jax.sweep", *flags]:
            assert _runs(*flags)
        case ["ldrld-jax", "report", *flags]:
            _check_program("ldrld_jax/report/__main__.py", flags, monkeypatch)
        case ["ldrld-jax", *words]:
            assert cli.main(words) == 0
        case ["python", "-c", code] | ["python", "-X", "importtime", "-c", code]:
            compile(code, "-c", "exec")
        case ["python", "-m", "pytest", *flags]:
            assert all((ROOT / flag).exists() for flag in flags if "/" in flag)
        case ["python", "-m", "venv" | "sphinx" as module, *_]:
            assert f"python -m {module}" in NOT_RUN
        case ["python", "-m", module, *flags]:
            path = module.replace(".", "/")
            program = f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"
            _check_program(program, flags, monkeypatch)
        case ["python", program, *flags]:
            _check_program(program, flags, monkeypatch)
        case ["bash", script, *_]:
            assert (ROOT / script).exists()
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = [name for part in what for name in re.findall(r"(?:\.|ldrld_jax)\[(.*)\]", part)]
            assert {extra for name in named for extra in name.split(",")} <= set(extras)
        case [program, *_]:
            assert program in NOT_RUN, "no program of ours, and docs/tests.md gives no reason why no test runs it"


@functools.cache  # a page and a docstring show the same sweeps, of up to 78 runs
def _runs(*flags):
    return len(sweep_lib.jobs_of(*sweep_lib.parse(flags)))


def _check_main(flags, mode=None):
    args, overrides = main_lib.parse(flags, mode)
    config = config_lib.resolve(config_lib.load(args.config or main_lib.DEFAULT_CONFIG, overrides))
    teachers = config_lib.teacher_models(config) if config_lib.method_names(config) else []
    named = {config.student.model, *teachers} - {*MODELS, "ema"}
    assert all(is_code(name) and callable(load_object(name)) for name in named)


class Parsed(Exception):
    """Raised where a program has understood its flags, before it does anything."""


def _check_program(program, flags, monkeypatch):
    """Starts a program of ours and stops it as soon as it has parsed its flags."""
    if "argparse" not in (ROOT / program).read_text():
        assert not [flag for flag in flags if flag.startswith("-")]
        return
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None):
        _, unknown = parse(parser, args, namespace)
        assert not unknown
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", [program, *flags])
        patch.syspath_prepend((ROOT / program).parent)
        runpy.run_path(str(ROOT / program), run_name="__main__")


@pytest.mark.parametrize("name", PAGES)
def test_every_fence_of_a_page_is_executed_parsed_or_output(name):
    languages = {block.language for block in blocks(PAGES[name])}
    assert {language for language in languages if not language.startswith("{")} <= {"python", "text", *SHELL}


@pytest.mark.parametrize("name", PAGES)
def test_every_config_key_that_a_page_names_exists(name):
    text = PAGES[name].read_text()
    flags = re.findall(r"--config\.([a-z][\w.]*)", text)
    tops = "|".join({key.partition(".")[0] for key in KEYS if "." in key})
    quoted = re.findall(rf"`((?:{tops})\.[a-z_\d.]+)(?:=[^`]*)?`", text)
    assert {key for key in [*flags, *quoted] if not key.endswith(FILES)} <= KEYS


@pytest.mark.parametrize("name", PAGES)
def test_no_line_of_a_page_but_a_tables_is_longer_than_120_columns(name):
    lines = PAGES[name].read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.fixture(scope="module")
def generated():
    """docs/generated.py."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_marker_of_a_page_is_filled(generated):
    markers = {name for page in PAGES.values() for name in re.findall(r"<!-- generated: (\w+) -->", page.read_text())}
    assert markers == {make.__name__ for make in generated.MADE}


def test_the_page_of_all_keys_is_what_the_code_says(generated):
    assert generated.KEYS.read_text() == generated.keys(), "run `python docs/generated.py`"
    listed = re.findall(r"^\| `([a-z][\w.]*)` \|", generated.KEYS.read_text(), re.MULTILINE)
    assert (set(listed), len(listed)) == (KEYS, len(KEYS))


def test_every_config_key_has_a_comment():
    comments = dict(describe.comments())
    of_blocks = ("loss.", "loss_weight.", "teacher.data.", "teacher.optim.")  # described with their block
    assert not [key for key in KEYS if not key.startswith(of_blocks) and not comments[key]]


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_a_methods_config_is_described(name):
    config = METHODS[name].config
    assert set(describe.attributes(config)) == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("module", [ldrld_jax, losses], ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring_of_its_own(module):
    """But for the two tables, which docs/api.md describes; a dataclass that has none gets its signature for one."""
    things = {name: getattr(module, name) for name in module.__all__ if name not in ("METHODS", "MODELS")}
    assert not [name for name, thing in things.items() if not thing.__doc__ or thing.__doc__.startswith(f"{name}(")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: its folder, the names that it documents, what the build complained of."""
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[docs]'")
    from sphinx.application import Sphinx

    out, complaints, path = tmp_path_factory.mktemp("site"), io.StringIO(), list(sys.path)
    with warnings.catch_warnings(action="ignore"):  # of Sphinx and its parts about one another
        app = Sphinx(
            ROOT / "docs", ROOT / "docs", out, out / "doctrees", "html", status=None, warning=complaints, freshenv=True
        )
        app.build()
    sys.path[:] = path
    return out, set(app.env.domains.python_domain.objects), complaints.getvalue()


def test_the_site_builds_without_a_warning(site):
    """A page that is in no table of contents, a link that leads nowhere, a docstring that is no reST: each warns."""
    assert site[2] == ""


def test_the_site_documents_every_public_name(site):
    _, documented, _ = site
    assert {f"ldrld_jax.{name}" for name in ldrld_jax.__all__} <= documented
    rest = set(losses.__all__) - set(ldrld_jax.__all__)
    assert {f"ldrld_jax.losses.{name}" for name in rest} <= documented


def test_the_site_fetches_nothing_from_elsewhere(site):
    pages = list(site[0].rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    loads = r"""<(?:script|img|iframe)[^>]*src=["']https?:|<link[^>]*href=["']https?:"""
    assert not [page.name for page in pages if re.search(loads, page.read_text())]


def test_what_is_made_from_the_code_stands_in_the_site(site):
    keys = (site[0] / "keys.html").read_text()
    assert all(f">{key}<" in re.sub(r"</?span[^>]*>", "", keys) for key in ("optim.warmup", "loss.ldrld.depth"))
    assert "Explain a key: ldrld-jax help optim.learning_rate" in (site[0] / "command_line.html").read_text()
