"""Image folders of the tests of this folder."""

import pytest

from tests.data.images import make_image_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    make_image_folder(path, ("ant", "bee", "cat"), each=4)
    return path
