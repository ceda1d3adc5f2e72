"""A reward model from preferences: which of two answers would a person rather have?
(Bradley and Terry 1952; Stiennon et al. 2020, arXiv:2009.01325, section 3.4)

    (RM.1)  P(w > l | x) = sigmoid(r(x, w) - r(x, l))            Bradley-Terry
    (RM.2)  L = -E[ log sigmoid(r_w - r_l - m) ] + c E[ (r_w + r_l)^2 ]
    (RM.3)  accuracy = P(r_w > r_l),  margin = E[r_w - r_l]       on held-out pairs

(RM.1) leaves a function of x in r free; the centring term c of (RM.2) holds it near 0 (Eisenstein
et al. 2023, arXiv:2312.09244, Eq. 2). The model is the SFT model with a scalar head N(0, 1/(d+1))
that reads the last real token, the EOS. It starts at random, with L around ln 2.

People disagree, so accuracy has a ceiling below 1. Where the data state how sure the labeller was
(a column `p_chosen`), the ceiling is printed beside the accuracy. Calibration: of the pairs that
(RM.1) calls 80 % certain, 80 % should be right.

Left out on purpose: rankings of more than two answers, and a likelihood for ties: collect.py keeps
the ties that --collect meets, training leaves them out.

    python reward_model.py --adapter runs/sft --out runs/reward_model
    python reward_model.py --collect 50 --out collected.jsonl
    python reward_model.py --data collected.jsonl
"""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora

# ------------------------------------------------------------------------------ the mathematics


def bradley_terry_loss(chosen, rejected, margin=0.0, center=0.0):
    """Negative log-likelihood of the preferences, plus the centring term. (RM.2)

    chosen, rejected [B]: scores of the preferred and of the other answer to the same prompt.
    margin m: by how much the preferred one should lead, a number or [B]; center: the weight c.
    Returns a scalar, nats per pair. Raises ValueError if the shapes differ.
    Source: arXiv:2009.01325, section 3.4; margin arXiv:2307.09288, Eq. 2."""
    if chosen.shape != rejected.shape:
        raise ValueError(f"shapes differ: {tuple(chosen.shape)} and {tuple(rejected.shape)}")
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    return loss + center * (chosen + rejected).square().mean()  # (RM.2)


def calibration(difference, edges=(0.0, 0.5, 1.0, 2.0, 4.0, math.inf)):
    """Rows (from, to, pairs, P by (RM.1), share right) by the size of the difference r_w - r_l [B].

    A model is calibrated when the last two columns agree."""
    rows, size = [], difference.abs()
    for low, high in zip(edges, edges[1:]):
        inside = (size >= low) & (size < high)
        if inside.any():
            claimed = torch.sigmoid(size[inside]).mean().item()
            right = (difference[inside] > 0).float().mean().item()
            rows.append((low, high, int(inside.sum()), claimed, right))
    return rows


# ------------------------------------------------------------------------------ batch


def score_pairs(model, pairs):
    """(chosen [B], rejected [B]) scores, in one forward pass over both."""
    both = [x + chosen for _, x, chosen, _ in pairs] + [x + rejected for _, x, _, rejected in pairs]
    ids, attention = common.pad(both, "right", model.device)
    return common.sequence_scores(model, "reward", ids, attention).chunk(2)


@torch.no_grad()
def evaluate(model, pairs, args):
    """Held-out loss, accuracy and margin (RM.3), and the differences r_w - r_l."""
    scores = torch.empty(len(pairs), 2)
    for where, part in common.by_length(pairs, args.micro_batch_size):
        scores[where] = torch.stack(score_pairs(model, part), 1).cpu()
    chosen, rejected = scores.T
    difference = chosen - rejected
    stats = {
        "loss": bradley_terry_loss(chosen, rejected).item(),
        "accuracy": (difference > 0).float().mean().item(),  # (RM.3)
        "margin": difference.mean().item(),
        "mean score": torch.cat([chosen, rejected]).mean().item(),
        "score std": torch.cat([chosen, rejected]).std().item(),
    }
    return stats, difference


# ------------------------------------------------------------------------------ flags


