import copy
import math
import signal

import pytest
import torch
from byte_tokenizer import BOS, EOS, byte_tokenizer, spell
from conftest import TARGETS, toy
from test_grpo import Letters, equal, fill, in_a_thread, noise, values_of, without_seconds

import common
import dpo
import lora
from cli import data, runs


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


def test_shapes_that_would_broadcast_raise():
    """As sums [N] against log-probabilities of tokens [N, 1] would."""
    with pytest.raises(ValueError, match="differ in shape"):
        dpo.dpo_loss(*LOGPS[:3], LOGPS[3].unsqueeze(1))


@pytest.mark.parametrize("fields, flag", [
    ({"temperature": 0.0}, "--temperature"), ({"beta": 0.0}, "--beta"),
    ({"max_new_tokens": 64, "max_length": 64}, "--max-new-tokens"),
    ({"label_smoothing": 0.5}, "--label-smoothing"),
    ({"label_smoothing": 0.1, "loss": "ipo"}, "--label-smoothing"),
])
def test_a_config_that_cannot_work_raises_and_names_the_flag(fields, flag):
    with pytest.raises(ValueError, match=flag):
        dpo.Config(**fields)


# ------------------------------------------------------------------------------ encode


def row(chosen, rejected, prompt="Why?"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_encode_puts_the_end_of_turn_behind_both_answers():
    """Without a chat template the answer begins with the space that the prompt does not end in."""
    rows = [row("Yes.", "No, no."), row("1", "2", "So?")]
    kept = dpo.encode_pairs(byte_tokenizer(), rows, max_length=60)
    assert all(k[0] is r for k, r in zip(kept, rows))
    assert [k[1:] for k in kept] == [
        ([BOS, *spell(f"User: {r['prompt']}\n\nAssistant:")],
         [[*spell(" " + r["chosen"]), EOS], [*spell(" " + r["rejected"]), EOS]]) for r in rows]


def test_long_and_identical_pairs_are_dropped_and_the_command_line_counts_them(capsys):
    """By `train` in silence, by the command line with a count."""
    rows = [row("x" * 60, "No."), row("Same.", "Same."), row("Yes.", "No."), row("No.", "x" * 60),
            row("x" * 60, "x" * 60)]
    kept = dpo.encode_pairs(byte_tokenizer(), rows, 60)
    assert [k[0] for k in kept] == [rows[2]] and capsys.readouterr().out == ""
    config = dpo.Config(max_length=60, max_new_tokens=9)
    assert data.that_fit(rows, byte_tokenizer(), ["chosen", "rejected"], config) == [rows[2]]
    assert capsys.readouterr().out.strip() == (
        "1 rows (dropped: 3 longer than 60 tokens, 1 of two equal answers)")


@pytest.mark.parametrize("chosen, rejected", [("x" * 30, "No."), ("No.", "x" * 30)])
def test_both_answers_follow_the_same_piece_of_a_cut_prompt(chosen, rejected):
    """What fits beside the longer one: the end of the prompt."""
    prompt = "Why? " * 20
    kept = dpo.encode_pairs(byte_tokenizer(), [row(chosen, rejected, prompt)], 60)
    assert kept[0][1] == spell(f"User: {prompt}\n\nAssistant:")[-(60 - 32):]


# ------------------------------------------------------------------------------ pairs and models


CONFIG = dict(temperature=0.7, beta=0.3, batch_size=3, max_length=120, max_new_tokens=3, seed=3,
              lora_rank=4)
PAIRS = [
    ({}, [1, 9, 8], [[7, 0, 2], [6, 5, 4, 3, 50, 2]]),
    ({}, [1, 30, 31, 32, 33, 34, 35, 36], [[37, 38, 39, 40, 41, 42, 43, 2], [2]]),
    ({}, [1], [[50, 0], [51, 0, 0, 0]]),
]


def config_of(**fields):
    return dpo.Config(**{**CONFIG, **fields})


def with_adapters(kind, *names):
    """A toy with policy and reference, neither of them zero; a token in four ends an answer."""
    model = toy(kind)
    model.generation_config.eos_token_id = list(range(2, 18))
    for name in names or ("policy", "reference"):
        lora.add_adapter(model, name, 4, targets=TARGETS[kind], trainable=name == "policy")
        fill(model, name)
    return model


@pytest.fixture
def actor(kind):
    return with_adapters(kind)


def logps_alone(model, name, prompt, answer, temperature=0.7):
    """One token after the other, each from a pass over what stands before it and nothing else."""
    found, ids = [], list(prompt)
    with lora.use_adapter(model, name):
        for token in answer:
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
            found.append(logits[token] - logits.logsumexp(0))
            ids.append(token)
    return torch.stack(found)


def logp_alone(model, name, prompt, answer, temperature=0.7):
    return logps_alone(model, name, prompt, answer, temperature).sum()


@torch.no_grad()
def both_alone(model, name, pairs):
    """[pairs, 2], of each answer alone."""
    return torch.stack([torch.stack([logp_alone(model, name, x, y) for y in ys])
                        for _, x, ys in pairs])


def pair_logps(model, name, pairs, config=None):
    with lora.use_adapter(model, name):
        return dpo.pair_logps(model, common.collate(pairs, "cpu"), config or config_of())


@pytest.mark.parametrize("name", ["policy", "reference", None])
@torch.no_grad()
def test_pair_logps_are_those_of_each_answer_alone(actor, name):
    """To 1e-5, whatever the batch mates, their padding and the order; the id 0 is a token like
    any. Both answers to a prompt share one reading of it."""
    long = ({}, list(range(1, 50)), [[5, 2], list(range(3, 40))])
    alone = both_alone(actor, name, PAIRS)
    for order in ([0], [2, 1, 0], [None, 0, 1, 2]):
        found = pair_logps(actor, name, [long if i is None else PAIRS[i] for i in order])
        for i, logps in zip(order, found.tolist()):
            if i is not None:
                assert logps == pytest.approx(alone[i].tolist(), abs=1e-5)


def test_the_prompt_of_a_pair_is_read_once(actor):
    read = []
    actor.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    pair_logps(actor, "policy", PAIRS)
    assert read == [(3, 8), (6, 8)]


@torch.no_grad()
def test_the_end_of_an_answer_is_counted(actor):
    """An answer and the same without its EOS differ by log pi(EOS)."""
    prompt, answer = [1, 9, 8], [7, 6, 5, 2]
    [[w, l]] = pair_logps(actor, "policy", [({}, prompt, [answer, answer[:-1]])]).tolist()
    expected = logp_alone(actor, "policy", prompt + answer[:-1], [2]).item()
    assert w - l == pytest.approx(expected, abs=1e-5) and expected < -1


@torch.no_grad()
def test_log_probabilities_are_at_the_temperature(actor):
    for temperature in (0.5, 1.0):
        found = pair_logps(actor, "policy", PAIRS[:1], config_of(temperature=temperature))
        _, x, (w, _) = PAIRS[0]
        alone = logp_alone(actor, "policy", x, w, temperature).item()
        assert found[0, 0].item() == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_length_normalised_they_are_means_over_the_tokens_of_each_answer(actor):
    config = config_of(length_normalised=True)
    found = pair_logps(actor, "policy", PAIRS, config)
    alone = [[logps_alone(actor, "policy", x, y).mean().item() for y in ys] for _, x, ys in PAIRS]
    assert found.tolist() == [pytest.approx(pair, abs=1e-5) for pair in alone]
    assert torch.allclose(dpo.all_logps(actor, "policy", PAIRS, config), found, atol=1e-5)


def test_length_normalised_by_hand(monkeypatch):
    """Where all 64 tokens are equally likely, an answer of n tokens has -n ln 64, and -ln 64."""
    monkeypatch.setattr(common, "read", lambda model, x, x_mask, y, mask: torch.zeros(
        len(y), y.shape[1] + 1, 64))
    batch = common.collate(PAIRS, "cpu")
    for normalised, lengths in ((False, [[3, 6], [8, 1], [2, 4]]), (True, [[1, 1]] * 3)):
        found = dpo.pair_logps(None, batch, config_of(length_normalised=normalised))
        assert found.tolist() == [
            pytest.approx([-n * math.log(64) for n in pair], rel=1e-5) for pair in lengths]


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_the_logps_of_all_pairs_keep_their_order_whatever_the_micro_batch(actor, micro):
    found = dpo.all_logps(actor, "policy", PAIRS, config_of(micro_batch_size=micro))
    assert not found.requires_grad
    alone = both_alone(actor, "policy", PAIRS)
    assert found.flatten().tolist() == pytest.approx(alone.flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize("loss, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_measure_by_hand(loss, smoothing):
    """h = 5, -4 and a tie, which is not right: accuracy 1/3, margin beta / 3."""
    config = config_of(loss=loss, label_smoothing=smoothing)
    logps = torch.tensor([[1.0, -3.0], [-4.0, -2.0], [-6.0, -6.0]])
    refs = torch.tensor([[-2.0, -1.0], [-1.0, -3.0], [-7.0, -7.0]])

    def cost(h):
        if loss == "ipo":
            return (h - 1 / 0.6) ** 2
        return -(1 - smoothing) * math.log(sigmoid(0.3 * h)) - smoothing * math.log(
            sigmoid(-0.3 * h))

    assert dpo.measure(logps, refs, config) == pytest.approx({
        "loss": (cost(5) + cost(-4) + cost(0)) / 3, "accuracy": 1 / 3, "margin": 0.1,
        "logp_chosen": -3.0, "logp_rejected": -11 / 3,
    }, abs=1e-5)


# ------------------------------------------------------------------------------ update


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


def policy_gradient(model, pairs, refs, beta):
    """-beta sigmoid(-beta h) (grad log pi(w) - grad log pi(l)), a mean over pairs taken one by one
    (arXiv:2305.18290, section 4)."""
    total, parameters = 0.0, lora.adapter_parameters(model, "policy")
    for (_, x, (w, l)), (ref_w, ref_l) in zip(pairs, refs):
        logp_w, logp_l = (logp_alone(model, "policy", x, y) for y in (w, l))
        h = (logp_w - ref_w) - (logp_l - ref_l)
        weight = -beta * sigmoid(-beta * h.item()) / len(pairs)
        grads = torch.autograd.grad(weight * (logp_w - logp_l), parameters)
        total = total + torch.cat([g.flatten() for g in grads])
    return total


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_the_gradient_weighs_a_pair_by_how_wrong_the_policy_is(actor, micro):
    """To 1e-5 of its norm, whatever the micro-batch, in the order of the batch; and it reaches the
    policy only."""
    config = config_of(micro_batch_size=micro)
    refs, parameters = both_alone(actor, "reference", PAIRS), lora.adapter_parameters(
        actor, "policy")
    expected = policy_gradient(actor, PAIRS, refs.tolist(), 0.3)
    alone = both_alone(actor, "policy", PAIRS)
    batch = common.collate(PAIRS, "cpu")
    batch["ref"] = refs.flatten()
    recorder = Recorder(parameters)
    logps, norm = dpo.update(actor, recorder, batch, config)
    assert logps.flatten().tolist() == pytest.approx(alone.flatten().tolist(), abs=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-5) and norm > 0.1
    expected = expected / max(1.0, norm)  # as it is clipped
    assert (recorder.steps[0] - expected).norm() < 1e-5 * expected.norm()
    own = {id(p) for p in parameters}
    assert all(p.grad is None for p in actor.parameters() if id(p) not in own)


@pytest.mark.parametrize("micro", [1, 2, None])
@pytest.mark.parametrize("fields", [
    {"length_normalised": True}, {"sft_weight": 0.7},
    {"length_normalised": True, "sft_weight": 2.0}, {"loss": "ipo", "sft_weight": 0.7},
    {"loss": "ipo", "length_normalised": True},
])
def test_update_descends_the_loss_per_token_and_that_of_sft(actor, fields, micro):
    """Pair by pair from tokens that were read alone: what length_normalised divides, what
    sft_weight adds. Micro-batches add up to the whole."""
    config, parameters = config_of(micro_batch_size=micro, **fields), lora.adapter_parameters(
        actor, "policy")
    total, refs, shown = 0.0, [], []
    for _, x, ys in PAIRS:
        logps = [logps_alone(actor, "policy", x, y) for y in ys]
        with torch.no_grad():
            ref = [logps_alone(actor, "reference", x, y) for y in ys]
        if config.length_normalised:
            w, l, ref_w, ref_l = (v.mean() for v in (*logps, *ref))
        else:
            w, l, ref_w, ref_l = (v.sum() for v in (*logps, *ref))
        h = w - ref_w - l + ref_l
        loss = (h - 1 / 0.6) ** 2 if config.loss == "ipo" else (1 + (-0.3 * h).exp()).log()
        total = total + (loss - config.sft_weight * logps[0].mean()) / len(PAIRS)
        refs += [ref_w, ref_l]
        shown += [w.item(), l.item()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    batch = common.collate(PAIRS, "cpu")
    batch["ref"] = torch.stack(refs)
    recorder = Recorder(parameters)
    logps, norm = dpo.update(actor, recorder, batch, config)
    assert logps.flatten().tolist() == pytest.approx(shown, abs=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4) and norm > 0.01
    expected = expected / max(1.0, norm)
    assert (recorder.steps[0] - expected).norm() < 1e-4 * expected.norm()


def test_update_moves_the_policy_and_nothing_else_towards_the_chosen_answers(actor):
    """The margin over the reference rises; base and reference stay bit for bit what they were."""
    batch, refs = common.collate(PAIRS, "cpu"), both_alone(actor, "reference", PAIRS)
    batch["ref"] = refs.flatten()
    parameters = lora.adapter_parameters(actor, "policy")
    before, first = {k: p.detach().clone() for k, p in actor.named_parameters()}, both_alone(
        actor, "policy", PAIRS)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(3):
        dpo.update(actor, optimizer, batch, config_of())
    own = {id(p) for p in parameters}
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name
    after = both_alone(actor, "policy", PAIRS)
    assert (after - first).diff(dim=1).sum() < -0.1  # chosen minus rejected has risen


# ------------------------------------------------------------------------------ samples


ROWS = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "cd" * i, "p_chosen": 0.5 + n / 100}
        for i, n in enumerate((1, 30, 4, 17, 9, 2), 1)]


def length_reward(prompts, responses, rows):
    return [10.0 + len(response) for response in responses]


@pytest.mark.parametrize("micro, missing", [(6, -3.0), (4, -3.0), (4, None)])
@torch.no_grad()
def test_a_sample_is_measured_by_what_is_known_of_each_answer(actor, micro, missing, monkeypatch):
    """KL to the reference in nats an answer. An answer that did not end scores -3, or with
    --missing-eos-score none what the reward says."""
    seen, original = [], common.sample
    monkeypatch.setattr(common, "sample", lambda *a: seen.append(original(*a)) or seen[0])
    config = config_of(micro_batch_size=micro, missing_eos_score=missing)
    stats, samples = dpo.sample_answers(actor, Letters(), ROWS, length_reward, config)
    [(y, mask, _, _)], kl, ended = seen, [], []
    for b, r in enumerate(ROWS):
        prompt = Letters()(f"User: {r['prompt']}\n\nAssistant:").input_ids
        answer = y[b][: int(mask[b].sum())].tolist()
        policy, other = (logp_alone(actor, name, prompt, answer).item()
                         for name in ("policy", "reference"))
        kl.append(policy - other)
        ended.append(2 <= answer[-1] < 18)
        text = Letters().batch_decode([answer], True)[0]
        score = 10.0 + len(text) if ended[b] or missing is None else -3.0
        assert samples[b] == {"prompt": r["prompt"], "response": text, "score": score}
    scores = [sample["score"] for sample in samples]
    mean = sum(scores) / 6
    assert 0 < sum(ended) < 6 and stats == pytest.approx({
        "score": mean, "score_std": math.sqrt(sum((s - mean) ** 2 for s in scores) / 6),
        "kl": sum(kl) / 6, "eos_rate": sum(ended) / 6, "length": mask.sum().item() / 6,
    }, abs=1e-4)
    again = dpo.sample_answers(actor, Letters(), ROWS, None, config)
    assert again == ({k: v for k, v in stats.items() if "score" not in k},
                     [{**sample, "score": None} for sample in samples])


@torch.no_grad()
def test_evaluate_measures_the_pairs_that_fit_and_one_answer_to_each_of_their_prompts(actor):
    """A pair of equal answers is in neither."""
    same, config = {"prompt": "e", "chosen": "f", "rejected": "f"}, config_of(micro_batch_size=2)
    stats, samples = dpo.evaluate(actor, Letters(), [same, *ROWS], None, config)
    pairs = dpo.encode_pairs(Letters(), ROWS, 120)
    logps, refs = (both_alone(actor, name, pairs) for name in ("policy", "reference"))
    expected, again = dpo.sample_answers(actor, Letters(), ROWS, None, config)
    assert samples == again and len(samples) == len(ROWS)
    assert stats == pytest.approx({**dpo.measure(logps, refs, config), **expected}, abs=1e-4)


def test_the_best_judge_agrees_as_often_as_the_probabilities_of_the_labels_say(capsys):
    """0.9 and 1 - 0.3 make a ceiling of 0.8, of which 0.6 is 75%; silent where a row has none."""
    rows = [{"p_chosen": 0.9}, {"p_chosen": 0.3}]
    runs.print_ceiling(rows, 0.6)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert "judge" in last and "0.800" in last and "75.0%" in last
    runs.print_ceiling([*rows, {"p_chosen": None}], 0.6)
    assert "judge" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ train


KEYS = {"step", "seconds", "grad_norm", "lr", "loss", "accuracy", "margin", "logp_chosen",
        "logp_rejected"}  # of metrics.jsonl


def run(model, log=None, state=None, rows=ROWS, **fields):
    config = config_of(**{"steps": 4, "lr": 1e-2, "micro_batch_size": 2, **fields})
    return dpo.train(model, Letters(), rows, config, log, state)


@pytest.mark.parametrize("micro", [1, 3])
def test_each_step_has_the_gradient_of_its_whole_batch_against_the_first_policy(
        kind, micro, monkeypatch):
    """At step 0, and at step 1, when the policy has moved away from what it is measured against."""
    model = with_adapters(kind, "policy")
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    parameters = lora.adapter_parameters(model, "policy")
    first = [p.detach().clone() for p in parameters]
    history = run(model, steps=2, seed=5, micro_batch_size=micro)
    pairs = dpo.encode_pairs(Letters(), ROWS, 120)
    for step in (0, 1):
        batch, refs = [pairs[i] for i in common.batch_rows(step, len(ROWS), 3, 5)], []
        for moved in (0.0, 0.05 * step):
            for p, start in zip(parameters, first):
                p.data = start + moved
            if not refs:
                refs = both_alone(model, "policy", batch).tolist()
        expected = policy_gradient(model, batch, refs, 0.3)
        norm = expected.norm().item()
        assert history[step]["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert torch.allclose(Recorder.last.steps[step], expected / max(1.0, norm), atol=1e-5)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(history[1]["loss"] - math.log(2)) > 1e-3


@pytest.mark.parametrize("names", [["policy"], []])
@pytest.mark.parametrize("fields, loss", [
    ({}, math.log(2)), ({"label_smoothing": 0.2}, math.log(2)), ({"loss": "ipo"}, 1 / 0.6**2),
])
def test_the_first_loss_is_that_of_a_policy_that_is_its_reference(kind, names, fields, loss):
    """ln 2 and margin 0, of an adapter that was loaded and of a new one; with ipo 1/(2 beta)^2. The
    reference has read these pairs in other batches, before training."""
    model = with_adapters(kind, *names) if names else toy(kind)
    row = run(model, **fields)[0]
    assert row["loss"] == pytest.approx(loss, abs=1e-5 if loss < 1 else 1e-4)
    assert abs(row["margin"]) < 1e-5


def test_train_returns_one_row_a_step_with_the_keys_of_metrics_jsonl(kind, capfd):
    """It hands the same rows to log, and writes nothing to stdout."""
    seen = []
    history = run(toy(kind), log=lambda *given: seen.append(given))
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert all(set(row) == KEYS for row in history)
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert [row for row, _, _ in seen] == history and capfd.readouterr().out == ""
    assert [state["step"] for _, _, state in seen] == [1, 2, 3, 4]
    assert all(samples == [] for _, samples, _ in seen)


def test_train_in_a_thread_returns_what_it_returns_in_the_main_one(kind):
    """And it leaves the random numbers of the caller and every signal handler as they were."""
    models = toy(kind), toy(kind)
    torch.manual_seed(11)
    before, handlers = torch.get_rng_state(), [signal.getsignal(s) for s in signal.valid_signals()]
    main, thread = run(models[0]), in_a_thread(run, models[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert [signal.getsignal(s) for s in signal.valid_signals()] == handlers
    assert without_seconds(main) == without_seconds(thread)
    assert equal(*(values_of(model, "policy") for model in models))


def test_a_second_call_goes_on_from_the_policy_towards_the_same_reference(kind):
    model = toy(kind)
    run(model)
    policy, reference = values_of(model, "policy"), values_of(model, "reference")
    again = run(model, lr=0.0)
    assert equal(values_of(model, "policy"), policy)  # it starts where the first call ended
    assert abs(again[0]["margin"]) > 1e-3
    run(model)
    assert equal(values_of(model, "reference"), reference)
    assert not equal(values_of(model, "policy"), policy)


def test_going_on_from_a_state_is_bit_identical(kind):
    """A run of four steps, and its last two alone, from a copy of state and adapters after two."""
    model, kept = toy(kind), {}

    def log(row, samples, state):
        if row["step"] == 1:
            kept.update(model=copy.deepcopy(model), state=copy.deepcopy(state))

    whole = run(model, log)
    rest = run(kept["model"], state=kept["state"])
    assert without_seconds(rest) == without_seconds(whole[2:]) and len(rest) == 2
    assert equal(values_of(kept["model"], "policy"), values_of(model, "policy"))


def test_going_on_reads_the_reference_in_the_same_batches(kind, monkeypatch):
    """Another batch has other padding, and so other bits."""
    model, kept, read = toy(kind), {}, []
    plain = dpo.all_logps

    def all_logps(model, name, pairs, config):
        read.append([row for row, _, _ in pairs])
        return plain(model, name, pairs, config)

    monkeypatch.setattr(dpo, "all_logps", all_logps)
    run(model, lambda row, samples, state: kept.update(copy.deepcopy(state)) if row["step"] == 1
        else None)
    run(model, state=kept)
    assert len(read) == 2 and read[0] == read[1]


def test_training_makes_the_chosen_answers_likelier_than_the_rejected_ones(kind):
    """Of pairs that one rule separates the margin grows and all are ranked right."""
    rows = [{"prompt": "a" * n, "chosen": "b" * (n + 1), "rejected": "c" * (n + 1)}
            for n in range(6)]
    history = run(toy(kind), rows=rows, steps=8, batch_size=6)
    assert history[-1]["accuracy"] == 1.0 and history[-1]["margin"] > 0.1
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_sft_term_keeps_the_chosen_answers_likely_and_stays_out_of_the_logged_loss(kind):
    plain, held = (run(toy(kind), steps=8, batch_size=6, sft_weight=weight) for weight in (0, 10.0))
    assert plain[0]["loss"] == held[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert plain[0]["logp_chosen"] == held[0]["logp_chosen"]
    assert held[-1]["logp_chosen"] > plain[-1]["logp_chosen"] + 1


def test_length_normalised_margins_and_log_probabilities_are_those_of_a_token(kind):
    history = run(toy(kind), length_normalised=True)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert -8 < history[0]["logp_chosen"] < 0 and -8 < history[0]["logp_rejected"] < 0
    assert history[-1]["margin"] > 0


def test_train_leaves_out_pairs_that_teach_nothing_and_refuses_to_train_on_none(kind):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {"prompt": "a", "chosen": "b" * 200, "rejected": "b"}
    models = toy(kind), toy(kind)
    one, two = run(models[0]), run(models[1], rows=[*ROWS, same, long])
    assert without_seconds(one) == without_seconds(two)
    with pytest.raises(ValueError, match="--max-length 120"):
        run(toy(kind), rows=[same, long])
