"""Draws the pictures of these pages.

    python docs/draw.py                     all of them, as SVG, into docs/
    python docs/draw.py --record            makes docs/records anew first, in some minutes
    python docs/draw.py --record credit     makes only that record anew

Needs matplotlib (pip install matplotlib). Everything drawn comes from docs/records/*.json, which
--record makes with the scripts' own functions, the model in tiny/ and the runs of
benchmarks/compare.py, and from benchmarks/compare.json. Where the latter is missing, the three
pictures of the comparison are left out.
"""

import io
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
try:
    import matplotlib
except ImportError:
    print("error: matplotlib is missing; pip install matplotlib", file=sys.stderr)
    raise SystemExit(2) from None
matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

import common  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402
import trpo  # noqa: E402
from benchmarks import compare  # noqa: E402
from cli import data, flags  # noqa: E402
from tiny import world  # noqa: E402

GROUP_PROMPT = "Could you explain bees in simple words?"  # held out: no stage trained on it
LAMBDAS = (0.0, 0.95, 1.0)

# ------------------------------------------------------------------------------ the records


def rounded(x, digits=4):
    """Nested lists of numbers, from a tensor or a number, to so many significant digits."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    return [rounded(v, digits) for v in x] if isinstance(x, list) else float(f"{x:.{digits}g}")


def start(script, **numbers):
    """(config, model, tokenizer) as ppo.py, trpo.py or grpo.py has them at step 0, with the shipped
    SFT and reward models and all flags at their defaults but `numbers`."""
    config = script.Config(**{**script.TINY, **numbers})
    model, tokenizer = common.load_model()
    lora.load_adapter(model, "policy", common.TINY / "sft", trainable=True)
    lora.load_adapter(model, "reward", common.TINY / "reward_model")
    script.make_models(model, "reward", config)
    return config, model, tokenizer


def collect(script, rows, model, tokenizer, generator, config):
    """A rollout batch with its rewards, and the advantages and returns that the update takes."""
    batch, _ = script.rollout(model, tokenizer, rows, "reward", config, generator)
    mask = batch["mask"]
    batch["rewards"] = script.kl_shaped_rewards(
        batch["score"], batch["logp_old"], batch["logp_ref"], mask, config.beta)
    adv, batch["ret"] = script.gae(
        batch["rewards"], batch["values_old"], mask, config.gamma, config.lam)
    batch["adv"] = script.whiten(adv, mask)
    return batch


def prompts():
    """(rows to train on, held-out rows) of tiny/prompts.jsonl."""
    return data.load_data(str(common.TINY / "prompts.jsonl"), ["prompt"])


def record_models():
    """How many numbers the base, an adapter and a head have."""
    _, model, _ = start(ppo)
    sizes = {name: sum(p.numel() for p in lora.adapter_parameters(model, name))
             for name in ("policy", "critic")}
    base = sum(p.numel() for name, p in model.named_parameters()
               if "lora_" not in name and not name.startswith("heads."))
    return {"base": base, "adapter": sizes["policy"], "head": sizes["critic"] - sizes["policy"]}


def record_clip(eps=0.2):
    """ppo.policy_loss of one token against the ratio, and its derivative, for both signs of A."""
    ratio = torch.arange(0.4, 1.6001, 0.05)
    record = {"eps": eps, "ratio": rounded(ratio)}
    for name, advantage in (("positive", 1.0), ("negative", -1.0)):
        logp = ratio.log().unsqueeze(1).requires_grad_()
        loss = torch.stack([
            ppo.policy_loss(one, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), eps)
            for one in logp])
        slope, = torch.autograd.grad(loss.sum(), logp)
        record[name] = {"loss": rounded(loss), "slope": rounded(slope.squeeze(1) / ratio)}
    return record


def record_credit(steps=40, draws=96):
    """GAE along an answer of the SFT model, with a critic that `steps` batches have trained: of
    `draws` answers to held-out prompts, those of 30 to 60 tokens that stop, the one in which both
    the most praised and the most blamed token of lambda 1 are far from 0."""
    config, model, tokenizer = start(ppo)
    train, test = prompts()
    critic = lora.adapter_parameters(model, "critic")
    optimizer = torch.optim.AdamW(critic, weight_decay=0.0)  # so the policy does not move
    generator, explained = torch.Generator().manual_seed(config.seed), []
    for step in range(steps):
        index = common.batch_rows(step, len(train), config.batch_size, config.seed)
        batch = collect(ppo, [train[i] for i in index], model, tokenizer, generator, config)
        values, mask = batch["values_old"], batch["mask"]
        _, to_go = ppo.gae(batch["rewards"], values, mask, config.gamma, 1.0)
        explained.append(ppo.explained_variance(values, to_go, mask))
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, steps, config.lr)
        ppo.update(model, optimizer, batch, config, generator)
    rows = data.take(test, draws)
    batch = collect(ppo, rows, model, tokenizer, generator, config)
    rewards, values, mask = batch["rewards"], batch["values_old"], batch["mask"]
    adv = {lam: ppo.gae(rewards, values, mask, config.gamma, lam)[0] for lam in LAMBDAS}
    short = [i for i in range(len(rows)) if 30 <= mask[i].sum() <= 60 and batch["ended"][i]]
    pick = max(short, key=lambda i: min(adv[1.0][i].max(), -adv[1.0][i].min()).item())
    n = int(mask[pick].sum())
    return {"prompt": rows[pick]["prompt"], "critic_steps": steps, "draws": draws,
            "explained_variance": rounded(statistics.mean(explained[-10:])),
            "tokens": [tokenizer.decode([i]) for i in batch["y"][pick, :n].tolist()],
            "score": rounded(batch["score"][pick].item()), "values": rounded(values[pick, :n]),
            "advantages": {str(lam): rounded(adv[lam][pick, :n]) for lam in LAMBDAS}}


def record_trust_region(around=48, side=9, answers=8):
    """trpo.py's first step and the step along the plain gradient, both to the KL --max-kl; and on
    the plane through theta_old that holds both, where the KL is that and a quarter of it, and the
    surrogate: all by evaluation. F is taken on all answers of the batch."""
    config, model, tokenizer = start(trpo, batch_size=answers, fisher_rows=answers)
    train, _ = prompts()
    rows = [train[i] for i in common.batch_rows(0, len(train), answers, config.seed)]
    generator = torch.Generator().manual_seed(config.seed)
    batch = collect(trpo, rows, model, tokenizer, generator, config)
    trpo.score_old(model, batch, config)
    parameters = lora.adapter_parameters(model, "policy")
    old = [p.detach().clone() for p in parameters]
    with lora.use_adapter(model, "policy"):
        g = torch.zeros_like(trpo.flatten(old))
        for b, share in trpo.parts(batch, config):
            gain, _ = trpo.surrogate_of(model, b, config)
            g += share * trpo.flatten(torch.autograd.grad(gain, parameters))
        natural, _ = trpo.natural_step(model, parameters, old, batch, config)
    along, size = g / g.norm(), natural.norm().item()
    across = natural - natural @ along * along
    across, delta = across / across.norm(), config.max_kl
    before = trpo.masked_mean(batch["adv"], batch["mask"]).item()

    def measure(x, y):
        trpo.move(parameters, old, x * along + y * across)
        with lora.use_adapter(model, "policy"):
            gain, kl = trpo.gain_and_kl(model, batch, config)
        return gain - before, kl

    def to_kl(x, y, kl, tries=3):
        for _ in range(tries):  # KL is nearly a square of the length
            scale = (kl / measure(x, y)[1]) ** 0.5
            x, y = x * scale, y * scale
        return [x, y]

    steps = {}
    for name, step in (("gradient", g), ("natural", natural)):
        step = step / step.norm() * size
        at = to_kl((step @ along).item(), (step @ across).item(), delta, tries=5)
        gain, kl = measure(*at)
        steps[name] = {"at": rounded(at), "gain": rounded(gain), "kl": rounded(kl)}
    a, b, c = (measure(x, y)[1] / size**2 for x, y in ((size, 0), (0, size), (size, size)))
    model_of_kl = torch.tensor([[a, (c - a - b) / 2], [(c - a - b) / 2, b]])
    turns = torch.linspace(0, 2 * math.pi, around + 1)[:-1]
    ellipse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(model_of_kl).T, torch.stack([turns.cos(), turns.sin()]), upper=True)
    contours = {str(part): rounded([to_kl(x, y, part * delta) for x, y in (
        ellipse.T * (part * delta) ** 0.5).tolist()]) for part in (0.25, 1.0)}
    reach = 1.25 * max(abs(x) for point in contours["1.0"] for x in point)
    ticks = torch.linspace(-reach, reach, side)
    grid = [[measure(x, y)[0] for x in ticks.tolist()] for y in ticks.tolist()]
    return {"max_kl": delta, "parameters": g.numel(), "ticks": rounded(ticks),
            "gain": rounded(grid), "contours": contours, "steps": steps}


def record_one_prompt(steps=20):
    """One batch of PPO after `steps` steps of training, of which two rows are kept: every tensor of
    an answer, token by token, up to the loss of each token after the update."""
    config, model, tokenizer = start(ppo, steps=steps)
    train, test = prompts()
    ppo.train(model, tokenizer, train, "reward", config)
    generator, rows = torch.Generator().manual_seed(config.seed), data.take(test, config.batch_size)
    batch = collect(ppo, rows, model, tokenizer, generator, config)
    mask, length = batch["mask"], batch["x_mask"].sum(1)
    batch["k"] = (batch["logp_old"] - batch["logp_ref"]) * mask
    raw, _ = ppo.gae(batch["rewards"], batch["values_old"], mask, config.gamma, config.lam)
    following = torch.cat([batch["values_old"][:, 1:], torch.zeros(len(rows), 1)], 1)
    batch["raw"] = raw  # before whitening
    batch["delta"] = (batch["rewards"] + config.gamma * following - batch["values_old"]) * mask
    optimizer = torch.optim.AdamW([
        {"params": lora.adapter_parameters(model, name)} for name in ("policy", "critic")],
        lr=config.lr, weight_decay=0.0)
    ppo.update(model, optimizer, batch, config, generator)
    logp = ppo.batch_logps(model, "policy", batch, config)
    batch["ratio"] = ((logp - batch["logp_old"]) * mask).exp() * mask
    batch["loss"] = torch.stack([
        ppo.policy_loss(*(x.reshape(1, 1) for x in token), torch.ones(1, 1), config.clip)
        for row in zip(logp, batch["logp_old"], batch["adv"]) for token in zip(*row)
    ]).view_as(mask) * mask
    # Of two answers with prompts and answers of different lengths, the one that is padded in both.
    pick = min(range(len(rows)), key=lambda i: (mask[i].sum() + length[i]).item())
    long = max(range(len(rows)), key=lambda i: (mask[i].sum() + length[i]).item())
    record = {"steps": steps, "beta": config.beta, "gamma": config.gamma, "lam": config.lam,
              "eps": config.clip, "temperature": config.temperature, "rows": []}
    for i in (pick, long):  # of the longer one, only what the picture of the layout shows
        kept = {"prompt": rows[i]["prompt"], "score": rounded(batch["score"][i].item())}
        for side, ids in (("x", batch["x"][i]), ("y", batch["y"][i])):
            real = batch["x_mask" if side == "x" else "mask"][i]
            kept[side] = ids.tolist()
            kept[f"{side}_mask"] = [int(m) for m in real]
            kept[f"{side}_tokens"] = [tokenizer.decode([j]) if m else "" for j, m in zip(ids, real)]
        for key in ("logp_old", "logp_ref", "k", "values_old", "rewards", "delta", "raw", "ret",
                    "adv", "ratio", "loss") if i == pick else ():
            kept[key] = rounded(batch[key][i, : int(mask[i].sum())])
        record["rows"].append(kept)
    return record


def record_group():
    """A group of answers of the SFT model to a prompt, their scores and advantages."""
    config, model, tokenizer = start(grpo)
    generator, rows = torch.Generator().manual_seed(config.seed), [{"prompt": GROUP_PROMPT}]
    batch, answers = grpo.rollout(
        model, tokenizer, rows, "reward", config, generator, config.group_size)
    advantages = grpo.group_advantages(batch["score"].view(1, -1))[0]
    return {"prompt": GROUP_PROMPT, "answers": answers,
            "scores": rounded(batch["score"], 5), "advantages": rounded(advantages, 5)}


def record_implicit_reward(steps=100, every=20, size=100, **numbers):
    """beta log(pi / pi_ref) of held-out chosen and rejected answers along a run of dpo.py."""
    config = dpo.Config(**{**dpo.TINY, "steps": steps, **numbers})
    train, test = data.load_data(
        str(common.TINY / "preferences.jsonl"), ["prompt", "chosen", "rejected"])
    model, tokenizer = common.load_model()
    lora.load_adapter(model, "policy", common.TINY / "sft", trainable=True)
    dpo.make_models(model, config)
    pairs = dpo.encode_pairs(tokenizer, data.take(test, size), config.max_length)
    refs, rewards = dpo.all_logps(model, "reference", pairs, config), []

    def log(row, samples, state):
        if (row["step"] + 1) % every == 0:  # after the update
            rewards.append(config.beta * (dpo.all_logps(model, "policy", pairs, config) - refs))

    dpo.train(model, tokenizer, train, config, log)
    return {"beta": config.beta, "steps": list(range(0, steps + 1, every)),
            "means": [[0.0, 0.0], *(rounded(reward.mean(0)) for reward in rewards)],
            "rewards": rounded(rewards[-1], 3)}


def record_curves(bins=25, gold_bins=10):
    """Score and KL of the rollouts of the comparison, and the gold score of the answers they left
    in samples.jsonl, one a step; means over so many stretches of a run. None without the runs."""
    def means(values, count):
        count = min(count, len(values))
        size = len(values) // count
        return rounded([statistics.mean(values[i * size : (i + 1) * size]) for i in range(count)])

    record = {}
    for script in ("ppo", "trpo", "grpo"):
        for out in sorted((ROOT / "runs" / "compare").glob(f"{script}-seed?")):
            rows, samples = ([json.loads(line) for line in open(out / f"{name}.jsonl")]
                             for name in ("metrics", "samples"))
            last = {sample["step"]: sample for sample in samples}  # at step 0 the rollout's comes
            gold = [world.gold_score(last[i]["prompt"], last[i]["response"])  # after the held-out
                    for i in range(len(rows))]
            record.setdefault(script, []).append({
                "steps": len(rows), "gold": means(gold, gold_bins),
                **{key: means([row[key] for row in rows], bins) for key in ("score", "kl")}})
    return record or None


RECORDS = {"models": record_models, "clip": record_clip, "credit": record_credit,
           "trust_region": record_trust_region, "group": record_group,
           "one_prompt": record_one_prompt,
           "implicit_reward": record_implicit_reward, "curves": record_curves}


def make_records(names, folder):
    """Writes <name>.json of each name to the folder."""
    for name in names:
        record = RECORDS[name]()
        if record is None:
            print(f"{name}: no runs/compare, which benchmarks/compare.py makes; left as it is")
            continue
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        (folder / f"{name}.json").write_text(text.replace('],"', '],\n"') + "\n")
        print(f"recorded {name}")


# ------------------------------------------------------------------------------ the pictures

GREY, PLUS, MINUS = "#808080", "#1f8fe0", "#e8590c"  # readable on white and on GitHub's dark page
COLOURS = {"ppo": "#1f8fe0", "trpo": "#e8590c", "grpo": "#2f9e44", "dpo": "#c2489e"}
STYLE = {
    "text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "legend.labelcolor": GREY, "legend.frameon": False, "grid.color": GREY,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.spines.top": False, "font.size": 10,
    "axes.spines.right": False, "axes.titlesize": 11, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "none",
    "svg.hashsalt": "rlhf", "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica"],
    "font.monospace": ["DejaVu Sans Mono", "Menlo", "Consolas"]}


def signed(x, largest):
    """Colour of a number: blue above 0, orange below, fainter towards 0."""
    return matplotlib.colors.to_rgba(PLUS if x > 0 else MINUS, min(1.0, abs(x) / largest))


def minus(text):
    return text.replace("-", "−")


def canvas(width, height):
    """A figure of so many points and bare axes in points over all of it."""
    figure = plt.figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, *lines, colour=GREY, fill=0.0, dashed=False):
    """A rounded box around (x, y) with lines of text, the first one bold."""
    axes.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=5",
        facecolor=matplotlib.colors.to_rgba(colour, fill), edgecolor=colour, linewidth=1.3,
        linestyle="--" if dashed else "-"))
    for i, line in enumerate(lines):
        axes.text(x, y + 12 * ((len(lines) - 1) / 2 - i), line, ha="center", va="center_baseline",
                  fontsize=9, fontweight="normal" if i else "bold")


def arrow(axes, start, end, colour=GREY, bend=0.0):
    axes.annotate("", end, start, arrowprops=dict(
        arrowstyle="-|>", color=colour, linewidth=1.3, shrinkA=0, shrinkB=0, mutation_scale=11,
        connectionstyle=f"arc3,rad={bend}"))


def draw_pipeline():
    """Stages as filled boxes, the folders that they pass along as empty ones."""
    figure, axes = canvas(750, 275)
    wide, half, high, top, middle, low = 112, 56, 40, 224, 138, 54
    base, sft, policies, last = 60, 202, 532, 686

    def script(x, y, *lines, colour=PLUS):
        box(axes, x, y, wide, high, *lines, colour=colour, fill=0.12)

    def folder(x, y, *lines):
        box(axes, x, y, wide, high, *lines)

    def data(x, y, text, side):
        axes.text(x, y + 42 * side, text, ha="center", va="center", fontsize=9, fontstyle="italic")
        arrow(axes, (x, y + 34 * side), (x, y + 20 * side))

    def flag(x, y, text):
        axes.text(x, y, text, ha="center", va="center", fontsize=9)

    folder(base, middle, "tiny/model", "or --model; frozen")
    script(sft, middle, "sft.py")
    data(sft, middle, "demonstrations", 1)
    folder(340, middle, "runs/sft", "adapter")
    script(340, top, "reward_model.py")
    data(340, top, "preferences", 1)
    folder(policies, top, "runs/reward_model", "adapter, scalar head")
    script(policies, middle, "ppo.py, trpo.py", "or grpo.py")
    data(policies, middle, "prompts", -1)
    folder(last, middle, "runs/ppo", "adapter")
    script(policies, low, "dpo.py", colour=COLOURS["dpo"])
    data(policies, low, "preferences", -1)
    folder(last, low, "runs/dpo", "adapter")
    for a, b in ((base, sft), (sft, 340), (340, policies), (policies, last)):
        arrow(axes, (a + half, middle), (b - half, middle))
    arrow(axes, (340, middle + 20), (340, top - 20))
    arrow(axes, (340 + half, top), (policies - half, top))
    arrow(axes, (policies, top - 20), (policies, middle + 20))
    arrow(axes, (policies + half, low), (last - half, low))
    arrow(axes, (340, middle - 20), (policies - half, low), bend=0.3)
    flag(436, middle + 8, "--adapter")
    flag(436, low - 9, "--adapter")
    flag(policies - 30, (top + middle) / 2, "--reward")
    flag(310, (top + middle) / 2, "--adapter")
    return figure


def draw_tokens(record, first=4, last=3):
    """Two rows of a batch as the scripts hold them: prompts padded on the left, answers on the
    right, the masks, and which position predicts which token."""
    rows, wide, high = record["rows"], 62, 24
    prompt, answer = len(rows[0]["x"]), len(rows[0]["y"])
    ends = sorted({sum(row["y_mask"]) for row in rows})
    # Of the prompt its first and last columns, of the answers the first ones and those around each
    # end. Between them stand dots.
    shown = [("x", j) for j in (0, 1, prompt - 2, prompt - 1)]
    shown += [("y", j) for j in range(first - 1)]
    shown += [("y", j) for j in range(ends[0] - 2, ends[0] + 1)] + [("y", answer - 1)]
    gaps = [number for number, (side, j) in enumerate(shown)
            if number and j and shown[number - 1] != (side, j - 1)]
    figure, axes = canvas(80 + (wide + 2) * len(shown) + 16 * len(gaps) + 20, 290)

    def place(number):  # the left edge of a column
        wider = 16 * sum(gap <= number for gap in gaps) + 14 * (number > 3)
        return 66 + (wide + 2) * number + wider

    for number, (side, j) in enumerate(shown):
        if number in gaps:
            for top in (224, 158):
                axes.text(place(number) - 9, top + 5, "…", ha="center", fontsize=11)
        name = f"x[:, {j}]" if side == "x" else f"y[:, {j}]"
        axes.text(place(number) + wide / 2, 252, name, ha="center", fontsize=8, family="monospace")
    axes.text(place(0), 270, "prompts x, padded on the left", fontsize=9, fontweight="bold")
    axes.text(place(4), 270, "answers y, padded on the right", fontsize=9, fontweight="bold")
    for i, row in enumerate(rows):
        top = 224 - 66 * i
        axes.text(10, top + 4, f"row {i}", fontsize=9, fontweight="bold")
        axes.text(10, top - 22, "mask", fontsize=9)
        for number, (side, j) in enumerate(shown):
            real, token = row[f"{side}_mask"][j], row[f"{side}_tokens"][j]
            colour = (COLOURS["grpo"] if side == "x" else PLUS) if real else GREY
            axes.add_patch(FancyBboxPatch(
                (place(number) + 1, top - 4), wide - 4, high, linewidth=1, edgecolor=colour,
                facecolor=matplotlib.colors.to_rgba(colour, 0.14 if real else 0.0),
                linestyle="-" if real else ":", boxstyle="round,pad=0,rounding_size=3"))
            said = repr(token)[1:-1].replace(" ", "\u00b7") if real else "pad"
            axes.text(place(number) + wide / 2 - 1, top + 5, said, ha="center", va="center",
                      fontsize=8, family="monospace")
            axes.text(place(number) + wide / 2 - 1, top - 22, str(real), ha="center", fontsize=8,
                      family="monospace")
    bottom = 78
    axes.text(10, bottom - 8, "logits", fontsize=9, fontweight="bold")
    columns = [3, *(number for number, (side, _) in enumerate(shown) if side == "y")]
    for at, (number, following) in enumerate(zip(columns[: first - 1], columns[1:])):
        axes.text(place(number) + wide / 2 - 1, bottom - 8, f"[:, {at}]", ha="center", fontsize=8,
                  family="monospace")
        arrow(axes, (place(number) + wide / 2, bottom + 4), (place(following) + wide / 2 - 6, 152),
              MINUS)
    for y, said in ((42, "The logits after the last prompt token predict the first token of the "
                         "answer: position t−1 predicts token t."),
                    (24, "Padding gets mask 0, from lengths. The mask is 1 up to and including the "
                         "token that ends the answer;"),
                    (8, "an answer that was cut off has no such token, and its mask is 1 to the "
                        "edge.")):
        axes.text(10, y, said, fontsize=9)
    return figure


def draw_ppo_step():
    """One PPO step as a flow of data, from prompts to two losses, phase by phase."""
    figure, axes = canvas(760, 470)
    wide, high = 124, 38

    def data(x, y, *lines):
        box(axes, x, y, wide, high, *lines)

    def model(x, y, *lines, trained=False):
        box(axes, x, y, wide, high, *lines, colour=PLUS if trained else GREY, fill=0.12,
            dashed=not trained)

    def formula(x, y, *lines):
        box(axes, x, y, wide, high, *lines, colour=MINUS, fill=0.08)

    for y, text in ((440, "1. Act"), (236, "2. Credit"), (110, "3. Learn")):
        axes.text(8, y, text, fontsize=10, fontweight="bold")
    for y in (262, 136):
        axes.plot([8, 752], [y, y], color=GREY, linewidth=0.6, dashes=(3, 3))
    data(110, 410, "prompts x", "[B, P]")
    model(290, 410, "policy", "samples an answer", trained=True)
    data(470, 410, "answers y, mask", "[B, R]")
    for start, end in ((172, 228), (352, 408)):
        arrow(axes, (start, 410), (end, 410))
    columns = (110, 290, 470, 650)
    model(columns[1], 346, "reference")
    model(columns[2], 346, "reward")
    model(columns[3], 346, "critic", trained=True)
    data(columns[0], 290, "logp_old", "from the sampler")
    data(columns[1], 290, "logp_ref", "[B, R]")
    data(columns[2], 290, "score", "[B]")
    data(columns[3], 290, "values_old", "[B, R]")
    arrow(axes, (240, 391), (150, 309))
    for x in columns[1:]:
        arrow(axes, (x, 327), (x, 309))
    arrow(axes, (430, 391), (330, 365))
    arrow(axes, (470, 391), (470, 365))
    arrow(axes, (520, 391), (610, 365))
    formula(290, 210, "rewards", "(RL.2)")
    formula(470, 210, "GAE", "(RL.3), (RL.4)")
    formula(650, 210, "returns ret", "(RL.5)")
    formula(470, 160, "whitened adv", "(RL.6)")
    for x, to in ((130, 240), (290, 290), (450, 340)):
        arrow(axes, (x, 271), (to, 229))
    arrow(axes, (620, 271), (510, 229))
    arrow(axes, (670, 271), (662, 229))
    arrow(axes, (352, 210), (408, 210))
    arrow(axes, (532, 210), (588, 210))
    arrow(axes, (470, 191), (470, 179))
    data(110, 72, "minibatches", "of all of the above")
    model(290, 96, "policy", "logp, again", trained=True)
    model(290, 46, "critic", "values, again", trained=True)
    formula(470, 96, "policy_loss", "(PPO.1), (PPO.2)")
    formula(470, 46, "value_loss", "(PPO.3)")
    data(650, 96, "AdamW step", "of the policy")
    data(650, 46, "AdamW step", "of the critic")
    arrow(axes, (172, 78), (228, 94))
    arrow(axes, (172, 66), (228, 48))
    for y in (96, 46):
        arrow(axes, (352, y), (408, y))
        arrow(axes, (532, y), (588, y))
    arrow(axes, (470, 141), (470, 115))
    arrow(axes, (592, 191), (528, 65))
    axes.text(8, 10, "Blue: trained. Dashed: frozen. Orange: an equation. Everything above the "
              "lower line is fixed while the update learns from it.", fontsize=9)
    return figure


def draw_four_models(record):
    """PPO's four models: what each starts as, what it says, and where that goes."""
    figure, axes = canvas(740, 300)
    base, adapter, head = (record[key] for key in ("base", "adapter", "head"))
    box(axes, 370, 34, 716, 40, f"one base, frozen, in memory once: {base:,} numbers",
        "an adapter adds its own B A to some of the layers, while it is active")
    models = [
        ("policy", "a copy of runs/sft", f"{adapter:,}", True, "log π of each token",
         "ratio to π old, PPO.1"),
        ("reference", "a copy of runs/sft", f"{adapter:,}", False, "log π ref of each token",
         "KL in the reward, RL.2"),
        ("critic", "a copy of reward", f"{adapter:,} + {head}", True,
         "V before each token", "advantages, returns, RL.3-5"),
        ("reward", "runs/reward_model", f"{adapter:,} + {head}", False,
         "r of the finished answer", "reward of the last token, RL.2")]
    for i, (name, begins, size, trained, says, use) in enumerate(models):
        x, colour = 97 + 182 * i, PLUS if trained else GREY
        begins = f"starts as {begins}" if trained else begins
        box(axes, x, 121, 168, 78, name, "trained" if trained else "frozen", begins,
            f"{size} numbers", colour=colour, fill=0.12 if trained else 0.0, dashed=not trained)
        arrow(axes, (x, 54), (x, 82), colour)
        arrow(axes, (x, 160), (x, 194), colour)
        axes.text(x, 205, says, ha="center", va="center", fontsize=10, color=colour)
        arrow(axes, (x, 216), (x, 238), colour)
        axes.text(x, 249, use, ha="center", va="center", fontsize=9)
    saved = 4 * base / (base + 4 * adapter + 2 * head)
    axes.text(370, 284, f"{base + 4 * adapter + 2 * head:,} numbers in all, where four separate "
              f"models would have {4 * base:,}: {saved:.1f} times as many",
              ha="center", va="center")
    return figure


