import copy
import json
import math
import random
import threading
from argparse import Namespace
from dataclasses import replace

import numpy
import pytest
import torch
from conftest import TARGETS, toy

import common
import lora
import ppo

MASK = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LENGTHS = [5, 2, 3, 1]


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_junk(x, junk=1e3):
    return torch.where(MASK > 0, x, junk)



# ------------------------------------------------------------------------------ token_logps


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logps_are_log_softmax_at_the_temperature(temperature):
    logits, ids = noise(0, 2, 3, 6) * 3, torch.tensor([[0, 5, 2], [3, 3, 1]])
    logp = ppo.token_logps(logits, ids, temperature)
    library = torch.log_softmax(logits / temperature, -1)
    for b in range(2):
        for t in range(3):
            y = ids[b, t].item()
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            assert logp[b, t].item() == pytest.approx(math.log(weights[y] / sum(weights)), abs=1e-5)
            assert logp[b, t].item() == pytest.approx(library[b, t, y].item(), abs=1e-6)


def test_token_logps_of_bf16_and_of_huge_logits_are_finite_fp32():
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]]).bfloat16()
    logp = ppo.token_logps(logits, torch.tensor([[2]]))
    assert logp.dtype == torch.float32 and logp.item() == pytest.approx(-2000.0)


# ------------------------------------------------------------------------------ masks, rewards


def test_masked_mean_weighs_every_real_token_the_same():
    """(1 + 2 + 3 + 10) / 4, and not the mean 6 of the two row means."""
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, -77.0, 55.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert ppo.masked_mean(x, mask).item() == 4.0


def test_kl_shaped_rewards_by_hand():
    """-beta (logp - logp_ref) on each token, and the score on the last real one."""
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 8.0, 9.0]])
    logp_ref = torch.tensor([[-1.5, -1.0, -3.0], [-0.1, -7.0, 5.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    rewards = ppo.kl_shaped_rewards(torch.tensor([2.0, -3.0]), logp, logp_ref, mask, beta=0.1)
    expected = torch.tensor([[-0.05, 0.1, 2.0], [0.04 - 3.0, 0.0, 0.0]])
    assert torch.allclose(rewards, expected, atol=1e-6)


def test_rewards_of_a_response_add_up_to_score_minus_beta_kl():
    score, logp, ref = noise(0, 4), with_junk(noise(1, 4, 5)), with_junk(noise(2, 4, 5), -9.0)
    total = ppo.kl_shaped_rewards(score, logp, ref, MASK, 0.3).sum(1)
    for b, n in enumerate(LENGTHS):
        kl = sum((logp[b, t] - ref[b, t]).item() for t in range(n))
        assert total[b].item() == pytest.approx(score[b].item() - 0.3 * kl, abs=1e-5)


def test_rewards_are_detached():
    logp = torch.zeros(1, 2, requires_grad=True)
    rewards = ppo.kl_shaped_rewards(torch.ones(1), logp, torch.zeros(1, 2), torch.ones(1, 2), 0.1)
    assert not rewards.requires_grad


def test_rewards_of_an_empty_response_raise():
    zero, mask = torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 0]])
    with pytest.raises(ValueError, match="no token"):
        ppo.kl_shaped_rewards(torch.zeros(2), zero, zero, mask, 0.1)


# ------------------------------------------------------------------------------ gae, whiten


def gae_as_a_sum(rewards, values, n, t, gamma, lam):
    """sum over l of (gamma lam)^l delta_{t+l}, V = 0 from the end on."""
    v = values[:n] + [0.0]
    return sum((gamma * lam) ** l * (rewards[t + l] + gamma * v[t + l + 1] - v[t + l])
               for l in range(n - t))


def gae_as_a_mixture(rewards, values, n, t, gamma, lam):
    """(1 - lam) sum over k of lam^(k-1) times the k-step advantage, the rest on the full return."""
    def k_step(k):
        bootstrap = values[t + k] if t + k < n else 0.0
        steps = sum(gamma**i * rewards[t + i] for i in range(k))
        return steps + gamma**k * bootstrap - values[t]

    last = n - t
    mixed = sum((1 - lam) * lam ** (k - 1) * k_step(k) for k in range(1, last))
    return mixed + lam ** (last - 1) * k_step(last)


@pytest.mark.parametrize("definition", [gae_as_a_sum, gae_as_a_mixture])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.5, 1.0), (1.0, 0.0)])
def test_gae_equals_its_definition(definition, gamma, lam):
    rewards, values = with_junk(noise(3, 4, 5)), with_junk(noise(4, 4, 5), -500.0)
    adv, ret = ppo.gae(rewards, values, MASK, gamma, lam)
    for b, n in enumerate(LENGTHS):
        for t in range(5):
            expected = (definition(rewards[b].tolist(), values[b].tolist(), n, t, gamma, lam)
                        if t < n else 0.0)
            assert adv[b, t].item() == pytest.approx(expected, abs=1e-5)
            expected_ret = expected + values[b, t].item() if t < n else 0.0
            assert ret[b, t].item() == pytest.approx(expected_ret, abs=1e-5)


