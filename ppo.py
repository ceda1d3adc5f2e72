"""PPO for a language model: sample answers, score them, raise the probability of tokens that led to
a better score than expected, lower that of the others, and stay near the start by a KL penalty
(Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593).

One token is one action, and the text so far is the state. V is the critic: a network that predicts
the score that an unfinished answer will get. The equations named RL stand in several scripts, with
the same number:

    (RL.1)  log pi(y_t) = log softmax(logits / temperature)[y_t]          of a sampled token
    (RL.2)  R_t = -beta (log pi_old - log pi_ref)_t  + [t last] score     reward with the KL inside
    (RL.3)  delta_t = R_t + gamma V_{t+1} - V_t                           V = 0 after the last one
    (RL.4)  A_t = delta_t + gamma lambda A_{t+1}                          GAE (arXiv:1506.02438)
    (RL.5)  Vhat_t = A_t + V_t                                            what the critic learns
    (RL.6)  A <- (A - mean A) / sqrt(var A + 1e-8)                        over all tokens
    (PPO.1) rho_t = pi(y_t) / pi_old(y_t)
    (PPO.2) L_pi = mean max(-A rho, -A clip(rho, 1-eps, 1+eps))
    (PPO.3) L_V = mean 1/2 max((V - Vhat)^2, (clip(V, V_old +- value_clip) - Vhat)^2)
    (PPO.4) beta <- beta (1 + 0.1 clip(KL / target - 1, -0.2, 0.2))       only with --kl-target

The algorithm, for each step:
    1. sample an answer to each prompt of a batch from the policy (now pi_old), and score it
    2. turn the one score of an answer into one advantage per token: (RL.2) to (RL.6)
    3. a few passes of gradient descent, on (PPO.2) for the policy and (PPO.3) for the critic
    4. measure how far the policy has moved; with --kl-target, adapt beta

Summed over an answer, log pi - log pi_ref is an estimate of KL(pi || pi_ref) that is right on
average (k1). It stands in the reward, as a number without gradient, and there it gives the exact
gradient of the objective. As a loss its gradient would be zero on average.

The four models are adapters on one frozen base: "policy", "reference", "critic", "reward". Policy
and critic share no trained weight. So each has its own loss, gradient clip and learning rate, and
no coefficient stands between the losses.

Left out on purpose: an entropy bonus, whitening of rewards, and early stopping on KL.

    python ppo.py --steps 200
    python ppo.py --reward tiny/world.py:gold_reward     any function(prompts, responses, rows)
"""

import copy
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common
import lora


@dataclass(frozen=True)
class Config:
    steps: int = 200  # batches to learn from
    batch_size: int = 8  # answers per step
    micro_batch_size: int | None = None  # answers per pass when scored and learnt from; none: all
    lr: float = 5e-4  # peak learning rate of policy and critic (AdamW)
    warmup: float = 0.1  # share of the steps in which the policy's learning rate rises
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    max_new_tokens: int = 96  # tokens of an answer
    temperature: float = 0.7  # of sampling, and so of all log-probabilities
    missing_eos_score: float | None = -3.0  # of an answer that was cut off; none: the reward's
    beta: float = 0.05  # KL weight, units of score per nat
    kl_target: float | None = None  # nats per answer that adapt beta; none: beta is fixed
    ppo_epochs: int = 2  # passes over a batch
    minibatches: int = 2  # updates per pass
    clip: float = 0.2  # eps of the ratio
    value_clip: float = 1.0  # eps of the values, units of score
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of GAE

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: at 0 all answers to a prompt are one")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt "
                             f"in --max-length {self.max_length}")
        if self.batch_size % self.minibatches:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --minibatches "
                             f"{self.minibatches}")
        if self.kl_target is not None and (self.kl_target <= 0 or self.beta == 0):
            raise ValueError("--kl-target must be above 0, and multiplies a --beta above 0; for no "
                             "penalty at all leave it out and use --beta 0")


TINY = {"lr": 1e-3, "micro_batch_size": 4, "temperature": 0.5, "missing_eos_score": -10.0}

# ------------------------------------------------------------------------------ the mathematics


