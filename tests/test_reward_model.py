import copy
import math
import signal

import pytest
import torch
from conftest import TARGETS, toy
from test_grpo import Letters, equal, fill, in_a_thread, values_of, without_seconds

import common
import lora
import reward_model
from cli import data

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


def test_long_and_identical_pairs_are_dropped_and_the_command_line_counts_them(tokenizer, capsys):
    """By `train` in silence, by the command line with a count."""
    def row(chosen, rejected):
        return {"prompt": "Why?", "chosen": chosen, "rejected": rejected}

    rows = [row("Yes.", "No."), row("Same.", "Same."), row("Long " * 80, "No."),
            row("No.", "Long " * 80)]
    [(original, prompt, (chosen, rejected))] = reward_model.encode_pairs(tokenizer, rows, 60)
    assert original is rows[0] and capsys.readouterr().out == ""
    assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt + chosen[:-1]).endswith("User: Why?\n\nAssistant: Yes.")
    assert tokenizer.decode(prompt + rejected[:-1]).endswith("User: Why?\n\nAssistant: No.")
    config = reward_model.Config(max_length=60)
    assert data.that_fit(rows, tokenizer, ["chosen", "rejected"], config) == rows[:1]
    assert "1 rows (dropped: 2 longer than 60 tokens, 1 of two equal" in capsys.readouterr().out


def test_both_answers_follow_the_same_piece_of_a_cut_prompt(tokenizer):
    """A prompt that is too long loses as much beside the short answer as beside the long one."""
    row = {"prompt": "Why? " * 60, "chosen": "Yes.", "rejected": "No, and no. " * 6}
    [(_, prompt, (chosen, rejected))] = reward_model.encode_pairs(tokenizer, [row], 60)
    for ids, side in ((chosen, "chosen"), (rejected, "rejected")):
        assert tokenizer.decode(ids[:-1]).strip() == row[side].strip()
    assert len(chosen) < len(rejected) == 60 - len(prompt)


# ------------------------------------------------------------------------------ scores


@pytest.fixture
def scorer(kind):
    model = toy(kind)
    lora.add_adapter(model, "reward", rank=4, targets=TARGETS[kind])
    fill(model, "reward")
    lora.add_head(model, "reward")
    return model


PAIRS = [
    ({}, [1, 9, 8], [[7, 2], [6, 5, 4, 3, 2]]),
    ({}, [1, 30], [[31, 32, 33, 34, 35, 36, 37, 2], [2]]),
    ({}, [1, 50, 4, 4, 4, 4, 4], [[0, 0], [51, 0]]),
]


def score_alone(model, ids):
    """By a pass over one unpadded sequence: its last state times the head."""
    with lora.use_adapter(model, "reward"):
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden * model.heads["reward"].weight[0]).sum()


@torch.no_grad()
def scores_alone(model, pairs):
    """([chosen], [rejected]), each of its own pass."""
    return [[score_alone(model, x + ys[side]).item() for _, x, ys in pairs] for side in (0, 1)]


def score_pairs(model, pairs):
    return reward_model.score_pairs(model, "reward", common.collate(pairs, "cpu"))


@torch.no_grad()
def test_scores_are_read_at_the_last_real_token_in_row_order(scorer):
    """Each equals head . hidden[-1] of its sequence alone, unpadded; the id 0 may end one. Both
    answers share one reading of their prompt."""
    chosen, rejected = score_pairs(scorer, PAIRS)
    expected = scores_alone(scorer, PAIRS)
    assert chosen.tolist() == pytest.approx(expected[0], abs=1e-5)
    assert rejected.tolist() == pytest.approx(expected[1], abs=1e-5)
    assert len({round(s, 3) for s in chosen.tolist() + rejected.tolist()}) == 6


