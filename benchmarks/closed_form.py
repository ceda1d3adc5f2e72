"""Where do the algorithms end? On a space small enough to enumerate, beside what theory names.

A vocabulary of 4 tokens, one of them EOS; a response ends with EOS or after `length` tokens: 40
responses and 13 states for length 3. The policy is a table of logits, one row a state; reference
and reward are random. What the four algorithms are after is known in full:

    pi* = argmax E[r(y)] - beta KL(pi || pi_ref) = pi_ref(y) exp(r(y) / beta) / Z

Every update is made of the public functions of ppo.py, trpo.py, grpo.py and dpo.py, in the order of
their train(). With `draw` None a batch is every response, weighted by its probability: an exact
expectation. Otherwise it is that many samples of the policy (dpo: that many labelled pairs).

With the KL in the reward, and with dpo, learning ends at pi*. With a KL estimated token by token in
the loss it does so only if a response is one token: a per-token KL in the loss does not see how a
token changes the KL of the states after it. Where it ends instead has a closed form: `optimum`.

    python benchmarks/closed_form.py      prints the distances, keeps them in closed_form.json, and
                                          draws them, if matplotlib is there
"""

import json
import sys
from pathlib import Path

import torch
from torch.func import vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import trpo  # noqa: E402

VOCABULARY, EOS, BETA = 4, 0, 0.5
# Adam's second moment forgets in 20 steps: exact gradients shrink by orders of magnitude, and with
# the usual 0.999 the large ones of the start would rule the step size to the end.
BETAS = (0.9, 0.95)


# ------------------------------------------------------------------------------ the toy


class Toy:
    """All responses of at most `length` tokens, a random reference, a random reward in [-1, 1].

    ids, mask, states [N, length]: tokens, 1.0 on real ones, and the state in which each was chosen:
    a row of any table of logits or values. score [N]; reference [S, 4], log-probabilities.
    after[s][a]: what token a leads to, ("state", s') or ("response", i)."""

    def __init__(self, length=3, seed=0):
        prefixes, self.after, rows = [()], [], []
        for prefix in prefixes:  # grows while it is walked
            self.after.append([])
            for token in range(VOCABULARY):
                y = (*prefix, token)
                if token == EOS or len(y) == length:
                    self.after[-1].append(("response", len(rows)))
                    rows.append(y)
                else:
                    self.after[-1].append(("state", len(prefixes)))
                    prefixes.append(y)
        state = {prefix: s for s, prefix in enumerate(prefixes)}
        pad = [0] * length
        self.ids = torch.tensor([[*y, *pad][:length] for y in rows])
        self.states = torch.tensor(
            [[*(state[y[:t]] for t in range(len(y))), *pad][:length] for y in rows])
        self.mask = torch.tensor([[t < len(y) for t in range(length)] for y in rows]).double()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prefixes), VOCABULARY, generator=generator, dtype=torch.double)
        self.reference = (noise / 2).log_softmax(-1)
        self.score = 2 * torch.rand(len(rows), generator=generator, dtype=torch.double) - 1

    def response_logps(self, table):
        """log pi(y) [N] of every response under a table of logits, in double precision."""
        return (table.log_softmax(-1)[self.states, self.ids] * self.mask).sum(1)

    def batch(self, table, draw, generator):
        """(rows, weights): all responses and their probabilities, or `draw` samples and None."""
        p = self.response_logps(table.detach()).exp()
        if draw is None:
            return torch.arange(len(p)), p
        return torch.multinomial(p, draw, replacement=True, generator=generator), None


def distance(logp, logq):
    """KL(p || q), nats, of two vectors of log-probabilities."""
    return (logp.exp() * (logp - logq)).sum().item()


def forward_tilt(reference, q, beta):
    """argmax over pi of sum pi q - beta KL(pi_ref || pi) at one state, as log-probabilities.

    pi = beta pi_ref / (c - q), with the c > max q at which it sums to 1, found by bisection."""
    p = reference.exp()
    low, high = (q + beta * p).max(), q.max() + beta  # sum at least 1, at most 1
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (beta * p / (c - q)).sum() > 1 else (low, c)
    return (beta * p / (high - q)).log()


def optimum(toy, beta=BETA, kl_in="reward"):
    """log pi(y) [N] of the policy where learning ends, built from the last states backwards.

    At a state pi(a) is proportional to pi_ref(a) exp(Q(a) / beta), Q(a) being the value of where
    token a leads; kl_in says what a value is. "reward": the reward less beta times the KL still to
    come, which is beta log sum pi_ref exp(Q / beta) and makes pi*. "loss", for k2 and k3-corrected:
    the expected reward alone, sum pi Q. "loss, k3": that value too, but the KL at the state is the
    forward one, see forward_tilt."""
    value, table = {}, toy.reference.clone()
    for s in reversed(range(len(toy.after))):
        q = torch.stack([toy.score[i] if what == "response" else value[i]
                         for what, i in toy.after[s]])
        tilted = toy.reference[s] + q / beta
        table[s] = (forward_tilt(toy.reference[s], q, beta) if kl_in == "loss, k3"
                    else tilted.log_softmax(-1))
        value[s] = beta * tilted.logsumexp(-1) if kl_in == "reward" else table[s].exp() @ q
    return toy.response_logps(table)