def draw_clip(record):
    """The loss of one token against its ratio, both signs of A; flat parts have no gradient."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    eps, ratio = record["eps"], record["ratio"]
    for axes, name, sign in zip(panels, ("positive", "negative"), (1, -1)):
        loss, slope = record[name]["loss"], record[name]["slope"]
        corner = 1 + sign * eps
        flat = [(r, y) for r, y, s in zip(ratio, loss, slope) if s == 0]
        flat = sorted([*flat, (corner, -sign * corner)])
        steep = [(r, y) for r, y, s in zip(ratio, loss, slope) if s]
        steep = sorted([*steep, (corner, -sign * corner)])
        axes.axvspan(1 - eps, 1 + eps, color=GREY, alpha=0.13, linewidth=0)
        axes.plot(ratio, [-sign * r for r in ratio], ":", color=GREY, linewidth=1.2)
        axes.plot(*zip(*steep), color=PLUS, linewidth=2.4, label="gradient")
        axes.plot(*zip(*flat), color=MINUS, linewidth=2.4, dashes=(4, 1.5),
                  label="no gradient")
        axes.plot(1, -sign, "o", color=PLUS, markersize=7)
        axes.annotate("the first step\nis taken here", (1, -sign), (8, 14 if sign > 0 else -30),
                      textcoords="offset points", fontsize=9)
        axes.set(xlabel="ratio ρ = π / π old", title=f"A = {'+1' if sign > 0 else '−1'}: "
                 f"{'a token to make likelier' if sign > 0 else 'a token to make less likely'}",
                 xlim=(0.4, 1.6))
        axes.set_xticks([0.4, 0.6, 1 - eps, 1, 1 + eps, 1.4, 1.6])
        axes.grid()
    panels[0].set_ylabel("loss of the token (PPO.2)")
    panels[0].legend(loc="lower left")
    for axes, x, y, text, colour in (
            (panels[0], 1.41, -1.13, "likelier by enough", MINUS),
            (panels[0], 0.75, -0.46, "went the wrong way:\nis brought back", PLUS),
            (panels[0], 1.3, -1.5, "−A ρ, unclipped", GREY),
            (panels[1], 0.6, 0.87, "less likely by enough", MINUS),
            (panels[1], 1.25, 1.54, "went the wrong way:\nis brought back", PLUS),
            (panels[1], 0.73, 0.5, "−A ρ, unclipped", GREY)):
        axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=9)
    figure.tight_layout()
    return figure


def break_lines(tokens, width):
    """Lines of (column, token number) of each token, broken before a word. The space that the word
    begins with stands in the margin, column -1."""
    lines, column = [[]], 0
    for i, token in enumerate(tokens):
        word = [token]
        for following in tokens[i + 1 :]:
            if following.startswith(" "):
                break
            word.append(following)
        if token.startswith(" ") and column + len("".join(word)) > width:
            lines.append([])
            column = -1
        lines[-1].append((column, i))
        column += len(token)
    return lines


def draw_credit(record):
    """The critic's value along an answer, and each token's advantage for three lambdas."""
    tokens, values, score = record["tokens"], record["values"], record["score"]
    step, left, pitch, deep = 5.42, 66, 128, 38  # points: a character, a margin, a line, its V
    characters = len("".join(tokens))  # in lines of about the same length
    lines = break_lines(tokens, characters / math.ceil(characters / 110) + 8)
    width = left + step * max(column for line in lines for column, _ in line) + 110
    height = 62 + pitch * len(lines)
    figure, axes = canvas(width, height)
    largest = max(abs(a) for row in record["advantages"].values() for a in row)
    low, high = min([*values, score, 0.0]), max([*values, score, 0.0])
    axes.text(10, height - 16, f"> {record['prompt']}", fontsize=10, fontweight="bold")
    for number, line in enumerate(lines):
        base = height - 94 - pitch * number  # of the text
        top = base + 22

        def level(v):
            return top + deep * (v - low) / (high - low)

        edges = [left + step * column for column, _ in line]
        end = edges[-1] + step * len(tokens[line[-1][1]])
        axes.plot([edges[0], end], [level(0)] * 2, color=GREY, linewidth=0.6, dashes=(2, 2))
        last = number == len(lines) - 1
        heights = [values[i] for _, i in line]
        heights.append(score if last else values[lines[number + 1][0][1]])
        axes.plot([*edges, end], [level(v) for v in heights], color=GREY, linewidth=1.4)
        if last:
            axes.plot(end, level(score), "o", color=PLUS if score > 0 else MINUS, markersize=6)
            axes.text(end + 7, level(score), minus(f"score {score:.2f}"), va="center", fontsize=9)
        axes.text(left - 8, level(0), "0", ha="right", va="center", fontsize=8)
        axes.text(10, top + deep / 2, "V", va="center", fontsize=10)
        for column, i in line:
            axes.text(left + step * column, base, tokens[i].replace(" ", "\u00a0"), fontsize=9,
                      family="monospace")
        for row, (lam, advantages) in enumerate(record["advantages"].items()):
            y = base - 17 - 15 * row
            axes.text(10, y + 2, f"λ = {float(lam):g}", fontsize=9)
            axes.broken_barh(
                [(left + step * column, step * len(tokens[i]) - 1) for column, i in line], (y, 11),
                facecolors=[signed(advantages[i], largest) for _, i in line], linewidth=0)
            axes.plot([edges[0], end], [y - 0.5] * 2, color=GREY, linewidth=0.4)
    scale_bar(axes, width - 250, 12, largest)
    return figure


def scale_bar(axes, x, y, largest):
    """What the colours of `signed` mean."""
    axes.broken_barh([(x + 12 * i, 12) for i in range(13)], (y, 10), linewidth=0,
                     facecolors=[signed(i / 6 - 1, 1) for i in range(13)])
    axes.text(x - 6, y + 2, f"A = −{largest:.1f}", ha="right", fontsize=9)
    axes.text(x + 162, y + 2, f"+{largest:.1f}", fontsize=9)


def draw_trust_region(record):
    """Contours of the exact KL and of the surrogate on a plane; two steps to the same KL."""
    figure, axes = plt.subplots(figsize=(9, 4.8))
    ticks, bound, gain = record["ticks"], record["max_kl"], record["gain"]
    lines = axes.contour(ticks, ticks, gain, 5, colors=GREY, linewidths=0.9, linestyles=":")
    for level in lines.levels:  # named where the contour meets the upper edge
        for x, after, low, high in zip(ticks, ticks[1:], gain[-1], gain[-1][1:]):
            if low <= level < high:
                axes.text(x + (after - x) * (level - low) / (high - low), 1.03 * ticks[-1],
                          minus(f"{level:+.3g}") if level else "0", ha="center", fontsize=8)
    steps = record["steps"]
    for name, label, colour in (("natural", "natural gradient", PLUS),
                                ("gradient", "plain gradient", MINUS)):
        axes.annotate("", steps[name]["at"], (0, 0), arrowprops=dict(
            arrowstyle="-|>", color=colour, linewidth=2.2, shrinkA=0, shrinkB=0))
        axes.plot([], [], color=colour, linewidth=2.2,
                  label=f"{label}: surrogate {steps[name]['gain']:+.4f}")
    for part, width, label in (("1.0", 2.4, f"KL = max_kl = {bound:g} nats per token"),
                               ("0.25", 1.0, "KL = max_kl / 4")):
        contour = record["contours"][part]
        axes.plot(*zip(*contour, contour[0]), color=COLOURS["grpo"], linewidth=width, label=label)
    axes.plot([], [], ":", color=GREY, linewidth=1, label="equal surrogate, named above")
    axes.set(aspect="equal", xlabel="along the plain gradient", ylabel="across it",
             xlim=(ticks[0], ticks[-1]), ylim=(ticks[0], ticks[-1]))
    axes.locator_params(nbins=5)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=1, alignment="left",
                title=f"a plane in a space of {record['parameters']:,} parameters\n")
    figure.tight_layout()
    return figure


def draw_group(record):
    """A group of answers, sorted by score, and their advantages as bars."""
    scores, advantages = record["scores"], record["advantages"]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    height = 56 + 33 * len(order)
    figure, axes = canvas(740, height)
    axes.text(8, height - 14, f"> {record['prompt']}", fontweight="bold", va="center")
    zero, unit = 635, 55 / max(map(abs, advantages))
    for x, head, place in ((8, "answer", "left"), (510, "score", "right"),
                           (zero, "advantage (GRPO.1)", "center")):
        axes.text(x, height - 36, head, fontsize=9, fontstyle="italic", ha=place, va="center")
    for row, i in enumerate(order):
        y, a = height - 63 - 33 * row, advantages[i]
        text = textwrap.wrap(record["answers"][i], 98, max_lines=2, placeholder=" …")
        axes.text(8, y, "\n".join(text), fontsize=8.5, va="center")
        axes.text(510, y, minus(f"{scores[i]:.2f}"), fontsize=9, ha="right", va="center")
        axes.add_patch(plt.Rectangle((zero, y - 8), unit * a, 16, linewidth=0,
                                     facecolor=PLUS if a > 0 else MINUS))
        axes.text(zero + unit * a + (5 if a > 0 else -5), y, minus(f"{a:+.2f}"), fontsize=9,
                  va="center", ha="left" if a > 0 else "right")
    axes.plot([zero] * 2, [6, height - 46], color=GREY, linewidth=1)
    return figure


def draw_implicit_reward(record):
    """Means of both implicit rewards along a run, and every held-out pair at its end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for side, (name, colour) in enumerate((("chosen", PLUS), ("rejected", MINUS))):
        left.plot(record["steps"], [mean[side] for mean in record["means"]], "o-", color=colour,
                  markersize=4, label=name)
    left.fill_between(record["steps"], *zip(*record["means"]), color=GREY, alpha=0.15, linewidth=0,
                      label="margin")
    left.set(xlabel="step", ylabel=f"β log(π / π ref), β = {record['beta']:g}",
             title=f"mean of {len(record['rewards'])} held-out pairs")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.legend(loc="lower left")
    ends = [min(map(min, record["rewards"])), max(map(max, record["rewards"]))]
    right.plot(ends, ends, color=GREY, linewidth=1)
    for better, colour, place, name in ((True, PLUS, 0.97, "chosen above rejected"),
                                        (False, MINUS, 0.04, "rejected above chosen")):
        pairs = [(r, c) for c, r in record["rewards"] if (c > r) == better]
        right.plot(*zip(*pairs), "o", color=colour, markersize=3.5, alpha=0.75)
        right.text(0.02 if better else 0.98, place, f"{name}: {len(pairs)}", color=colour,
                   transform=right.transAxes, ha="left" if better else "right",
                   va="top" if better else "bottom", fontsize=9)
    right.plot(0, 0, "+", color=GREY, markersize=14, markeredgewidth=2)
    right.set(xlabel="of the rejected answer", ylabel="of the chosen answer",
              ylim=(ends[0], ends[1] + 0.15 * (ends[1] - ends[0])),
              title=f"each pair after step {record['steps'][-1]}; all began at the cross")
    for axes in (left, right):
        axes.grid()
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------ the comparison


