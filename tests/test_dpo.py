import json
import math
from argparse import Namespace

import pytest
import torch
from byte_tokenizer import BOS, EOS, byte_tokenizer, spell
from conftest import TARGETS, toy
from test_ppo import Letters, noise

import common
import dpo
import lora


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------ token_logps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_are_log_softmax_at_the_temperature(temperature):
    logits, ids = noise(0, 2, 3, 6) * 3, torch.tensor([[0, 5, 2], [3, 3, 1]])
    logp = dpo.token_logps(logits, ids, temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            expected = math.log(weights[ids[b, t]] / sum(weights))
            assert logp[b, t].item() == pytest.approx(expected, abs=1e-5)
    huge = torch.tensor([[[1000.0, 0.0, -1000.0]]]).bfloat16()
    logp = dpo.token_logps(huge, torch.tensor([[2]]))
    assert logp.dtype == torch.float32 and logp.item() == pytest.approx(-2000.0)


# ------------------------------------------------------------------------------ dpo_loss

# h = (1 + 2) - (-3 + 1) = 5 and (-4 + 1) - (-2 + 3) = -4
LOGPS = [torch.tensor(x) for x in ([1.0, -4.0], [-3.0, -2.0], [-2.0, -1.0], [-1.0, -3.0])]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_sigmoid_loss_by_hand(beta):
    expected = (math.log(1 + math.exp(-5 * beta)) + math.log(1 + math.exp(4 * beta))) / 2
    assert dpo.dpo_loss(*LOGPS, beta).item() == pytest.approx(expected, abs=1e-6)


def test_beta_is_a_tenth_unless_told():
    assert dpo.dpo_loss(*LOGPS).item() == dpo.dpo_loss(*LOGPS, 0.1).item()
    assert dpo.dpo_loss(*LOGPS).item() != dpo.dpo_loss(*LOGPS, 0.2).item()


def test_label_smoothing_mixes_in_the_loss_of_the_flipped_label():
    """A fifth of it; both labels by hand."""
    right = [math.log(1 + math.exp(-0.3 * h)) for h in (5, -4)]
    wrong = [math.log(1 + math.exp(0.3 * h)) for h in (5, -4)]
    expected = sum(0.8 * r + 0.2 * w for r, w in zip(right, wrong)) / 2
    found = dpo.dpo_loss(*LOGPS, 0.3, label_smoothing=0.2)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_smoothed_labels_are_best_met_at_their_log_odds():
    """The gradient vanishes at beta h = ln((1 - s) / s), here ln 4."""
    h = torch.tensor([math.log(4) / 0.3], requires_grad=True)
    zero = torch.zeros(1)
    dpo.dpo_loss(h, zero, zero, zero, 0.3, label_smoothing=0.2).backward()
    assert abs(h.grad.item()) < 1e-7
    assert dpo.dpo_loss(h + 1, zero, zero, zero, 0.3, label_smoothing=0.2) > dpo.dpo_loss(
        h, zero, zero, zero, 0.3, label_smoothing=0.2)


def test_ipo_by_hand():
    """beta 0.25 puts the target at 2: squares of 3 and -6."""
    assert dpo.dpo_loss(*LOGPS, 0.25, "ipo").item() == pytest.approx((9 + 36) / 2, abs=1e-5)


def test_a_policy_that_is_its_reference_costs_ln_2():
    """With ipo it costs the square of 1 / (2 beta)."""
    w, l = noise(1, 5) * 9, noise(2, 5) * 9
    for smoothing in (0.0, 0.3):
        found = dpo.dpo_loss(w, l, w, l, 0.4, label_smoothing=smoothing)
        assert found.item() == pytest.approx(math.log(2), abs=1e-6)
    assert dpo.dpo_loss(w, l, w, l, 0.1, "ipo").item() == pytest.approx(25.0, abs=1e-4)


def test_loss_stays_finite_where_the_sigmoid_underflows():
    far, zero = torch.tensor([-2000.0]), torch.zeros(1)
    assert dpo.dpo_loss(far, zero, zero, zero, 0.1).item() == pytest.approx(200.0, abs=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_gradient_by_hand(loss):
    """-beta sigmoid(-beta h) for the chosen answer (ipo: 2 (h - 1 / (2 beta))), its opposite for
    the rejected one, a mean over pairs."""
    beta, (w, l, *refs) = 0.3, LOGPS
    w, l = w.clone().requires_grad_(), l.clone().requires_grad_()
    dpo.dpo_loss(w, l, *refs, beta, loss).backward()
    slope = {"sigmoid": lambda h: -beta * sigmoid(-beta * h), "ipo": lambda h: 2 * (h - 1 / 0.6)}
    expected = [slope[loss](h) / 2 for h in (5, -4)]
    assert w.grad.tolist() == pytest.approx(expected, abs=1e-5)
    assert l.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-5)


@pytest.mark.parametrize("flags", [{"loss": "hinge"}, {"loss": "ipo", "label_smoothing": 0.1}])
def test_an_unknown_loss_and_smoothed_ipo_raise(flags):
    with pytest.raises(ValueError, match=flags["loss"]):
        dpo.dpo_loss(*LOGPS, **flags)


# ------------------------------------------------------------------------------ encode


def row(chosen, rejected, prompt="Why?"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_encode_puts_the_end_of_turn_behind_both_answers():
    rows = [row("Yes.", "No, no."), row("1", "2", "So?")]
    kept = common.encode_preferences(byte_tokenizer(), rows, max_length=60)
    assert all(k[0] is r for k, r in zip(kept, rows))
    assert [k[1:] for k in kept] == [
        ([BOS, *spell(f"User: {r['prompt']}\n\nAssistant: ")], [*spell(r["chosen"]), EOS],
         [*spell(r["rejected"]), EOS]) for r in rows]


def test_encode_drops_and_counts_long_and_identical_pairs(capsys):
    rows = [row("x" * 60, "No."), row("Same.", "Same."), row("Yes.", "No."), row("No.", "x" * 60),
            row("x" * 60, "x" * 60)]
    kept = common.encode_preferences(byte_tokenizer(), rows, 60, "held-out")
    assert [k[0] for k in kept] == [rows[2]]
    assert capsys.readouterr().out.strip() == (
        "1 held-out pairs (dropped: 3 longer than 60 tokens, 1 identical)")


@pytest.mark.parametrize("chosen, rejected", [("x" * 30, "No."), ("No.", "x" * 30)])
def test_both_answers_follow_the_same_piece_of_a_cut_prompt(chosen, rejected):
    """What fits beside the longer one: the end of the prompt."""
    prompt = "Why? " * 20
    kept = common.encode_preferences(byte_tokenizer(), [row(chosen, rejected, prompt)], 60)
    assert kept[0][1] == spell(f"User: {prompt}\n\nAssistant: ")[-(60 - 31):]


# ------------------------------------------------------------------------------ pairs and models


ARGS = Namespace(temperature=0.7, beta=0.3, loss="sigmoid", label_smoothing=0.0,
                 micro_batch_size=2, max_length=64, max_new_tokens=3, adapter="sft", seed=3,
                 missing_eos_score=-3.0)
PAIRS = [
    ({}, [1, 9, 8], [7, 0, 2], [6, 5, 4, 3, 50, 2]),
    ({}, [1, 30, 31, 32, 33, 34, 35, 36], [37, 38, 39, 40, 41, 42, 43, 2], [2]),
    ({}, [1], [50, 0], [51, 0, 0, 0]),
]


def with_adapters(kind):
    """A toy with policy and reference, neither of them zero; a token in four ends an answer."""
    model = toy(kind)
    model.generation_config.eos_token_id = list(range(2, 18))
    for name in ("policy", "reference"):
        lora.add_adapter(model, name, 4, targets=TARGETS[kind], trainable=name == "policy")
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.2)
    return model


@pytest.fixture
def actor(kind):
    return with_adapters(kind)


def logp_alone(model, name, prompt, answer, temperature=0.7):
    """One token after the other, each from a pass over what stands before it and nothing else."""
    total, ids = 0.0, list(prompt)
    with lora.use_adapter(model, name):
        for token in answer:
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
            total = total + logits[token] - logits.exp().sum().log()
            ids.append(token)
    return total


@pytest.mark.parametrize("name", ["policy", "reference", None])
@torch.no_grad()
def test_pair_logps_are_those_of_each_answer_alone(actor, name):
    """Whatever the batch mates, their padding and the order; the id 0 is a token like any."""
    long = ({}, list(range(1, 50)), [5, 2], list(range(3, 40)))
    alone = [[logp_alone(actor, name, p, y).item() for y in (w, l)] for _, p, w, l in PAIRS]
    for batch in (PAIRS[:1], PAIRS[::-1], [long, *PAIRS]):
        found = torch.stack(dpo.pair_logps(actor, name, batch, ARGS), 1).tolist()
        for pair, logps in zip(batch, found):
            if pair is not long:
                assert logps == pytest.approx(alone[PAIRS.index(pair)], abs=1e-4)


@torch.no_grad()
def test_the_end_of_an_answer_is_counted(actor):
    """An answer and the same without its EOS differ by log pi(EOS)."""
    prompt, answer = [1, 9, 8], [7, 6, 5, 2]
    w, l = dpo.pair_logps(actor, "policy", [({}, prompt, answer, answer[:-1])], ARGS)
    expected = logp_alone(actor, "policy", prompt + answer[:-1], [2]).item()
    assert (w - l).item() == pytest.approx(expected, abs=1e-4) and expected < -1


def policy_gradient(model, pairs, refs, beta):
    """-beta sigmoid(-beta h) (grad log pi(w) - grad log pi(l)), a mean over pairs taken one by one
    (arXiv:2305.18290, section 4)."""
    total, parameters = 0.0, lora.adapter_parameters(model, "policy")
    for (_, p, w, l), (ref_w, ref_l) in zip(pairs, refs):
        logp_w, logp_l = (logp_alone(model, "policy", p, y) for y in (w, l))
        h = (logp_w - ref_w) - (logp_l - ref_l)
        weight = -beta * sigmoid(-beta * h.item()) / len(pairs)
        grads = torch.autograd.grad(weight * (logp_w - logp_l), parameters)
        total = total + torch.cat([g.flatten() for g in grads])
    return total


def test_the_gradient_weighs_a_pair_by_how_wrong_the_policy_is(actor):
    """And reaches the policy only."""
    refs = dpo.reference_logps(actor, "reference", PAIRS, ARGS)
    expected = policy_gradient(actor, PAIRS, refs.tolist(), 0.3)
    dpo.dpo_loss(*dpo.pair_logps(actor, "policy", PAIRS, ARGS), *refs.T, 0.3).backward()
    parameters = lora.adapter_parameters(actor, "policy")
    found = torch.cat([p.grad.flatten() for p in parameters])
    assert torch.allclose(found, expected, atol=1e-5) and expected.norm() > 0.1
    own = {id(p) for p in parameters}
    assert all(p.grad is None for p in actor.parameters() if id(p) not in own)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_reference_logps_keep_the_order_whatever_the_micro_batch(actor, micro):
    args = Namespace(**{**vars(ARGS), "micro_batch_size": micro})
    refs = dpo.reference_logps(actor, "policy", PAIRS, args)
    assert not refs.requires_grad
    for (_, p, w, l), found in zip(PAIRS, refs.tolist()):
        alone = [logp_alone(actor, "policy", p, y).item() for y in (w, l)]
        assert found == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("loss, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_measure_by_hand(loss, smoothing):
    """h = 5, -4 and a tie, which is not right: accuracy 1/3, margin beta / 3."""
    args = Namespace(beta=0.3, loss=loss, label_smoothing=smoothing)
    logps = torch.tensor([[1.0, -3.0], [-4.0, -2.0], [-6.0, -6.0]])
    refs = torch.tensor([[-2.0, -1.0], [-1.0, -3.0], [-7.0, -7.0]])

    def cost(h):
        if loss == "ipo":
            return (h - 1 / 0.6) ** 2
        return -(1 - smoothing) * math.log(sigmoid(0.3 * h)) - smoothing * math.log(
            sigmoid(-0.3 * h))

    assert dpo.measure(logps, refs, args) == pytest.approx({
        "loss": (cost(5) + cost(-4) + cost(0)) / 3, "accuracy": 1 / 3, "margin": 0.1,
        "logp_chosen": -3.0, "logp_rejected": -11 / 3,
    }, abs=1e-5)


# ------------------------------------------------------------------------------ samples


ROWS = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "cd" * i, "p_chosen": 0.5 + n / 100}
        for i, n in enumerate((1, 30, 4, 17, 9, 2), 1)]


