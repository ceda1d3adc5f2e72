"""DPO: preferences without a reward model and without sampling; the policy is its own reward model
(Rafailov et al. 2023, arXiv:2305.18290), and its one-line relatives.

The best policy at E[r(x, y)] - beta KL(pi || pi_ref) is pi*(y) = pi_ref(y) exp(r(x, y) / beta) / Z.
Solved for r: the reward under which pi is best is beta log(pi / pi_ref) + beta log Z. Put into the
Bradley-Terry model of a preference of w over l, Z cancels:

    (DPO.1)  h = (log pi - log pi_ref)(w) - (log pi - log pi_ref)(l),   P(w > l) = sigmoid(beta h)
    (DPO.2)  L = -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)  s: labels believed flipped
    (DPO.3)  L = (h - 1 / (2 beta))^2                                   "ipo"
    (DPO.4)  accuracy = P(h > 0),  margin = E[beta h]

Log-probabilities are sums over the tokens of an answer, its EOS included. Those of the reference
never change: they are computed once, before training, when the policy still is the reference. So
the first loss is ln 2 (sigmoid) and the first margin 0.

Often both log-probabilities fall while the margin grows, the chosen one's too. (DPO.2) sees only
the difference: pushing the rejected answer down further serves it as well as lifting the chosen
one, and what they share goes down with both. The probability goes to answers in neither column;
`kl` and the samples show where. A higher --beta or a lower --lr holds it back.

Left out on purpose: length normalisation, and a loss on the chosen answers beside the margin.

    python dpo.py --steps 200
    python dpo.py --loss ipo --beta 0.2
"""

import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import lora

# ------------------------------------------------------------------------------ the mathematics


def token_logps(logits, ids, temperature=1.0):
    """log pi(y_t) of each token of an answer under softmax(logits / temperature), in fp32.

    logits [B, R, V] that predict ids [B, R]. Returns [B, R], nats; enters (DPO.1)."""
    logits = logits.float() / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta=0.1, loss="sigmoid", label_smoothing=0.0):
    """Negative log-likelihood of the preferences under the policy's own reward. (DPO.1) to (DPO.3)

    logp_w, logp_l [B]: log-probability of the chosen and of the rejected answer, summed over its
    tokens, with gradient; ref_w, ref_l [B]: the reference's. beta: units of reward per nat.
    label_smoothing s: the share of labels believed to be flipped (cDPO). Returns a scalar, the mean
    over pairs. Raises ValueError for another loss, for label smoothing with ipo, and for shapes
    that differ.
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


# ------------------------------------------------------------------------------ batch


def pair_logps(model, name, pairs, args):
    """Summed log-probabilities (chosen [B], rejected [B]) in one forward pass over both."""
    prompts, left = common.pad([p for _, p, _, _ in pairs] * 2, "left", model.device)
    answers = [w for _, _, w, _ in pairs] + [l for _, _, _, l in pairs]
    y, mask = common.pad(answers, "right", model.device)
    ids, attention = torch.cat([prompts, y], 1), torch.cat([left, mask], 1)
    with lora.use_adapter(model, name):
        states = common.response_states(model, ids, attention, y.shape[1])
    logp = common.per_token(model, states, partial(token_logps, temperature=args.temperature), y)
    return (logp * mask).sum(1).chunk(2)


@torch.no_grad()
def reference_logps(model, name, pairs, args):
    """pair_logps of all pairs as a tensor [pairs, 2]."""
    logps = torch.empty(len(pairs), 2, device=model.device)
    for where, part in common.by_length(pairs, args.micro_batch_size):
        logps[where] = torch.stack(pair_logps(model, name, part, args), 1)
    return logps


def measure(logps, refs, args):
    """Loss, accuracy and margin (DPO.4), and both log-probabilities, of tensors [pairs, 2]."""
    h = (logps - refs) @ logps.new_tensor([1.0, -1.0])
    loss = dpo_loss(*logps.T, *refs.T, args.beta, args.loss, args.label_smoothing)
    return {
        "loss": loss.item(), "accuracy": (h > 0).float().mean().item(),
        "margin": (args.beta * h).mean().item(),
        "logp_chosen": logps[:, 0].mean().item(), "logp_rejected": logps[:, 1].mean().item(),
    }


@torch.no_grad()
def sample(model, tokenizer, rows, reward, args):
    """One answer of the policy to each row's prompt: (statistics, texts, scores or Nones)."""
    stop, room = common.stop_ids(model, tokenizer), args.max_length - args.max_new_tokens
    prompts = [common.encode_prompt(tokenizer, r["prompt"])[-room:] for r in rows]
    generator = torch.Generator(model.device).manual_seed(args.seed)
    with lora.use_adapter(model, "policy"):
        ids, attention, mask = common.sample(
            model, prompts, stop, args.max_new_tokens, args.temperature, generator)
    batch, sums = dict(ids=ids, attention=attention, mask=mask), []
    y, logps = ids[:, -mask.shape[1] :], partial(token_logps, temperature=args.temperature)
    for name in ("policy", "reference" if args.adapter else None):
        logp = torch.zeros_like(mask)
        for part, b in common.micro_batches(batch, torch.arange(len(ids)), args.micro_batch_size):
            R = b["mask"].shape[1]
            logp[part, :R], _ = common.response_logps(model, name, b, logps)
        sums.append((logp * mask).sum(1))
    policy, reference = sums
    responses, ended = common.decode(tokenizer, y, mask), common.ended(y, mask, stop)
    stats = {"kl": (policy - reference).mean().item(),
             "eos_rate": ended.float().mean().item(), "length": mask.sum(1).mean().item()}
    if reward is None:
        return stats, responses, [None] * len(rows)
    score = reward(ids, attention, [r["prompt"] for r in rows], responses, rows)
    score = torch.where(ended, score, torch.full_like(score, args.missing_eos_score))
    score_std = score.std(unbiased=False).item()
    return {"score": score.mean().item(), "score_std": score_std} | stats, responses, score.tolist()


