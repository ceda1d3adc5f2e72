import copy
import itertools
import math
import random
import signal

import pytest
import torch
from conftest import TARGETS, toy
from test_grpo import Letters, equal, fill, in_a_thread, values_of, without_seconds

import common
import lora
import sft
from cli import data


def log_probabilities(rows):
    return torch.tensor([[[math.log(p) for p in step] for step in row] for row in rows])


# ------------------------------------------------------------------------------ sft_loss


def test_loss_is_the_token_mean_of_minus_log_p():
    """Two labelled tokens of probability 1/2 and one of 1/8: (ln 2 + ln 2 + ln 8) / 3."""
    half, eighth = [0.25, 0.5, 0.25], [0.125, 0.5, 0.375]
    logits = log_probabilities([[half, half, half], [half, eighth, half]])
    labels = torch.tensor([[-100, 1, 1], [-100, -100, 0]])
    expected = (2 * math.log(2) + math.log(8)) / 3
    assert sft.sft_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_loss_of_uniform_logits_is_ln_v():
    loss = sft.sft_loss(torch.zeros(2, 4, 7), torch.randint(7, (2, 4)))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_position_t_minus_1_predicts_token_t():
    """The gradient is nonzero exactly at the positions before the labelled ones."""
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 5, requires_grad=True)
    sft.sft_loss(logits, torch.tensor([[3, -100, 1, -100, -100, 2]])).backward()
    assert logits.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [1, 4]


def test_gradient_is_softmax_minus_one_hot_over_the_count():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, requires_grad=True)
    sft.sft_loss(logits, torch.tensor([[-100, 2, 0]])).backward()
    for t, label in ((0, 2), (1, 0)):
        weights = [math.exp(x) for x in logits[0, t].tolist()]
        for v in range(4):
            expected = (weights[v] / sum(weights) - (v == label)) / 2
            assert logits.grad[0, t, v].item() == pytest.approx(expected, abs=1e-6)


def test_loss_is_computed_in_fp32_on_bf16_logits():
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(1))
    loss = sft.sft_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sft.sft_loss(logits.float(), labels))


@pytest.mark.parametrize("labels", [[[-100, -100, -100]], [[1, -100, -100]]])
def test_loss_without_a_label_that_can_be_predicted_raises(labels):
    with pytest.raises(ValueError, match="no token is labelled"):
        sft.sft_loss(torch.zeros(1, 3, 4), torch.tensor(labels))


# ------------------------------------------------------------------------------ rouge_l


