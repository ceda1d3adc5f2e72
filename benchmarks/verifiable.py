"""SmolLM2-135M-Instruct learns to add: the sums of tasks/sums.py, by GRPO and by its rivals.

    python benchmarks/verifiable.py             all runs; what has run is not run again
    python benchmarks/verifiable.py grpo-seed0  only this one

Every method samples the same number of answers, 32 of at most 12 tokens in each step. GRPO: three
seeds, as `python grpo.py --model smollm2 --data tasks/sums.py` runs it. PPO: no reward model, so
its critic starts at 0. REINFORCE: the mean of the other answers as baseline, no division by the
spread. SFT: on those of as many answers of the model itself that are right. Without training: the
model as it is (untrained), and with four solved sums before the question (few-shot). Then what a
flag changes: the advantage (raw, none), replacing groups without spread (resample), and the layers
and learning rate of the adapter.

Each is judged on held-out sums: the share of right greedy answers, of right samples (pass@1), and
of sums of which one in eight samples is right (pass@8). All of it goes to
benchmarks/verifiable.json. Each run takes about ten minutes on 2 CPU cores, and PPO
some five times as long.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import grpo  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from cli import data, flags, models  # noqa: E402
from cli.chat import answer  # noqa: E402
from tasks import sums  # noqa: E402

TASK = str(ROOT / "tasks" / "sums.py")
RECORD = ROOT / "benchmarks" / "verifiable.json"
TOKENS = sums.FLAGS["max_new_tokens"]
RUNS = {
    **{f"grpo-seed{seed}": (grpo, {"seed": seed}) for seed in (0, 1, 2)},
    "ppo": (ppo, {}), "reinforce": (grpo, {"adv": "loo", "loss": "dr_grpo"}), "sft": (sft, {}),
    "untrained": (None, {"shots": 0}), "few-shot": (None, {"shots": 4}),
    "raw": (grpo, {"adv": "raw"}), "none": (grpo, {"adv": "none"}),
    "resample": (grpo, {"resample": 2}),
    "q,v-lr0.0002": (grpo, {"lr": 2e-4}),
    **{f"all-linear-lr{lr:g}": (grpo, {"lora_targets": "all-linear", "lr": lr})
       for lr in (2e-4, 5e-4)},
}


def configure(script, numbers):
    """The Config that the command line makes of `numbers` and the flags that suit the task."""
    argv = ["--model", "smollm2", "--data", TASK]
    for name, value in numbers.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    reward = None if script is sft else "needed"
    _, config = flags.read(script.__name__, "", script.Config, script.TINY, argv, reward)
    return config


def judge(model, tokenizer, rows, adapter, shots=(), k=8):
    """Greedy accuracy, pass@1 and pass@k of held-out sums, and a few greedy answers. shots: the
    messages before each question."""
    prompts = [[*shots, {"role": "user", "content": row["prompt"]}] for row in rows]
    with lora.use_adapter(model, adapter):
        greedy, _ = answer(model, tokenizer, prompts, TOKENS)
        generator = torch.Generator().manual_seed(1)
        drawn, _ = answer(model, tokenizer, prompts, TOKENS, 0.7, generator=generator, G=k)
    many = [row for row in rows for _ in range(k)]
    right = torch.tensor(sums.score(None, drawn, many)).view(-1, k)
    return {"greedy": sum(sums.score(None, greedy, rows)) / len(rows),
            "pass@1": right.mean().item(), f"pass@{k}": right.amax(1).mean().item(),
            "answers": dict(zip((row["prompt"] for row in rows[:6]), greedy))}


def right_answers(model, tokenizer, rows, config):
    """Data rows for SFT: the right ones among as many answers of the base as GRPO samples."""
    generator, found, G = torch.Generator().manual_seed(config.seed), [], sums.FLAGS["group_size"]
    for step in range(config.steps):
        drawn = [rows[i] for i in common.batch_rows(step, len(rows), config.batch_size // G, 0)]
        prompts = [row["prompt"] for row in drawn]
        texts, _ = answer(model, tokenizer, prompts, TOKENS, 0.7, generator=generator, G=G)
        many = [row for row in drawn for _ in range(G)]
        found += [{"prompt": row["prompt"], "response": text.strip()} for row, text, score
                  in zip(many, texts, sums.score(None, texts, many)) if score]
    return found


def run(name):
    """Trains one run and judges it; returns its record."""
    flags.quiet()
    script, numbers = RUNS[name]
    args = argparse.Namespace(device="cpu", dtype="fp32", trust_remote_code=False)
    model, tokenizer = models.open_model(args, "smollm2")
    train, test = data.load_data(TASK, ["prompt"])
    if script is None:
        shots = [turn for row in train[: numbers["shots"]] for turn in (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]})]
        return {"after": judge(model, tokenizer, test, None, shots)}
    config = configure(script, numbers)
    clock = time.time()
    if script is sft:
        found = right_answers(model, tokenizer, train, config)
        print(f"{len(found)} right answers")
        history = sft.train(model, tokenizer, found, config)
    else:
        history = script.train(model, tokenizer, train, sums.score, config)
    seconds = time.time() - clock
    curves = {key: [float(f"{row[key]:.4g}") for row in history]
              for key in ("score", "kl", "loss", "entropy", "eos_rate", "length", "dead_groups",
                          "zero_std_groups") if key in history[0]}
    return {"config": asdict(config), "seconds": round(seconds),
            "after": judge(model, tokenizer, test, "policy"), "curves": curves}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("names", nargs="*", help=f"of {', '.join(RUNS)} (all)")
    names = p.parse_args(argv).names or list(RUNS)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if len(names) > 1:  # each in a process of its own
        for name in names:
            if name not in record:
                subprocess.run([sys.executable, __file__, name], check=True)
        return
    [name] = names
    found = run(name)
    RECORD.write_text(json.dumps({**record, name: found}, indent=1) + "\n")
    print(name, {key: found["after"][key] for key in ("greedy", "pass@1", "pass@8")},
          found.get("seconds"))


if __name__ == "__main__":
    main()
