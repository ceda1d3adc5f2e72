"""A reward model: learns a score for any answer from pairs of which people preferred one answer
(Bradley and Terry 1952; Stiennon et al. 2020, arXiv:2009.01325, section 3.4).

    (RM.1)  P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))    Bradley-Terry
    (RM.2)  L = -E[ log sigmoid(r_w - r_l - margin) ] + center E[ (r_w + r_l)^2 ]
    (RM.3)  accuracy = P(r_w > r_l),  mean lead = E[r_w - r_l]    of a batch or of held-out pairs

y_w is the answer that won, y_l the one that lost; r_w, r_l are their scores. For each step:
    1. take a batch of pairs: two answers to the same prompt, of which one was preferred
    2. score both answers, and take one step of gradient descent on (RM.2)
    3. measure (RM.3) on the batch; the log calls the mean lead `margin`

(RM.1) does not change if a number that depends on x alone is added to r. The centring term of
(RM.2) chooses this number such that scores stay near 0 (Eisenstein et al. 2023, arXiv:2312.09244,
Eq. 2). The model is the SFT model with a scalar head that reads the state after the last token of
the answer, its EOS. The head starts at random, from N(0, 1/(d+1)), so the first loss can be well
above ln 2: its mean is ln 2 plus about an eighth of the variance that the head gives to r_w - r_l.

People disagree, so even a perfect judge has an accuracy below 1. Where the data say how sure the
labeller was (a column `p_chosen`), this ceiling is printed. So is the calibration: of the pairs
that (RM.1) calls 80 % certain, 80 % should be ranked as labelled.

Left out on purpose: rankings of more than two answers, and a likelihood for ties. `cli.collect`
writes down the ties that it meets, and training leaves them out.

    python reward_model.py --adapter runs/sft --out runs/reward_model
    python -m cli.collect --pairs 50 --out collected.jsonl
    python reward_model.py --data collected.jsonl
"""

import copy
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora


@dataclass(frozen=True)
class Config:
    steps: int = 400  # batches to learn from
    batch_size: int = 32  # pairs per step
    micro_batch_size: int | None = None  # pairs per forward pass, to save memory; none: all
    lr: float = 1e-4  # peak learning rate (AdamW)
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    margin: float = 0.0  # by how much the preferred answer should lead
    center: float = 0.001  # weight of the centring term


TINY = {"lr": 1e-3, "micro_batch_size": 4}

# ------------------------------------------------------------------------------ the mathematics


def bradley_terry_loss(chosen, rejected, margin=0.0, center=0.0):
    """Negative log-likelihood of the preferences, plus the centring term. (RM.2)

    chosen, rejected [B]: scores of the preferred and of the other answer to the same prompt;
    by `margin`, a number or [B], the first should lead; `center` is the centring term's weight.
    Returns a scalar, nats per pair. Raises ValueError if the shapes differ.
    Source: arXiv:2009.01325, section 3.4; margin arXiv:2307.09288, Eq. 2."""
    if chosen.shape != rejected.shape:
        raise ValueError(f"shapes differ: {tuple(chosen.shape)} and {tuple(rejected.shape)}")
    loss = -F.logsigmoid(chosen - rejected - margin).mean()  # (RM.1)
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


# ------------------------------------------------------------------------------ the model


def make_models(model, config):
    """Adds the adapter "reward" with its scalar head to the frozen base, where they are missing."""
    # What is new is drawn at random, without touching the random numbers of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if "reward" not in lora.names(model):
            lora.add_adapter(model, "reward", config.lora_rank, config.lora_alpha,
                             targets=config.lora_targets)
        if not lora.has_head(model, "reward"):
            lora.add_head(model, "reward")


def encode_pairs(tokenizer, rows, max_length):
    """What `common.encode` makes of the pairs that can teach something: both answers fit, and they
    are not the same."""
    encoded = common.encode(tokenizer, rows, ["chosen", "rejected"], max_length)
    return [item for item in encoded if item[2][0] != item[2][1]]


def score_pairs(model, name, b):
    """(chosen [N], rejected [N]): the scores of both answers to each prompt, in one pass.

    The head reads the state at the last real token, the EOS, which has seen the whole answer."""
    scores = common.adapter_scores(model, name, b["x"], b["x_mask"], b["y"], b["mask"])  # [2 N]
    return scores.view(-1, 2).unbind(1)


# ------------------------------------------------------------------------------ update


