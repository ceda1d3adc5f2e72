"""DPO: learn from pairs of answers of which one was preferred, without a reward model and without
sampling (Rafailov et al. 2023, arXiv:2305.18290), and its one-line relatives.

The policy at which E[r(x, y)] - beta KL(pi || pi_ref) is largest is known:
pi*(y) = pi_ref(y) exp(r(x, y) / beta) / Z. Solved for r, this is the score for which a policy pi
is the best one: r = beta log(pi / pi_ref) + beta log Z. In the Bradley-Terry model, the
probability that w is preferred to l depends only on the difference of their scores. Z cancels:

    (RL.1)   log pi(y_t) = log softmax(logits / temperature)[y_t]
    (DPO.1)  h = log(pi / pi_ref)(w) - log(pi / pi_ref)(l),   predicted P(w > l) = sigmoid(beta h)
    (DPO.2)  L = -(1 - flip) log sigmoid(beta h) - flip log sigmoid(-beta h)
    (DPO.3)  L = (h - 1 / (2 beta))^2                                   "ipo"
    (DPO.4)  accuracy = share of pairs with h > 0,  margin = E[beta h]
    (DPO.5)  log pi(y) / |y| in place of log pi(y), everywhere          with --length-normalised
    (DPO.6)  L - sft_weight E[ log pi(w) / |w| ]                        with --sft-weight

The algorithm:
    1. before training, compute log pi_ref of both answers of each pair that will be used
    2. each step, take a batch of pairs and make one step of gradient descent on (DPO.2) or (DPO.3)
    3. measure (DPO.4) on this batch, before the step

Log-probabilities are sums over the tokens of an answer, its EOS included. If the policy still
is the reference at the first step, the loss is ln 2 there (ipo: 1 / (4 beta^2)) and the margin 0.
Both are so up to rounding, and so the first accuracy says nothing. Log-probabilities are taken at
--temperature. For answers of one token, a beta that was meant for temperature 1 has to be
multiplied by the temperature to do the same here.

Often both log-probabilities fall while the margin grows. (DPO.2) sees only their difference, so it
also gets smaller if the rejected answer falls faster than the chosen one. Other answers gain what
both lose; `kl` and the samples show which. A higher --beta or a lower --lr limits this, and (DPO.6)
pulls the chosen answers up.

    python dpo.py --steps 200
    python dpo.py --loss ipo --beta 0.2
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
    batch_size: int = 16  # pairs per step
    micro_batch_size: int | None = None  # pairs per forward pass, to save memory; none: all
    lr: float = 3e-5  # peak learning rate (AdamW)
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    max_new_tokens: int = 96  # tokens of an answer that is sampled to look at
    temperature: float = 1.0  # of all log-probabilities, and of those answers
    missing_eos_score: float | None = -3.0  # of an answer that was cut off; none: the reward's
    beta: float = 0.4  # KL weight, units of reward per nat
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # (DPO.2) or (DPO.3)
    label_smoothing: float = 0.0  # flip, the share of labels believed wrong (sigmoid only)
    length_normalised: bool = False  # log-probabilities per token in place of sums
    sft_weight: float = 0.0  # of the chosen answers' negative log-likelihood per token

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: at 0 all answers to a prompt are one")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt "
                             f"in --max-length {self.max_length}")
        if self.beta <= 0:
            raise ValueError("--beta must be above 0: it divides the reward")
        if self.label_smoothing >= 0.5 or (self.label_smoothing and self.loss == "ipo"):
            raise ValueError("--label-smoothing must be below 0.5, and goes with --loss sigmoid")


TINY = {"lr": 1.5e-3, "micro_batch_size": 4, "temperature": 0.5, "missing_eos_score": -10.0}

# ------------------------------------------------------------------------------ the mathematics


def token_logps(logits, ids, temperature=1.0):
    """log pi(y_t) of each token under softmax(logits / temperature), in fp32. (RL.1)

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)  # (RL.1)


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta=0.1, loss="sigmoid", label_smoothing=0.0):
    """Negative log-likelihood of the preferences under the policy's own reward. (DPO.1) to (DPO.3)

    logp_w, logp_l [B]: log-probability of the chosen and of the rejected answer, summed over its
    tokens, with gradient; ref_w, ref_l [B]: the reference's. beta: units of reward per nat;
    flip, given as label_smoothing: the share of labels believed wrong (cDPO). Returns a scalar, the
    mean over pairs. Raises ValueError for another loss, for label smoothing with ipo, and for
    shapes that differ.
    Source: arXiv:2305.18290, Eq. 7; arXiv:2310.12036, Eq. 17 (ipo, summed log-probabilities)."""
    if not logp_w.shape == logp_l.shape == ref_w.shape == ref_l.shape:
        raise ValueError("logp_w, logp_l, ref_w and ref_l differ in shape")
    h = (logp_w - ref_w) - (logp_l - ref_l)  # (DPO.1)
    if loss == "sigmoid":
        right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()  # (DPO.2)
    if loss == "ipo" and not label_smoothing:
        return (h - 1 / (2 * beta)).square().mean()  # (DPO.3)
    raise ValueError(f"loss must be sigmoid, or ipo without label smoothing, got {loss!r}")


