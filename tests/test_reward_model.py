import math
from argparse import Namespace

import pytest
import torch
from conftest import TARGETS, toy

import common
import lora
import reward_model

# ------------------------------------------------------------------------------ bradley_terry_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_equal_scores_cost_ln_2():
    scores = torch.tensor([-3.0, 0.0, 7.0])
    loss = reward_model.bradley_terry_loss(scores, scores)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_loss_is_minus_log_of_the_bradley_terry_probability():
    """Scores ln 3 and 0 mean P = 3/4, scores 0 and ln 4 mean P = 1/5."""
    chosen, rejected = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(4)])
    expected = (math.log(4 / 3) + math.log(5)) / 2
    loss = reward_model.bradley_terry_loss(chosen, rejected)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_is_the_probability_of_being_wrong():
    """dL/dr_w = -(1 - P) / B and dL/dr_l is its opposite."""
    w, l = [0.5, -1.0, 2.0], [0.0, 1.0, 2.0]
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (w, l))
    reward_model.bradley_terry_loss(chosen, rejected).backward()
    expected = [-(1 - sigmoid(a - b)) / 3 for a, b in zip(w, l)]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-6)


def test_margin_is_the_lead_that_costs_ln_2():
    """As one number, and as one number a pair."""
    rejected = torch.tensor([0.3, -0.2])
    loss = reward_model.bradley_terry_loss(rejected + 1.5, rejected, margin=1.5)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    margins = torch.tensor([0.0, 2.0])
    loss = reward_model.bradley_terry_loss(rejected + 1.0, rejected, margin=margins)
    expected = -(math.log(sigmoid(1.0)) + math.log(sigmoid(-1.0))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_center_adds_c_times_the_mean_squared_sum():
    """Sums 3 and -1: c (9 + 1) / 2 on top, and without c a common constant changes nothing."""
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    plain = reward_model.bradley_terry_loss(chosen, rejected).item()
    centered = reward_model.bradley_terry_loss(chosen, rejected, center=0.1).item()
    assert centered - plain == pytest.approx(0.1 * (9 + 1) / 2, abs=1e-6)
    moved = reward_model.bradley_terry_loss(chosen + 5, rejected + 5).item()
    assert moved == pytest.approx(plain, abs=1e-6)


def test_loss_stays_finite_where_the_sigmoid_underflows():
    """-log sigmoid(-200) is 200."""
    loss = reward_model.bradley_terry_loss(torch.tensor([-100.0]), torch.tensor([100.0]))
    assert loss.item() == pytest.approx(200.0, abs=1e-4)


def test_shapes_that_would_broadcast_raise():
    with pytest.raises(ValueError, match="shapes differ"):
        reward_model.bradley_terry_loss(torch.zeros(3, 1), torch.zeros(3))


# ------------------------------------------------------------------------------ calibration


def test_calibration_of_a_calibrated_model():
    """A lead of ln 3 claims 3/4; three right and one wrong pair reach just that."""
    lead = math.log(3)
    rows = reward_model.calibration(torch.tensor([lead, lead, -lead, lead]))
    assert rows == [(1.0, 2.0, 4, pytest.approx(0.75), pytest.approx(0.75))]


def test_calibration_bins_by_size_and_leaves_empty_bins_out():
    """Bins hold their lower edge; the last one is open."""
    rows = reward_model.calibration(torch.tensor([0.1, -0.4, 0.5, 9.0, -30.0, -4.0]))
    assert [row[:3] for row in rows] == [(0.0, 0.5, 2), (0.5, 1.0, 1), (4.0, math.inf, 3)]
    claimed = [(sigmoid(0.1) + sigmoid(0.4)) / 2, sigmoid(0.5),
               (sigmoid(9) + sigmoid(30) + sigmoid(4)) / 3]
    assert [row[3] for row in rows] == pytest.approx(claimed, abs=1e-6)
    assert [row[4] for row in rows] == pytest.approx([1 / 2, 1.0, 1 / 3], abs=1e-6)


# ------------------------------------------------------------------------------ batch


def test_encode_drops_long_and_identical_pairs_and_counts_them(tokenizer, capsys):
    def row(chosen, rejected):
        return {"prompt": "Why?", "chosen": chosen, "rejected": rejected}

    rows = [row("Yes.", "No."), row("Same.", "Same."), row("Long " * 80, "No."),
            row("No.", "Long " * 80)]
    [(original, prompt, chosen, rejected)] = common.encode_preferences(tokenizer, rows, 60)
    assert "1 training pairs (dropped: 2 longer than 60 tokens, 1 id" in capsys.readouterr().out
    assert original is rows[0]
    assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt + chosen[:-1]).endswith("User: Why?\n\nAssistant: Yes.")
    assert tokenizer.decode(prompt + rejected[:-1]).endswith("User: Why?\n\nAssistant: No.")


