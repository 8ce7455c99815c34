"""The notebooks: stored without outputs, alike in how they begin, and run from top to bottom at a small size."""

import importlib.util
import json
import os
import pathlib
import re
import runpy
import sys
import types
from typing import Any

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ["the_loss", "distil_on_colab", "text_classifier", "your_own_loop", "pytorch_teacher", "language_model"]
# They compile longer than they compute, and are tested without most optimisations.
QUICK = {"the_loss", "text_classifier", "your_own_loop", "language_model"}
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def needed(module: str, extra: str = "notebooks") -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there: pip install -e '.[test,{extra}]'")


def run(name: str, results: str, tmp_path: pathlib.Path) -> dict[str, Any]:
    """Runs a notebook in a kernel of its own, then gives the value of an expression there."""
    for module in ("nbclient", "ipykernel", "matplotlib"):
        needed(module)
    import nbclient
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"print(json.dumps({results}))"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import json"))
    here = {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    small = {
        "LDRLD_JAX_NOTEBOOK_SMALL": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(name in QUICK)),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1" if name in QUICK else "",
    }
    env = {**os.environ, **here, **small}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)  # raises at a cell's error
    printed = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert not any("installing" in text for text in printed)
    return json.loads(printed[-1])


def test_there_is_no_other_notebook():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_counts_are_not_stored(name):
    for cell in code_cells(name):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert "execution" not in cell["metadata"]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_valid_notebook(name):
    needed("nbformat")
    import nbformat

    nbformat.validate(nbformat.from_dict(read(name)))


@pytest.mark.parametrize("name", NAMES)
def test_all_begin_with_one_set_up_that_differs_in_its_extras(name):
    def parts(name):
        return re.fullmatch(r'(.*\nEXTRAS = )"([a-z,]+)"(.*)', "".join(code_cells(name)[0]["source"]), re.DOTALL)

    before, extras, after = parts(name).groups()
    assert (before, after) == parts("the_loss").group(1, 3)
    assert extras == ("notebooks,torch" if name == "pytorch_teacher" else "notebooks")


@pytest.fixture(scope="module")
def badges():
    """experiments/notebooks/badges.py."""
    return types.SimpleNamespace(**runpy.run_path(str(FOLDER / "badges.py")))


@pytest.mark.parametrize("name", NAMES)
def test_the_badge_and_the_install_line_take_the_repository_of_pyproject(badges, name):
    """A fork changes one line there, and `badges.py` the rest; no other address stands in a notebook."""
    link = (
        f"(https://colab.research.google.com/github/{badges.repository()}/blob/main/experiments/notebooks/{name}.ipynb)"
    )
    readme, text = ((FOLDER / file).read_text() for file in ("README.md", f"{name}.ipynb"))
    assert read(name)["cells"][0]["source"][2] == f"{BADGE}{link}\n"
    assert readme.count(link) == 1
    assert f'SOURCE = "git+https://github.com/{badges.repository()}"' in "".join(code_cells(name)[0]["source"])
    forked = badges.addressed(text, "me/my.fork")
    assert (forked.count("me/my.fork"), forked.count(badges.repository())) == (2, 0)
    assert badges.addressed(forked, badges.repository()) == text


@pytest.fixture
def set_up(monkeypatch):
    """Runs the set-up with other versions installed; gives its names, and what it had pip install."""
    needed("IPython")
    from IPython.core.inputtransformer2 import TransformerManager

    code = TransformerManager().transform_cell("".join(code_cells("the_loss")[0]["source"]))

    def run(before: dict[str, str | None], after: dict[str, str | None], source: str = "ldrld_jax"):
        from importlib import metadata

        version, asked, versions = metadata.version, [], dict(before)

        def faked(name):
            if name not in versions:
                return version(name)
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        def magic(name, line):
            asked.append(f"%{name} {line}")
            versions.update(after)

        monkeypatch.setattr(metadata, "version", faked)
        scope: dict[str, Any] = {"get_ipython": lambda: types.SimpleNamespace(run_line_magic=magic)}
        scope["__builtins__"] = __builtins__
        exec(re.sub('SOURCE = ".*?"', f"SOURCE = {source!r}", code), scope)
        return scope, [re.sub(r"\{(\w+)\}", lambda match: scope[match[1]], line) for line in asked]

    return run


def test_the_set_up_installs_nothing_where_all_is_in_range(set_up):
    assert set_up({}, {})[1] == []


