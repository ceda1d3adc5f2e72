"""Judges policies and reward models of the tiny world by the hidden preference, from outside.

    python tiny/judge.py runs/ppo runs/ppo-2       adapters beside the SFT model they started from
    python tiny/judge.py --best-of 4 64            what picking among n samples of the SFT reaches
    python tiny/judge.py --probe                   does the reward model see each flaw?

All on the held-out prompts, sampled at the temperature of ppo.py. Columns: gold (mean gold_score),
on topic (share that answers the question asked, and nothing else), stops (share that ends by
itself), score (reward model) and its standard deviation, KL (to the SFT model, nats per response),
tokens, top answer (the largest share that one answer has among the first 100).
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402
from tiny import world  # noqa: E402


def held_out():
    return [row for row in world.prompts() if row["split"] == "test"]


def judge(adapter, args, each=1):
    """(statistics, [(prompt, response)], scores) of one adapter, `each` responses a prompt."""
    policy = ppo.parse_args(["--adapter", args.sft, "--reward", args.reward])
    common.seed_everything(args.seed)
    model, tokenizer = common.load_model(policy)
    common.load_adapter(model, "policy", adapter)
    common.load_adapter(model, "reference", args.sft)
    reward = common.load_reward(args.reward, model, tokenizer, policy)
    lora.copy_adapter(model, "policy", "critic")  # the rollout asks for one; nothing here reads it
    lora.add_head(model, "critic")
    generator = torch.Generator(model.device).manual_seed(args.seed)
    prompts = held_out()
    random.Random(args.seed).shuffle(prompts)
    rows = [row for row in prompts[: args.prompts] for _ in range(each)]
    parts = [ppo.rollout(model, tokenizer, rows[i : i + 128], reward, generator, policy)
             for i in range(0, len(rows), 128)]
    texts = [t for part in parts for t in part["responses"]]
    score = torch.cat([part["score"] for part in parts]).cpu()
    pairs = [(row["prompt"], text) for row, text in zip(rows, texts)]
    gold = torch.tensor([world.gold_score(*pair) for pair in pairs])
    first = texts[::each][:100]

    def mean(key):
        weights = [len(part["score"]) for part in parts]
        return sum(part["stats"][key] * w for part, w in zip(parts, weights)) / len(rows)

    stats = {
        "gold": gold.mean().item(),
        "on topic": sum(world.on_topic(*pair) for pair in pairs) / len(pairs),
        "stops": mean("eos_rate"), "score": score.mean().item(), "score sd": score.std().item(),
        "KL": mean("kl"), "tokens": mean("length"),
        "top answer": Counter(first).most_common(1)[0][1] / len(first),
    }
    return stats, pairs, score


def probe(args):
    """For each flaw, how often the reward model prefers a clean answer to its damaged copy."""
    policy = ppo.parse_args(["--reward", args.reward])
    model, tokenizer = common.load_model(policy)
    reward = common.load_reward(args.reward, model, tokenizer, policy)
    rng, wins = random.Random(args.seed), {}

    @torch.no_grad()
    def scores(prompts, responses):
        pairs = [common.encode_pair(tokenizer, p, r, 512) for p, r in zip(prompts, responses)]
        ids, attention = common.pad([p + r for p, r in pairs], "right", model.device)
        return reward(ids, attention, prompts, responses, None)

    rows = held_out()
    for name, flaw in world.FLAWS.items():
        clean = [world.compose(row["topic"], "friendly", rng) for row in rows]
        damaged = [flaw(answer, row["topic"], rng) for answer, row in zip(clean, rows)]
        prompts = [row["prompt"] for row in rows]
        a, b = (scores(prompts, [" ".join(s) for s in side]) for side in (clean, damaged))
        wins[name] = (a > b).float().mean().item()
    return wins


def best_of(args, sizes):
    """{n: statistics} of the answer with the best score among the first n of max(sizes) answers
    of the SFT model; "best gold" is what the best of them by gold would have reached."""
    each = max(sizes)
    stats, pairs, score = judge(args.sft, args, each)
    gold = torch.tensor([world.gold_score(*pair) for pair in pairs]).view(-1, each)
    topic = torch.tensor([float(world.on_topic(*pair)) for pair in pairs]).view(-1, each)
    columns, out = {"score": score.view(-1, each), "gold": gold, "on topic": topic}, {}
    for n in sizes:
        best = columns["score"][:, :n].argmax(1, keepdim=True)
        picked = {key: x.gather(1, best).mean().item() for key, x in columns.items()}
        out[n] = stats | picked if n == 1 else picked  # the other columns: of all the answers
        out[n]["best gold"] = gold[:, :n].max(1).values.mean().item()
    return out


def parse_args(argv=None):
    p = common.parser(__doc__)
    p.add_argument("adapters", nargs="*", help="folders of trained policies")
    p.add_argument("--sft", default=str(common.TINY / "sft"), help="their start (tiny/sft)")
    p.add_argument("--reward", default=str(common.TINY / "reward_model"), help="(tiny/...)")
    p.add_argument("--prompts", type=common.whole, default=384, help="held-out prompts (384, all)")
    p.add_argument("--best-of", type=common.whole, nargs="+", help="numbers of SFT samples a prompt")
    p.add_argument("--json", action="store_true", help="print one object, without --sft's own row")
    p.add_argument("--samples", type=int, default=0, help="answers to print of each (0)")
    p.add_argument("--probe", action="store_true", help="only the reward model's table of flaws")
    p.add_argument("--seed", type=common.seed, default=0)
    return p.parse_args(argv)


def main():
    args = parse_args()
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
        print(f"{name}\n   " + "  ".join(f"{key} {value:.3f}" for key, value in stats.items()))
        for prompt, response in texts.get(name, [])[: args.samples]:
            print(f"   > {prompt}\n     {response}")


if __name__ == "__main__":
    main()
