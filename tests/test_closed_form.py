"""The algorithms end where theory says, on a space small enough to enumerate: all 40 responses of
at most three tokens from a vocabulary of four. The toy and the runs: benchmarks/closed_form.py."""

import itertools

import pytest
import torch

import grpo
import ppo
from benchmarks import closed_form
from benchmarks.closed_form import (
    ALGORITHMS, BETA, SAMPLED, Toy, curve, distance, optimum, run_grpo,
)

RELATIVE = 5e-6  # of a gradient: token_logps is fp32


def off(a, b):
    """The relative distance of two gradients."""
    return ((a - b).norm() / b.norm()).item()


def last(run):
    *_, table = run
    return table


def other_policy(toy):
    """A policy that is neither the reference nor an optimum."""
    noise = torch.randn(toy.reference.shape, generator=torch.Generator().manual_seed(7))
    return (toy.reference + noise).requires_grad_()


# ------------------------------------------------------------------------------ the toy, pi*


@pytest.mark.parametrize("length, responses", [(1, 4), (2, 13), (3, 40)])
def test_every_response_is_there_once_and_all_probabilities_add_up_to_1(length, responses):
    toy = Toy(length)
    texts = {tuple(y[:n]) for y, n in zip(toy.ids.tolist(), toy.mask.sum(1).int().tolist())}
    assert len(texts) == len(toy.score) == responses
    assert toy.response_logps(other_policy(toy)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_optimum_is_the_tilted_reference(length):
    """Built state by state it is pi_ref(y) exp(r(y) / beta) / Z over whole responses, and no policy
    near it has a higher E[r] - beta KL."""
    toy = Toy(length)
    tilted = (toy.response_logps(toy.reference) + toy.score / BETA).log_softmax(0)
    assert (optimum(toy) - tilted).abs().max() < 1e-12
    p, r, ref = tilted.exp(), toy.score, toy.response_logps(toy.reference)
    best = (p * (r - BETA * (tilted - ref))).sum()
    for seed in range(20):
        nudge = torch.randn(len(p), generator=torch.Generator().manual_seed(seed)) / 10
        other = (tilted + nudge).log_softmax(0)
        assert (other.exp() * (r - BETA * (other - ref))).sum() < best


def test_forward_tilt_is_where_the_gradient_of_reward_minus_forward_kl_vanishes():
    toy = Toy(1)
    ref, q = toy.reference[0], toy.score
    logits = closed_form.forward_tilt(ref, q, BETA).requires_grad_()
    assert logits.exp().sum().item() == pytest.approx(1, abs=1e-12)
    logp = logits.log_softmax(0)
    aim = logp.exp() @ q - BETA * ref.exp() @ (ref - logp)
    assert torch.autograd.grad(aim, logits)[0].abs().max() < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_at_the_optimum_no_token_has_an_advantage(lam):
    """With the value beta log sum pi_ref exp(r / beta) of what may follow, each TD error is 0."""
    toy = Toy()
    ref, star = toy.response_logps(toy.reference).exp(), optimum(toy).exp()
    logp, logp_ref, values = torch.zeros(3, *toy.mask.shape, dtype=torch.double)
    for i, t in toy.mask.nonzero().tolist():
        same = (toy.states[:, t] == toy.states[i, t]) & (toy.mask[:, t] > 0)
        chosen = same & (toy.ids[:, t] == toy.ids[i, t])
        logp[i, t] = (star[chosen].sum() / star[same].sum()).log()
        logp_ref[i, t] = (ref[chosen].sum() / ref[same].sum()).log()
        tilted = (ref * (toy.score / BETA).exp())[same]
        values[i, t] = BETA * (tilted.sum() / ref[same].sum()).log()
    rewards = ppo.kl_shaped_rewards(toy.score, logp, logp_ref, toy.mask, BETA)
    adv, _ = ppo.gae(rewards, values, toy.mask, 1.0, lam)
    assert adv.abs().max() < 1e-12
    elsewhere = ppo.kl_shaped_rewards(toy.score, logp_ref, logp_ref, toy.mask, BETA)
    assert ppo.gae(elsewhere, values, toy.mask, 1.0, lam)[0].abs().max() > 0.1


# ------------------------------------------------------------------------------ where learning ends


@pytest.mark.parametrize("name", ALGORITHMS)
def test_with_exact_expectations_learning_ends_at_the_optimum(name):
    """KL in the reward, or dpo on Bradley-Terry preferences; responses of any length."""
    toy = Toy()
    assert distance(toy.response_logps(toy.reference), optimum(toy)) > 0.5
    assert curve(toy, ALGORITHMS[name](toy), optimum(toy))[-1] < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_from_samples_learning_ends_near_the_optimum(name, seed):
    """In the order of train(), with a learnt critic, lambda 0.95 and whitening."""
    toy = Toy()
    assert curve(toy, ALGORITHMS[name](toy, **SAMPLED[name], seed=seed), optimum(toy))[-1] < 1e-2


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_with_the_kl_in_the_reward_no_loss_of_grpo_is_biased_by_length(loss):
    """At pi* reward minus KL is the same for every answer: however tokens are averaged, there is no
    advantage left to be averaged."""
    toy = Toy()
    run = run_grpo(toy, **SAMPLED["grpo"], loss=loss, epochs=3)
    assert curve(toy, run, optimum(toy))[-1] < 1e-2


def test_the_clip_ends_learning_from_one_batch():
    """A hundred steps on one batch: within reach of the policy that drew it, unless unclipped."""
    toy = Toy()
    old = toy.response_logps(toy.reference)
    for name in ("ppo", "grpo"):
        for eps, near, far in ((0.2, 0.1, 1.0), (1e9, 5.0, float("inf"))):
            table = last(ALGORITHMS[name](toy, steps=1, epochs=100, eps=eps))
            assert near < distance(old, toy.response_logps(table)) < far, (name, eps)


def test_a_step_of_trpo_moves_each_logit_by_its_advantage():
    """Of a table of one state F^-1 g is A, up to a constant, and A F A is its variance."""
    toy, delta = Toy(1), 1e-4
    p = toy.response_logps(toy.reference).exp()
    adv = toy.score - p @ toy.score
    table = last(ALGORITHMS["trpo"](toy, steps=1, max_kl=(delta, delta), damping=1e-5))
    step = (table - toy.reference)[0]
    expected = (2 * delta / (p @ adv.square())).sqrt() * adv
    assert off(step - p @ step, expected) < 1e-3
    moved = distance(toy.response_logps(toy.reference), toy.response_logps(table))
    assert moved == pytest.approx(delta, rel=0.02)


# ------------------------------------------------------------------------------ KL in the loss


IN_THE_LOSS = {"k2": "loss", "k3-corrected": "loss", "k3": "loss, k3"}


@pytest.fixture(scope="module")
def ends():
    """log pi(y) where GRPO with the KL in the loss ends, by length and kind."""
    found = {}
    for length, kl in itertools.product((1, 2, 3), IN_THE_LOSS):
        toy = Toy(length)
        table = last(run_grpo(toy, kl_in="loss", kl=kl, adv="none"))
        found[length, kl] = toy, toy.response_logps(table)
    return found


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("kl", IN_THE_LOSS)
def test_with_the_kl_in_the_loss_learning_ends_at_its_own_closed_form(ends, kl, length):
    """pi(a) ~ pi_ref(a) exp(Q(a) / beta) at each state, or beta pi_ref(a) / (c - Q(a)) with k3,
    where Q is the expected reward and knows nothing of the KL still to come."""
    toy, logp = ends[length, kl]
    assert distance(logp, optimum(toy, kl_in=IN_THE_LOSS[kl])) < 1e-6


def test_with_one_token_k2_and_corrected_k3_reach_the_optimum_and_k3_does_not(ends):
    for kl in ("k2", "k3-corrected"):
        toy, logp = ends[1, kl]
        assert distance(logp, optimum(toy)) < 1e-6
    toy, logp = ends[1, "k3"]
    assert distance(logp, optimum(toy)) > 1e-2


@pytest.mark.parametrize("length", [2, 3])
def test_with_more_tokens_no_kl_in_the_loss_reaches_the_optimum(ends, length):
    """A per-token KL in the loss does not see how a token changes the KL of the states after it.
    k2 and corrected k3 end at the same policy; on this toy plain k3 ends further away."""
    toy, k2 = ends[length, "k2"]
    _, corrected = ends[length, "k3-corrected"]
    _, k3 = ends[length, "k3"]
    assert distance(k2, corrected) < 1e-6
    assert 1e-4 < distance(k2, optimum(toy)) < distance(k3, optimum(toy))


# ------------------------------------------------------------------------------ advantages


def test_the_advantages_of_a_large_group_are_exact_standard_scores():
    toy = Toy()
    p = toy.response_logps(toy.reference).exp()
    mean = (p * toy.score).sum()
    exact = (toy.score - mean) / (p * (toy.score - mean).square()).sum().sqrt()
    errors = [(closed_form.large_group(toy.score, p, size) - exact).abs().max().item()
              for size in (1000, 10_000, 100_000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def self_consistent(toy, beta, kl_in):
    """The optimum for beta sigma, where sigma is the spread of the scores under that very policy
    (and the 1e-4 that group_advantages adds), found by repetition from a wide spread."""
    old, sigma = 2.0, 1.0
    while abs(sigma - old) > 1e-9:
        logp = optimum(toy, beta * (sigma + 1e-4), kl_in)
        mean = logp.exp() @ toy.score
        old, sigma = sigma, (logp.exp() @ (toy.score - mean).square()).sqrt().item()
    return logp, sigma


@pytest.mark.parametrize("beta, kl", [(2.0, "k2"), (2.0, "k3"), (0.5, "k3")])
def test_dividing_by_the_spread_multiplies_beta_by_it(beta, kl):
    """One token, the KL in the loss: with k2 pi_ref exp(r / (beta sigma)) / Z."""
    toy = Toy(1)
    expected, sigma = self_consistent(toy, beta, IN_THE_LOSS[kl])
    end = toy.response_logps(last(run_grpo(toy, adv="std", kl_in="loss", kl=kl, beta=beta)))
    assert 0.01 < sigma < 0.5
    assert distance(end, expected) < 1e-6
    assert distance(end, optimum(toy, beta, IN_THE_LOSS[kl])) > 1e-2


def test_dividing_by_the_spread_lets_go_of_the_reference_where_beta_is_small():
    """A sharper policy has less spread, so less KL, so it gets sharper still: with beta 0.5 and k2
    until one answer has all, where pi* gives it half."""
    toy = Toy(1)
    _, sigma = self_consistent(toy, BETA, "loss")
    end = toy.response_logps(last(run_grpo(toy, adv="std", kl_in="loss", kl="k2")))
    assert sigma < 1e-3 and end.exp().max() > 0.99
    assert 0.5 < optimum(toy).exp().max() < 0.6


def test_with_k3_no_answer_is_let_go_altogether():
    """Even divided by the spread: each keeps a share beta sigma / (beta sigma + range of scores) of
    its probability under the reference, where k2 leaves all but one with nothing."""
    toy = Toy(1)
    k3, k2 = (toy.response_logps(last(run_grpo(toy, adv="std", kl_in="loss", kl=kl))).exp()
              for kl in ("k3", "k2"))
    sigma = (k3 @ (toy.score - k3 @ toy.score).square()).sqrt()
    share = BETA * sigma / (BETA * sigma + toy.score.max() - toy.score.min())
    floor = share * toy.response_logps(toy.reference).exp()
    assert (k3 > floor).all() and floor.min() > 1e-3
    assert (k2 < floor).sum() == 3


def policy_gradient(toy, theta, adv):
    """Of grpo_loss without KL, expected under theta, to be increased."""
    logp = grpo.token_logps(theta[toy.states], toy.ids)
    weights = toy.response_logps(theta.detach()).exp()
    loss = closed_form.expected(
        lambda *x: grpo.grpo_loss(*x, loss="dr_grpo", max_tokens=1),
        weights, logp, logp.detach(), logp.detach(), adv, toy.mask)
    return -torch.autograd.grad(loss, theta)[0]


def test_dividing_by_the_spread_maximises_the_arcsine_of_the_success_rate():
    """Rewards 0 and 1: the gradient of 2 arcsin sqrt p, and not that of p, which is "none"."""
    toy = Toy()
    theta, success = other_policy(toy), (toy.score > 0.2).double()
    weights = toy.response_logps(theta).exp()
    p = weights @ success
    arcsine, = torch.autograd.grad(2 * p.sqrt().asin(), theta, retain_graph=True)
    plain, = torch.autograd.grad(p, theta)
    scores = closed_form.large_group(success, weights.detach(), 1_000_000)
    assert off(policy_gradient(toy, theta, scores), arcsine) < 1e-3
    assert off(policy_gradient(toy, theta, success - p.detach()), plain) < RELATIVE
    assert off(plain, arcsine) > 0.3


@pytest.mark.parametrize("scale, factor", [("loo", 1.0), ("none", 2 / 3)])
def test_over_all_groups_of_three_loo_is_unbiased_and_none_is_a_third_short(scale, factor):
    """1 - 1/G: with a KL in the loss "none" makes beta look G / (G - 1) times as large."""
    toy = Toy(1)
    theta = other_policy(toy)
    p = toy.response_logps(theta).exp()
    exact, = torch.autograd.grad(p @ toy.score, theta)
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)
    adv = grpo.group_advantages(toy.score[groups], scale)
    chance = p.detach()[groups].prod(1, keepdim=True)
    expected = torch.zeros(4, dtype=torch.double).index_put_(
        (groups.flatten(),), (chance * adv / 3).flatten(), accumulate=True) / p.detach()
    assert off(policy_gradient(toy, theta, expected), factor * exact) < RELATIVE


# ------------------------------------------------------------------------------ the KL table


@pytest.fixture(params=[1, 3])
def setting(request):
    """(toy, theta, its probabilities, log pi with gradient, log pi_ref) for 1 and 3 tokens."""
    toy = Toy(request.param)
    theta = other_policy(toy)
    logp, logp_ref = (ppo.token_logps(x[toy.states], toy.ids) for x in (theta, toy.reference))
    return toy, theta, toy.response_logps(theta.detach()).exp(), logp, logp_ref


def kl_of_responses(toy, theta):
    """The gradient of KL(pi || pi_ref) over whole responses, by autograd through all of it."""
    logp, ref = toy.response_logps(theta), toy.response_logps(toy.reference)
    return torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta)[0]


def kl_of_states(toy, theta, weights, forward=False):
    """The gradient of the KL at each state, states weighted by how often they are met."""
    new, ref = theta.log_softmax(-1), toy.reference
    kls = (ref.exp() * (ref - new) if forward else new.exp() * (new - ref)).sum(-1)
    return torch.autograd.grad((weights @ (kls[toy.states] * toy.mask)).sum(), theta)[0]


def in_the_loss(toy, theta, weights, logp, logp_ref, kl):
    """The expected gradient of a grpo_loss of nothing but its KL term, per response."""
    loss = closed_form.expected(
        lambda *x: grpo.grpo_loss(*x, beta=1.0, loss="dr_grpo", max_tokens=1, kl=kl),
        weights, logp, logp.detach(), logp_ref, torch.zeros(len(weights)), toy.mask)
    return torch.autograd.grad(loss, theta)[0]


def test_k1_in_the_loss_has_no_gradient_over_whole_responses(setting):
    toy, theta, weights, logp, logp_ref = setting
    k1 = ((logp - logp_ref) * toy.mask).sum(1)
    assert (weights @ k1).item() > 0.1
    assert torch.autograd.grad(weights @ k1, theta)[0].abs().max() < 1e-6


def test_k1_in_the_reward_has_the_gradient_of_the_kl_over_whole_responses(setting):
    """kl_shaped_rewards, gae and policy_loss at ratio 1, whatever the critic says."""
    toy, theta, weights, logp, logp_ref = setting
    rewards = ppo.kl_shaped_rewards(torch.zeros(len(weights)), logp, logp_ref, toy.mask, 0.3)
    exact = kl_of_responses(toy, theta)
    tokens = weights.unsqueeze(1) * toy.mask.sum()
    for critic in (torch.zeros(len(theta)), theta.detach()[:, 0].float()):
        adv, _ = ppo.gae(rewards, (critic[toy.states] * toy.mask).float(), toy.mask, 1.0, 1.0)
        loss = ppo.policy_loss(logp, logp.detach(), adv * tokens, toy.mask, eps=0.2)
        gradient, = torch.autograd.grad(loss, theta, retain_graph=True)
        assert off(gradient, 0.3 * exact) < RELATIVE


@pytest.mark.parametrize("kl", ["k2", "k3-corrected"])
def test_k2_and_corrected_k3_have_the_gradient_of_the_kl_of_each_state_alone(setting, kl):
    """Which over whole responses is that of the KL only if they are one token."""
    toy, theta, weights, logp, logp_ref = setting
    gradient = in_the_loss(toy, theta, weights, logp, logp_ref, kl)
    assert off(gradient, kl_of_states(toy, theta, weights)) < RELATIVE
    whole = off(gradient, kl_of_responses(toy, theta))
    assert whole < RELATIVE if toy.mask.shape[1] == 1 else whole > 0.1


def test_k3_has_the_gradient_of_the_forward_kl_of_each_state(setting):
    toy, theta, weights, logp, logp_ref = setting
    gradient = in_the_loss(toy, theta, weights, logp, logp_ref, "k3")
    assert off(gradient, kl_of_states(toy, theta, weights, forward=True)) < RELATIVE
    assert off(gradient, kl_of_states(toy, theta, weights)) > 0.1
