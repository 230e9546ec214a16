"""The page is one file, whole, the same for the same inputs, and says everything the table holds."""

import re

import pytest

from attnlens.report.cells import read_cells
from attnlens.report.columns import COLUMNS
from attnlens.report.figures import figures
from attnlens.report.page import number, render
from attnlens.report.table import join
from tests.report.synthetic import DATA, METHODS, methods

# Addresses inside Vega's own code: names of XML and JSON schemas, and texts of warnings. None is fetched.
NAMES = ("http://www.w3.org/", "https://vega.github.io/", "https://github.com/vega/")


def test_equal_inputs_give_equal_bytes(root, page):
    cells = read_cells(root)
    rows = join(cells)
    assert render(cells, rows, methods(), figures(cells, rows)) == page


def test_nothing_points_outside(page):
    addresses = re.findall(r"https?://[^\"'\s)<]+", page)
    assert [address for address in addresses if not address.startswith(NAMES)] == []
    assert "default-src 'none'" in page
    assert (
        re.findall(
            r"<(?:script|img|iframe)[^>]*\ssrc=|<link[^>]*href=\"(?!data:)|@import|url\(", page.split("<script>")[0]
        )
        == []
    )


def test_no_path_of_this_machine_and_no_time(page, root):
    assert str(root) not in page
    assert "/work" not in page
    assert "/home" not in page


def test_every_row_and_every_column_is_in_the_table(page, rows):
    table = page[page.index('<table id="joined">') : page.index("</table>", page.index('<table id="joined">'))]
    assert table.count("<tr data-family=") == len(rows)
    assert re.findall(r'data-column="([^"]+)"', table) == [column.name for column in COLUMNS]
    first = table[table.index("<tr data-family=") :]
    assert first[: first.index("</tr>")].count("<t") == len(COLUMNS) + 1


def test_missing_values_say_why(page):
    assert "smyrf is not causal and shakespeare is predicted token by token" in page
    for cell in re.findall(r"<td[^>]*missing[^>]*>–</td>", page):
        assert "title=" in cell


def test_headers_have_scope_and_figures_captions(page):
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert [head for head in re.findall(r"<th[ >][^>]*", markup) if "scope=" not in head] == []
    assert markup.count("<figure ") == markup.count("<figcaption ") == 8
    assert markup.count("<table") == markup.count("<caption")


def test_names_and_texts_are_escaped(page):
    assert "What softmax does &lt;in one sentence&gt; &amp; nothing else." in page


def test_methods_data_and_axes_are_listed(page):
    for name in METHODS:
        assert f'<th scope="row">{name}</th>' in page
    for name in DATA:
        assert f"{len(name):064x}" in page
    assert "budgets: [0.0625, 0.125, 0.25, 0.5]" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.2, "1.20"),
        (3.0, "3"),
        (123.4, "123"),
        (66560.0, "66,560"),
        (3.1e-7, "3.1e-07"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
