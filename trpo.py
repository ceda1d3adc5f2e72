"""TRPO for a language model: the largest step that keeps the policy near itself, measured as a
distance between distributions and not between weights (Schulman et al. 2015, arXiv:1502.05477).

One token is one action, the text so far is the state. With log-probabilities of the sampled token:

    (TRPO.1)   R_t = -beta (log pi_old - log pi_ref)_t  + [t last] score    the KL in the reward
    (TRPO.2)   A_t = delta_t + gamma lambda A_{t+1},  delta_t = R_t + gamma V_{t+1} - V_t    GAE
    (TRPO.3)   G_t = A_t + V_t                                           what the critic learns
    (TRPO.4)   A <- (A - mean A) / sqrt(var A + 1e-8)                    over all tokens
    (TRPO.5)   L(theta) = mean pi(y_t) / pi_old(y_t) A_t                 the surrogate
    (TRPO.6)   D(theta) = mean_t sum_v pi_old(v) log(pi_old(v) / pi(v))  exact, nats per token

TRPO maximises L where D <= delta. Near theta_old L is linear with gradient g, and D is quadratic
with the Fisher matrix F as its Hessian, so that the best step has the direction F^-1 g:

    (TRPO.7)   F v = grad((grad D) . v)                  F itself is never formed
    (TRPO.8)   s = (F + damping)^-1 g                    by conjugate gradient
    (TRPO.9)   length = sqrt(2 delta / s F s)            where 1/2 length^2 s F s is delta
    (TRPO.10)  theta = theta_old + 0.8^j length s        the first j = 0, 1, ... at which L has
                                                         risen and D <= 1.2 delta, else none
    (TRPO.11)  L_V = mean 1/2 (V - G)^2                  the critic, by gradient descent

F has as many rows as LoRA has parameters. A change of A that B takes back changes no probability;
with B = 0 all rows for A are zero. So F is singular, and where it is taken on a part of the batch
(--fisher-rows), F s = g has no solution: hence the damping. The length of the step, in which
damping has no part, is measured on the whole batch.

delta is per token. An answer of n tokens may move by about n delta in a step; both are printed. The
paper's bound on how far L may be from the truth has the factor gamma / (1 - gamma)^2: at gamma = 1
it says nothing. For answers of at most H tokens the same argument ends at H (H - 1) max|A| max D.

Left out on purpose: a KL penalty in place of the constraint, and the value function's own trust
region.

    python trpo.py --steps 200
    python trpo.py --max-kl 0.002 --reward tiny/world.py:gold_reward
"""

import time
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import common
import lora

# ------------------------------------------------------------------------------ the mathematics


def token_logps(logits, ids, temperature=1.0):
    """log pi(y_t) of each sampled token under softmax(logits / temperature), in fp32.

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats; enters (TRPO.1) and (TRPO.5)."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def masked_mean(x, mask):
    """Mean of x over the real tokens; both [B, R]."""
    return (x * mask).sum() / mask.sum()


def kl_shaped_rewards(score, logp, logp_ref, mask, beta):
    """The reward of each token: a KL penalty everywhere, the score at the last real token. (TRPO.1)

    score [B]; logp, logp_ref, mask [B, R]; beta in units of score per nat. Returns [B, R], detached
    and 0 on padding. Raises ValueError if a response has no token.
    Source: arXiv:1909.08593, Eq. 2; arXiv:2203.02155, Eq. 2."""
    if (mask.sum(1) < 1).any():
        raise ValueError("a response has no token: nothing can carry its score")
    rewards = -beta * (logp - logp_ref) * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, score.unsqueeze(1).to(rewards.dtype)).detach()


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation. (TRPO.2), (TRPO.3)

    rewards, values, mask [B, R], real tokens first. Nothing is bootstrapped beyond the last real
    token: the value of the end is 0. Returns (adv, ret), both [B, R] and 0 on padding; ret is taken
    before any whitening. Source: arXiv:1506.02438, Eq. 16."""
    adv, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    v_next = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * v_next - values[:, t]
        running = mask[:, t] * (delta + gamma * lam * running)  # (TRPO.2)
        v_next = mask[:, t] * values[:, t]
        adv[:, t] = running
    return adv, (adv + values) * mask  # (TRPO.3)


