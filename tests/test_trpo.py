import copy
import inspect
import json
import math

import pytest
import torch
from conftest import TARGETS, toy
from test_ppo import (
    FAULTS, LESSON, ROWS, Letters, check_explained_variance, check_random_numbers, checkpoint,
    eight_letters, first_row, flat, logps_alone, make_base, noise, parameters_of, recorded,
    sequence, stub_reward, surprise_of, timeless, top_p, values_alone,
)
from torch.distributions import Categorical, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import lora
import ppo
import trpo

MASK = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
N = int(MASK.sum())


def with_junk(x, junk):
    return torch.where(MASK > 0, x, junk)


def close(a, b, rel):
    """|a - b| <= rel |b|, and b is not nothing."""
    return b.norm() > 1e-6 and (a - b).norm() <= rel * b.norm()


@pytest.fixture
def double(monkeypatch):
    """.float() keeps what is double, so that a comparison may be sharper than fp32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# ------------------------------------------------------------------------------ shared with ppo.py


@pytest.mark.parametrize("name", [
    "token_logps", "masked_mean", "kl_shaped_rewards", "gae", "whiten", "explained_variance",
    "rollout_stats", "make_models", "batch_logps", "read_values", "rollout", "samples", "evaluate",
])
def test_what_is_named_as_in_ppo_is_the_same_to_the_byte(name):
    """So what test_ppo.py says of it holds here."""
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (trpo, ppo))
    assert ours == theirs and getattr(trpo, name).__module__ == "trpo"


def test_token_logps_at_a_temperature():
    """Odds 1 : 4 become 1 : 16 at temperature 1/2."""
    logits, ids = torch.tensor([[[0.0, math.log(4)]] * 2]), torch.tensor([[0, 1]])
    logp = trpo.token_logps(logits, ids, 0.5)
    assert logp[0].exp().tolist() == pytest.approx([1 / 17, 16 / 17], abs=1e-6)


def test_rewards_advantages_and_returns_by_hand():
    """beta 1/2, gamma 1, lambda 1/2; the score 2 falls on the second of three, the last real."""
    mask, values = torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 3.0, 77.0]])
    logp, logp_ref = torch.tensor([[-1.0, -2, 9]]), torch.tensor([[-2.0, -1, -9]])
    rewards = trpo.kl_shaped_rewards(torch.tensor([2.0]), logp, logp_ref, mask, 0.5)
    adv, ret = trpo.gae(rewards, values, mask, 1.0, 0.5)
    assert rewards[0].tolist() == [-0.5, 2.5, 0.0]
    assert adv[0].tolist() == [1.5 - 0.25, -0.5, 0.0] and ret[0].tolist() == [2.25, 2.5, 0.0]
    with pytest.raises(ValueError, match="no token"):
        trpo.kl_shaped_rewards(torch.zeros(1), logp, logp_ref, torch.zeros(1, 3), 0.5)


def test_mean_whitening_and_explained_variance_by_hand():
    """Tokens 1, 3 and 8: mean 4, biased variance 26/3; residuals 2, 0, -2 leave 8/3 of it."""
    x, mask = torch.tensor([[1.0, 3.0], [8.0, 999.0]]), torch.tensor([[1.0, 1], [1, 0]])
    white = [d / math.sqrt(26 / 3) for d in (-3, -1, 4, 0)]
    assert trpo.masked_mean(x, mask).item() == 4.0
    assert trpo.whiten(x, mask).flatten().tolist() == pytest.approx(white, abs=1e-6)
    values = torch.tensor([[-1.0, 3.0], [10.0, -5.0]])
    assert trpo.explained_variance(values, x, mask) == pytest.approx(1 - 8 / 26, abs=1e-6)


# ------------------------------------------------------------------------------ what is optimised


def test_surrogate_by_hand():
    """1.5 * 2, 0.5 * 2 and -3 * 1, unclipped; mean of three, the fourth is padding."""
    ratio = torch.tensor([[1.5, 0.5], [3.0, 1.7]])
    adv, mask = torch.tensor([[2.0, 2.0], [-1.0, 50.0]]), torch.tensor([[1.0, 1], [1, 0]])
    old = noise(0, 2, 2)
    gain = trpo.surrogate(old + ratio.log(), old, adv, mask)
    assert gain.item() == pytest.approx((3 + 1 - 3) / 3, abs=1e-6)


@pytest.mark.parametrize("logp_junk, adv_junk", [(3.0, 50.0), (-3.0, -50.0), (200.0, 7.0)])
def test_gradient_of_the_surrogate_at_ratio_1_is_the_policy_gradient(logp_junk, adv_junk):
    """That of mean A log pi, to be increased: A / N for each real token, even where the ratio of
    two padding tokens overflows fp32 (e^200)."""
    adv, old = noise(1, 4, 4), noise(2, 4, 4)
    logp = with_junk(old, logp_junk).requires_grad_()
    gain = trpo.surrogate(logp, with_junk(old, 0.0), with_junk(adv, adv_junk), MASK)
    gain.backward()
    assert gain.item() == pytest.approx(adv[MASK > 0].mean().item(), abs=1e-6)
    assert torch.allclose(logp.grad, torch.where(MASK > 0, adv / N, 0.0), atol=1e-7)


def test_mean_kl_is_the_double_sum_over_tokens_and_vocabulary():
    """KL(old || new), not KL(new || old), whatever stands in the padding; in fp32 for bf16 too."""
    old, new = noise(5, 4, 4, 3), 2 * noise(6, 4, 4, 3)
    old, new = (x.bfloat16().where(MASK[..., None] > 0, 1e3 * x) for x in (old, new))
    forward = backward = 0.0
    for b, t in MASK.nonzero().tolist():
        weights = [[math.exp(x) for x in logits[b, t].tolist()] for logits in (old, new)]
        p, q = ([w / sum(ws) for w in ws] for ws in weights)
        forward += sum(x * math.log(x / y) for x, y in zip(p, q)) / N
        backward += sum(y * math.log(y / x) for x, y in zip(p, q)) / N
    assert abs(forward - backward) > 0.05
    assert trpo.mean_kl(old.float(), new.float(), MASK).item() == pytest.approx(forward, abs=1e-5)
    assert trpo.mean_kl(new.float(), old.float(), MASK).item() == pytest.approx(backward, abs=1e-5)
    half = trpo.mean_kl(old.bfloat16(), new.bfloat16(), MASK)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(forward, abs=1e-5)


def test_mean_kl_and_its_gradient_are_0_at_equal_logits_and_there_only():
    logits, seen = noise(7, 4, 4, 5), []
    for distance in (0.0, 0.1):
        moved = (logits + distance * noise(8, 4, 4, 5)).requires_grad_()
        kl = trpo.mean_kl(logits, moved, MASK)
        seen.append((abs(kl.item()), torch.autograd.grad(kl, moved)[0].abs().max().item()))
    assert max(seen[0]) < 1e-7 and min(seen[1]) > 1e-3


def test_a_small_mean_kl_is_not_rounded_away():
    """A KL of 1e-5 over a vocabulary of 4096 agrees with float64 to one in a thousand."""
    old = 3 * noise(9, 4, 4, 4096)
    new = old + 0.005 * noise(10, 4, 4, 4096)
    p, q = (x.double().log_softmax(-1) for x in (old, new))
    exact = ((p.exp() * (p - q)).sum(-1) * MASK).sum() / MASK.sum()
    assert 1e-6 < exact < 1e-4
    assert trpo.mean_kl(old, new, MASK).item() == pytest.approx(exact.item(), rel=1e-3)


def test_value_loss_by_hand():
    """Errors 1, -2 and 3 on three real tokens: half of 14 / 3; the slope is the error / 3."""
    mask, ret = torch.tensor([[1.0, 1], [1, 0]]), torch.tensor([[1.0, 2], [3, 4]])
    values = torch.tensor([[2.0, 0], [6, 99]], requires_grad=True)
    loss = trpo.value_loss(values, ret, mask)
    loss.backward()
    assert loss.item() == pytest.approx(7 / 3, abs=1e-6)
    assert values.grad.flatten().tolist() == pytest.approx([1 / 3, -2 / 3, 1, 0], abs=1e-6)


# ------------------------------------------------------------------------------ F, and F^-1


def test_flatten_keeps_order():
    tensors = [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor(5.0), torch.tensor([[6.0], [7]]).T]
    assert trpo.flatten(tensors).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_fisher_vector_product_is_the_hessian_and_the_closed_form(double):
    """Of a net 3 - 4 - 5 with tanh: the Hessian of the KL, and the mean over real tokens of
    J^T (diag p - p p^T) J; symmetric, without negative eigenvalues, plus the damping."""
    states = noise(9, 4, 4, 3).double()
    params = [noise(n, n, n - 1).double().requires_grad_() for n in (4, 5)]

    def logits(x):
        return torch.tanh(states @ x[:12].view(4, 3).T) @ x[12:].view(5, 4).T

    def kl(x):
        return trpo.mean_kl(logits(theta), logits(x), MASK)

    def product(v, damping):
        return trpo.fisher_vector_product(kl(trpo.flatten(params)), params, v, damping)

    theta = trpo.flatten(params).detach()
    hessian = torch.autograd.functional.hessian(kl, theta)
    J, p = torch.autograd.functional.jacobian(logits, theta), logits(theta).softmax(-1)
    closed = sum(J[b, t].T @ (p[b, t].diag() - p[b, t].outer(p[b, t])) @ J[b, t]
                 for b, t in MASK.nonzero().tolist()) / N
    F = torch.stack([product(e, 0.0) for e in torch.eye(32, dtype=torch.double)])
    assert close(F, hessian, 1e-6) and close(F, closed, 1e-6) and close(F.T, F, 1e-12)
    eigenvalues = torch.linalg.eigvalsh(F)
    assert eigenvalues[0] > -1e-12 and eigenvalues[-1] > 1e-2
    v = noise(10, 32).double()
    assert close(product(v, 0.3), closed @ v + 0.3 * v, 1e-6)


def spd(eigenvalues):
    """A symmetric positive definite matrix with these, and a right side."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(noise(11, n, n).double())[0]
    return Q @ torch.as_tensor(eigenvalues).double().diag() @ Q.T, noise(12, n).double()


