"""The commands from outside: bad input ends in one line, a run writes what it promises."""

import functools
import importlib
import io
import itertools
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import datasets
import pytest
import torch
from byte_tokenizer import CHAT, SIZE, byte_tokenizer
from conftest import ROOT, TARGETS, toy
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import common
import dpo
import grpo
import lora
import ppo
import reward_model
import sft
import trpo
from cli import chat, data, export

SCRIPTS = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "trpo": trpo, "grpo": grpo,
           "dpo": dpo}
SHORT = ["--max-length", "96", "--eval-size", "2", "--device", "cpu"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@functools.cache
def stand_in(kind, folder):
    """A folder laid out as tiny/, of a toy model and toy data."""
    model = toy(kind, SIZE)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name in ("sft", "reward_model"):
        lora.add_adapter(model, name, rank=4, alpha=8, targets=TARGETS[kind])
        if name == "reward_model":
            lora.add_head(model, name)
        lora.save_adapter(model, name, folder / name, base="tiny/model")
    split = ["train"] * 12 + ["test"] * 3
    write(folder / "demonstrations.jsonl", [
        {"instruction": f"q{i}", "context": "", "response": f"yes {i}", "split": s}
        for i, s in enumerate(split)])
    write(folder / "preferences.jsonl", [
        {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"no {i}", "p_chosen": 0.8,
         "split": s} for i, s in enumerate(split)])
    write(folder / "prompts.jsonl", [{"prompt": f"q{i}", "split": s} for i, s in enumerate(split)])
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: tmp_path_factory.mktemp(kind) for kind in TARGETS}


@pytest.fixture(params=["gpt2", "llama"])
def house(request, folders, tmp_path, monkeypatch):
    """common.TINY is the stand-in, and the working folder is empty."""
    folder = stand_in(request.param, folders[request.param])
    monkeypatch.setattr(common, "TINY", folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.chdir(tmp_path)
    return folder


def arguments(script, *argv):
    short = [] if script == "reward_model" else ["--max-new-tokens", "4"]
    group = ["--group-size", "2"] if script == "grpo" else []
    return [*SHORT, *short, *group, *argv]


def refusal(script, argv, capsys, out=None):
    """The one line on stderr of a run that must end with code 2 and leave nothing."""
    out = Path("out") if out is None else out
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].main([*argv, *([] if "--out" in argv else ["--out", str(out)])])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert not out.exists() and not Path("runs").exists()
    return error


EVERY = pytest.mark.parametrize("script", list(SCRIPTS))
ON_POLICY = pytest.mark.parametrize("script", ["ppo", "trpo", "grpo"])


# ------------------------------------------------------------------------------ bad flags