def test_gae_ignores_what_stands_in_the_padding():
    rewards, values = noise(3, 4, 5), noise(4, 4, 5)
    clean = ppo.gae(rewards, values, MASK, 0.9, 0.8)
    for junk in (1e6, -1e6):
        dirty = ppo.gae(with_junk(rewards, junk), with_junk(values, junk), MASK, 0.9, 0.8)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def test_return_at_lambda_1_is_the_sum_of_rewards_to_come():
    """Whatever the critic says; gamma = 1."""
    rewards = torch.tensor([[1.0, -2.0, 4.0]])
    _, ret = ppo.gae(rewards, noise(5, 1, 3), torch.ones(1, 3), 1.0, 1.0)
    assert ret[0].tolist() == pytest.approx([3.0, 2.0, 4.0], abs=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    rewards = torch.tensor([[1.0, -2.0, 4.0]])
    adv, _ = ppo.gae(rewards, torch.tensor([[3.0, 2.0, 4.0]]), torch.ones(1, 3), 1.0, 0.7)
    assert adv.abs().max().item() < 1e-6


def test_whiten_by_hand():
    """Tokens 1, 3 and 8: mean 4, biased variance 26/3; the padding is 0 and does not count."""
    x = torch.tensor([[1.0, 3.0], [8.0, 999.0]])
    white = ppo.whiten(x, torch.tensor([[1.0, 1], [1, 0]]))
    scale = math.sqrt(26 / 3)
    assert white.flatten().tolist() == pytest.approx(
        [-3 / scale, -1 / scale, 4 / scale, 0.0], abs=1e-6)


def test_whiten_adds_its_epsilon_to_the_variance():
    """Of +-1e-4 the variance is 1e-8, the epsilon as much again: +-1/sqrt 2. Equal stays 0."""
    white = ppo.whiten(torch.tensor([[1e-4, -1e-4]]), torch.ones(1, 2))
    assert white[0].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-4)
    assert ppo.whiten(torch.full((1, 3), 5.0), torch.ones(1, 3)).abs().max().item() == 0.0


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("adv, ratio, flat", [
    (1.0, 1.5, True), (1.0, 1.1, False), (1.0, 0.9, False), (1.0, 0.5, False),
    (-1.0, 1.5, False), (-1.0, 1.1, False), (-1.0, 0.9, False), (-1.0, 0.5, True),
])
def test_clip_truth_table(adv, ratio, flat):
    """No gradient only where the ratio has left 1 +- eps on the side of gain; else -A rho."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    ppo.policy_loss(logp, zero, torch.tensor([[adv]]), one, eps=0.2).backward()
    assert logp.grad.item() == pytest.approx(0.0 if flat else -adv * ratio, abs=1e-6)


def test_policy_loss_by_hand():
    """-1.2 * 2, -0.5 * 2, +1.5 * 1, +0.8 * 1, -1.1 * 3; mean of five, the sixth is padding."""
    ratio = torch.tensor([[1.5, 0.5, 1.5], [0.5, 1.1, 1.7]])
    adv = torch.tensor([[2.0, 2.0, -1.0], [-1.0, 3.0, 50.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    old = noise(6, 2, 3)
    loss = ppo.policy_loss(old + ratio.log(), old, adv, mask, eps=0.2)
    assert loss.item() == pytest.approx((-2.4 - 1.0 + 1.5 + 0.8 - 3.3) / 5, abs=1e-6)


@pytest.mark.parametrize("logp_junk, adv_junk", [(3.0, 50.0), (-3.0, -50.0), (200.0, 0.0)])
def test_policy_loss_and_gradient_ignore_the_padding(logp_junk, adv_junk):
    """Even where the ratio of two padding tokens overflows fp32 (e^200)."""
    results = []
    for filler, adv_filler in ((0.0, 0.0), (logp_junk, adv_junk)):
        logp = with_junk(noise(7, 4, 5) * 0.1, filler).requires_grad_()
        adv = with_junk(noise(8, 4, 5), adv_filler)
        loss = ppo.policy_loss(logp, torch.zeros(4, 5), adv, MASK, 0.2)
        loss.backward()
        results.append((loss.item(), logp.grad.flatten().tolist()))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-6)


@pytest.mark.parametrize("value, old, ret, loss, slope", [
    (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),   # inside the clip
    (1.0, 0.0, 2.0, 0.5 * 1.8**2, 0.0),    # ran ahead towards the return: held back
    (-1.0, 0.0, -2.0, 0.5 * 1.8**2, 0.0),  # the same downwards
    (1.0, 0.0, -1.0, 0.5 * 2.0**2, 2.0),   # ran away from the return: full error
    (-1.0, 0.0, 1.0, 0.5 * 2.0**2, -2.0),  # the same downwards
])
def test_value_loss_by_hand(value, old, ret, loss, slope):
    values = torch.tensor([[value, 7.0]], requires_grad=True)
    old, ret = torch.tensor([[old, -7.0]]), torch.tensor([[ret, 70.0]])
    got = ppo.value_loss(values, old, ret, torch.tensor([[1.0, 0.0]]), eps=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad[0].tolist() == pytest.approx([slope, 0.0], abs=1e-6)


def test_value_loss_is_the_mean_over_real_tokens():
    """Errors 0.1, 0.2 and 0.1 on three real tokens: half of 0.06 / 3."""
    mask = torch.tensor([[1.0, 1], [1, 0]])
    ret = torch.tensor([[0.1, 0.2], [-0.1, 9.0]])
    loss = ppo.value_loss(torch.zeros(2, 2), torch.zeros(2, 2), ret, mask, 0.2)
    assert loss.item() == pytest.approx(0.01, abs=1e-7)


@pytest.mark.parametrize("kl, factor", [
    (6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98),
])
def test_adapt_beta_by_hand(kl, factor):
    """Target 6: a tenth of the relative error, which is clipped at 0.2."""
    assert ppo.adapt_beta(0.5, kl, 6.0) == pytest.approx(0.5 * factor, abs=1e-9)


def test_explained_variance_by_hand():
    """Residuals 1, 0, -1 of returns 2, 4, 6: 1 - 2/8, whatever constant the critic is off by."""
    mask = torch.tensor([[1.0, 1], [1, 0]])
    ret, values = torch.tensor([[2.0, 4], [6, 0]]), torch.tensor([[1.0, 4], [7, 99]])
    for shift in (0.0, 5.0):
        assert ppo.explained_variance(values + shift, ret, mask) == pytest.approx(0.75, abs=1e-6)
    assert ppo.explained_variance(ret, ret, mask) == pytest.approx(1.0, abs=1e-6)
    assert ppo.explained_variance(torch.ones(2, 2), ret, mask) == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------ the KL table


V = 6


def categorical():
    """theta; p = pi, log pi and log ref of each of the V tokens (log pi with gradient) by
    token_logps; a sum weighted with p is the exact expectation over y ~ pi."""
    theta = noise(10, V).double().requires_grad_()
    ids = torch.arange(V).unsqueeze(1)
    logp = ppo.token_logps(theta.float().expand(V, 1, V), ids)
    logp_ref = ppo.token_logps(noise(11, V).expand(V, 1, V), ids)
    return theta, logp.exp().detach(), logp, logp_ref


def exact_gradients():
    """KL, and the gradients p_v (lr_v - KL) of KL(pi || ref) and p_v - q_v of KL(ref || pi)."""
    weights, others = ([math.exp(x) for x in noise(seed, V).tolist()] for seed in (10, 11))
    p, q = [w / sum(weights) for w in weights], [w / sum(others) for w in others]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    return kl, [a * (math.log(a / b) - kl) for a, b in zip(p, q)], [a - b for a, b in zip(p, q)]


def gradient(theta, loss):
    return torch.autograd.grad(loss, theta)[0].tolist()


def test_kl_value_k1_and_k3_are_unbiased_and_k2_is_not():
    _, p, logp, logp_ref = categorical()
    lr = (logp - logp_ref).detach()
    kl, _, _ = exact_gradients()
    k1, k2, k3 = ((p * k).sum().item() for k in (lr, lr**2 / 2, (-lr).expm1() + lr))
    assert k1 == pytest.approx(kl, abs=1e-6) and k3 == pytest.approx(kl, abs=1e-6)
    assert abs(k2 - kl) > 0.01 and ((-lr).expm1() + lr).min() >= 0 and lr.min() < 0


def test_k1_in_the_loss_has_no_gradient():
    theta, p, logp, logp_ref = categorical()
    loss = (p * (logp - logp_ref)).sum()
    assert loss.item() > 0.1
    assert gradient(theta, loss) == pytest.approx([0.0] * V, abs=1e-6)


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    """kl_shaped_rewards as advantages of policy_loss: exactly beta grad KL(pi || ref)."""
    theta, p, logp, logp_ref = categorical()
    beta, mask = 0.3, torch.ones(V, 1)
    rewards = ppo.kl_shaped_rewards(torch.zeros(V), logp, logp_ref, mask, beta)
    loss = ppo.policy_loss(logp, logp.detach(), V * p * rewards, mask, eps=0.2)
    _, reverse, _ = exact_gradients()
    assert max(map(abs, reverse)) > 0.05
    assert gradient(theta, loss) == pytest.approx([beta * g for g in reverse], abs=1e-6)


def test_k2_in_the_loss_has_the_gradient_of_the_kl():
    theta, p, logp, logp_ref = categorical()
    _, reverse, _ = exact_gradients()
    loss = (p * (logp - logp_ref).square() / 2).sum()
    assert gradient(theta, loss) == pytest.approx(reverse, abs=1e-6)


def test_k3_in_the_loss_has_the_gradient_of_the_other_kl():
    """That of KL(ref || pi); times the differentiable ratio it has that of KL(pi || ref)."""
    theta, p, logp, logp_ref = categorical()
    _, reverse, forward = exact_gradients()
    k3 = (logp_ref - logp).expm1() + logp - logp_ref
    assert max(abs(a - b) for a, b in zip(reverse, forward)) > 0.01
    ratio = (logp - logp.detach()).exp()
    corrected = torch.autograd.grad((p * ratio * k3).sum(), theta, retain_graph=True)[0].tolist()
    assert corrected == pytest.approx(reverse, abs=1e-6)
    assert gradient(theta, (p * k3).sum()) == pytest.approx(forward, abs=1e-6)


# ------------------------------------------------------------------------------ toys


class Letters:
    """The least of a tokenizer: a letter is a token, 1 is BOS, 2 is EOS. Letters and the colon come
    back from decoding as they were."""

    chat_template, eos_token_id = None, 2

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        ids = [3 + ord(c) % 61 for c in text]
        return Namespace(input_ids=[1] * add_special_tokens + ids)

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(":" if i == 61 else chr(58 + i) for i in row if i > 2) for row in rows]


ROWS = [{"prompt": "a" * n, "number": n} for n in (1, 9, 4, 30, 2, 17)]
FIELDS = dict(
    batch_size=len(ROWS), max_length=64, max_new_tokens=9, temperature=0.7, missing_eos_score=-3.0,
    ppo_epochs=1, minibatches=1, clip=0.2, value_clip=0.2, gamma=0.99, lam=0.95, beta=0.1,
    lora_rank=4,
)


def stub_reward(prompts, responses, rows):
    return [row["number"] / 10 + len(r) for r, row in zip(responses, rows)]


@pytest.fixture
def actor(kind):
    return make_actor(kind)


def make_actor(kind, dtype=torch.float32):
    """A toy that stops at one token in four, with the three adapters of PPO, none of them zero."""
    model = toy(kind).to(dtype)
    model.generation_config.eos_token_id = list(range(2, 18))
    for name, trainable in (("policy", True), ("reference", False), ("critic", True)):
        lora.add_adapter(model, name, rank=4, targets=TARGETS[kind], trainable=trainable)
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.2)
    lora.add_head(model, "critic")
    return model


def make_base(kind):
    """A toy without adapters that stops at one token in four; its weights are four times as large,
    so that it cares for what it has read and where."""
    model = toy(kind)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(4)
    model.generation_config.eos_token_id = list(range(2, 18))
    return model


def checkpoint(model):
    """Turns checkpointing on. Dropout, which goes by the same mode, is 0 in a loaded model."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or key == "p"):
                setattr(module, key, 0.0)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.22 on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    assert common.checkpointing(model)


