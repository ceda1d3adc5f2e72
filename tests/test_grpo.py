import copy
import json
import math
import signal
import subprocess
import sys
import threading
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TARGETS, toy

import common
import grpo
import lora
from cli import rewards, runs

CLIPPED, KINDS = ["grpo", "dapo", "dr_grpo", "gspo"], ["k3", "k3-corrected", "k2"]
LOSSES = [*CLIPPED, "cispo"]
MASK = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LENGTHS = [5, 2, 3, 1]


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_are_those_of_the_softmax_at_the_temperature(temperature):
    logits, ids = noise(0, 2, 3, 6) * 3, torch.tensor([[0, 5, 2], [3, 3, 1]])
    logp = grpo.token_logps(logits, ids, temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logp[b, t].item() == pytest.approx(math.log(p[ids[b, t]]), abs=1e-5)
    huge = torch.tensor([[[1000.0, 0.0, -1000.0]]]).bfloat16()
    logp = grpo.token_logps(huge, torch.tensor([[2]]))
    assert logp.dtype == torch.float32 and logp.item() == pytest.approx(-2000.0)


def test_masked_mean_weighs_every_real_token_the_same():
    """(1 + 2 + 3 + 10) / 4, and not the mean 6 of the two row means."""
    x, mask = torch.tensor([[1.0, 2, 3], [10, -77, 55]]), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert grpo.masked_mean(x, mask).item() == 4.0


# ------------------------------------------------------------------------------ group_advantages


def test_std_divides_by_the_unbiased_spread_of_the_group_plus_1e_4():
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2. Then a spread of the size of the epsilon."""
    adv = grpo.group_advantages(torch.tensor([[1.0, 2.0, 6.0], [-1e-4, 0.0, 1e-4]]))
    scale = math.sqrt(7) + 1e-4
    assert adv[0].tolist() == pytest.approx([-2 / scale, -1 / scale, 3 / scale], abs=1e-6)
    assert adv[1].tolist() == pytest.approx([-0.5, 0.0, 0.5], abs=1e-5)


def test_none_subtracts_the_mean_of_the_group_only():
    adv = grpo.group_advantages(torch.tensor([[1.0, 2.0, 6.0], [50.0, 40.0, 30.0]]), "none")
    assert adv.tolist() == [[-2.0, -1.0, 3.0], [10.0, 0.0, -10.0]]


@pytest.mark.parametrize("G", [2, 3, 5])
def test_loo_subtracts_the_mean_of_the_other_answers(G):
    rewards = noise(1, 4, G) * 3
    adv = grpo.group_advantages(rewards, "loo").tolist()
    for row, found in zip(rewards.tolist(), adv):
        others = [(sum(row) - row[i]) / (G - 1) for i in range(G)]
        assert found == pytest.approx([r - o for r, o in zip(row, others)], abs=1e-5)


@pytest.mark.parametrize("scale", ["std", "none", "loo"])
@pytest.mark.parametrize("score", [0.0, -3.0, 2.5, 0.3])
def test_a_group_without_spread_has_no_advantage(scale, score):
    rewards = torch.stack([torch.full((6,), score), torch.arange(6.0)])
    adv = grpo.group_advantages(rewards, scale)
    assert adv[0].tolist() == [0.0] * 6 and adv[1].abs().min() > 0.2


def test_raw_is_the_score_itself_also_where_there_is_no_spread():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [-3.0, 0.0, 2.5]])
    assert grpo.group_advantages(rewards, "raw").tolist() == rewards.tolist()


def test_raw_has_the_expected_gradient_of_loo_and_more_noise():
    """Over all groups of two answers, each with its probability. The squares of the advantages have
    the means mu and mu (1 - mu) G / (G - 1) of docs/grpo.md, here with mu = 0.9 and G = 2."""
    logp = torch.tensor([0.6, 0.3, 0.1]).log().requires_grad_()
    score, mean, square = torch.tensor([1.0, 1.0, 0.0]), {}, {}
    for scale in ("raw", "loo"):
        total, square[scale] = 0.0, 0.0
        for i in range(3):
            for j in range(3):
                adv = grpo.group_advantages(score[torch.tensor([[i, j]])], scale)[0]
                p = (logp[i] + logp[j]).exp().item()
                total = total + p * (adv * logp.log_softmax(0)[[i, j]]).sum()
                square[scale] += p * adv[0].item() ** 2
        [mean[scale]] = torch.autograd.grad(total, logp)
    assert torch.allclose(mean["raw"], mean["loo"], atol=1e-6) and mean["raw"].norm() > 0.05
    assert square == pytest.approx({"raw": 0.9, "loo": 0.9 * 0.1 * 2}, abs=1e-5)


def test_a_group_of_one_and_an_unknown_scale_raise():
    for scale in ("std", "raw"):
        with pytest.raises(ValueError, match="two answers"):
            grpo.group_advantages(torch.ones(3, 1), scale)
    with pytest.raises(ValueError, match="median"):
        grpo.group_advantages(torch.ones(3, 2), "median")


# ------------------------------------------------------------------------------ kl_penalty


@pytest.mark.parametrize("kind, expected", [
    ("k3", [2 - 1 - math.log(2), 0.5 - 1 + math.log(2), 0.0]),
    ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0]),
    ("k3-corrected", [(2 - 1 - math.log(2)) * 1.5, (0.5 - 1 + math.log(2)) * 0.8, 0.0]),
])
def test_kl_penalty_by_hand(kind, expected):
    """pi_ref / pi is 2 and 1/2, pi / pi_old is 1.5 and 0.8; the third token is padding."""
    logp = torch.tensor([[-1.0, -2.0, 300.0]])
    ref = logp + torch.tensor([[2.0, 0.5, 7.0]]).log()
    old = logp - torch.tensor([[1.5, 0.8, 3.0]]).log()
    penalty = grpo.kl_penalty(logp, old, ref - 600 * (logp > 0), torch.tensor([[1.0, 1, 0]]), kind)
    assert penalty[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_k3_keeps_its_digits_where_the_policies_are_close():
    """d = 1e-3 gives d^2/2 + d^3/6; exp(d) - 1 - d in fp32 would be off by a tenth."""
    ref, zero = torch.tensor([[1e-3]]), torch.zeros(1, 1)
    k3 = grpo.kl_penalty(zero, zero, ref, torch.ones(1, 1)).item()
    assert k3 == pytest.approx(5e-7 + 1e-9 / 6, rel=1e-3)


def test_an_unknown_kind_of_penalty_raises():
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="k7"):
        grpo.kl_penalty(zero, zero, zero, torch.ones(1, 1), "k7")


V = 6


def categorical():
    """theta, and log pi (with gradient), log ref and log old of each of the V tokens; a sum
    weighted with pi is the exact expectation over y ~ pi."""
    theta, ids = noise(10, V).requires_grad_(), torch.arange(V).unsqueeze(1)
    logp = grpo.token_logps(theta.expand(V, 1, V), ids)
    ref, old = (grpo.token_logps(noise(seed, V).expand(V, 1, V), ids) for seed in (11, 12))
    return theta, logp, ref, old


def exact():
    """KL(pi || ref), its gradient p_v (log p_v/q_v - KL), and that p_v - q_v of KL(ref || pi)."""
    weights, others = ([math.exp(x) for x in noise(seed, V).tolist()] for seed in (10, 11))
    p, q = [w / sum(weights) for w in weights], [w / sum(others) for w in others]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    return kl, [a * (math.log(a / b) - kl) for a, b in zip(p, q)], [a - b for a, b in zip(p, q)]


@pytest.mark.parametrize("kind, stale, unbiased, reverse", [
    ("k3", False, True, False), ("k2", False, False, True), ("k3-corrected", False, True, True),
    ("k3-corrected", True, True, True),
])
def test_which_kl_a_penalty_estimates_and_which_it_descends(kind, stale, unbiased, reverse):
    """k3 has the value of KL(pi || ref) and the gradient of KL(ref || pi); k2 has the gradient of
    KL(pi || ref) and a biased value; the corrected k3 has both right, for y ~ pi_old as well."""
    theta, logp, ref, old = categorical()
    old = old if stale else logp.detach()
    mean = (old.exp() * grpo.kl_penalty(logp, old, ref, torch.ones(V, 1), kind)).sum()
    kl, own, other = exact()
    assert (abs(mean.item() - kl) < 1e-6) == unbiased
    assert max(abs(a - b) for a, b in zip(own, other)) > 0.05
    found = torch.autograd.grad(mean, theta)[0].tolist()
    assert found == pytest.approx(own if reverse else other, abs=1e-6)


# ------------------------------------------------------------------------------ grpo_loss


@pytest.mark.parametrize("loss, expected", [
    ("grpo", -((2.2 + 2.6 + 1.0) / 3 - 0.8) / 2),
    ("dapo", -(2.2 + 2.6 + 1.0 - 0.8) / 4),
    ("dr_grpo", -(2.2 + 2.6 + 1.0 - 0.8) / (2 * 10)),
    ("gspo", -(2 * (1.1 * 1.5 * 0.5) ** (1 / 3) - 0.8) / 2),
])
def test_the_four_losses_by_hand(loss, expected):
    """A = 2 with ratios 1.1, 1.5 (counts as 1.3) and 0.5; A = -1 with ratio 0.7 (as 0.8)."""
    ratio = torch.tensor([[1.1, 1.5, 0.5, 9.0], [0.7, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    old, adv = noise(2, 2, 4), torch.tensor([2.0, -1.0])
    found = grpo.grpo_loss(old + ratio.log(), old, old, adv, mask, 0.2, 0.3, 0.0, loss, 10)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_cispo_by_hand():
    """A = 2 with the weights 1.1, 1.3 (of 1.5) and 0.8 (of 0.5), A = -1 with 0.8 (of 0.7): each
    times -A log pi, a mean over four tokens. The gradient is -A times the weight over four."""
    ratio = torch.tensor([[1.1, 1.5, 0.5, 9.0], [0.7, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    logp = torch.tensor([[-1.0, -2.0, -0.5, 7.0], [-3.0, 7.0, 7.0, 7.0]], requires_grad=True)
    old, adv = logp.detach() - ratio.log(), torch.tensor([2.0, -1.0])
    found = grpo.grpo_loss(logp, old, old, adv, mask, 0.2, 0.3, 0.0, "cispo")
    assert found.item() == pytest.approx(
        -(2 * (1.1 * -1 + 1.3 * -2 + 0.8 * -0.5) - 0.8 * -3) / 4, abs=1e-6)
    found.backward()
    assert logp.grad.tolist() == [
        pytest.approx([-2.2 / 4, -2.6 / 4, -1.6 / 4, 0.0], abs=1e-6),
        pytest.approx([0.8 / 4, 0.0, 0.0, 0.0], abs=1e-6)]


@pytest.mark.parametrize("adv, ratio, weight", [
    (1.0, 1.4, 1.3), (1.0, 1.2, 1.2), (1.0, 0.95, 0.95), (1.0, 0.5, 0.9),
    (-1.0, 1.4, 1.3), (-1.0, 1.2, 1.2), (-1.0, 0.95, 0.95), (-1.0, 0.8, 0.9),
])
def test_in_cispo_the_clip_bounds_a_weight_and_silences_no_token(adv, ratio, weight):
    """eps 0.1 down, 0.3 up, whatever the sign of the advantage."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    grpo.grpo_loss(logp, zero, zero, torch.tensor([adv]), one, 0.1, 0.3, 0.0, "cispo").backward()
    assert logp.grad.item() == pytest.approx(-adv * weight, abs=1e-6)


@pytest.mark.parametrize("kl", KINDS)
def test_on_policy_cispo_has_the_gradient_of_dapo_and_off_policy_another(kl):
    found = {}
    for loss in ("cispo", "dapo"):
        for policy in ("on", "off"):
            logp, old, ref, adv = random_inputs()
            old = logp.detach() if policy == "on" else old
            value = grpo.grpo_loss(logp, old, ref, adv, MASK.double(), 0.1, 0.25, 0.3, loss, kl=kl)
            found[loss, policy] = torch.autograd.grad(value, logp)[0]
    assert torch.allclose(found["cispo", "on"], found["dapo", "on"], atol=1e-12)
    assert found["dapo", "on"].norm() > 0.01
    assert (found["cispo", "off"] - found["dapo", "off"]).norm() > 0.01


def by_definition(logp, old, ref, adv, low, high, beta, loss, max_tokens, kl):
    """Answer by answer, token by token, on scalars: min of the two gains, minus the penalty."""
    rows = []
    for b, n in enumerate(LENGTHS):
        tokens = [(logp[b, t] - old[b, t]).exp() for t in range(n)]
        ratios = [math.prod(tokens) ** (1 / n)] * n if loss == "gspo" else tokens
        rows.append([])
        for t, rho in enumerate(ratios):
            inside = min(max(rho, 1 - low), 1 + high)
            gain = min(rho * adv[b], inside * adv[b])
            if loss == "cispo":  # no gradient flows through the weight
                gain = min(max(rho.item(), 1 - low), 1 + high) * adv[b] * logp[b, t]
            q = (ref[b, t] - logp[b, t]).exp()
            k3 = q - 1 - q.log()
            penalty = {"k3": k3, "k2": q.log() ** 2 / 2, "k3-corrected": tokens[t] * k3}[kl]
            rows[b].append(beta * penalty - gain)
    if loss in ("dapo", "cispo"):
        return sum(map(sum, rows)) / sum(LENGTHS)
    if loss == "dr_grpo":
        return sum(map(sum, rows)) / (len(rows) * max_tokens)
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def random_inputs(junk=0.0):
    """logp, old, ref, adv in fp64, with ratios on both sides of the clip; junk on padding."""
    logp, old, ref = (noise(seed, 4, 5).double() * 0.4 - 1 for seed in (3, 4, 5))
    logp, old, ref = (torch.where(MASK > 0, x, y)
                      for x, y in ((logp, junk), (old, -junk), (ref, 3 * junk)))
    return logp.requires_grad_(), old, ref, noise(6, 4).double()


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_the_definition(loss, kl):
    logp, old, ref, adv = random_inputs()
    rest = (0.1, 0.25, 0.3, loss, 7, kl)
    found = grpo.grpo_loss(logp, old, ref, adv, MASK.double(), *rest)
    expected = by_definition(logp, old, ref, adv, *rest)
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    a, b = (torch.autograd.grad(x, logp)[0] for x in (found, expected))
    assert torch.allclose(a, b, atol=1e-9) and a.norm() > 0.01


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_junk_in_the_padding_changes_neither_value_nor_gradient(loss, kl):
    """Even where exp of it overflows fp64."""
    results = []
    for junk in (0.0, 5.0, 900.0, -900.0):
        logp, old, ref, adv = random_inputs(junk)
        found = grpo.grpo_loss(logp, old, ref, adv, MASK.double(), 0.1, 0.25, 0.3, loss, 7, kl)
        results.append((found.item(), *torch.autograd.grad(found, logp)[0].flatten().tolist()))
    assert all(r == pytest.approx(results[0], abs=1e-12) for r in results)


@pytest.mark.parametrize("loss", CLIPPED)
@pytest.mark.parametrize("adv, ratio, flat", [
    (1.0, 1.4, True), (1.0, 1.2, False), (1.0, 0.95, False), (1.0, 0.5, False),
    (-1.0, 1.4, False), (-1.0, 1.2, False), (-1.0, 0.95, False), (-1.0, 0.8, True),
])
def test_clip_truth_table(loss, adv, ratio, flat):
    """eps 0.1 down, 0.3 up: flat only where the ratio has left on the side of gain; else -A rho."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    grpo.grpo_loss(logp, zero, zero, torch.tensor([adv]), one, 0.1, 0.3, 0.0, loss, 1).backward()
    assert logp.grad.item() == pytest.approx(0.0 if flat else -adv * ratio, abs=1e-6)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_at_ratio_1_the_loss_is_0_and_its_gradient_is_not(loss):
    """Each token has -A_i / (B |y_i|)."""
    adv = grpo.group_advantages(noise(7, 2, 2)).flatten()
    logp = noise(8, 4, 5).requires_grad_()
    found = grpo.grpo_loss(logp, logp.detach(), logp.detach() - 1, adv, MASK, loss=loss)
    found.backward()
    assert abs(found.item()) < 1e-6
    for b, n in enumerate(LENGTHS):
        expected = [-adv[b].item() / (4 * n)] * n + [0.0] * (5 - n)
        assert logp.grad[b].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["dr_grpo", "ppo"])
def test_dr_grpo_without_a_length_and_an_unknown_loss_raise(loss):
    zero = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=loss):
        grpo.grpo_loss(zero, zero, zero, torch.ones(1), torch.ones(1, 1), loss=loss)


# ------------------------------------------------------------------------------ Config


@pytest.mark.parametrize("fields, flag", [
    ({"temperature": 0.0}, "--temperature"), ({"group_size": 1}, "--group-size"),
    ({"max_new_tokens": 64, "max_length": 64}, "--max-new-tokens"),
    ({"batch_size": 6, "group_size": 4}, "--batch-size"),
    ({"batch_size": 8, "group_size": 4, "minibatches": 4}, "--minibatches"),
])
def test_a_config_that_cannot_work_raises_and_names_the_flag(fields, flag):
    with pytest.raises(ValueError, match=flag):
        grpo.Config(**fields)


# ------------------------------------------------------------------------------ rollout


class Letters:
    """The least of a tokenizer: a letter is a token, 1 is BOS, 2 is EOS. Letters and the colon come
    back from decoding as they were."""

    chat_template, eos_token_id = None, 2

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        ids = [3 + ord(c) % 61 for c in text]
        return Namespace(input_ids=[1] * add_special_tokens + ids)

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(":" if i == 61 else chr(58 + i) for i in row if i > 2) for row in rows]


G = 3
PROMPTS = [{"prompt": "a" * n, "number": n} for n in (1, 30, 9)]
ROWS = [row for row in PROMPTS for _ in range(G)]
B = len(ROWS)
CONFIG = dict(
    batch_size=B, group_size=G, max_length=64, max_new_tokens=20, temperature=0.7, beta=0.3,
    lora_rank=4,
)


def stub_reward(prompts, responses, rows):
    return [row["number"] / 10 + len(response) for row, response in zip(rows, responses)]


def fill(model, *names):
    """Gives adapters values of which none is zero, so that no two of them are the same model."""
    for name in names:
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.2)


def add_adapters(model, kind, *names):
    """Adapters of which none is zero; the first is trained. A token in four ends an answer."""
    model.generation_config.eos_token_id = list(range(2, 18))
    for name in names:
        lora.add_adapter(model, name, 4, targets=TARGETS[kind], trainable=name == names[0])
        fill(model, name)


@pytest.fixture
def actor(kind):
    model = toy(kind)
    add_adapters(model, kind, "policy", "reference", "reward")
    lora.add_head(model, "reward").requires_grad_(False)
    return model


def collect(model, reward=stub_reward, reference="reference", **fields):
    """A rollout with its advantages, as `train` makes it, and the config."""
    config, generator = grpo.Config(**{**CONFIG, **fields}), torch.Generator().manual_seed(3)
    batch, texts = grpo.rollout(model, Letters(), PROMPTS, reward, config, generator, G,
                                reference=reference)
    batch["adv"] = grpo.group_advantages(batch["score"].view(-1, G)).flatten()
    return batch, texts, config


def sequence(batch, b):
    """(prompt ids, answer ids) of row b, without padding."""
    i = b // (len(batch["y"]) // len(batch["x"]))
    prompt = batch["x"][i][batch["x_mask"][i] == 1].tolist()
    return prompt, batch["y"][b, : int(batch["mask"][b].sum())].tolist()


def logits_alone(model, adapter, prompt, answer):
    """The logits [n, V] that predict an answer of n tokens, unpadded, in a pass of its own."""
    with lora.use_adapter(model, adapter):
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


def logps_alone(model, adapter, prompt, answer, temperature):
    logp = (logits_alone(model, adapter, prompt, answer) / temperature).log_softmax(-1)
    return torch.stack([logp[t, token] for t, token in enumerate(answer)])


def test_the_rollout_has_unequal_prompts_an_early_eos_and_spread(actor):
    """The premise of the tests below. The answers to one prompt stand side by side."""
    batch, *_ = collect(actor)
    assert batch["x"].shape == batch["x_mask"].shape and len(batch["x"]) == len(PROMPTS)
    assert len(set(batch["x_mask"].sum(1).tolist())) == len(PROMPTS)
    assert len(batch["y"]) == B and batch["mask"].sum(1).min() < batch["mask"].shape[1]
    assert batch["mask"].shape[1] < CONFIG["max_new_tokens"]
    assert len(set(map(tuple, batch["y"].tolist()))) == B
    assert (batch["adv"].view(-1, G).abs().amax(1) > 0.1).all()


@pytest.mark.parametrize("reference, micro, max_length", [
    ("reference", None, 64), (None, 4, 32), ("reference", 2, 64),
])
@torch.no_grad()
def test_rollout_logps_are_those_of_each_row_alone(actor, reference, micro, max_length):
    """Unpadded, at the sampling temperature, whatever the micro-batch; with reference None it is
    the base. A long prompt loses its beginning. A response stops at its first stop token, else it
    scores -3."""
    batch, texts, config = collect(
        actor, reference=reference, micro_batch_size=micro, max_new_tokens=4, max_length=max_length)
    kl, entropy, surprise, stopped = [], [], [], []
    for b, row in enumerate(ROWS):
        prompt, answer = sequence(batch, b)
        whole, n = Letters()(f"User: {row['prompt']}\n\nAssistant:").input_ids, len(answer)
        assert prompt == whole[-(max_length - 4):]
        for key, name in (("logp_old", "policy"), ("logp_ref", reference)):
            alone = logps_alone(actor, name, prompt, answer, config.temperature)
            assert torch.allclose(batch[key][b, :n], alone, atol=1e-5)
        kl.append((batch["logp_old"][b, :n] - batch["logp_ref"][b, :n]).sum().item())
        logits = logits_alone(actor, "policy", prompt, answer) / config.temperature
        exact_entropy = torch.distributions.Categorical(logits=logits).entropy()
        assert torch.allclose(batch["entropy"][b, :n], exact_entropy, atol=1e-5)
        entropy += exact_entropy.tolist()
        surprise += (-batch["logp_old"][b, :n]).tolist()
        stopped.append(2 <= answer[-1] < 18)
        assert not any(2 <= i < 18 for i in answer[:-1]) and (stopped[b] or n == 4)
        score = row["number"] / 10 + len(texts[b]) if stopped[b] else -3.0
        assert batch["score"][b].item() == pytest.approx(score, abs=1e-5)
        for key in ("y", "logp_old", "logp_ref", "entropy"):  # nothing after the end
            assert batch[key][b, n:].abs().sum() == 0
    score, T = batch["score"].tolist(), len(entropy)
    mean, excess = sum(score) / len(score), [s - h for s, h in zip(surprise, entropy)]
    assert batch["ended"].tolist() == stopped
    assert 0 < sum(stopped) < B and grpo.rollout_stats(batch) == pytest.approx({
        "score": mean, "score_std": math.sqrt(sum((s - mean) ** 2 for s in score) / B),
        "kl": sum(kl) / B, "entropy": sum(entropy) / T, "surprise": sum(surprise) / T,
        "surprise_z": sum(excess) / math.sqrt(sum(e * e for e in excess)),
        "eos_rate": sum(stopped) / B, "length": T / B,
    }, abs=1e-4)


@torch.no_grad()
def test_missing_eos_score_none_leaves_every_answer_the_score_of_the_reward(actor):
    """With a number, and the same random numbers, that number replaces it where no EOS came."""
    fixed, texts, _ = collect(actor, max_new_tokens=4, missing_eos_score=-7.0)
    own, same, _ = collect(actor, max_new_tokens=4, missing_eos_score=None)
    expected = [row["number"] / 10 + len(text) for row, text in zip(ROWS, texts)]
    assert same == texts and own["score"].tolist() == pytest.approx(expected, abs=1e-5)
    assert 0 < fixed["ended"].sum() < B
    for number, score, ended in zip(expected, fixed["score"].tolist(), fixed["ended"].tolist()):
        assert score == pytest.approx(number if ended else -7.0, abs=1e-5)
    zero, *_ = collect(actor, max_new_tokens=4, missing_eos_score=0.0)  # a number like any other
    assert zero["score"].tolist() == (fixed["score"] * fixed["ended"]).tolist()


@torch.no_grad()
def test_a_reward_by_name_scores_the_sampled_ids_of_each_row_alone(actor):
    """The head reads the state after the last token of the answer, to 1e-5."""
    batch, *_ = collect(actor, reward="reward", missing_eos_score=None)
    for b in range(B):
        prompt, answer = sequence(batch, b)
        with lora.use_adapter(actor, "reward"):
            hidden = actor.base_model(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
        expected = (hidden * actor.heads["reward"].weight[0]).sum().item()
        assert batch["score"][b].item() == pytest.approx(expected, abs=1e-5)
    assert batch["score"].std() > 0.1


@torch.no_grad()
def test_a_reward_function_is_given_one_prompt_text_and_row_per_answer(actor):
    """G times each prompt, messages joined to a string, in the order of the answers."""
    rows = [{"prompt": "Why?", "n": 1}, {"prompt": [{"role": "system", "content": "Be brief."},
                                                  {"role": "user", "content": "So?"}], "n": 2}]
    seen = []

    def reward(prompts, responses, rows):
        seen.append((prompts, responses, rows))
        return [0] * len(responses)

    _, texts = grpo.rollout(
        actor, Letters(), rows, reward, grpo.Config(**CONFIG), torch.Generator(), 2)
    repeated = [rows[0], rows[0], rows[1], rows[1]]
    assert seen == [(["Why?", "Why?", "Be brief.\nSo?", "Be brief.\nSo?"], texts, repeated)]


@pytest.mark.parametrize("bad", [[1.0], [math.nan] * B])
def test_a_reward_of_another_length_or_without_a_number_raises(actor, bad):
    with pytest.raises(ValueError, match=f"reward returned .* for {B} responses"):
        collect(actor, reward=lambda *_: bad)


def test_save_samples_writes_one_line_a_response(tmp_path):
    for step in (0, 7):
        found = grpo.samples(PROMPTS[:2], ["x", "y"], torch.tensor([1.5, -3.0]))
        runs.save_samples(Namespace(out=tmp_path), step, found)
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert found == [{"step": step, "prompt": p, "response": r, "score": s} for step in (0, 7)
                     for p, r, s in (("a", "x", 1.5), ("a" * 30, "y", -3.0))]


# ------------------------------------------------------------------------------ resample


def without_spread(*numbers):
    """A reward that gives all answers to the rows with these numbers 0, and the others numbers that
    depend on the text; it keeps the rows of each call."""
    def reward(prompts, responses, rows):
        reward.calls.append([row["number"] for row in rows])
        return [0.0 if row["number"] in numbers else sum(map(ord, response)) % 97
                for row, response in zip(rows, responses)]

    reward.calls = []
    return reward


def resampled(model, drawn, reward, seed=3, **fields):
    """What grpo.resample makes of the rows with the numbers `drawn`."""
    by_number = {row["number"]: row for row in PROMPTS}
    config = grpo.Config(**{**CONFIG, "missing_eos_score": None, **fields})
    return grpo.resample(model, Letters(), PROMPTS, [by_number[n] for n in drawn], reward, config,
                         torch.Generator().manual_seed(seed)), config


def check_rollout(model, batch, texts, drawn, reward, config):
    """Each row is what a rollout of its own prompt would be: nothing was mixed up or cut off."""
    scores = reward(None, texts, [row for row in drawn for _ in range(G)])
    names = ("logp_old", "policy"), ("logp_ref", "reference")
    assert len(batch["x"]) == len(drawn) and len(batch["y"]) == len(texts) == G * len(drawn)
    for key, name in names:
        logps = grpo.batch_logps(model, name, batch, config)
        assert torch.allclose(batch[key], logps, atol=1e-5)
    for b, text in enumerate(texts):
        prompt, answer = sequence(batch, b)
        row, n = drawn[b // G], len(answer)
        whole = Letters()(f"User: {row['prompt']}\n\nAssistant:").input_ids
        assert prompt == whole[-(config.max_length - config.max_new_tokens):]
        assert text == Letters().batch_decode([answer], True)[0]
        assert batch["score"][b].item() == scores[b]
        assert batch["ended"][b].item() == (2 <= answer[-1] < 18)
        for key, name in names:
            alone = logps_alone(model, name, prompt, answer, config.temperature)
            assert torch.allclose(batch[key][b, :n], alone, atol=1e-5)
        assert all(batch[key][b, n:].abs().sum() == 0
                   for key in ("y", "mask", "logp_old", "logp_ref", "entropy"))


@pytest.mark.parametrize("dead, alive", [(1, 30), (30, 9)])
@torch.no_grad()
def test_groups_without_spread_are_replaced_until_all_have_one(actor, dead, alive):
    """The dead prompt is the shortest, so that what comes in its place is wider, or the longest.
    Each round samples for the dead places only, and the groups that live stay as they are."""
    reward = without_spread(dead)
    drawn = [dead, alive, dead]
    [(batch, texts, rows, share), config] = resampled(actor, drawn, reward, resample=30)
    first, *rounds = reward.calls
    assert share == pytest.approx(2 / 3) and first == [n for n in drawn for _ in range(G)]
    left = 2
    for numbers in rounds:
        assert len(numbers) == left * G
        left = sum(numbers[i * G] == dead for i in range(left))
    assert rounds and left == 0 and dead not in [row["number"] for row in rows]
    assert rows[1]["number"] == alive
    score = batch["score"].view(-1, G)
    assert (score.amax(1) > score.amin(1)).all()
    check_rollout(actor, batch, texts, rows, reward, config)
    plain, same = grpo.rollout(
        actor, Letters(), [row for n in drawn for row in PROMPTS if row["number"] == n], reward,
        config, torch.Generator().manual_seed(3), G)
    n = plain["y"].shape[1]
    assert same[G : 2 * G] == texts[G : 2 * G]
    assert torch.equal(plain["y"][G : 2 * G], batch["y"][G : 2 * G, :n])


@pytest.mark.parametrize("times", [None, 1, 3])
@torch.no_grad()
def test_they_are_replaced_at_most_as_often_as_resample_says(actor, times):
    reward = without_spread(1, 30, 9)
    [(batch, texts, rows, share), config] = resampled(actor, [1, 9], reward, resample=times)
    assert share == 1.0 and [len(numbers) for numbers in reward.calls] == [2 * G] * (
        1 + (times or 0))
    assert [row["number"] for row in rows] == (reward.calls[-1][::G])
    check_rollout(actor, batch, texts, rows, reward, config)


@torch.no_grad()
def test_nothing_is_replaced_where_every_group_has_spread(actor):
    reward = without_spread()
    [(batch, texts, rows, share), _] = resampled(actor, [1, 30, 9], reward, resample=3)
    assert share == 0.0 and len(reward.calls) == 1
    assert [row["number"] for row in rows] == [1, 30, 9]


@torch.no_grad()
def test_the_same_seed_replaces_by_the_same_groups(actor):
    a, b, other = (resampled(actor, [1, 30, 1], without_spread(1), seed, resample=4)[0]
                   for seed in (3, 3, 4))
    assert all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1:] == b[1:]
    assert other[1] != a[1]


def test_train_learns_from_the_groups_that_came_in_their_place(kind):
    """dead_groups is their share before, zero_std_groups their number after; the samples are those
    that were learnt from. Without --resample the two count the same."""
    for times in (30, None):
        model, seen, reward = toy(kind), [], without_spread(30)
        model.generation_config.eos_token_id = list(range(2, 18))
        config = grpo.Config(**{**RUN, "resample": times, "missing_eos_score": None})
        history = grpo.train(model, Letters(), PROMPTS, reward, config,
                             lambda row, samples, state: seen.append(samples))
        assert max(row["dead_groups"] for row in history) > 0
        for row, samples in zip(history, seen):
            dead = sum(sample["prompt"] == PROMPTS[1]["prompt"] for sample in samples)
            assert row["zero_std_groups"] == dead / G
            assert times is None or dead == 0
            assert times or row["dead_groups"] == row["zero_std_groups"] / 2


# ------------------------------------------------------------------------------ update


class Recorder:
    """An optimizer that keeps the gradients and moves nothing."""

    def __init__(self, parameters):
        self.parameters, self.steps = parameters, []

    def step(self):
        self.steps.append(torch.cat([p.grad.flatten() for p in self.parameters]).clone())

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def update(model, optimizer, batch, config):
    return grpo.update(model, optimizer, batch, config, torch.Generator().manual_seed(0))


def flat_gradient(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("fields", [
    {}, {"micro_batch_size": 4}, {"micro_batch_size": 2}, {"minibatches": 3, "loss": "gspo"},
])
def test_before_the_first_step_sampler_and_scorer_agree(actor, fields):
    """|log pi - log pi_old| < 1e-4 with prompts that are shared, of unequal length, and answers
    that end early. After the steps the policy has moved, and the statistics of the drift say so."""
    batch, _, config = collect(actor, ppo_epochs=3, clip_low=1e-3, clip_high=1e-3, **fields)
    parameters = lora.adapter_parameters(actor, "policy")
    still = grpo.drift(actor, batch, config)
    assert still["clip_fraction"] == 0.0 and abs(still["approx_kl"]) < 1e-8
    assert abs(still["ratio_max"] - 1) < 1e-4
    stats = update(actor, torch.optim.Adam(parameters, lr=1e-2), batch, config)
    assert 0 < stats["log_ratio_max"] < 1e-4
    moved = grpo.drift(actor, batch, config)
    assert moved["approx_kl"] > 1e-6 and moved["clip_fraction"] > 0 and moved["ratio_max"] > 1.001


@pytest.mark.parametrize("name", ["temperature", "position"])
def test_a_scorer_that_differs_from_the_sampler_shows_in_log_ratio_max(actor, name):
    """A batch whose log pi_old comes from another temperature, or from prompts with another
    padding taken for text, is told apart by far more than the 1e-4 of the test above."""
    batch, _, config = collect(actor)
    if name == "temperature":
        config = grpo.Config(**{**CONFIG, "temperature": 1.0})
    else:
        batch["x_mask"] = torch.ones_like(batch["x_mask"])
    stats = update(actor, Recorder(lora.adapter_parameters(actor, "policy")), batch, config)
    assert stats["log_ratio_max"] > 1e-2


@pytest.mark.parametrize("row", range(B))
def test_log_ratio_max_is_the_largest_of_all_micro_batches(actor, row):
    """One token of one answer is off, by 0.7 nats, whichever micro-batch it is in."""
    batch, _, config = collect(actor, micro_batch_size=2)
    batch["logp_old"][row, 0] += 0.7
    stats = update(actor, Recorder(lora.adapter_parameters(actor, "policy")), batch, config)
    assert stats["log_ratio_max"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2}, {"minibatches": 3}])
def test_on_a_bf16_base_they_agree_up_to_the_rounding_of_bf16(kind, fields):
    """Where another shape rounds otherwise, by 2^-8 of a logit, and these are around 1."""
    model = toy(kind).to(torch.bfloat16)
    add_adapters(model, kind, "policy", "reference")
    batch, _, config = collect(model, **fields)
    stats = update(model, Recorder(lora.adapter_parameters(model, "policy")), batch, config)
    assert stats["log_ratio_max"] < 2**-5


@pytest.mark.parametrize("ratio, low, high, clipped", [
    (1.5, 0.2, 0.4, 1.0), (1.5, 0.2, 0.6, 0.0), (0.7, 0.4, 0.2, 0.0), (0.7, 0.2, 0.4, 1.0),
])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_drift_of_a_known_shift(actor, loss, ratio, low, high, clipped):
    """Every token's ratio is known, so is k3 = rho - 1 - ln rho."""
    batch, _, config = collect(
        actor, micro_batch_size=2, clip_low=low, clip_high=high, loss=loss)
    batch["logp_old"] = (batch["logp_old"] - math.log(ratio)) * batch["mask"]
    found = grpo.drift(actor, batch, config)
    assert found["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert max(1.0, found["ratio_max"]) == pytest.approx(max(1.0, ratio), abs=1e-4)
    assert found["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-4)
    stats = update(actor, Recorder(lora.adapter_parameters(actor, "policy")), batch, config)
    assert stats["log_ratio_max"] == pytest.approx(abs(math.log(ratio)), abs=1e-4)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_drift_is_measured_on_the_whole_batch_after_the_update(actor, loss):
    """k3, and the share of tokens outside the clip range, of each row alone; in gspo all tokens of
    an answer are outside or none."""
    batch, _, config = collect(
        actor, ppo_epochs=2, micro_batch_size=4, loss=loss, clip_low=0.02, clip_high=0.06)
    parameters = lora.adapter_parameters(actor, "policy")
    update(actor, torch.optim.Adam(parameters, lr=3e-3), batch, config)
    found, k3, ratios = grpo.drift(actor, batch, config), [], []
    for b in range(B):
        prompt, answer = sequence(batch, b)
        with torch.no_grad():
            logp = logps_alone(actor, "policy", prompt, answer, config.temperature)
        d = (logp - batch["logp_old"][b, : len(answer)]).double()
        k3 += (d.exp() - 1 - d).tolist()
        ratios += [d.mean().exp().item()] * len(d) if loss == "gspo" else d.exp().tolist()
    outside = [not 0.98 <= r <= 1.06 for r in ratios]
    assert 0 < sum(outside) < len(outside)
    assert found == pytest.approx({
        "approx_kl": sum(k3) / len(k3), "clip_fraction": sum(outside) / len(outside),
        "ratio_max": max(ratios)}, rel=1e-3)


@pytest.mark.parametrize("loss, kl_in, kl", [
    *((loss, "loss", None) for loss in LOSSES), ("grpo", "loss", "k3"), ("grpo", "reward", None),
])
def test_first_gradient_is_the_policy_gradient_with_or_without_the_kl(actor, loss, kl_in, kl):
    """-sum w_i (A_i + beta log(pi_ref/pi)) grad log pi, row by row, unpadded; with k3, which is not
    the default, (pi_ref/pi - 1) for the logarithm; with --kl-in reward beta stays out of it."""
    more = {"kl": kl} if kl else {}
    batch, _, config = collect(actor, loss=loss, kl_in=kl_in, micro_batch_size=4, **more)
    parameters = lora.adapter_parameters(actor, "policy")
    tokens, surrogate = batch["mask"].sum().item(), 0.0
    for b in range(B):
        ids, n = sequence(batch, b), len(sequence(batch, b)[1])
        weight = {"dapo": 1 / tokens, "cispo": 1 / tokens, "dr_grpo": 1 / (B * 20)}.get(
            loss, 1 / (B * n))
        logp = logps_alone(actor, "policy", *ids, config.temperature)
        pull = logps_alone(actor, "reference", *ids, config.temperature) - logp
        pull = pull.exp() - 1 if kl == "k3" else pull
        gain = batch["adv"][b] + (config.beta * pull.detach() if kl_in == "loss" else 0.0)
        surrogate = surrogate - weight * (gain * logp).sum()
    expected = flat_gradient(surrogate, parameters)
    recorder = Recorder(parameters)
    stats = update(actor, recorder, batch, config)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    expected = expected * min(1.0, 1.0 / expected.norm().item())
    assert torch.allclose(recorder.steps[0], expected, atol=1e-5)


def gradients_alone(model, batch, config, parameters):
    """(value, gradient) of each update: the loss of rows that were read alone and unpadded, for the
    minibatches over prompts that a generator with seed 0 deals out."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(config.ppo_epochs):
        for groups in torch.randperm(len(PROMPTS), generator=generator).chunk(config.minibatches):
            rows = [int(i) * G + j for i in groups for j in range(G)]
            alone = [logps_alone(model, "policy", *sequence(batch, b), config.temperature)
                     for b in rows]
            R = max(map(len, alone))
            logp = torch.stack([torch.nn.functional.pad(x, (0, R - len(x))) for x in alone])
            old, ref, mask = (batch[key][rows, :R] for key in ("logp_old", "logp_ref", "mask"))
            value = grpo.grpo_loss(
                logp, old, ref, batch["adv"][rows], mask, config.clip_low, config.clip_high,
                config.beta, config.loss, config.max_new_tokens, config.kl)
            if config.loss in ("dapo", "cispo"):  # each token of the batch has the same weight
                value = value * mask.sum() / (batch["mask"].sum() / config.minibatches)
            found.append((value.item(), flat_gradient(value, parameters)))
    return found


@pytest.mark.parametrize("micro", [1, 2, 4, 6, None])
@pytest.mark.parametrize("loss, minibatches, kl", [
    ("grpo", 1, "k3"), ("dapo", 1, "k2"), ("dr_grpo", 1, "k3-corrected"), ("gspo", 1, "k3"),
    ("grpo", 3, "k3-corrected"), ("dapo", 3, "k2"), ("dr_grpo", 3, "k3"), ("gspo", 3, "k2"),
    ("cispo", 3, "k3-corrected"),
])
def test_micro_batches_give_the_gradient_of_the_whole(actor, loss, micro, minibatches, kl):
    """To 1e-5 of its norm, and the mean loss, away from ratio 1, with rows of unequal length. A
    micro-batch is two groups (6), one group (4), or a part of one group (2, 1)."""
    batch, _, config = collect(
        actor, loss=loss, minibatches=minibatches, kl=kl, ppo_epochs=2, micro_batch_size=micro,
        clip_low=0.02, clip_high=0.06)
    batch["logp_old"] = (batch["logp_old"] + 0.1 * noise(12, *batch["mask"].shape)) * batch["mask"]
    parameters = lora.adapter_parameters(actor, "policy")
    expected = gradients_alone(actor, batch, config, parameters)
    recorder = Recorder(parameters)
    stats = update(actor, recorder, batch, config)
    assert len(recorder.steps) == len(expected) == 2 * minibatches
    for found, (_, gradient) in zip(recorder.steps, expected):
        gradient = gradient / max(1.0, gradient.norm().item())  # as it is clipped
        assert gradient.norm() > 1e-3 and (found - gradient).norm() < 1e-5 * gradient.norm()
        assert (found - gradient).abs().max().item() < 1e-6
    values, norms = zip(*((value, gradient.norm().item()) for value, gradient in expected))
    means = [sum(values) / len(values), sum(norms) / len(norms)]
    assert [stats["loss"], stats["grad_norm"]] == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_the_answers_of_a_group_share_one_reading_of_their_prompt(actor):
    """In whole groups a prompt goes through the model once. A part of a group reads it again."""
    batch, _, config = collect(actor)
    read = []
    hook = actor.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    P, R = batch["x"].shape[1], batch["y"].shape[1]
    recorder = Recorder(lora.adapter_parameters(actor, "policy"))
    update(actor, recorder, batch, config)
    assert read == [(len(PROMPTS), P), (B, R)]
    read.clear()
    update(actor, recorder, batch, grpo.Config(**CONFIG, micro_batch_size=2))
    hook.remove()
    assert [rows for rows, _ in read] == [1, 2, 1] * len(PROMPTS)


def test_update_moves_the_policy_and_nothing_else_towards_the_better_answers(actor):
    """sum of A log pi rises; base, reference and reward model stay bit for bit what they were."""
    batch, _, config = collect(actor, ppo_epochs=4, beta=0.0, clip_low=0.9, clip_high=9.0)
    parameters = lora.adapter_parameters(actor, "policy")

    @torch.no_grad()
    def gain():
        return sum((batch["adv"][b] * logps_alone(actor, "policy", *sequence(batch, b), 0.7)).sum()
                   for b in range(B)).item()

    before, first = {k: p.detach().clone() for k, p in actor.named_parameters()}, gain()
    update(actor, torch.optim.Adam(parameters, lr=3e-3), batch, config)
    own = {id(p) for p in parameters}
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name
    assert gain() > first + 0.1


class Enough(Exception):
    pass


@pytest.mark.parametrize("kl_in, beta", [("loss", 0.0), ("reward", 0.3)])
def test_train_compares_answers_to_one_prompt_and_takes_the_kl_off_their_scores(
        kind, kl_in, beta, monkeypatch):
    """What reaches the update: G answers a prompt in a row, r_i less beta KL_i, leave-one-out."""
    model, seen = toy(kind), {}
    add_adapters(model, kind, "policy", "reference")

    def stop(model, optimizer, batch, *_):
        seen.update(batch)
        raise Enough

    monkeypatch.setattr(grpo, "update", stop)
    config = grpo.Config(
        adv="loo", beta=0.3, kl_in=kl_in, batch_size=6, group_size=3, max_length=64,
        max_new_tokens=9)
    with pytest.raises(Enough):
        grpo.train(model, Letters(), PROMPTS, stub_reward, config)
    rewards, kl = seen["score"].tolist(), []
    for b in range(6):
        prompt, answer = sequence(seen, b)
        assert prompt == sequence(seen, b - b % 3)[0]
        kl.append(sum((seen["logp_old"][b, t] - seen["logp_ref"][b, t]).item()
                      for t in range(len(answer))))
        rewards[b] -= beta * kl[b]
    for b, r in enumerate(rewards):
        others = [rewards[i] for i in range(6) if i // 3 == b // 3 and i != b]
        assert seen["adv"][b].item() == pytest.approx(r - sum(others) / 2, abs=1e-4)
    assert max(map(abs, kl)) > 0.1 and len({len(sequence(seen, b)[0]) for b in range(6)}) > 1


# ------------------------------------------------------------------------------ train


KEYS = {  # of metrics.jsonl
    "step", "seconds", "lr", "score", "score_std", "kl", "entropy", "eos_rate", "length", "loss",
    "ratio_max", "approx_kl", "clip_fraction", "grad_norm", "zero_std_groups", "dead_groups"}
NEW_KEYS = {"surprise", "surprise_z", "log_ratio_max"}
RUN = dict(CONFIG, steps=4, batch_size=6, lr=1e-2, minibatches=2, max_new_tokens=6,
           micro_batch_size=4)


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def values_of(model, name):
    return [p.detach().clone() for p in lora.adapter_parameters(model, name)]


def equal(a, b):
    """Whether two lists of tensors are the same, bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def in_a_thread(function, *args):
    """What `function` returns in a thread that is not the main one."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    assert found, "it raised"
    return found[0]


def run(model, log=None, state=None, **fields):
    """`train` on the toy. Of a new adapter one token in four ends an answer."""
    model.generation_config.eos_token_id = list(range(2, 18))
    config = grpo.Config(**{**RUN, **fields})
    return grpo.train(model, Letters(), PROMPTS, stub_reward, config, log, state)


def test_train_returns_one_row_a_step_with_the_keys_of_metrics_jsonl(kind, capfd):
    """It hands the same rows to log with G samples a prompt, and writes nothing to stdout."""
    seen = []
    history = run(toy(kind), log=lambda row, samples, state: seen.append((row, samples, state)))
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert all(set(row) == KEYS | NEW_KEYS for row in history)
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert [row for row, _, _ in seen] == history and capfd.readouterr().out == ""
    for row, samples, state in seen:
        assert state["step"] == row["step"] + 1 and len(samples) == 6
        assert [s["prompt"] for s in samples] == [samples[i - i % G]["prompt"] for i in range(6)]
        assert sum(s["score"] for s in samples) / 6 == pytest.approx(row["score"], abs=1e-4)
        assert all(isinstance(s["response"], str) for s in samples)


def test_the_first_row_of_a_new_adapter_has_no_kl_and_agrees_with_the_sampler(kind):
    """The reference is the bare base then, and the policy still is the reference."""
    row = run(toy(kind), steps=1)[0]
    assert abs(row["kl"]) < 1e-4 and row["log_ratio_max"] < 1e-4


def test_train_in_a_thread_returns_what_it_returns_in_the_main_one(kind):
    """And it leaves the random numbers of the caller and every signal handler as they were."""
    torch.manual_seed(11)
    before, handlers = torch.get_rng_state(), [signal.getsignal(s) for s in signal.valid_signals()]
    models = toy(kind), toy(kind)
    torch.set_rng_state(before)
    main, thread = run(models[0]), in_a_thread(run, models[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert [signal.getsignal(s) for s in signal.valid_signals()] == handlers
    assert without_seconds(main) == without_seconds(thread)
    assert equal(*(values_of(model, "policy") for model in models))


def test_a_new_adapter_does_not_depend_on_the_random_numbers_of_the_caller(kind):
    """Only on the seed of the config."""
    found = []
    for caller, seed in ((1, 0), (2, 0), (1, 5)):
        model = toy(kind)
        torch.manual_seed(caller)
        run(model, steps=1, seed=seed)
        found.append(values_of(model, "policy"))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_a_second_call_goes_on_from_the_policy_towards_the_same_reference(kind):
    model = toy(kind)
    run(model)
    policy, reference = values_of(model, "policy"), values_of(model, "reference")
    again = run(model, lr=0.0)
    assert equal(values_of(model, "policy"), policy)  # it starts where the first call ended
    assert again[0]["kl"] != 0 and abs(again[0]["kl"]) > 1e-3
    run(model)
    assert equal(values_of(model, "reference"), reference)
    assert not equal(values_of(model, "policy"), policy)


def test_the_reference_is_a_copy_of_the_adapter_that_was_loaded(kind):
    model = toy(kind)
    add_adapters(model, kind, "policy")
    start = values_of(model, "policy")
    history = run(model)
    assert equal(values_of(model, "reference"), start) and abs(history[0]["kl"]) < 1e-4
    assert not equal(values_of(model, "policy"), start)
    assert not any(p.requires_grad for p in lora.adapter_parameters(model, "reference"))


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


class Endless(Letters):
    """A tokenizer whose EOS the model cannot say."""

    eos_token_id = 1000


def any_score(prompts, responses, rows):
    """Numbers that depend on the texts, and differ."""
    return [sum(map(ord, response)) % 17 for response in responses]


@pytest.mark.parametrize("missing, learns", [(-3.0, False), (None, True)])
def test_a_base_that_never_stops_learns_only_without_a_missing_eos_score(kind, missing, learns):
    """With it all scores are equal: no advantage, no gradient. It can be switched off."""
    model = toy(kind)
    model.generation_config.eos_token_id = None
    config = grpo.Config(**{**RUN, "steps": 2, "missing_eos_score": missing, "beta": 0.0})
    history = grpo.train(model, Endless(), PROMPTS, any_score, config)
    assert [row["eos_rate"] for row in history] == [0.0, 0.0]
    for row in history:
        assert (row["score_std"] > 0.1) == learns and (row["grad_norm"] > 1e-4) == learns
        assert row["zero_std_groups"] == (0 if learns else 2)
    moved = any(layer.lora_B["policy"].any() for layer in lora.lora_layers(model).values())
    assert moved == learns


def test_a_group_of_equal_scores_is_counted_though_rounding_gives_it_a_spread(kind):
    constant = next(i / 37 for i in range(1, 200) if torch.full((1, 6), i / 37).std(1) > 0)
    config = grpo.Config(**{**RUN, "steps": 1, "batch_size": 6, "group_size": 6, "beta": 0.0,
                            "minibatches": 1, "missing_eos_score": None})
    [row] = grpo.train(
        toy(kind), Letters(), PROMPTS, lambda p, r, rows: [constant] * len(r), config)
    assert row["zero_std_groups"] == 1 and row["grad_norm"] == 0


@torch.no_grad()
def from_the_reference(model, batch):
    """The exact KL(policy || reference) in nats per token, at the states of a batch."""
    found = []
    for b in range(len(batch["y"])):
        p, q = (logits_alone(model, name, *sequence(batch, b)).log_softmax(-1)
                for name in ("policy", "reference"))
        found += (p.exp() * (p - q)).sum(-1).tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_with_the_reward_none_the_policy_learns_to_be_the_reference(kind, kl_in):
    """Distillation: every score is 0, so the KL alone is left, wherever it stands. The KL falls on
    the policy's own answers, and at the states where it began."""
    model = toy(kind)
    model.get_output_embeddings().weight.data *= 8  # logits that differ: policies that do, too
    add_adapters(model, kind, "policy", "reference")
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["reference"], std=1.0)
    nothing = rewards.load(Namespace(reward="none"), model, 64)
    config = grpo.Config(**{
        **CONFIG, "steps": 25, "batch_size": 24, "group_size": 8, "lr": 0.02, "kl_in": kl_in,
        "max_new_tokens": 6, "missing_eos_score": None, "adv": "loo", "beta": 1.0})
    batch, _ = grpo.rollout(model, Letters(), PROMPTS, nothing, config,
                            torch.Generator().manual_seed(5), 8)
    assert batch["score"].tolist() == [0.0] * 24
    before = from_the_reference(model, batch)
    history = grpo.train(model, Letters(), PROMPTS, nothing, config)
    assert all(row["score"] == 0 and row["dead_groups"] == 1 for row in history)
    kl = [row["kl"] for row in history]
    assert kl[0] > 4 and sum(kl[-3:]) / 3 < 0.5 * kl[0]
    assert before > 0.7 and from_the_reference(model, batch) < 0.75 * before


# ------------------------------------------------------------------------------ as a library


EXAMPLE = """
import contextlib, io, json, random, signal, sys
import datasets, torch, transformers
torch.set_num_threads(1)

def settings():
    return [
        [str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        transformers.utils.logging.get_verbosity(),
        transformers.utils.logging.is_progress_bar_enabled(),
        datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled(),
        datasets.is_caching_enabled(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(), random.getstate()]

before, out = settings(), io.StringIO()
with contextlib.redirect_stdout(out):
    import common, grpo
    model, tokenizer = common.load_model("tiny")
    rows = [{"prompt": "Tell me about ants."}, {"prompt": "What is rain?"}] * 4
    history = grpo.train(
        model, tokenizer, rows,
        lambda prompts, responses, rows: [-abs(len(r.split()) - 20) / 10 for r in responses],
        grpo.Config(steps=10, batch_size=8, group_size=4, lr=1e-3, temperature=0.5,
                    max_new_tokens=64))
print(json.dumps({"same": settings() == before, "out": out.getvalue(), "history": history,
                  "cli": any(name.split(".")[0] == "cli" for name in sys.modules)}))
"""


@pytest.fixture(scope="module")
def example():
    """What the library example does in a process of its own: what it imports counts, too."""
    done = subprocess.run([sys.executable, "-c", EXAMPLE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_library_example_changes_no_handler_no_global_setting_and_prints_nothing(example):
    assert example["same"] and example["out"] == "" and not example["cli"]
    assert [row["step"] for row in example["history"]] == list(range(10))