def whiten(x, mask):
    """x with mean 0 and (biased) variance 1 over all real tokens, 0 on padding. (TRPO.4)"""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean).square(), mask)
    return (x - mean) * (var + 1e-8).rsqrt() * mask


def surrogate(logp, logp_old, adv, mask):
    """What the new policy would gain on the answers of the old one, to be increased. (TRPO.5)

    All [B, R], logp with gradient. Returns a scalar, the mean over real tokens; its gradient at
    logp = logp_old is the policy gradient. Source: arXiv:1502.05477, Eq. 14."""
    ratio = ((logp - logp_old) * mask).exp()  # 1 on padding, where exp could overflow
    return masked_mean(ratio * adv, mask)  # (TRPO.5)


def mean_kl(logits_old, logits, mask):
    """Exact KL(old || new), summed over the vocabulary, mean over real tokens, nats. (TRPO.6)

    logits_old, logits [B, R, V], already divided by the temperature; mask [B, R]. Returns a scalar.
    Source: arXiv:1502.05477, Eq. 12."""
    old, new = logits_old.float().log_softmax(-1), logits.float().log_softmax(-1)
    return masked_mean((old.exp() * (old - new)).sum(-1), mask)


def value_loss(values, ret, mask):
    """Half the squared error of the critic, mean over real tokens; all [B, R]. (TRPO.11)"""
    return 0.5 * masked_mean((values - ret).square(), mask)


def flatten(tensors):
    """One vector of all the numbers in a list of tensors."""
    return torch.cat([t.reshape(-1) for t in tensors])


def kl_slope(kl, params):
    """The gradient of the scalar `kl` by the tensors `params`: a vector that has a gradient itself.
    Needs an attention kernel that can be differentiated twice."""
    return flatten(torch.autograd.grad(kl, params, create_graph=True, materialize_grads=True))


def fisher_vector_product(kl, params, v, damping, slope=None):
    """(F + damping) v, where F is the Hessian of `kl` by `params`. (TRPO.7)

    kl: scalar with graph, mean_kl(logits.detach(), logits, mask), at whose minimum the Hessian is
    the Fisher matrix; params: list of tensors; v: vector of as many numbers; slope: kl_slope(kl,
    params), which all v have in common. Returns a vector. The graph stays, for the next v.
    Source: arXiv:1502.05477, appendix C.1; Pearlmutter 1994."""
    slope = kl_slope(kl, params) if slope is None else slope
    product = torch.autograd.grad(slope @ v, params, retain_graph=True, materialize_grads=True)
    return flatten(product) + damping * v  # (TRPO.7)


