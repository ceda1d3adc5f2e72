"""The pages hold what docs/figures.py writes, and a letter means on every page what the glossary says."""

import re
import runpy
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import figures  # noqa: E402
import side_by_side  # noqa: E402

PAGES = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in ("README", "glossary")]
GENERAL = side_by_side.symbols("glossary")


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.stem)
def test_a_page_is_what_its_records_say(page):
    text = page.read_text()
    assert figures.filled(text, page.stem) == text, "run python docs/figures.py"
    assert text.count("<!-- end -->") == len(figures.MARKER.findall(text))


def test_every_record_and_every_figure_is_used():
    used = {name for page in figures.pages() for _, name, *_ in figures.MARKER.findall(page.read_text())}
    assert used == {figure.__name__ for figure in figures.FIGURES}


def test_a_marker_that_nothing_writes_is_an_error():
    with pytest.raises(ValueError, match="nothing_such"):
        figures.filled("<!-- nothing_such: 1 -->2<!-- end -->", "page")


def test_a_marker_may_be_broken_over_two_lines():
    whole, broken = "<!-- lines: lora.py -->1<!-- end -->", "<!-- lines:\nlora.py\n-->1<!-- end -->"
    assert figures.filled(broken, "page").split() == figures.filled(whole, "page").split()
    assert "-->1<!--" not in figures.filled(broken, "page")


def test_a_number_between_markers_is_replaced_and_what_stands_around_it_is_kept():
    text = "before <!-- mistakes -->1<!-- end --> after <!-- lines: common.py -->2<!-- end -->"
    found = re.findall(r"(\w+ )?<!-- [^>]*? -->(\d+)<!-- end -->", figures.filled(text, "page"))
    lines = len((ROOT / "common.py").read_text().splitlines())
    assert found == [("before ", figures.mistakes("page")), ("after ", str(lines))]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


# ------------------------------------------------------------------------------ symbols


@pytest.mark.parametrize("page", PAGES)
def test_a_symbol_means_on_its_page_what_the_glossary_says(page):
    """Apart from lora.md, where A, B, r and x are those of the LoRA paper, as it says itself."""
    general = {row[0]: row for row in GENERAL}
    own = side_by_side.symbols(page)
    assert len({row[0] for row in own}) == len(own)
    if page != "lora":
        for row in own:
            same = general.get(row[0], row)
            assert row == same or (page, row[0]) == ("reinforce", "$`\\theta`$"), row


@pytest.mark.parametrize("page", [page for page in PAGES if page in side_by_side.SCRIPTS])
def test_the_letters_of_the_formulas_have_a_row(page):
    """Every variable of a block with a number: a letter of the page's own table, or an index."""
    pytest.importorskip("latex2mathml")
    known = side_by_side.Page(page).by_letter
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for block in re.findall(r"```math\n(.*?)```", text, re.S):
        if "\\tag" in block:
            formula = side_by_side.mathml(block.partition("\\tag")[0], True)
            letters = set(re.findall(side_by_side.LETTER, formula))
            others = {f"<mi>{sign}</mi>" for sign in (*"tij", "&#x000B1;", "&#x0223C;")}  # ± and ~
            assert letters <= known.keys() | others, block


# ------------------------------------------------------------------------------ reinforce.py


def test_reinforce_reaches_the_optimum_as_the_page_says(capsys):
    """The distances shrink, and the last one is about 0; other versions of torch may draw others."""
    runpy.run_path(str(ROOT / "docs" / "reinforce.py"))
    printed = capsys.readouterr().out.splitlines()
    for lines in (printed, figures.record("reinforce")["lines"]):
        distances = [float(line.split("KL(pi, pi*)")[1].split()[0]) for line in lines]
        assert len(distances) == 6 and distances == sorted(distances, reverse=True)
        assert distances[0] > 0.1 and distances[-1] < 1e-5
