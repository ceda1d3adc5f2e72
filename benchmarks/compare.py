"""DPO, PPO, TRPO and GRPO side by side on the tiny world, with best-of-n and plain SFT.

    python benchmarks/compare.py            all; what has run from this tiny/ is not run again
    python benchmarks/compare.py --table    trains nothing: prints and writes what has run so far
    python benchmarks/compare.py --quick    a few steps, one seed: to see that it works

All start from tiny/sft and take 200 steps. PPO, TRPO and GRPO learn from 8 sampled answers a step,
DPO from 8 labelled pairs. Three seeds with otherwise default flags, seed 0 with another --beta, and
one PPO run without a KL penalty that goes on for too long. Beside them stands what a sceptic asks
for: SFT on good demonstrations alone, which are friendly and answer what they are asked. Every
policy is judged from outside by tiny/judge.py, on held-out prompts: by the reward model that PPO,
TRPO and GRPO were trained on (score) and by the hidden preference it never saw (gold).

Runs go to runs/compare and the numbers to benchmarks/compare.json. From them
`python docs/figures.py` writes the tables of the pages, and `python docs/draw.py --record curves`
draws the pictures. --jobs runs train at a time, each on one thread.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCRIPTS = ("dpo", "ppo", "trpo", "grpo")
ANOTHER_BETA = {"trpo": 0.0, "ppo": 0.0, "grpo": 0.0, "dpo": 0.1}  # those that take longest first
COLUMNS = ("score", "gold", "KL", "answered", "untaught", "declined", "together", "damaged",
           "top answer", "stops", "tokens")
BEST_OF = (4, 16, 64)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def plan(args, folder):
    """{name: command line} of all training runs, the longest first: no core waits at the end."""
    steps, seeds = (14, (0,)) if args.quick else (200, (0, 1, 2))
    runs = {"ppo-long": ["ppo.py", "--beta", "0", "--steps", str(2 * steps),
                         "--save-every", str(math.ceil(steps / 5))]}
    for script, beta in ANOTHER_BETA.items():
        same = [f"{script}.py", "--steps", str(steps), "--batch-size", "8"]
        runs |= {f"{script}-seed{seed}": [*same, "--seed", str(seed)] for seed in seeds}
        if not args.quick:
            runs[f"{script}-beta{beta:g}"] = [*same, "--beta", str(beta)]
    from tiny import build  # here, for it loads torch, and docs/figures.py needs only table()
    good = folder / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in build.good_demonstrations()))
    runs["sft-good"] = ["sft.py", "--data", os.path.relpath(good, ROOT)]
    return runs


def origin(*command):
    """What a result belongs to: its command, and the weights that tiny/ has now."""
    digest = hashlib.sha1()
    for path in sorted((ROOT / "tiny").glob("*/*.safetensors")):
        digest.update(path.read_bytes())
    return [*command, digest.hexdigest()]


def is_there(record, of):
    return record.is_file() and json.loads(record.read_text()).get("of") == of


def train(name, argv, folder, prompts):
    """Runs a script, unless its result is there, and has its policies judged."""
    out, record, of = folder / name, folder / f"{name}.json", origin(*argv)
    if is_there(record, of):
        return
    shutil.rmtree(out, ignore_errors=True)
    with open(folder / f"{name}.log", "w") as log:
        done = subprocess.run([sys.executable, *argv, "--out", str(out)], cwd=ROOT, env=ONE_THREAD,
                              stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"error: {name} failed; see {folder / name}.log")
    adapters = sorted(out.glob("step-*"), key=lambda p: int(p.name[5:])) or [out]
    found = {Path(k).name: v for k, v in judged("--prompts", prompts, *adapters).items()}
    last = list(found.values())[-1]
    record.write_text(json.dumps({"of": of, **last, "steps": found}, indent=1))


def judged(*flags):
    """{name: numbers} of tiny/judge.py, from a process of its own."""
    done = subprocess.run([sys.executable, "tiny/judge.py", "--json", *map(str, flags)], cwd=ROOT,
                          check=True, capture_output=True, text=True, env=ONE_THREAD)
    return json.loads(done.stdout)


def best_of(folder, prompts):
    """{n: judge's numbers} for the answer that the reward model likes best among n of the SFT's, on
    half of the prompts. 1 is the SFT model itself, judged as every policy is."""
    record, flags = folder / "best-of.json", ("--prompts", prompts // 2, "--best-of", *BEST_OF)
    of = origin(*flags)
    if not is_there(record, of):
        [sft] = judged("--prompts", prompts, "tiny/sft").values()
        best = {name.split()[-1]: stats for name, stats in judged(*flags).items()}
        record.write_text(json.dumps({"of": of, "found": {"1": sft, **best}}))
    return {int(n): stats for n, stats in json.loads(record.read_text())["found"].items()}


# ------------------------------------------------------------------------------ table


def seeds(runs, script):
    """The runs of a script with its defaults, one per seed."""
    return [run for name, run in runs.items() if name.startswith(f"{script}-seed")]


def spread(values):
    """Mean ± standard deviation, or the one value."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(results, best, columns=COLUMNS):
    """The comparison as a Markdown table; ± is the standard deviation over seeds. The KL of the
    best of n is its bound log n - (n - 1) / n."""
    rows = [("", *columns), ("---",) * (len(columns) + 1)]
    for n, stats in best.items():
        n = int(n)  # in JSON it is a string
        stats = {**stats, "KL": math.log(n) - (n - 1) / n}
        rows.append(("SFT" if n == 1 else f"best of {n}",
                     *(f"{stats[c]:.2f}" if c in stats else "" for c in columns)))
    if "sft-good" in results:
        rows.append(("SFT on good answers", *(f"{results['sft-good'][c]:.2f}" for c in columns)))
    for script in SCRIPTS:
        if found := seeds(results, script):
            rows.append((script.upper(), *(spread([r[c] for r in found]) for c in columns)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# ------------------------------------------------------------------------------ command


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--quick", action="store_true", help="14 steps, one seed, results to runs/quick")
    p.add_argument("--table", action="store_true", help="train nothing, print what is there")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folder = ROOT / "runs" / ("quick" if args.quick else "compare")
    folder.mkdir(parents=True, exist_ok=True)
    runs, prompts = plan(args, folder), 32 if args.quick else 384
    if args.table:
        runs = {name: argv for name, argv in runs.items()
                if is_there(folder / f"{name}.json", origin(*argv))}
        if not runs:
            raise SystemExit(f"error: no run of this tiny/ in {folder}; "
                             "docs/choosing.md has a table")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(best_of, folder, prompts)]
        jobs += [pool.submit(train, n, argv, folder, prompts) for n, argv in runs.items()]
        best, *_ = [job.result() for job in tqdm(jobs)]
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in runs}
    text = table(results, best)
    print(text)
    target = folder if args.quick else ROOT / "benchmarks"
    (target / "compare.json").write_text(
        json.dumps({"best of": best, "runs": results}, indent=1) + "\n")
    if not args.quick:
        print("to draw learning curves, frontier and over-optimisation: "
              "python docs/draw.py --record curves")


if __name__ == "__main__":
    main()
