"""PPO for a language model: sample answers, score them, make the better ones likelier, stay near
the start (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593).

One token is one action, the text so far is the state. With log-probabilities of the sampled token:

    (PPO.1)  R_t = -beta (log pi_old - log pi_ref)_t  + [t last] score     reward with the KL inside
    (PPO.2)  delta_t = R_t + gamma V_{t+1} - V_t                           V = 0 after the last one
    (PPO.3)  A_t = delta_t + gamma lambda A_{t+1}                          GAE (arXiv:1506.02438)
    (PPO.4)  G_t = A_t + V_t                                               what the critic learns
    (PPO.5)  A <- (A - mean A) / sqrt(var A + 1e-8)                        over all tokens
    (PPO.6)  rho_t = pi(y_t) / pi_old(y_t)
    (PPO.7)  L_pi = mean max(-A rho, -A clip(rho, 1-eps, 1+eps))
    (PPO.8)  L_V = mean 1/2 max((V - G)^2, (clip(V, V_old +- eps) - G)^2)
    (PPO.9)  beta <- beta (1 + 0.1 clip(KL / target - 1, -0.2, 0.2))       only with --kl-target

The summed (log pi - log pi_ref) estimates KL(pi || pi_ref) of the answer without bias (k1). It is
in the reward, detached: there its gradient is right, as a loss it would be zero on average.

The four models are one frozen base with adapters: "policy", "reference", "critic", "reward". The
critic has an adapter of its own and starts as the reward model, where there is one: policy and
critic share no trained weight.

Left out on purpose: an entropy bonus, whitening of rewards, and early stopping on KL.

    python ppo.py --steps 200
    python ppo.py --reward tiny/world.py:gold_reward     any function(prompts, responses, rows)
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

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats; enters (PPO.1) and (PPO.6)."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def masked_mean(x, mask):
    """Mean of x over the real tokens; both [B, R]."""
    return (x * mask).sum() / mask.sum()


def kl_shaped_rewards(score, logp, logp_ref, mask, beta):
    """The reward of each token: a KL penalty everywhere, the score at the last real token. (PPO.1)

    score [B]; logp, logp_ref, mask [B, R]; beta in units of score per nat. Returns [B, R], detached
    and 0 on padding. Raises ValueError if a response has no token.
    Source: arXiv:1909.08593, Eq. 2; arXiv:2203.02155, Eq. 2."""
    if (mask.sum(1) < 1).any():
        raise ValueError("a response has no token: nothing can carry its score")
    rewards = -beta * (logp - logp_ref) * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, score.unsqueeze(1).to(rewards.dtype)).detach()


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation. (PPO.2) to (PPO.4)

    rewards, values, mask [B, R], real tokens first. Nothing is bootstrapped beyond the last real
    token: the value of the end is 0. Returns (adv, ret), both [B, R] and 0 on padding; ret is taken
    before any whitening. Source: arXiv:1506.02438, Eq. 16."""
    adv, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    v_next = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * v_next - values[:, t]  # (PPO.2)
        running = mask[:, t] * (delta + gamma * lam * running)  # (PPO.3)
        v_next = mask[:, t] * values[:, t]
        adv[:, t] = running
    return adv, (adv + values) * mask  # (PPO.4)


def whiten(x, mask):
    """x with mean 0 and (biased) variance 1 over all real tokens, 0 on padding. (PPO.5)"""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean).square(), mask)
    return (x - mean) * (var + 1e-8).rsqrt() * mask


def policy_loss(logp, logp_old, adv, mask, eps):
    """The clipped surrogate, to be minimised. (PPO.6) and (PPO.7)

    All [B, R], logp with gradient. The max keeps the worse of the two, so that a ratio outside
    1 +- eps has no gradient where going on would count as gain, and keeps it where it undoes harm.
    Returns a scalar, the mean over real tokens. Source: arXiv:1707.06347, Eq. 7."""
    ratio = ((logp - logp_old) * mask).exp()  # (PPO.6); 1 on padding, where exp could overflow
    clipped = ratio.clamp(1 - eps, 1 + eps)
    return masked_mean(torch.max(-adv * ratio, -adv * clipped), mask)  # (PPO.7)