@torch.no_grad()
def test_batch_mates_and_their_padding_do_not_change_a_score(scorer):
    alone = torch.cat(score_pairs(scorer, PAIRS[:1]))
    long = ({}, [1], [list(range(2, 60)), [5, 2]])
    wide = ({}, list(range(1, 50)), [[3, 2], [5, 2]])
    for mates in (PAIRS[1:], [long], [wide], [long, *PAIRS, wide]):
        chosen, rejected = score_pairs(scorer, [PAIRS[0], *mates])
        assert torch.allclose(torch.stack([chosen[0], rejected[0]]), alone, atol=1e-5)


@torch.no_grad()
def test_exchanging_the_answers_exchanges_the_scores(scorer):
    chosen, rejected = score_pairs(scorer, PAIRS)
    swapped = score_pairs(scorer, [(row, x, ys[::-1]) for row, x, ys in PAIRS])
    assert torch.allclose(torch.stack(swapped), torch.stack([rejected, chosen]), atol=1e-5)


def test_the_prompt_of_a_pair_is_read_once(scorer):
    read = []
    scorer.base_model.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    score_pairs(scorer, PAIRS)
    assert read == [(3, 7), (6, 8)]


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


def test_training_reaches_the_adapter_and_its_head_only(scorer):
    chosen, rejected = score_pairs(scorer, PAIRS)
    reward_model.bradley_terry_loss(chosen, rejected).backward()
    own = {id(p) for p in lora.adapter_parameters(scorer, "reward")}
    assert all((p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in own)
               for p in scorer.parameters())


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_the_gradient_is_that_of_each_row_alone_whatever_the_micro_batch(scorer, micro):
    """To 1e-5 of its norm, with margin and centring term."""
    parameters = lora.adapter_parameters(scorer, "reward")
    chosen, rejected = (
        torch.stack([score_alone(scorer, x + ys[side]) for _, x, ys in PAIRS]) for side in (0, 1))
    gaps = chosen - rejected
    loss = -(torch.sigmoid(gaps - 0.5).log()).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    recorder = Recorder(parameters)
    config = reward_model.Config(margin=0.5, center=0.1, micro_batch_size=micro)
    total, norm, differences = reward_model.update(
        scorer, recorder, common.collate(PAIRS, "cpu"), config)
    assert total == pytest.approx(loss.item(), abs=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-5) and norm > 0.1
    assert sorted(differences.tolist()) == pytest.approx(sorted(gaps.tolist()), abs=1e-5)
    expected = expected / max(1.0, norm)  # as it is clipped
    assert (recorder.steps[0] - expected).norm() < 1e-5 * expected.norm()


# ------------------------------------------------------------------------------ evaluate


ROWS = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "cd" * i}
        for i, n in enumerate((1, 30, 4, 17, 9, 2), 1)]


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_evaluate_averages_over_all_pairs_whatever_the_micro_batch(scorer, micro):
    """Margin and centring term are left out of the loss; a sample's score is r_w - r_l."""
    config = reward_model.Config(micro_batch_size=micro, margin=2.0, center=3.0)
    stats, samples = reward_model.evaluate(scorer, Letters(), ROWS, config)
    pairs = reward_model.encode_pairs(Letters(), ROWS, 1024)
    w, l = scores_alone(scorer, pairs)
    gaps = [a - b for a, b in zip(w, l)]
    for row, gap, sample in zip(ROWS, gaps, samples, strict=True):
        assert sample == {**row, "score": pytest.approx(gap, abs=1e-5)}
    mean = sum(w + l) / 12
    spread = math.sqrt(sum((s - mean) ** 2 for s in w + l) / 11)
    assert stats == pytest.approx({
        "loss": sum(math.log(1 + math.exp(-g)) for g in gaps) / 6,
        "accuracy": sum(g > 0 for g in gaps) / 6,
        "margin": sum(gaps) / 6,
        "mean score": mean,
        "score std": spread,
    }, abs=1e-5)


