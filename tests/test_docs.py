"""What the documentation says can be run: its commands name files that exist and flags they take,
and an equation number in a docstring stands on a line of code too."""

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
PAGES = ["README.md", "tiny/README.md", *(f"{name}.py" for name in SCRIPTS)]


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


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_wider_than_a_screen(page):
    width = 140 if page.endswith(".md") else 100
    for line in (ROOT / page).read_text().splitlines():
        assert len(line) <= width or "|" in line, line
