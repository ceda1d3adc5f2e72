"""docs/write_your_own.md says the truth: its blocks turn grpo.py into an rloo.py that works, and
the tests that it prints pass. A block that no longer fits grpo.py fails with its number."""

import ast
import importlib.util
import math
import re
import sys

import pytest
from conftest import ROOT, toy
from test_grpo import CONFIG, PROMPTS, Letters, stub_reward

import grpo

PAGE = (ROOT / "docs" / "write_your_own.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)]
TESTS = "\n\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))


def apply(block, number, text):
    """The text with the `-` lines of a block replaced by its `+` lines; `-...` is any lines."""
    old = [line[1:] for line in block if not line.startswith("+")]
    new = [line[1:] for line in block if not line.startswith("-")]
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line + "\n") for line in old)
    found = re.findall(f"^{pattern}", text, re.M)
    assert len(found) == 1, (
        f"docs/write_your_own.md: block {number} of {len(BLOCKS)} no longer fits grpo.py: the "
        f"lines from {old[0].strip()!r} to {old[-1].strip()!r} are there {len(found)} times")
    return re.sub(f"^{pattern}", lambda _: "\n".join(new) + "\n", text, flags=re.M)


@pytest.fixture(scope="module")
def rloo(tmp_path_factory):
    """The module that the page makes; while it is in use, `import rloo` finds it."""
    text = (ROOT / "grpo.py").read_text()
    for number, block in enumerate(BLOCKS, 1):
        text = apply(block, number, text)
    path = tmp_path_factory.mktemp("own") / "rloo.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("rloo", path)
    sys.modules["rloo"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rloo"]


def test_a_block_that_does_not_fit_is_named():
    with pytest.raises(AssertionError, match="block 2 of .* from 'gone' to 'b' are there 0 times"):
        apply(["-gone", "-...", " b", "+c"], 2, "a\nb\n")
    assert apply([" a", "-...", "-b", "+c"], 1, "a\nx\ny\nb\nb\n") == "a\nc\nb\n"


def test_the_file_keeps_the_rules_of_the_house_and_nothing_of_grpo(rloo):
    with open(rloo.__file__) as file:
        text = file.read()
    assert "grpo" not in text.lower() and max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
    code = text.replace(rloo.__doc__, "")
    assert all(f"  # ({tag})" in code for tag in re.findall(r"\((RL\w*\.\d)\)", rloo.__doc__))
    added = "\n".join(line[1:] for block in BLOCKS for line in block if line.startswith("+"))
    lines = re.sub(r'""".*?"""', "", added, flags=re.S).split("\n")
    assert f"add {sum(map(bool, map(str.strip, lines)))} lines of code" in PAGE


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", TESTS, re.M))
def test_the_tests_of_the_page_pass(rloo, name):
    found = {}
    exec(compile(TESTS, "docs/write_your_own.md", "exec"), found)
    found[name]()


def test_it_trains_and_its_first_gradient_is_that_of_grpo(rloo, kind):
    """Two steps on a toy. The first differs from grpo.py's by the most tokens of an answer."""
    fields = {**CONFIG, "steps": 2, "max_new_tokens": 6, "micro_batch_size": 2, "lr": 0.01}
    rows = []
    for script, more in (rloo, {}), (grpo, dict(loss="dr_grpo", adv="loo", kl_in="reward")):
        model = toy(kind)
        model.generation_config.eos_token_id = list(range(2, 18))
        config = script.Config(**fields, **more)
        rows.append(script.train(model, Letters(), PROMPTS, stub_reward, config))
    (first, second), (other, _) = rows
    assert all(math.isfinite(value) for value in [*first.values(), *second.values()])
    assert first["log_ratio_max"] < 1e-4 and second["log_ratio_max"] < 1e-4 < abs(second["kl"])
    assert first["score"] == other["score"] and first["approx_kl"] > 0
    assert first["grad_norm"] == pytest.approx(6 * other["grad_norm"], rel=1e-4)
    assert first["grad_norm"] > 0.01


def test_its_help_is_its_docstring_and_its_flags(rloo, capsys):
    with pytest.raises(SystemExit) as done:
        rloo.main(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and rloo.__doc__.split("\n\n")[0] in shown
    assert "--beta" in shown and "--group-size" in shown and "--clip" not in shown
