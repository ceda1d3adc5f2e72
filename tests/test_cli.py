"""The commands from outside: bad input ends in one line, a run writes what it promises."""

import functools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from byte_tokenizer import SIZE, byte_tokenizer
from conftest import TARGETS, toy
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
    monkeypatch.setattr(common.datasets.config, "HF_DATASETS_CACHE", folder / "cache")
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
    (["--batch-size", "8", "--micro-batch-size", "3"], "--micro-batch-size"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--data", "missing.parquet"], "missing.parquet"),
    (["--model", "some/model"], "--data"),
])
def test_a_bad_flag_is_named(script, argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(script, argv, capsys)


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo"])
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


# ------------------------------------------------------------------------------ bad files


@EVERY
def test_wrong_columns_are_listed_beside_the_accepted_ones(script, capsys, house):
    write(Path("d.jsonl"), [{"colour": "red"}] * 30)
    error = refusal(script, ["--data", "d.jsonl"], capsys)
    assert "colour" in error and "prompt, chosen, rejected" in error


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2\n", b"\x00\x01", b'{"prompt": "caf\xe9"}\n'])
def test_a_data_file_that_cannot_be_read(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
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
        common.main([*"--model tiny --adapter moved --prompt a --max-new-tokens 4".split()])
        assert capsys.readouterr().err.count("trained on the model other/model") == notes


@pytest.mark.parametrize("script", ["sft", "ppo", "trpo", "grpo", "dpo"])
def test_a_reward_model_does_not_become_a_policy(script, capsys, house):
    argv = arguments(script, "--adapter", str(house / "reward_model"))
    assert "is a reward model" in refusal(script, argv, capsys)


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(script, capsys, house):
    error = refusal(script, arguments(script, "--reward", "runs/reward_mode1"), capsys)
    assert error == "error: runs/reward_mode1: no such folder\n"


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


def test_an_adapter_of_the_output_head_is_refused(capsys, house):
    Path("bad").mkdir()
    config = (house / "sft/adapter_config.json").read_bytes()
    Path("bad/adapter_config.json").write_bytes(config)
    tensors = load_file(house / "sft/adapter_model.safetensors")
    width = next(A.shape[1] for key, A in tensors.items() if ".lora_A." in key)
    head = "base_model.model.lm_head.lora_{}.weight"
    tensors |= {head.format("A"): torch.ones(4, width), head.format("B"): torch.ones(SIZE, 4)}
    save_file(tensors, "bad/adapter_model.safetensors")
    assert "output head" in refusal("ppo", arguments("ppo", "--adapter", "bad"), capsys)


def test_a_refusal_gives_ctrl_c_back(capsys, house):
    refusal("ppo", arguments("ppo", "--adapter", "nowhere"), capsys)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    argv = ["--max-length", "3", "--max-new-tokens", "2"][: 4 if script == "sft" else 2]
    assert "--max-length" in refusal(script, argv, capsys)


# ------------------------------------------------------------------------------ bad rewards

REWARD = """
import math
def count(prompts, responses, rows): return [1.0] * (len(responses) + 1)
def none_at_all(prompts, responses, rows): return []
def nan(prompts, responses, rows): return [math.nan] * len(responses)
def infinite(prompts, responses, rows): return [math.inf] * len(responses)
def strings(prompts, responses, rows): return ["good"] * len(responses)
def nothing(prompts, responses, rows): pass
def two(prompts, responses): return [1.0] * len(responses)
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


@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module\n", "1 / 0\n"])
def test_a_reward_file_that_does_not_run_is_named(text, capsys, house):
    Path("r.py").write_text(text)
    assert "r.py" in refusal("ppo", arguments("ppo", "--reward", "r.py:f"), capsys)


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
ON_POLICY = {"score", "score_std", "kl", "entropy", "eos_rate", "length"}
KEYS = {
    "sft": ALWAYS,
    "reward_model": ALWAYS | {"accuracy", "margin"},
    "ppo": ALWAYS | ON_POLICY | {"ratio_max", "clip_fraction", "approx_kl", "explained_variance"},
    "trpo": ALWAYS | ON_POLICY | {"surrogate_gain", "backtracks", "kl_step"},
    "grpo": ALWAYS | ON_POLICY | {"ratio_max", "clip_fraction", "zero_std_groups"},
    "dpo": ALWAYS | {"accuracy", "margin", "logp_chosen", "logp_rejected"},
}
RUN = "--steps 2 --batch-size 4 --micro-batch-size 2 --lr 0.01 --out out".split()


def check_run(script, out, base):
    """What design section 4 promises of a run of two steps."""
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
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == base
    assert (adapter["task_type"] == "SEQ_CLS") == (script == "reward_model")
    assert (out / "adapter_model.safetensors").is_file()


@EVERY
def test_a_run_writes_what_it_promises_and_its_seed_repeats_it(script, capsys, house):
    for out in ("out", "again"):
        SCRIPTS[script].main(arguments(script, *RUN, "--out", out, "--save-every", "1"))
    assert "before" in capsys.readouterr().out
    check_run(script, Path("out"), "tiny/model")
    one, two = (lines(Path(out, "metrics.jsonl")) for out in ("out", "again"))
    for row in one + two:
        del row["seconds"]
    assert one == two
    model = toy("gpt2" if "gpt2" in house.name else "llama", SIZE)
    saved = {"s1": "out/step-1", "s2": "out/step-2", "end": "out", "again": "again"}
    for name, folder in saved.items():
        lora.load_adapter(model, name, folder)
    first, second, end, again = (lora.adapter_parameters(model, name) for name in saved)
    assert script == "grpo" or any(not torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(second, end, again))


@EVERY
def test_a_run_with_the_shipped_model(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = ["--max-length", "400"] + (["--max-new-tokens", "64"] if script == "grpo" else [])
    SCRIPTS[script].main(arguments(script, *RUN, *room))
    check_run(script, Path("out"), "tiny/model")
    assert any(row["grad_norm"] > 0 for row in lines(Path("out/metrics.jsonl")))


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo"])
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
    ("grpo", ["--loss", "dapo", "--adv", "loo", "--kl-in", "reward"]),
    ("grpo", ["--loss", "dr_grpo", "--adv", "none", "--kl", "k3-corrected"]),
    ("grpo", ["--loss", "gspo", "--clip-low", "3e-4", "--clip-high", "4e-4", "--kl", "k2"]),
    ("dpo", ["--loss", "ipo"]),
    ("dpo", ["--label-smoothing", "0.1"]),
])
def test_a_run_with_the_relatives(script, argv, house):
    SCRIPTS[script].main(arguments(script, *RUN, *argv))
    check_run(script, Path("out"), "tiny/model")


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo"])
def test_a_long_prompt_is_cut_and_a_long_answer_dropped_and_counted(script, capsys, house):
    long = [{}, {"prompt": "q" * 500}, {"response": "a" * 500, "rejected": "a" * 500}] * 3
    rows = [{"prompt": f"q{i}", "response": f"yes {i}", "chosen": f"good {i}",
             "rejected": f"no {i}", "split": "test" if i > 8 else "train", **odd}
            for i, odd in enumerate(long + [{}] * 2)]
    data = write(Path("d.jsonl"), rows)
    SCRIPTS[script].main(arguments(script, *RUN, "--data", data))
    said = capsys.readouterr().out
    kept = "6 demonstrations (3 dropped" if script == "sft" else "6 training pairs (dropped: 3 long"
    assert kept in said
    check_run(script, Path("out"), "tiny/model")


@pytest.mark.parametrize("script", ["ppo", "trpo", "grpo"])
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
    assert end.value.code == 2 and len(errors) == 1 and "out" in errors[0]
    assert [p.name for p in Path("out").glob("*.safetensors")] == []


# ------------------------------------------------------------------------------ lora.py


def command(*argv):
    lora.main([*argv, "--device", "cpu"])


@pytest.mark.parametrize("argv, says", [
    (["merge", "--adapter", "ADAPTER"], "--out"),
    (["merge", "--adapter", "ADAPTER", "--out", "there"], "there"),
    (["merge", "--adapter", "nowhere", "--out", "new"], "nowhere"),
    (["merge", "--adapter", "ADAPTER", "--out", "new", "--model", "other"], "does not fit"),
    (["unmerge", "--adapter", "ADAPTER"], "unmerge"),
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
    assert said.count(TARGETS["gpt2" if "gpt2" in house.name else "llama"][0]) == 2
    assert "and a scalar head" in said


def test_a_merged_reward_model_is_a_reward_for_the_next_run(house):
    command("merge", "--adapter", str(house / "reward_model"), "--out", "scorer")
    assert sorted(p.name for p in Path().iterdir()) == ["scorer"]
    ppo.main(arguments("ppo", *RUN, "--reward", "scorer"))
    check_run("ppo", Path("out"), "tiny/model")


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
