"""Supervised fine-tuning: a base model learns to answer, and to stop (first stage of RLHF;
Ouyang et al. 2022, arXiv:2203.02155, section 3.1).

    (SFT.1)  L = -1/|M| sum_{t in M} log pi(y_t | x, y_<t)     M: response tokens and their EOS
    (SFT.2)  perplexity = exp(total negative log-likelihood / total tokens), on held-out responses
    (SFT.3)  ROUGE-L = 2 P R / (P + R),  P = LCS / |prediction|,  R = LCS / |reference|

The prompt is read but not learnt: its labels are -100. EOS is learnt: a model that never saw it in
the loss never stops. Labels come from lengths, not from `ids == pad`, because in many models pad is
EOS.

Left out on purpose: packing several rows into one sequence, and a loss on the prompt.

    python sft.py --out runs/sft
    python sft.py --model facebook/opt-350m --data databricks/databricks-dolly-15k
"""

import math
import re
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora

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


# ------------------------------------------------------------------------------ batch


def encode(tokenizer, rows, max_length):
    """[(prompt ids, response ids)] of the rows that fit into max_length, and how many did not."""
    pairs = [common.encode_pair(tokenizer, r["prompt"], r["response"], max_length) for r in rows]
    return [p for p in pairs if p], pairs.count(None)


def collate(pairs, device):
    """ids, attention and labels, all [B, T]; the labels are -100 on the prompt and the padding."""
    ids, attention = common.pad([p + r for p, r in pairs], "right", device)
    labels, _ = common.pad([[-100] * len(p) + r for p, r in pairs], "right", device)
    return ids, attention, labels.masked_fill(attention == 0, -100)


@torch.no_grad()
def evaluate(model, name, tokenizer, rows, pairs, args):
    """Held-out perplexity, ROUGE-L and stop rate of greedy answers; these; the ROUGE-L of each."""
    nll = tokens = 0
    with lora.use_adapter(model, name):
        for i in range(0, len(pairs), args.micro_batch_size):
            ids, attention, labels = collate(pairs[i : i + args.micro_batch_size], model.device)
            count = (labels[:, 1:] != -100).sum().item()
            logits = model(**common.inputs(ids, attention)).logits
            nll, tokens = nll + sft_loss(logits, labels).item() * count, tokens + count
        texts, stopped = common.answer(
            model, tokenizer, [row["prompt"] for row in rows], args.max_new_tokens,
            max_length=args.max_length)
    rouge = [rouge_l(text, row["response"]) for text, row in zip(texts, rows)]
    stats = {"perplexity": math.exp(nll / tokens), "rouge_l": sum(rouge) / len(rouge)}  # (SFT.2)
    return stats | {"stop_rate": sum(stopped) / len(stopped)}, texts, rouge


# ------------------------------------------------------------------------------ flags


def parse_args(argv=None):
    p = common.flags(__doc__, steps=250, batch_size=32, lr=(3e-3, 2e-4))
    p.add_argument("--warmup", type=common.share, default=0.05, help="share of the steps (0.05)")
    p.add_argument("--max-new-tokens", type=common.whole, default=128, help="of an answer (128)")
    args = p.parse_args(argv)
    common.defaults(args, adapter=None, data="demonstrations.jsonl")
    return args


# ------------------------------------------------------------------------------ main loop


def main(argv=None):
    args = parse_args(argv)
    out = common.free_folder(args, "sft")
    common.seed_everything(args.seed)
    train, test = common.load_data(args.data, ["prompt", "response"])
    model, tokenizer = common.load_model(args)
    common.start_adapter(model, "policy", args)
    pairs, dropped = encode(tokenizer, train, args.max_length)
    fits = [r for r in test if encode(tokenizer, [r], args.max_length)[0]]
    test = common.take(fits, args.eval_size)
    test_pairs, _ = encode(tokenizer, test, args.max_length)
    print(f"{len(pairs)} demonstrations ({dropped} dropped: longer than {args.max_length} tokens)")
    if not pairs or not test:
        common.fail(f"no demonstration fits into --max-length {args.max_length}")
    common.check_prompts(tokenizer, test, args.max_length - args.max_new_tokens)
    before, texts_before, rouge = evaluate(model, "policy", tokenizer, test, test_pairs, args)
    out = common.start_run(out, args)

    common.save_samples(out, 0, test, texts_before, rouge)
    parameters = lora.adapter_parameters(model, "policy")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    order = common.batches(len(pairs), args.batch_size, args.seed)
    bar = tqdm(range(args.steps), desc="sft")
    for step in bar:
        clock = time.time()
        # 1. a batch of demonstrations
        batch = [pairs[i] for i in next(order)]
        tokens = sum(len(response) for _, response in batch)
        # 2. the gradient of (SFT.1); micro-batches weigh as many tokens as they hold
        loss = 0.0
        with lora.use_adapter(model, "policy"):
            for _, part in common.by_length(batch, args.micro_batch_size):
                ids, attention, labels = collate(part, model.device)
                logits = model(**common.inputs(ids, attention)).logits
                share = sum(len(response) for _, response in part) / tokens
                part_loss = sft_loss(logits, labels) * share
                part_loss.backward()
                loss += part_loss.item()
        # 3. one AdamW step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": step, "seconds": time.time() - clock, "loss": loss, "grad_norm": norm}
        row["lr"] = lr
        bar.set_postfix(loss=f"{loss:.3f}")
        # 4. measure: the first row holds the model before training, the last row after it
        if step == 0:
            row |= before
        if step == args.steps - 1:
            lora.save_adapter(model, "policy", out)
            after, texts_after, rouge = evaluate(
                model, "policy", tokenizer, test, test_pairs, args)
            row |= after
        common.append(out / "metrics.jsonl", row)
        if args.save_every and (step + 1) % args.save_every == 0:
            lora.save_adapter(model, "policy", out / f"step-{step + 1}")

    common.save_samples(out, args.steps, test, texts_after, rouge)
    common.print_samples(test, texts_before, texts_after)
    common.print_table(f"{len(test)} held-out prompts", before, after)
    common.finish(out, args)


if __name__ == "__main__":
    main()
