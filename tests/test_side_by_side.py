"""The side-by-side pages, in a real browser. Skipped without latex2mathml, playwright or Chromium."""

import re
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import side_by_side  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TAGGED = [name for name in side_by_side.SCRIPTS if name != "reinforce"]  # that has no numbers
SCRIPTS = pytest.mark.parametrize("name", TAGGED)


def test_links_into_scripts_carry_the_line_of_the_function():
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        assert side_by_side.with_lines(text) == text, f"run docs/side_by_side.py --links: {page}"


def test_a_link_gets_its_line_and_loses_a_wrong_one():
    first = side_by_side.functions("ppo")["gae"][0]
    for old in ("", "#L1", "#L99999"):
        text = side_by_side.with_lines(f"see [`ppo.gae`](../ppo.py{old}) and [`x`](../ppo.py{old})")
        assert text == f"see [`ppo.gae`](../ppo.py#L{first}) and [`x`](../ppo.py)"


# ------------------------------------------------------------------------------ in the browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("latex2mathml")
    out = tmp_path_factory.mktemp("site")
    side_by_side.build(out)
    return out


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """A function that opens a page; afterwards nothing may have failed or been asked elsewhere."""
    trouble, opened = [], []

    def visit(name, width=1400, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(page)
        page.on("console", lambda m: trouble.append(m.text))
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("request", lambda r: trouble.append(r.url) if not r.url.startswith(
            ("data:", (site / f"{name}.html").as_uri())) else None)
        page.goto((site / f"{name}.html").as_uri())
        return page

    yield visit
    for page in opened:
        page.close()
    assert trouble == []


def tags_of(name):
    """The tags in a script's docstring."""
    text = (ROOT / f"{name}.py").read_text()
    return set(side_by_side.TAG.findall(text.split('"""')[1]))


@SCRIPTS
def test_every_equation_has_both_ends_and_a_click_arrives_at_the_other(name, visit):
    page = visit(name)
    formulas = page.eval_on_selector_all("#page .eq[id]", "all => all.map(e => e.id.slice(3))")
    assert set(formulas) == tags_of(name) and len(formulas) == len(set(formulas))
    for tag in formulas:
        page.click(f'[id="eq-{tag}"] .tag')
        line = page.inner_text("#code .hit")
        assert f"({tag})" in line and "#" in line, (tag, line)
        box = page.locator("#code .hit").bounding_box()
        assert 0 <= box["y"] <= 900
        page.click("#code .hit .tag >> text=(" + tag + ")")
        assert page.get_attribute("#page .hit", "id") == f"eq-{tag}"
        box = page.locator("#page .hit").bounding_box()
        assert 0 <= box["y"] <= 900


@SCRIPTS
def test_keys_go_from_equation_to_equation(name, visit):
    page = visit(name)
    seen = []
    for key in "nnp":
        page.keyboard.press(key)
        seen.append(page.get_attribute("#page .hit", "id"))
    assert seen[0] == seen[2] != seen[1]
    assert page.locator("#code .hit").count() == 1


@pytest.mark.parametrize("name", ["index", *side_by_side.SCRIPTS])
def test_every_formula_is_mathml(name, visit):
    page = visit(name)
    text = (ROOT / "docs" / f"{'README' if name == 'index' else name}.md").read_text()
    inside = len(re.findall(r"\$`.*?`\$", re.sub(r"```math.*?```", "", text, flags=re.S), flags=re.S))
    assert page.locator("#page math").count() == inside + text.count("```math")
    assert "$`" not in page.inner_text("#page")
    left = page.eval_on_selector_all("#page math", "all => all.map(e => e.textContent)")
    assert not [formula for formula in left if "\\" in formula or "&" in formula]


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_a_helper_opens_in_place_and_closes_again(name, visit):
    page = visit(name)
    call = page.locator('#code .help[data-help="common.micro_batches"]').first
    call.click()
    assert "def micro_batches" in page.inner_text("#code .inset")
    call.click()
    assert page.locator("#code .inset").count() == 0
    call.press("Enter")
    page.locator("#code .inset .close").click()
    assert page.locator("#code .inset").count() == 0


def test_every_call_of_a_helper_has_its_source(visit):
    page = visit("ppo")
    named = set(page.eval_on_selector_all("#code .help", "all => all.map(e => e.dataset.help)"))
    assert {"common.read", "common.sample", "lora.use_adapter"} <= named
    for name in named:
        assert page.locator(f'[id="src-{name}"]').count() == 1, name


def test_a_function_of_the_page_is_a_link_to_its_definition_and_back(visit):
    page = visit("ppo")
    page.click("#page .fn >> nth=0")
    assert "def " in page.inner_text("#code .hit")
    page.click("#code .hit .back")
    assert page.locator("#page .hit").count() == 1


def test_a_symbol_shows_its_row_on_hover_and_on_focus(visit):
    page = visit("ppo")
    assert not page.is_visible("#tip")
    page.locator('#code .sym >> text="logp_old"').first.hover()
    assert "sampled the answers" in page.inner_text("#tip")
    page.locator("#page h1").hover()
    assert not page.is_visible("#tip")
    page.locator('#code .sym >> text="adv"').first.focus()
    assert "advantage" in page.inner_text("#tip")


def test_wide_it_has_two_panes_that_scroll_apart_and_narrow_one_column(visit):
    page = visit("ppo")
    left, right = (page.locator(s).bounding_box() for s in ("#page", "#code"))
    assert left["y"] == right["y"] and right["x"] >= left["width"] - 1
    page.evaluate("document.querySelector('#page').scrollTop = 500")
    assert page.evaluate("document.querySelector('#code').scrollTop") == 0
    page = visit("ppo", width=420)
    left, right = (page.locator(s).bounding_box() for s in ("#page", "#code"))
    assert right["y"] >= left["y"] + left["height"] - 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_dark_is_dark(visit):
    def brightness(page):
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness(visit("ppo")) > 700 and brightness(visit("ppo", scheme="dark")) < 120


def test_the_reading_path_leads_through_all_pages_and_no_link_is_broken(site):
    pages = {p.name: p.read_text() for p in site.glob("*.html")}
    for name, text in pages.items():
        for target in re.findall(r'href="([^"#]+\.html)(?:#[^"]*)?"', text):
            assert target in pages, f"{name}: {target}"
    at, seen = "index", ["index"]
    while link := re.search(r'href="(\w+)\.html">[^<]*&rarr;', pages[f"{at}.html"]):
        at = link[1]
        seen.append(at)
    assert tuple(seen) == side_by_side.PATH
