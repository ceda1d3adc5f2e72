"""REINFORCE on a toy: 40 possible answers, each with a known score, so that the best policy is known.

    python docs/reinforce.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.closed_form import Toy, distance, optimum  # noqa: E402

toy, beta = Toy(), 0.5
best = optimum(toy, beta)  # log pi*(y) [40]
theta = toy.reference.clone().requires_grad_()  # the policy: a row of 4 logits for each state
optimizer = torch.optim.Adam([theta], lr=0.02)
generator = torch.Generator().manual_seed(0)

for step in range(1001):
    # Act: sample 64 answers from the policy as it is now, and look up their scores.
    drawn, _ = toy.batch(theta, 64, generator)  # [64], numbers from 0 to 39
    logp = toy.response_logps(theta)[drawn]  # [64], log pi(y), with gradient
    logp_ref = toy.response_logps(toy.reference)[drawn]  # [64]

    # Credit: the score, minus the price of moving away from the reference. It counts as a plain
    # number: no gradient flows through it, hence detach. Minus the mean of the batch it becomes an
    # advantage.
    reward = (toy.score[drawn] - beta * (logp - logp_ref)).detach()  # [64]
    adv = reward - reward.mean()  # [64]

    # Learn: make answers that are better than average likelier, and the others less likely.
    loss = -(adv * logp).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    if step % 200 == 0:
        everything = toy.response_logps(theta.detach())  # log pi(y) of all 40 answers
        print(f"step {step:4}   mean score {everything.exp() @ toy.score:+.3f}   "
              f"KL(pi, pi*) {distance(everything, best):.1e}   spread of adv {adv.std():.4f}")
