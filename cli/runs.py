"""The folder of a run, what is written to it, and the tables that are printed."""

import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import common
from cli import flags
from cli import state as saved


SAVED = 10  # steps between saved states


def start(args, config, model, name, before):
    """(log, state): what `train` calls once per step, and what it goes on from (None: anew).

    before: (statistics, samples) of the model before training. The folder is --out, or the next
    free runs/<script>; it gets config.json (all flags and versions), before.json, and the two logs.
    With --resume the folder is there, and rows of steps that will be taken again are cut off."""
    first = common.processes()[0] == 0  # of several processes, it does all the writing
    state = saved.read(args.resume, model) if args.resume else None
    step = state["step"] if state else 0
    check_step(float(step), args.resume)
    if first:
        args.out = Path(args.resume) if args.resume else make_folder(args)
        if state is None:
            begin(args, config, before)
        else:
            saved.cut_logs(args.out, state)
            print(f"goes on with step {step} of {config.steps}")
    flags.RUN.update(out=args.out, training=step < config.steps)
    before_even = {"even": False}
    seed_rewards(config, step)

    def log(row, samples, state):
        check_numbers(row)
        done = row["step"] + 1
        flags.RUN["training"] = done < config.steps
        # Ctrl-C may reach several processes at different steps: they stop together.
        stop = common.add_up(float(flags.RUN["stop"]), largest=True)
        if first:
            write(row, samples, state, stop)
        seed_rewards(config, done)
        if stop:
            common.add_up(0.0)  # wait until the first process has saved: torchrun then ends all
            raise KeyboardInterrupt

    def write(row, samples, state, stop):
        append(args.out / "metrics.jsonl", row)
        save_samples(args, row["step"], samples[:1])
        if row["step"] == 0:
            for line in step_0(row, config):
                tqdm.write(line)
            if row.get("log_ratio_max", 0.0) > 1.0:  # bf16 alone makes 0.2
                raise ValueError(
                    f"the model {args.model} samples its tokens from another distribution than it "
                    f"scores them by (they differ by up to {row['log_ratio_max']:.1f} nats): its "
                    "family is not supported")
        # Without a difference between scores nothing can be learnt, and nothing else would say so.
        even = row.get("score_std") == 0
        if even and not before_even["even"]:
            tqdm.write(f"step {row['step']}: all {config.batch_size} answers have the score "
                       f"{row['score']:g}; a batch without differences teaches nothing")
        before_even["even"] = even
        done = row["step"] + 1
        # The adapter first: once the state says that a step is done, nothing of it may be missing.
        if args.save_every and done % args.save_every == 0:
            saved.write_adapter(args.out / f"step-{done}", model, name)
        if done % SAVED == 0 or done == config.steps or stop:
            saved.write(args.out, model, state)

    return log, state


def check_step(step, folder):
    """Raises ValueError unless all processes go on with one step: each reads its machine's copy."""
    if common.add_up(step, largest=True) != -common.add_up(-step, largest=True):
        raise ValueError(f"--resume {folder} is at another step on another machine; copy the "
                         "folder to all of them")


def seed_rewards(config, step):
    """The random numbers that a user's reward may draw: the same when the run goes on."""
    transformers.set_seed((config.seed + step) % 2**32)


def begin(args, config, before):
    """Writes what stands in the folder of a run before its first step. Raises ValueError where more
    steps are logged there than can be without a saved state."""
    log = args.out / "metrics.jsonl"
    if log.is_file() and len(log.read_text().splitlines()) > SAVED:
        raise ValueError(f"--resume {args.out}: {saved.FILE} is missing, so it cannot go on")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__}
    said = {**vars(args), **asdict(config), **versions, "out": str(args.out),
            "resume": None}
    for name in saved.LOGS:
        (args.out / name).write_text("")
    save_samples(args, 0, before[1])
    write_json(args.out / "before.json", before)
    write_json(args.out / "config.json", said)


def write_json(path, value):
    saved.write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def before(args):
    """(statistics, samples) of the model before training, of the run that goes on; else None."""
    path = Path(args.resume or "") / "before.json"
    try:
        return json.loads(path.read_text()) if args.resume and path.is_file() else None
    except ValueError as problem:
        raise ValueError(f"{path} is damaged: {problem}") from problem