def value_loss(values, values_old, ret, mask, eps):
    """Half the squared error of the critic, clipped around the values of the rollout. (PPO.8)

    All [B, R]; eps in units of value. Returns a scalar, the mean over real tokens. The clipping
    is not in the PPO paper; it comes from OpenAI's baselines."""
    clipped = values_old + (values - values_old).clamp(-eps, eps)
    error = torch.max((values - ret).square(), (clipped - ret).square())
    return 0.5 * masked_mean(error, mask)  # (PPO.8)


def adapt_beta(beta, kl, target):
    """The KL weight for the next step: up where KL is above its target, else down. (PPO.9)

    Source: arXiv:1909.08593, section 2.2."""
    return beta * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))


def token_entropy(logits, temperature=1.0):
    """Entropy [B, R] of softmax(logits / temperature), logits [B, R, V], nats."""
    logp = (logits.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def explained_variance(values, ret, mask):
    """1 - Var(ret - values) / Var(ret) over real tokens, all [B, R]: 1 for a perfect critic, 0 for
    a constant one."""
    real = mask.bool()
    unexplained = (ret - values)[real].var(unbiased=False)
    return 1 - (unexplained / ret[real].var(unbiased=False).clamp(min=1e-8)).item()


# ------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, tokenizer, rows, reward, generator, args):
    """One response to each row's prompt, with all that does not change during the update.

    Sampling and log-probabilities use the same temperature. A response that did not stop by itself
    scores --missing-eos-score, whatever the reward makes of its torso."""
    stop, room = common.stop_ids(model, tokenizer), args.max_length - args.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, r["prompt"])[-room:] for r in rows]
    with lora.use_adapter(model, "policy"):
        ids, attention, mask = common.sample(
            model, prompts, stop, args.max_new_tokens, args.temperature, generator)
    batch = dict(ids=ids, attention=attention, mask=mask)
    batch |= {key: torch.zeros_like(mask) for key in ("logp", "logp_ref", "values", "entropy")}
    logps = partial(token_logps, temperature=args.temperature)

    def logps_and_entropy(logits, ids):  # [1, n, 2]: both from the same logits
        return torch.stack([logps(logits, ids), token_entropy(logits, args.temperature)], -1)

    reference = "reference" if args.adapter else None
    for part, b in common.micro_batches(batch, torch.arange(len(ids)), args.micro_batch_size):
        R = b["mask"].shape[1]
        both, _ = common.response_logps(model, "policy", b, logps_and_entropy)
        batch["logp"][part, :R], batch["entropy"][part, :R] = both.unbind(-1)
        batch["logp_ref"][part, :R], _ = common.response_logps(model, reference, b, logps)
        values = common.response_values(model, "critic", b["ids"], b["attention"], R)
        batch["values"][part, :R] = values * b["mask"]
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
    mask, seen = batch["mask"], []
    logps = partial(token_logps, temperature=args.temperature)
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(len(mask)).chunk(args.minibatches):
            stats = Counter(ratio_max=0.0, ratio_error=0.0)
            for _, b in common.micro_batches(batch, rows, args.micro_batch_size):
                m, R = b["mask"], b["mask"].shape[1]
                logp, _ = common.response_logps(model, "policy", b, logps)
                values = common.response_values(model, "critic", b["ids"], b["attention"], R)
                l_pi = policy_loss(logp, b["logp"], b["adv"], m, args.clip)
                l_v = value_loss(values, b["values"], b["ret"], m, args.value_clip)
                loss = l_pi + args.value_coef * l_v
                share = m.sum() / mask[rows].sum()  # a token weighs the same in any micro-batch
                (loss * share).backward()
                with torch.no_grad():
                    log_ratio = (logp - b["logp"]) * m
                    ratio = log_ratio.exp()
                    clipped = masked_mean(((ratio - 1).abs() > args.clip).float(), m)
                    kl = masked_mean(log_ratio.expm1() - log_ratio, m)  # k3 of KL(old, new)
                    means = {"loss": loss, "policy_loss": l_pi,
                             "value_loss": l_v, "clip_fraction": clipped, "approx_kl": kl}
                    stats.update({key: (x * share).item() for key, x in means.items()})
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
    add("--beta", type=amount, default=0.05, help="KL weight, units of score per nat (0.05)")
    add("--kl-target", type=amount, help="nats per response that adapt beta (off)")
    add("--ppo-epochs", type=whole, default=1, help="passes over a rollout batch (1)")
    add("--minibatches", type=whole, default=2, help="updates a pass (2)")
    add("--clip", type=amount, default=0.2, help="eps of the ratio (0.2)")
    add("--value-clip", type=amount, default=1.0, help="eps of the values, in units of score (1)")
    add("--value-coef", type=amount, default=0.1, help="weight of the value loss (0.1)")
    add("--warmup", type=common.share, default=0.1, help="share of the steps (0.1)")
    add("--gamma", type=common.share, default=1.0, help="discount (1)")
    add("--lam", type=common.share, default=0.95, help="lambda of GAE (0.95)")
    args = p.parse_args(argv)
    common.defaults(args, adapter="sft", data="prompts.jsonl")
    if not args.reward:
        common.fail("--reward is needed: a folder, a hub id, or file.py:function")
    if args.kl_target == 0:
        common.fail("--kl-target must be above 0; for no penalty at all use --beta 0")
    if args.kl_target and args.beta == 0:
        common.fail("--kl-target multiplies --beta, which must be above 0 then")
    if args.batch_size % args.minibatches:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of "
                    f"--minibatches {args.minibatches}")
    return args