@EVERY
@pytest.mark.parametrize("argv, says", [
    (["--no-such-flag"], "--no-such-flag"),
    (["--no-such-flag"], "--help lists the flags"),
    (["--step", "3"], "--step"),
    (["--steps", "0"], "--steps"),
    (["--steps", "-1"], "--steps"),
    (["--steps", "many"], "--steps"),
    (["--batch-size", "0"], "--batch-size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--seed", "-1"], "--seed"),
    (["--device", "abacus"], "--device"),
    (["--micro-batch-size", "0"], "--micro-batch-size"),
    (["--lora-rank", "none"], "--lora-rank"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--data", "missing.parquet"], "missing.parquet"),
    (["--model", "some/model"], "--data"),
])
def test_a_bad_flag_is_named(script, argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(script, argv, capsys)


@ON_POLICY
@pytest.mark.parametrize("argv, says", [
    (["--temperature", "0"], "--temperature"),
    (["--max-new-tokens", "64", "--max-length", "64"], "--max-new-tokens"),
    (["--model", "some/model", "--data", "d.jsonl"], "--reward"),
    (["--missing-eos-score", "nan"], "--missing-eos-score"),
])
def test_a_bad_flag_of_sampling_is_named(script, argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(script, argv, capsys)


@pytest.mark.parametrize("script, argv, says", [
    ("ppo", ["--batch-size", "8", "--minibatches", "3"], "--minibatches"),
    ("ppo", ["--kl-target", "0"], "--kl-target"),
    ("ppo", ["--value-coef", "0.5"], "--value-coef"),
    ("ppo", ["--kl-target", "6", "--beta", "0"], "--beta"),
    ("ppo", ["--lam", "1.1"], "--lam"),
    ("trpo", ["--gamma", "2"], "--gamma"),
    ("grpo", ["--warmup", "5"], "--warmup"),
    ("grpo", ["--batch-size", "9", "--minibatches", "2", "--group-size", "3"], "--minibatches"),
    ("grpo", ["--batch-size", "8", "--group-size", "3"], "--group-size"),
    ("grpo", ["--group-size", "1"], "--group-size"),
    ("grpo", ["--adv", "median"], "--adv"),
    ("trpo", ["--damping", "0"], "--damping"),
    ("trpo", ["--max-kl", "0"], "--max-kl"),
    ("trpo", ["--missing-eos-score", "some"], "--missing-eos-score"),
    ("dpo", ["--temperature", "0"], "--temperature"),
    ("dpo", ["--beta", "0"], "--beta"),
    ("dpo", ["--label-smoothing", "0.5"], "--label-smoothing"),
    ("dpo", ["--label-smoothing", "0.1", "--loss", "ipo"], "--label-smoothing"),
])
def test_a_bad_flag_of_one_algorithm_is_named(script, argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(script, argv, capsys)


@EVERY
def test_an_out_folder_with_files_is_refused_and_kept(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/mine.txt").write_text("mine")
    assert "there" in refusal(script, ["--out", "there"], capsys)
    assert [p.name for p in Path("there").iterdir()] == ["mine.txt"]
    assert "mine.txt" in refusal(script, ["--out", "there/mine.txt"], capsys)
    assert Path("there/mine.txt").read_text() == "mine"


@EVERY
def test_help_shows_each_flag_with_the_comment_that_stands_beside_it_in_config(script, capsys):
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].main(["--help"])
    out, error = capsys.readouterr()
    said, source = " ".join(out.split()), Path(ROOT, f"{script}.py").read_text()
    assert end.value.code == 0 and not error
    for name in SCRIPTS[script].Config.__dataclass_fields__:
        [line] = [x for x in source.splitlines() if x.startswith(f"    {name}: ")]
        assert f"--{name.replace('_', '-')} " in out
        assert " ".join(line.split("  # ")[1].split()) in said
    for name, value in SCRIPTS[script].TINY.items():
        assert f"tiny: {value:g}" in said


# ------------------------------------------------------------------------------ bad files


@EVERY
def test_wrong_columns_are_listed_beside_the_accepted_ones(script, capsys, house):
    write(Path("d.jsonl"), [{"colour": "red"}] * 30)
    error = refusal(script, ["--data", "d.jsonl"], capsys)
    assert "colour" in error and "prompt, chosen, rejected" in error


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2\n", b"\x00\x01", b'{"prompt": "caf\xe9"}\n'])
def test_a_data_file_that_cannot_be_read(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("d.jsonl").write_bytes(text)
    assert "d.jsonl" in refusal("sft", ["--data", "d.jsonl"], capsys)


@EVERY
def test_an_unknown_model_folder_is_named(script, capsys, house):
    argv = ["--model", "./no/such/folder", "--data", str(house / f"{DATA[script]}.jsonl")]
    argv += ["--reward", str(house / "reward_model")] if DATA[script] == "prompts" else []
    assert "no/such/folder" in refusal(script, argv, capsys)


DATA = dict(sft="demonstrations", reward_model="preferences", dpo="preferences", ppo="prompts",
            trpo="prompts", grpo="prompts")


@EVERY
def test_a_model_folder_without_a_model_is_named(script, capsys, house):
    Path("empty").mkdir()
    argv = ["--model", "empty", "--data", str(house / f"{DATA[script]}.jsonl")]
    argv += ["--reward", str(house / "reward_model")] if DATA[script] == "prompts" else []
    assert "empty" in refusal(script, argv, capsys)


@EVERY
def test_an_adapter_folder_without_an_adapter_is_named(script, capsys, house):
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert folder in refusal(script, arguments(script, "--adapter", folder), capsys)


def test_an_adapter_of_another_model_that_fits_is_told(capsys, house):
    shutil.copytree(house / "sft", "moved")
    config = json.loads(Path("moved/adapter_config.json").read_text())
    for base, notes in ((config["base_model_name_or_path"], 0), ("other/model", 1)):
        text = json.dumps(config | {"base_model_name_or_path": base})
        Path("moved/adapter_config.json").write_text(text)
        chat.main([*"--model tiny --adapter moved --prompt a --max-new-tokens 4".split()])
        assert capsys.readouterr().err.count("trained on the model other/model") == notes


@pytest.mark.parametrize("script", ["sft", "ppo", "trpo", "grpo", "dpo"])
def test_a_reward_model_does_not_become_a_policy(script, capsys, house):
    argv = arguments(script, "--adapter", str(house / "reward_model"))
    assert "is a reward model" in refusal(script, argv, capsys)


@ON_POLICY
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(script, capsys, house):
    error = refusal(script, arguments(script, "--reward", "runs/reward_mode1"), capsys)
    assert "runs/reward_mode1: no such" in error


@pytest.mark.parametrize("file, content", [
    ("adapter_config.json", ""), ("adapter_config.json", "{}"), ("adapter_config.json", "[]"),
    ("adapter_config.json", '{"peft_type": "LORA"}'), ("adapter_model.safetensors", ""),
    ("adapter_config.json", '{"base_model_name_or_path": null, "r": 2, "lora_alpha": null}'),
    ("adapter_model.safetensors", "not a tensor, but more than eight bytes"),
])
def test_a_damaged_adapter_is_named(file, content, capsys, house):
    Path("bad").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("bad", name).write_bytes((house / "reward_model" / name).read_bytes())
    Path("bad", file).write_text(content)
    assert "bad" in refusal("sft", arguments("sft", "--adapter", "bad"), capsys)
    assert "bad" in refusal("ppo", arguments("ppo", "--reward", "bad"), capsys)


def test_a_head_of_several_scores_is_refused(capsys, house):
    Path("bad").mkdir()
    config = (house / "reward_model/adapter_config.json").read_bytes()
    Path("bad/adapter_config.json").write_bytes(config)
    tensors = load_file(house / "reward_model/adapter_model.safetensors")
    head = "base_model.model.score.weight"
    tensors[head] = tensors[head].repeat(2, 1)
    save_file(tensors, "bad/adapter_model.safetensors")
    assert "not one score" in refusal("ppo", arguments("ppo", "--reward", "bad"), capsys)


@pytest.mark.parametrize("script", ["sft", "ppo", "trpo", "grpo", "dpo"])
def test_an_adapter_of_the_output_head_is_trained_like_any_other(script, house):
    """The model's own forward makes the logits, so sampler and scorer read the same head."""
    Path("odd").mkdir()
    config = (house / "sft/adapter_config.json").read_bytes()
    Path("odd/adapter_config.json").write_bytes(config)
    tensors = load_file(house / "sft/adapter_model.safetensors")
    width = next(A.shape[1] for key, A in tensors.items() if ".lora_A." in key)
    head = "base_model.model.lm_head.lora_{}.weight"
    torch.manual_seed(0)
    before = {head.format("A"): torch.randn(4, width), head.format("B"): torch.randn(SIZE, 4) / 10}
    save_file(tensors | before, "odd/adapter_model.safetensors")
    Path("r.py").write_text(COUNT)
    reward = ["--reward", "r.py:letters"] if script not in ("sft", "dpo") else []
    SCRIPTS[script].main(arguments(script, *RUN, "--adapter", "odd", *reward, *NONE[script]))
    check_run(script, Path("out"), "tiny/model")
    after = load_file("out/adapter_model.safetensors")
    assert all(not torch.equal(after[key], old) for key, old in before.items())
    for row in lines(Path("out/metrics.jsonl")):
        assert row.get("log_ratio_max", 0) < 1e-4


def test_a_refusal_and_a_run_leave_ctrl_c_as_it_was(capsys, house):
    for handler in (signal.default_int_handler, signal.SIG_IGN):
        before = signal.signal(signal.SIGINT, handler)
        try:
            refusal("ppo", arguments("ppo", "--adapter", "nowhere"), capsys)
            sft.main(arguments("sft", *RUN, "--out", handler.__class__.__name__))
            assert signal.getsignal(signal.SIGINT) == handler
            shutil.rmtree(handler.__class__.__name__)
        finally:
            signal.signal(signal.SIGINT, before)


@EVERY
def test_unknown_lora_targets_are_named(script, capsys, house):
    argv = arguments(script, "--adapter", "none", "--lora-targets", "no_such_layer")
    assert "no_such_layer" in refusal(script, argv, capsys)


@EVERY
def test_flags_of_a_new_adapter_are_refused_beside_one_that_is_there(script, capsys, house):
    argv = arguments(script, "--adapter", str(house / "sft"), "--lora-rank", "8")
    assert "--lora-rank" in refusal(script, argv, capsys)


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo"])
def test_data_of_which_nothing_fits_is_refused(script, capsys, house):
    argv = ["--max-length", "3", "--max-new-tokens", "2"][: 2 if script == "reward_model" else 4]
    assert "--max-length 3" in refusal(script, argv, capsys)


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo", "sft", "dpo"])
def test_more_new_tokens_than_the_model_can_read_are_refused(script, capsys, house):
    """Both toys have 128 positions, whatever --max-length says."""
    error = refusal(script, ["--max-new-tokens", "128", "--device", "cpu"], capsys)
    assert "--max-new-tokens 128" in error


REFUSES = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
           "{% endif %}{% endfor %}" + CHAT)


@EVERY
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_prompt_that_the_chat_template_refuses_ends_the_run_before_it_starts(
        script, split, capsys, house):
    shutil.copytree(house / "model", "model")
    byte_tokenizer(REFUSES).save_pretrained("model")
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "response": "yes", "chosen": "good",
             "rejected": "no", "split": "test" if i > 8 else "train"} for i in range(12)]
    at = 4 if split == "train" else 10
    rows[at]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    Path("r.py").write_text(COUNT)
    argv = ["--model", "model", "--data", write(Path("d.jsonl"), rows)]
    argv += ["--reward", "r.py:letters"] if DATA[script] == "prompts" else []
    error = refusal(script, arguments(script, *argv), capsys)
    assert "chat template" in error and "no system" in error and "--data" in error


def test_a_kl_that_bf16_cannot_measure_is_refused(capsys, house):
    argv = arguments("trpo", "--dtype", "bf16", "--max-kl", "0.0005")
    error = refusal("trpo", argv, capsys)
    assert "--max-kl" in error and "--dtype fp32" in error


def test_a_plot_without_matplotlib_is_refused(capsys, house, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in refusal("sft", arguments("sft", "--plot"), capsys)


def test_a_device_that_is_not_there_is_named(capsys, house):
    absent = next(d for d in ("mps", "cuda")
                  if not getattr(torch, d).is_available())
    argv = [absent if a == "cpu" else a for a in arguments("sft")]
    assert f"device {absent} is not available" in refusal("sft", argv, capsys)


# ------------------------------------------------------------------------------ bad rewards

NONE = {script: [] if script in ("sft", "reward_model") else ["--missing-eos-score", "none"]
        for script in SCRIPTS}
COUNT = """
def letters(prompts, responses, rows):
    return [sum(map(ord, response)) / 100 for response in responses]
"""
REWARD = """
import math
def count(prompts, responses, rows): return [1.0] * (len(responses) + 1)
def none_at_all(prompts, responses, rows): return []
def nan(prompts, responses, rows): return [math.nan] * len(responses)
def infinite(prompts, responses, rows): return [math.inf] * len(responses)
def strings(prompts, responses, rows): return ["good"] * len(responses)
def nothing(prompts, responses, rows): pass
def two(prompts, responses): return [1.0] * len(responses)
def raises(prompts, responses, rows): return [1 / 0 for _ in prompts]
constant = 3
"""


@pytest.mark.parametrize("function, says", [
    ("count", "3 scores for 2"), ("none_at_all", "0 scores for 2"), ("nan", "nan"),
    ("infinite", "inf"), ("strings", "numbers"), ("nothing", "numbers"),
    ("two", "(prompts, responses, rows)"), ("missing", "missing"), ("constant", "constant"),
    ("", "function"), (None, "r.py:function"),
])
def test_a_bad_reward_function_is_named(function, says, capsys, house):
    Path("r.py").write_text(REWARD)
    reward = "r.py" if function is None else f"r.py:{function}"
    argv = arguments("ppo", "--reward", reward, "--batch-size", "2")
    assert says in refusal("ppo", argv, capsys)


def with_traceback(argv, capsys):
    """(traceback, error line) of a run that the user's own code ends; nothing of ours in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        ppo.main([*argv, "--out", "out"])
    error = capsys.readouterr().err
    *traceback, last = error.rstrip("\n").split("\n")
    assert end.value.code == 2 and last.startswith("error: ") and traceback
    assert not any(line.startswith("error: ") for line in traceback)
    assert "r.py" in last and not Path("out").exists()
    traceback = "\n".join(traceback)
    assert not any(f"{name}.py" in traceback for name in ("rewards", "common", "ppo"))
    return traceback, last


@pytest.mark.parametrize("text, says", [
    ("def f(:\n", "SyntaxError"), ("import no_such_module\n", "no_such_module"),
    ("1 / 0\n", "ZeroDivisionError"),
])
def test_a_reward_file_that_does_not_run_shows_its_traceback_and_one_line(
        text, says, capsys, house):
    Path("r.py").write_text(text)
    traceback, last = with_traceback(arguments("ppo", "--reward", "r.py:f"), capsys)
    assert 'r.py", line 1' in traceback and says in traceback and says in last


def test_a_reward_that_raises_shows_its_own_traceback_and_one_line(capsys, house):
    """A12: the line names the function and the first prompt."""
    Path("r.py").write_text(REWARD)
    traceback, last = with_traceback(arguments("ppo", "--reward", "r.py:raises"), capsys)
    assert 'r.py", line' in traceback and "in raises" in traceback
    assert "ZeroDivisionError: division by zero" in traceback
    assert "r.py:raises" in last and "ZeroDivisionError: division by zero" in last
    prompts = [row["prompt"] for row in data.load_data(str(house / "prompts.jsonl"), ["prompt"])[1]]
    assert any(repr(prompt) in last for prompt in prompts)


def test_a_missing_reward_is_named(capsys, house):
    Path("empty").mkdir()
    for reward in ("nowhere.py:f", "empty", "./no/such/folder"):
        name = reward.partition(":")[0]
        assert name in refusal("ppo", arguments("ppo", "--reward", reward), capsys)


def test_a_reward_adapter_without_head_or_of_another_base_is_refused(capsys, house):
    argv = arguments("ppo", "--reward", str(house / "sft"))
    assert "head" in refusal("ppo", argv, capsys)
    Path("other").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("other", name).write_bytes((house / "reward_model" / name).read_bytes())
    config = json.loads(Path("other/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/other-model"
    Path("other/adapter_config.json").write_text(json.dumps(config))
    error = refusal("ppo", arguments("ppo", "--reward", "other"), capsys)
    assert "some/other-model" in error


# ------------------------------------------------------------------------------ short runs

ALWAYS = {"step", "seconds", "loss", "grad_norm", "lr"}
SAMPLED = {"score", "score_std", "kl", "entropy", "eos_rate", "length",
           "log_ratio_max", "surprise", "surprise_z"}
KEYS = {
    "sft": ALWAYS,
    "reward_model": ALWAYS | {"accuracy", "margin"},
    "ppo": ALWAYS | SAMPLED | {"ratio_max", "clip_fraction", "approx_kl", "explained_variance"},
    "trpo": ALWAYS | SAMPLED | {"surrogate_gain", "backtracks", "kl_step", "explained_variance"},
    "grpo": ALWAYS | SAMPLED | {"ratio_max", "clip_fraction", "approx_kl", "zero_std_groups",
                               "dead_groups"},
    "dpo": ALWAYS | {"accuracy", "margin", "logp_chosen", "logp_rejected"},
}
RUN = "--steps 2 --batch-size 4 --micro-batch-size 2 --lr 0.01 --out out".split()


def check_run(script, out, base):
    """What is promised of every run, here of one of two steps."""
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 2 and config["seed"] == 0 and config["batch_size"] == 4
    assert config["torch"] == torch.__version__ and "transformers" in config
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert KEYS[script] <= row.keys()
        numbers = [v for v in row.values() if isinstance(v, (int, float))]
        assert all(math.isfinite(v) for v in numbers)
        # no answer of a toy ends in time, all score the same, and GRPO has nothing to learn
        assert row["grad_norm"] > 0 or row["zero_std_groups"] == 2
        assert row["seconds"] > 0 and 0 < row["lr"] <= 0.01
    if script == "sft":
        assert all({"perplexity", "rouge_l"} <= row.keys() for row in rows)
    sides = ("chosen", "rejected") if script == "reward_model" else ("response",)
    samples = lines(out / "samples.jsonl")
    assert samples and all({"prompt", "score", *sides} <= row.keys() for row in samples)
    assert {0, 2} <= {row["step"] for row in samples}  # before and after
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base
    assert (adapter["task_type"] == "SEQ_CLS") == (script == "reward_model")
    assert (out / "adapter_model.safetensors").is_file()


def check_what_is_said(script, first, said):
    """A table, and before any update sampler and scorer side by side, or a loss as it must be."""
    assert "held-out rows" in said and "before" in said and "after" in said
    if script in ("ppo", "trpo", "grpo"):
        assert first["log_ratio_max"] < 1e-4 and f"at most {first['log_ratio_max']:.1e}" in said
        told = float(re.search(r"surprise (\S+) of the sampled tokens, entropy", said)[1])
        assert told == pytest.approx(first["surprise"], abs=6e-4)  # rounded twice
    if script == "reward_model":
        assert "loss before training" in said and "ln 2 = 0.693" in said
        assert "the best possible judge has an accuracy of 0.800" in said
    if script == "dpo":
        assert f"loss {math.log(2):.4f}" in said


@EVERY
def test_a_run_writes_what_it_promises_and_seed_and_checkpointing_repeat_it(script, capsys, house):
    for out, more in (("out", "--save-every 1"), ("again", ""), ("slow", "--grad-checkpoint")):
        SCRIPTS[script].main(arguments(
            script, *RUN, *NONE[script], "--out", out, *more.split()))
    check_run(script, Path("out"), "tiny/model")
    check_what_is_said(script, lines(Path("out/metrics.jsonl"))[0], capsys.readouterr().out)
    one, two, three = (lines(Path(out, "metrics.jsonl")) for out in ("out", "again", "slow"))
    for row in one + two + three:
        del row["seconds"]
    assert one == two and all(row["grad_norm"] > 1e-3 for row in one)
    # Under checkpointing nothing is shared between answers, and no number changes. At the start of
    # DPO h is 0, and how many of its roundings lie above 0 means nothing.
    for a, b in zip(one, three):
        if script == "dpo" and a["step"] == 0:
            a, b = a | {"accuracy": 0.0}, b | {"accuracy": 0.0}
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    model = toy("gpt2" if "gpt2" in house.name else "llama", SIZE)
    saved = {"s1": "out/step-1", "s2": "out/step-2", "end": "out", "again": "again"}
    for name, folder in saved.items():
        lora.load_adapter(model, name, folder)
    first, second, end, again = (lora.adapter_parameters(model, name) for name in saved)
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(second, end, again))


@EVERY
def test_a_run_with_the_shipped_model(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = ["--max-length", "400"] + (["--max-new-tokens", "64"] if script == "grpo" else [])
    SCRIPTS[script].main(arguments(script, *RUN, *room))
    check_run(script, Path("out"), "tiny/model")
    assert any(row["grad_norm"] > 0 for row in lines(Path("out/metrics.jsonl")))


@ON_POLICY
def test_the_out_of_sft_is_an_adapter_for_the_next_scripts(script, house):
    sft.main(arguments("sft", *RUN, "--out", "first"))
    reward_model.main(arguments("reward_model", *RUN, "--out", "second", "--adapter", "first"))
    SCRIPTS[script].main(arguments(
        script, *RUN, "--out", "third", "--adapter", "first", "--reward", "second"))
    check_run(script, Path("third"), "tiny/model")


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo", "dpo"])
def test_a_run_with_a_function_and_without_an_adapter(script, house):
    Path("r.py").write_text("def f(prompts, responses, rows): return [len(r) for r in responses]")
    SCRIPTS[script].main(arguments(script, *RUN, "--reward", "r.py:f", "--adapter", "none"))
    check_run(script, Path("out"), "tiny/model")


@pytest.mark.parametrize("script, argv", [
    ("ppo", ["--kl-target", "1"]),
    ("ppo", ["--missing-eos-score", "none"]),
    ("grpo", ["--loss", "dapo", "--adv", "loo", "--kl-in", "reward"]),
    ("grpo", ["--loss", "dr_grpo", "--adv", "none", "--kl", "k3-corrected"]),
    ("grpo", ["--loss", "gspo", "--clip-low", "3e-4", "--clip-high", "4e-4", "--kl", "k2"]),
    ("grpo", ["--loss", "cispo", "--clip-low", "1", "--resample", "2"]),
    ("grpo", ["--adv", "raw", "--kl", "k3"]),
    ("dpo", ["--loss", "ipo"]),
    ("dpo", ["--label-smoothing", "0.1"]),
    ("dpo", ["--length-normalised", "--beta", "5"]),
    ("dpo", ["--sft-weight", "1"]),
])
def test_a_run_with_the_relatives(script, argv, house):
    SCRIPTS[script].main(arguments(script, *RUN, *argv))
    check_run(script, Path("out"), "tiny/model")


@ON_POLICY
def test_the_kl_is_to_the_adapter_that_reference_names(script, house):
    """At step 0, and with --reward none, where every answer has the score 0."""
    model, _ = common.load_model("tiny", "cpu")
    lora.load_adapter(model, "teacher", house / "sft")
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["teacher"], std=2.0)
    lora.save_adapter(model, "teacher", "teacher", base="tiny/model")
    for out, argv, far in (("one", [], False), ("two", ["--reference", "teacher"], True)):
        SCRIPTS[script].main(arguments(
            script, *RUN, "--out", out, "--reward", "none", "--missing-eos-score", "none", *argv))
        row, _ = lines(Path(out) / "metrics.jsonl")
        assert row["score"] == row["score_std"] == 0 and (abs(row["kl"]) > 1e-4) == far
        assert json.loads(Path(out, "config.json").read_text())["reference"] == (
            "teacher" if far else None)


@ON_POLICY
@pytest.mark.parametrize("folder, says", [("nowhere", "nowhere"), ("TINY", "is a reward model")])
def test_a_reference_that_cannot_be_one(script, folder, says, house, capsys):
    folder = str(house / "reward_model") if folder == "TINY" else folder
    assert says in refusal(script, arguments(script, "--reference", folder), capsys)


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo"])
def test_a_long_prompt_is_cut_and_a_long_answer_dropped_and_counted(script, capsys, house):
    long = [{}, {"prompt": "q" * 500}, {"response": "a" * 500, "rejected": "a" * 500}] * 3
    rows = [{"prompt": f"q{i}", "response": f"yes {i}", "chosen": f"good {i}",
             "rejected": f"no {i}", "split": "test" if i > 8 else "train", **odd}
            for i, odd in enumerate(long + [{}] * 2)]
    data = write(Path("d.jsonl"), rows)
    SCRIPTS[script].main(arguments(script, *RUN, "--data", data))
    said = capsys.readouterr().out
    assert "6 rows (dropped: 3 longer than 96 tokens" in said
    check_run(script, Path("out"), "tiny/model")


@ON_POLICY
def test_ctrl_c_ends_in_one_line_that_names_the_folder(script, capsys, house):
    Path("r.py").write_text("import os, signal\ndef f(prompts, responses, rows):\n"
                            "    if os.path.exists('out'):\n"
                            "        signal.raise_signal(signal.SIGINT)\n"
                            "    return [0.0] * len(prompts)\n")
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            SCRIPTS[script].main(arguments(script, *RUN, "--reward", "r.py:f"))
    finally:
        signal.signal(signal.SIGINT, before)
    errors = [x for x in capsys.readouterr().err.split("\n") if x.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and "--resume out goes on" in errors[0]
    assert [p.name for p in Path("out").glob("*.safetensors")] == ["state.safetensors"]


@ON_POLICY
def test_no_answer_that_ends_and_scores_without_differences_are_told(script, capsys, house):
    """A7: nothing can be learnt from them, and nothing else would say so."""
    Path("r.py").write_text("def f(prompts, responses, rows): return [0.0] * len(prompts)\n")
    SCRIPTS[script].main(arguments(script, *RUN, "--reward", "r.py:f"))
    said = capsys.readouterr().out
    assert lines(Path("out/metrics.jsonl"))[0]["eos_rate"] == 0
    assert "no answer ended by itself" in said and "all 4 answers have the score -10" in said
    assert said.count("have the score") == 1  # said once, and not at every step


def test_rows_without_a_split_are_enough_if_there_are_two(house):
    rows = [{"prompt": f"q{i}", "response": "yes"} for i in range(2)]
    sft.main(arguments("sft", *RUN, "--data", write(Path("d.jsonl"), rows)))
    check_run("sft", Path("out"), "tiny/model")


def test_folders_of_runs_are_numbered(house):
    for _ in range(3):
        sft.main(arguments("sft", *RUN[:-2]))
    assert sorted(p.name for p in Path("runs").iterdir()) == ["sft", "sft-2", "sft-3"]
    assert json.loads(Path("runs/sft-2/config.json").read_text())["out"] == "runs/sft-2"


def test_curves_are_drawn_when_asked_for(house):
    pytest.importorskip("matplotlib")
    sft.main(arguments("sft", *RUN, "--plot"))
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo"])
def test_a_step_is_that_of_the_whole_batch_however_it_is_cut(script, house):
    """Rows of all lengths; the default of tiny leaves one row over."""
    data = write(Path("data.jsonl"), [
        {"prompt": f"q{i}", "response": "yes" * (i + 1), "chosen": "good" * (i + 1),
         "rejected": "no" * (10 - i), "split": "train" if i else "test"} for i in range(10)])
    runs = {}
    for rows in ("", "1", "3", "9"):
        argv = ["--data", data, "--steps", "1", "--batch-size", "9", "--out", f"o{rows}"]
        argv += ["--micro-batch-size", rows] if rows else []
        SCRIPTS[script].main(arguments(script, *argv))
        [row] = lines(Path(f"o{rows}", "metrics.jsonl"))
        runs[rows] = [row["loss"], row["grad_norm"]]
    assert runs[""] == pytest.approx(runs["9"], rel=1e-4)
    assert runs["1"] == pytest.approx(runs["9"], rel=1e-4)
    assert runs["3"] == pytest.approx(runs["9"], rel=1e-4)


@ON_POLICY
def test_a_step_is_that_of_the_whole_batch_however_its_answers_are_cut(script, house):
    """8 answers in pieces of 3: the last is smaller, and a group of 4 is split. With no score for a
    missing EOS every answer has the one that the function gave it, though none has ended."""
    Path("r.py").write_text(COUNT)
    found = {}
    for size in ("3", "8"):
        SCRIPTS[script].main(arguments(
            script, "--steps", "1", "--batch-size", "8", "--micro-batch-size", size, "--out", size,
            "--reward", "r.py:letters", *NONE[script],
            *(["--group-size", "4"] if script == "grpo" else [])))
        [found[size]] = lines(Path(size, "metrics.jsonl"))
        del found[size]["seconds"], found[size]["log_ratio_max"]  # rounding and nothing else
    assert found["3"] == pytest.approx(found["8"], rel=1e-3, abs=1e-6)
    assert found["8"]["grad_norm"] > 0 and found["8"]["score_std"] > 0
    assert found["8"]["eos_rate"] == 0
    for sample in lines(Path("8/samples.jsonl")):
        assert sample["score"] == pytest.approx(sum(map(ord, sample["response"])) / 100, rel=1e-4)


# ------------------------------------------------------------------------------ cli.export


def command(*argv):
    export.main([*argv, "--device", "cpu"])


@pytest.mark.parametrize("argv, says", [
    (["merge", "--adapter", "ADAPTER"], "--out"),
    (["merge", "--adapter", "ADAPTER", "--out", "there"], "there"),
    (["merge", "--adapter", "nowhere", "--out", "new"], "nowhere"),
    (["merge", "--adapter", "ADAPTER", "--out", "new", "--model", "other"], "does not fit"),
    (["unmerge", "--adapter", "ADAPTER"], "unmerge"),
    (["merge", "--out", "new"], "--adapter"),
    (["inspect", "--adapter", "there"], "there"),
    (["inspect", "--adapter", "ADAPTER", "--model", "./no/such/folder"], "no/such/folder"),
])
def test_a_merge_that_cannot_be_ends_in_one_line_and_writes_nothing(argv, says, capsys, house):
    Path("there").mkdir()
    other = LlamaConfig(vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2)
    LlamaForCausalLM(other).save_pretrained("other")
    byte_tokenizer().save_pretrained("other")
    with pytest.raises(SystemExit) as end:
        command(*(str(house / "sft") if a == "ADAPTER" else a for a in argv))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error
    assert sorted(p.name for p in Path().iterdir()) == ["other", "there"]
    assert not any(Path("there").iterdir())


def test_inspect_shows_each_layer_and_the_head(house, capsys):
    command("inspect", "--adapter", str(house / "reward_model"))
    said = capsys.readouterr().out
    target = TARGETS["gpt2" if "gpt2" in house.name else "llama"][0]
    assert said.count(target) == 2 and "and a scalar head" in said
    command("inspect", "--adapter", str(house / "sft"))
    assert "scalar head" not in capsys.readouterr().out


def test_a_merged_reward_model_is_a_reward_for_the_next_run(house):
    command("merge", "--adapter", str(house / "reward_model"), "--out", "scorer")
    assert sorted(p.name for p in Path().iterdir()) == ["scorer"]
    ppo.main(arguments("ppo", *RUN, "--reward", "scorer"))
    check_run("ppo", Path("out"), "tiny/model")


# ------------------------------------------------------------------------------ cli.chat


def said(capsys, *argv):
    """What a chat prints."""
    chat.main(["--device", "cpu", "--max-new-tokens", "6", *argv])
    out, error = capsys.readouterr()
    assert not error
    return out


@pytest.mark.parametrize("adapter", [False, True])
def test_chat_prints_the_answer_alone(adapter, capsys, house):
    """The likeliest tokens, by the bare base or its adapter."""
    model, tokenizer = common.load_model("tiny", "cpu")
    name = None
    if adapter:
        name = "adapter"
        lora.load_adapter(model, name, house / "sft")
        torch.manual_seed(3)
        for p in lora.adapter_parameters(model, name):
            p.data.normal_()
        lora.save_adapter(model, name, "adapter", base="tiny/model")
    with lora.use_adapter(model, name):
        [expected], _ = chat.answer(model, tokenizer, ["Why?"], 6)
        assert expected
    argv = ["--adapter", "adapter"] if adapter else ["--adapter", "none"]
    assert said(capsys, "--prompt", "Why?", "--temperature", "0", *argv) == expected + "\n"


def test_a_chat_without_a_model_takes_that_of_its_adapter(capsys, house, monkeypatch):
    model, _ = common.load_model(str(house / "model"), "cpu")
    lora.add_adapter(model, "new", rank=4)
    lora.save_adapter(model, "new", "adapter", base=str(house / "model"))
    monkeypatch.setattr(common, "TINY", Path("nowhere"))
    capsys.readouterr()
    assert said(capsys, "--adapter", "adapter", "--prompt", "q0")


def test_a_seed_of_a_chat_repeats_its_answer_and_another_does_not(capsys, house):
    one, two, three = (said(capsys, "--prompt", "Why?", "--temperature", "2", "--seed", seed)
                       for seed in ("5", "5", "6"))
    assert one == two != three


def test_a_conversation_sees_all_turns_and_ends_with_an_empty_line_or_the_end(
        capsys, house, monkeypatch):
    seen, real = [], common.encode_prompt

    def encode_prompt(tokenizer, prompt):
        seen.append([(turn["role"], turn["content"]) for turn in prompt])
        return real(tokenizer, prompt)

    monkeypatch.setattr(common, "encode_prompt", encode_prompt)
    for typed in ("One?\nTwo?\n\nThree?\n", "One?\nTwo?"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        seen.clear()
        out = said(capsys, "--temperature", "0")
        assert len(seen) == 2 and seen[0] == [("user", "One?")]
        assert [role for role, _ in seen[1]] == ["user", "assistant", "user"]
        (_, first), (_, answer), (_, last) = seen[1]
        assert (first, last) == ("One?", "Two?") and answer and f"{answer}\n" in out
        assert out.count("> ") == 3  # the third is ended by an empty line, or by the end


def test_a_chat_with_a_merged_model_says_what_the_adapter_says(capsys, house):
    adapted = said(capsys, "--prompt", "Why?", "--temperature", "0", "--adapter",
                   str(house / "sft"))
    command("merge", "--adapter", str(house / "sft"), "--out", "merged")
    capsys.readouterr()
    assert said(capsys, "--prompt", "Why?", "--temperature", "0", "--model", "merged") == adapted


@pytest.mark.parametrize("argv, says", [
    (["--no-such-flag"], "--no-such-flag"),
    (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--max-new-tokens", "1024"], "--max-new-tokens"),
    (["--max-new-tokens", "50", "--max-length", "50"], "--max-new-tokens"),
    (["--seed", "-1"], "--seed"),
    (["--device", "abacus"], "--device"),
    (["--adapter", "nowhere"], "nowhere"),
    (["--model", "./no/such/folder"], "no/such/folder"),
    (["--model", "empty"], "empty"),
])
def test_bad_input_to_a_chat_ends_in_one_line(argv, says, capsys, house):
    Path("empty").mkdir()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        chat.main(["--prompt", "Why?", "--max-new-tokens", "6", *argv])
    out, error = capsys.readouterr()
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert says in error and not out


def test_a_chat_whose_template_refuses_the_prompt_ends_in_one_line(capsys, house):
    shutil.copytree(house / "model", "model")
    byte_tokenizer("{{ raise_exception('no chat') }}" + CHAT).save_pretrained("model")
    with pytest.raises(SystemExit) as end:
        chat.main(["--model", "model", "--prompt", "Why?"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "no chat" in error


# ------------------------------------------------------------------------------ the README

ELSEWHERE = {"-m pytest": "", "docs/reinforce.py": "test_figures.py",
             "docs/side_by_side.py": "test_side_by_side.py", "benchmarks/compare.py": "test_draw.py",
             "benchmarks/closed_form.py": "test_closed_form.py"}


@pytest.mark.parametrize("house", ["llama"], indirect=True)
def test_the_commands_of_the_readme_run_one_after_another(house, monkeypatch):
    """All of them, from top to bottom, in one folder, with the stand-in for tiny/ and for a model
    and data of the hub."""
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    answers = itertools.chain(["hello", ""], itertools.repeat("a"))
    text = (ROOT / "README.md").read_text()
    Path("reward.py").write_text(text.partition("    # reward.py")[2].partition("\n\n")[0]
                                 .partition("\n")[2].replace("\n    ", "\n").strip())
    shorter = ["--steps", "1", "--batch-size", "4"]
    hub = {"Qwen/Qwen2.5-0.5B": str(house / "model"),
           "databricks/databricks-dolly-15k": str(house / "demonstrations.jsonl"),
           "smollm2": str(house / "model"), "tasks/sums.py": str(ROOT / "tasks" / "sums.py")}
    commands = re.findall(r"python ((?:-m |\S+\.py)[^\n`|#&]*)", text)
    assert len(commands) > 15
    for line in commands:
        argv = [hub.get(word, word) for word in line.split("    ")[0].split()]
        if argv[0] == "-m" and argv[1].startswith("cli."):
            module = importlib.import_module(argv[1])
            more = [] if argv[1] == "cli.export" else ["--device", "cpu", "--max-new-tokens", "4"]
            if argv[1] == "cli.collect":
                with pytest.raises(SystemExit, match="0"):
                    module.main([*argv[2:], *more, "--pairs", "8"])
            else:
                module.main([*argv[2:], *more])
        elif argv[0].removesuffix(".py") in SCRIPTS:
            script = argv[0].removesuffix(".py")
            SCRIPTS[script].main([*argv[1:], *arguments(script, *shorter)])
        else:
            known = next(file for start, file in ELSEWHERE.items() if line.startswith(start))
            assert (ROOT / "tests" / known).exists()
    assert {"a", "b", "c", "ppo", "sft", "dpo"} <= {path.name for path in Path("runs").iterdir()}
    assert Path("merged/model.safetensors").is_file()