def token_logps(logits, ids, temperature=1.0):
    """log pi(y_t) of each token under softmax(logits / temperature), in fp32. (RL.1)

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)  # (RL.1)


def masked_mean(x, mask):
    """Mean of x over the real tokens; both [B, R]."""
    return (x * mask).sum() / mask.sum()


def kl_shaped_rewards(score, logp, logp_ref, mask, beta):
    """The reward of each token: a KL penalty everywhere, the score at the last real token. (RL.2)

    score [B]; logp, logp_ref, mask [B, R]; beta in units of score per nat. Returns [B, R], detached
    and 0 on padding. Raises ValueError if a response has no token.
    Source: arXiv:1909.08593, Eq. 2; arXiv:2203.02155, Eq. 2."""
    if (mask.sum(1) < 1).any():
        raise ValueError("a response has no token: nothing can carry its score")
    rewards = -beta * (logp - logp_ref) * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, score.unsqueeze(1).to(rewards.dtype)).detach()  # (RL.2)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation. (RL.3) to (RL.5)

    rewards, values, mask [B, R], real tokens first. Nothing is bootstrapped beyond the last real
    token: the value of the end is 0. Returns (adv, ret), both [B, R] and 0 on padding; ret is taken
    before any whitening. Source: arXiv:1506.02438, Eq. 16."""
    adv, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    v_next = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * v_next - values[:, t]  # (RL.3)
        running = mask[:, t] * (delta + gamma * lam * running)  # (RL.4)
        v_next = mask[:, t] * values[:, t]
        adv[:, t] = running
    return adv, (adv + values) * mask  # (RL.5)


def whiten(x, mask):
    """x with mean 0 and (biased) variance 1 over all real tokens, 0 on padding. (RL.6)"""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean).square(), mask)
    return (x - mean) * (var + 1e-8).rsqrt() * mask  # (RL.6)


def policy_loss(logp, logp_old, adv, mask, eps):
    """The clipped surrogate, to be minimised. (PPO.1) and (PPO.2)

    All [B, R], logp with gradient. The max keeps the more pessimistic of the two: a ratio outside
    1 +- eps has no gradient where going on would count as gain, and keeps it where it undoes harm.
    Returns a scalar, the mean over real tokens. Source: arXiv:1707.06347, Eq. 7."""
    ratio = ((logp - logp_old) * mask).exp()  # (PPO.1); 1 on padding, where exp could overflow
    clipped = ratio.clamp(1 - eps, 1 + eps)
    return masked_mean(torch.max(-adv * ratio, -adv * clipped), mask)  # (PPO.2)


def value_loss(values, values_old, ret, mask, eps):
    """Half the squared error of the critic, clipped around the values of the rollout. (PPO.3)

    All [B, R]; eps in units of value. Returns a scalar, the mean over real tokens. The clipping
    is not in the PPO paper; it comes from OpenAI's baselines."""
    clipped = values_old + (values - values_old).clamp(-eps, eps)
    error = torch.max((values - ret).square(), (clipped - ret).square())
    return 0.5 * masked_mean(error, mask)  # (PPO.3)


def adapt_beta(beta, kl, target):
    """The KL weight for the next step: up where KL is above its target, else down. (PPO.4)

    Source: arXiv:1909.08593, section 2.2."""
    return beta * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))  # (PPO.4)


def explained_variance(values, ret, mask):
    """1 - Var(ret - values) / Var(ret) over real tokens, all [B, R]; a constant critic gets 0.

    ret is the plain reward to go (lambda 1): it is 1 only if every return was foreseen, but for one
    constant; a perfect critic knows only their mean. At a smaller lambda the critic is in ret."""
    real = mask.bool()
    unexplained = (ret - values)[real].var(unbiased=False)
    return 1 - (unexplained / ret[real].var(unbiased=False).clamp(min=1e-8)).item()


def rollout_stats(batch):
    """What is logged of a rollout, from its score, ended [B] and logp_old, logp_ref, entropy, mask
    [B, R]. kl is in nats per answer (k1), entropy and surprise -log pi_old in nats per token.

    A token drawn from the full distribution has the entropy as its mean surprise. surprise_z counts
    the standard errors between the two: below about -4, something truncates (top-p, top-k)."""
    logp, mask = batch["logp_old"], batch["mask"]
    excess = (-logp - batch["entropy"]) * mask  # mean 0 for every token, whatever came before
    stats = {
        "score": batch["score"].mean(),
        "score_std": batch["score"].std(unbiased=False),
        "kl": ((logp - batch["logp_ref"]) * mask).sum(1).mean(),
        "entropy": masked_mean(batch["entropy"], mask),
        "surprise": masked_mean(-logp, mask),
        "surprise_z": excess.sum() / excess.square().sum().sqrt().clamp(min=1e-8),
        "eos_rate": batch["ended"].float().mean(),
        "length": mask.sum(1).mean(),
    }
    return {key: value.item() for key, value in stats.items()}


# ------------------------------------------------------------------------------ the four models