def collect(model, reference="reference", **fields):
    """(batch, texts, config): a rollout with its advantages, as `train` makes it."""
    config, generator = ppo.Config(**{**FIELDS, **fields}), torch.Generator().manual_seed(3)
    batch, texts = ppo.rollout(
        model, Letters(), ROWS, stub_reward, config, generator, reference=reference)
    rewards = ppo.kl_shaped_rewards(
        batch["score"], batch["logp_old"], batch["logp_ref"], batch["mask"], config.beta)
    adv, batch["ret"] = ppo.gae(
        rewards, batch["values_old"], batch["mask"], config.gamma, config.lam)
    batch["adv"] = ppo.whiten(adv, batch["mask"])
    return batch, texts, config


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def parameters_of(model, names=("policy", "critic")):
    return [p for name in names for p in lora.adapter_parameters(model, name)]


def sequence(batch, b):
    """(prompt + answer ids without padding, number of answer tokens) of answer b."""
    n = int(batch["mask"][b].sum())
    return batch["x"][b][batch["x_mask"][b] == 1].tolist() + batch["y"][b, :n].tolist(), n


def logps_alone(model, adapter, ids, n, temperature):
    with lora.use_adapter(model, adapter):
        logits = model(torch.tensor([ids])).logits[0] / temperature
    logp = logits.log_softmax(-1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(len(ids) - n, len(ids))])


def values_alone(model, ids, n):
    with lora.use_adapter(model, "critic"):
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return (hidden @ model.heads["critic"].weight[0])[len(ids) - n - 1 : len(ids) - 1]


# ------------------------------------------------------------------------------ rollout


def test_the_rollout_has_unequal_prompts_and_an_early_eos(actor):
    """The premise of the tests below."""
    batch, _, _ = collect(actor)
    assert len(set(batch["x_mask"].sum(1).tolist())) == len(ROWS)
    assert batch["mask"].sum(1).min() < batch["mask"].shape[1]


@pytest.mark.parametrize("reference, micro", [("reference", None), (None, 4)])
@torch.no_grad()
def test_rollout_logps_are_those_of_each_row_alone(actor, reference, micro):
    """Unpadded, at the sampling temperature, whatever the micro-batch; None is the bare base."""
    batch, _, config = collect(actor, reference, micro_batch_size=micro)
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        for key, name in (("logp_old", "policy"), ("logp_ref", reference)):
            alone = logps_alone(actor, name, ids, n, config.temperature)
            assert torch.allclose(batch[key][b, :n], alone, atol=1e-5)
            assert batch[key][b, n:].eq(0).all()
        assert torch.allclose(batch["values_old"][b, :n], values_alone(actor, ids, n), atol=1e-5)
        assert batch["values_old"][b, n:].eq(0).all()


