"""TRPO for a language model: from each batch of answers it takes one step. Among the steps that
change the probabilities of the next token by a set KL divergence, it takes the one that promises
most (Schulman et al. 2015, arXiv:1502.05477).

One token is one action, and the text so far is the state. Equations named RL stand in several
scripts, with the same number:

    (RL.1)  log pi(y_t) = log softmax(logits / temperature)[y_t]          of a sampled token
    (RL.2)  R_t = -beta (log pi_old - log pi_ref)_t  + [t last] score     reward with the KL inside
    (RL.3)  delta_t = R_t + gamma V_{t+1} - V_t                           V = 0 after the last one
    (RL.4)  A_t = delta_t + gamma lambda A_{t+1}                          GAE (arXiv:1506.02438)
    (RL.5)  Vhat_t = A_t + V_t                                            what the critic learns
    (RL.6)  A <- (A - mean A) / sqrt(var A + 1e-8)                        over all tokens
    (TRPO.1) S(theta) = mean pi(y_t) / pi_old(y_t) A_t                    the surrogate
    (TRPO.2) D(theta) = mean_t sum_w pi_old(w) log(pi_old(w) / pi(w))     exact, nats per token

In (TRPO.2), w is every token of the vocabulary. TRPO maximises S under the condition D <= max_kl.
Near theta_old, S is linear with the gradient g. D is quadratic there, and its second derivatives
are the Fisher matrix F. So the best step has the direction F^-1 g:

    (TRPO.3) F v = grad((grad D) . v)                  F itself is never formed
    (TRPO.4) u = (F + damping)^-1 g                    by conjugate gradient
    (TRPO.5) length = sqrt(2 max_kl / u F u)           where 1/2 length^2 u F u is max_kl
    (TRPO.6) theta = theta_old + 0.8^j length u        the first j = 0, 1, ... at which S has risen
                                                       and D <= 1.2 max_kl, else none
    (TRPO.7) L_V = mean 1/2 (V - Vhat)^2               the critic, by gradient descent

The algorithm, for each step:
    1. sample answers y ~ pi_old to a batch of prompts, and score them
    2. from one score per answer to one advantage per token: (RL.2) to (RL.6)
    3. the policy: its direction and length by (TRPO.3) to (TRPO.5), then the line search (TRPO.6)
    4. the critic: a few passes of gradient descent on (TRPO.7)

F is singular. LoRA adds the product of two matrices, and one can change so that the other takes the
change back; and as long as lora_B is 0, lora_A has no effect at all. The products with F also look
at --fisher-rows answers only, while g looks at all, and then F u = g has no usable solution. Hence
the damping. It has no part in the length of the step, which is measured on the whole batch.

max_kl is per token. An answer of n tokens may move by about n max_kl in a step; both are logged.
The paper's bound on the error of S has the factor gamma / (1 - gamma)^2, and at gamma = 1 it says
nothing. For answers of at most H tokens the same argument gives H (H - 1) max|A| D_worst, where
D_worst is the largest KL at any single state.

Left out on purpose: a KL penalty in place of the constraint, and a trust region for the critic.

    python trpo.py --steps 200
    python trpo.py --max-kl 0.002 --reward tiny/world.py:gold_reward
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import common
import lora


@dataclass(frozen=True)
class Config:
    steps: int = 200  # batches to learn from
    batch_size: int = 8  # answers per step
    micro_batch_size: int | None = None  # answers per pass when scored and learnt from; none: all
    lr: float = 3e-5  # peak learning rate of the critic (AdamW); the policy needs none
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    max_new_tokens: int = 96  # tokens of an answer
    temperature: float = 0.7  # of sampling, and so of all log-probabilities
    missing_eos_score: float | None = -3.0  # of an answer that was cut off; none: the reward's
    beta: float = 0.08  # KL weight, units of score per nat
    max_kl: float = 0.001  # bound on D in a step, nats per token
    cg_iters: int = 5  # Fisher-vector products per step
    damping: float = 0.1  # added to F
    fisher_rows: int = 4  # answers of the batch that F is taken on
    backtracks: int = 10  # trials of the line search
    ppo_epochs: int = 2  # passes of the critic over a batch
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of GAE

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: at 0 all answers to a prompt are one")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt "
                             f"in --max-length {self.max_length}")
        if self.damping <= 0 or self.max_kl <= 0:
            raise ValueError("--damping and --max-kl must be above 0: F is singular, and a step "
                             "has a size")


TINY = {"lr": 2e-3, "micro_batch_size": 4, "temperature": 0.5, "missing_eos_score": -10.0}

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


def surrogate(logp, logp_old, adv, mask):
    """What the new policy would gain on the answers of the old one, to be increased. (TRPO.1)

    All [B, R], logp with gradient. Returns a scalar, the mean over real tokens; its gradient at
    logp = logp_old is the policy gradient. Source: arXiv:1502.05477, Eq. 14."""
    ratio = ((logp - logp_old) * mask).exp()  # 1 on padding, where exp could overflow
    return masked_mean(ratio * adv, mask)  # (TRPO.1)


def mean_kl(logits_old, logits, mask):
    """Exact KL(old || new), summed over the vocabulary, mean over real tokens, nats. (TRPO.2)

    logits_old, logits [B, R, V], already divided by the temperature; mask [B, R]. Returns a scalar.
    Source: arXiv:1502.05477, Eq. 12."""
    old, new = logits_old.float().log_softmax(-1), logits.float().log_softmax(-1)
    # q - p sums to 0. It is there against rounding: if all of log q are off by the same 1e-7, which
    # is not little beside a small KL, then so is q, and the two cancel.
    p, q = old.exp(), new.exp()
    return masked_mean((p * (old - new) + (q - p)).sum(-1), mask)  # (TRPO.2)


def value_loss(values, ret, mask):
    """Half the squared error of the critic, mean over real tokens; all [B, R]. (TRPO.7)"""
    return 0.5 * masked_mean((values - ret).square(), mask)  # (TRPO.7)


def flatten(tensors):
    """One vector of all the numbers in a list of tensors."""
    return torch.cat([t.reshape(-1) for t in tensors])


def kl_slope(kl, params):
    """The gradient of the scalar `kl` with respect to the tensors `params`: a vector that has a
    gradient itself. Needs an attention kernel that can be differentiated twice."""
    return flatten(torch.autograd.grad(kl, params, create_graph=True, materialize_grads=True))


def fisher_vector_product(kl, params, v, damping, slope=None):
    """(F + damping) v, where F is the Hessian of `kl` with respect to `params`. (TRPO.3)

    kl: scalar with graph, mean_kl(logits.detach(), logits, mask), at whose minimum the Hessian is
    the Fisher matrix; params: list of tensors; v: vector of as many numbers; slope: kl_slope(kl,
    params), which all v have in common. Returns a vector. The graph stays, for the next v.
    Source: arXiv:1502.05477, appendix C.1; Pearlmutter 1994."""
    slope = kl_slope(kl, params) if slope is None else slope
    product = torch.autograd.grad(slope @ v, params, retain_graph=True, materialize_grads=True)
    return flatten(product) + damping * v  # (TRPO.3)


def conjugate_gradient(matvec, b, iters=10, tol=1e-10):
    """Solves M x = b for a symmetric positive definite M, known by matvec(x) = M x. (TRPO.4)

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