# ------------------------------------------------------------------------------ main loop


def main(argv=None):
    args = parse_args(argv)
    out = common.free_folder(args, "ppo")
    common.seed_everything(args.seed)
    train, test = common.load_data(args.data, ["prompt"])
    test = common.take(test, args.eval_size)
    model, tokenizer = common.load_model(args)
    common.check_prompts(tokenizer, [*train, *test], args.max_length - args.max_new_tokens)
    common.start_adapter(model, "policy", args)
    if args.adapter:
        lora.copy_adapter(model, "policy", "reference")
    reward = common.load_reward(args.reward, model, tokenizer, args)
    if "reward" in getattr(model, "heads", {}):
        lora.copy_adapter(model, "reward", "critic", trainable=True)
    else:  # no reward model on this base: the policy's features and a head that says 0
        lora.copy_adapter(model, "policy", "critic", trainable=True)
        lora.add_head(model, "critic").weight.data.zero_()

    def evaluate():
        generator = torch.Generator(model.device).manual_seed(args.seed)
        return rollout(model, tokenizer, test, reward, generator, args)

    before = evaluate()
    out = common.start_run(out, args)
    common.save_samples(out, 0, test, before["responses"], before["score"].tolist())
    parameters = lora.adapter_parameters(model, "policy") + lora.adapter_parameters(model, "critic")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    order, beta = common.batches(len(train), args.batch_size, args.seed), args.beta
    bar = tqdm(range(args.steps), desc="ppo")
    for step in bar:
        clock = time.time()
        # 1. y ~ pi_old, its score, and the log-probabilities of policy and reference
        rows = [train[i] for i in next(order)]
        batch = rollout(model, tokenizer, rows, reward, generator, args)
        mask, values = batch["mask"], batch["values"]
        # 2. rewards with the KL inside, advantages, returns
        rewards = kl_shaped_rewards(batch["score"], batch["logp"], batch["logp_ref"], mask, beta)
        adv, ret = gae(rewards, values, mask, args.gamma, args.lam)
        batch |= {"adv": whiten(adv, mask), "ret": ret}
        # 3. K epochs on policy and critic, at a small rate until the critic can read half answers
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        stats = update(model, parameters, optimizer, batch, args)
        # 4. measure, and adapt beta
        first, kl = stats.pop("first"), batch["stats"]["kl"]
        if step == 0:
            tqdm.write(f"step 0, before any update: |ratio - 1| {first['ratio_error']:.1e}, clip "
                       f"fraction {first['clip_fraction']:g}, approx KL {first['approx_kl']:.1e}")
        row = {"step": step, "seconds": time.time() - clock, "lr": lr, "beta": beta}
        row |= batch["stats"] | stats
        row["explained_variance"] = explained_variance(values, ret, mask)
        common.append(out / "metrics.jsonl", row)
        common.save_samples(out, step, rows[:1], batch["responses"], batch["score"].tolist())
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("score", "kl", "eos_rate", "length")})
        beta = adapt_beta(beta, kl, args.kl_target) if args.kl_target else beta
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
