"""GRPO trains a language model by comparison: it samples several answers to each prompt, and makes
those that scored above their mean likelier and the others less likely. It needs no critic (Shao et
al. 2024, arXiv:2402.03300). Flags turn it into its relatives.

Let r_1 .. r_G be the scores of the answers y_1 .. y_G to one prompt. A_i belongs to answer i and is
shared by all of its tokens; rho_t, K_t and L_t belong to one token.

    (RL.1)   log pi(y_t) = log softmax(logits / temperature)[y_t]   of a sampled token
    (GRPO.1) A_i = (r_i - mean r) / (sd r + 1e-4)           "std"; "none": r_i - mean r;
                                                            "loo": r_i - mean of the others
    (GRPO.2) rho_t = pi(y_t) / pi_old(y_t)                  "gspo": their geometric mean over y
    (GRPO.3) L_t = max(-A rho, -A clip(rho, 1-eps_low, 1+eps_high)) + beta K_t
    (GRPO.4) K_t = exp(d_t) - 1 - d_t,  d_t = (log pi_ref - log pi)_t                   k3
    (GRPO.5) L = 1/B sum_i 1/|y_i| sum_t L_t                "grpo", "gspo"
    (GRPO.6) L = sum L_t / sum |y_i|                        "dapo", "cispo"
    (GRPO.7) L = sum L_t / (B max_tokens)                   "dr_grpo", which goes with "none"
    (GRPO.8) r_i <- r_i - beta sum_t (log pi_old - log pi_ref)_t    with --kl-in reward, K = 0
    (GRPO.9) L_t = -clip(rho, 1-eps_low, 1+eps_high) A log pi(y_t) + beta K_t
                                            "cispo"; no gradient through the clip

The algorithm, for each step:
    1. sample G answers y ~ pi_old to each prompt of a batch, and score them
    2. turn the scores of each group into one advantage per answer: (GRPO.1)
    3. descend the gradient of the loss (GRPO.3), averaged as (GRPO.5), (GRPO.6) or (GRPO.7)
    4. measure how far the policy moved

Where the KL stands decides what is learnt. In the reward, (GRPO.8), its gradient is that of
KL(pi || pi_ref) over whole answers. In the loss, as in the paper, it looks at one token at a time.
While pi is pi_old, the paper's k3 has the gradient of the other KL, KL(pi_ref || pi), at that
token. "k2" is d_t^2 / 2 and "k3-corrected", the default, is k3 times the token's ratio: both have
the gradient of KL(pi || pi_ref) at that token. After a first update has moved the policy, only
"k3-corrected" keeps its gradient. None of the three sees how a token changes the KL of the tokens
after it. benchmarks/closed_form.py shows where each ends.

Dividing by the spread changes what is maximised. Prompts whose answers score nearly alike weigh
more. For scores 0 and 1 with success rate mu, a large group maximises 2 arcsin sqrt mu instead of
mu; in a group of 4 the two hardly differ. And a KL in the loss acts as if beta were multiplied by
the spread, so its hold loosens as the answers become alike.

A group whose answers all score the same teaches nothing. Such groups are counted, and with
--resample they are replaced by groups for other prompts. Left out on purpose: a penalty for
overlong answers.

    python grpo.py --steps 200
    python grpo.py --model smollm2 --data tasks/sums.py
    python grpo.py --loss dr_grpo --adv none --kl-in reward
"""

import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora


@dataclass(frozen=True)
class Config:
    steps: int = 200  # batches to learn from
    batch_size: int = 8  # answers per step
    group_size: int = 4  # G, answers per prompt
    micro_batch_size: int | None = None  # answers per pass when scored and learnt from; none: all
    lr: float = 5e-4  # peak learning rate (AdamW)
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    max_new_tokens: int = 96  # tokens of an answer
    temperature: float = 0.7  # of sampling, and so of all log-probabilities
    missing_eos_score: float | None = -3.0  # of an answer that was cut off; none: the reward's
    adv: Literal["std", "none", "loo", "raw"] = "std"  # advantages; raw: the score, no baseline
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"  # how tokens are averaged
    resample: int | None = None  # times that groups without spread are replaced; none: never
    clip_low: float = 0.2  # eps_low of the ratio (gspo: try 3e-4)
    clip_high: float = 0.2  # eps_high of the ratio (dapo: 0.28, gspo: 4e-4)
    beta: float = 0.04  # KL weight: in the loss per nat, in the reward units of score per nat
    kl_in: Literal["loss", "reward"] = "loss"  # where the KL stands
    kl: Literal["k3", "k3-corrected", "k2"] = "k3-corrected"  # its form in the loss
    ppo_epochs: int = 1  # passes over a batch
    minibatches: int = 1  # updates per pass

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: at 0 all answers to a prompt are one")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt "
                             f"in --max-length {self.max_length}")
        if self.group_size < 2:
            raise ValueError("--group-size must be at least 2: one answer alone is its own mean")
        if self.batch_size % (self.group_size * self.minibatches):
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of --group-size "
                             f"{self.group_size} times --minibatches {self.minibatches}")


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


def group_advantages(rewards, scale="std"):
    """How much better each answer is than its group. (GRPO.1)

    rewards [N, G], one row a prompt, in units of score. scale: "std" divides by the unbiased
    standard deviation + 1e-4; "none" subtracts the mean only (Dr. GRPO); "loo" subtracts the mean
    of the other answers (RLOO), which is "none" times G / (G - 1) and does without its bias: an
    answer stands in its own mean; "raw" subtracts nothing, to show what a baseline is for. Returns
    [N, G]; without "raw", a group without spread has advantage 0.
    Raises ValueError for a group of one answer, or for another scale.
    Source: arXiv:2402.03300, section 4.1.2; arXiv:2503.20783; arXiv:2402.14740."""
    G = rewards.shape[1]
    if G < 2:
        raise ValueError("a group needs at least two answers: one alone is its own mean")
    if scale == "raw":
        return rewards
    rewards = rewards - rewards[:, :1]  # equal scores then cancel exactly, however large they are
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if scale == "loo":
        return centred * G / (G - 1)
    if scale == "none":
        return centred
    raise ValueError(f"scale must be std, none, loo or raw, got {scale!r}")


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
    """The clipped surrogate with the KL in the loss, minimised. (GRPO.2) to (GRPO.7), (GRPO.9)

    logp (with gradient), logp_old, logp_ref, mask [B, R]; adv [B]; beta in units of advantage per
    nat. loss: grpo, dapo, cispo, gspo or dr_grpo (needs max_tokens, the length that every answer is
    divided by); kl: see kl_penalty. Returns a scalar. Raises ValueError for another loss, and for
    dr_grpo without max_tokens.
    Source: arXiv:2402.03300, Eq. 3; arXiv:2503.14476 (dapo), 2503.20783 (dr_grpo), 2507.18071
    (gspo), 2506.13585 (cispo)."""
    B, length, adv = len(mask), mask.sum(1, keepdim=True), adv.unsqueeze(1)
    ratio = importance_ratio(logp, logp_old, mask, loss)  # (GRPO.2)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    if loss == "cispo":  # the clip limits a weight, and every token keeps its gradient
        per_token = -adv * clipped.detach() * logp  # (GRPO.9)
    else:
        per_token = torch.max(-adv * ratio, -adv * clipped)  # (GRPO.3)
    if beta:
        per_token = per_token + beta * kl_penalty(logp, logp_old, logp_ref, mask, kl)
    if loss in ("grpo", "gspo"):
        return (per_token * mask / length).sum() / B  # (GRPO.5)
    if loss in ("dapo", "cispo"):
        return masked_mean(per_token, mask)  # (GRPO.6)
    if loss == "dr_grpo" and max_tokens:
        return (per_token * mask).sum() / (B * max_tokens)  # (GRPO.7)
    raise ValueError(f"loss must be grpo, dapo, cispo, gspo or (with max_tokens) dr_grpo: {loss!r}")


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