def conjugate_gradient(matvec, b, iters=10, tol=1e-10):
    """Solves M x = b for a symmetric positive definite M, known by matvec(x) = M x. (TRPO.8)

    Stops after iters products, or once |b - M x|^2 < tol. Returns x; exact after as many products
    as b has numbers. Source: Hestenes and Stiefel 1952."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(iters):
        if rr < tol:
            break
        Mp = matvec(p)
        alpha = rr / (p @ Mp)
        x, r = x + alpha * p, r - alpha * Mp
        rr, rr_old = r @ r, rr
        p = r + rr / rr_old * p
    return x


def step_length(sFs, max_kl):
    """How far to go along s: the length at which 1/2 length^2 s F s is max_kl; 0 where s F s is not
    a positive number. (TRPO.9)"""
    return (2 * max_kl / sFs) ** 0.5 if 0 < sFs < float("inf") else 0.0


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
    head = model.get_output_embeddings().weight  # [V, d]
    batch["states_old"] = head.new_zeros(*mask.shape, head.shape[1])
    logps = partial(token_logps, temperature=args.temperature)

    def logps_and_entropy(logits, ids):  # [1, n, 2]: both from the same logits
        return torch.stack([logps(logits, ids), token_entropy(logits, args.temperature)], -1)

    reference = "reference" if args.adapter else None
    for part, b in common.micro_batches(batch, torch.arange(len(ids)), args.micro_batch_size):
        R = b["mask"].shape[1]
        both, states = common.response_logps(model, "policy", b, logps_and_entropy)
        batch["logp"][part, :R], batch["entropy"][part, :R] = both.unbind(-1)
        batch["states_old"][part, :R] = states
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


def policy_logits(model, b, args):
    """Logits [rows, R, V] of the policy as it stands, divided by the temperature."""
    with lora.use_adapter(model, "policy"):
        states = common.response_states(model, b["ids"], b["attention"], b["mask"].shape[1])
    return common.logits_of(model, states).float() / args.temperature


def gain_of(model, b, args):
    """The surrogate (TRPO.5) of some rows, and the logits it comes from."""
    logits = policy_logits(model, b, args)
    logp = token_logps(logits, b["ids"][:, -logits.shape[1] :])
    return surrogate(logp, b["logp"], b["adv"], b["mask"]), logits


def parts(batch, rows, args):
    """Micro-batches of `rows`, each with its share of their tokens."""
    for _, b in common.micro_batches(batch, rows, args.micro_batch_size):
        yield b, b["mask"].sum() / batch["mask"][rows].sum()


def kl_graphs(model, batch, rows, args):
    """D (TRPO.6) of `rows` at theta_old, where it is 0 and its Hessian is F; as micro-batches to be
    summed. The usual attention kernels cannot be differentiated twice, MATH can."""
    for b, share in parts(batch, rows, args):
        with sdpa_kernel(SDPBackend.MATH):
            logits = policy_logits(model, b, args)
        yield share * mean_kl(logits.detach(), logits, b["mask"])


@torch.no_grad()
def move(parameters, old, step):
    """Sets the policy to theta_old + step, a vector."""
    pieces = step.split([p.numel() for p in parameters])
    for p, before, piece in zip(parameters, old, pieces):
        p.copy_(before + piece.view_as(p))


@torch.no_grad()
def gain_and_kl(model, batch, args):
    """L (TRPO.5) and D (TRPO.6) of the policy as it stands, on the whole batch. Of theta_old the
    rollout kept the states, which are small beside their logits."""
    gain = kl = 0.0
    for b, share in parts(batch, torch.arange(len(batch["ids"])), args):
        part_gain, logits = gain_of(model, b, args)
        logits_old = common.logits_of(model, b["states_old"]).float() / args.temperature
        gain += (share * part_gain).item()
        kl += (share * mean_kl(logits_old, logits, b["mask"])).item()
    return gain, kl


def natural_step(model, parameters, old, batch, args):
    """The step along the natural gradient that should end at D = max_kl, a vector, and |g|.
    `old`, tensors like the parameters, must hold theta_old; the policy is not moved.

    s comes from F on --fisher-rows rows. A direction that changes nothing on these costs nothing in
    their F, though it may change other rows, so s F s is measured on the whole batch: by a trial
    step e s, where D is about 1/2 e^2 s F s. The first trial is short; the second has the length
    that the first one found, because at delta D is no longer quite quadratic."""
    everything = torch.arange(len(batch["ids"]))
    for b, share in parts(batch, everything, args):
        gain, _ = gain_of(model, b, args)
        (gain * share).backward()
    g = flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for p in parameters:
        p.grad = None
    graphs = kl_graphs(model, batch, everything[: args.fisher_rows], args)

    def matvec(v):
        return sum(fisher_vector_product(kl, parameters, v, args.damping / len(slopes), slope)
                   for kl, slope in slopes)

    with sdpa_kernel(SDPBackend.MATH):  # for --grad-checkpoint, which runs layers again
        slopes = [(kl, kl_slope(kl, parameters)) for kl in graphs]
        s = conjugate_gradient(matvec, g, args.cg_iters)  # (TRPO.8)
    sFs = s @ g - args.damping * s @ s  # conjugate gradient ends with s (F + damping) s = s g
    e = step_length(sFs.item(), args.max_kl / 4)
    for _ in range(2):
        move(parameters, old, e * s)
        _, kl = gain_and_kl(model, batch, args)
        e = step_length(2 * kl / e**2 if e else 0.0, args.max_kl)  # (TRPO.9)
    move(parameters, old, torch.zeros_like(s))
    return e * s, g.norm().item()


def line_search(model, parameters, old, step, batch, args):
    """Moves the policy by the first of step, 0.8 step, 0.64 step ... that (TRPO.10) accepts; where
    none is, the policy is theta_old, which `old` holds, to the bit.

    Returns (surrogate gain, KL per token, trials that failed)."""
    start = masked_mean(batch["adv"], batch["mask"]).item()  # L at theta_old, every ratio is 1
    for j in range(args.backtracks):
        move(parameters, old, 0.8**j * step)
        gain, kl = gain_and_kl(model, batch, args)
        if gain > start and kl <= 1.2 * args.max_kl:  # (TRPO.10)
            return gain - start, kl, j
    move(parameters, old, torch.zeros_like(step))
    return 0.0, 0.0, args.backtracks


def fit_critic(model, parameters, optimizer, batch, args):
    """--ppo-epochs gradient steps on (TRPO.11); returns the loss before the first of them."""
    first = 0.0
    for epoch in range(args.ppo_epochs):
        for b, share in parts(batch, torch.arange(len(batch["ids"])), args):
            values = common.response_values(
                model, "critic", b["ids"], b["attention"], b["mask"].shape[1])
            loss = share * value_loss(values, b["ret"], b["mask"])
            loss.backward()
            first += loss.item() if epoch == 0 else 0.0
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return first


# ------------------------------------------------------------------------------ flags


def parse_args(argv=None):
    p = common.flags(__doc__, steps=200, batch_size=8, lr=(2e-3, 3e-5))
    add, whole, amount = p.add_argument, common.whole, common.amount
    common.sampling_flags(p)
    add("--beta", type=amount, default=0.08, help="KL weight, units of score per nat (0.08)")
    add("--max-kl", type=amount, default=0.001, help="delta, nats per token and step (0.001)")
    add("--cg-iters", type=whole, default=5, help="Fisher-vector products a step (5)")
    add("--damping", type=amount, default=0.1, help="added to F (0.1)")
    add("--fisher-rows", type=whole, default=4, help="rows of the batch that F is taken on (4)")
    add("--backtracks", type=whole, default=10, help="trials of the line search (10)")
    add("--ppo-epochs", type=whole, default=2, help="passes of the critic over a batch (2)")
    add("--gamma", type=common.share, default=1.0, help="discount (1)")
    add("--lam", type=common.share, default=0.95, help="lambda of GAE (0.95)")
    args = p.parse_args(argv)
    common.defaults(args, adapter="sft", data="prompts.jsonl")
    if not args.reward:
        common.fail("--reward is needed: a folder, a hub id, or file.py:function")
    if args.damping == 0 or args.max_kl == 0:
        common.fail("--damping and --max-kl must be above 0: F is singular, and a step has a size")
    return args


# ------------------------------------------------------------------------------ main loop


def main(argv=None):
    args = parse_args(argv)
    out = common.free_folder(args, "trpo")
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
    parameters, critic = (lora.adapter_parameters(model, name) for name in ("policy", "critic"))
    optimizer = torch.optim.AdamW(critic, lr=args.lr, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(args.seed)
    order = common.batches(len(train), args.batch_size, args.seed)
    bar = tqdm(range(args.steps), desc="trpo")
    for step in bar:
        clock = time.time()
        # 1. y ~ pi_old, its score, and the log-probabilities of policy and reference
        rows = [train[i] for i in next(order)]
        batch = rollout(model, tokenizer, rows, reward, generator, args)
        mask, values = batch["mask"], batch["values"]
        # 2. rewards with the KL inside, advantages, returns
        rewards = kl_shaped_rewards(
            batch["score"], batch["logp"], batch["logp_ref"], mask, args.beta)
        adv, ret = gae(rewards, values, mask, args.gamma, args.lam)
        batch |= {"adv": whiten(adv, mask), "ret": ret}
        # 3. the policy: natural gradient, then a step inside the trust region
        old = [p.detach().clone() for p in parameters]
        full, norm = natural_step(model, parameters, old, batch, args)
        gain, kl, backtracks = line_search(model, parameters, old, full, batch, args)
        # 4. the critic: gradient descent
        lr = common.learning_rate(step, args.steps, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        critic_loss = fit_critic(model, critic, optimizer, batch, args)
        # 5. measure
        if step == 0:
            tqdm.write(f"step 0: moved {kl:.1e} nats a token ({args.max_kl:g} allowed), "
                       f"{kl * batch['stats']['length']:.3f} an answer, {backtracks} trials failed")
        row = {"step": step, "seconds": time.time() - clock, "loss": -gain, "grad_norm": norm}
        row |= batch["stats"] | {"lr": lr, "surrogate_gain": gain, "kl_step": kl}
        row |= {"kl_step_response": kl * batch["stats"]["length"], "backtracks": backtracks}
        row |= {"value_loss": critic_loss}
        row["explained_variance"] = explained_variance(values, ret, mask)
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
