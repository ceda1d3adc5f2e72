"""What each script's most important hyper-parameters do: one at a time is turned down or up.

    python benchmarks/turn.py             all runs, two at a time; what has run is not run again
    python benchmarks/turn.py ppo dpo     only these scripts

Each run has 100 steps and the default of everything else, with the tiny model and seed 0.
tiny/judge.py judges all but those of reward_model on held-out prompts. The table that the script
prints is kept, too, and the means of the last 20 steps, which show what went too far. The numbers
go to benchmarks/turn.json, from which docs/figures.py writes a table on the page of each script.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compare  # noqa: E402

RECORD = ROOT / "benchmarks" / "turn.json"
STEPS = 100
TURN = {  # flag: (down, up); the default is between them
    "sft": {"lr": (3e-4, 3e-2), "batch-size": (8, 64), "lora-rank": (2, 64)},
    "reward_model": {"lr": (1e-4, 1e-2), "batch-size": (8, 64), "center": (0.0, 0.1)},
    "ppo": {"lr": (1e-4, 5e-3), "beta": (0.0, 0.5), "ppo-epochs": (1, 8)},
    "grpo": {"lr": (1e-4, 5e-3), "beta": (0.0, 0.5), "group-size": (2, 8)},
    "trpo": {"max-kl": (1e-4, 1e-2), "beta": (0.0, 0.5), "cg-iters": (2, 20)},
    "dpo": {"lr": (1.5e-4, 1e-2), "beta": (0.05, 2.0), "batch-size": (4, 32)},
}
WATCHED = ("loss", "grad_norm", "score", "kl", "entropy", "eos_rate", "length", "approx_kl",
           "clip_fraction", "ratio_max", "explained_variance", "zero_std_groups", "kl_step",
           "backtracks", "accuracy", "margin", "logp_chosen", "logp_rejected")


def plan(scripts):
    """{name: command line} of all runs of some scripts."""
    runs = {}
    for script in scripts:
        same = [f"{script}.py", "--steps", str(STEPS)]
        runs[script] = same
        for flag, values in TURN[script].items():
            runs |= {f"{script} {flag} {x:g}": [*same, f"--{flag}", f"{x:g}"] for x in values}
    return runs


def table(text):
    """{name: (before, after)} of the table that a script prints at its end."""
    rows = [line.rsplit(None, 2) for line in text.splitlines() if len(line.split()) >= 3]
    found = {}
    for name, *numbers in rows:
        try:
            found[name.strip()] = [float(x) for x in numbers]
        except ValueError:
            continue
    return found


def run(name, argv, folder):
    """Trains one run, judges it, and returns what is to be kept of it."""
    out = folder / name.replace(" ", "_")
    if not (out / "printed.txt").is_file():  # written last: what was cut short runs again
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run([sys.executable, *argv, "--out", str(out)], cwd=ROOT, text=True,
                              env=compare.ONE_THREAD, capture_output=True)
        if done.returncode:
            return {"of": compare.origin(*argv), "error": done.stderr.strip().split("\n")[-1]}
        (out / "printed.txt").write_text(done.stdout)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = {key: mean(row[key] for row in rows[-20:]) for key in WATCHED if key in rows[-1]}
    found = {"of": compare.origin(*argv), "last": last,
             "table": table((out / "printed.txt").read_text())}
    if not argv[0].startswith("reward_model"):
        found["judged"], = compare.judged("--prompts", 256, out).values()
    return found


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("scripts", nargs="*", help=f"of {', '.join(TURN)} (all)")
    scripts = p.parse_args(argv).scripts or list(TURN)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    folder = ROOT / "runs" / "turn"
    os.makedirs(folder, exist_ok=True)
    todo = {name: argv for name, argv in plan(scripts).items()
            if record.get(name, {}).get("of") != compare.origin(*argv)}
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run, name, argv, folder) for name, argv in todo.items()}
        for name, job in jobs.items():
            record[name] = job.result()
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
            judged = record[name].get("judged") or record[name].get("table", {})
            print(name, {key: judged[key] for key in ("gold", "score", "KL", "answered", "accuracy")
                         if key in judged}, record[name].get("error", ""), flush=True)


if __name__ == "__main__":
    main()