def update(model, optimizer, batch, config, name="reward"):
    """One AdamW step on a batch of pairs; returns its loss, the norm of its gradient, and the
    differences r_w - r_l [N] before the step."""
    total, parameters = 0.0, lora.adapter_parameters(model, name)
    N = len(batch["x"])
    differences = torch.zeros(N, device=model.device)
    # A pair is a group of two answers, which share one reading of their prompt.
    size = config.micro_batch_size and 2 * config.micro_batch_size
    for answers, b in common.share(common.micro_batches(batch, size)):
        with lora.use_adapter(model, name):
            chosen, rejected = score_pairs(model, name, b)
            loss = bradley_terry_loss(chosen, rejected, config.margin, config.center)  # (RM.2)
            # A mean over pairs: weighted by their share, micro-batches add up to the batch.
            loss = loss * len(chosen) / N
            loss.backward()
        total += loss.item()
        differences[answers[::2] // 2] = (chosen - rejected).detach()  # 2 i, 2 i + 1: pair i
    # One step, with a gradient of norm 1 at most.
    common.add_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return common.add_up(total), norm, common.add_up(differences)


# ------------------------------------------------------------------------------ train


def train(model, tokenizer, rows, config=Config(), log=None, state=None):
    """Trains the adapter "reward" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, "chosen" and "rejected". Pairs
    that do not fit, or whose answers are the same, are left out. log(row, samples, state) is called
    once per step; `state` is all that going on needs beside the adapter, and train(state=...) goes
    on from it. Its tensors are those of the run: copy what you keep."""
    make_models(model, config)
    # Prompts and answers as token ids, without the pairs that teach nothing.
    pairs = encode_pairs(tokenizer, rows, config.max_length)
    if not pairs:
        raise ValueError(f"no pair of different answers fits into --max-length {config.max_length}")
    parameters = lora.adapter_parameters(model, "reward")
    optimizer = torch.optim.AdamW(parameters, eps=1e-5, weight_decay=0.0)
    history, first = [], state["step"] if state else 0
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    bar = tqdm(range(first, config.steps), desc="reward_model", disable=None)
    for step in bar:
        clock = time.time()

        # 1. A batch of pairs.
        index = common.batch_rows(step, len(pairs), config.batch_size, config.seed)
        batch = common.collate([pairs[i] for i in index], model.device)

        # 2. Learn: one step on the gradient of (RM.2).
        # The rate rises over the first --warmup of the steps, then falls to 0.
        lr = common.learning_rate(step, config.steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = lr
        loss, norm, difference = update(model, optimizer, batch, config)

        # 3. Measure (RM.3), on the batch before the step.
        row = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
        row["accuracy"] = (difference > 0).float().mean().item()  # (RM.3)
        row["margin"] = difference.mean().item()
        row["seconds"] = time.time() - clock
        history.append(row)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{row['accuracy']:.2f}")
        if log:
            log(row, [], {"step": step + 1, "optimizer": optimizer.state_dict()})
    return history


# ------------------------------------------------------------------------------ command line


@torch.no_grad()
def evaluate(model, tokenizer, rows, config, name="reward"):
    """Held-out loss, accuracy and margin (RM.3), and samples: the pairs with r_w - r_l as score."""
    pairs = encode_pairs(tokenizer, rows, config.max_length)
    batch = common.collate(pairs, model.device)
    both = torch.zeros(len(pairs), 2)
    # A pair is a group of two answers; the answers 2 i and 2 i + 1 are pair i.
    size = config.micro_batch_size and 2 * config.micro_batch_size
    for answers, b in common.share(common.micro_batches(batch, size)):
        scores = score_pairs(model, name, b)
        both[answers[::2] // 2] = torch.stack(scores, 1).cpu()
    both = common.add_up(both)
    chosen, rejected = both.unbind(1)
    difference = chosen - rejected  # [pairs]
    stats = {
        "loss": bradley_terry_loss(chosen, rejected).item(),  # (RM.2) with margin and center 0
        "accuracy": (difference > 0).float().mean().item(),  # (RM.3)
        "margin": difference.mean().item(),
        "mean score": both.mean().item(),
        "score std": both.std().item(),
    }
    # A pair that is ranked as labelled has a positive score.
    samples = []
    for (row, _, _), number in zip(pairs, difference.tolist()):
        texts = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        samples.append({**texts, "score": number})
    return stats, samples


def main(argv=None):
    """Reads flags, loads, trains, prints. Only this needs `cli`: a copied file works without it."""
    from cli import data, flags, models, runs

    with flags.errors():
        args, config = flags.read("reward_model", __doc__, Config, TINY, argv)
        rows, test = data.load(args, ["prompt", "chosen", "rejected"])
        model, tokenizer, config = models.load(args, config, "reward", test)
        rows, test = (data.that_fit(part, tokenizer, ["chosen", "rejected"], config)
                      for part in (rows, test))
        make_models(model, config)
        before = runs.before(args) or evaluate(model, tokenizer, test, config)
        print(f"loss before training {before[0]['loss']:.3f} (ln 2 = {math.log(2):.3f})")
        log, state = runs.start(args, config, model, "reward", before)
        train(model, tokenizer, rows, config, log, state)
        after = evaluate(model, tokenizer, test, config)
        runs.finish(args, config, model, "reward", before, after)
        runs.print_ceiling(test, after[0]["accuracy"])
        runs.print_calibration(calibration(torch.tensor([s["score"] for s in after[1]])))


if __name__ == "__main__":
    main()
