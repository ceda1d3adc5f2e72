"""Supervised fine-tuning: a base model learns to answer, and to stop, from answers people wrote
(the first stage of RLHF; Ouyang et al. 2022, arXiv:2203.02155, section 3.1).

    (SFT.1)  L = -1/|M| sum_{t in M} log pi(y_t | s_t)     M: all answer tokens, EOS included
    (SFT.2)  perplexity = exp(total negative log-likelihood / total tokens),  of held-out answers
    (SFT.3)  ROUGE-L = 2 precision recall / (precision + recall),  both LCS / number of words

s_t is the prompt and the answer before y_t; LCS the longest common subsequence. For each step:
    1. take a batch of demonstrations: prompts and the answers that people wrote
    2. take one step of gradient descent on (SFT.1)
    3. measure the loss of the batch, before the step

The prompt is read but not learned: its labels are -100. EOS is learned: a model that never saw it
in the loss never stops. Labels come from lengths and not from `ids == pad`, because in many models
the padding token is EOS.

Left out on purpose: packing several rows into one sequence, and a loss on the prompt.

    python sft.py --out runs/sft
    python sft.py --model facebook/opt-350m --data databricks/databricks-dolly-15k
"""

import copy
import re
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora


@dataclass(frozen=True)
class Config:
    steps: int = 250  # batches to learn from
    batch_size: int = 32  # demonstrations per step
    micro_batch_size: int | None = None  # of them per forward pass, to save memory; none: all
    lr: float = 2e-4  # peak learning rate (AdamW)
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    seed: int = 0  # of everything random
    lora_rank: int = 16  # r of a new adapter
    lora_alpha: float = 32.0  # alpha of a new adapter
    lora_targets: str = "auto"  # its layers, comma-separated; all-linear; auto: query, value
    max_length: int = 1024  # tokens of prompt and answer; a longer prompt loses its beginning
    max_new_tokens: int = 128  # tokens of an answer that is sampled to look at

    def __post_init__(self):
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt "
                             f"in --max-length {self.max_length}")


TINY = {"lr": 3e-3, "micro_batch_size": 4}

# ------------------------------------------------------------------------------ the mathematics


def sft_loss(logits, labels):
    """Mean negative log-likelihood of the labelled tokens. (SFT.1)

    logits [B, T, V] at every position of the sequence; labels [B, T], the token at each position or
    -100 where it is not to be learnt. The shift by one, position t-1 predicts token t, is made
    here. Returns a scalar, nats per token. Raises ValueError if no token is labelled.
    Source: arXiv:2203.02155, section 3.1."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    if not (labels != -100).any():
        raise ValueError("no token is labelled: every label after the first position is -100")
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def rouge_l(prediction, reference):
    """F1 of the longest common subsequence of words, in [0, 1]. (SFT.3)

    Words are runs of [a-z0-9] in the lower-cased text, as in the rouge-score package.
    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.1."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, reference))
    row = [0] * (len(b) + 1)  # row[j]: the longest common subsequence of a[:i] and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(a), row[-1] / len(b)
    return 2 * precision * recall / (precision + recall)  # (SFT.3)


# ------------------------------------------------------------------------------ the model


def make_models(model, config):
    """Adds the adapter "policy", which SFT trains, to the frozen base, unless it is there."""
    # A new adapter is drawn at random, without touching the random numbers of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if "policy" not in lora.names(model):
            lora.add_adapter(model, "policy", config.lora_rank, config.lora_alpha,
                             targets=config.lora_targets)


def batch_loss(model, b):
    """The loss (SFT.1) of a batch, by the adapter that is active.

    `common.read` gives logits from the last prompt token on, [B, R+1, V]. `sft_loss` shifts by one
    itself, because position t-1 predicts token t. So it gets the tokens at these R + 1 positions as
    labels, the first of which, the end of the prompt, is not to be learnt."""
    logits = common.read(model, b["x"], b["x_mask"], b["y"], b["mask"])
    labels = b["y"].masked_fill(b["mask"] == 0, -100)
    start = torch.full_like(labels[:, :1], -100)
    return sft_loss(logits, torch.cat([start, labels], 1))  # (SFT.1)


# ------------------------------------------------------------------------------ update


def update(model, optimizer, batch, config, policy="policy"):
    """One AdamW step on a batch; returns its loss and the norm of its gradient."""
    total, tokens = 0.0, batch["mask"].sum()
    for _, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        with lora.use_adapter(model, policy):
            # (SFT.1) is a mean over tokens. Weighted by their share of the tokens, micro-batches
            # add up to the mean of the batch, however it is cut.
            loss = batch_loss(model, b) * b["mask"].sum() / tokens
            loss.backward()
        total += loss.item()
    # One step, with a gradient of norm 1 at most.
    parameters = lora.adapter_parameters(model, policy)
    common.add_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return common.add_up(total), norm