@pytest.mark.parametrize("micro", [None, 1, 4])
@torch.no_grad()
def test_batch_logps_are_in_the_order_of_the_batch(actor, micro):
    """A micro-batch takes the shortest answers first; what comes back is sorted as it was."""
    batch, _, config = collect(actor, micro_batch_size=micro)
    logps = ppo.batch_logps(actor, "critic", batch, config)
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        alone = logps_alone(actor, "critic", ids, n, config.temperature)
        assert torch.allclose(logps[b, :n], alone, atol=1e-5) and logps[b, n:].eq(0).all()


def test_the_mask_ends_with_the_first_stop_token(actor):
    """And an answer that did not stop scores --missing-eos-score instead of its reward."""
    batch, texts, _ = collect(actor, max_new_tokens=3)
    R, stopped = batch["mask"].shape[1], 0
    for b, row in enumerate(ROWS):
        ids, n = sequence(batch, b)
        response = ids[-n:]
        assert batch["mask"][b].tolist() == [1.0] * n + [0.0] * (R - n)
        assert not any(2 <= i < 18 for i in response[:-1])
        ended = 2 <= response[-1] < 18
        assert ended or n == R
        assert batch["ended"][b].item() == ended
        stopped += ended
        expected = row["number"] / 10 + len(texts[b]) if ended else -3.0
        assert batch["score"][b].item() == pytest.approx(expected, abs=1e-5)
    assert 0 < stopped < len(ROWS)
    assert ppo.rollout_stats(batch)["eos_rate"] == pytest.approx(stopped / len(ROWS))


def test_without_a_missing_eos_score_every_score_is_the_rewards(actor):
    """--missing-eos-score none, of answers of which some were cut off."""
    batch, texts, _ = collect(actor, max_new_tokens=3, missing_eos_score=None)
    assert 0 < batch["ended"].sum() < len(ROWS)
    assert batch["score"].tolist() == pytest.approx(stub_reward(None, texts, ROWS), abs=1e-5)


def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_the_response(actor):
    """Prompt and answer together never exceed --max-length."""
    batch, _, config = collect(actor, max_length=32)
    P = batch["x"].shape[1]
    whole = [Letters()(f"User: {row['prompt']}\n\nAssistant:").input_ids for row in ROWS]
    for b, prompt in enumerate(whole):
        kept = batch["x"][b][batch["x_mask"][b] == 1].tolist()
        assert kept == prompt[-(32 - config.max_new_tokens):]
    assert P == 32 - config.max_new_tokens and min(map(len, whole)) < P


def test_rollout_statistics_by_hand(actor):
    """kl sums over an answer and averages over answers; entropy and surprise average over tokens.
    The z-score is the excess of surprise over entropy in standard errors."""
    batch, _, config = collect(actor)
    kl, entropy, surprise = [], [], []
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        kl.append((batch["logp_old"][b, :n] - batch["logp_ref"][b, :n]).sum().item())
        with torch.no_grad(), lora.use_adapter(actor, "policy"):
            logits = actor(torch.tensor([ids])).logits[0, -n - 1 : -1] / config.temperature
        entropy += torch.distributions.Categorical(logits=logits).entropy().tolist()
        surprise += (-batch["logp_old"][b, :n]).tolist()
    score, tokens = batch["score"].tolist(), len(entropy)
    mean = sum(score) / len(score)
    excess = [s - e for s, e in zip(surprise, entropy)]
    assert ppo.rollout_stats(batch) == pytest.approx({
        "score": mean,
        "score_std": math.sqrt(sum((s - mean) ** 2 for s in score) / len(score)),
        "kl": sum(kl) / len(kl), "entropy": sum(entropy) / tokens,
        "surprise": sum(surprise) / tokens,
        "surprise_z": sum(excess) / math.sqrt(sum(e**2 for e in excess)),
        "eos_rate": batch["ended"].sum().item() / len(ROWS), "length": tokens / len(ROWS),
    }, abs=1e-4)


# ------------------------------------------------------------------------------ models


def test_new_models_change_nothing_yet_and_the_critic_says_0(kind):
    """policy and reference are the bare base; all is there at once, trained or frozen."""
    model, config = make_base(kind), ppo.Config(**FIELDS)
    ppo.make_models(model, stub_reward, config)
    batch, _, config = collect(model)
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        alone = logps_alone(model, None, ids, n, config.temperature)
        assert torch.allclose(batch["logp_old"][b, :n], alone, atol=1e-5)
        assert torch.allclose(batch["logp_ref"][b, :n], alone, atol=1e-5)
    assert batch["values_old"].eq(0).all()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters_of(model)}
    assert lora.names(model) == {"policy", "reference", "critic"}


def test_models_that_are_there_stay_as_they_are(actor):
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    ppo.make_models(actor, stub_reward, ppo.Config(**FIELDS))
    assert before.keys() == {name for name, _ in actor.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in actor.named_parameters())


def test_the_reference_is_a_copy_of_a_policy_that_was_loaded(kind):
    model = make_base(kind)
    lora.add_adapter(model, "policy", rank=4, targets=TARGETS[kind])
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["policy"], std=0.2)
    ppo.make_models(model, stub_reward, ppo.Config(**FIELDS))
    policy, reference, critic = (
        lora.adapter_parameters(model, name) for name in ("policy", "reference", "critic"))
    assert torch.equal(flat(reference), flat(policy))
    assert torch.equal(flat(critic[:-1]), flat(policy)) and not critic[-1].any()


def test_the_critic_starts_from_a_reward_model_on_this_base(kind):
    """With its head, as a copy that is trained; the reward model itself is not."""
    model = make_base(kind)
    lora.add_adapter(model, "judge", rank=2, targets=TARGETS[kind], trainable=False)
    lora.add_head(model, "judge").requires_grad_(False)
    ppo.make_models(model, "judge", ppo.Config(**FIELDS))
    judge, critic = (lora.adapter_parameters(model, name) for name in ("judge", "critic"))
    assert torch.equal(flat(critic), flat(judge))
    assert all(p.requires_grad for p in critic) and not any(p.requires_grad for p in judge)


# ------------------------------------------------------------------------------ update


class Recorder:
    """An optimizer that keeps the gradients and moves nothing."""

    def __init__(self, parameters):
        self.parameters, self.steps = parameters, []

    def step(self):
        self.steps.append(flat(p.grad for p in self.parameters))

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def adam(model, lr):
    return torch.optim.AdamW(parameters_of(model), lr=lr, weight_decay=0.0)