# ------------------------------------------------------------------------------ flags


def parse_args(argv=None):
    p = common.flags(__doc__, steps=200, batch_size=16, lr=(1.5e-3, 3e-5))
    add, amount = p.add_argument, common.amount
    common.sampling_flags(p)  # of answers to look at; but the loss has the temperature too
    add("--beta", type=amount, default=0.4, help="KL weight, units of reward per nat (0.4)")
    add("--loss", default="sigmoid", choices=["sigmoid", "ipo"], help="(sigmoid)")
    add("--label-smoothing", type=amount, default=0.0, help="share of flipped labels (0)")
    add("--warmup", type=common.share, default=0.05, help="share of the steps (0.05)")
    args = p.parse_args(argv)
    common.defaults(args, adapter="sft", data="preferences.jsonl")
    if args.beta == 0:
        common.fail("--beta must be above 0: it divides the reward")
    if args.label_smoothing >= 0.5 or (args.label_smoothing and args.loss == "ipo"):
        common.fail("--label-smoothing must be below 0.5, and goes with --loss sigmoid only")
    return args


# ------------------------------------------------------------------------------ main loop


def main(argv=None):
    args = parse_args(argv)
    out = common.free_folder(args, "dpo")
    common.seed_everything(args.seed)
    train, test = common.load_data(args.data, ["prompt", "chosen", "rejected"])
    model, tokenizer = common.load_model(args)
    common.start_adapter(model, "policy", args)
    if args.adapter:
        lora.copy_adapter(model, "policy", "reference")
    reward = common.load_reward(args.reward, model, tokenizer, args) if args.reward else None
    test, room = common.take(test, args.eval_size), args.max_length
    pairs = common.encode_preferences(tokenizer, train, room)
    test_pairs = common.encode_preferences(tokenizer, test, room, "held-out")
    if not pairs or not test_pairs:
        common.fail(f"no pair of different answers fits into --max-length {args.max_length}")
    test = [row for row, _, _, _ in test_pairs]
    common.check_prompts(tokenizer, test, room - args.max_new_tokens)
    order = common.batches(len(pairs), args.batch_size, args.seed)
    schedule = [next(order) for _ in range(args.steps)]
    used = sorted({i for batch in schedule for i in batch})
    refs = dict(zip(used, reference_logps(model, "policy", [pairs[i] for i in used], args)))
    test_refs = reference_logps(model, "policy", test_pairs, args)
    samples, texts_before, scores = sample(model, tokenizer, test, reward, args)
    before = measure(test_refs, test_refs, args) | samples
    out = common.start_run(out, args)

    common.save_samples(out, 0, test, texts_before, scores)
    parameters = lora.adapter_parameters(model, "policy")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, eps=1e-5, weight_decay=0.0)
    bar = tqdm(range(args.steps), desc="dpo")
    for step in bar:
        clock = time.time()
        # 1. a batch of pairs, and what the reference makes of them
        batch = [pairs[i] for i in schedule[step]]
        ref = torch.stack([refs[i] for i in schedule[step]])
        # 2. the gradient of (DPO.2) or (DPO.3), micro-batch by micro-batch
        logps = torch.empty_like(ref)
        for where, part in common.by_length(batch, args.micro_batch_size):
            logp = pair_logps(model, "policy", part, args)
            loss = dpo_loss(*logp, *ref[where].T, args.beta, args.loss, args.label_smoothing)
            (loss * len(part) / len(batch)).backward()
            logps[where] = torch.stack(logp, 1).detach()
        # 3. one AdamW step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        # 4. measure (DPO.4), on the batch before the step
        row = {"step": step, "seconds": time.time() - clock, "grad_norm": norm, "lr": lr}
        row |= measure(logps, ref, args)
        common.append(out / "metrics.jsonl", row)
        if step == 0:
            tqdm.write(f"step 0, before any update: loss {row['loss']:.4f} "
                       f"(sigmoid: ln 2 = {math.log(2):.4f})")
        bar.set_postfix({k: f"{row[k]:.2f}" for k in ("loss", "accuracy", "margin", "logp_chosen")})
        if args.save_every and (step + 1) % args.save_every == 0:
            lora.save_adapter(model, "policy", out / f"step-{step + 1}")

    lora.save_adapter(model, "policy", out)
    samples, texts_after, scores = sample(model, tokenizer, test, reward, args)
    common.save_samples(out, args.steps, test, texts_after, scores)
    after = measure(reference_logps(model, "policy", test_pairs, args), test_refs, args) | samples
    common.print_samples(test, texts_before, texts_after)
    common.print_table(f"{len(test)} held-out pairs", before, after)
    common.print_ceiling(test, after["accuracy"])
    common.finish(out, args)


if __name__ == "__main__":
    main()