@pytest.mark.parametrize("adapter, reference, micro", [("sft", "reference", 6), (None, None, 4)])
@torch.no_grad()
def test_a_sample_is_measured_by_what_is_known_of_each_answer(
        actor, adapter, reference, micro, monkeypatch):
    """KL in nats an answer, to the base without --adapter; -3 for an answer that did not end."""
    seen, original = [], common.sample
    monkeypatch.setattr(common, "sample", lambda *a: seen.append(original(*a)) or seen[0])
    args = Namespace(**{**vars(ARGS), "adapter": adapter, "micro_batch_size": micro})
    stats, texts, scores = dpo.sample(
        actor, Letters(), ROWS, lambda *a: torch.tensor([10.0 + len(t) for t in a[3]]), args)
    [(ids, attention, mask)], kl, ended = seen, [], []
    for b, r in enumerate(ROWS):
        n = int(mask[b].sum())
        whole = ids[b][attention[b] == 1].tolist()
        prompt, answer = whole[:-n], whole[-n:]
        assert prompt == Letters()(f"User: {r['prompt']}\n\nAssistant: ").input_ids
        policy, other = (logp_alone(actor, x, prompt, answer).item() for x in ("policy", reference))
        kl.append(policy - other)
        ended.append(2 <= answer[-1] < 18)
        assert texts[b] == Letters().batch_decode([answer], True)[0]
        assert scores[b] == (10.0 + len(texts[b]) if ended[b] else -3.0)
    mean = sum(scores) / 6
    assert 0 < sum(ended) < 6 and stats == pytest.approx({
        "score": mean, "score_std": math.sqrt(sum((s - mean) ** 2 for s in scores) / 6),
        "kl": sum(kl) / 6, "eos_rate": sum(ended) / 6, "length": mask.sum().item() / 6,
    }, abs=1e-4)
    again = dpo.sample(actor, Letters(), ROWS, None, args)
    assert again == ({k: v for k, v in stats.items() if "score" not in k}, texts, [None] * 6)


