"""Runs what the README tells a newcomer to run, and keeps what there was to see.

    python benchmarks/first_run.py             all
    python benchmarks/first_run.py ppo grpo    only these, beside what the record has of the others

Each script once, alone, with its defaults on the tiny model: how long the whole command took, the
table of held-out prompts that it printed, and what the models before and after PPO answer to a few
prompts. All of it goes to benchmarks/first_run.json, from which docs/figures.py writes the README.
It takes about twenty minutes.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, RECORD = ROOT / "runs" / "first", ROOT / "benchmarks" / "first_run.json"
COMMANDS = {
    "sft": ["sft.py"], "reward_model": ["reward_model.py", "--adapter", "runs/first/sft"],
    "ppo": ["ppo.py", "--steps", "200"], "grpo": ["grpo.py", "--steps", "200"],
    "dpo": ["dpo.py", "--steps", "200"], "trpo": ["trpo.py", "--steps", "200"]}
PROMPTS = (  # all of them held out
    "Explain quantum computing to a 10-year-old.", "Do you know why a bee would sting me?",
    "How come there is no rainbow on most days?", "Tell me about vaccines.", "Tell me a joke.")


def run(*command):
    """What a command of this repository prints."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr}")
    return done.stdout


def table(text):
    """{name: [before, after]} of the table at the end of a script's output."""
    rows = text.rpartition("held-out rows")[2].splitlines()[1:]
    found = (re.fullmatch(r"(\w+) +(-?[\d.]+) +(-?[\d.]+)", row) for row in rows)
    return {row[1]: [float(row[2]), float(row[3])] for row in found if row}


def answer(adapter, prompt):
    return run("-m", "cli.chat", "--adapter", adapter, "--prompt", prompt, "--temperature", "0",
               "--max-new-tokens", "96").strip()


def main():
    names = sys.argv[1:] or list(COMMANDS)
    record = json.loads(RECORD.read_text()) if sys.argv[1:] else {}
    for name in names:
        command, clock = COMMANDS[name], time.time()
        shutil.rmtree(OUT / name, ignore_errors=True)
        text = run(*command, "--out", f"runs/first/{name}")
        record[name] = {"command": " ".join(command), "seconds": round(time.time() - clock),
                        "table": table(text)}
        print(name, record[name]["seconds"], "s")
    if "ppo" in names:
        adapters = {"base": "none", "sft": "tiny/sft", "ppo": "runs/first/ppo"}
        record["answers"] = {
            prompt: {who: answer(adapter, prompt) for who, adapter in adapters.items()}
            for prompt in PROMPTS}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
