"""What the documentation says is so: its commands name files that exist and flags they take, its
links lead somewhere, its worked examples compute what they print, and an equation number stands in
the script, on a line of its code, and on its page."""

import doctest
import inspect
import re
import shlex

import pytest
from conftest import ROOT

import common
import dpo
import grpo
import lora
import ppo
import reward_model
import sft
import trpo

SCRIPTS = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "trpo": trpo, "grpo": grpo,
           "dpo": dpo, "lora": lora, "common": common}
DERIVATIONS = sorted(p.name for p in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "tiny/README.md", *(f"docs/{name}" for name in DERIVATIONS),
         *(f"{name}.py" for name in SCRIPTS)]
PUBLIC = {
    sft: ("sft_loss", "rouge_l"), reward_model: ("bradley_terry_loss",),
    ppo: ("token_logps", "kl_shaped_rewards", "gae", "whiten", "policy_loss", "value_loss"),
    trpo: ("surrogate", "mean_kl", "conjugate_gradient", "fisher_vector_product"),
    grpo: ("group_advantages", "grpo_loss"), dpo: ("dpo_loss",),
    lora: ("add_adapter", "use_adapter", "adapter_parameters", "save_adapter", "load_adapter",
           "merge_adapter"),
}


def commands():
    for page in PAGES:
        for line in re.findall(r"python (\S+\.py[^\n`#|]*)", (ROOT / page).read_text()):
            yield page, re.split(r"  +[a-z]|\s{3,}", line)[0].strip()


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_every_command_of_the_documentation_parses(page, command):
    file, *flags = shlex.split(command)
    assert (ROOT / file).is_file()
    if "/" not in file:
        SCRIPTS[file.removesuffix(".py")].parse_args(flags)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "common"])
def test_every_numbered_equation_is_cited_where_it_is_computed(name):
    head, code = SCRIPTS[name].__doc__, (ROOT / f"{name}.py").read_text()
    tags = re.findall(r"^    \(([A-Z]+\.\d+)\)", head, re.M)
    body = code.replace(head, "")
    assert tags
    for tag in tags:
        assert f"({tag})" in body, tag
    assert set(re.findall(r"\(([A-Z]+\.\d+)\)", body)) <= set(tags)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "common"])
def test_a_page_derives_the_equations_of_its_script_and_no_others(name):
    tags = re.findall(r"^    \(([A-Z]+\.\d+)\)", SCRIPTS[name].__doc__, re.M)
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert sorted(re.findall(r"\\tag\{([^}]+)\}", page)) == sorted(tags)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_function_says_which_equation_it_is(module):
    for name in PUBLIC[module]:
        source = inspect.getsource(getattr(module, name))
        assert re.search(rf"\({module.__name__.split('_')[0][0].upper()}[A-Z]+\.\d+\)", source), name


@pytest.mark.parametrize("page", DERIVATIONS)
def test_worked_examples_compute_what_they_print(page):
    path = str(ROOT / "docs" / page)
    failed, tried = doctest.testfile(path, module_relative=False, verbose=False)
    assert not failed
    assert tried or page.removesuffix(".md") not in SCRIPTS


def test_every_test_that_the_mistakes_name_exists():
    named = re.findall(r"`tests/(\w+\.py)::(\w+)`", (ROOT / "docs" / "mistakes.md").read_text())
    assert len(named) > 60
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def test_every_right_line_of_the_mistakes_stands_in_the_code():
    code = "".join("".join(path.read_text().split()) for path in ROOT.glob("*.py"))
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "mistakes.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("+ ")]
    assert len(lines) > 60
    for line in lines:
        assert "".join(line[2:].partition("  #")[0].split()) in code, line


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_wider_than_a_screen(page):
    width = 140 if page.endswith(".md") else 100
    for line in (ROOT / page).read_text().splitlines():
        assert len(line) <= width or "|" in line or (width == 140 and "\\" in line), line  # or maths
