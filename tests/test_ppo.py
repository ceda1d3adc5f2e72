import math
from argparse import Namespace

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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_entropy_is_minus_sum_p_log_p(temperature):
    logits = noise(9, 2, 3, 5)
    entropy = ppo.token_entropy(logits, temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            expected = -sum(x * math.log(x) for x in p)
            assert entropy[b, t].item() == pytest.approx(expected, abs=1e-5)
    uniform = ppo.token_entropy(torch.zeros(1, 1, 8), temperature)
    assert uniform.item() == pytest.approx(math.log(8), abs=1e-6)


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


# ------------------------------------------------------------------------------ rollout


class Letters:
    """The least of a tokenizer: a letter is a token, 1 is BOS, 2 is EOS."""

    chat_template, eos_token_id = None, 2

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        ids = [3 + ord(c) % 61 for c in text]
        return Namespace(input_ids=[1] * add_special_tokens + ids)

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(32 + i) for i in row if i > 2) for row in rows]


ROWS = [{"prompt": "a" * n, "number": n} for n in (1, 9, 4, 30, 2, 17)]
ARGS = dict(
    max_length=64, max_new_tokens=9, temperature=0.7, adapter="sft", missing_eos_score=-3.0,
    ppo_epochs=1, minibatches=1, micro_batch_size=len(ROWS), clip=0.2, value_clip=0.2,
    value_coef=0.1, gamma=0.99, lam=0.95, beta=0.1,
)


def stub_reward(ids, attention, prompts, responses, rows):
    return torch.tensor([row["number"] / 10 + len(r) for r, row in zip(responses, rows)])


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


def collect(model, **flags):
    """A rollout with its advantages, as the main loop makes it."""
    args = Namespace(**{**ARGS, **flags})
    batch = ppo.rollout(model, Letters(), ROWS, stub_reward, torch.Generator().manual_seed(3), args)
    mask, values = batch["mask"], batch["values"]
    rewards = ppo.kl_shaped_rewards(
        batch["score"], batch["logp"], batch["logp_ref"], mask, args.beta)
    adv, ret = ppo.gae(rewards, values, mask, args.gamma, args.lam)
    return batch | {"adv": ppo.whiten(adv, mask), "ret": ret}, args


def parameters_of(model):
    return lora.adapter_parameters(model, "policy") + lora.adapter_parameters(model, "critic")


def sequence(batch, b):
    """(prompt + response ids without padding, number of response tokens) of row b."""
    return batch["ids"][b][batch["attention"][b] == 1].tolist(), int(batch["mask"][b].sum())


def logps_alone(model, adapter, ids, n, temperature):
    with lora.use_adapter(model, adapter):
        logits = model(torch.tensor([ids])).logits[0] / temperature
    logp = logits.log_softmax(-1)
    return torch.stack([logp[t - 1, ids[t]] for t in range(len(ids) - n, len(ids))])


def values_alone(model, ids, n):
    with lora.use_adapter(model, "critic"):
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return (hidden @ model.heads["critic"].weight[0])[len(ids) - n - 1 : len(ids) - 1]


def test_the_rollout_has_unequal_prompts_and_an_early_eos(actor):
    """The premise of the tests below."""
    batch, _ = collect(actor)
    P = batch["ids"].shape[1] - batch["mask"].shape[1]
    assert len(set(batch["attention"][:, :P].sum(1).tolist())) == len(ROWS)
    assert batch["mask"].sum(1).min() < batch["mask"].shape[1]


@pytest.mark.parametrize("adapter, reference, micro", [("sft", "reference", 6), (None, None, 4)])
@torch.no_grad()
def test_rollout_logps_are_those_of_each_row_alone(actor, adapter, reference, micro):
    """Unpadded, at the sampling temperature, whatever the micro-batch; without --adapter the
    reference is the base."""
    batch, args = collect(actor, adapter=adapter, micro_batch_size=micro)
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        for key, name in (("logp", "policy"), ("logp_ref", reference)):
            alone = logps_alone(actor, name, ids, n, args.temperature)
            assert torch.allclose(batch[key][b, :n], alone, atol=1e-5)
        assert torch.allclose(batch["values"][b, :n], values_alone(actor, ids, n), atol=1e-5)