def test_a_tie_is_not_right(scorer):
    """A model that scores everything 0 has accuracy 0 and loss ln 2."""
    scorer.heads["reward"].weight.data.zero_()
    stats, _ = reward_model.evaluate(scorer, Letters(), ROWS, reward_model.Config())
    assert stats["accuracy"] == 0.0 and stats["margin"] == 0.0
    assert stats["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ------------------------------------------------------------------------------ train


KEYS = {"step", "seconds", "loss", "grad_norm", "lr", "accuracy", "margin"}  # of metrics.jsonl


def run(model, log=None, state=None, rows=ROWS, **fields):
    config = reward_model.Config(**{
        "steps": 4, "batch_size": 3, "micro_batch_size": 2, "lr": 1e-2, "lora_rank": 4, "seed": 3,
        "max_length": 120, **fields})
    return reward_model.train(model, Letters(), rows, config, log, state)


def test_a_row_measures_its_batch_before_the_step(kind):
    """Loss, accuracy and margin of the pairs that the step draws, by the model before it."""
    model, kept = toy(kind), []
    config = reward_model.Config(lora_rank=4, seed=3)
    reward_model.make_models(model, config)
    kept.append(copy.deepcopy(model))
    history = run(model, log=lambda *_: kept.append(copy.deepcopy(model)), center=0.0)
    pairs = reward_model.encode_pairs(Letters(), ROWS, 120)
    for row, before in zip(history, kept):
        index = common.batch_rows(row["step"], len(pairs), 3, 3)
        gaps = [a - b for a, b in zip(*scores_alone(before, [pairs[i] for i in index]))]
        loss = sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 3
        assert [row["loss"], row["margin"]] == pytest.approx([loss, sum(gaps) / 3], abs=1e-5)
        assert row["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 3)


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
    assert equal(*(values_of(model, "reward") for model in models))


def test_a_second_call_goes_on_with_the_same_adapter_and_head(kind):
    model = toy(kind)
    run(model)
    reward = values_of(model, "reward")
    run(model, lr=0.0)
    assert equal(values_of(model, "reward"), reward)  # it starts where the first call ended
    run(model)
    assert not any(map(torch.equal, values_of(model, "reward"), reward))


def test_a_head_is_added_to_an_adapter_that_was_loaded_without_one(kind):
    """As that of the SFT model. Its own weights are where training starts."""
    model = toy(kind)
    lora.add_adapter(model, "reward", rank=4, targets=TARGETS[kind])
    fill(model, "reward")
    before = values_of(model, "reward")
    run(model, lr=0.0)
    assert lora.has_head(model, "reward") and model.heads["reward"].weight.requires_grad
    assert equal(values_of(model, "reward")[:-1], before)


def test_going_on_from_a_state_is_bit_identical(kind):
    """A run of four steps, and its last two alone, from a copy of state and adapter after two."""
    model, kept = toy(kind), {}

    def log(row, samples, state):
        if row["step"] == 1:
            kept.update(model=copy.deepcopy(model), state=copy.deepcopy(state))

    whole = run(model, log)
    rest = run(kept["model"], state=kept["state"])
    assert without_seconds(rest) == without_seconds(whole[2:]) and len(rest) == 2
    assert equal(values_of(kept["model"], "reward"), values_of(model, "reward"))


def test_training_ranks_pairs_that_one_rule_separates(kind):
    rows = [{"prompt": "a" * n, "chosen": "b" * (n + 1), "rejected": "c" * (n + 1)}
            for n in range(6)]
    history = run(toy(kind), rows=rows, steps=8, batch_size=6)
    assert history[-1]["accuracy"] == 1.0 and history[-1]["margin"] > 0.1
    assert history[-1]["loss"] < history[0]["loss"]


def test_train_leaves_out_pairs_that_teach_nothing_and_refuses_to_train_on_none(kind):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    long = {"prompt": "a", "chosen": "b" * 200, "rejected": "b"}
    models = toy(kind), toy(kind)
    one, two = run(models[0]), run(models[1], rows=[*ROWS, same, long])
    assert without_seconds(one) == without_seconds(two)
    with pytest.raises(ValueError, match="--max-length 120"):
        run(toy(kind), rows=[same, long])