@pytest.mark.parametrize("prediction, reference, expected", [
    ("the cat sat", "the cat sat", 1.0),
    ("The CAT, sat!", "the cat sat", 1.0),
    ("a b c d", "a x c", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
    ("a b", "b a", 0.5),
    ("it's 10-year-old", "it s 10 year old", 1.0),
    ("a a a", "a", 2 * (1 / 3) / (1 / 3 + 1)),
    ("one", "two", 0.0),
    ("", "two", 0.0),
    ("...", "two", 0.0),
    ("one", "", 0.0),
])
def test_rouge_l_by_hand(prediction, reference, expected):
    assert sft.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def random_texts(n, words, longest):
    rng = random.Random(0)
    for _ in range(n):
        yield [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(2)]


def test_rouge_l_equals_the_search_over_all_subsequences():
    for prediction, reference in random_texts(60, ["a", "b", "c", "d"], 7):
        a, b = prediction.split(), reference.split()
        subsequences = [
            {s for s in itertools.combinations(text, n)} for text in (a, b) for n in range(8)]
        longest = max(n for n in range(8) if subsequences[n] & subsequences[8 + n])
        expected = 2 * longest / (len(a) + len(b))
        assert sft.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_equals_the_rouge_score_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    words = ["The", "the", "cat.", "it's", "10-year-old", "Größe", "x_y", "café", "--", "B2"]
    for prediction, reference in random_texts(100, words, 12):
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert sft.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------ batch


def labels_of(monkeypatch, model, batch):
    """The labels that the loss of a batch is taken on; the loss is taken as usual."""
    seen, original = [], sft.sft_loss
    monkeypatch.setattr(
        sft, "sft_loss", lambda logits, labels: seen.append(labels) or original(logits, labels))
    sft.batch_loss(model, batch)
    return seen[0].tolist()


@torch.no_grad()
def test_labels_cover_exactly_the_answer_and_its_eos(model, monkeypatch):
    """The first column is the end of the prompt. EOS is learnt even where it has the id of the
    padding (0): labels come from lengths."""
    eos, none = 0, -100
    encoded = [({}, [5, 6, 7], [[8, 9, eos]]), ({}, [4], [[3, eos]]), ({}, [4, 4], [[eos]])]
    batch = common.collate(encoded, "cpu")
    assert batch["x"].tolist() == [[5, 6, 7], [0, 0, 4], [0, 4, 4]]
    assert batch["x_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["y"].tolist() == [[8, 9, eos], [3, eos, 0], [eos, 0, 0]]
    assert batch["mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert labels_of(monkeypatch, model, batch) == [
        [none, 8, 9, eos], [none, 3, eos, none], [none, eos, none, none]]


def test_encode_ends_every_response_with_eos_and_drops_what_does_not_fit(tokenizer, capsys):
    """A long prompt loses its beginning; a response that does not fit is dropped, never cut. The
    command line counts what it drops."""
    rows = [
        {"prompt": "Why is the sky blue?", "response": "Because of light."},
        {"prompt": "Why is the sky blue? " * 20, "response": "Because of light."},
        {"prompt": "Why?", "response": "Because of light. " * 40},
    ]
    encoded = common.encode(tokenizer, rows, ["response"], 40)
    assert [row for row, _, _ in encoded] == rows[:2]
    (_, short, [answer]), (_, cut, [same_answer]) = encoded
    assert answer == same_answer and answer.count(tokenizer.eos_token_id) == 1
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short + answer[:-1]).endswith("Assistant: Because of light.")
    assert len(cut) + len(answer) == 40 and len(short) + len(answer) < 40
    assert tokenizer.decode(cut + answer[:-1]).endswith("blue? \n\nAssistant: Because of light.")
    config = sft.Config(max_length=40, max_new_tokens=9)
    assert data.that_fit(rows, tokenizer, ["response"], config) == rows[:2]
    assert capsys.readouterr().out.startswith("2 rows (dropped: 1 longer than 40 tokens")


def test_a_config_that_leaves_no_room_for_a_prompt_raises():
    with pytest.raises(ValueError, match="--max-new-tokens"):
        sft.Config(max_new_tokens=64, max_length=64)


# ------------------------------------------------------------------------------ loss and update


@pytest.fixture
def tuned(kind, tokenizer):
    model = toy(kind, len(tokenizer))
    lora.add_adapter(model, "policy", rank=4, targets=TARGETS[kind])
    fill(model, "policy")
    return model


ROWS = [
    {"prompt": "Why is the sky blue?", "response": "Light."},
    {"prompt": "Explain the heart to a child.", "response": "It pumps blood all day, every day."},
    {"prompt": "Hi", "response": "What do you think?"},
]


def config_of(**fields):
    return sft.Config(**{"max_length": 100, "max_new_tokens": 3, "lora_rank": 4, **fields})


def loss_alone(model, encoded):
    """The mean over all answer tokens of what transformers' own loss gives row by row, unpadded,
    with -100 on the prompt."""
    total = tokens = 0
    with lora.use_adapter(model, "policy"):
        for _, x, [y] in encoded:
            ids, labels = torch.tensor([x + y]), torch.tensor([[-100] * len(x) + y])
            total = total + model(ids, labels=labels).loss * len(y)
            tokens += len(y)
    return total / tokens


class Recorder:
    """An optimizer that keeps the gradients and moves nothing."""

    def __init__(self, parameters):
        self.parameters, self.steps = parameters, []

    def step(self):
        self.steps.append(torch.cat([p.grad.flatten() for p in self.parameters]).clone())

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


@pytest.mark.parametrize("micro", [1, 2, 3, None])
def test_loss_and_gradient_are_those_of_transformers_row_by_row(tuned, tokenizer, micro):
    """To 1e-5, the gradient relative to its norm, whatever the micro-batch."""
    encoded = common.encode(tokenizer, ROWS, ["response"], 100)
    parameters = lora.adapter_parameters(tuned, "policy")
    expected = loss_alone(tuned, encoded)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    batch, recorder = common.collate(encoded, "cpu"), Recorder(parameters)
    loss, norm = sft.update(tuned, recorder, batch, config_of(micro_batch_size=micro))
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5) and norm > 0.1
    gradient = gradient / max(1.0, norm)  # as it is clipped
    assert (recorder.steps[0] - gradient).norm() < 1e-5 * gradient.norm()