# ------------------------------------------------------------------------------ the two models


def make_models(model, config):
    """Hangs DPO's models on the frozen base as adapters: makes what is missing, keeps the rest.

    policy      trained; if you loaded none, a new adapter, which changes nothing yet
    reference   a frozen copy of the policy as it was at the start"""
    # A new adapter is drawn at random, without touching the random numbers of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if "policy" not in lora.names(model):
            lora.add_adapter(model, "policy", config.lora_rank, config.lora_alpha,
                             targets=config.lora_targets)
        # With the policy new, this copy is the bare base.
        if "reference" not in lora.names(model):
            lora.copy_adapter(model, "policy", "reference")


def encode_pairs(tokenizer, rows, max_length):
    """What `common.encode` makes of the pairs that can teach something: both answers fit, and they
    are not the same."""
    encoded = common.encode(tokenizer, rows, ["chosen", "rejected"], max_length)
    return [item for item in encoded if item[2][0] != item[2][1]]


def pair_logps(model, b, config):
    """log pi of both answers to each prompt, [N, 2], summed over their tokens, by the adapter that
    is active; with --length-normalised their mean per token.

    `common.read` gives the logits after the prompt and after each token of the answer. The logits
    at a position predict the token that comes next: position t-1 predicts token t. So the first of
    these R + 1 predicts y_1, and the last predicts nothing that we have, and is dropped."""
    logits = common.read(model, b["x"], b["x_mask"], b["y"], b["mask"])[:, :-1]  # [2 N, R, V]
    logp = token_logps(logits, b["y"], config.temperature)  # (RL.1)
    logp = (logp * b["mask"]).sum(1)
    if config.length_normalised:
        logp = logp / b["mask"].sum(1)  # (DPO.5)
    return logp.view(-1, 2)