def step_length(uFu, max_kl):
    """How far to go along u: the length at which 1/2 length^2 u F u is max_kl; 0 where u F u is not
    a positive number. (TRPO.5)"""
    return (2 * max_kl / uFu) ** 0.5 if 0 < uFu < float("inf") else 0.0


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


@torch.no_grad()
def score_old(model, batch, config, policy="policy"):
    """Adds logits_old [B, R, V], over the temperature, and makes logp_old [B, R] the scorer's own.

    D and S compare the policy with itself before the step. With the old logits from the very pass
    that later makes the new ones, D is exactly 0 and every ratio exactly 1 at theta_old. Returns
    the largest |log pi - log pi_old| between this pass and the sampler: rounding, or a fault."""
    sampled, logits_old = batch["logp_old"], None
    logp_old = torch.zeros_like(sampled)
    for rows, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        with lora.use_adapter(model, policy):
            logits = scaled_logits(model, b, config)  # [b, R, V]
        # In a large vocabulary all logits together are the largest tensor of the run.
        if logits_old is None:
            logits_old = logits.new_zeros(*sampled.shape, logits.shape[-1])
        R = logits.shape[1]
        logits_old[rows, :R] = logits
        logp_old[rows, :R] = token_logps(logits, b["y"]) * b["mask"]  # (RL.1)
    # The logits of its own micro-batches are all that a process will need.
    if logits_old is not None:
        batch["logits_old"] = logits_old
    logp_old = batch["logp_old"] = common.add_up(logp_old)
    return (logp_old - sampled).abs().max().item()  # both are 0 on padding


# ------------------------------------------------------------------------------ update


def scaled_logits(model, b, config):
    """Logits [b, R, V] of the active adapter, in fp32 and divided by the temperature. Position t-1
    predicts token t: the last logits, after the whole answer, predict nothing and are dropped."""
    logits = common.read(model, b["x"], b["x_mask"], b["y"], b["mask"])[:, :-1]
    return logits.float() / config.temperature