def counted(M, b, **flags):
    """(solution, number of products)."""
    seen = []
    x = trpo.conjugate_gradient(lambda v: seen.append(v) or M @ v, b, **flags)
    return x, len(seen)


@pytest.mark.parametrize("eigenvalues, products", [
    (range(1, 9), 8), ([2.0] * 8, 1), ([2.0] * 5 + [7.0] * 3, 2), ([1.0, 2, 3, 3] * 2, 3),
])
def test_conjugate_gradient_is_exact_after_a_product_per_eigenvalue(eigenvalues, products):
    M, b = spd(eigenvalues)
    exact = torch.linalg.solve(M, b)
    x, used = counted(M, b)
    assert used == products and close(x, exact, 1e-8)
    x, used = counted(M, b, iters=products - 1)
    assert used == products - 1 and not close(x, exact, 1e-4)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-8])
def test_conjugate_gradient_stops_at_the_first_residual_below_tol(tol):
    """And after ten products if not told otherwise; |b - M x|^2 is what is compared."""
    M, b = spd(torch.linspace(1, 5, 30))
    x, products = counted(M, b, iters=30, tol=tol)
    before, _ = counted(M, b, iters=products - 1)
    assert 1 < products < 30 and counted(M, b, tol=0.0)[1] == 10
    assert (b - M @ x).square().sum() < tol <= (b - M @ before).square().sum()


