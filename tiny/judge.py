"""Judges policies and reward models of the tiny world by the hidden preference, from outside.

    python tiny/judge.py runs/ppo runs/ppo-2       adapters beside the SFT model they started from
    python tiny/judge.py --best-of 4 64            what picking among n samples of the SFT reaches
    python tiny/judge.py --probe                   does the reward model see each flaw?

All of it on the held-out prompts, with answers sampled at the temperature of ppo.py. Columns: gold
(mean gold_score); answered (of the topics' own questions, the share that gets an answer), untaught
(the same for the eight topics that only the base was trained on); declined (of the prompts about
nothing in this world, the share that is told so); together (of the answers with an analogy, the
share whose analogies all explain what was said); damaged (the share of sentences that are garbled,
made up or said before); stops (share that ends by itself); score (reward model) and its standard
deviation; KL (to the SFT model, nats per response); tokens; top answer (the largest share that one
answer has).
"""

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import grpo  # noqa: E402
from cli import flags, models, rewards  # noqa: E402
from tiny import world  # noqa: E402

CONFIG = grpo.Config(**grpo.TINY)  # its rollout does what that of ppo.py does, without a critic


def held_out():
    return [row for row in world.prompts() if row["split"] == "test"]


def judged_prompts(args):
    """The held-out prompts, shuffled, at most args.prompts of them."""
    rows = held_out()
    random.Random(args.seed).shuffle(rows)
    return rows[: args.prompts]


def judge(adapter, args, each=1):
    """(statistics, [(prompt, response)], scores) of one adapter, `each` responses a prompt."""
    model, tokenizer = common.load_model()
    models.load_adapter(model, "policy", adapter)
    models.load_adapter(model, "reference", args.sft)
    reward = rewards.load(args, model, CONFIG.max_length)
    generator = torch.Generator().manual_seed(args.seed)
    prompts, texts, parts = judged_prompts(args), [], []
    size = max(1, 128 // each)  # prompts at a time
    for i in range(0, len(prompts), size):
        rows = prompts[i : i + size]
        batch, said = grpo.rollout(model, tokenizer, rows, reward, CONFIG, generator, each)
        texts += said
        parts.append((batch["score"].cpu(), grpo.rollout_stats(batch)))
    score = torch.cat([part for part, _ in parts])
    pairs = [(prompts[i // each]["prompt"], text) for i, text in enumerate(texts)]
    gold = torch.tensor([world.gold_score(*pair) for pair in pairs])
    first = texts[::each]

    def mean(key):
        return sum(stats[key] * len(part) for part, stats in parts) / len(texts)

    stats = {
        "gold": gold.mean().item(),
        **traits(prompts, pairs, each),
        "stops": mean("eos_rate"), "score": score.mean().item(), "score sd": score.std().item(),
        "KL": mean("kl"), "tokens": mean("length"),
        "top answer": Counter(first).most_common(1)[0][1] / len(first),
    }
    return stats, pairs, score


def traits(prompts, pairs, each):
    """The means of world.traits over the answers to which each applies."""
    found = [world.traits(*pair) | {"untaught": None} for pair in pairs]
    for i, trait in enumerate(found):
        if prompts[i // each]["topic"] in world.UNTAUGHT:
            trait["answered"], trait["untaught"] = None, trait["answered"]
    values = {key: [float(t[key]) for t in found if t[key] is not None] for key in found[0]}
    return {key: sum(x) / len(x) if x else math.nan for key, x in values.items()}


def probe(args):
    """For each flaw, how often the reward model prefers a clean answer to its damaged copy."""
    model, tokenizer = common.load_model()
    reward = rewards.load(args, model, CONFIG.max_length)
    rng, wins = random.Random(args.seed), {}
    for name, flaw in world.FLAWS.items():
        rows = held_out()
        for row in rows:
            asked = row["prompt"], row["topic"]
            clean = world.compose(*asked, "friendly", rng)
            row["clean"] = " ".join(clean)
            row["damaged"] = " ".join(flaw(clean, *asked, rng))
        rows = [row for row in rows if row["clean"] != row["damaged"]]
        # The two answers to a prompt are a group, so that the prompt is read once.
        encoded = common.encode(tokenizer, rows, ["clean", "damaged"], CONFIG.max_length)
        batch, score = common.collate(encoded, model.device), torch.zeros(2 * len(rows))
        for index, part in common.micro_batches(batch, 32):
            asked = [rows[i // 2] for i in index]
            found, _ = common.score(model, tokenizer, asked, **part, reward=reward)
            score[index] = found.cpu()
        a, b = score.view(-1, 2).unbind(1)
        wins[name] = (a > b).float().mean().item()
    return wins


def best_of(args, sizes):
    """{n: statistics} of the answer with the best score among the first n of max(sizes) answers
    of the SFT model; "best gold" is what the best of them by gold would have reached."""
    each = max(sizes)
    _, pairs, score = judge(args.sft, args, each)
    gold = torch.tensor([world.gold_score(*pair) for pair in pairs]).view(-1, each)
    score, out = score.view(-1, each), {}
    prompts = judged_prompts(args)
    for n in sizes:
        best = score[:, :n].argmax(1)
        picked = [pairs[i * each + j] for i, j in enumerate(best.tolist())]
        out[n] = {"score": score.gather(1, best[:, None]).mean().item(),
                  "gold": sum(world.gold_score(*pair) for pair in picked) / len(picked),
                  "best gold": gold[:, :n].max(1).values.mean().item(),
                  **traits(prompts, picked, 1)}
    return out


def parse_args(argv=None):
    p = flags.parser(__doc__)
    p.add_argument("adapters", nargs="*", help="folders of trained policies")
    p.add_argument("--sft", default=str(common.TINY / "sft"), help="their start (tiny/sft)")
    p.add_argument("--reward", default=str(common.TINY / "reward_model"), help="(tiny/...)")
    p.add_argument("--prompts", type=flags.whole, help="held-out prompts (all)")
    p.add_argument("--best-of", type=flags.whole, nargs="+", help="numbers of SFT samples a prompt")
    p.add_argument("--json", action="store_true", help="print one object, without --sft's own row")
    p.add_argument("--samples", type=int, default=0, help="answers to print of each (0)")
    p.add_argument("--probe", action="store_true", help="only the reward model's table of flaws")
    p.add_argument("--seed", type=flags.seed, default=0)
    args = p.parse_args(argv)
    args.trust_remote_code = False
    return args


def main():
    with flags.errors():
        show(parse_args())


def show(args):
    """Prints what the flags ask for."""
    flags.quiet()
    if args.probe:
        print(f"{'flaw':16} the clean answer wins")
        for name, share in probe(args).items():
            print(f"{name:16} {share:6.1%}")
        return
    results, texts = {}, {}
    if args.best_of:
        results = {f"best of {n}": stats for n, stats in best_of(args, args.best_of).items()}
    else:
        for adapter in [*([] if args.json else [args.sft]), *args.adapters]:
            results[adapter], texts[adapter], _ = judge(adapter, args)
    if args.json:
        print(json.dumps(results))
        return
    for name, stats in results.items():
        print(f"{name}\n   " + "  ".join(f"{key} {value:z.3f}" for key, value in stats.items()))
        for prompt, response in texts.get(name, [])[: args.samples]:
            print(f"   > {prompt}\n     {response}")


if __name__ == "__main__":
    main()
