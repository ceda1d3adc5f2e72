"""GRPO for a language model: several answers to each prompt, each judged against the others; no
critic (Shao et al. 2024, arXiv:2402.03300), and its one-line relatives.

For G answers y_1 .. y_G to a prompt, with scores r_1 .. r_G:

    (GRPO.1)  A_i = (r_i - mean r) / (std r + 1e-4)         "std"; "none": r_i - mean r;
                                                            "loo": r_i - mean of the others
    (GRPO.2)  rho_t = pi(y_t) / pi_old(y_t)                 "gspo": their geometric mean over y
    (GRPO.3)  l_t = max(-A rho, -A clip(rho, 1-eps_low, 1+eps_high)) + beta K_t
    (GRPO.4)  K_t = exp(d_t) - 1 - d_t,  d_t = (log pi_ref - log pi)_t                    k3
    (GRPO.5)  L = 1/B sum_i 1/|y_i| sum_t l_t               "grpo", "gspo"
    (GRPO.6)  L = sum l_t / sum |y_i|                       "dapo"
    (GRPO.7)  L = sum l_t / (B max_tokens)                  "dr_grpo", which goes with "none"
    (GRPO.8)  r_i <- r_i - beta sum_t (log pi_old - log pi_ref)_t     with --kl-in reward, K = 0

Where the KL stands decides what is learnt. In the reward (GRPO.8) its gradient is that of
KL(pi || pi_ref) over whole answers. In the loss, as in the paper, K_t has the gradient of the
forward KL(pi_ref || pi) at that token; "k3-corrected" multiplies it by the token's ratio and "k2"
is d^2/2, both with the gradient of KL(pi || pi_ref) at that token. None of the three sees how a
token changes the KL of the tokens after it. benchmarks/closed_form.py shows where each ends.

Dividing by the spread changes what is maximised: prompts with little spread weigh more (for scores
0 and 1 with success rate p the objective becomes 2 arcsin sqrt p in a large group, though in one of
4 it hardly differs from p), and a KL in the loss weighs beta times the spread of the current
policy, so its hold loosens as the answers become alike.

Left out on purpose: resampling of groups without spread (they are counted), an overlong penalty.

    python grpo.py --steps 200
    python grpo.py --loss dr_grpo --adv none --kl-in reward
"""

import time
from collections import Counter
from functools import partial

import torch
from tqdm import tqdm

import common
import lora

# ------------------------------------------------------------------------------ the mathematics