def make_models(model, reward, config):
    """Hangs the models on the one frozen base as adapters: makes what is missing, keeps the rest.

    policy      trained; if you loaded none, a new adapter, which changes nothing yet
    reference   a frozen copy of the policy as it was at the start
    reward      frozen; only if `reward` names an adapter with a head, else it is a function
    critic      trained; a network that predicts the score that an unfinished answer will get"""
    if isinstance(reward, str) and not lora.has_head(model, reward):
        raise ValueError(f"the reward {reward!r} is no adapter with a scalar head on this model")
    # A new adapter is drawn at random, without touching the random numbers of the caller: those
    # are as they were after the block.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if "policy" not in lora.names(model):
            lora.add_adapter(model, "policy", config.lora_rank, config.lora_alpha,
                             targets=config.lora_targets)
        # With the policy new, this copy is the bare base.
        if "reference" not in lora.names(model):
            lora.copy_adapter(model, "policy", "reference")
        # A reward model knows a good answer once it has read it all: a good start for a critic.
        # Without one the critic starts from the policy's features, under a head that says 0.
        if "critic" not in lora.names(model):
            start = reward if isinstance(reward, str) else "policy"
            lora.copy_adapter(model, start, "critic", trainable=True)
            if not lora.has_head(model, "critic"):
                lora.add_head(model, "critic").weight.data.zero_()


@torch.no_grad()
def batch_logps(model, name, batch, config):
    """log pi(y_t) [B, R] of all answers of a batch, under the adapter `name`; None: the bare base.

    `common.read` gives the logits after the prompt and after each token of the answer. The logits
    at a position predict the token that comes next: position t-1 predicts token t. So the first of
    these R + 1 predicts y_1, and the last predicts nothing that we have, and is dropped."""
    logps = torch.zeros_like(batch["mask"])
    for rows, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        y, mask = b["y"], b["mask"]  # [b, R]
        with lora.use_adapter(model, name):
            logits = common.read(model, b["x"], b["x_mask"], y, mask)
        logp = token_logps(logits[:, :-1], y, config.temperature)  # (RL.1)
        # A micro-batch is as wide as its own longest answer; after it the zeros stay.
        logps[rows, : y.shape[1]] = logp * mask
    return common.add_up(logps)


def read_values(model, name, b):
    """V_t [B, R] of the critic `name`: what it expects after reading the tokens before y_t.

    So V_t is read at position t-1, like the logits that predict y_t. As a baseline for y_t it must
    not have seen y_t."""
    with lora.use_adapter(model, name):
        states = common.read(model, b["x"], b["x_mask"], b["y"], b["mask"], states=True)
    return model.heads[name](states[:, :-1].float()).squeeze(-1)


# ------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, tokenizer, rows, reward, config, generator,
            policy="policy", reference="reference", critic="critic"):
    """One answer to the prompt of each data row, and all about it that the update holds fixed.

    B prompts of P tokens, padded on the left; answers of R tokens, padded on the right. Returns the
    batch, a dictionary of tensors: x, x_mask [B, P]; y, mask, logp_old, logp_ref, values_old,
    entropy [B, R]; score, ended [B]; and the texts of the answers."""
    # A prompt that is too long loses its beginning.
    room = config.max_length - config.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, row["prompt"])[-room:] for row in rows]
    x, x_mask = common.pad(prompts, "left", model.device)  # [B, P]

    # Sample y ~ pi_old, that is from softmax(logits / temperature) and nothing else. The sampler
    # reports log pi_old of each token it drew, so no second pass is needed for it.
    stop = common.stop_ids(model, tokenizer)
    with lora.use_adapter(model, policy):
        y, mask, logp_old, entropy = common.sample(
            model, x, x_mask, stop, config.max_new_tokens, config.temperature, generator)
    batch = {"x": x, "x_mask": x_mask, "y": y, "mask": mask,
             "logp_old": logp_old, "entropy": entropy}

    # log pi_ref and V_old of every sampled token. There is no gradient here: micro-batches only
    # save memory.
    batch["logp_ref"] = batch_logps(model, reference, batch, config)
    values = torch.zeros_like(mask)
    for index, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        R = b["mask"].shape[1]
        values[index, :R] = read_values(model, critic, b) * b["mask"]
    batch["values_old"] = common.add_up(values)

    # One score per answer. An answer that was cut off before its EOS gets a fixed low score,
    # whatever the reward makes of the fragment: stopping has to be worth learning.
    score, responses = common.score(model, tokenizer, rows, x, x_mask, y, mask, reward,
                                    config.micro_batch_size)
    batch["ended"] = common.ended(y, mask, stop)
    if config.missing_eos_score is not None:
        score = score.masked_fill(~batch["ended"], config.missing_eos_score)
    batch["score"] = score
    return batch, responses