# ------------------------------------------------------------------------------ train


def train(model, tokenizer, rows, config=Config(), log=None, state=None):
    """SFT on the adapter "policy" of `model`. Returns a list of dictionaries, one per step.

    rows: dictionaries with "prompt", a string or a list of messages, and "response". Rows whose
    answer does not fit are left out. log(row, samples, state) is called once per step; `state` is
    all that going on needs beside the adapter, and train(state=...) goes on from it. Its tensors
    are those of the run: copy what you keep."""
    make_models(model, config)
    # Prompts and answers as token ids, without the rows whose answer is too long.
    encoded = common.encode(tokenizer, rows, ["response"], config.max_length)
    if not encoded:
        raise ValueError(f"no demonstration fits into --max-length {config.max_length}")
    optimizer = torch.optim.AdamW(lora.adapter_parameters(model, "policy"), weight_decay=0.0)
    history, first = [], state["step"] if state else 0
    # All else that a run needs to go on is in `state`; where it is in the data, the step says.
    if state:
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    bar = tqdm(range(first, config.steps), desc="sft", disable=None)
    for step in bar:
        clock = time.time()

        # 1. A batch of demonstrations.
        index = common.batch_rows(step, len(encoded), config.batch_size, config.seed)
        batch = common.collate([encoded[i] for i in index], model.device)

        # 2. Learn: one step on the gradient of (SFT.1).
        # The rate rises over the first --warmup of the steps, then falls to 0.
        lr = common.learning_rate(step, config.steps, config.lr, config.warmup)
        optimizer.param_groups[0]["lr"] = lr
        loss, norm = update(model, optimizer, batch, config)

        # 3. Measure: `loss` is in nats per token, before the step.
        row = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
        row["seconds"] = time.time() - clock
        history.append(row)
        bar.set_postfix(loss=f"{loss:.3f}")
        if log:
            log(row, [], {"step": step + 1, "optimizer": optimizer.state_dict()})
    return history


# ------------------------------------------------------------------------------ command line


@torch.no_grad()
def evaluate(model, tokenizer, rows, config, policy="policy"):
    """({perplexity, rouge_l, stop_rate}, samples) of held-out demonstrations and greedy answers."""
    encoded = common.encode(tokenizer, rows, ["response"], config.max_length)
    # Perplexity of the answers that people wrote.
    nll = tokens = 0.0
    batch = common.collate(encoded, model.device)
    for _, b in common.share(common.micro_batches(batch, config.micro_batch_size)):
        count = b["mask"].sum().item()
        with lora.use_adapter(model, policy):
            nll += batch_loss(model, b).item() * count
        tokens += count
    mean = torch.tensor(common.add_up(nll) / common.add_up(tokens))  # nats per token
    stats = {"perplexity": mean.exp().item()}  # (SFT.2)

    # Greedy answers, to be compared with them.
    stop = common.stop_ids(model, tokenizer)
    room = config.max_length - config.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, row["prompt"])[-room:] for row, _, _ in encoded]
    x, x_mask = common.pad(prompts, "left", model.device)  # [B, P]
    with lora.use_adapter(model, policy):
        y, mask, _, _ = common.sample(model, x, x_mask, stop, config.max_new_tokens, 0.0)
    samples = []
    for text, (row, _, _) in zip(common.decode(tokenizer, y, mask), encoded):
        number = rouge_l(text, row["response"])  # (SFT.3)
        samples.append({"prompt": row["prompt"], "response": text, "score": number})
    stats["rouge_l"] = sum(sample["score"] for sample in samples) / len(samples)
    # An answer that did not end by itself was cut off at --max-new-tokens.
    stats["stop_rate"] = common.ended(y, mask, stop).float().mean().item()
    return stats, samples


def main(argv=None):
    """Reads flags, loads, trains, prints. Only this needs `cli`: a copied file works without it."""
    from cli import data, flags, models, runs

    with flags.errors():
        args, config = flags.read("sft", __doc__, Config, TINY, argv)
        rows, test = data.load(args, ["prompt", "response"])
        model, tokenizer, config = models.load(args, config, "policy", test)
        rows, test = (data.that_fit(part, tokenizer, ["response"], config) for part in (rows, test))
        make_models(model, config)
        before = runs.before(args) or evaluate(model, tokenizer, test, config)
        write, state = runs.start(args, config, model, "policy", before)
        after = []

        def log(row, samples, state):
            # The first row also holds the model before training, and the last the one after it.
            if row["step"] == 0:
                row.update(before[0])
            if row["step"] == config.steps - 1:
                after[:] = evaluate(model, tokenizer, test, config)
                row.update(after[0])
            write(row, samples, state)

        train(model, tokenizer, rows, config, log, state)
        after = after or evaluate(model, tokenizer, test, config)  # killed after the last step
        runs.finish(args, config, model, "policy", before, after)


if __name__ == "__main__":
    main()
