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
import grpo  # noqa: E402
from cli import flags, models, rewards  # noqa: E402
from tiny import world  # noqa: E402

CONFIG = grpo.Config(**grpo.TINY)  # its rollout does what that of ppo.py does, without a critic


def held_out():
    return [row for row in world.prompts() if row["split"] == "test"]


def judge(adapter, args, each=1):
    """(statistics, [(prompt, response)], scores) of one adapter, `each` responses a prompt."""
    model, tokenizer = common.load_model()
    models.load_adapter(model, "policy", adapter)
    models.load_adapter(model, "reference", args.sft)
    reward = rewards.load(args, model, CONFIG.max_length)
    generator = torch.Generator().manual_seed(args.seed)
    prompts = held_out()
    random.Random(args.seed).shuffle(prompts)
    prompts, texts, parts = prompts[: args.prompts], [], []
    size = max(1, 128 // each)  # prompts at a time
    for i in range(0, len(prompts), size):
        rows = prompts[i : i + size]
        batch, said = grpo.rollout(model, tokenizer, rows, reward, CONFIG, generator, each)
        texts += said
        parts.append((batch["score"].cpu(), grpo.rollout_stats(batch)))
    score = torch.cat([part for part, _ in parts])
    pairs = [(prompts[i // each]["prompt"], text) for i, text in enumerate(texts)]
    gold = torch.tensor([world.gold_score(*pair) for pair in pairs])
    first = texts[::each][:100]

    def mean(key):
        return sum(stats[key] * len(part) for part, stats in parts) / len(texts)

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
    model, tokenizer = common.load_model()
    reward = rewards.load(args, model, CONFIG.max_length)
    rng, wins = random.Random(args.seed), {}
    for name, flaw in world.FLAWS.items():
        rows = held_out()
        clean = [world.compose(row["topic"], "friendly", rng) for row in rows]
        for row, answer in zip(rows, clean):
            row["clean"] = " ".join(answer)
            row["damaged"] = " ".join(flaw(answer, row["topic"], rng))
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
    p = flags.parser(__doc__)
    p.add_argument("adapters", nargs="*", help="folders of trained policies")
    p.add_argument("--sft", default=str(common.TINY / "sft"), help="their start (tiny/sft)")
    p.add_argument("--reward", default=str(common.TINY / "reward_model"), help="(tiny/...)")
    p.add_argument("--prompts", type=flags.whole, default=384, help="held-out prompts (384, all)")
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