def test_update_moves_the_policy_and_nothing_else(tuned, tokenizer):
    batch = common.collate(common.encode(tokenizer, ROWS, ["response"], 100), "cpu")
    parameters = lora.adapter_parameters(tuned, "policy")
    before = {k: p.detach().clone() for k, p in tuned.named_parameters()}
    sft.update(tuned, torch.optim.Adam(parameters, lr=1e-2), batch, config_of())
    own = {id(p) for p in parameters}
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in own), name


# ------------------------------------------------------------------------------ evaluate


@pytest.mark.parametrize("micro", [1, 2, 3, None])
@torch.no_grad()
def test_perplexity_is_exp_of_total_nll_over_total_tokens(tuned, tokenizer, micro):
    """Whatever the micro-batch, (SFT.2) equals a loop over single unpadded rows and tokens, and the
    loss of transformers."""
    encoded = common.encode(tokenizer, ROWS, ["response"], 100)
    nll = count = 0
    with lora.use_adapter(tuned, "policy"):
        for _, prompt, [response] in encoded:
            logits = tuned(torch.tensor([prompt + response])).logits[0].double()
            for t in range(len(prompt), len(prompt) + len(response)):
                nll -= logits[t - 1].log_softmax(-1)[(prompt + response)[t]].item()
                count += 1
    stats, _ = sft.evaluate(tuned, tokenizer, ROWS, config_of(micro_batch_size=micro))
    assert stats["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    expected = math.exp(loss_alone(tuned, encoded).item())
    assert stats["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_measures_the_answers_that_it_returns(tuned, tokenizer):
    """rouge_l is the mean over the returned texts, and references equal to them score 1."""
    config = config_of(micro_batch_size=2, max_new_tokens=6)
    stats, samples = sft.evaluate(tuned, tokenizer, ROWS, config)
    texts = [sample["response"] for sample in samples]
    assert len(texts) == len(ROWS) and all(any(c.isalnum() for c in text) for text in texts)
    scores = [sft.rouge_l(text, row["response"]) for text, row in zip(texts, ROWS)]
    assert samples == [{"prompt": row["prompt"], "response": text, "score": score}
                       for row, text, score in zip(ROWS, texts, scores)]
    assert stats["rouge_l"] == pytest.approx(sum(scores) / 3) and 0 <= stats["rouge_l"] < 1
    own = [{**row, "response": text} for row, text in zip(ROWS, texts)]
    assert sft.evaluate(tuned, tokenizer, own, config)[0]["rouge_l"] == 1.0


@torch.no_grad()
def test_a_row_whose_answer_does_not_fit_is_not_measured(tuned, tokenizer):
    """Samples and prompts stay side by side."""
    long = {"prompt": "Why?", "response": "Because of light. " * 40}
    config = config_of()
    assert sft.evaluate(tuned, tokenizer, [long, *ROWS], config) == sft.evaluate(
        tuned, tokenizer, ROWS, config)


@torch.no_grad()
def stops_alone(model, ids, stop, n):
    for _ in range(n):
        ids = ids + [model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        if ids[-1] in stop:
            return True
    return False


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_stop_rate_counts_the_answers_that_end_by_themselves(tuned, tokenizer, share):
    """As a greedy loop over single rows does, with none, some and all tokens as stop tokens."""
    encoded = common.encode(tokenizer, ROWS, ["response"], 100)
    stop = [i for i in range(len(tokenizer)) if i % 10 < 10 * share]
    tuned.generation_config.eos_token_id = stop
    stop = {*stop, tokenizer.eos_token_id}
    with lora.use_adapter(tuned, "policy"):
        expected = [stops_alone(tuned, prompt, stop, 2) for _, prompt, _ in encoded]
    config = config_of(micro_batch_size=2, max_new_tokens=2)
    stats, _ = sft.evaluate(tuned, tokenizer, ROWS, config)
    assert stats["stop_rate"] == pytest.approx(sum(expected) / len(ROWS))


# ------------------------------------------------------------------------------ train


KEYS = {"step", "seconds", "loss", "grad_norm", "lr"}  # of metrics.jsonl
LETTERS = [{"prompt": "a" * n, "response": "b" * i} for i, n in enumerate((1, 30, 4, 17, 9, 2), 1)]


def run(model, log=None, state=None, rows=LETTERS, **fields):
    config = config_of(**{"steps": 4, "batch_size": 3, "micro_batch_size": 2, "lr": 1e-2,
                          "seed": 3, **fields})
    return sft.train(model, Letters(), rows, config, log, state)


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


def test_a_row_measures_the_loss_of_its_batch_before_the_step(kind):
    """The first by the bare base, the last by the policy that three steps have made."""
    model, kept = toy(kind), []
    sft.make_models(model, config_of())
    kept.append(copy.deepcopy(model))
    history = run(model, log=lambda *_: kept.append(copy.deepcopy(model)))
    encoded = common.encode(Letters(), LETTERS, ["response"], 100)
    for row, before in zip(history, kept):
        index = common.batch_rows(row["step"], len(encoded), 3, 3)
        with torch.no_grad():
            expected = loss_alone(before, [encoded[i] for i in index]).item()
        assert row["loss"] == pytest.approx(expected, abs=1e-5)


def test_train_in_a_thread_returns_what_it_returns_in_the_main_one(kind):
    """And it leaves the random numbers of the caller and every signal handler as they were."""
    models = toy(kind), toy(kind)
    torch.manual_seed(11)
    before, handlers = torch.get_rng_state(), [signal.getsignal(s) for s in signal.valid_signals()]
    main, thread = run(models[0]), in_a_thread(run, models[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert [signal.getsignal(s) for s in signal.valid_signals()] == handlers
    assert without_seconds(main) == without_seconds(thread)
    assert equal(*(values_of(model, "policy") for model in models))


def test_a_second_call_goes_on_with_the_same_adapter(kind):
    model = toy(kind)
    run(model)
    policy = values_of(model, "policy")
    run(model, lr=0.0)
    assert equal(values_of(model, "policy"), policy)  # it starts where the first call ended
    run(model)
    assert not any(map(torch.equal, values_of(model, "policy"), policy))


def test_going_on_from_a_state_is_bit_identical(kind):
    """A run of four steps, and its last two alone, from a copy of state and adapter after two."""
    model, kept = toy(kind), {}

    def log(row, samples, state):
        if row["step"] == 1:
            kept.update(model=copy.deepcopy(model), state=copy.deepcopy(state))

    whole = run(model, log)
    rest = run(kept["model"], state=kept["state"])
    assert without_seconds(rest) == without_seconds(whole[2:]) and len(rest) == 2
    assert equal(values_of(kept["model"], "policy"), values_of(model, "policy"))


def test_training_learns_to_answer_and_to_stop(kind):
    """Of answers "bcd" all tokens get likely, EOS included. The toy's frozen head is too small to
    make any token likely, so it is scaled up."""
    rows, model = [{"prompt": "a" * n, "response": "bcd"} for n in range(6)], toy(kind)
    model.get_output_embeddings().weight.data.mul_(20)
    history = run(model, rows=rows, steps=40, batch_size=6, lora_targets="all-linear")
    assert history[-1]["loss"] < 0.5 < history[0]["loss"]
    stats, samples = sft.evaluate(model, Letters(), rows, config_of(max_new_tokens=9))
    answer = Letters().batch_decode([Letters()(" bcd", False).input_ids], True)[0]
    assert [sample["response"] for sample in samples] == [answer] * 6
    assert stats["stop_rate"] == 1.0


def test_train_leaves_out_answers_that_do_not_fit_and_refuses_to_train_on_none(kind):
    long = {"prompt": "a", "response": "b" * 200}
    models = toy(kind), toy(kind)
    one, two = run(models[0]), run(models[1], rows=[*LETTERS, long])
    assert without_seconds(one) == without_seconds(two)
    with pytest.raises(ValueError, match="--max-length 100"):
        run(toy(kind), rows=[long])