@torch.no_grad()
def all_logps(model, name, pairs, config):
    """pair_logps of any number of pairs, [pairs, 2], under the adapter `name`; None: the base."""
    logps = torch.zeros(len(pairs), 2, device=model.device)
    # Pairs of about the same length go together, so that little of what is read is padding.
    lengths = [len(x) + sum(map(len, ys)) for _, x, ys in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    size = config.micro_batch_size or config.batch_size
    for start in common.share(range(0, len(order), size)):
        index = order[start : start + size]
        some = [pairs[i] for i in index]
        b = common.collate(some, model.device)  # a batch of its own
        with lora.use_adapter(model, name):
            logps[index] = pair_logps(model, b, config)  # (RL.1), [size, 2]
    return common.add_up(logps)


# ------------------------------------------------------------------------------ update


def update(model, optimizer, batch, config, policy="policy"):
    """One AdamW step on a batch with log pi_ref of both answers in "ref" [2 N]. Returns their
    log pi before the step, [N, 2], and the norm of the gradient."""
    N, parameters = len(batch["x"]), lora.adapter_parameters(model, policy)
    logps = torch.zeros(N, 2, device=model.device)
    # A pair is a group of two answers, which share one reading of their prompt.
    size = config.micro_batch_size and 2 * config.micro_batch_size
    for answers, b in common.share(common.micro_batches(batch, size)):
        with lora.use_adapter(model, policy):
            logp = pair_logps(model, b, config)  # [n, 2]
            ref = b["ref"].view(-1, 2)
            loss = dpo_loss(
                *logp.unbind(1), *ref.unbind(1), config.beta,
                config.loss, config.label_smoothing)  # (DPO.1) to (DPO.3)
            # Beside the margin, what SFT would minimise on the chosen answers. It holds them up.
            length = 1 if config.length_normalised else b["mask"][::2].sum(1)
            loss = loss - config.sft_weight * (logp[:, 0] / length).mean()  # (DPO.6)
            # A mean over pairs: weighted by their share, micro-batches add up to the batch.
            (loss * len(logp) / N).backward()
        logps[answers[::2] // 2] = logp.detach()  # the answers 2 i and 2 i + 1 are pair i
    common.add_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return common.add_up(logps), norm


def measure(logps, refs, config):
    """Loss, accuracy and margin (DPO.4), and both log-probabilities, of tensors [pairs, 2]."""
    h = (logps - refs)[:, 0] - (logps - refs)[:, 1]  # (DPO.1)
    loss = dpo_loss(*logps.T, *refs.T, config.beta, config.loss, config.label_smoothing)
    return {"loss": loss.item(), "accuracy": (h > 0).float().mean().item(),
            "margin": (config.beta * h).mean().item(),  # (DPO.4)
            "logp_chosen": logps[:, 0].mean().item(), "logp_rejected": logps[:, 1].mean().item()}


# ------------------------------------------------------------------------------ train


def train(model, tokenizer, rows, config=Config(), log=None, state=None):
    """DPO on the adapter "policy" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, "chosen" and "rejected". Pairs
    that do not fit, or whose answers are the same, are left out. log(row, samples, state) is called
    once per step; `state` is all that going on needs beside the adapters (live: copy it to keep
    it), and train(state=...) goes on from it."""
    make_models(model, config)
    # Prompts and answers as token ids, without the pairs that teach nothing.
    pairs = encode_pairs(tokenizer, rows, config.max_length)
    if not pairs:
        raise ValueError(f"no pair of different answers fits into --max-length {config.max_length}")
    parameters = lora.adapter_parameters(model, "policy")
    optimizer = torch.optim.AdamW(parameters, eps=1e-5, weight_decay=0.0)
    history, first = [], state["step"] if state else 0
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    # 1. log pi_ref of the pairs that the run draws. It never changes: once is enough. A run that
    #    goes on reads all of them again, in the same batches, so that it gets the same bits.
    schedule = {step: common.batch_rows(step, len(pairs), config.batch_size, config.seed)
                for step in range(config.steps)}
    used = sorted({i for index in schedule.values() for i in index})
    refs = all_logps(model, "reference", [pairs[i] for i in used], config)  # [used, 2]
    refs = dict(zip(used, refs))

    bar = tqdm(range(first, config.steps), desc="dpo", disable=None)
    for step in bar:
        clock = time.time()

        # 2. A batch of pairs, and one step of gradient descent.
        index = schedule[step]
        batch = common.collate([pairs[i] for i in index], model.device)
        ref = torch.stack([refs[i] for i in index])  # [N, 2]
        batch["ref"] = ref.flatten()  # [2 N], like the answers
        lr = common.learning_rate(step, config.steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = lr
        logps, norm = update(model, optimizer, batch, config)

        # 3. Measure (DPO.4), on the batch before the step.
        row = {"step": step, "grad_norm": norm, "lr": lr}
        row.update(measure(logps, ref, config))
        row["seconds"] = time.time() - clock
        history.append(row)
        shown = ("loss", "accuracy", "margin", "logp_chosen")
        bar.set_postfix({key: f"{row[key]:.2f}" for key in shown})
        if log:
            log(row, [], {"step": step + 1, "optimizer": optimizer.state_dict()})
    return history


# ------------------------------------------------------------------------------ command line


@torch.no_grad()
def evaluate(model, tokenizer, rows, reward, config):
    """(statistics, samples): loss, accuracy and margin of held-out pairs, and a sampled answer to
    each of their prompts with its KL to the reference and, where there is a reward, its score."""
    pairs = encode_pairs(tokenizer, rows, config.max_length)
    logps = all_logps(model, "policy", pairs, config)
    refs = all_logps(model, "reference", pairs, config)
    rows = [row for row, _, _ in pairs]
    answers, samples = sample_answers(model, tokenizer, rows, reward, config)
    return {**measure(logps, refs, config), **answers}, samples


def sample_answers(model, tokenizer, rows, reward, config):
    """(statistics, samples) of one answer of the policy to the prompt of each data row."""
    room = config.max_length - config.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, row["prompt"])[-room:] for row in rows]
    x, x_mask = common.pad(prompts, "left", model.device)  # [B, P]
    # The same random numbers before and after training.
    generator = torch.Generator().manual_seed(config.seed)
    stop = common.stop_ids(model, tokenizer)
    with lora.use_adapter(model, "policy"):
        y, mask, logp, _ = common.sample(
            model, x, x_mask, stop, config.max_new_tokens, config.temperature, generator)

    # The KL to the reference, of answers y ~ pi: the mean of log pi - log pi_ref. The sampler has
    # reported log pi; the reference reads the answers.
    logp_ref = torch.zeros(len(y), device=y.device)  # [B], summed over the tokens
    batch = {"x": x, "x_mask": x_mask, "y": y, "mask": mask}
    for index, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        y_part, real = b["y"], b["mask"]  # [b, R]
        with lora.use_adapter(model, "reference"):
            logits = common.read(model, b["x"], b["x_mask"], y_part, real)
        # Position t-1 predicts token t: the last logits are dropped.
        ref = token_logps(logits[:, :-1], y_part, config.temperature)  # (RL.1)
        logp_ref[index] = (ref * real).sum(1)
    kl = logp.sum(1) - common.add_up(logp_ref)  # [B]

    # Texts, and scores where there is something that scores.
    ended = common.ended(y, mask, stop)
    texts, score = common.decode(tokenizer, y, mask), None
    stats = {}
    if reward is not None:
        score, _ = common.score(model, tokenizer, rows, x, x_mask, y, mask, reward,
                                config.micro_batch_size)
        if config.missing_eos_score is not None:
            score = score.masked_fill(~ended, config.missing_eos_score)
        stats["score"] = score.mean().item()
        stats["score_std"] = score.std(unbiased=False).item()
    stats["kl"] = kl.mean().item()  # nats per answer
    stats["eos_rate"] = ended.float().mean().item()
    stats["length"] = mask.sum(1).mean().item()
    samples = [{"prompt": row["prompt"], "response": text, "score": None}
               for row, text in zip(rows, texts)]
    for i in range(len(rows) if score is not None else 0):
        samples[i]["score"] = score[i].item()
    return stats, samples


def main(argv=None):
    """Reads flags, loads, trains, prints. Only this needs `cli`: a copied file works without it."""
    from cli import data, flags, models, rewards, runs

    with flags.errors():
        args, config = flags.read("dpo", __doc__, Config, TINY, argv, reward="optional")
        rows, test = data.load(args, ["prompt", "chosen", "rejected"])
        model, tokenizer, config = models.load(args, config, "policy", test)
        rows, test = (data.that_fit(part, tokenizer, ["chosen", "rejected"], config)
                      for part in (rows, test))
        reward = rewards.load(args, model, config.max_length) if args.reward else None
        make_models(model, config)
        before = runs.before(args) or evaluate(model, tokenizer, test, reward, config)
        log, state = runs.start(args, config, model, "policy", before)
        train(model, tokenizer, rows, config, log, state)
        after = evaluate(model, tokenizer, test, reward, config)
        runs.finish(args, config, model, "policy", before, after)
        runs.print_ceiling(test, after[0]["accuracy"])


if __name__ == "__main__":
    main()