# ------------------------------------------------------------------------------ update


def gradient(model, b, weight, config, policy, critic):
    """Adds weight times the gradients of L_pi and L_V on a micro-batch b to their parameters.

    Policy and critic share no trained weight, so each loss has its own backward pass, inside the
    adapter it came from, and only one graph is in memory at a time. Returns L_pi, L_V, and the
    largest |log pi - log pi_old|."""
    y, mask = b["y"], b["mask"]  # [b, R]
    logp_old = b["logp_old"]  # [b, R]
    with lora.use_adapter(model, policy):
        # Position t-1 predicts token t: the last logits, after the whole answer, are dropped.
        logits = common.read(model, b["x"], b["x_mask"], y, mask)
        logp = token_logps(logits[:, :-1], y, config.temperature)  # (RL.1)
        l_pi = policy_loss(logp, logp_old, b["adv"], mask, config.clip)  # (PPO.1), (PPO.2)
        (weight * l_pi).backward()
    with lora.use_adapter(model, critic):
        values = read_values(model, critic, b)  # [b, R]
        l_v = value_loss(
            values, b["values_old"], b["ret"], mask, config.value_clip)  # (PPO.3)
        (weight * l_v).backward()
    moved = (logp.detach() - logp_old) * mask
    return l_pi.item(), l_v.item(), moved.abs().max().item()


def update(model, optimizer, batch, config, generator, policy="policy", critic="critic"):
    """--ppo-epochs passes over the batch in --minibatches parts, one AdamW step after each part.

    Returns the mean losses and the policy's mean gradient norm, and log_ratio_max: the largest
    |log pi - log pi_old| of the first part. It is taken before any step, where sampler and scorer
    must agree, so anything but rounding is a fault."""
    stats = {"policy_loss": 0.0, "value_loss": 0.0, "grad_norm": 0.0, "log_ratio_max": 0.0}
    of_policy, of_critic = (lora.adapter_parameters(model, name) for name in (policy, critic))
    parts = config.ppo_epochs * config.minibatches
    # Both losses are means over the tokens at hand. Weighted by tokens, relative to the average
    # minibatch, they give every token of the batch the same weight, wherever it is drawn.
    tokens = batch["mask"].sum() / config.minibatches
    for part in range(parts):
        # Each pass shuffles the batch anew and deals it out to its minibatches.
        if part % config.minibatches == 0:
            order = torch.randperm(len(batch["x"]), generator=generator)
            minibatches = order.chunk(config.minibatches)
        groups = minibatches[part % config.minibatches]
        for _, b in common.share(common.micro_batches(batch, config.micro_batch_size, groups)):
            weight = (b["mask"].sum() / tokens).item()
            l_pi, l_v, moved = gradient(model, b, weight, config, policy, critic)
            stats["policy_loss"] += weight * l_pi / parts
            stats["value_loss"] += weight * l_v / parts
            if part == 0:  # pi still is pi_old
                stats["log_ratio_max"] = max(stats["log_ratio_max"], moved)
        # Each model has a clip of its own. Under one common norm, the scale of the reward, which
        # only the critic feels, would decide how far the policy may go.
        common.add_gradients([*of_policy, *of_critic])
        norm = torch.nn.utils.clip_grad_norm_(of_policy, 1.0)
        torch.nn.utils.clip_grad_norm_(of_critic, 1.0)
        stats["grad_norm"] += norm.item() / parts
        optimizer.step()
        optimizer.zero_grad()
    for key in ("policy_loss", "value_loss", "log_ratio_max"):
        stats[key] = common.add_up(stats[key], largest=key == "log_ratio_max")
    return stats


def drift(model, batch, config, policy="policy"):
    """How far the update moved the policy, on the batch's own tokens, after its last step.

    approx_kl: KL(old || new), nats per token, by k3: for tokens drawn from old it is unbiased, and
    0 only where every ratio is 1. clip_fraction: share of tokens outside 1 +- eps."""
    mask = batch["mask"]
    logp = batch_logps(model, policy, batch, config)  # [B, R], one more forward pass
    log_ratio = (logp - batch["logp_old"]) * mask
    ratio = log_ratio.exp()  # (PPO.1)
    outside = ((ratio - 1).abs() > config.clip).float()  # whatever the sign of the advantage
    return {
        "approx_kl": masked_mean(log_ratio.expm1() - log_ratio, mask).item(),  # k3
        "clip_fraction": masked_mean(outside, mask).item(),
        "ratio_max": ratio.max().item(),
    }