def update(model, optimizer, batch, config, seed=0):
    return ppo.update(model, optimizer, batch, config, torch.Generator().manual_seed(seed))


def gradients_alone(model, batch, config):
    """Of mean -A log pi for the policy and mean (V - G) V for the critic, row by row, unpadded."""
    l_pi = l_v = 0.0
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        logp = logps_alone(model, "policy", ids, n, config.temperature)
        values = values_alone(model, ids, n)
        error = (values - batch["ret"][b, :n]).detach()
        l_pi = l_pi - (batch["adv"][b, :n] * logp).sum()
        l_v = l_v + (error * values).sum()
    tokens = batch["mask"].sum().item()
    return [flat(torch.autograd.grad(loss / tokens, parameters_of(model, [name])))
            for loss, name in ((l_pi, "policy"), (l_v, "critic"))]


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2}, {"minibatches": 2}])
def test_sampler_and_scorer_agree_on_a_bf16_base_up_to_the_rounding_of_bf16(kind, fields):
    """By 2^-8 of a logit, and these are around 1; the two take other paths through the model."""
    model = make_actor(kind, torch.bfloat16)
    batch, _, config = collect(model, **fields)
    assert update(model, adam(model, 1e-2), batch, config)["log_ratio_max"] < 2**-6


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2}, {"minibatches": 2}])
def test_the_ratio_is_1_before_the_first_step_and_not_after_the_last(actor, fields):
    """|log ratio| < 1e-4, nothing clipped, approx KL 0; after the steps none of it holds."""
    batch, _, config = collect(actor, ppo_epochs=3, clip=1e-3, **fields)
    before = ppo.drift(actor, batch, config)
    assert before["clip_fraction"] == 0.0 and abs(before["approx_kl"]) < 1e-8
    assert before["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    stats = update(actor, adam(actor, 1e-2), batch, config)
    assert stats["log_ratio_max"] < 1e-4
    after = ppo.drift(actor, batch, config)
    assert after["approx_kl"] > 1e-6 and after["clip_fraction"] > 0 and after["ratio_max"] > 1.001


@pytest.mark.parametrize("ratio", [1.5, 1 / 1.5])
def test_statistics_of_a_known_shift(actor, ratio):
    """logp_old lower by ln 1.5 on every token: ratio 1.5, all clipped, k3 = 0.5 - ln 1.5; or
    higher by as much."""
    batch, _, config = collect(actor, micro_batch_size=2)
    batch["logp_old"] = batch["logp_old"] - math.log(ratio) * batch["mask"]
    stats = update(actor, Recorder(parameters_of(actor)), batch, config)
    moved = ppo.drift(actor, batch, config)
    assert moved["clip_fraction"] == pytest.approx(1.0, abs=1e-6)
    assert moved["ratio_max"] == pytest.approx(max(ratio, 1.0), abs=1e-4)  # 1 on padding
    assert moved["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-4)
    assert stats["log_ratio_max"] == pytest.approx(math.log(1.5), abs=1e-4)
    adv, clipped = batch["adv"][batch["mask"] > 0].tolist(), min(max(ratio, 0.8), 1.2)
    expected = sum(max(-ratio * a, -clipped * a) for a in adv) / len(adv)
    assert stats["policy_loss"] == pytest.approx(expected, abs=1e-3)


def test_the_values_are_clipped_by_an_eps_of_their_own(actor):
    """V_old is V + 1 and G is V - 2: cut off at V_old - 0.5, V is 2.5 above G."""
    batch, _, config = collect(actor, clip=0.2, value_clip=0.5)
    batch["ret"] = (batch["values_old"] - 2) * batch["mask"]
    batch["values_old"] = batch["values_old"] + batch["mask"]
    stats = update(actor, Recorder(parameters_of(actor)), batch, config)
    assert stats["value_loss"] == pytest.approx(0.5 * 2.5**2, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_policy_and_critic_have_the_gradients_of_their_losses_each_clipped_alone(actor, scale):
    """-mean A grad log pi and mean (V - G) grad V; the logged norm is the policy's, unclipped."""
    batch, _, config = collect(actor)
    batch["adv"] = scale / 10 * batch["adv"]
    expected = gradients_alone(actor, batch, config)
    recorder = Recorder(parameters_of(actor))
    stats = update(actor, recorder, batch, config)
    norms = [g.norm().item() for g in expected]
    assert stats["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert norms[1] > 1 and (norms[0] > 1) == (scale > 1)
    clipped = torch.cat([g / max(1.0, norm) for g, norm in zip(expected, norms)])
    assert torch.allclose(recorder.steps[0], clipped, atol=1e-5)


@pytest.mark.parametrize("micro, minibatches, saving", [
    (1, 1, False), (4, 1, False), (2, 2, False), (4, 1, True),
])
def test_micro_batches_give_the_gradient_of_the_whole(actor, micro, minibatches, saving):
    """To 1e-6, with the same statistics, away from ratio 1, with rows of unequal length;
    checkpointed layers change nothing either."""
    batch, _, config = collect(actor, minibatches=minibatches)
    batch["logp_old"] = batch["logp_old"] + 0.1 * noise(12, *batch["mask"].shape) * batch["mask"]
    results = []
    for size in (None, micro):
        if saving and size == micro:
            checkpoint(actor)
        config, recorder = replace(config, micro_batch_size=size), Recorder(parameters_of(actor))
        stats = update(actor, recorder, batch, config)
        results.append(({**stats, **ppo.drift(actor, batch, config)}, recorder.steps))
    (whole, gradients), (parts, micro_gradients) = results
    assert len(gradients) == len(micro_gradients) == minibatches
    for a, b in zip(gradients, micro_gradients):
        assert a.norm() > 1e-3 and (a - b).abs().max().item() < 1e-6
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("minibatches", [1, 2, 3, 6])
def test_every_token_of_the_batch_weighs_the_same_in_whatever_minibatch(actor, minibatches, micro):
    """At fixed parameters, and far below the clip, the gradients of all minibatches add up to that
    of the mean over the whole batch, times their number."""
    batch, _, config = collect(actor, minibatches=minibatches, micro_batch_size=micro)
    lengths = batch["mask"].sum(1)
    assert lengths.max() >= 2 * lengths.min()  # else this would hold for a mean of means, too
    batch["adv"] = 0.01 * batch["adv"]
    batch["ret"] = batch["values_old"] + 0.01 * noise(13, *lengths.shape, 1) * batch["mask"]
    expected = torch.cat(gradients_alone(actor, batch, config))
    recorder = Recorder(parameters_of(actor))
    update(actor, recorder, batch, config)
    assert len(recorder.steps) == minibatches
    assert max(step.norm().item() for step in recorder.steps) < 1.0
    error = (sum(recorder.steps) - minibatches * expected).norm() / expected.norm()
    assert error.item() < 1e-4 * minibatches


def test_every_epoch_sees_every_minibatch(actor):
    """Three passes of two steps, each dealt out anew: every pass adds up to the same."""
    batch, _, config = collect(actor, ppo_epochs=3, minibatches=2)
    batch["adv"] = 0.01 * batch["adv"]
    batch["ret"] = batch["values_old"] + 0.01 * batch["mask"]
    recorder = Recorder(parameters_of(actor))
    update(actor, recorder, batch, config)
    assert len(recorder.steps) == 6
    passes = [sum(recorder.steps[i : i + 2]) for i in (0, 2, 4)]
    for other in passes[1:]:
        assert torch.allclose(other, passes[0], atol=1e-5 * passes[0].norm().item())
    assert not all(torch.allclose(recorder.steps[0], recorder.steps[i]) for i in (2, 4))


def test_update_moves_policy_and_critic_and_nothing_else(actor):
    """The base and the reference stay bit for bit what they were."""
    batch, _, config = collect(actor)
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    update(actor, adam(actor, 1e-3), batch, config)
    own = {id(p) for p in parameters_of(actor)}
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name


def test_update_makes_good_answers_likelier_and_values_truer(actor):
    """sum of A log pi rises and the squared error of the critic falls."""
    batch, _, config = collect(actor, ppo_epochs=4, clip=10.0, value_clip=100.0)

    @torch.no_grad()
    def measure():
        gain = error = 0.0
        for b in range(len(ROWS)):
            ids, n = sequence(batch, b)
            logp = logps_alone(actor, "policy", ids, n, config.temperature)
            gain += (batch["adv"][b, :n] * logp).sum().item()
            error += (values_alone(actor, ids, n) - batch["ret"][b, :n]).square().sum().item()
        return gain, error

    gain, error = measure()
    update(actor, adam(actor, 3e-3), batch, config)
    assert batch["mask"].shape[1] > 1 and measure()[0] > gain and measure()[1] < error


# ------------------------------------------------------------------------------ step 0


def other_temperature(monkeypatch):
    """The sampler draws at a temperature a tenth above the scorer's."""
    sample = common.sample
    monkeypatch.setattr(common, "sample", lambda model, x, x_mask, stop, n, temperature, *more: (
        sample(model, x, x_mask, stop, n, 1.1 * temperature, *more)))


def padding_is_read(monkeypatch):
    """The scorer looks at the padding before a prompt."""
    read = common.read
    monkeypatch.setattr(common, "read", lambda model, x, x_mask, *more, **states: (
        read(model, x, torch.ones_like(x_mask), *more, **states)))


def positions_in_columns(monkeypatch):
    """The scorer counts the positions of an answer in columns, those of its prompt in tokens."""
    def read(model, x, x_mask, y, mask, states=False):
        R, prompt = y.shape[1], (x_mask.cumsum(1) - 1).clamp(min=0)
        answer = torch.arange(x.shape[1], x.shape[1] + R).expand(len(y), R)
        given = {"input_ids": torch.cat([x, y], 1), "use_cache": False,
                 "attention_mask": torch.cat([x_mask, mask.long()], 1),
                 "position_ids": torch.cat([prompt, answer], 1)}
        if states:
            return model.base_model(**given).last_hidden_state[:, -R - 1 :]
        return model(**given, logits_to_keep=R + 1).logits

    monkeypatch.setattr(common, "read", read)


def top_p(monkeypatch, p=0.9):
    """The sampler draws from the likeliest tokens that make up p, and says nothing of it."""
    searchsorted = torch.searchsorted

    def truncated(cdf, u, right):
        share, order = cdf.diff(prepend=torch.zeros_like(cdf[:, :1])).sort(descending=True)
        share = share * (share.cumsum(-1) - share < p * cdf[:, -1:])
        kept = torch.zeros_like(cdf).scatter(1, order, share).cumsum(-1)
        return searchsorted(kept, u / cdf[:, -1:] * kept[:, -1:], right=right)

    monkeypatch.setattr(torch, "searchsorted", truncated)


FAULTS = [other_temperature, padding_is_read, positions_in_columns]


def recorded(monkeypatch, module, change=None):
    """The list of the batches that `module.train` rolls out, each of them changed by `change`."""
    rollout, batches = module.rollout, []

    def record(*args, **more):
        batch, texts = rollout(*args, **more)
        if change:
            change(batch)
        batches.append(batch)
        return batch, texts

    monkeypatch.setattr(module, "rollout", record)
    return batches


def first_row(module, kind, monkeypatch, fields):
    """Row 0 of `train`, of prompts of unequal length and answers of which some end early."""
    config = module.Config(**{**fields, "lr": 1e-3, "steps": 1})
    batches = recorded(monkeypatch, module)
    row, = module.train(make_base(kind), Letters(), ROWS, stub_reward, config)
    mask, prompts = batches[0]["mask"], batches[0]["x_mask"].sum(1)
    assert prompts.min() < prompts.max() and mask.sum(1).min() < mask.shape[1]
    return row


@pytest.mark.parametrize("fields", [{}, {"minibatches": 2, "ppo_epochs": 2}, {
    "micro_batch_size": 2, "minibatches": 2}])
def test_at_step_0_sampler_and_scorer_agree_to_1e_4(kind, monkeypatch, fields):
    assert first_row(ppo, kind, monkeypatch, {**FIELDS, **fields})["log_ratio_max"] < 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_between_sampler_and_scorer_shows_at_step_0(kind, monkeypatch, fault):
    """In a hundred times of what rounding may be."""
    fault(monkeypatch)
    assert first_row(ppo, kind, monkeypatch, FIELDS)["log_ratio_max"] > 1e-2


def surprise_of(module, kind, fields):
    """Row 0 of a batch of some thousand tokens."""
    model = make_base(kind)
    model.generation_config.eos_token_id = 2
    config = module.Config(**{**fields, "steps": 1, "batch_size": 72, "max_new_tokens": 40,
                              "max_length": 80, "lr": 1e-3})
    row, = module.train(model, Letters(), ROWS, stub_reward, config)
    assert row["length"] * 72 > 1900
    return row


def test_an_honest_sampler_is_as_surprised_as_its_entropy_says(kind):
    row = surprise_of(ppo, kind, FIELDS)
    assert abs(row["surprise_z"]) < 3.5 and abs(row["surprise"] - row["entropy"]) < 0.1


def test_a_top_p_sampler_is_not_surprised_enough(kind, monkeypatch):
    """And nothing else would tell: scorer and sampler agree on every token it draws."""
    top_p(monkeypatch)
    row = surprise_of(ppo, kind, FIELDS)
    assert row["surprise_z"] < -4 and row["log_ratio_max"] < 1e-4


# ------------------------------------------------------------------------------ train


KEYS = """step seconds lr beta score score_std kl entropy surprise surprise_z eos_rate length loss
policy_loss value_loss grad_norm log_ratio_max approx_kl clip_fraction ratio_max
explained_variance""".split()


def run(model, log=None, state=None, rows=ROWS, reward=stub_reward, **fields):
    config = ppo.Config(**{**FIELDS, "lr": 1e-2, "minibatches": 2, "steps": 3, **fields})
    return ppo.train(model, Letters(), rows, reward, config, log, state)


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_train_returns_a_row_of_numbers_per_step_and_logs_the_same(kind, capfd):
    """Nothing is written to standard output."""
    seen = []
    rows = run(make_base(kind), lambda row, samples, state: seen.append((row, samples, state)))
    assert [row for row, _, _ in seen] == rows and [row["step"] for row in rows] == [0, 1, 2]
    for row, samples, state in seen:
        assert row.keys() == set(KEYS) and json.loads(json.dumps(row)) == row
        assert row["loss"] == pytest.approx(row["policy_loss"] + row["value_loss"])
        assert len(samples) == len(ROWS) and state["step"] == row["step"] + 1
        assert all(s.keys() == {"prompt", "response", "score"} for s in samples)
        mean = sum(s["score"] for s in samples) / len(samples)
        assert row["score"] == pytest.approx(mean, abs=1e-5)
    assert capfd.readouterr().out == ""


def test_the_reward_sees_prompts_as_text_and_the_data_rows(kind):
    """The messages of a prompt are joined; every row of a batch is a row of the data."""
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), "abc")]
    data, calls, samples = [{"prompt": turns, "number": 5}, *ROWS[:2]], [], []

    def reward(prompts, responses, rows):
        calls.append((prompts, responses, rows))
        return stub_reward(prompts, responses, rows)

    run(make_base(kind), lambda row, some, state: samples.append(some), rows=data, reward=reward,
        steps=1)
    (prompts, responses, rows), = calls
    assert len(prompts) == len(responses) == len(rows) == len(ROWS)
    assert all(row in data for row in rows) and turns in [row["prompt"] for row in rows]
    for prompt, response, row, sample in zip(prompts, responses, rows, samples[0]):
        assert prompt == ("a\nb\nc" if row["prompt"] == turns else row["prompt"])
        assert (sample["prompt"], sample["response"]) == (row["prompt"], response)


def check_random_numbers(run, kind):
    """`run` gives the same rows and parameters in a thread as in the main one, whatever was drawn
    before, by whomever, and leaves the random numbers of all others alone."""
    found = []

    def work(seed):
        torch.set_num_threads(1)
        model = make_base(kind)
        for library in (torch.manual_seed, random.seed, numpy.random.seed):
            library(seed)
        before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
        rows = timeless(run(model))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(numpy.random.get_state())) == before[1:]
        found.append((rows, flat(parameters_of(model))))

    work(1)
    thread = threading.Thread(target=work, args=(2,))
    thread.start()
    thread.join()
    (rows, parameters), (others, moved) = found
    assert rows == others and torch.equal(parameters, moved)
    return rows