def draw_learning_curves(record, comparison):
    """Score, gold and KL along the runs: mean and range over the seeds; at the right edge the
    finished policies on held-out prompts. DPO samples nothing while it learns."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6))
    sft = comparison["best of"]["1"]
    for script, colour in COLOURS.items():
        for axes, key in zip(panels, ("score", "gold", "kl")):
            runs = record.get(script, [])
            if runs:
                at = [(i + 0.5) / len(runs[0][key]) for i in range(len(runs[0][key]))]
                columns = list(zip(*(run[key] for run in runs)))
                axes.fill_between(at, [min(c) for c in columns], [max(c) for c in columns],
                                  color=colour, alpha=0.2, linewidth=0)
                axes.plot(at, [statistics.mean(c) for c in columns], color=colour, linewidth=1.8,
                          label=script.upper())
    for place, (script, colour) in enumerate(COLOURS.items()):
        for axes, key in zip(panels, ("score", "gold", "KL")):
            found = [run[key] for run in compare.seeds(comparison["runs"], script)]
            axes.plot([1.04 + 0.03 * place] * len(found), found, "o", color=colour,
                      markersize=4.5)
    for axes, key in zip(panels, ("score", "gold", "KL")):
        axes.axhline(sft[key], color=GREY, linewidth=0.8, dashes=(3, 2), label="SFT")
        axes.set(xlabel="share of the run", title={"KL": "KL to the SFT model, nats"}.get(key, key))
        axes.grid()
    panels[0].plot([], [], "o", color=COLOURS["dpo"], markersize=4.5, label="DPO")
    panels[0].plot([], [], "o", color=GREY, markersize=4.5, label="at the end, held-out prompts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def kl_axis(axes, title):
    """KL to the right, even up to 1 and logarithmic from there on: runs lie between 0 and 100s."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="KL to the SFT model, nats per answer", title=title)
    axes.grid()