# ------------------------------------------------------------------------------ the two models


def make_models(model, reward, config):
    """Hangs the models on the one frozen base as adapters: makes what is missing, keeps the rest.

    policy      trained; if you loaded none, a new adapter, which changes nothing yet
    reference   a frozen copy of the policy as it was at the start
    reward      frozen; only if `reward` names an adapter with a head, else it is a function"""
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


# ------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, tokenizer, rows, reward, config, generator, G=1,
            policy="policy", reference="reference"):
    """G answers to the prompt of each data row, and all about them that the update holds fixed.

    N prompts of P tokens, padded on the left; B = N G answers of R tokens, padded on the right, the
    answers to one prompt next to each other. Returns the batch, a dictionary of tensors: x, x_mask
    [N, P]; y, mask, logp_old, logp_ref, entropy [B, R]; score, ended [B]; and the texts."""
    # A prompt that is too long loses its beginning.
    room = config.max_length - config.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, row["prompt"])[-room:] for row in rows]
    x, x_mask = common.pad(prompts, "left", model.device)  # [N, P]

    # Sample y ~ pi_old, that is from softmax(logits / temperature) and nothing else. The sampler
    # reports log pi_old of each token it drew, so no second pass is needed for it.
    stop = common.stop_ids(model, tokenizer)
    with lora.use_adapter(model, policy):
        y, mask, logp_old, entropy = common.sample(
            model, x, x_mask, stop, config.max_new_tokens, config.temperature, generator, G)
    batch = {"x": x, "x_mask": x_mask, "y": y, "mask": mask,
             "logp_old": logp_old, "entropy": entropy}

    # log pi_ref of every sampled token. There is no gradient here: micro-batches only save memory.
    batch["logp_ref"] = batch_logps(model, reference, batch, config)

    # One score per answer. An answer that was cut off before its EOS gets a fixed low score,
    # whatever the reward makes of the fragment: stopping has to be worth learning.
    rows = [row for row in rows for _ in range(G)]
    score, responses = common.score(model, tokenizer, rows, x, x_mask, y, mask, reward,
                                    config.micro_batch_size)
    batch["ended"] = common.ended(y, mask, stop)
    if config.missing_eos_score is not None:
        score = score.masked_fill(~batch["ended"], config.missing_eos_score)
    batch["score"] = score
    return batch, responses


def without_spread(score, G):
    """[N] bool: whether all G answers of a group have the same score [B]."""
    groups = score.view(-1, G)
    return (groups == groups[:, :1]).all(1)


def replace(batch, fresh, places, answers):
    """The batch, with the groups of `fresh` at the numbers `places` of its prompts and `answers` of
    its answers. Both are padded to the wider of the two."""
    result = {}
    for key, old in batch.items():
        new, of_prompts = fresh[key], key in ("x", "x_mask")
        if old.dim() > 1:  # prompts are padded on the left, answers on the right
            width = max(old.shape[1], new.shape[1])
            old, new = (F.pad(part, (width - part.shape[1], 0) if of_prompts
                              else (0, width - part.shape[1])) for part in (old, new))
        index = torch.tensor(places if of_prompts else answers, device=old.device)
        result[key] = old.index_copy(0, index, new)
    return result


