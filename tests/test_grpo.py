import json
import math
from argparse import Namespace

import pytest
import torch
from conftest import TARGETS, toy
from test_ppo import LENGTHS, MASK, Letters, Recorder, logps_alone, noise, sequence, stub_reward

import common
import grpo
import lora

LOSSES, KINDS = ["grpo", "dapo", "dr_grpo", "gspo"], ["k3", "k3-corrected", "k2"]


# ------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_and_entropy_are_those_of_the_softmax_at_the_temperature(temperature):
    logits, ids = noise(0, 2, 3, 6) * 3, torch.tensor([[0, 5, 2], [3, 3, 1]])
    logp = grpo.token_logps(logits, ids, temperature)
    entropy = grpo.token_entropy(logits, temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            assert logp[b, t].item() == pytest.approx(math.log(p[ids[b, t]]), abs=1e-5)
            h = -sum(x * math.log(x) for x in p)
            assert entropy[b, t].item() == pytest.approx(h, abs=1e-5)
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


def test_a_group_of_one_and_an_unknown_scale_raise():
    with pytest.raises(ValueError, match="two answers"):
        grpo.group_advantages(torch.ones(3, 1))
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


def by_definition(logp, old, ref, adv, low, high, beta, loss, max_tokens, kl):
    """Answer by answer, token by token, on scalars: min of the two gains, minus the penalty."""
    rows = []
    for b, n in enumerate(LENGTHS):
        tokens = [(logp[b, t] - old[b, t]).exp() for t in range(n)]
        ratios = [math.prod(tokens) ** (1 / n)] * n if loss == "gspo" else tokens
        rows.append([])
        for t, rho in enumerate(ratios):
            gain = min(rho * adv[b], min(max(rho, 1 - low), 1 + high) * adv[b])
            q = (ref[b, t] - logp[b, t]).exp()
            k3 = q - 1 - q.log()
            penalty = {"k3": k3, "k2": q.log() ** 2 / 2, "k3-corrected": tokens[t] * k3}[kl]
            rows[b].append(beta * penalty - gain)
    if loss == "dapo":
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


@pytest.mark.parametrize("loss", LOSSES)
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


# ------------------------------------------------------------------------------ rollout


G = 3
PROMPTS = [{"prompt": "a" * n, "number": n} for n in (1, 30, 9)]
ROWS = [row for row in PROMPTS for _ in range(G)]
ARGS = dict(
    max_length=64, max_new_tokens=20, temperature=0.7, adapter="sft", missing_eos_score=-3.0,
    ppo_epochs=1, minibatches=1, micro_batch_size=len(ROWS), clip_low=0.2, clip_high=0.2,
    beta=0.3, kl_in="loss", kl="k3", loss="grpo",
)


def add_adapters(model, kind, *names):
    """Adapters of which none is zero; the first is trained. A token in four ends an answer."""
    model.generation_config.eos_token_id = list(range(2, 18))
    for name in names:
        lora.add_adapter(model, name, 4, targets=TARGETS[kind], trainable=name == names[0])
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.2)


@pytest.fixture
def actor(kind):
    model = toy(kind)
    add_adapters(model, kind, "policy", "reference", "reward")
    lora.add_head(model, "reward").requires_grad_(False)
    return model


def collect(model, **flags):
    """A rollout with its advantages, as the main loop makes it."""
    args, generator = Namespace(**{**ARGS, **flags}), torch.Generator().manual_seed(3)
    batch = grpo.rollout(model, Letters(), PROMPTS, G, stub_reward, generator, args)
    adv = grpo.group_advantages(batch["score"].view(-1, G)).flatten()
    return batch | {"adv": adv}, args, lora.adapter_parameters(model, "policy")