# ------------------------------------------------------------------------------ what runs share


def expected(loss, weights, *tensors):
    """`loss` of a batch; with weights, the weighted sum of its values on batches of one row each,
    which is exact for terms that are not linear in the advantage, too."""
    if weights is None:
        return loss(*tensors)
    return weights @ vmap(lambda *row: loss(*(x.unsqueeze(0) for x in row)))(*tensors)


def exact_values(toy, rows, weights, ret):
    """What a perfect critic says of each token's state: the mean return from there on."""
    states, share = toy.states[rows], weights.unsqueeze(1) * toy.mask[rows]
    total, norm = torch.zeros(2, len(toy.reference), dtype=torch.double)
    total.index_put_((states,), share * ret, accumulate=True)
    norm.index_put_((states,), share, accumulate=True)
    return (total / norm)[states]


def decay(step, steps, first, last):
    """From `first` to `last`, each step smaller by the same factor."""
    return first * (last / first) ** (step / max(steps - 1, 1))


def adam(*parameters):
    """Adam; its step size is set by every call of minimise."""
    return torch.optim.Adam(parameters, betas=BETAS, eps=1e-10)


def minimise(optimizer, lr, loss):
    """One step of the optimiser on `loss`."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def critic_table(toy):
    """The tabular critic of sampled runs, one value a state, and its optimiser."""
    values = torch.zeros(len(toy.reference), dtype=torch.double, requires_grad=True)
    return values, adam(values)


def advantages(script, toy, rows, weights, logp, logp_ref, values, beta):
    """(adv, ret) as ppo.py and trpo.py find them: the KL in the reward, GAE, whitened.

    values: the critic's table, for sampled batches. An exact batch has a perfect critic, lambda 1,
    and no whitening, which matters for the size of a step only."""
    mask = toy.mask[rows]
    rewards = script.kl_shaped_rewards(toy.score[rows], logp, logp_ref, mask, beta)
    if weights is None:
        adv, ret = script.gae(rewards, values[toy.states[rows]] * mask, mask, 1.0, 0.95)
        return script.whiten(adv, mask), ret
    _, ret = script.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    return script.gae(rewards, exact_values(toy, rows, weights, ret) * mask, mask, 1.0, 1.0)


# ------------------------------------------------------------------------------ the algorithms


def run_ppo(toy, steps=100, lr=(0.1, 1e-4), epochs=4, eps=0.2, draw=None, seed=0, beta=BETA):
    """`epochs` steps of Adam on each batch. Yields the table of logits after each batch."""
    theta = toy.reference.clone().requires_grad_()
    policy, (values, critic) = adam(theta), critic_table(toy)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows, weights = toy.batch(theta, draw, generator)
        ids, states, mask = toy.ids[rows], toy.states[rows], toy.mask[rows]
        logp_old = ppo.token_logps(theta.detach()[states], ids)
        logp_ref = ppo.token_logps(toy.reference[states], ids)
        old = values.detach().clone()
        adv, ret = advantages(ppo, toy, rows, weights, logp_old, logp_ref, old, beta)
        tokens = None if weights is None else weights * mask.sum(1)  # a row's mean to its sum
        rate = decay(step, steps, *lr)
        for _ in range(epochs):
            logp = ppo.token_logps(theta[states], ids)
            minimise(policy, rate, expected(
                lambda *x: ppo.policy_loss(*x, eps), tokens, logp, logp_old, adv, mask))
            if weights is None:
                minimise(critic, 10 * rate,
                         ppo.value_loss(values[states], old[states], ret, mask, 10.0))
        yield theta.detach().clone()


def run_trpo(toy, steps=50, max_kl=(0.05, 1e-8), damping=1e-3, draw=None, seed=0, beta=BETA):
    """A trust region that shrinks: in a fixed one all steps are as long, and learning ends at about
    that distance. Yields the table of logits after each batch."""
    theta, (values, critic) = toy.reference.clone().requires_grad_(), critic_table(toy)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows, weights = toy.batch(theta, draw, generator)
        ids, states, mask = toy.ids[rows], toy.states[rows], toy.mask[rows]
        old, delta = theta.detach().clone(), decay(step, steps, *max_kl)
        logp_old = trpo.token_logps(old[states], ids)
        logp_ref = trpo.token_logps(toy.reference[states], ids)
        guess = values.detach().clone()
        adv, ret = advantages(trpo, toy, rows, weights, logp_old, logp_ref, guess, beta)
        tokens = None if weights is None else weights * mask.sum(1)
        visits = mask if weights is None else mask * weights.unsqueeze(1)

        def gain(table):
            logp = trpo.token_logps(table[states], ids)
            return expected(trpo.surrogate, tokens, logp, logp_old, adv, mask)

        g, = torch.autograd.grad(gain(theta), theta)
        moved = trpo.mean_kl(old[states], theta[states], visits)

        def fisher(v, damping=damping):
            return trpo.fisher_vector_product(moved, [theta], v, damping)

        s = trpo.conjugate_gradient(fisher, g.flatten(), tol=1e-24)
        full = trpo.step_length((s @ fisher(s, 0.0)).item(), delta) * s.view_as(theta)
        with torch.no_grad():
            before = gain(old)
            for j in range(10):
                theta.copy_(old + 0.8**j * full)
                near = trpo.mean_kl(old[states], theta[states], visits) <= 1.2 * delta
                if gain(theta) > before and near:
                    break
            else:
                theta.copy_(old)
        for _ in range(10 if weights is None else 0):
            minimise(critic, decay(step, steps, 0.1, 0.01),
                     trpo.value_loss(values[states], ret, mask))
        yield theta.detach().clone()


def run_grpo(toy, steps=200, lr=(0.1, 0.003), epochs=1, adv="loo", kl_in="reward", kl="k3",
             loss="dr_grpo", eps=0.2, group=8, draw=None, seed=0, beta=BETA):
    """`epochs` steps of Adam on each batch. Yields the table of logits after each batch.

    An exact batch is one group, of every response: where rows have weights it does not matter which
    constant is taken off the rewards. For "std" see large_group."""
    theta = toy.reference.clone().requires_grad_()
    policy = adam(theta)
    generator, limit = torch.Generator().manual_seed(seed), toy.ids.shape[1]
    for step in range(steps):
        rows, weights = toy.batch(theta, draw, generator)
        ids, states, mask = toy.ids[rows], toy.states[rows], toy.mask[rows]
        logp_old = grpo.token_logps(theta.detach()[states], ids)
        logp_ref = grpo.token_logps(toy.reference[states], ids)
        rewards = toy.score[rows]
        if kl_in == "reward":
            rewards = rewards - beta * ((logp_old - logp_ref) * mask).sum(1)
        if weights is not None and adv == "std":
            better = large_group(rewards, weights)
        else:
            groups = rewards.view(-1, group if weights is None else len(rows))
            better = grpo.group_advantages(groups, adv).flatten()

        def clipped(*x):
            weight = beta if kl_in == "loss" else 0.0
            return grpo.grpo_loss(*x, eps, eps, weight, loss, limit, kl)

        for _ in range(epochs):
            logp = grpo.token_logps(theta[states], ids)
            minimise(policy, decay(step, steps, *lr), expected(
                clipped, weights, logp, logp_old, logp_ref, better, mask))
        yield theta.detach().clone()


def large_group(rewards, weights, size=100_000):
    """group_advantages, scale "std", of a group in which each response has its share of about
    `size` places: exact up to rounding. Returns the advantage [N] of each response."""
    counts = (weights * size).round().long().clamp(min=1)
    group = rewards.repeat_interleave(counts).unsqueeze(0)
    return grpo.group_advantages(group, "std")[0, counts.cumsum(0) - 1]


def run_dpo(toy, steps=200, lr=(0.1, 0.003), draw=None, seed=0, beta=BETA):
    """Pairs of answers of the reference, of which w is preferred with probability
    sigmoid(r(w) - r(l)). Exact: every ordered pair, weighted with that and with its own
    probability. Yields the table of logits after each batch."""
    theta = toy.reference.clone().requires_grad_()
    policy, generator = adam(theta), torch.Generator().manual_seed(seed)
    p = toy.response_logps(toy.reference).exp()
    ref = (dpo.token_logps(toy.reference[toy.states], toy.ids) * toy.mask).sum(1)
    first, second = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p))).T
    preferred = p[first] * p[second] * (toy.score[first] - toy.score[second]).sigmoid()
    w, l, weights = first, second, preferred
    for step in range(steps):
        if draw is not None:
            pair = torch.multinomial(preferred, draw, replacement=True, generator=generator)
            w, l, weights = first[pair], second[pair], None
        logp = (dpo.token_logps(theta[toy.states], toy.ids) * toy.mask).sum(1)
        minimise(policy, decay(step, steps, *lr), expected(
            lambda *x: dpo.dpo_loss(*x, beta), weights, logp[w], logp[l], ref[w], ref[l]))
        yield theta.detach().clone()


ALGORITHMS = {"ppo": run_ppo, "trpo": run_trpo, "grpo": run_grpo, "dpo": run_dpo}
SAMPLED = {  # a few hundred samples a batch
    "ppo": dict(steps=50, lr=(0.1, 0.001), draw=256),
    "trpo": dict(steps=40, max_kl=(0.05, 1e-4), damping=0.1, draw=256),
    "grpo": dict(steps=100, lr=(0.1, 0.01), draw=256),
    "dpo": dict(draw=512),
}


def curve(toy, run, target):
    """KL(pi || target) after each batch of a run."""
    return [distance(toy.response_logps(table), target) for table in run]


# ------------------------------------------------------------------------------ table, figure


def measure(seed=0):
    """(curves, samples, ends): of each algorithm with exact expectations the distances to pi* from
    the reference on; the last distance from samples; of each KL in the loss, by length, the
    distance to pi* where it ends."""
    toy, curves, samples, ends = Toy(3, seed), {}, {}, {}
    star = optimum(toy)
    before = distance(toy.response_logps(toy.reference), star)
    print(f"KL(pi || pi*), nats; the reference is at {before:.2f}\n")
    print("                 exact expectations     samples")
    for name, run in ALGORITHMS.items():
        curves[name] = [before, *curve(toy, run(toy), star)]
        sampled = curve(toy, run(toy, **SAMPLED[name]), star)
        samples[name] = sampled[-1]
        print(f"{name:10} {curves[name][-1]:12.1e} in {len(curves[name]) - 1:3} batches "
              f"{sampled[-1]:12.1e} in {len(sampled)} x {SAMPLED[name]['draw']}")
    print("\nGRPO, exact: the KL is    tokens     to pi*  to its own closed form")
    for length in (1, 2, 3):
        toy = Toy(length, seed)
        star = optimum(toy)
        for kl in ("reward", "k2", "k3-corrected", "k3"):
            where = {"reward": "reward", "k3": "loss, k3"}.get(kl, "loss")
            flags = {} if kl == "reward" else dict(kl_in="loss", kl=kl, adv="none")
            *_, table = run_grpo(toy, **flags)
            logp = toy.response_logps(table)
            ends[kl, length] = distance(logp, star)
            own = distance(logp, optimum(toy, kl_in=where))
            label = "in the reward" if kl == "reward" else f"{kl} in the loss"
            print(f"{label:25} {length:5} {ends[kl, length]:10.1e} {own:10.1e}")
    return curves, samples, ends


def draw_figure(curves, ends, path):
    """Both halves of the table as a picture that is readable on a light and on a dark page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey, colours = "#808080", ["#1f8fe0", "#e8590c", "#2f9e44", "#c2489e"]
    pyplot.rcParams.update({
        "text.color": grey, "axes.edgecolor": grey, "axes.labelcolor": grey, "font.size": 10,
        "xtick.color": grey, "ytick.color": grey, "svg.fonttype": "none", "svg.hashsalt": "",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for (name, distances), colour in zip(curves.items(), colours):
        left.plot(distances, color=colour, label=name.upper(), linewidth=1.8)
    left.set(yscale="log", xlabel="batches", ylabel="KL(pi || pi*), nats", xlim=(0, 200),
             title="KL in the reward, and DPO: to pi*")
    left.legend(frameon=False, labelcolor=grey)
    places = ["reward", "k2", "k3-corrected", "k3"]
    for length, marker in ((1, "o"), (2, "s"), (3, "^")):
        heights = [(2 - length) / 5 - i for i in range(len(places))]
        right.scatter([ends[place, length] for place in places], heights, s=40, marker=marker,
                      color=colours[2], label=f"{length} token{'s' * (length > 1)}")
    right.set(xscale="log", xlabel="KL(pi || pi*) at the end, nats",
              title="GRPO: by where the KL is")
    right.set_yticks([-i for i in range(len(places))],
                     ["in the reward", *(f"{kl}\nin the loss" for kl in places[1:])])
    right.legend(frameon=False, labelcolor=grey)
    for axes in (left, right):
        axes.grid(color=grey, alpha=0.25, linewidth=0.6)
        axes.patch.set_alpha(0)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    return figure


def main():
    torch.set_num_threads(1)
    curves, samples, ends = measure()
    record = {"exact": {name: distances[-1] for name, distances in curves.items()},
              "sampled": samples, "grpo": {}}
    for (kl, _), end in ends.items():  # lengths 1, 2, 3
        name = "in the reward" if kl == "reward" else f"{kl} in the loss"
        record["grpo"].setdefault(name, []).append(end)
    (ROOT / "benchmarks" / "closed_form.json").write_text(json.dumps(record, indent=1) + "\n")
    try:
        draw_figure(curves, ends, ROOT / "docs" / "closed_form.svg")
        print("\ndrawn: docs/closed_form.svg")
    except ImportError:
        print("\nno matplotlib: not drawn")


if __name__ == "__main__":
    main()