@torch.no_grad()
def resample(model, tokenizer, rows, drawn, reward, config, generator):
    """A rollout for the data rows `drawn`, in which groups without spread, which teach nothing, are
    replaced by groups for other rows, at most --resample times (dynamic sampling, DAPO).

    Returns the batch, the texts, the data rows as they are now, and the share of groups that had no
    spread at first. Source: arXiv:2503.14476, section 3.2."""
    G, drawn = config.group_size, list(drawn)
    batch, responses = rollout(model, tokenizer, drawn, reward, config, generator, G)
    dead = without_spread(batch["score"], G)  # [N]
    share = dead.float().mean().item()
    for _ in range(config.resample or 0):
        places = dead.nonzero().flatten().tolist()  # the groups to replace
        if not places:
            break
        # Other prompts, drawn at random: this one's answers would most likely be alike again.
        others = torch.randint(len(rows), (len(places),), generator=generator).tolist()
        fresh, texts = rollout(
            model, tokenizer, [rows[i] for i in others], reward, config, generator, G)
        # The new groups take the places of the old ones, with their texts and their data rows. They
        # may be without spread as well, and are then replaced in the next round.
        answers = [place * G + i for place in places for i in range(G)]
        batch = replace(batch, fresh, places, answers)
        for place, i in zip(places, others):
            drawn[place] = rows[i]
        for place, text in zip(answers, texts):
            responses[place] = text
        dead = without_spread(batch["score"], G)
    return batch, responses, drawn, share


# ------------------------------------------------------------------------------ update


def gradient(model, b, weight, config, policy):
    """Adds weight times the gradient of the loss on a micro-batch b to the policy's parameters.

    Returns the loss, and the largest |log pi - log pi_old|."""
    y, mask = b["y"], b["mask"]  # [b, R]
    logp_old = b["logp_old"]  # [b, R]
    beta = config.beta if config.kl_in == "loss" else 0.0
    with lora.use_adapter(model, policy):
        # Position t-1 predicts token t: the last logits, after the whole answer, are dropped.
        logits = common.read(model, b["x"], b["x_mask"], y, mask)
        logp = token_logps(logits[:, :-1], y, config.temperature)  # (RL.1)
        loss = grpo_loss(
            logp, logp_old, b["logp_ref"], b["adv"], mask,
            config.clip_low, config.clip_high, beta,
            config.loss, config.max_new_tokens, config.kl)  # (GRPO.2) to (GRPO.7)
        (weight * loss).backward()
    moved = (logp.detach() - logp_old) * mask
    return loss.item(), moved.abs().max().item()


def update(model, optimizer, batch, config, generator, policy="policy"):
    """--ppo-epochs passes over the batch in --minibatches parts, one AdamW step after each part.

    Returns the mean loss and gradient norm, and log_ratio_max: the largest |log pi - log pi_old| of
    the first part. It is taken before any step, where sampler and scorer must agree, so anything
    but rounding is a fault."""
    stats = {"loss": 0.0, "grad_norm": 0.0, "log_ratio_max": 0.0}
    of_policy = lora.adapter_parameters(model, policy)
    parts = config.ppo_epochs * config.minibatches
    # What a loss is a mean over decides how much a micro-batch weighs: its tokens in (GRPO.6), its
    # answers in the others; relative to the average minibatch.
    tokens = batch["mask"].sum() / config.minibatches
    answers = len(batch["y"]) / config.minibatches
    for part in range(parts):
        # Each pass shuffles the groups anew and deals them out to its minibatches.
        if part % config.minibatches == 0:
            order = torch.randperm(len(batch["x"]), generator=generator)
            minibatches = order.chunk(config.minibatches)
        groups = minibatches[part % config.minibatches]
        for _, b in common.share(common.micro_batches(batch, config.micro_batch_size, groups)):
            weight = len(b["y"]) / answers
            if config.loss in ("dapo", "cispo"):
                weight = (b["mask"].sum() / tokens).item()
            loss, moved = gradient(model, b, weight, config, policy)  # (GRPO.2) to (GRPO.7)
            stats["loss"] += weight * loss / parts
            if part == 0:  # pi still is pi_old
                stats["log_ratio_max"] = max(stats["log_ratio_max"], moved)
        # One step on the policy, with a gradient of norm 1 at most.
        common.add_gradients(of_policy)
        norm = torch.nn.utils.clip_grad_norm_(of_policy, 1.0)
        stats["grad_norm"] += norm.item() / parts
        optimizer.step()
        optimizer.zero_grad()
    stats["loss"] = common.add_up(stats["loss"])
    stats["log_ratio_max"] = common.add_up(stats["log_ratio_max"], largest=True)
    return stats