def draw_frontier(comparison):
    """Score and gold against the KL paid for them: seeds, and a line through the --betas."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    best = {int(n): stats for n, stats in comparison["best of"].items()}
    bound = [math.log(n) - (n - 1) / n for n in best]
    for axes, key in zip(panels, ("score", "gold")):
        axes.plot(bound, [stats[key] for stats in best.values()], "--", color=GREY, marker=".",
                  label="best of n (KL: at most)")
        for script, colour in COLOURS.items():
            found = compare.seeds(comparison["runs"], script)
            middle = tuple(statistics.mean(run[k] for run in found) for k in ("KL", key))
            others = [(run["KL"], run[key]) for name, run in comparison["runs"].items()
                      if name.startswith(f"{script}-beta")]
            axes.plot(*zip(*sorted([middle, *others])), "-", color=colour, linewidth=1.2)
            axes.plot(*zip(*others), "s", color=colour, markersize=4) if others else None
            axes.plot([run["KL"] for run in found], [run[key] for run in found], "o",
                      color=colour, markersize=5, label=script.upper())
        kl_axis(axes, key)
    panels[0].plot([], [], "s-", color=GREY, markersize=4, linewidth=1.2, label="another --beta")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def draw_overoptimisation(comparison):
    """Score and gold along a PPO run without a KL penalty that goes on for too long."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    steps = [comparison["best of"]["1"], *comparison["runs"]["ppo-long"]["steps"].values()]
    peak = max(steps, key=lambda stats: stats["gold"])
    for axes, key, colour, title in zip(panels, ("score", "gold"), (PLUS, COLOURS["dpo"]), (
            "score: the reward model", "gold: the hidden preference")):
        axes.plot([stats["KL"] for stats in steps], [stats[key] for stats in steps], "o-",
                  color=colour, markersize=4)
        if peak is not steps[-1]:
            axes.axvline(peak["KL"], color=GREY, linewidth=1, dashes=(3, 2))
            axes.annotate("gold is highest", (peak["KL"], 0.06), (5, 0), fontsize=9,
                          xycoords=("data", "axes fraction"), textcoords="offset points")
        kl_axis(axes, title)
    figure.tight_layout()
    return figure