def test_both_answers_follow_the_same_piece_of_a_cut_prompt(tokenizer):
    """A prompt that is too long loses as much beside the short answer as beside the long one."""
    row = {"prompt": "Why? " * 60, "chosen": "Yes.", "rejected": "No, and no. " * 6}
    [(_, prompt, chosen, rejected)] = common.encode_preferences(tokenizer, [row], 60)
    for ids, side in ((chosen, "chosen"), (rejected, "rejected")):
        assert ids[:-1] == tokenizer(row[side], add_special_tokens=False).input_ids
    assert len(chosen) < len(rejected) == 60 - len(prompt)


@pytest.fixture
def scorer(kind):
    model = toy(kind)
    lora.add_adapter(model, "reward", rank=4, targets=TARGETS[kind])
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["reward"], std=0.2)
    lora.add_head(model, "reward")
    return model


PAIRS = [
    ({}, [1, 9, 8], [7, 2], [6, 5, 4, 3, 2]),
    ({}, [1, 30], [31, 32, 33, 34, 35, 36, 37, 2], [2]),
    ({}, [1, 50], [0, 0], [51, 0]),
]


def score_alone(model, ids):
    with torch.no_grad(), lora.use_adapter(model, "reward"):
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return sum(h * w for h, w in zip(hidden.tolist(), model.heads["reward"].weight[0].tolist()))


@torch.no_grad()
def test_scores_are_read_at_the_last_real_token_in_row_order(scorer):
    """Each equals head . hidden[-1] of its sequence alone, unpadded; the id 0 may end one."""
    chosen, rejected = reward_model.score_pairs(scorer, PAIRS)
    expected = [score_alone(scorer, x + ids) for _, x, ids, _ in PAIRS]
    assert chosen.tolist() == pytest.approx(expected, abs=1e-5)
    expected = [score_alone(scorer, x + ids) for _, x, _, ids in PAIRS]
    assert rejected.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(s, 3) for s in chosen.tolist() + rejected.tolist()}) == 6


@torch.no_grad()
def test_batch_mates_and_their_padding_do_not_change_a_score(scorer):
    alone = torch.cat(reward_model.score_pairs(scorer, PAIRS[:1]))
    long = ({}, [1], list(range(2, 60)), [5, 2])
    for mates in (PAIRS[1:], [long], [long, *PAIRS]):
        chosen, rejected = reward_model.score_pairs(scorer, [PAIRS[0], *mates])
        assert torch.allclose(torch.stack([chosen[0], rejected[0]]), alone, atol=1e-5)


@torch.no_grad()
def test_exchanging_the_answers_exchanges_the_scores(scorer):
    chosen, rejected = reward_model.score_pairs(scorer, PAIRS)
    swapped = reward_model.score_pairs(scorer, [(row, x, r, c) for row, x, c, r in PAIRS])
    assert torch.allclose(torch.stack(swapped), torch.stack([rejected, chosen]), atol=1e-5)


def test_training_reaches_the_adapter_and_its_head_only(scorer):
    chosen, rejected = reward_model.score_pairs(scorer, PAIRS)
    reward_model.bradley_terry_loss(chosen, rejected).backward()
    own = {id(p) for p in lora.adapter_parameters(scorer, "reward")}
    assert all((p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in own)
               for p in scorer.parameters())


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_evaluate_averages_over_all_pairs_whatever_the_micro_batch(scorer, micro):
    stats, difference = reward_model.evaluate(scorer, PAIRS, Namespace(micro_batch_size=micro))
    w = [score_alone(scorer, x + ids) for _, x, ids, _ in PAIRS]
    l = [score_alone(scorer, x + ids) for _, x, _, ids in PAIRS]
    gaps = [a - b for a, b in zip(w, l)]
    assert difference.tolist() == pytest.approx(gaps, abs=1e-5)
    mean = sum(w + l) / 6
    spread = math.sqrt(sum((s - mean) ** 2 for s in w + l) / 5)
    assert stats == pytest.approx({
        "loss": sum(math.log(1 + math.exp(-g)) for g in gaps) / 3,
        "accuracy": sum(g > 0 for g in gaps) / 3,
        "margin": sum(gaps) / 3,
        "mean score": mean,
        "score std": spread,
    }, abs=1e-5)


def test_a_tie_is_not_right(scorer):
    """A model that scores everything 0 has accuracy 0 and loss ln 2."""
    scorer.heads["reward"].weight.data.zero_()
    stats, _ = reward_model.evaluate(scorer, PAIRS, Namespace(micro_batch_size=3))
    assert stats["accuracy"] == 0.0 and stats["margin"] == 0.0
    assert stats["loss"] == pytest.approx(math.log(2), abs=1e-6)