def test_the_rollout_has_unequal_prompts_an_early_eos_and_spread(actor):
    """The premise of the tests below."""
    batch, *_ = collect(actor)
    P = batch["ids"].shape[1] - batch["mask"].shape[1]
    assert len(set(batch["attention"][:, :P].sum(1).tolist())) == len(PROMPTS)
    assert batch["mask"].sum(1).min() < batch["mask"].shape[1] < ARGS["max_new_tokens"]
    assert (batch["adv"].view(-1, G).abs().amax(1) > 0.1).all()


@pytest.mark.parametrize("adapter, reference, micro, max_length", [
    ("sft", "reference", 9, 64), (None, None, 4, 32),
])
@torch.no_grad()
def test_rollout_logps_are_those_of_each_row_alone(actor, adapter, reference, micro, max_length):
    """Unpadded, at the sampling temperature, whatever the micro-batch; without --adapter the
    reference is the base. A long prompt loses its beginning. A response stops at its first stop
    token, else it scores -3."""
    batch, args, _ = collect(
        actor, adapter=adapter, micro_batch_size=micro, max_new_tokens=4, max_length=max_length)
    kl, entropy, stopped = [], [], []
    for b, row in enumerate(ROWS):
        ids, n = sequence(batch, b)
        whole = Letters()(f"User: {row['prompt']}\n\nAssistant: ").input_ids
        assert ids[:-n] == whole[-(max_length - 4):]
        for key, name in (("logp", "policy"), ("logp_ref", reference)):
            alone = logps_alone(actor, name, ids, n, args.temperature)
            assert torch.allclose(batch[key][b, :n], alone, atol=1e-5)
        kl.append((batch["logp"][b, :n] - batch["logp_ref"][b, :n]).sum().item())
        with lora.use_adapter(actor, "policy"):
            logits = actor(torch.tensor([ids])).logits[0, -n - 1 : -1] / args.temperature
        entropy += torch.distributions.Categorical(logits=logits).entropy().tolist()
        stopped.append(2 <= ids[-1] < 18)
        assert not any(2 <= i < 18 for i in ids[-n:-1]) and (stopped[b] or n == 4)
        score = row["number"] / 10 + len(batch["responses"][b]) if stopped[b] else -3.0
        assert batch["score"][b].item() == pytest.approx(score, abs=1e-5)
    score = batch["score"].tolist()
    mean, B = sum(score) / len(score), len(ROWS)
    assert 0 < sum(stopped) < B and batch["stats"] == pytest.approx({
        "score": mean, "score_std": math.sqrt(sum((s - mean) ** 2 for s in score) / B),
        "kl": sum(kl) / B, "entropy": sum(entropy) / len(entropy), "eos_rate": sum(stopped) / B,
        "length": len(entropy) / B,
    }, abs=1e-4)


def test_save_samples_writes_one_line_a_response(tmp_path):
    for step in (0, 7):
        common.save_samples(tmp_path, step, PROMPTS[:2], ["x", "y"], [1.5, -3.0])
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert found == [{"step": step, "prompt": p, "response": r, "score": s} for step in (0, 7)
                     for p, r, s in (("a", "x", 1.5), ("a" * 30, "y", -3.0))]


# ------------------------------------------------------------------------------ update


@pytest.mark.parametrize("flags", [{"micro_batch_size": 4}, {"minibatches": 3, "loss": "gspo"}])
def test_first_minibatch_after_a_rollout_has_ratio_1(actor, flags):
    """|ratio - 1| < 1e-4, nothing clipped, approx KL 0; after a step none of it holds."""
    batch, args, parameters = collect(actor, ppo_epochs=3, clip_low=1e-3, clip_high=1e-3, **flags)
    stats = grpo.update(actor, parameters, torch.optim.Adam(parameters, lr=1e-2), batch, args)
    assert stats["first"]["ratio_error"] < 1e-4 and stats["first"]["clip_fraction"] == 0.0
    assert abs(stats["first"]["approx_kl"]) < 1e-8
    assert stats["approx_kl"] > 1e-6 and stats["clip_fraction"] > 0 and stats["ratio_max"] > 1.001