def test_train_works_in_a_thread_and_leaves_all_random_numbers_alone(kind):
    """Only its own seed makes it another run."""
    rows = check_random_numbers(run, kind)
    assert rows != timeless(run(make_base(kind), seed=1))


def test_a_second_call_goes_on_towards_the_same_reference(kind):
    """kl is counted from the first start; policy and critic are those of the first call."""
    model = make_base(kind)
    first = run(model)
    reference, policy = (flat(lora.adapter_parameters(model, n)) for n in ("reference", "policy"))
    critic = flat(lora.adapter_parameters(model, "critic"))
    assert abs(first[0]["kl"]) < 1e-4 and not torch.equal(reference, policy)
    second = run(model, lr=0.0)
    assert torch.equal(flat(lora.adapter_parameters(model, "reference")), reference)
    assert torch.equal(flat(lora.adapter_parameters(model, "policy")), policy)
    assert torch.equal(flat(lora.adapter_parameters(model, "critic")), critic)
    assert abs(second[0]["kl"]) > 1e-2


def test_train_moves_policy_and_critic_and_nothing_else(kind):
    """With a reward model on the same base, from which the critic starts; after it, no adapter is
    active and no gradient is left."""
    model = make_base(kind)
    lora.add_adapter(model, "judge", rank=2, targets=TARGETS[kind], trainable=False)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["judge"], std=0.2)
    lora.add_head(model, "judge").requires_grad_(False)
    ppo.make_models(model, "judge", ppo.Config(**FIELDS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, reward="judge", steps=2)
    own = {id(p) for p in parameters_of(model)}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name
        assert p.grad is None
    assert {layer.active for layer in lora.lora_layers(model).values()} == {None}


@pytest.mark.parametrize("keep", ["in memory", "in files"])
def test_going_on_from_a_state_is_the_uninterrupted_run_to_the_bit(kind, keep, tmp_path):
    """Rows and parameters, with moments of AdamW, a rate and a beta that change at every step."""
    fields, kept, names = dict(steps=4, warmup=0.5, kl_target=0.1), {}, ("policy", "critic")

    def log(row, samples, state):
        if row["step"] == 1:
            if keep == "in memory":
                kept.update(model=copy.deepcopy(model), state=copy.deepcopy(state))
            else:
                for name in (*names, "reference"):
                    lora.save_adapter(model, name, tmp_path / name)
                torch.save(state, tmp_path / "state.pt")

    model = make_base(kind)
    rows = run(model, log, **fields)
    if keep == "in files":
        kept["model"], kept["state"] = make_base(kind), torch.load(tmp_path / "state.pt")
        for name in (*names, "reference"):
            lora.load_adapter(kept["model"], name, tmp_path / name, trainable=name in names)
    others = run(kept["model"], state=kept["state"], **fields)
    assert len({row["beta"] for row in rows}) == 4
    assert timeless(others) == timeless(rows[2:])
    assert torch.equal(flat(parameters_of(kept["model"])), flat(parameters_of(model)))


def eight_letters(prompts, responses, rows):
    """The share of letters that are one of these eight, in answers of four or fewer."""
    return [sum(c in "bcdefghi" for c in text) / 4 for text in responses]


LESSON = dict(steps=8, batch_size=32, max_new_tokens=4, temperature=0.3, missing_eos_score=None,
              beta=0.0)


def test_the_policy_learns_to_write_eight_letters_of_sixty(kind):
    model = make_base(kind)
    model.generation_config.eos_token_id = 2
    lesson = {**LESSON, "steps": 20}  # 8 are enough for two of three seeds
    rows = run(model, reward=eight_letters, lr=3e-2, ppo_epochs=2, warmup=0.0, **lesson)
    assert rows[0]["score"] < 0.3 and rows[-1]["score"] > 0.7


# ------------------------------------------------------------------------------ corrections


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (2, 2)])
def test_the_policys_step_does_not_depend_on_the_scale_of_the_reward(kind, epochs, minibatches):
    """From a critic that says 0, without a KL penalty, with AdamW as the script makes it: scores a
    hundred times as large give the same whitened advantages, and so the same step."""
    steps = []
    for scale in (1.0, 100.0):
        def scaled(prompts, responses, rows):
            return [scale * score for score in stub_reward(prompts, responses, rows)]

        model = make_base(kind)
        run(model, reward=scaled, steps=1, beta=0.0, missing_eos_score=None, ppo_epochs=epochs,
            minibatches=minibatches)
        policy, start = (flat(lora.adapter_parameters(model, n)) for n in ("policy", "reference"))
        steps.append(policy - start)
    assert steps[0].norm() > 1e-2
    assert (steps[1] - steps[0]).norm().item() < 1e-3 * steps[0].norm().item()