def parts(batch, config, groups=None):
    """Micro-batches of the batch (or of some of its rows), each with its share of their tokens."""
    tokens = (batch["mask"] if groups is None else batch["mask"][groups]).sum()
    for _, b in common.share(common.micro_batches(batch, config.micro_batch_size, groups)):
        yield b, b["mask"].sum() / tokens


def surrogate_of(model, b, config):
    """(S (TRPO.1) of a micro-batch, the logits that it comes from), by the active adapter."""
    logits = scaled_logits(model, b, config)
    logp = token_logps(logits, b["y"])  # (RL.1); the temperature is in the logits already
    return surrogate(logp, b["logp_old"], b["adv"], b["mask"]), logits


@torch.no_grad()
def move(parameters, old, step):
    """Sets the policy to theta_old + step, a vector."""
    pieces = step.split([p.numel() for p in parameters])
    for p, before, piece in zip(parameters, old, pieces):
        p.copy_(before + piece.view_as(p))


@torch.no_grad()
def gain_and_kl(model, batch, config):
    """S (TRPO.1) and D (TRPO.2) of the policy as it stands, on the whole batch."""
    gain = kl = 0.0
    for b, share in parts(batch, config):
        part_gain, logits = surrogate_of(model, b, config)
        gain += (share * part_gain).item()
        kl += (share * mean_kl(b["logits_old"], logits, b["mask"])).item()
    return common.add_up(gain), common.add_up(kl)


def natural_step(model, parameters, old, batch, config):
    """The step along the natural gradient that should end at D = max_kl, a vector, and |g|.

    The policy's adapter must be active, `parameters` its tensors and `old` their values theta_old;
    the policy is not moved."""
    # The gradient g of S on the whole batch.
    g = torch.zeros_like(flatten(old))
    for b, share in parts(batch, config):
        gain, _ = surrogate_of(model, b, config)
        g += share * flatten(
            torch.autograd.grad(gain, parameters, materialize_grads=True))
    g = common.add_up(g)

    # The direction u solves (F + damping) u = g, with F from a few rows: each product with F costs
    # a backward pass. The usual attention kernels cannot be differentiated twice, MATH can.
    slopes, some = [], torch.arange(len(batch["x"]))[: config.fisher_rows]
    with sdpa_kernel(SDPBackend.MATH):
        for b, share in parts(batch, config, some):
            logits = scaled_logits(model, b, config)
            kl = share * mean_kl(logits.detach(), logits, b["mask"])  # (TRPO.2), 0 here
            slopes.append((kl, kl_slope(kl, parameters)))

        def matvec(v):
            product = torch.zeros_like(v)
            for kl, slope in slopes:
                product += fisher_vector_product(kl, parameters, v, 0.0, slope)
            return config.damping * v + common.add_up(product)

        u = conjugate_gradient(matvec, g, config.cg_iters)  # (TRPO.3), (TRPO.4)

    # The length. A direction that changes nothing on the few rows costs nothing in their F, though
    # it may change other rows. So u F u is measured on the whole batch, by a trial step e u, where
    # D is about 1/2 e^2 u F u. The first trial is short. The second has the length that the first
    # one found, because at max_kl D is no longer quite quadratic.
    uFu = u @ g - config.damping * u @ u  # conjugate gradient ends with u (F + damping) u = u g
    e = step_length(uFu.item(), config.max_kl / 4)
    for _ in range(2):
        move(parameters, old, e * u)
        _, kl = gain_and_kl(model, batch, config)
        e = step_length(2 * kl / e**2 if e else 0.0, config.max_kl)  # (TRPO.5)
    move(parameters, old, torch.zeros_like(u))
    return e * u, g.norm().item()


def line_search(model, parameters, old, step, batch, config):
    """Moves the policy by the first of step, 0.8 step, 0.64 step ... that (TRPO.6) accepts; where
    none is, the policy is theta_old, to the bit.

    Returns (surrogate gain, KL per token, trials that failed)."""
    # At theta_old every ratio is 1, so that S is the mean advantage.
    start = masked_mean(batch["adv"], batch["mask"]).item()
    for j in range(config.backtracks):
        move(parameters, old, 0.8**j * step)
        gain, kl = gain_and_kl(model, batch, config)
        # The quadratic model may be off: what counts is S and D as they are there.
        if gain > start and kl <= 1.2 * config.max_kl:  # (TRPO.6)
            return gain - start, kl, j
    move(parameters, old, torch.zeros_like(step))
    return 0.0, 0.0, config.backtracks