@pytest.mark.parametrize("jax_version", [None, "0.7.2", "99.0"])
def test_a_jax_out_of_range_is_replaced(set_up, monkeypatch, jax_version):
    for name in ("jax", "jaxlib", "flax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    scope, asked = set_up({"jax": jax_version}, {"jax": "0.12.0"})
    assert asked == ['%pip install -q "ldrld_jax[notebooks]"']
    assert scope["unmet"]() == []


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("dist/ldrld_jax-0.1.0-py3-none-any.whl", "dist/ldrld_jax-0.1.0-py3-none-any.whl[notebooks]"),
        ("git+https://example.org/x", "ldrld_jax[notebooks] @ git+https://example.org/x"),
    ],
)
def test_the_package_may_be_a_wheel_or_a_repository(set_up, source, asked):
    assert set_up({"ldrld_jax": None}, {"ldrld_jax": "0.1.0"}, source)[1] == [f'%pip install -q "{asked}"']


def test_a_jax_replaced_under_a_running_kernel_asks_for_a_restart(set_up):
    import jax  # noqa: F401

    with pytest.raises(SystemExit, match="Restart the kernel and run this again: jax was in use, and was replaced"):
        set_up({"jax": "0.7.2"}, {"jax": "0.12.99"})


def test_nothing_is_installed_from_an_address_that_nobody_has_set(set_up):
    with pytest.raises(SystemExit, match="Set SOURCE above to the repository of ldrld_jax"):
        set_up({"ldrld_jax": None}, {"ldrld_jax": "0.1.0"}, "git+https://github.com/OWNER/ldrld_jax")


def test_what_pip_does_not_bring_is_named(set_up):
    with pytest.raises(SystemExit, match="pip did not bring ldrld_jax"):
        set_up({"ldrld_jax": None}, {})


@pytest.mark.parametrize(
    ("device", "extra"), [("nvidia0", "cuda"), ("accel0", "tpu"), ("vfio/0", "tpu"), ("vfio/vfio", ""), ("tty", "")]
)
def test_the_runtime_is_told_without_jax(set_up, tmp_path, device, extra):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert set_up({}, {})[0]["accelerator"](tmp_path) == extra


def test_the_loss_by_hand_is_the_librarys(tmp_path):
    results = "[float(sum(parts.values())), float(loss), [int(swapped(z).min()) for z in ways.values()]]"
    by_hand, loss, swapped = run("the_loss", results, tmp_path)
    assert by_hand == pytest.approx(loss, rel=1e-5)
    assert swapped == [0, 0]


def test_on_colab_the_exported_student_scores_what_its_run_said(tmp_path):
    summary = 'json.loads((ROOT / "ldrld" / "summary.json").read_text())'
    top1, summary = run("distil_on_colab", f"[TOP1, {summary}]", tmp_path)
    assert top1 == pytest.approx(summary["best_top1"], abs=1e-3)
    assert top1 > 60
    assert summary["teacher_top1"] > 80


def test_one_loss_serves_four_frameworks(tmp_path):
    needed("equinox")
    needed("keras")
    falls = "{name: float(values[-1]) / float(values[0]) for name, values in losses.items()}"
    scores, falls = run("your_own_loop", f"[scores, {falls}]", tmp_path)
    assert scores.keys() == falls.keys() == {"Flax NNX", "Flax Linen", "Equinox", "Keras 3"}
    assert min(scores.values()) > 80
    assert max(falls.values()) < 0.3


def test_a_pytorch_teacher_comes_in_and_the_student_goes_back_with_equal_logits(tmp_path):
    needed("torch", extra="torch,notebooks")
    differences = "[float(apart(of_jax_teacher, of_torch_teacher)), float(apart(of_torch_student, of_jax_student))]"
    scores = "[float(top1(of_torch_teacher)), float(top1(of_torch_student)), float(top1(of_jax_student))]"
    differences, scores = run("pytorch_teacher", f"[{differences}, {scores}]", tmp_path)
    assert max(differences) < 1e-4
    assert scores[0] > 90
    assert scores[1] == scores[2] > 80


def test_a_classifier_of_texts_learns_from_its_teacher(tmp_path):
    scores, named = run("text_classifier", "[scores, [CLASSES[row.argmax()] for row in logits]]", tmp_path)
    assert scores.keys() == {"teacher", "kd"}
    assert scores["teacher"] > 70
    assert scores["kd"] > 40  # one class for all gives 24
    assert len(named) == 3


def test_a_language_model_learns_from_the_texts_and_from_its_teacher(tmp_path):
    scores = "{name: [values['ce'], values['top1']] for name, values in scores.items()}"
    scores, text = run("language_model", f"[{scores}, written(teacher.student, 'if: ', 3)]", tmp_path)
    assert scores.keys() == {"teacher", "kd"}
    assert max(ce for ce, _ in scores.values()) < 4  # guessing gives 4.85
    assert min(top1 for _, top1 in scores.values()) > 10
    assert (text[:4], len(text)) == ("if: ", 7)
