"""The files around the code: they parse, and what they name is there."""

import re

import pytest
import yaml

import ldrld_jax
from tests.conftest import ROOT

YAML = sorted(path for path in ROOT.glob(".github/**/*.yml"))
pytestmark = pytest.mark.skipif(not YAML, reason="these are files of a clone, not of an sdist")


def test_the_issue_forms_ask_with_unique_ids_for_what_a_person_can_answer():
    forms = [yaml.safe_load(path.read_text()) for path in YAML if path.parent.name == "ISSUE_TEMPLATE"]
    forms = [form for form in forms if "body" in form]
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "labels", "body"} == set(form)
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert {field["type"] for field in form["body"]} <= {"input", "textarea"}
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_workflows_test_every_python_that_is_declared_with_the_oldest_and_newest_dependencies():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert (matrix["python"], matrix["dependencies"]) == (declared, ["oldest", "newest"])
    assert {"run": ".ci/run"} in jobs["ci"]["steps"]


def test_a_release_publishes_only_what_was_tested():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    tested, uploaded = jobs["build"]["steps"][-2:]
    assert tested == {"run": ".ci/run", "env": {"DIST": "${{ github.workspace }}/dist"}}
    assert uploaded["with"]["path"] == "dist/"
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == ldrld_jax.__version__
    assert citation["preferred-citation"]["year"] == 2025
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Xu"