def test_the_best_judge_agrees_as_often_as_the_probabilities_of_the_labels_say(capsys):
    """0.9 and 1 - 0.3 make a ceiling of 0.8, of which 0.6 is 75%; silent where a row has none."""
    rows = [{"p_chosen": 0.9}, {"p_chosen": 0.3}]
    common.print_ceiling(rows, 0.6)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last.split() == ["the", "best", "possible", "judge", "0.800", "reached:", "75.0%"]
    common.print_ceiling([*rows, {"p_chosen": None}], 0.6)
    assert "judge" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ the loop


class Recorder:
    """An optimizer that keeps the gradients and moves the adapter by hand."""

    def __init__(self, parameters, **_):
        self.parameters, self.steps, self.param_groups = parameters, [], [{}]
        Recorder.last = self

    def step(self):
        self.steps.append(torch.cat([p.grad.flatten() for p in self.parameters]).clone())
        for p in self.parameters:
            p.data += 0.05

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


@pytest.mark.parametrize("micro", [1, 3])
def test_each_step_has_the_gradient_of_its_whole_batch_against_the_first_policy(
        kind, micro, monkeypatch, tmp_path, capsys):
    """At step 0, and at step 1, when the policy has moved away from what it is measured against."""
    model, out, flags = with_adapters(kind), tmp_path / "run", (
        "--adapter none --steps 2 --batch-size 3 --beta 0.3 --max-length 120 --max-new-tokens 2 "
        "--temperature 0.7 "
        f"--seed 5 --device cpu --micro-batch-size {micro} --reward")
    monkeypatch.setattr(common, "load_data", lambda *_: (ROWS, ROWS[:2]))
    monkeypatch.setattr(common, "load_model", lambda args: (model, Letters()))
    monkeypatch.setattr(common, "start_adapter", lambda *_: None)
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    parameters = lora.adapter_parameters(model, "policy")
    first = [p.detach().clone() for p in parameters]
    dpo.main([*flags.split(), "", "--out", str(out)])
    assert "before any update: loss 0.6931 " in capsys.readouterr().out
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    pairs, order = common.encode_preferences(Letters(), ROWS, 120), common.batches(len(ROWS), 3, 5)
    for step in (0, 1):
        batch, refs = [pairs[i] for i in next(order)], []
        for moved in (0.0, 0.05 * step):
            for p, start in zip(parameters, first):
                p.data = start + moved
            with torch.no_grad():
                refs = refs or [[logp_alone(model, "policy", p, y).item() for y in (w, l)]
                                for _, p, w, l in batch]
        expected = policy_gradient(model, batch, refs, 0.3)
        norm = expected.norm().item()
        assert metrics[step]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert torch.allclose(Recorder.last.steps[step], expected / max(1.0, norm), atol=1e-5)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(metrics[1]["loss"] - math.log(2)) > 1e-3