def drift(model, batch, config, policy="policy"):
    """How far the update moved the policy, on the batch's own tokens, after its last step.

    approx_kl: KL(old || new), nats per token, by k3: for tokens drawn from old it is unbiased, and
    0 only where every ratio is 1. clip_fraction: share of tokens outside the clip range."""
    mask = batch["mask"]
    logp = batch_logps(model, policy, batch, config)  # [B, R], one more forward pass
    log_ratio = (logp - batch["logp_old"]) * mask
    ratio = importance_ratio(logp, batch["logp_old"], mask, config.loss)  # (GRPO.2)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    outside = ((ratio < low) | (ratio > high)).float()  # whatever the sign of the advantage
    return {
        "approx_kl": masked_mean(log_ratio.expm1() - log_ratio, mask).item(),  # k3
        "clip_fraction": masked_mean(outside, mask).item(),
        "ratio_max": ratio.max().item(),
    }


# ------------------------------------------------------------------------------ train


def train(model, tokenizer, rows, reward, config=Config(), log=None, state=None):
    """GRPO on the adapter "policy" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, and whatever else the reward
    wants. reward: a function (prompts, responses, rows) -> one float per answer, or the name of an
    adapter with a head on `model`. log(row, samples, state) is called once per step; `state` is all
    that going on needs beside the adapters (live: copy it to keep it); train(state=...) goes on."""
    make_models(model, reward, config)
    policy, G = lora.adapter_parameters(model, "policy"), config.group_size
    optimizer = torch.optim.AdamW(policy, eps=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)  # of sampling and shuffling
    history, first = [], state["step"] if state else 0
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        generator.set_state(state["generator"])

    bar = tqdm(range(first, config.steps), desc="grpo", disable=None)
    for step in bar:
        clock = time.time()

        # 1. Act: answer each prompt of a batch G times, and score the answers.
        index = common.batch_rows(step, len(rows), config.batch_size // G, config.seed)
        drawn = [rows[i] for i in index]
        batch, responses, drawn, dead = resample(
            model, tokenizer, rows, drawn, reward, config, generator)

        # 2. Credit: each answer against its group.
        rewards = batch["score"]
        if config.kl_in == "reward":
            kl = ((batch["logp_old"] - batch["logp_ref"]) * batch["mask"]).sum(1)
            rewards = rewards - config.beta * kl  # (GRPO.8)
        adv = group_advantages(rewards.view(-1, G), config.adv)  # (GRPO.1), [N, G]
        batch["adv"] = adv.flatten()  # [B]: every token of an answer has the same

        # 3. Learn.
        lr = common.learning_rate(step, config.steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = lr
        stats = update(model, optimizer, batch, config, generator)

        # 4. Measure.
        row = {"step": step, "lr": lr, **rollout_stats(batch), **stats}
        row.update(drift(model, batch, config))
        row["zero_std_groups"] = int((adv == 0).all(1).sum())  # groups that teach nothing
        row["dead_groups"] = dead  # the share of them before any was replaced
        row["seconds"] = time.time() - clock
        history.append(row)
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("score", "kl", "eos_rate", "length")})
        if log:
            state = {"step": step + 1, "optimizer": optimizer.state_dict(),
                     "generator": generator.get_state()}
            repeated = [drawn[i // G] for i in range(len(responses))]
            log(row, samples(repeated, responses, batch["score"]), state)
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
        args, config = flags.read("grpo", __doc__, Config, TINY, argv, reward="needed")
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