def test_the_mask_ends_with_the_first_stop_token(actor):
    """And a response that did not stop scores --missing-eos-score instead of its reward."""
    batch, args = collect(actor, max_new_tokens=3)
    R, stopped = batch["mask"].shape[1], 0
    for b, row in enumerate(ROWS):
        ids, n = sequence(batch, b)
        response = ids[-n:]
        assert batch["mask"][b].tolist() == [1.0] * n + [0.0] * (R - n)
        assert not any(2 <= i < 18 for i in response[:-1])
        ended = 2 <= response[-1] < 18
        assert ended or n == R
        stopped += ended
        text = batch["responses"][b]
        expected = row["number"] / 10 + len(text) if ended else -3.0
        assert batch["score"][b].item() == pytest.approx(expected, abs=1e-5)
    assert 0 < stopped < len(ROWS)
    assert batch["stats"]["eos_rate"] == pytest.approx(stopped / len(ROWS))


def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_the_response(actor):
    """Prompt and response together never exceed --max-length."""
    batch, args = collect(actor, max_length=32)
    P = batch["ids"].shape[1] - batch["mask"].shape[1]
    whole = [Letters()(f"User: {row['prompt']}\n\nAssistant: ").input_ids for row in ROWS]
    for b, prompt in enumerate(whole):
        kept = batch["ids"][b, :P][batch["attention"][b, :P] == 1].tolist()
        assert kept == prompt[-(32 - args.max_new_tokens):]
    assert P == 32 - args.max_new_tokens and min(map(len, whole)) < P


def test_rollout_statistics_by_hand(actor):
    """kl sums over a response and averages over responses; entropy averages over tokens."""
    batch, args = collect(actor)
    kl, tokens, entropy = [], 0, 0.0
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        kl.append((batch["logp"][b, :n] - batch["logp_ref"][b, :n]).sum().item())
        with torch.no_grad(), lora.use_adapter(actor, "policy"):
            logits = actor(torch.tensor([ids])).logits[0, -n - 1 : -1] / args.temperature
        entropy += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        tokens += n
    score = batch["score"].tolist()
    mean = sum(score) / len(score)
    assert batch["stats"]["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    assert batch["stats"]["entropy"] == pytest.approx(entropy / tokens, abs=1e-4)
    assert batch["stats"]["length"] == pytest.approx(tokens / len(ROWS), abs=1e-4)
    assert batch["stats"]["score"] == pytest.approx(mean, abs=1e-4)
    spread = math.sqrt(sum((s - mean) ** 2 for s in score) / len(score))
    assert batch["stats"]["score_std"] == pytest.approx(spread, abs=1e-4)


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


@pytest.mark.parametrize("flags", [{}, {"micro_batch_size": 2}, {"minibatches": 2}])
def test_first_minibatch_on_a_bf16_base_has_ratio_1_up_to_the_rounding_of_bf16(kind, flags):
    """Where other micro-batches round otherwise, by 2^-8 of a logit, and these are around 1."""
    model = make_actor(kind, torch.bfloat16)
    batch, args = collect(model, **flags)
    parameters = parameters_of(model)
    stats = ppo.update(model, parameters, torch.optim.Adam(parameters, lr=1e-2), batch, args)
    assert stats["first"]["ratio_error"] < 2**-6


@pytest.mark.parametrize("flags", [{}, {"micro_batch_size": 2}, {"minibatches": 2}])
def test_first_minibatch_after_a_rollout_has_ratio_1(actor, flags):
    """|ratio - 1| < 1e-4, nothing clipped, approx KL 0; after a step none of it holds."""
    batch, args = collect(actor, ppo_epochs=3, clip=1e-3, **flags)
    parameters = parameters_of(actor)
    stats = ppo.update(actor, parameters, torch.optim.Adam(parameters, lr=1e-2), batch, args)
    assert stats["first"]["ratio_error"] < 1e-4
    assert stats["first"]["clip_fraction"] == 0.0
    assert abs(stats["first"]["approx_kl"]) < 1e-8
    assert stats["approx_kl"] > 1e-6 and stats["clip_fraction"] > 0 and stats["ratio_max"] > 1.001


def test_update_statistics_of_a_known_shift(actor):
    """logp_old lower by ln 1.5 on every token: ratio 1.5, all clipped, k3 = 0.5 - ln 1.5."""
    batch, args = collect(actor, micro_batch_size=2)
    batch["logp"] = batch["logp"] - math.log(1.5)
    parameters = parameters_of(actor)
    stats = ppo.update(actor, parameters, Recorder(parameters), batch, args)
    assert stats["clip_fraction"] == pytest.approx(1.0, abs=1e-6)
    assert stats["ratio_max"] == pytest.approx(1.5, abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(0.5 - math.log(1.5), abs=1e-4)
    adv = batch["adv"][batch["mask"] > 0].tolist()
    expected = sum(-1.2 * a if a > 0 else -1.5 * a for a in adv) / len(adv)
    assert stats["policy_loss"] == pytest.approx(expected, abs=1e-3)


def test_first_gradient_is_the_policy_gradient_plus_the_critics(actor):
    """-mean A grad log pi and value_coef mean (V - G) grad V, summed row by row, unpadded."""
    batch, args = collect(actor)
    parameters, tokens = parameters_of(actor), batch["mask"].sum().item()
    loss = 0.0
    for b in range(len(ROWS)):
        ids, n = sequence(batch, b)
        logp = logps_alone(actor, "policy", ids, n, args.temperature)
        values = values_alone(actor, ids, n)
        error = (values - batch["ret"][b, :n]).detach()
        loss = loss - (batch["adv"][b, :n] * logp).sum() + args.value_coef * (error * values).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss / tokens, parameters)])
    recorder = Recorder(parameters)
    stats = ppo.update(actor, parameters, recorder, batch, args)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    expected = expected * min(1.0, 1.0 / expected.norm().item())
    assert torch.allclose(recorder.steps[0], expected, atol=1e-5)


