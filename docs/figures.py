"""Writes every number of the pages that comes from a run, or from the files here, between markers.

    python docs/figures.py              writes them anew in README.md and docs/*.md
    python docs/figures.py --record     first runs docs/reinforce.py and keeps what it prints

A marker is a comment, <!-- name --> or <!-- name: argument -->, and what follows it up to the next
<!-- end --> is what the function `name` below returns. Records are docs/records/*.json and
benchmarks/*.json; the scripts that measure write those, and nothing here measures.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
from benchmarks import compare as comparison  # noqa: E402

# A marker may be broken over two lines, as any text may.
MARKER = re.compile(r"(<!--\s+(?!end\b)(\w+)(?::\s+([^>]*?))?\s+-->)(.*?)(<!--\s+end\s+-->)", re.S)


def record(name):
    """A record by its name: docs/records/<name>.json or benchmarks/<name>.json."""
    places = (DOCS / "records" / f"{name}.json", ROOT / "benchmarks" / f"{name}.json")
    return json.loads(next(place for place in places if place.is_file()).read_text())


def grid(rows):
    """A Markdown table from rows of cells, the first one its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def number(x, digits=2):
    """A number with so many decimals, or with two digits that are not 0 where it is small."""
    return "0" if abs(x) < 1e-5 else f"{x:.{digits}f}" if abs(x) >= 10 / 10**digits else f"{x:.2g}"


# ------------------------------------------------------------------------------ of the files


def minutes(page, name=None):
    """How long a page takes: 150 words a minute, half a minute for each formula in a block."""
    text = (DOCS / f"{name or page}.md").read_text()
    text = MARKER.sub("", text)  # or else the number would depend on what it stands beside
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.S)  # symbols, answers to exercises
    blocks = len(re.findall(r"^```math", text, flags=re.M))
    prose = re.sub(r"```.*?```|\$`.*?`\$|<!--.*?-->|^## References.*", " ", text, flags=re.S | re.M)
    return str(max(5, 5 * round((len(prose.split()) / 150 + blocks / 2) / 5)))


def lines(page, name):
    """The lines of a script, or of all Python files of a folder."""
    path = ROOT / name
    files = path.glob("*.py") if path.is_dir() else [path]
    return str(sum(len(file.read_text().splitlines()) for file in files))


def mistakes(page):
    """How many entries docs/mistakes.md has."""
    return str(len(re.findall(r"^\*\*\d+\. ", (DOCS / "mistakes.md").read_text(), flags=re.M)))


def file(page, name):
    """A Python file of docs/, as it stands."""
    return f"\n```python\n{(DOCS / name).read_text()}```\n"


# ------------------------------------------------------------------------------ of exact worlds


def reinforce(page):
    """What docs/reinforce.py printed."""
    return "\n```\n" + "\n".join(record("reinforce")["lines"]) + "\n```\n"


def closed_form(page):
    """How far from the best policy the four algorithms end on the toy."""
    ends = record("closed_form")
    names = {"ppo": "PPO", "trpo": "TRPO", "grpo": "GRPO, KL in the reward", "dpo": "DPO"}
    return grid([["KL(pi, pi\\*) at the end", *names.values()],
                 *([kind, *(f"{ends[kind][name]:.1e}" for name in names)]
                   for kind in ("exact", "sampled"))])


def kl_in_the_loss(page):
    """Where GRPO ends on the toy, by where the KL stands and how long answers are."""
    rows = record("closed_form")["grpo"]
    return grid([["KL(pi, pi\\*) at the end", "1 token", "2 tokens", "3 tokens"],
                 *([name, *(f"{x:.1e}" for x in distances)] for name, distances in rows.items())])


# ------------------------------------------------------------------------------ of one prompt


