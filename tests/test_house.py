"""The rules of the house: who may import whom, what scripts share, what a copied file can do."""

import ast
import dataclasses
import importlib
import io
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import tokenize

import numpy
import pytest
import torch
from byte_tokenizer import SIZE, byte_tokenizer
from conftest import ROOT, TARGETS, toy

import lora

SCRIPTS = ["sft", "reward_model", "ppo", "trpo", "grpo", "dpo"]
READ = [*SCRIPTS, "common", "lora"]
CLI = [f"cli.{path.stem}" for path in sorted((ROOT / "cli").glob("*.py"))]
EVERY = pytest.mark.parametrize("script", SCRIPTS)


def text_of(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


def imports(node):
    """{module} that is imported anywhere in a tree, also inside functions; `cli.data`, not data."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "imports are written out"
            found |= {inner.module, *(f"{inner.module}.{alias.name}" for alias in inner.names)}
    return found


def own(name):
    """{module of this project} that a module of this project imports."""
    modules = imports(ast.parse(text_of(name)))
    return {m for m in modules if m in READ + CLI or m == "cli"} - {name}


def functions(name):
    """{name: source, with its decorators} of the functions and classes of a file."""
    text, found = text_of(name), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
    return found


# ------------------------------------------------------------------------------ twins

ALL = tuple(SCRIPTS)
TWINS = {
    "token_logps": ALL, "masked_mean": ALL, "kl_shaped_rewards": ALL, "gae": ALL, "whiten": ALL,
    "explained_variance": ALL, "rollout_stats": ALL, "batch_logps": ALL, "read_values": ALL,
    "samples": ALL, "encode_pairs": ALL, "rollout": ("ppo", "trpo"), "make_models": ("ppo", "trpo"),
    "evaluate": ("ppo", "trpo", "grpo"),
}


@pytest.mark.parametrize("name", list(TWINS))
def test_twins_are_the_same_to_the_byte(name):
    texts = {script: functions(script)[name] for script in TWINS[name]
             if name in functions(script)}
    assert len(texts) > 1, f"{name} has no twin any more"
    assert len(set(texts.values())) == 1, f"{name} differs between {', '.join(texts)}"


def equations(script, group):
    """{number: formula} of a docstring; what it is called stands three blanks behind it."""
    found = re.findall(rf"^ *\(({group}\.\d+)\) +(\S.*)$", ast.get_docstring(
        ast.parse(text_of(script))), re.M)
    return {number: re.sub(r" +", " ", re.split(r" {3,}", line)[0]) for number, line in found}


def test_an_equation_that_several_scripts_use_has_one_number_and_one_form():
    seen = {}
    for script in SCRIPTS:
        for number, formula in equations(script, "RL").items():
            assert seen.setdefault(number, formula) == formula, (script, number)
    assert sorted(seen) == [f"RL.{i}" for i in range(1, 7)]


# ------------------------------------------------------------------------------ imports


def test_no_import_leads_in_a_circle_not_even_inside_a_function():
    edges = {name: own(name) & set(READ + CLI) for name in READ + CLI}
    assert len(edges) > 15 and edges["ppo"] > {"common", "lora"}
    while edges:  # take away what imports nothing that is left
        free = {name for name, needs in edges.items() if not needs & edges.keys()}
        assert free, f"a circle among {sorted(edges)}"
        edges = {name: needs for name, needs in edges.items() if name not in free}


def test_common_imports_lora_at_most_and_lora_nothing_of_the_house():
    assert own("common") <= {"lora"} and own("lora") == set()


@pytest.mark.parametrize("name", CLI)
def test_cli_imports_no_script(name):
    assert not own(name) & set(SCRIPTS)


@EVERY
def test_a_script_imports_torch_tqdm_common_lora_and_cli_inside_main_only(script):
    tree, text = ast.parse(text_of(script)), text_of(script)
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef)
              and node.name == "main"]
    assert {m.split(".")[0] for m in imports(main)} == {"cli"}
    tree.body.remove(main)
    allowed = {"torch", "tqdm", "common", "lora"} | set(sys.stdlib_module_names)
    assert {m.split(".")[0] for m in imports(tree)} <= allowed
    rulers = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith("# -----")]
    assert "command line" in text.splitlines()[rulers[-1] - 1] and main.lineno > rulers[-1]


@EVERY
def test_the_sections_of_a_script_stand_in_one_order(script):
    """What is the same in two scripts is then found at the same place."""
    rulers = re.findall(r"^# -{70,} (.*)$", text_of(script), re.M)
    assert rulers[0] == "the mathematics" and rulers[-2:] == ["train", "command line"]
    assert re.fullmatch(r"the (\w+ )?models?", rulers[1])
    assert rulers[2:-2] in (["rollout", "update"], ["update"])


# ------------------------------------------------------------------------------ manners


@pytest.mark.parametrize("name", READ)
def test_nothing_outside_cli_prints_ends_the_program_or_touches_signals(name):
    tree = ast.parse(text_of(name))
    assert not imports(tree) & {"signal", "atexit", "logging", "warnings"}
    inside = {id(n) for node in tree.body for n in ast.walk(node)
              if isinstance(node, ast.FunctionDef) and node.name == "main"}
    for node in ast.walk(tree):
        word = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
        assert word not in ("sys.exit", "exit", "quit", "os._exit", "SystemExit", "sys.stdout")
        assert word != "print" or id(node) in inside, f"{name}.py, line {node.lineno} prints"


@pytest.mark.parametrize("name", READ)
def test_an_import_does_nothing_but_define(name):
    """No call at the top of a file that could change a setting of a library."""
    for node in ast.parse(text_of(name)).body[1:]:
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
        main = isinstance(node, ast.If) and ast.unparse(node) == (
            "if __name__ == '__main__':\n    main()")
        assert isinstance(node, kinds) or main, f"{name}.py, line {node.lineno}"


@pytest.mark.parametrize("name", READ + CLI)
def test_no_line_is_over_100_columns_and_no_function_over_60_lines(name):
    wide = [n for n, line in enumerate(text_of(name).splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}: lines {wide}"
    for node in ast.walk(ast.parse(text_of(name))):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{name}.{node.name} has {size} lines"


@pytest.mark.parametrize("name, limit", [("common", 360), ("lora", 350)])
def test_the_files_that_every_script_rests_on_stay_thin(name, limit):
    assert len(text_of(name).splitlines()) <= limit


# ------------------------------------------------------------------------------ Config


@EVERY
def test_config_is_frozen_and_each_field_has_a_default_and_a_comment(script):
    module, source = importlib.import_module(script), functions(script)["Config"]
    config = module.Config()
    fields = [field.name for field in dataclasses.fields(config)]
    assert len(fields) > 9
    for name in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1)
        [line] = [x for x in source.splitlines() if x.startswith(f"    {name}: ")]
        assert re.search(r"  # \S.{8,}$", line), line
    tiny = dataclasses.replace(config, **module.TINY)
    assert module.TINY and all(getattr(tiny, key) == value for key, value in module.TINY.items())


@EVERY
def test_no_function_takes_the_flags(script):
    """Plain arguments or the script's own Config: only main knows what a command line is."""
    for node in ast.walk(ast.parse(text_of(script))):
        if isinstance(node, ast.FunctionDef):
            assert "args" not in [a.arg for a in node.args.args + node.args.kwonlyargs]


# ------------------------------------------------------------------------------ equations


def tagged_lines(text):
    """The comments that stand beside code, in one text; those of Config are help and no tags."""
    config = ast.get_source_segment(text, next(
        node for node in ast.parse(text).body if getattr(node, "name", "") == "Config"))
    text = text.replace(config, "class Config:\n    pass")
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = {n for t in tokens if t.type not in layout and t.type != tokenize.STRING
            for n in range(t.start[0], t.end[0] + 1)}
    return " ".join(t.string for t in tokens
                    if t.type == tokenize.COMMENT and t.start[0] in code)


TAG = r"\([A-Z]+\.\d+\)"


@EVERY
def test_each_equation_of_the_docstring_is_tagged_on_the_line_that_computes_it(script):
    text = text_of(script)
    numbered = set(re.findall(rf"^ *({TAG}) ", ast.get_docstring(ast.parse(text)), re.M))
    assert len(numbered) > 2
    missing = numbered - set(re.findall(TAG, tagged_lines(text)))
    assert not missing, f"{script}.py computes {sorted(missing)} without saying so"
    unknown = set(re.findall(TAG, text)) - numbered
    assert not unknown, f"{script}.py speaks of {sorted(unknown)}, which its docstring lacks"


# ------------------------------------------------------------------------------ copied alone

ALONE = """
import importlib.util, pathlib, sys
assert importlib.util.find_spec("cli") is None and importlib.util.find_spec("ppo") is None
import torch, common, grpo, lora

rows = [{"prompt": f"Say {i}.", "mark": i} for i in range(6)]

def reward(prompts, responses, rows):
    assert prompts == [row["prompt"] for row in rows]
    return [sum(map(ord, response)) % 17 + row["mark"] for response, row in zip(responses, rows)]

for name in ("gpt2", "llama"):
    model, tokenizer = common.load_model(f"../{name}", device="cpu")
    config = grpo.Config(steps=2, batch_size=8, max_new_tokens=6, max_length=64, lr=0.01,
                         missing_eos_score=None, lora_rank=4)
    base, seen = {k: v.clone() for k, v in model.state_dict().items()}, []
    history = grpo.train(model, tokenizer, rows, reward, config, lambda *row: seen.append(row))
    assert [row["step"] for row in history] == [0, 1] and len(seen) == 2
    assert all(row["grad_norm"] > 0 and row["log_ratio_max"] < 1e-4 for row in history)
    assert len(seen[0][1]) == 8 and seen[1][2]["step"] == 2
    before, after = (lora.adapter_parameters(model, n) for n in ("reference", "policy"))
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    bare = [v for k, v in model.state_dict().items() if "lora_" not in k]
    assert len(bare) == len(base) and all(map(torch.equal, bare, base.values()))
here = sorted(p.name for p in pathlib.Path().iterdir() if p.name != "__pycache__")
assert here == ["common.py", "grpo.py", "lora.py"], here
"""


def test_grpo_with_common_and_lora_trains_in_a_folder_of_its_own(tmp_path):
    for kind in TARGETS:
        toy(kind, SIZE).save_pretrained(tmp_path / kind)
        byte_tokenizer().save_pretrained(tmp_path / kind)
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("grpo", "common", "lora"):
        shutil.copy(ROOT / f"{name}.py", folder)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------ from a thread


def letters(prompts, responses, rows):
    return [sum(map(ord, response)) / 100 for response in responses]


def settings():
    """What a caller of train would not like to find changed."""
    return (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
            signal.getsignal(signal.SIGINT), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


@EVERY
def test_train_runs_in_a_thread_prints_nothing_and_leaves_all_settings(script, kind, capfd):
    module, model = importlib.import_module(script), toy(kind, SIZE)
    rows = [{"prompt": f"q{i}", "response": f"yes {i}", "chosen": f"good {i}",
             "rejected": f"no {i}"} for i in range(6)]
    more = {"max_new_tokens": 4} if script != "reward_model" else {}
    if script in ("ppo", "trpo", "grpo"):
        more["missing_eos_score"] = None
    config = module.Config(steps=2, batch_size=4, max_length=64, lora_rank=2, lr=0.01, **more)
    reward = [letters] if script in ("ppo", "trpo", "grpo") else []
    history, problems, before = [], [], settings()
    capfd.readouterr()

    def work():
        try:
            history.extend(module.train(model, byte_tokenizer(), rows, *reward, config))
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not problems and [row["step"] for row in history] == [0, 1]
    out, _ = capfd.readouterr()
    assert out == "" and settings() == before
    name = "reward" if script == "reward_model" else "policy"
    assert all(p.requires_grad for p in lora.adapter_parameters(model, name))
    assert any(row["grad_norm"] > 0 for row in history)
    assert not any(layer.active for layer in lora.lora_layers(model).values())