@pytest.mark.parametrize("micro, minibatches, saving", [
    (1, 1, False), (4, 1, False), (2, 2, False), (4, 1, True),
])
def test_micro_batches_give_the_gradient_of_the_whole(
        actor, micro, minibatches, saving, monkeypatch):
    """To 1e-6, with the same statistics, away from ratio 1, with rows of unequal length; saving
    memory by checkpointed layers and by logits a few tokens at a time changes nothing either."""
    batch, args = collect(actor, minibatches=minibatches)
    batch["logp"] = batch["logp"] + 0.1 * noise(12, *batch["logp"].shape)
    parameters, results = parameters_of(actor), []
    for size in (len(ROWS), micro):
        args.micro_batch_size = size
        if saving and size == micro:
            common.checkpoint_layers(actor)
            monkeypatch.setattr(common, "LOGITS", 300)
        recorder = Recorder(parameters)
        torch.manual_seed(0)
        results.append((ppo.update(actor, parameters, recorder, batch, args), recorder.steps))
    (whole, gradients), (parts, micro_gradients) = results
    assert len(gradients) == len(micro_gradients) == minibatches
    for a, b in zip(gradients, micro_gradients):
        assert a.norm() > 1e-3 and (a - b).abs().max().item() < 1e-6
    assert parts.pop("first") == pytest.approx(whole.pop("first"), rel=1e-4, abs=1e-6)
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_every_epoch_sees_every_minibatch(actor):
    batch, args = collect(actor, ppo_epochs=3, minibatches=2)
    recorder = Recorder(parameters_of(actor))
    ppo.update(actor, recorder.parameters, recorder, batch, args)
    assert len(recorder.steps) == 6


def test_update_moves_policy_and_critic_and_nothing_else(actor):
    """The base and the reference stay bit for bit what they were."""
    batch, args = collect(actor)
    parameters = parameters_of(actor)
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    ppo.update(actor, parameters, torch.optim.Adam(parameters, lr=1e-3), batch, args)
    own = {id(p) for p in parameters}
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name


def test_update_makes_good_answers_likelier_and_values_truer(actor):
    """sum of A log pi rises and the squared error of the critic falls."""
    batch, args = collect(actor, ppo_epochs=4, clip=10.0, value_clip=100.0)
    parameters, R = parameters_of(actor), batch["mask"].shape[1]

    @torch.no_grad()
    def measure():
        rows = [sequence(batch, b) for b in range(len(ROWS))]
        gain = error = 0.0
        for b, (ids, n) in enumerate(rows):
            logp = logps_alone(actor, "policy", ids, n, args.temperature)
            gain += (batch["adv"][b, :n] * logp).sum().item()
            error += (values_alone(actor, ids, n) - batch["ret"][b, :n]).square().sum().item()
        return gain, error

    gain, error = measure()
    ppo.update(actor, parameters, torch.optim.Adam(parameters, lr=3e-3), batch, args)
    assert R > 1 and measure()[0] > gain and measure()[1] < error


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "0"], "temperature"),
    (["--batch-size", "6", "--minibatches", "4"], "multiple"),
    (["--model", "x", "--data", "y.jsonl"], "--reward"),
    (["--kl-target", "0"], "--kl-target"),
])
def test_flags_that_cannot_work_end_with_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        ppo.parse_args(flags)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1