@pytest.mark.parametrize("ratio, low, high, clipped", [
    (1.5, 0.2, 0.4, 1.0), (1.5, 0.2, 0.6, 0.0), (0.7, 0.4, 0.2, 0.0), (0.7, 0.2, 0.4, 1.0),
])
def test_update_statistics_of_a_known_shift(actor, ratio, low, high, clipped):
    """Every token's ratio is known, so is k3 = rho - 1 - ln rho."""
    batch, args, parameters = collect(actor, micro_batch_size=2, clip_low=low, clip_high=high)
    batch["logp"] = batch["logp"] - math.log(ratio)
    stats = grpo.update(actor, parameters, Recorder(parameters), batch, args)
    assert stats["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert max(1.0, stats["ratio_max"]) == pytest.approx(max(1.0, ratio), abs=1e-4)
    assert stats["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-4)


@pytest.mark.parametrize("loss, kl_in", [*((loss, "loss") for loss in LOSSES), ("grpo", "reward")])
def test_first_gradient_is_the_policy_gradient_with_or_without_the_kl(actor, loss, kl_in):
    """-sum w_i (A_i + beta (pi_ref/pi - 1)) grad log pi, row by row, unpadded; with --kl-in reward
    beta stays out of it."""
    batch, args, parameters = collect(actor, loss=loss, kl_in=kl_in, micro_batch_size=4)
    B, tokens, surrogate = len(ROWS), batch["mask"].sum().item(), 0.0
    for b in range(B):
        ids, n = sequence(batch, b)
        weight = {"dapo": 1 / tokens, "dr_grpo": 1 / (B * 20)}.get(loss, 1 / (B * n))
        logp = logps_alone(actor, "policy", ids, n, args.temperature)
        pull = (logps_alone(actor, "reference", ids, n, args.temperature) - logp).exp().detach() - 1
        gain = batch["adv"][b] + (args.beta * pull if kl_in == "loss" else 0.0)
        surrogate = surrogate - weight * (gain * logp).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, parameters)])
    recorder = Recorder(parameters)
    stats = grpo.update(actor, parameters, recorder, batch, args)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    expected = expected * min(1.0, 1.0 / expected.norm().item())
    assert torch.allclose(recorder.steps[0], expected, atol=1e-5)


@pytest.mark.parametrize("loss, micro, minibatches, kl", [
    ("grpo", 4, 1, "k3"), ("dapo", 2, 3, "k2"), ("dr_grpo", 4, 1, "k3-corrected"),
    ("gspo", 1, 3, "k3-corrected"),
])
def test_micro_batches_give_the_gradient_of_the_whole(actor, loss, micro, minibatches, kl):
    """To 1e-6, and its statistics, away from ratio 1, with rows of unequal length."""
    batch, args, parameters = collect(
        actor, loss=loss, minibatches=minibatches, kl=kl, ppo_epochs=2, micro_batch_size=micro,
        clip_low=0.02, clip_high=0.06)
    ids, mask, R = batch["ids"], batch["mask"], batch["mask"].shape[1]
    batch["logp"] = batch["logp"] + 0.1 * noise(12, *mask.shape)
    recorder, expected, seen = Recorder(parameters), [], []
    torch.manual_seed(0)
    stats = grpo.update(actor, parameters, recorder, batch, args)
    torch.manual_seed(0)
    for rows in [r for _ in range(2) for r in torch.randperm(len(ROWS)).chunk(minibatches)]:
        with lora.use_adapter(actor, "policy"):
            states = common.response_states(actor, ids[rows], batch["attention"][rows], R)
        logp = grpo.token_logps(
            common.logits_of(actor, states), ids[rows][:, -R:], args.temperature)
        old, ref, adv = (batch[key][rows] for key in ("logp", "logp_ref", "adv"))
        value = grpo.grpo_loss(logp, old, ref, adv, mask[rows], 0.02, 0.06, 0.3, loss, 20, kl)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
        norm, rho = gradient.norm().item(), (logp - old)[mask[rows] > 0].detach().exp()
        expected.append(gradient / max(1.0, norm))
        clipped = rho
        if loss == "gspo":  # the whole answer is, or none of it
            clipped = torch.cat([w.log().mean().exp().expand(len(w))
                                 for w in rho.split(mask[rows].sum(1).int().tolist())])
        outside = ((clipped < 0.98) | (clipped > 1.06)).float().mean().item()
        seen.append([value.item(), norm, outside, (rho - 1 - rho.log()).mean().item()])
    assert len(recorder.steps) == len(expected) == 2 * minibatches
    for a, b in zip(recorder.steps, expected):
        assert (a - b).abs().max().item() < 1e-6 and b.norm() > 1e-3
    means = [sum(column) / len(seen) for column in zip(*seen)]
    found = [stats[key] for key in ("loss", "grad_norm", "clip_fraction", "approx_kl")]
    assert found == pytest.approx(means, rel=1e-4, abs=1e-6)