def token_logps(logits, ids, temperature=1.0):
    """log pi(y_t) of each sampled token under softmax(logits / temperature), in fp32.

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats; enters (GRPO.2) and (GRPO.4)."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def masked_mean(x, mask):
    """Mean of x over the real tokens; both [B, R]."""
    return (x * mask).sum() / mask.sum()


def group_advantages(rewards, scale="std"):
    """How much better each answer is than its group. (GRPO.1)

    rewards [N, G], one row a prompt, in units of score. scale: "std" divides by the unbiased
    standard deviation + 1e-4; "none" subtracts the mean only (Dr. GRPO); "loo" subtracts the mean
    of the other answers (RLOO), which is "none" times G / (G - 1) and does without its bias: an
    answer stands in its own mean. Returns [N, G]; a group without spread has advantage 0.
    Raises ValueError for a group of one answer, or for another scale.
    Source: arXiv:2402.03300, section 4.1.2; arXiv:2503.20783; arXiv:2402.14740."""
    G = rewards.shape[1]
    if G < 2:
        raise ValueError("a group needs at least two answers: one alone is its own mean")
    rewards = rewards - rewards[:, :1]  # equal scores then cancel exactly, however large they are
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "loo":
        return centred * G / (G - 1)
    if scale == "none":
        return centred
    raise ValueError(f"scale must be std, none or loo, got {scale!r}")


def importance_ratio(logp, logp_old, mask, loss="grpo"):
    """pi / pi_old of each token, [B, R]; for gspo the geometric mean over the answer, [B, 1], which
    is what is clipped there. (GRPO.2) 1 on padding. Source: arXiv:2507.18071, Eq. 7 (gspo)."""
    log_ratio = (logp - logp_old) * mask
    if loss == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return log_ratio.exp()


def kl_penalty(logp, logp_old, logp_ref, mask, kind="k3"):
    """What stands in the loss for the KL to the reference, per token. (GRPO.4)

    All [B, R], logp with gradient; the kinds are told apart in the docstring of this file. Returns
    [B, R], nats, 0 on padding. Source: arXiv:2402.03300, Eq. 4; arXiv:2512.02556 (corrected)."""
    d = (logp_ref - logp) * mask
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return d.expm1() - d  # (GRPO.4)
    if kind == "k3-corrected":
        return (d.expm1() - d) * ((logp - logp_old) * mask).exp()
    raise ValueError(f"kind must be k2, k3 or k3-corrected, got {kind!r}")


def grpo_loss(logp, logp_old, logp_ref, adv, mask, eps_low=0.2, eps_high=0.2, beta=0.0,
              loss="grpo", max_tokens=None, kl="k3"):
    """The clipped surrogate with the KL in the loss, to be minimised. (GRPO.2) to (GRPO.7)

    logp (with gradient), logp_old, logp_ref, mask [B, R]; adv [B]; beta in units of advantage per
    nat. loss: grpo, dapo, dr_grpo (needs max_tokens, the length that every answer is divided by) or
    gspo; kl: see kl_penalty. Returns a scalar. Raises ValueError for another loss, and for dr_grpo
    without max_tokens.
    Source: arXiv:2402.03300, Eq. 3; arXiv:2503.14476 (dapo), 2503.20783 (dr_grpo), 2507.18071
    (gspo)."""
    B, length, adv = len(mask), mask.sum(1, keepdim=True), adv.unsqueeze(1)
    ratio = importance_ratio(logp, logp_old, mask, loss)  # (GRPO.2)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    per_token = torch.max(-adv * ratio, -adv * clipped)  # (GRPO.3)
    if beta:
        per_token = per_token + beta * kl_penalty(logp, logp_old, logp_ref, mask, kl)
    if loss in ("grpo", "gspo"):
        return (per_token * mask / length).sum() / B  # (GRPO.5)
    if loss == "dapo":
        return masked_mean(per_token, mask)  # (GRPO.6)
    if loss == "dr_grpo" and max_tokens:
        return (per_token * mask).sum() / (B * max_tokens)  # (GRPO.7)
    raise ValueError(f"loss must be grpo, dapo, gspo or (with max_tokens) dr_grpo, got {loss!r}")


def token_entropy(logits, temperature=1.0):
    """Entropy [B, R] of softmax(logits / temperature), logits [B, R, V], nats."""
    logp = (logits.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# ------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, tokenizer, rows, G, reward, generator, args):
    """G responses to each row's prompt, with all that does not change during the update.

    Sampling and log-probabilities use the same temperature. A response that did not stop by itself
    scores --missing-eos-score, whatever the reward makes of its torso."""
    stop, room = common.stop_ids(model, tokenizer), args.max_length - args.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, r["prompt"])[-room:] for r in rows]
    with lora.use_adapter(model, "policy"):
        ids, attention, mask = common.sample(
            model, prompts, stop, args.max_new_tokens, args.temperature, generator, each=G)
    rows = [row for row in rows for _ in range(G)]
    batch = dict(ids=ids, attention=attention, mask=mask)
    batch |= {key: torch.zeros_like(mask) for key in ("logp", "logp_ref", "entropy")}
    logps = partial(token_logps, temperature=args.temperature)

    def logps_and_entropy(logits, ids):  # [1, n, 2]: both from the same logits
        return torch.stack([logps(logits, ids), token_entropy(logits, args.temperature)], -1)

    reference = "reference" if args.adapter else None
    for part, b in common.micro_batches(batch, torch.arange(len(ids)), args.micro_batch_size):
        R = b["mask"].shape[1]
        both, _ = common.response_logps(model, "policy", b, logps_and_entropy)
        batch["logp"][part, :R], batch["entropy"][part, :R] = both.unbind(-1)
        batch["logp_ref"][part, :R], _ = common.response_logps(model, reference, b, logps)
    y = ids[:, -mask.shape[1] :]
    responses, ended = common.decode(tokenizer, y, mask), common.ended(y, mask, stop)
    score = reward(ids, attention, [r["prompt"] for r in rows], responses, rows)
    score = torch.where(ended, score, torch.full_like(score, args.missing_eos_score))
    stats = {
        "score": score.mean().item(), "score_std": score.std(unbiased=False).item(),
        "kl": ((batch["logp"] - batch["logp_ref"]) * mask).sum(1).mean().item(),
        "entropy": masked_mean(batch["entropy"], mask).item(),
        "eos_rate": ended.float().mean().item(), "length": mask.sum(1).mean().item(),
    }
    return batch | dict(score=score, responses=responses, stats=stats)


def update(model, parameters, optimizer, batch, args):
    """--ppo-epochs passes over the batch; returns statistics averaged over all minibatches, the
    largest ratio, and those of the first minibatch."""
    mask, seen, beta = batch["mask"], [], args.beta if args.kl_in == "loss" else 0.0
    logps = partial(token_logps, temperature=args.temperature)
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(len(mask)).chunk(args.minibatches):
            stats = Counter(ratio_max=0.0, ratio_error=0.0)
            for part, b in common.micro_batches(batch, rows, args.micro_batch_size):
                logp, _ = common.response_logps(model, "policy", b, logps)
                m, old = b["mask"], b["logp"]
                loss = grpo_loss(logp, old, b["logp_ref"], b["adv"], m, args.clip_low,
                                 args.clip_high, beta, args.loss, args.max_new_tokens, args.kl)
                # what a micro-batch is a mean over: tokens in (GRPO.6), answers in the others
                tokens = m.sum() / mask[rows].sum()
                share = tokens if args.loss == "dapo" else len(part) / len(rows)
                (loss * share).backward()
                with torch.no_grad():
                    log_ratio = (logp - old) * m
                    ratio = importance_ratio(logp, old, m, args.loss)
                    outside = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
                    kl = masked_mean(log_ratio.expm1() - log_ratio, m)  # k3 of KL(old, new)
                    stats.update(loss=(loss * share).item(), approx_kl=(kl * tokens).item(),
                                 clip_fraction=(masked_mean(outside.float(), m) * tokens).item())
                    stats["ratio_max"] = max(stats["ratio_max"], ratio.max().item())
                    stats["ratio_error"] = max(stats["ratio_error"], (ratio - 1).abs().max().item())
            stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(stats)
    mean = {key: sum(s[key] for s in seen) / len(seen) for key in seen[0] if key != "ratio_error"}
    return mean | {"ratio_max": max(s["ratio_max"] for s in seen), "first": seen[0]}


# ------------------------------------------------------------------------------ flags


def parse_args(argv=None):
    p = common.flags(__doc__, steps=200, batch_size=8, lr=(1e-3, 3e-5))
    add, whole, amount = p.add_argument, common.whole, common.amount
    common.sampling_flags(p)
    add("--group-size", type=whole, default=4, help="G, answers a prompt; divides the batch (4)")
    add("--adv", default="std", choices=["std", "none", "loo"], help="advantages (std)")
    add("--loss", default="grpo", choices=["grpo", "dapo", "dr_grpo", "gspo"], help="(grpo)")
    add("--clip-low", type=amount, default=0.2, help="eps_low of the ratio (0.2; gspo: try 3e-4)")
    add("--clip-high", type=amount, default=0.2, help="eps_high (0.2; dapo: 0.28, gspo: 4e-4)")
    add("--beta", type=amount, default=0.04, help="KL weight, per nat (0.04)")
    add("--kl-in", default="loss", choices=["loss", "reward"], help="see above (loss)")
    add("--kl", default="k3", choices=["k3", "k3-corrected", "k2"], help="in the loss (k3)")
    add("--ppo-epochs", type=whole, default=1, help="passes over a rollout batch (1)")
    add("--minibatches", type=whole, default=1, help="updates a pass (1)")
    add("--warmup", type=common.share, default=0.1, help="share of the steps (0.1)")
    args = p.parse_args(argv)
    common.defaults(args, adapter="sft", data="prompts.jsonl")
    if not args.reward:
        common.fail("--reward is needed: a folder, a hub id, or file.py:function")
    if args.group_size < 2:
        common.fail("--group-size must be at least 2: one answer alone is its own mean")
    for flag in ("group_size", "minibatches"):
        if args.batch_size % getattr(args, flag):
            common.fail(f"--batch-size {args.batch_size} is not a multiple of "
                        f"--{flag.replace('_', '-')} {getattr(args, flag)}")
    return args


# ------------------------------------------------------------------------------ main loop


def main(argv=None):
    args = parse_args(argv)
    out = common.free_folder(args, "grpo")
    common.seed_everything(args.seed)
    train, test = common.load_data(args.data, ["prompt"])
    test = common.take(test, args.eval_size)
    model, tokenizer = common.load_model(args)
    common.check_prompts(tokenizer, [*train, *test], args.max_length - args.max_new_tokens)
    common.start_adapter(model, "policy", args)
    if args.adapter:
        lora.copy_adapter(model, "policy", "reference")
    reward = common.load_reward(args.reward, model, tokenizer, args)

    def evaluate():
        generator = torch.Generator(model.device).manual_seed(args.seed)
        return rollout(model, tokenizer, test, 1, reward, generator, args)

    before = evaluate()
    out = common.start_run(out, args)
    common.save_samples(out, 0, test, before["responses"], before["score"].tolist())
    parameters = lora.adapter_parameters(model, "policy")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    G = args.group_size
    order = common.batches(len(train), args.batch_size // G, args.seed)
    bar = tqdm(range(args.steps), desc="grpo")
    for step in bar:
        clock = time.time()
        # 1. y_1 .. y_G ~ pi_old for each prompt, their scores, the log-probabilities of both models
        rows = [train[i] for i in next(order)]
        batch = rollout(model, tokenizer, rows, G, reward, generator, args)
        # 2. advantages within each group
        rewards = batch["score"]
        if args.kl_in == "reward":
            kl = ((batch["logp"] - batch["logp_ref"]) * batch["mask"]).sum(1)
            rewards = rewards - args.beta * kl  # (GRPO.8)
        groups = rewards.view(-1, G)
        batch["adv"] = group_advantages(groups, args.adv).flatten()
        # 3. K epochs on the policy
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        stats = update(model, parameters, optimizer, batch, args)
        # 4. measure
        first = stats.pop("first")
        if step == 0:
            why = ""
            if args.loss in ("grpo", "gspo") and args.minibatches == 1:  # (GRPO.5), whole groups
                why = "advantages sum to 0 in a group, their gradients do not; "
            tqdm.write(f"step 0, before any update: |ratio - 1| {first['ratio_error']:.1e}, clip "
                       f"fraction {first['clip_fraction']:g}, approx KL {first['approx_kl']:.1e}\n"
                       f"loss {first['loss']:.1e}, grad norm {first['grad_norm']:.2f}: {why}"
                       "watch score, not loss")
        row = {"step": step, "seconds": time.time() - clock, "lr": lr}
        row |= batch["stats"] | stats
        row["zero_std_groups"] = int((batch["score"].view(-1, G).std(1) == 0).sum())
        common.append(out / "metrics.jsonl", row)
        common.save_samples(out, step, rows[:1], batch["responses"], batch["score"].tolist())
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("score", "kl", "eos_rate", "length")})
        if args.save_every and (step + 1) % args.save_every == 0:
            lora.save_adapter(model, "policy", out / f"step-{step + 1}")

    lora.save_adapter(model, "policy", out)
    after = evaluate()
    common.save_samples(out, args.steps, test, after["responses"], after["score"].tolist())
    common.print_samples(test, before["responses"], after["responses"])
    common.print_table(f"{len(test)} held-out prompts", before["stats"], after["stats"])
    common.finish(out, args)


if __name__ == "__main__":
    main()