def one_prompt(page, what):
    """What is known of one answer: its prompt, what the models say of it, what PPO makes of it."""
    found = record("one_prompt")
    row = found["rows"][0]
    if what in found:
        return str(found[what])
    if what == "score":
        return str(row[what])
    if what in ("prompt", "text"):  # in a quote, of lines that fit on a screen
        text = row["prompt"] if what == "prompt" else "".join(row["y_tokens"]).replace("<eos>", "")
        return "\n> ".join(textwrap.wrap(" ".join(text.split()), 95))
    if what == "tokens":
        tokens = map(visible, row["x_tokens"])
        return grid([["column", "token", "`x`", "`x_mask`"],
                     *zip(itertools.count(), tokens, row["x"], row["x_mask"])])
    n = sum(row["y_mask"])
    # The ratio as the clip limits it, and whether the token keeps a gradient: it does unless the
    # limited ratio makes the larger loss (PPO.2).
    row["clip"] = [min(max(x, 1 - found["eps"]), 1 + found["eps"]) for x in row["ratio"]]
    row["gradient"] = ["no" if -a * c > -a * x else "yes"
                       for a, c, x in zip(row["adv"], row["clip"], row["ratio"])]
    if what == "length":
        return str(n)
    if what == "clipped":
        return str(row["gradient"].count("no"))
    if what.startswith("sum: "):
        return f"`{sum_of(found, row, what.removeprefix('sum: '))}`"
    shown = [*range(8), *range(n - 4, n)]  # the first tokens and the last ones
    columns = {
        "models": [("logp_old", "`logp_old`"), ("logp_ref", "`logp_ref`"), ("k", "$`k_t`$"),
                   ("values_old", "`values_old`")],
        "credit": [("rewards", "$`R_t`$"), ("delta", "$`\\delta_t`$"), ("raw", "$`A_t`$"),
                   ("ret", "$`\\hat V_t`$"), ("adv", "whitened $`A_t`$")],
        "loss": [("adv", "whitened $`A_t`$"), ("ratio", "$`\\rho_t`$"),
                 ("clip", "$`\\rho_t`$, clipped"), ("loss", "loss of the token"),
                 ("gradient", "has a gradient")]}[what]
    rows = [["t", "token", *(["id"] if what == "models" else []), *(head for _, head in columns)]]
    for at, j in enumerate(shown):
        if at and shown[at - 1] != j - 1:
            rows.append(["..."] + [""] * (len(rows[0]) - 1))
        ids = [row["y"][j]] if what == "models" else []
        cells = [row[key][j] for key, _ in columns]
        rows.append([j + 1, visible(row["y_tokens"][j]), *ids,
                     *(x if isinstance(x, str) else number(x, 3) for x in cells)])
    return grid(rows)


def sum_of(found, row, what):
    """(RL.3) of an answer's first or last token, or (RL.4) of its first one, in numbers."""
    def signed(x):
        return f"{x:.3f}" if x >= 0 else f"({x:.3f})"

    rewards, values, delta, raw = (row[key] for key in ("rewards", "values_old", "delta", "raw"))
    if what == "first delta":
        after = signed(found["gamma"] * values[1])
        return f"{rewards[0]:.3f} + {after} - {signed(values[0])} = {delta[0]:.3f}"
    if what == "last delta":
        return f"{rewards[-1]:.3f} + 0 - {signed(values[-1])} = {delta[-1]:.3f}"
    factor = f"{found['gamma'] * found['lam']:g}"
    return f"{delta[0]:.3f} + {factor} * {signed(raw[1])} = {raw[0]:.3f}"


def visible(token):
    """A token as code, with its space and line break to be seen."""
    return f"`{token}`".replace("\n", "\\n").replace(" ", "·") if token else "pad"


# ------------------------------------------------------------------------------ of the comparison


def results(page, columns):
    """The table of the comparison, with the columns named in the marker."""
    found = record("compare")
    return "\n" + comparison.table(found["runs"], found["best of"], columns.split(", "))


def compare(page, what):
    """One number of the comparison: "ppo gold" is the mean of its seeds, "ppo-long KL" of a run,
    "ppo-long step-40 gold" of a run at a step, "4 gold" of the best of 4."""
    name, *step, column = what.split()
    found = record("compare")
    named = {**found["best of"], **found["runs"]}
    stats = [named[name]] if name in named else comparison.seeds(found["runs"], name)
    if step:
        stats = [run["steps"][step[0]] for run in stats]
    return f"{mean(run[column] for run in stats):.2f}"


def took(page, script):
    """The minutes that the README's command of a script took."""
    return f"{record('first_run')[script]['seconds'] / 60:.1f}"


def answers(page, who):
    """What a model answered to a prompt, as a quote: "ppo: Tell me about vaccines."."""
    model, _, prompt = who.partition(": ")
    return "\n> ".join(textwrap.wrap(record("first_run")["answers"][prompt][model], 110))


def sums(page, what):
    """Of SmolLM2 and the sums: "minutes" that training took, or "answers" before and after."""
    found = record("verifiable")
    if what == "minutes":
        return f"{mean(run['seconds'] for run in comparison.seeds(found, 'grpo')) / 60:.0f}"
    before, after = (found[name]["after"]["answers"] for name in ("untrained", "grpo-seed0"))
    return grid([["prompt", "before", "after"], *(
        [prompt, " ".join(before[prompt].split()), " ".join(after[prompt].split())]
        for prompt in after)])


UNTRAINED = {"untrained": "SmolLM2 as it is"}
FEW_SHOT = {"few-shot": "four solved sums before the question, no training"}
GRPO = {"grpo": "GRPO, three seeds"}
SUMS = {  # the rows of each table: the name of a run, or of a script with several seeds
    "short": {**UNTRAINED, **FEW_SHOT, **GRPO},
    "methods": {**UNTRAINED, **FEW_SHOT, "sft": "SFT on its own right answers",
                "reinforce": "REINFORCE, leave-one-out", "ppo": "PPO", **GRPO},
    "flags": {**GRPO, "none": "`--adv none`: not divided by the spread",
              "raw": "`--adv raw`: the score itself, no baseline",
              "resample": "`--resample 2`: groups without spread are drawn again"},
    "lora": {"q,v-lr0.0002": "query and value, 2e-4",
             "grpo": "query and value, 5e-4 (the default, three seeds)",
             "all-linear-lr0.0002": "all linear layers, 2e-4",
             "all-linear-lr0.0005": "all linear layers, 5e-4"},
}