def test_update_moves_the_policy_and_nothing_else_towards_the_better_answers(actor):
    """sum of A log pi rises; base, reference and reward model stay bit for bit what they were."""
    batch, args, parameters = collect(actor, ppo_epochs=4, beta=0.0, clip_low=0.9, clip_high=9.0)

    @torch.no_grad()
    def gain():
        return sum((batch["adv"][b] * logps_alone(actor, "policy", *sequence(batch, b), 0.7)).sum()
                   for b in range(len(ROWS))).item()

    before, first = {k: p.detach().clone() for k, p in actor.named_parameters()}, gain()
    grpo.update(actor, parameters, torch.optim.Adam(parameters, lr=3e-3), batch, args)
    own = {id(p) for p in parameters}
    for name, p in actor.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name
    assert gain() > first + 0.1


class Enough(Exception):
    pass


@pytest.mark.parametrize("kl_in, beta", [("loss", 0.0), ("reward", 0.3)])
def test_main_compares_answers_to_one_prompt_and_takes_the_kl_off_their_scores(
        kind, kl_in, beta, monkeypatch, tmp_path):
    """What reaches the update: G answers a prompt in a row, r_i less beta KL_i, leave-one-out."""
    model, seen = toy(kind), {}
    monkeypatch.setattr(common, "load_data", lambda *_: (PROMPTS, PROMPTS[:1]))
    monkeypatch.setattr(common, "load_model", lambda args: (model, Letters()))
    monkeypatch.setattr(common, "load_reward", lambda *_: stub_reward)
    monkeypatch.setattr(common, "start_adapter", lambda *_: add_adapters(model, kind, "policy"))

    def update(model, parameters, optimizer, batch, args):
        seen.update(batch)
        raise Enough

    monkeypatch.setattr(grpo, "update", update)
    flags = f"--adapter none --adv loo --beta 0.3 --kl-in {kl_in} --batch-size 6 --group-size 3"
    with pytest.raises(Enough):
        grpo.main([*flags.split(), "--max-length", "64", "--max-new-tokens", "9", "--device", "cpu",
                   "--out", str(tmp_path / "run")])
    rewards, kl = seen["score"].tolist(), []
    for b in range(6):
        ids, n = sequence(seen, b)
        assert ids[:-n] == sequence(seen, b - b % 3)[0][:len(ids) - n]
        kl.append(sum((seen["logp"][b, t] - seen["logp_ref"][b, t]).item() for t in range(n)))
        rewards[b] -= beta * kl[b]
    for b, r in enumerate(rewards):
        others = [rewards[i] for i in range(6) if i // 3 == b // 3 and i != b]
        assert seen["adv"][b].item() == pytest.approx(r - sum(others) / 2, abs=1e-4)
    assert max(map(abs, kl)) > 0.1 and len({len(sequence(seen, b)[0]) for b in range(6)}) > 1
