"""What the documentation says is so: its commands name files that exist and flags they take, its
links lead somewhere, its worked examples compute what they print, the code it quotes stands in the
code, and an equation number stands in the script, on a line of its code, and on its page."""

import doctest
import importlib
import inspect
import json
import re
import shlex
from dataclasses import asdict, fields

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
from cli import flags

SCRIPTS = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "trpo": trpo, "grpo": grpo,
           "dpo": dpo}
DERIVED = {**SCRIPTS, "lora": lora}  # each has a page and numbered equations
COMMANDS = ("chat", "collect", "export")  # run as python -m cli.chat ...
MARKDOWN = ["README.md", "tiny/README.md",
            *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PYTHON = [*(f"{name}.py" for name in [*DERIVED, "common"]), *(f"cli/{c}.py" for c in COMMANDS)]
SOURCES = [path for folder in (".", "cli", "benchmarks", "tiny", "docs")
           for path in sorted((ROOT / folder).glob("*.py"))]
PUBLIC = {
    sft: ("sft_loss", "rouge_l"), reward_model: ("bradley_terry_loss",),
    ppo: ("token_logps", "kl_shaped_rewards", "gae", "whiten", "policy_loss", "value_loss"),
    trpo: ("token_logps", "surrogate", "mean_kl", "conjugate_gradient", "fisher_vector_product"),
    grpo: ("token_logps", "group_advantages", "grpo_loss"), dpo: ("token_logps", "dpo_loss"),
    lora: ("add_adapter", "use_adapter", "adapter_parameters", "save_adapter", "load_adapter",
           "merge_adapter"),
}
PREFIX = {"sft": "SFT", "reward_model": "RM", "ppo": "PPO", "trpo": "TRPO", "grpo": "GRPO",
          "dpo": "DPO", "lora": "LORA"}


def text_of(page):
    return (ROOT / page).read_text()


# ------------------------------------------------------------------------------ commands


def commands():
    """(page, command) of all lines that run something of this repository."""
    for page in [*MARKDOWN, *PYTHON]:
        module = page.removesuffix(".py").replace("/", ".")
        text = text_of(page) if page.endswith(".md") else importlib.import_module(module).__doc__
        text = text.replace("python rloo.py", "")  # which test_write_your_own.py makes and runs
        for line in re.findall(r"python ((?:-m cli\.|\S+\.py)[^\n`#|]*)", text):
            # Columns of flags may stand apart; what else stands apart is a remark.
            yield page, re.split(r" {2,}", re.sub(r" +(?=--)", " ", line))[0].strip()


class Parsed(Exception):
    """Raised once a script has read its flags, so that it does not run."""


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_every_command_of_the_documentation_parses(page, command, monkeypatch, tmp_path):
    file, *given = shlex.split(command)
    if file == "-m":
        module, *given = given
        assert module.removeprefix("cli.") in COMMANDS
        importlib.import_module(module).parse_args(given)
        return
    assert (ROOT / file).is_file()
    if "/" in file:
        return
    monkeypatch.chdir(tmp_path)  # the --out of a command does not exist yet
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    read, resume = flags.read, "--resume" in given
    if resume:  # a run with the default flags
        args, config = flags.read(file[:-3], "", SCRIPTS[file[:-3]].Config, {}, [], reward="needed")
        (tmp_path / "runs" / "ppo").mkdir(parents=True)
        (tmp_path / "runs" / "ppo" / "config.json").write_text(
            json.dumps({**vars(args), **asdict(config)}))

    def read_and_stop(*args, **kwargs):
        raise Parsed(read(*args, **kwargs))

    monkeypatch.setattr(flags, "read", read_and_stop)
    with pytest.raises(Parsed):
        SCRIPTS[file.removesuffix(".py")].main(given)


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_flag_that_a_page_names_is_a_flag_of_something(page):
    code = "\n".join(path.read_text() for path in SOURCES)
    known = set(re.findall(r'"(--[a-z][a-z-]*)"', code)) | {"--help"}
    for script in SCRIPTS.values():
        known |= {"--" + field.name.replace("_", "-") for field in fields(script.Config)}
    for span in re.findall(r"`([^`\n]+)`", text_of(page)):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
            if flag in ("--nnodes", "--nproc-per-node", "--enable-lora"):  # torchrun's, vLLM's
                break
            assert flag in known or flag.rstrip("-") + "-rank" in known, (flag, span)


# ------------------------------------------------------------------------------ equations


def equations(name):
    """{tag: formula} of the numbered lines of a script's docstring."""
    lines = re.findall(r"^    \(([A-Z]+\.\d+)\) +(.*)$", DERIVED[name].__doc__, re.M)
    return {tag: re.split(r"\s{2,}", formula.strip())[0] for tag, formula in lines}


def blocks(name):
    """{tag: formula in LaTeX, without spaces} of the tagged blocks of a script's page."""
    found = {}
    for block in re.findall(r"```math\n(.*?)```", text_of(f"docs/{name}.md"), re.S):
        for formula, tag in re.findall(r"(.*?)\\tag\{([^}]+)\}", block, re.S):
            assert tag not in found, tag
            found[tag] = re.sub(r"\\[,;]|\s", "", formula.split(",\\qquad")[0])
    return found


@pytest.mark.parametrize("name", DERIVED)
def test_every_numbered_equation_is_cited_where_it_is_computed(name):
    body, tags = text_of(f"{name}.py").replace(DERIVED[name].__doc__, ""), equations(name)
    assert tags
    for tag in tags:
        assert f"({tag})" in body, tag
    assert set(re.findall(r"\(([A-Z]+\.\d+)\)", body)) <= set(tags)


@pytest.mark.parametrize("name", DERIVED)
def test_a_page_derives_the_equations_of_its_script_and_no_others(name):
    assert sorted(blocks(name)) == sorted(equations(name))


@pytest.mark.parametrize("name", ["trpo", "grpo", "dpo"])
def test_an_equation_of_several_scripts_is_the_same_in_all_of_them(name):
    shared = [tag for tag in equations(name) if tag.startswith("RL.")]
    assert shared
    for tag in shared:
        assert equations(name)[tag] == equations("ppo")[tag]
        assert blocks(name)[tag] == blocks("ppo")[tag]


@pytest.mark.parametrize("page", MARKDOWN)
def test_a_page_cites_no_equation_that_there_is_not(page):
    known = {tag for name in DERIVED for tag in equations(name)}
    names = "|".join(["RL", *PREFIX.values()])
    assert set(re.findall(rf"\b(?:{names})\.\d+\b", text_of(page))) <= known


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_function_says_which_equation_it_is(module):
    for name in PUBLIC[module]:
        source = inspect.getsource(getattr(module, name))
        assert re.search(rf"\((RL|{PREFIX[module.__name__]})\.\d+\)", source), name


# ------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", [page for page in MARKDOWN if page.startswith("docs/")])
def test_worked_examples_compute_what_they_print(page):
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, verbose=False)
    assert not failed
    assert tried or page.removeprefix("docs/").removesuffix(".md") not in DERIVED


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_function_that_a_page_links_stands_in_that_file(page):
    for name, file in re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)(?:#\S*)?\)", text_of(page)):
        code, leaf = (ROOT / page).parent.joinpath(file).read_text(), name.rpartition(".")[2]
        assert name.endswith(".py") or re.search(rf"(def|class) {leaf}\b", code), (name, file)


def anchor(heading):
    """The name that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\$`|`\$", "", heading).lower())
    return kept.strip().replace(" ", "-")


@pytest.mark.parametrize("page", MARKDOWN)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target, place in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent.joinpath(target) if target else ROOT / page
        assert path.exists(), target
        if place and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert place in map(anchor, headings), (target, place)


@pytest.mark.parametrize("page", MARKDOWN)
def test_no_line_is_wider_than_a_screen(page):
    text = re.sub(r"<!--.*?-->", "", text_of(page))
    for line in text.splitlines():  # a table and a formula may be wider
        assert len(line) <= 140 or "|" in line or "\\" in line, line


# ------------------------------------------------------------------------------ mistakes


def entries():
    """[(number, text)] of docs/mistakes.md."""
    parts = re.split(r"^\*\*(\d+)\. ", text_of("docs/mistakes.md"), flags=re.M)
    return [(int(number), text.split("\n## ")[0]) for number, text in zip(parts[1::2], parts[2::2])]


def test_the_mistakes_are_numbered_and_counted():
    numbers = [number for number, _ in entries()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 60
    for count in re.findall(r"(\d+) (?:faults of this field|mistakes\])", text_of("README.md")):
        assert int(count) == len(numbers)


def test_every_mistake_names_a_test_and_every_test_that_is_named_exists():
    for number, text in entries():
        named = re.findall(r"`tests/(\w+\.py)::(\w+)`", text)
        assert named, number
        for file, test in named:
            assert f"def {test}(" in text_of(f"tests/{file}"), (number, file, test)


def test_every_right_line_of_the_mistakes_stands_in_the_code():
    """A line may be quoted without the remark behind it, and at another indentation."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "cli").glob("*.py")]
    code = {"".join(line.partition("  #")[0].split())
            for path in paths for line in path.read_text().splitlines()}
    for number, text in entries():
        [block] = re.findall(r"```diff\n(.*?)```", text, re.S)
        lines = block.splitlines()
        assert {"+", "-"} <= {line[0] for line in lines}, number
        for line in lines:
            quoted = "".join(line[2:].partition("  #")[0].split())
            assert line[0] == "-" or quoted in code, (number, line)
