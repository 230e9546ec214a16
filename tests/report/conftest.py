"""One synthetic study and its report, built once a worker."""

import pytest

from attnlens.report.build import build_report
from attnlens.report.cells import read_cells
from attnlens.report.table import join
from tests.report.synthetic import methods, write_study


@pytest.fixture
def study(tmp_path):
    """A fresh study that a test may spoil."""
    write_study(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A study and its report; not to be changed."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder)
    build_report(folder, read_cells(folder), methods())
    return folder


@pytest.fixture(scope="session")
def cells(root):
    return read_cells(root)


@pytest.fixture(scope="session")
def rows(cells):
    return join(cells)


@pytest.fixture(scope="session")
def page(root):
    return (root / "report/index.html").read_text(encoding="utf-8")