def guess(batch):
    """A critic of one random number per answer."""
    batch["values_old"] = 3 * noise(14, len(batch["mask"]), 1) * batch["mask"]


def small_reward(prompts, responses, rows):
    return [row["number"] / 10 for row in rows]


GUESSED = dict(steps=1, gamma=1.0, lam=0.8, max_new_tokens=30, max_length=80, batch_size=12,
               missing_eos_score=None)


def explained_by_hand(batch, beta):
    """1 - Var(G - V) / Var(G), where G is the score minus beta times the log-ratios to come."""
    to_go, values = [], []
    for b, n in enumerate(batch["mask"].sum(1).long().tolist()):
        penalty = beta * (batch["logp_old"] - batch["logp_ref"])[b, :n]
        to_go += [batch["score"][b].item() - penalty[t:].sum().item() for t in range(n)]
        values += batch["values_old"][b, :n].tolist()
    to_go, left = torch.tensor(to_go), torch.tensor(to_go) - torch.tensor(values)
    return 1 - (left.var() / to_go.var()).item()


def check_explained_variance(script, run, model, beta, monkeypatch):
    """Against returns at lambda .8, which are mostly the critic itself, it would explain a part;
    against the plain rewards to go, the KL included, it is worse than a constant."""
    batches = recorded(monkeypatch, script, guess)
    model.generation_config.eos_token_id = 2
    row, = run(model, reward=small_reward, beta=beta, **GUESSED)
    batch, = batches
    expected = explained_by_hand(batch, beta)
    assert row["explained_variance"] == pytest.approx(expected, rel=1e-3) and expected < 0
    if beta:
        assert expected != pytest.approx(explained_by_hand(batch, 0.0), rel=1e-2)
    else:
        assert script.explained_variance(batch["values_old"], batch["ret"], batch["mask"]) > 0


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_explained_variance_does_not_flatter_a_critic_that_knows_nothing(kind, monkeypatch, beta):
    check_explained_variance(ppo, run, make_actor(kind), beta, monkeypatch)