def check_numbers(row):
    """Raises ValueError for a row of metrics.jsonl with a number that is not finite."""
    odd = [key for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    if odd:
        raise ValueError(
            f"step {row['step']}: {', '.join(odd)} is not a finite number, and what is trained may "
            "be spoilt; begin anew with a lower --lr, or --dtype fp32. What was saved before is "
            "kept")


def make_folder(args):
    """Makes the folder of the run: --out, or the next free runs/<script>."""
    try:
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            flags.check_free(Path(args.out))  # again: another run may have begun there since
            return Path(args.out)
        for i in itertools.count(1):
            folder = Path("runs") / (args.name + (f"-{i}" if i > 1 else ""))
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder
    except OSError as problem:
        raise ValueError(f"cannot make --out {args.out or folder}: {problem.strerror}") from problem


def step_0(row, config):
    """What to look at before the first update: does the scorer agree with the sampler?"""
    if "log_ratio_max" in row:
        yield (f"step 0, before any update: |log pi - log pi_old| is at most "
               f"{row['log_ratio_max']:.1e}; surprise {row['surprise']:.3f} of the sampled tokens, "
               f"entropy {row['entropy']:.3f} (z {row['surprise_z']:.1f})")
    if row.get("eos_rate") == 0:
        yield "step 0: no answer ended by itself; raise --max-new-tokens, or run sft.py first"
    if "zero_std_groups" in row:
        why = ""
        whole = config.minibatches == 1 and config.adv != "raw"  # whole groups, with a baseline
        if config.loss in ("grpo", "gspo") and whole:  # (GRPO.5)
            why = "advantages sum to 0 in a group, their gradients do not; "
        yield (f"loss {row['loss']:.1e}, grad norm {row['grad_norm']:.2f}: {why}watch score, not "
               "loss")
    if "kl_step" in row:
        yield (f"step 0: moved {row['kl_step']:.1e} nats per token ({config.max_kl:g} allowed), "
               f"{row['kl_step_response']:.3f} per answer, {row['backtracks']} trials failed")
    if "logp_chosen" in row:
        yield (f"step 0, before any update: loss {row['loss']:.4f} "
               f"(sigmoid: ln 2 = {math.log(2):.4f})")


def finish(args, config, model, name, before, after):
    """Saves the adapter, the samples after training and the curves; prints samples and table."""
    if common.processes()[0] > 0:
        return
    saved.write_adapter(args.out, model, name)
    save_samples(args, config.steps, after[1])
    for first, last in list(zip(before[1], after[1]))[:4]:
        if "response" in first:
            print(f"\n> {common.prompt_text(first['prompt'])}\n  before   {first['response']}\n"
                  f"  after    {last['response']}")
    print(f"\n{f'{len(after[1])} held-out rows':28} {'before':>10} {'after':>10}")
    for key in before[0]:
        old, new = (round(stats[key], 3) + 0.0 for stats in (before[0], after[0]))  # no -0.000
        print(f"{key:28} {old:10.3f} {new:10.3f}")
    if args.plot:
        plot_curves(args.out)
    (args.out / saved.FILE).unlink(missing_ok=True)  # nothing is left to go on with
    print(f"\nsaved {args.out}")


def append(path, row):
    """Adds one JSON object to a .jsonl file, its numbers to six digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def save_samples(args, step, samples):
    """Adds samples to samples.jsonl; step counts the updates made before."""
    for sample in samples:
        append(args.out / "samples.jsonl", {"step": step, **sample})


def print_ceiling(rows, accuracy):
    """Prints how often always guessing the likelier answer agrees with a fresh label, where the
    data rows state how sure the labeller was: no judge does better."""
    sure = [row["p_chosen"] for row in rows if isinstance(row.get("p_chosen"), (int, float))]
    if len(sure) == len(rows):
        ceiling = sum(max(p, 1 - p) for p in sure) / len(sure)
        print(f"the best possible judge has an accuracy of {ceiling:.3f}, of which "
              f"{accuracy / ceiling:.1%} are reached")


def print_calibration(table):
    """Prints rows (from, to, pairs, probability claimed, share right), reward_model.calibration."""
    print(f"\n{'|r_w - r_l|':>14} {'pairs':>6} {'claimed':>8} {'right':>6}")
    for low, high, n, claimed, right in table:
        print(f"{low:6.1f} to {high:4.1f} {n:6} {claimed:8.1%} {right:6.1%}")


def plot_curves(out):
    """Draws the numbers that each row of metrics.jsonl has, against the steps: curves.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = [key for key in rows[len(rows) // 2] if key not in ("step", "seconds")]
    figure, panels = plt.subplots(-(-len(keys) // 3), 3, figsize=(12, 2 * -(-len(keys) // 3)))
    for panel in panels.flat[len(keys):]:
        panel.axis("off")
    for key, panel in zip(keys, panels.flat):
        panel.plot([row["step"] for row in rows], [row[key] for row in rows], lw=1)
        panel.set_title(key, fontsize=9)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=100)