def test_conjugate_gradient_of_nothing_is_nothing():
    x, products = counted(*spd([1.0, 2, 3])[:1], torch.zeros(3).double())
    assert products == 0 and x.tolist() == [0.0] * 3


def test_step_length_by_hand():
    """Half of 8 times the square of 0.5 is 1."""
    assert trpo.step_length(8.0, 1.0) == 0.5 and trpo.step_length(2.0, 0.25) == 0.5
    assert [trpo.step_length(x, 1.0) for x in (0.0, -8.0, math.nan, math.inf)] == [0.0] * 4


# ------------------------------------------------------------------------------ toys


PROMPTS, V, T = [3, 5, 2, 4], 8, 0.7
FIELDS = dict(
    batch_size=len(ROWS), max_length=64, max_new_tokens=9, temperature=T, missing_eos_score=-3.0,
    micro_batch_size=6, max_kl=1e-5, cg_iters=40, damping=0.1, fisher_rows=6, backtracks=10,
    ppo_epochs=1, lora_rank=2,
)


def fields(**changes):
    return trpo.Config(**{**FIELDS, **changes})


def actor(kind, vocabulary):
    """A toy with the adapters of TRPO, all different and none of them zero; "old" is theta_old."""
    model = toy(kind, vocabulary)
    for name in ("policy", "old", "reference", "critic"):
        own = name in ("policy", "critic")
        lora.add_adapter(model, name, rank=2, targets=TARGETS[kind], trainable=own)
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.2)
    lora.add_head(model, "critic")
    return model


def everything(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """The adapters that are no longer what they were, to the bit; "weight" is the critic's head."""
    changed = (n for n, p in model.named_parameters() if not torch.equal(p, before[n]))
    return {name.rpartition(".")[2] for name in changed}


def alone(model, batch, function, *extra):
    """function(model, *extra, ids, number of answer tokens) of every row, without padding."""
    return [function(model, *extra, *sequence(batch, b)) for b in range(len(batch["y"]))]


def logits_alone(model, name, ids, n):
    with lora.use_adapter(model, name):
        return model(torch.tensor([ids])).logits[0, -n - 1 : -1] / T


def policy_logps(model, ids, n):
    return logps_alone(model, "policy", ids, n, T)


def real(batch, key):
    """The real tokens of every row."""
    return [row[: int(n)] for row, n in zip(batch[key], batch["mask"].sum(1))]


@pytest.fixture
def policy(kind, double):
    """(model, parameters, those of "old", batch) in double, the policy active: answers of unequal
    length to prompts of unequal length, junk in the padding; the mean of the advantages is not 0.
    """
    model, (B, R), P = actor(kind, V).double(), MASK.shape, max(PROMPTS)
    ids = torch.randint(V, (B, P + R), generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[0] * (P - n) + [1] * n for n in PROMPTS])
    batch = {"x": ids[:, :P], "x_mask": prompt, "y": ids[:, P:], "mask": MASK.double(),
             "adv": with_junk(30 * noise(1, B, R) + 10, 99.0).double(),
             "ret": with_junk(noise(2, B, R), 99.0).double(),
             "logp_old": with_junk(MASK, 9.0).double(),
             "logits_old": 9 * noise(3, B, R, V).double()}
    parameters, old = (lora.adapter_parameters(model, name) for name in ("policy", "old"))
    start(model, parameters, old, batch)
    with lora.use_adapter(model, "policy"):
        yield model, parameters, old, batch


@torch.no_grad()
def start(model, parameters, old, batch):
    """Makes theta_old what the policy is."""
    for p, was in zip(parameters, old):
        was.copy_(p)
    found = alone(model, batch, logits_alone, "policy"), alone(model, batch, policy_logps)
    for b, (logits, logp) in enumerate(zip(*found)):
        batch["logits_old"][b, : len(logits)], batch["logp_old"][b, : len(logp)] = logits, logp


def gradient_alone(model, parameters, _, batch):
    """Of mean A log pi, row by row."""
    rows = zip(real(batch, "adv"), alone(model, batch, policy_logps))
    return trpo.flatten(torch.autograd.grad(sum((a * x).sum() for a, x in rows) / N, parameters))


def fisher_alone(model, parameters, _, batch, rows):
    """E[J^T (diag p - p p^T) J] over the real tokens of `rows`, dense, from first derivatives."""
    tokens = [z for b in rows for z in logits_alone(model, "policy", *sequence(batch, b))]
    F = 0.0
    for z in tokens:
        J = [torch.autograd.grad(x, parameters, retain_graph=True) for x in z]
        J, p = torch.stack([trpo.flatten(row) for row in J]), z.detach().softmax(-1)
        F = F + J.T @ (p.diag() - p.outer(p)) @ J / len(tokens)
    return F