def parse_args(argv=None):
    p = common.flags(__doc__, steps=400, batch_size=32, lr=(1e-3, 1e-4))
    p.add_argument("--margin", type=common.amount, default=0.0, help="m of the loss (0)")
    p.add_argument("--center", type=common.amount, default=0.001, help="c of the loss (0.001)")
    p.add_argument("--warmup", type=common.share, default=0.05, help="share of the steps (0.05)")
    add = p.add_argument_group("label pairs in the terminal instead of training").add_argument
    add("--collect", type=common.whole, metavar="N",
        help="pairs that the file --out (collected.jsonl) is to hold; --data: the prompts")
    add("--max-new-tokens", type=common.whole, default=96, help="of an answer to judge (96)")
    add("--temperature", type=common.amount, default=0.7, help="of their sampling (0.7)")
    args = p.parse_args(argv)
    if not args.collect:
        args.max_new_tokens = 0  # training samples nothing and needs no room for it
    data = "prompts.jsonl" if args.collect else "preferences.jsonl"
    common.defaults(args, adapter="sft", data=data)
    return args


# ------------------------------------------------------------------------------ main loop


def report(rows, before, after, difference):
    """Prints the held-out table, the labeller's ceiling and the calibration."""
    common.print_table(f"{len(rows)} held-out pairs", before, after)
    common.print_ceiling(rows, after["accuracy"])
    print(f"\n{'|r_w - r_l|':>14} {'pairs':>6} {'claimed':>8} {'right':>6}")
    for low, high, n, claimed, right in calibration(difference):
        print(f"{low:6.1f} to {high:4.1f} {n:6} {claimed:8.1%} {right:6.1%}")


def main(argv=None):
    args = parse_args(argv)
    if args.collect:
        import collect  # here, so that training can be copied without it

        return collect.session(args)
    out = common.free_folder(args, "reward_model")
    common.seed_everything(args.seed)
    train, test = common.load_data(args.data, ["prompt", "chosen", "rejected"])
    model, tokenizer = common.load_model(args)
    common.start_adapter(model, "reward", args)
    if "reward" not in getattr(model, "heads", {}):
        lora.add_head(model, "reward")
    test, room = common.take(test, args.eval_size), args.max_length
    pairs = common.encode_preferences(tokenizer, train, room)
    test_pairs = common.encode_preferences(tokenizer, test, room, "held-out")
    if not pairs or not test_pairs:
        common.fail(f"no pair of different answers fits into --max-length {args.max_length}")
    before, _ = evaluate(model, test_pairs, args)
    print(f"loss before training {before['loss']:.3f} (ln 2 = {math.log(2):.3f})")
    out = common.start_run(out, args)
    parameters = lora.adapter_parameters(model, "reward")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, eps=1e-5, weight_decay=0.0)
    order = common.batches(len(pairs), args.batch_size, args.seed)
    bar = tqdm(range(args.steps), desc="reward_model")
    for step in bar:
        clock = time.time()
        # 1. a batch of pairs
        batch = [pairs[i] for i in next(order)]
        # 2. the gradient of (RM.2), micro-batch by micro-batch
        loss, differences = 0.0, []
        for _, part in common.by_length(batch, args.micro_batch_size):
            chosen, rejected = score_pairs(model, part)
            part_loss = bradley_terry_loss(chosen, rejected, args.margin, args.center)
            part_loss = part_loss * len(part) / len(batch)
            part_loss.backward()
            loss += part_loss.item()
            differences.append((chosen - rejected).detach())
        # 3. one AdamW step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        # 4. measure (RM.3), on the batch before the step
        difference = torch.cat(differences)
        accuracy, margin = (difference > 0).float().mean().item(), difference.mean().item()
        row = {"step": step, "seconds": time.time() - clock, "loss": loss, "grad_norm": norm}
        row |= {"lr": lr, "accuracy": accuracy, "margin": margin}
        common.append(out / "metrics.jsonl", row)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}")
        if args.save_every and (step + 1) % args.save_every == 0:
            lora.save_adapter(model, "reward", out / f"step-{step + 1}")

    lora.save_adapter(model, "reward", out)
    after, difference = evaluate(model, test_pairs, args)
    rows = [row for row, _, _, _ in test_pairs]
    for row, d in zip(rows, difference.tolist()):
        sample = {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        common.append(out / "samples.jsonl", sample | {"score": d})
    report(rows, before, after, difference)
    common.finish(out, args)


if __name__ == "__main__":
    main()
