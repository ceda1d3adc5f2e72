"""K processes do what one does: the same parameters after five steps, for every script."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from byte_tokenizer import SIZE, byte_tokenizer
from conftest import ROOT, TARGETS, toy
from safetensors.torch import load_file

import common
import dpo
import grpo
import lora
import ppo
import reward_model
import sft
import trpo

ROWS = [{"prompt": f"question {i}", "response": "yes" * (1 + i % 3), "chosen": f"good {i}",
         "rejected": "no" * (1 + i % 4)} for i in range(12)]
SAME = {"steps": 5, "lr": 1e-3, "max_length": 96, "lora_rank": 4}
ON_POLICY = {**SAME, "max_new_tokens": 8, "missing_eos_score": None}
RUNS = {
    "sft": (sft, {**SAME, "batch_size": 5, "max_new_tokens": 8}),
    "reward_model": (reward_model, {**SAME, "batch_size": 5}),
    "reward_model, one pair": (reward_model, {**SAME, "batch_size": 1}),
    "dpo": (dpo, {**SAME, "max_new_tokens": 8, "batch_size": 5, "micro_batch_size": 2}),
    "ppo": (ppo, {**ON_POLICY, "batch_size": 6}),
    "ppo by head": (ppo, {**ON_POLICY, "batch_size": 6, "micro_batch_size": 2, "kl_target": 1.0}),
    "trpo": (trpo, {**ON_POLICY, "batch_size": 6, "max_kl": 0.001}),
    "trpo by head": (trpo, {**ON_POLICY, "batch_size": 3, "max_kl": 0.001, "micro_batch_size": 1}),
    "grpo": (grpo, {**ON_POLICY, "batch_size": 12, "group_size": 3}),
    "grpo by head": (grpo, {**ON_POLICY, "batch_size": 8, "group_size": 4, "resample": 1,
                            "loss": "dapo", "minibatches": 2, "micro_batch_size": 2}),
}


def letters(prompts, responses, rows):
    return [sum(map(ord, response)) % 7 / 7 for response in responses]


def train(kind, name):
    """(parameters of all adapters after five steps, rows of metrics.jsonl, who was asked how often)."""
    script, numbers = RUNS[name]
    model, tokenizer = toy(kind, SIZE), byte_tokenizer()
    targets = ",".join(TARGETS[kind])
    config = script.Config(**numbers, lora_targets=targets)
    asked = []

    def reward(prompts, responses, rows):
        asked.append(len(rows))
        return letters(prompts, responses, rows)

    if name.endswith("by head"):
        torch.manual_seed(1)
        lora.add_adapter(model, "reward", 4, targets=targets, trainable=False)
        lora.add_head(model, "reward").requires_grad_(False)
        reward = "reward"
    rewards = [] if script in (sft, reward_model, dpo) else [reward]
    history = script.train(model, tokenizer, ROWS, *rewards, config)
    found = {f"{adapter} {i}": p.detach() for adapter in sorted(lora.names(model))
             for i, p in enumerate(lora.adapter_parameters(model, adapter))}
    return found, history, asked


def work(rank, size, kind, port, folder):
    """One process of `size`: trains by every script, and saves what came out."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.save({name: train(kind, name) for name in RUNS}, folder / f"{kind}-{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(kind, rank): {name: what train returned}} of two processes; three for the Llama."""
    folder, out = tmp_path_factory.mktemp("processes"), {}
    torch.multiprocessing.set_forkserver_preload([__name__])  # what all of them import, once
    for kind, size in (("gpt2", 2), ("llama", 3)):
        torch.multiprocessing.start_processes(
            work, (size, kind, free_port(), folder), nprocs=size, start_method="forkserver")
        for rank in range(size):
            out[kind, rank] = torch.load(folder / f"{kind}-{rank}.pt")
    return out


@pytest.mark.parametrize("name", list(RUNS))
def test_several_processes_end_where_one_does(name, kind, found):
    parameters, history, asked = train(kind, name)
    size = 2 if kind == "gpt2" else 3
    # Each answer is scored by one process.
    assert sum(sum(found[kind, rank][name][2]) for rank in range(size)) == sum(asked)
    for rank in range(size):
        others, rows, _ = found[kind, rank][name]
        for key, value in parameters.items():
            assert (value - others[key]).abs().max() <= 1e-5 * max(1, value.abs().max()), key
        for row, other in zip(history, rows, strict=True):
            assert set(row) == set(other)
            for key in set(row) - {"seconds"}:
                assert other[key] == pytest.approx(row[key], rel=2e-3, abs=2e-4), key

    moved = [value.abs().max() for key, value in parameters.items() if key.startswith("policy")]
    assert name.startswith("reward_model") or max(moved) > 1e-3


def test_shares_are_disjoint_and_whole(monkeypatch):
    for size in (1, 2, 3, 7):
        parts = []
        for rank in range(size):
            monkeypatch.setattr(common, "processes", lambda r=rank: (r, size))
            parts += common.share(range(5))
        assert sorted(parts) == [0, 1, 2, 3, 4]


def launch(folder, *argv, **more):
    """Two processes under torchrun, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "ppo.py"), "--device", "cpu", "--eval-size", "4", *argv]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def test_torchrun_writes_one_run_that_goes_on_and_equals_that_of_one_process(tmp_path):
    # Adam divides a gradient by its size, and so makes a step of the size of --lr of rounding, too.
    small = ["--batch-size", "4", "--max-new-tokens", "8", "--steps", "3", "--lr", "1e-4"]
    process = launch(tmp_path, *small, "--out", "two")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("saved two") == 1 and not (tmp_path / "runs").exists()
    subprocess.run([sys.executable, str(ROOT / "ppo.py"), "--device", "cpu", "--eval-size", "4", *small,
                    "--out", "one"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    rows, samples = ([[json.loads(line) for line in (tmp_path / name / file).read_text().splitlines()]
                      for name in ("one", "two")] for file in ("metrics.jsonl", "samples.jsonl"))
    for row, other in zip(*rows, strict=True):
        assert all(other[key] == pytest.approx(row[key], rel=2e-3, abs=2e-4)
                   for key in row if key != "seconds")
    assert [row["response"] for row in samples[0]] == [row["response"] for row in samples[1]]


def test_a_process_that_dies_takes_the_others_with_it_and_leaves_what_was_saved(tmp_path):
    reward = tmp_path / "r.py"
    reward.write_text(
        "import os\ncalls = []\n"
        "def f(prompts, responses, rows):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 13 and not os.path.exists('died'):\n"
        "        open('died', 'w')\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return [len(r) / 10 for r in responses]\n")
    argv = ["--batch-size", "4", "--max-new-tokens", "4", "--steps", "12", "--reward", "r.py:f"]
    start = time.time()
    process = launch(tmp_path, *argv, "--out", "cut")
    _, err = process.communicate(timeout=240)
    assert "gloo" not in err  # the other process ends with a line, not with a traceback
    assert process.returncode != 0 and time.time() - start < 90
    assert (tmp_path / "cut" / "state.safetensors").exists()
    process = launch(tmp_path, "--resume", "cut")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "goes on with step 10 of 12" in out
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