@torch.no_grad()
def measure(model, batch):
    """(L, D), row by row."""
    rows = zip(alone(model, batch, policy_logps), real(batch, "logp_old"), real(batch, "adv"))
    gain = sum(((new - old).exp() * a).sum() for new, old, a in rows) / N
    pairs = zip(*(alone(model, batch, logits_alone, name) for name in ("old", "policy")))
    kl = sum(kl_divergence(*(Categorical(logits=z) for z in pair)).sum() for pair in pairs) / N
    return gain.item(), kl.item()


# ------------------------------------------------------------------------------ natural gradient


def test_policy_logits_and_surrogate_are_those_of_each_row_alone(policy):
    """At the temperature, by the active adapter; L and D away from theta_old."""
    model, parameters, old, batch = policy
    step = 0.02 * noise(3, len(trpo.flatten(old))).double()
    trpo.move(parameters, old, step)
    own = alone(model, batch, logits_alone, "policy")
    (index, two), = common.micro_batches(batch, 2, torch.tensor([0, 3]))
    assert index.tolist() == [3, 0]  # the shorter first
    logits = trpo.scaled_logits(model, two, fields())
    assert close(logits[0, :2], own[3], 1e-5) and close(logits[1], own[0], 1e-5)
    gain, kl = measure(model, batch)
    assert kl > 1e-4
    L, logits = trpo.surrogate_of(model, batch, fields())
    assert L.item() == pytest.approx(gain, rel=1e-4)
    assert close(logits[1, :1], own[1], 1e-5)
    for micro in (None, 4, 3):
        both = trpo.gain_and_kl(model, batch, fields(micro_batch_size=micro))
        assert both == pytest.approx((gain, kl), rel=1e-4)


def test_move_adds_the_step_to_the_old_policy():
    parameters, old = ([torch.full((2, 2), x), torch.full((1,), x)] for x in (9.0, 2.0))
    trpo.move(parameters, old, torch.arange(5.0))
    assert trpo.flatten(parameters).tolist() == [2, 3, 4, 5, 6]
    assert trpo.flatten(old).tolist() == [2.0] * 5


@pytest.mark.parametrize("rows, micro, found", [
    (None, 2, [([1, 3], 0.3), ([2, 0], 0.7)]),
    ([0, 1, 2, 3], 3, [([1, 3, 2], 0.6), ([0], 0.4)]),
    ([0, 1], 1, [([1], 0.2), ([0], 0.8)]),
])
def test_parts_weigh_by_their_share_of_the_tokens_of_the_rows(rows, micro, found):
    number = torch.arange(4).unsqueeze(1)
    batch = {"x": number, "x_mask": torch.ones_like(number), "y": number.expand(4, 4), "mask": MASK}
    rows = None if rows is None else torch.tensor(rows)
    parts = list(trpo.parts(batch, fields(micro_batch_size=micro), rows))
    assert [b["x"][:, 0].tolist() for b, _ in parts] == [rows for rows, _ in found]
    assert [b["y"][:, 0].tolist() for b, _ in parts] == [rows for rows, _ in found]
    assert [share.item() for _, share in parts] == pytest.approx([share for _, share in found])


def kl_graphs(model, batch, rows, config):
    """D of the first rows at theta_old, as micro-batches to be summed."""
    graphs = []
    with sdpa_kernel(SDPBackend.MATH):
        for b, share in trpo.parts(batch, config, torch.arange(rows)):
            logits = trpo.scaled_logits(model, b, config)
            graphs.append(share * trpo.mean_kl(logits.detach(), logits, b["mask"]))
    return graphs


@pytest.mark.parametrize("micro, rows", [(4, 4), (3, 4), (1, 3)])
def test_the_kl_is_0_without_slope_and_bends_as_the_fisher_matrix(policy, micro, rows):
    model, parameters, _, batch = policy
    graphs = kl_graphs(model, batch, rows, fields(micro_batch_size=micro))
    assert len(graphs) == math.ceil(rows / micro)
    for kl in graphs:
        slope = trpo.flatten(torch.autograd.grad(kl, parameters, retain_graph=True))
        assert abs(kl.item()) < 1e-10 and slope.norm() < 1e-10
    v = noise(4, len(slope)).double()
    Fv = sum(trpo.fisher_vector_product(kl, parameters, v, 0.0) for kl in graphs)
    assert close(Fv, fisher_alone(*policy, range(rows)) @ v, 1e-5)


