"""Writes the repository's address of pyproject.toml into the notebooks: the links of the badges, and `SOURCE`.

python experiments/notebooks/badges.py
"""

import pathlib
import re
import tomllib

FOLDER = pathlib.Path(__file__).parent
PLACES = r"(colab\.research\.google\.com/github/|git\+https://github\.com/)[\w.-]+/[\w.-]+"


def repository() -> str:
    """Returns OWNER/NAME of `project.urls.Repository` in pyproject.toml."""
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def addressed(text: str, name: str) -> str:
    """Returns the text of a notebook or of the README with the repository `name`, OWNER/NAME, in every place.

    Example:
      >>> addressed('SOURCE = "git+https://github.com/me/fork"', "you/theirs")
      'SOURCE = "git+https://github.com/you/theirs"'
    """
    return re.sub(PLACES, rf"\g<1>{name}", text)


if __name__ == "__main__":
    for path in [FOLDER / "README.md", *FOLDER.glob("*.ipynb")]:
        path.write_text(addressed(path.read_text(), repository()))