def fit_critic(model, optimizer, batch, config, critic="critic"):
    """--ppo-epochs gradient steps on (TRPO.7); returns the loss before the first of them."""
    first = 0.0
    for epoch in range(config.ppo_epochs):
        for b, share in parts(batch, config):
            # backward() stands inside the block, so that checkpointing finds the same adapter.
            with lora.use_adapter(model, critic):
                values = read_values(model, critic, b)  # [b, R]
                loss = share * value_loss(values, b["ret"], b["mask"])  # (TRPO.7)
                loss.backward()
            first += loss.item() if epoch == 0 else 0.0
        # One AdamW step per pass over the whole batch.
        parameters = lora.adapter_parameters(model, critic)
        common.add_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return common.add_up(first)


# ------------------------------------------------------------------------------ train


def check_precision(model, config):
    """Raises ValueError where bf16, which rounds D by about 1e-4, is too coarse for max_kl."""
    if model.dtype == torch.bfloat16 and config.max_kl < 1e-3:
        raise ValueError(f"--max-kl {config.max_kl:g} is too small for bf16, which rounds the KL "
                         "by about 1e-4; use --dtype fp32, or 1e-3 and more")


def train(model, tokenizer, rows, reward, config=Config(), log=None, state=None):
    """TRPO on the adapter "policy" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, and whatever else the reward
    wants. reward: a function (prompts, responses, rows) -> one float per answer, or the name of an
    adapter with a head on `model`. log(row, samples, state) is called once per step; `state` is all
    that going on needs beside the adapters (live: copy it to keep it); train(state=...) goes on."""
    check_precision(model, config)
    make_models(model, reward, config)
    policy, critic = (lora.adapter_parameters(model, name) for name in ("policy", "critic"))
    optimizer = torch.optim.AdamW(critic, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)  # of sampling
    history, first = [], state["step"] if state else 0
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        generator.set_state(state["generator"])

    bar = tqdm(range(first, config.steps), desc="trpo", disable=None)
    for step in bar:
        clock = time.time()

        # 1. Act: answer a batch of prompts, and score the answers.
        index = common.batch_rows(step, len(rows), config.batch_size, config.seed)
        drawn = [rows[i] for i in index]
        batch, responses = rollout(model, tokenizer, drawn, reward, config, generator)

        # 2. Credit: from one score per answer to one advantage per token.
        mask, values_old = batch["mask"], batch["values_old"]
        rewards = kl_shaped_rewards(
            batch["score"], batch["logp_old"], batch["logp_ref"], mask, config.beta)  # (RL.2)
        adv, ret = gae(rewards, values_old, mask, config.gamma, config.lam)  # (RL.3) to (RL.5)
        batch["adv"] = whiten(adv, mask)  # (RL.6)
        batch["ret"] = ret  # not whitened: the critic learns in units of the score

        # 3. The policy: natural gradient, then a step inside the trust region.
        row = {"step": step, **rollout_stats(batch)}
        row["log_ratio_max"] = score_old(model, batch, config)
        old = [p.detach().clone() for p in policy]
        with lora.use_adapter(model, "policy"):
            full, norm = natural_step(model, policy, old, batch, config)
            gain, kl, backtracks = line_search(model, policy, old, full, batch, config)

        # 4. The critic: gradient descent.
        optimizer.param_groups[0]["lr"] = lr = common.learning_rate(step, config.steps, config.lr)
        row["value_loss"] = fit_critic(model, optimizer, batch, config)

        # 5. Measure.
        row.update(loss=-gain, surrogate_gain=gain, grad_norm=norm, lr=lr, kl_step=kl,
                   kl_step_response=kl * row["length"], backtracks=backtracks)
        _, to_go = gae(rewards, values_old, mask, config.gamma, 1.0)
        row["explained_variance"] = explained_variance(values_old, to_go, mask)
        row["seconds"] = time.time() - clock
        history.append(row)
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("score", "kl", "eos_rate", "length")})
        if log:
            log(row, samples(drawn, responses, batch["score"]), {
                "step": step + 1, "optimizer": optimizer.state_dict(),
                "generator": generator.get_state()})
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
        args, config = flags.read("trpo", __doc__, Config, TINY, argv, reward="needed",
                                  dtype="fp32")
        rows, test = data.load(args, ["prompt"])
        model, tokenizer, config = models.load(args, config, "policy", [*rows, *test])
        check_precision(model, config)
        reward = rewards.load(args, model, config.max_length)
        make_models(model, reward, config)
        before = runs.before(args) or evaluate(model, tokenizer, test, reward, config)
        log, state = runs.start(args, config, model, "policy", before)
        train(model, tokenizer, rows, reward, config, log, state)
        after = evaluate(model, tokenizer, test, reward, config)
        runs.finish(args, config, model, "policy", before, after)


if __name__ == "__main__":
    main()