# ------------------------------------------------------------------------------ train


def train(model, tokenizer, rows, reward, config=Config(), log=None, state=None):
    """PPO on the adapter "policy" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, and whatever else the reward
    wants. reward: a function (prompts, responses, rows) -> one float per answer, or the name of an
    adapter with a head on `model`. log(row, samples, state) is called once per step; `state` is all
    that going on needs beside the adapters (live: copy it to keep it); train(state=...) goes on."""
    make_models(model, reward, config)
    policy, critic = (lora.adapter_parameters(model, name) for name in ("policy", "critic"))
    optimizer = torch.optim.AdamW([{"params": policy}, {"params": critic}], weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)  # of sampling and shuffling
    history, first, beta = [], state["step"] if state else 0, config.beta
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        generator.set_state(state["generator"])
        beta = state["beta"]

    bar = tqdm(range(first, config.steps), desc="ppo", disable=None)
    for step in bar:
        clock = time.time()

        # 1. Act: answer a batch of prompts, and score the answers.
        index = common.batch_rows(step, len(rows), config.batch_size, config.seed)
        drawn = [rows[i] for i in index]
        batch, responses = rollout(model, tokenizer, drawn, reward, config, generator)

        # 2. Credit: from one score per answer to one advantage per token.
        mask, values_old = batch["mask"], batch["values_old"]
        rewards = kl_shaped_rewards(
            batch["score"], batch["logp_old"], batch["logp_ref"], mask, beta)  # (RL.2)
        adv, ret = gae(rewards, values_old, mask, config.gamma, config.lam)  # (RL.3) to (RL.5)
        batch["adv"] = whiten(adv, mask)  # (RL.6)
        batch["ret"] = ret  # not whitened: the critic learns in units of the score

        # 3. Learn. The policy's rate warms up and the critic's does not: a critic that starts as a
        #    reward model has yet to learn to judge an unfinished answer, and gets a head start.
        lr = common.learning_rate(step, config.steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.param_groups[1]["lr"] = common.learning_rate(step, config.steps, config.lr)
        stats = update(model, optimizer, batch, config, generator)

        # 4. Measure, and adapt beta.
        row = {"step": step, "lr": lr, "beta": beta, **rollout_stats(batch), **stats}
        row["loss"] = row["policy_loss"] + row["value_loss"]
        row.update(drift(model, batch, config))
        _, to_go = gae(rewards, values_old, mask, config.gamma, 1.0)
        row["explained_variance"] = explained_variance(values_old, to_go, mask)
        row["seconds"] = time.time() - clock
        if config.kl_target:
            beta = adapt_beta(beta, row["kl"], config.kl_target)  # (PPO.4)
        history.append(row)
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("score", "kl", "eos_rate", "length")})
        if log:
            state = {"step": step + 1, "optimizer": optimizer.state_dict(),
                     "generator": generator.get_state(), "beta": beta}
            log(row, samples(drawn, responses, batch["score"]), state)
    return history


def samples(rows, responses, score):
    """[{prompt, response, score}] of B answers."""
    return [{"prompt": row["prompt"], "response": response, "score": number}
            for row, response, number in zip(rows, responses, score.tolist())]


# ------------------------------------------------------------------------------ command line


def evaluate(model, tokenizer, rows, reward, config):
    """(statistics, samples) of one answer to each held-out prompt, with the same random numbers
    before and after training."""
    generator = torch.Generator().manual_seed(config.seed)
    batch, responses = rollout(model, tokenizer, rows, reward, config, generator)
    return rollout_stats(batch), samples(rows, responses, batch["score"])


def main(argv=None):
    """Reads flags, loads, trains, prints. Only this needs `cli`: a copied file works without it."""
    from cli import data, flags, models, rewards, runs

    with flags.errors():
        args, config = flags.read("ppo", __doc__, Config, TINY, argv, reward="needed")
        rows, test = data.load(args, ["prompt"])
        model, tokenizer, config = models.load(args, config, "policy", [*rows, *test])
        reward = rewards.load(args, model, config.max_length)
        make_models(model, reward, config)
        before = runs.before(args) or evaluate(model, tokenizer, test, reward, config)
        log, state = runs.start(args, config, model, "policy", before)
        train(model, tokenizer, rows, reward, config, log, state)
        after = evaluate(model, tokenizer, test, reward, config)
        runs.finish(args, config, model, "policy", before, after)


if __name__ == "__main__":
    main()