@pytest.mark.parametrize("micro", [None, 4])
def test_drift_is_measured_after_the_update_on_the_whole_batch(kind, monkeypatch, micro):
    """By the policy as it stands when the row is logged, row by row."""
    batches, found, model = recorded(monkeypatch, ppo), [], make_base(kind)

    @torch.no_grad()
    def log(row, samples, state):
        batch, log_ratio = batches[-1], []
        for b in range(len(ROWS)):
            ids, n = sequence(batch, b)
            logp = logps_alone(model, "policy", ids, n, FIELDS["temperature"])
            log_ratio += (logp - batch["logp_old"][b, :n]).tolist()
        outside = [abs(math.exp(x) - 1) > FIELDS["clip"] for x in log_ratio]
        found.append({
            "approx_kl": sum(math.exp(x) - 1 - x for x in log_ratio) / len(log_ratio),
            "clip_fraction": sum(outside) / len(outside), "ratio_max": math.exp(max(log_ratio))})

    rows = run(model, log, micro_batch_size=micro)
    for row, drift in zip(rows, found, strict=True):
        assert {key: row[key] for key in drift} == pytest.approx(drift, rel=1e-3)
    assert rows[-1]["approx_kl"] > 1e-3 and rows[-1]["clip_fraction"] > 0


def test_the_policys_rate_warms_up_and_the_critics_does_not(kind):
    """Two of five steps warm up: 1/2, 1, and then down; the critic's falls from the first on. Both
    are what the optimizer steps with: AdamW with its usual eps, and without decay."""
    rates = []

    def log(row, samples, state):
        groups = state["optimizer"]["param_groups"]
        assert [(group["eps"], group["weight_decay"]) for group in groups] == [(1e-8, 0.0)] * 2
        rates.append([group["lr"] for group in groups] + [row["lr"]])

    model = make_base(kind)
    run(model, log, steps=5, warmup=0.4, lr=1e-3, max_new_tokens=2)
    policy, critic, logged = ([1e3 * rate for rate in column] for column in zip(*rates))
    assert policy == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3])
    assert critic == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert logged == policy


def test_the_kl_target_adapts_beta_by_the_measured_kl(kind):
    rows = run(make_base(kind), steps=4, kl_target=0.05)
    for before, after in zip(rows, rows[1:]):
        assert after["beta"] == pytest.approx(ppo.adapt_beta(before["beta"], before["kl"], 0.05))
    assert len({row["beta"] for row in rows}) > 2
    assert {row["beta"] for row in run(make_base(kind), steps=3)} == {FIELDS["beta"]}


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("fields, message", [
    ({"temperature": 0.0}, "--temperature"),
    ({"max_new_tokens": 64, "max_length": 64}, "--max-new-tokens"),
    ({"batch_size": 6, "minibatches": 4}, "--minibatches"),
    ({"kl_target": 0.0}, "--kl-target"),
    ({"kl_target": 6.0, "beta": 0.0}, "--beta 0"),
])
def test_a_config_that_cannot_work_raises_and_names_the_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        ppo.Config(**fields)


@pytest.mark.parametrize("words, message", [
    (["--temperature", "0"], "--temperature"),
    (["--batch-size", "6", "--minibatches", "4"], "multiple"),
    (["--model", "x", "--data", "y.jsonl"], "--reward"),
    (["--kl-target", "0"], "--kl-target"),
    (["--value-coef", "0.1"], "--value-coef"),
])
def test_flags_that_cannot_work_end_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        ppo.main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ")
    assert message in err and err.count("\n") == 1