def verifiable(page, table):
    """Held-out sums before training, and after it by some of the methods that were run."""
    found, columns, rows = record("verifiable"), ["greedy", "pass@1", "pass@8"], []
    for name, label in SUMS[table].items():
        runs = [found[name]] if name in found else comparison.seeds(found, name)
        cells = [[run["after"][column] for run in runs] for column in columns]
        if table == "flags":
            drawn = [mean(run["curves"]["dead_groups"]) for run in runs]
            groups = runs[0]["config"]["batch_size"] / runs[0]["config"]["group_size"]  # a step
            left = [mean(run["curves"]["zero_std_groups"]) / groups for run in runs]
            cells += [drawn, left if name == "resample" else drawn]
        rows.append([label, *map(comparison.spread, cells)])
    more = ["without spread: groups drawn", "groups learnt from"] if table == "flags" else []
    return grid([["", *columns, *more], *rows])


POLICY = {"gold": "judged", "answered": "judged", "damaged": "judged", "KL": "judged"}
TURNED = {  # column: where benchmarks/turn.json has it: judged, of the held-out table, last steps
    "sft": {"gold": "judged", "answered": "judged", "damaged": "judged", "stops": "judged",
            "perplexity": "table", "grad_norm": "last"},
    "reward_model": {"loss": "table", "accuracy": "table", "margin": "table",
                     "mean score": "table", "grad_norm": "last"},
    "ppo": {**POLICY, "clip_fraction": "last", "entropy": "last", "length": "last"},
    "grpo": {**POLICY, "clip_fraction": "last", "entropy": "last", "zero_std_groups": "last"},
    "trpo": {**POLICY, "kl_step": "last", "backtracks": "last", "entropy": "last"},
    "dpo": {**POLICY, "loss": "last", "accuracy": "last", "margin": "last", "logp_chosen": "last"},
}


def turn(page, script):
    """What a script's first three hyper-parameters do, each turned down and up."""
    columns = TURNED[script]
    rows = [["", *(f"`{key}`" if place == "last" else key for key, place in columns.items())]]
    for name, run in record("turn").items():
        if name.split()[0] == script:
            flag = name.removeprefix(script).strip()
            cells = [run[place][key] for key, place in columns.items()]
            cells = [cell[-1] if isinstance(cell, list) else cell for cell in cells]
            rows.append([f"`--{flag}`" if flag else "defaults", *map(number, cells)])
    return grid(rows)


def vs_trl(page, model):
    """Time and memory of a step beside TRL's, and how far the losses of both are apart."""
    rows = [["", "ours / TRL", "ours, s", "TRL, s", "ours, MB", "TRL, MB", "losses differ by"]]
    for task, run in record("vs_trl")[model].items():
        sides = [run[name] for name in ("ours", "trl")]
        rows.append([task, f"{run['ratio']:.2f}", *(f"{side['seconds']:.2f}" for side in sides),
                     *(f"{side['memory']:.0f}" for side in sides),
                     f"{run['differences']['loss'][0]:.0e}"])
    return grid(rows)


def peaks(page):
    """Peak memory of each script with a larger model on a GPU."""
    found = record("gpu_memory")
    return grid([["", *found["peak GB"]], ["GB", *found["peak GB"].values()]])


FIGURES = (minutes, lines, mistakes, file, reinforce, closed_form, kl_in_the_loss, one_prompt,
           results, compare, took, answers, sums, verifiable, turn, vs_trl, peaks)

# ------------------------------------------------------------------------------ command


def filled(text, page):
    """The text of a page with all that stands between markers written anew."""
    known = {figure.__name__: figure for figure in FIGURES}

    def fill(match):
        start, name, argument, _, end = match.groups()
        if name not in known:
            raise ValueError(f"{page}: no figure has the name {name!r}")
        arguments = [" ".join(argument.split())] if argument else []
        return start + known[name](page, *arguments) + end

    return MARKER.sub(fill, text)


def pages():
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def record_reinforce():
    """Runs docs/reinforce.py, and keeps what it prints."""
    done = subprocess.run([sys.executable, DOCS / "reinforce.py"], capture_output=True, text=True,
                          check=True)
    found = json.dumps({"lines": done.stdout.splitlines()}, indent=1)
    (DOCS / "records" / "reinforce.json").write_text(found + "\n")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--record", action="store_true", help="run docs/reinforce.py anew")
    args = p.parse_args(argv)
    if args.record:
        record_reinforce()
    for page in pages():
        page.write_text(filled(page.read_text(), page.stem))


if __name__ == "__main__":
    main()