def test_fisher_vector_product_is_the_dense_hessian_of_the_kl(policy):
    """With respect to the last B of the model, by differentiating D of each row alone twice."""
    model, parameters, _, batch = policy
    B = parameters[-1]
    name, = (name for name, p in model.named_parameters() if p is B)
    old = [z.detach() for z in alone(model, batch, logits_alone, "policy")]

    def kl_of(x):
        total = 0.0
        for b, z in enumerate(old):
            ids, n = sequence(batch, b)
            out = torch.func.functional_call(model, {name: x}, (torch.tensor([ids]),))
            new = Categorical(logits=out.logits[0, -n - 1 : -1] / T, validate_args=False)
            total = total + kl_divergence(Categorical(logits=z), new).sum()
        return total / N

    with sdpa_kernel(SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(kl_of, B.detach(), vectorize=True)
    kl, = kl_graphs(model, batch, 4, fields())
    v = noise(4, B.numel()).double()
    product = trpo.fisher_vector_product(kl, [B], v, 0.3)
    assert close(product, dense.view(len(v), -1) @ v + 0.3 * v, 1e-5)


def test_fisher_vector_products_pass_through_checkpointed_layers(policy):
    """Differentiated twice, what a checkpoint computes again is the same."""
    model, parameters, _, batch = policy
    v, products = noise(4, sum(p.numel() for p in parameters)).double(), []
    for _ in range(2):
        kl, = kl_graphs(model, batch, 4, fields())
        with sdpa_kernel(SDPBackend.MATH):
            products.append(trpo.fisher_vector_product(kl, parameters, v, 0.0))
            slope = trpo.kl_slope(kl, parameters)
            for _ in range(2):  # from one slope, the same to the bit
                again = trpo.fisher_vector_product(kl, parameters, v, 0.0, slope)
                assert torch.equal(again, products[-1])
        checkpoint(model)
    assert close(products[1], products[0], 1e-5)


@pytest.mark.parametrize("micro, fisher_rows, damping, max_kl", [
    (3, 6, 0.1, 1e-7), (1, 2, 0.02, 1e-7),
])
def test_natural_step_is_the_dense_solution(policy, micro, fisher_rows, damping, max_kl):
    """(F + damping)^-1 g with F of --fisher-rows, at the length where D of the whole batch is
    max_kl: there 1/2 s F s, without damping, is max_kl too. Nothing has moved and no gradient is
    left."""
    model, parameters, old, batch = policy
    before = everything(model)
    config = fields(micro_batch_size=micro, fisher_rows=fisher_rows, damping=damping, max_kl=max_kl)
    step, norm = trpo.natural_step(*policy, config)
    assert not moved(model, before) and all(p.grad is None for p in parameters)
    g = gradient_alone(*policy)
    F = part = fisher_alone(*policy, range(4))
    if fisher_rows < 4:
        part = fisher_alone(*policy, range(fisher_rows))
    s = torch.linalg.solve(part + damping * torch.eye(len(g), dtype=g.dtype), g)
    assert norm == pytest.approx(g.norm().item(), rel=1e-5)
    assert (step @ s / step.norm() / s.norm()).item() == pytest.approx(1.0, abs=1e-5)
    trpo.move(parameters, old, step)
    assert measure(model, batch)[1] == pytest.approx(max_kl, rel=0.01)
    assert (step @ F @ step).item() / 2 == pytest.approx(max_kl, rel=0.1)


def test_the_trust_region_is_met_where_the_kl_is_no_longer_quadratic(policy):
    """Realised D within 20% of max_kl, from F of half of the rows."""
    model, parameters, old, batch = policy
    step, _ = trpo.natural_step(*policy, fields(fisher_rows=2, max_kl=1e-3))
    trpo.move(parameters, old, step)
    assert measure(model, batch)[1] == pytest.approx(1e-3, rel=0.2)


def test_natural_step_makes_cg_iters_products(policy):
    """One product points along the gradient, two do not."""
    g, cosines = gradient_alone(*policy), []
    for products in (1, 2):
        step, _ = trpo.natural_step(*policy, fields(cg_iters=products))
        cosines.append((step @ g / step.norm() / g.norm()).item())
    assert cosines[0] == pytest.approx(1.0, abs=1e-6) and 0 < cosines[1] < 0.999


def test_a_new_adapter_moves_in_B_only(policy):
    """B = 0: gradient and Fisher matrix have no rows for A, and F alone could not be inverted."""
    model, parameters, _, batch = policy
    for B in parameters[1::2]:
        B.data.zero_()
    start(*policy)
    A = trpo.flatten([torch.full_like(p, i % 2 == 0) for i, p in enumerate(parameters)]).bool()
    kl, = kl_graphs(model, batch, 4, fields())
    v = noise(5, len(A)).double()
    Fv, FvA = (trpo.fisher_vector_product(kl, parameters, x, 0.0) for x in (v, v * A))
    g, (step, _) = gradient_alone(*policy), trpo.natural_step(*policy, fields(max_kl=1e-3))
    for vector in (g, Fv, step):
        assert vector[A].abs().max() < 1e-9 < 1e-4 < vector[~A].abs().max()
    assert FvA.abs().max() < 1e-12


def test_a_weight_that_has_no_part_in_the_answers_stays(policy):
    """As an adapter in the vision tower of a model that reads texts only."""
    model, parameters, old, batch = policy
    alone, _ = trpo.natural_step(*policy, fields())
    idle = torch.nn.Parameter(torch.ones(3, dtype=parameters[0].dtype))
    step, _ = trpo.natural_step(
        model, [*parameters, idle], [*old, idle.detach().clone()], batch, fields())
    assert torch.equal(step[:-3], alone) and not step[-3:].any()


# ------------------------------------------------------------------------------ line search


def search(policy, factor=1.0, **changes):
    """(what the line search along factor times the natural step returns, that step)."""
    model, parameters, old, batch = policy
    step = factor * trpo.natural_step(*policy, fields(cg_iters=3))[0]
    return trpo.line_search(model, parameters, old, step, batch, fields(**changes)), step


@pytest.mark.parametrize("factor, j, micro", [(1.05, 0, 4), (1.2, 1, 3), (4.0, 6, 1)])
def test_a_step_is_shortened_to_the_first_that_the_constraint_allows(policy, factor, j, micro):
    """KL grows with the square of the length: of factor^2 0.64^j the first that is below 1.2. Gain
    and KL are those of each row alone; the whole step costs max_kl, within a fifth."""
    model, parameters, old, batch = policy
    before, L_old = everything(model), measure(model, batch)[0]
    (gain, kl, trials), step = search(policy, factor, micro_batch_size=micro)
    assert trials == j and gain > 0
    assert kl == pytest.approx((factor * 0.8**j) ** 2 * 1e-5, rel=0.2)
    assert torch.equal(trpo.flatten(parameters), trpo.flatten(old) + 0.8**j * step)
    assert (L_old + gain, kl) == pytest.approx(measure(model, batch), rel=1e-3)
    assert moved(model, before) == {"policy"}


@pytest.mark.parametrize("factor, changes", [
    (-1.0, dict(max_kl=1.0)),    # the surrogate falls
    (1.0, dict(max_kl=1e-8)),    # too far, however often it is shortened
    (4.0, dict(backtracks=6)),   # the seventh trial would have done
    (math.nan, dict(max_kl=1.0)),
])
def test_where_no_step_will_do_the_policy_stays_to_the_bit(policy, factor, changes):
    before = everything(policy[0])
    result, _ = search(policy, factor, **changes)
    assert result == (0.0, 0.0, fields(**changes).backtracks)
    assert not moved(policy[0], before)


def test_a_step_of_length_0_moves_nothing_whatever_the_gain_rounds_to(policy):
    before = everything(policy[0])
    (gain, kl, _), _ = search(policy, 0.0, max_kl=1.0)
    assert (gain, kl) == pytest.approx((0.0, 0.0), abs=1e-12) and not moved(policy[0], before)


def test_a_gradient_that_is_no_number_moves_nothing(policy):
    model, _, _, batch = policy
    before = everything(model)
    batch["adv"][0, 0] = math.nan
    assert search(policy)[0] == (0.0, 0.0, 10) and not moved(model, before)


# ------------------------------------------------------------------------------ critic


@pytest.mark.parametrize("micro, scale", [(4, 1.0), (3, 1.0), (1, 1e-3)])
def test_a_step_of_the_critic_is_the_clipped_gradient_row_by_row(policy, micro, scale):
    """Whatever the micro-batch; the loss is that before the step; only the critic moves."""
    model, _, _, batch = policy
    critic, config = lora.adapter_parameters(model, "critic"), fields(micro_batch_size=micro)
    values = alone(model, batch, values_alone)
    for row, v in zip(batch["ret"], values):
        row[: len(v)] = v.detach() + scale * row[: len(v)]
    errors = [v - ret for v, ret in zip(values, real(batch, "ret"))]
    loss = sum(e.square().sum() for e in errors) / 2 / N
    g = trpo.flatten(torch.autograd.grad(loss, critic))
    before, theta = everything(model), trpo.flatten(critic).detach()
    got = trpo.fit_critic(model, torch.optim.SGD(critic, lr=0.01), batch, config)
    assert got == pytest.approx(loss.item(), rel=1e-4)
    assert (g.norm() > 1.1) == (scale == 1.0)
    assert close(theta - trpo.flatten(critic), 0.01 * g / max(1.0, g.norm().item()), 1e-4)
    assert moved(model, before) == {"critic", "weight"}


def test_the_critic_passes_over_the_batch_ppo_epochs_times(policy):
    """Three passes at once are three times one, and each loss is lower than the one before."""
    model, _, _, batch = policy
    critic, ends = lora.adapter_parameters(model, "critic"), []
    theta = trpo.flatten(critic).detach()
    for epochs in (1, 3):
        torch.nn.utils.vector_to_parameters(theta.clone(), critic)
        optimizer = torch.optim.SGD(critic, lr=0.01)
        losses = [trpo.fit_critic(model, optimizer, batch, fields(ppo_epochs=epochs))
                  for _ in range(3 // epochs)]
        ends.append((losses, trpo.flatten(critic).detach() - theta))
    (losses, one_by_one), (first, at_once) = ends
    assert losses[0] > losses[1] > losses[2] and first == pytest.approx(losses[:1])
    assert close(at_once, one_by_one, 1e-6)


# ------------------------------------------------------------------------------ theta_old


def collect(model, config):
    """A rollout with advantages, and what score_old returns of it."""
    model.generation_config.eos_token_id = list(range(2, 18))  # one token in four
    generator = torch.Generator().manual_seed(3)
    batch, _ = trpo.rollout(model, Letters(), ROWS, stub_reward, config, generator)
    batch["adv"] = noise(6, *batch["mask"].shape) * batch["mask"]
    sampled = batch["logp_old"].clone()
    return batch, sampled, trpo.score_old(model, batch, config)


@pytest.mark.parametrize("micro", [None, 4])
@torch.no_grad()
def test_the_old_policy_is_that_of_each_row_alone(kind, micro):
    """Its logits over the temperature, and its log-probabilities; 0 on padding. What score_old
    returns is by how much the sampler's log-probabilities differ from these."""
    model = actor(kind, 64)
    batch, sampled, difference = collect(model, fields(micro_batch_size=micro))
    assert batch["mask"].sum(1).min() < batch["mask"].shape[1] and batch["ended"].any()
    logits, logps = alone(model, batch, logits_alone, "policy"), alone(model, batch, policy_logps)
    for b, (z, logp) in enumerate(zip(logits, logps)):
        assert torch.allclose(batch["logits_old"][b, : len(z)], z, atol=1e-5)
        assert torch.allclose(batch["logp_old"][b, : len(z)], logp, atol=1e-5)
        assert not batch["logp_old"][b, len(z):].any()
    assert difference == (batch["logp_old"] - sampled).abs().max().item() < 1e-4


@pytest.mark.parametrize("micro", [None, 4])
def test_at_the_old_policy_the_kl_is_0_and_every_ratio_1_to_the_bit(kind, micro):
    """In fp32; so a step of the line search is never taken for what is rounding."""
    model, config = actor(kind, 64), fields(micro_batch_size=micro)
    batch, _, _ = collect(model, config)
    with lora.use_adapter(model, "policy"), torch.no_grad():
        _, kl = trpo.gain_and_kl(model, batch, config)
        for _, b in common.micro_batches(batch, micro):
            logp = trpo.token_logps(trpo.scaled_logits(model, b, config), b["y"])
            assert torch.equal(logp * b["mask"], b["logp_old"])
    assert kl == 0.0


def test_a_bf16_base_has_fp32_logits_and_refuses_a_small_max_kl(kind):
    """Its KL is known to about 1e-4; at the default of 1e-3 it trains."""
    model = make_base(kind).to(torch.bfloat16)
    with pytest.raises(ValueError, match="--max-kl 0.0002 .*bf16.*--dtype fp32"):
        trpo.train(model, Letters(), ROWS, stub_reward, fields(max_kl=2e-4))
    assert not lora.names(model)  # refused before anything is made
    config = trpo.Config(**FEW, steps=1)
    row, = trpo.train(model, Letters(), ROWS, stub_reward, config)
    assert row["kl_step"] <= 1.2e-3
    batch, _, _ = collect(model, config)
    assert batch["logits_old"].dtype == batch["logp_old"].dtype == torch.float32
    with lora.use_adapter(model, "policy"):
        assert common.read(model, batch["x"], batch["x_mask"], batch["y"],
                           batch["mask"]).dtype == torch.bfloat16
        assert trpo.scaled_logits(model, batch, config).dtype == torch.float32


def test_an_fp32_base_takes_a_small_max_kl(kind):
    config = trpo.Config(**{**FEW, "max_kl": 1e-6}, steps=1)
    row, = trpo.train(make_base(kind), Letters(), ROWS, stub_reward, config)
    assert 0 < row["kl_step"] <= 1.2e-6


# ------------------------------------------------------------------------------ step 0


FEW = {**FIELDS, "max_kl": 1e-3, "cg_iters": 3, "fisher_rows": 2, "micro_batch_size": None}


@pytest.mark.parametrize("micro", [None, 2])
def test_at_step_0_sampler_and_scorer_agree_to_1e_4(kind, monkeypatch, micro):
    row = first_row(trpo, kind, monkeypatch, {**FEW, "micro_batch_size": micro})
    assert row["log_ratio_max"] < 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_between_sampler_and_scorer_shows_at_step_0(kind, monkeypatch, fault):
    """In a hundred times of what rounding may be."""
    fault(monkeypatch)
    assert first_row(trpo, kind, monkeypatch, FEW)["log_ratio_max"] > 1e-2


def test_a_top_p_sampler_is_not_surprised_enough(kind, monkeypatch):
    """An honest one is, to 3.5 standard errors. Nothing else would tell."""
    assert abs(surprise_of(trpo, kind, FEW)["surprise_z"]) < 3.5
    top_p(monkeypatch)
    row = surprise_of(trpo, kind, FEW)
    assert row["surprise_z"] < -4 and row["log_ratio_max"] < 1e-4


# ------------------------------------------------------------------------------ train


KEYS = """step seconds lr score score_std kl entropy surprise surprise_z eos_rate length loss
surrogate_gain grad_norm kl_step kl_step_response backtracks value_loss log_ratio_max
explained_variance""".split()


def run(model, log=None, state=None, rows=ROWS, reward=stub_reward, **changes):
    config = trpo.Config(**{**FEW, "lr": 1e-2, "steps": 3, "beta": 0.1, **changes})
    return trpo.train(model, Letters(), rows, reward, config, log, state)


def test_train_returns_a_row_of_numbers_per_step_and_logs_the_same(kind, capfd):
    """Nothing is written to standard output."""
    seen = []
    rows = run(make_base(kind), lambda row, samples, state: seen.append((row, samples, state)))
    assert [row for row, _, _ in seen] == rows and [row["step"] for row in rows] == [0, 1, 2]
    for row, samples, state in seen:
        assert row.keys() == set(KEYS) and json.loads(json.dumps(row)) == row
        assert row["loss"] == -row["surrogate_gain"] and state["step"] == row["step"] + 1
        assert len(samples) == len(ROWS)
        assert all(s.keys() == {"prompt", "response", "score"} for s in samples)
        mean = sum(s["score"] for s in samples) / len(samples)
        assert row["score"] == pytest.approx(mean, abs=1e-5)
    assert capfd.readouterr().out == ""


def test_a_step_gains_and_moves_as_far_as_it_may(kind, monkeypatch):
    """Gain and KL of the row are those of the policy as it stands then, each row alone; a step
    that was not shortened costs max_kl, within a fifth."""
    batches, found, model = recorded(monkeypatch, trpo), [], make_base(kind)

    @torch.no_grad()
    def log(row, samples, state):
        batch, gain, kl = batches[-1], 0.0, 0.0
        new = alone(model, batch, logits_alone, "policy")
        for z, old, b in zip(new, real(batch, "logits_old"), range(len(ROWS))):
            y, adv = batch["y"][b, : len(z)], batch["adv"][b, : len(z)]
            both = [Categorical(logits=logits) for logits in (old, z)]
            kl += kl_divergence(*both).sum().item()
            log_ratio = both[1].log_prob(y) - both[0].log_prob(y)
            gain += (log_ratio.expm1() * adv).sum().item()
        tokens = batch["mask"].sum().item()
        found.append((gain / tokens, kl / tokens, kl / len(ROWS)))

    for row, (gain, kl, response) in zip(run(model, log), found, strict=True):
        assert row["surrogate_gain"] == pytest.approx(gain, rel=1e-2) and gain > 0
        assert row["kl_step"] == pytest.approx(kl, rel=1e-2)
        assert row["kl_step_response"] == pytest.approx(response, rel=1e-2)
        assert row["backtracks"] == 0 and kl == pytest.approx(1e-3, rel=0.2)


def test_a_batch_without_advantages_moves_no_policy(kind):
    """Equal scores, lambda 1, a critic that says 0 and no KL penalty: nothing is better."""
    model = make_base(kind)
    row, = run(model, reward=lambda prompts, responses, rows: [1.0] * len(rows), steps=1, beta=0.0,
               lam=1.0, missing_eos_score=None)
    policy, start = (lora.adapter_parameters(model, name) for name in ("policy", "reference"))
    assert torch.equal(flat(policy), flat(start))
    assert (row["surrogate_gain"], row["kl_step"], row["grad_norm"]) == (0.0, 0.0, 0.0)
    assert row["backtracks"] == 10 and row["value_loss"] == pytest.approx(0.5)


def test_train_works_in_a_thread_and_leaves_all_random_numbers_alone(kind):
    """Only its own seed makes it another run."""
    rows = check_random_numbers(run, kind)
    assert rows != timeless(run(make_base(kind), seed=1))


def test_a_second_call_goes_on_towards_the_same_reference(kind):
    """kl is counted from the first start; policy and critic are those of the first call."""
    model = make_base(kind)
    first = run(model, max_kl=0.02)
    kept = {name: flat(lora.adapter_parameters(model, name))
            for name in ("reference", "policy", "critic")}
    assert abs(first[0]["kl"]) < 1e-4 and not torch.equal(kept["reference"], kept["policy"])
    second = run(model, lr=0.0, backtracks=1, max_kl=1e-12, steps=1)
    assert second[0]["kl_step"] <= 1.2e-12 and abs(second[0]["kl"]) > 1e-2
    assert torch.equal(flat(lora.adapter_parameters(model, "reference")), kept["reference"])
    assert torch.equal(flat(lora.adapter_parameters(model, "critic")), kept["critic"])
    assert close(flat(lora.adapter_parameters(model, "policy")), kept["policy"], 1e-3)


def test_train_moves_policy_and_critic_and_nothing_else(kind):
    """With a reward model on the same base, from which the critic starts; after it, no adapter is
    active and no gradient is left."""
    model = make_base(kind)
    lora.add_adapter(model, "judge", rank=2, targets=TARGETS[kind], trainable=False)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["judge"], std=0.2)
    lora.add_head(model, "judge").requires_grad_(False)
    trpo.make_models(model, "judge", fields())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, reward="judge", steps=2)
    own = {id(p) for p in parameters_of(model)}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name
        assert p.grad is None
    assert {layer.active for layer in lora.lora_layers(model).values()} == {None}


def test_going_on_from_a_state_is_the_uninterrupted_run_to_the_bit(kind):
    """Rows and parameters, with moments of AdamW and a rate that changes at every step."""
    kept = {}

    def log(row, samples, state):
        if row["step"] == 1:
            kept.update(model=copy.deepcopy(model), state=copy.deepcopy(state))

    model = make_base(kind)
    rows = run(model, log, steps=4)
    others = run(kept["model"], state=kept["state"], steps=4)
    assert timeless(others) == timeless(rows[2:])
    assert torch.equal(flat(parameters_of(kept["model"])), flat(parameters_of(model)))


def test_the_policy_learns_to_write_eight_letters_of_sixty(kind):
    model = make_base(kind)
    model.generation_config.eos_token_id = 2
    rows = run(model, reward=eight_letters, max_kl=0.1, **LESSON)
    assert rows[0]["score"] < 0.3 and rows[-1]["score"] > 0.5


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_explained_variance_does_not_flatter_a_critic_that_knows_nothing(kind, monkeypatch, beta):
    check_explained_variance(trpo, run, actor(kind, 64), beta, monkeypatch)


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("changes, message", [
    ({"temperature": 0.0}, "--temperature"),
    ({"max_new_tokens": 64}, "--max-new-tokens"),
    ({"damping": 0.0}, "--damping"), ({"max_kl": 0.0}, "--max-kl"),
])
def test_a_config_that_cannot_work_raises_and_names_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        fields(**changes)


@pytest.mark.parametrize("words, message", [
    (["--temperature", "0"], "--temperature"),
    (["--damping", "0"], "--damping"),
    (["--max-kl", "0"], "--max-kl"),
    (["--model", "x", "--data", "y.jsonl"], "--reward"),
    (["--dtype", "bf16", "--max-kl", "0.0002"], "--dtype fp32"),
])
def test_flags_that_cannot_work_end_with_one_line(words, message, capsys, monkeypatch, tmp_path):
    """Before a folder is made and before anything is measured."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        trpo.main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ")
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, dtype", [([], "fp32"), (["--dtype", "bf16"], "bf16")])
def test_the_model_is_loaded_in_fp32_if_not_told_otherwise(words, dtype, monkeypatch, tmp_path):
    """On a GPU the other scripts load it in bf16."""
    def load_model(name, device, dtype, trust_remote_code):
        asked.append(dtype)
        raise ValueError("seen enough")

    asked = []
    monkeypatch.setattr(common, "load_model", load_model)
    with pytest.raises(SystemExit):
        trpo.main([*words, "--out", str(tmp_path / "run")])
    assert asked == [dtype]