def draw_growth(record):
    """The time of a step when one size is doubled, again and again, against that of the smallest;
    dashed: what grows as the work does."""
    sizes = list(next(iter(record.values())))
    figure, panels = plt.subplots(1, len(sizes), figsize=(12, 3.2), sharey=True)
    colours = {**COLOURS, "sft": GREY, "reward_model": "#b58900"}
    for axes, size in zip(panels, sizes):
        for script, found in record.items():
            values, seconds = zip(*found[size])
            axes.plot([x / values[0] for x in values], [t / seconds[0] for t in seconds], "o-",
                      color=colours[script], markersize=3, linewidth=1.2, label=script)
        times = [x / values[0] for x in values]
        axes.plot(times, [x**2 if size == "width" else x for x in times], "--", color=GREY,
                  linewidth=1)
        axes.set(title=size, xscale="log", yscale="log", xlabel="times as large")
        axes.set_xticks(times, [f"{x:g}" for x in times])
        axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axes.minorticks_off()
    panels[0].set_ylabel("times as long")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


def draw(records, comparison, out):
    """Writes every picture to the folder `out`. records: {name: record}; comparison: what
    benchmarks/compare.py wrote, or None. Returns the names."""
    plt.rcParams.update(STYLE)
    figures = {
        "pipeline": draw_pipeline(), "ppo_step": draw_ppo_step(),
        "tokens": draw_tokens(records["one_prompt"]),
        "four_models": draw_four_models(records["models"]),
        "clip": draw_clip(records["clip"]), "credit": draw_credit(records["credit"]),
        "trust_region": draw_trust_region(records["trust_region"]),
        "group": draw_group(records["group"]),
        "implicit_reward": draw_implicit_reward(records["implicit_reward"])}
    if records.get("growth"):
        figures["growth"] = draw_growth(records["growth"])
    if comparison and "curves" in records:
        figures |= {"learning_curves": draw_learning_curves(records["curves"], comparison),
                    "frontier": draw_frontier(comparison)}
        if "ppo-long" in comparison["runs"]:
            figures["overoptimisation"] = draw_overoptimisation(comparison)
    else:
        print("the three pictures of the comparison are left out: run benchmarks/compare.py, then "
              "python docs/draw.py --record curves")
    for name, figure in figures.items():
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
        shorter = re.sub(r"(\.\d\d)\d{3,4}\b", r"\1", text.getvalue())  # a hundredth of a point
        (out / f"{name}.svg").write_text(shorter)
    return list(figures)


# ------------------------------------------------------------------------------ command


def parse_args(argv=None):
    p = flags.parser(__doc__)
    p.add_argument("--record", nargs="*", choices=list(RECORDS), help="make these anew (all)")
    return p.parse_args(argv)


def read(path):
    return json.loads(path.read_text()) if path.is_file() else None


def main(argv=None):
    args = parse_args(argv)
    if args.record is not None:
        flags.quiet()
        make_records(args.record or list(RECORDS), DOCS / "records")
    records = {path.stem: read(path) for path in (DOCS / "records").glob("*.json")}
    records["growth"] = read(ROOT / "benchmarks" / "growth.json")
    names = draw(records, read(ROOT / "benchmarks" / "compare.json"), DOCS)
    print(f"drawn in docs/: {', '.join(names)}")


if __name__ == "__main__":
    main()
