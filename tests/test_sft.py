import itertools
import math
import random
from argparse import Namespace

import pytest
import torch
from conftest import TARGETS, toy

import lora
import sft


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
        common = max(n for n in range(8) if subsequences[n] & subsequences[8 + n])
        expected = 2 * common / (len(a) + len(b))
        assert sft.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_equals_the_rouge_score_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    words = ["The", "the", "cat.", "it's", "10-year-old", "Größe", "x_y", "café", "--", "B2"]
    for prediction, reference in random_texts(100, words, 12):
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert sft.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------ batch


def test_collate_learns_the_response_and_its_eos_and_nothing_else():
    """EOS is learnt even where it has the id of the padding (0): labels come from lengths."""
    eos = 0
    pairs = [([5, 6, 7], [8, 9, eos]), ([4], [3, eos])]
    ids, attention, labels = sft.collate(pairs, "cpu")
    assert ids.tolist() == [[5, 6, 7, 8, 9, eos], [4, 3, eos, 0, 0, 0]]
    assert attention.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8, 9, eos], [-100, 3, eos, -100, -100, -100]]


def test_encode_ends_every_response_with_eos_and_drops_what_does_not_fit(tokenizer):
    """A long prompt loses its beginning; a response that does not fit is dropped, never cut."""
    rows = [
        {"prompt": "Why is the sky blue?", "response": "Because of light."},
        {"prompt": "Why is the sky blue? " * 20, "response": "Because of light."},
        {"prompt": "Why?", "response": "Because of light. " * 40},
    ]
    pairs, dropped = sft.encode(tokenizer, rows, max_length=40)
    assert dropped == 1 and len(pairs) == 2
    (short, answer), (cut, same_answer) = pairs
    assert answer == same_answer and answer.count(tokenizer.eos_token_id) == 1
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "Because of light."
    assert len(cut) + len(answer) == 40 and len(short) + len(answer) < 40
    assert tokenizer.decode(cut).endswith("blue? \n\nAssistant: ")


# ------------------------------------------------------------------------------ evaluate


@pytest.fixture
def tuned(kind, tokenizer):
    model = toy(kind, len(tokenizer))
    lora.add_adapter(model, "policy", rank=4, targets=TARGETS[kind])
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["policy"], std=0.2)
    return model


ROWS = [
    {"prompt": "Why is the sky blue?", "response": "Light."},
    {"prompt": "Explain the heart to a child.", "response": "It pumps blood all day, every day."},
    {"prompt": "Hi", "response": "What do you think?"},
]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_perplexity_is_exp_of_total_nll_over_total_tokens(tuned, tokenizer, micro):
    """Whatever the micro-batch, (SFT.2) equals a loop over single unpadded rows and tokens."""
    pairs, _ = sft.encode(tokenizer, ROWS, 100)
    nll = count = 0
    with torch.no_grad(), lora.use_adapter(tuned, "policy"):
        for prompt, response in pairs:
            logits = tuned(torch.tensor([prompt + response])).logits[0].double()
            for t in range(len(prompt), len(prompt) + len(response)):
                nll -= logits[t - 1].log_softmax(-1)[(prompt + response)[t]].item()
                count += 1
    args = Namespace(micro_batch_size=micro, max_new_tokens=3, max_length=100)
    stats, *_ = sft.evaluate(tuned, "policy", tokenizer, ROWS, pairs, args)
    assert stats["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_evaluate_measures_the_answers_that_it_returns(tuned, tokenizer):
    """rouge_l is the mean over the returned texts, and references equal to them score 1."""
    pairs, _ = sft.encode(tokenizer, ROWS, 100)
    args = Namespace(micro_batch_size=2, max_new_tokens=6, max_length=100)
    stats, texts, _ = sft.evaluate(tuned, "policy", tokenizer, ROWS, pairs, args)
    assert len(texts) == len(ROWS) and all(any(c.isalnum() for c in text) for text in texts)
    assert 0 <= stats["rouge_l"] < 1
    own = [row | {"response": text} for row, text in zip(ROWS, texts)]
    assert sft.evaluate(tuned, "policy", tokenizer, own, pairs, args)[0]["rouge_l"] == 1.0


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
    pairs, _ = sft.encode(tokenizer, ROWS, 100)
    stop = [i for i in range(len(tokenizer)) if i % 10 < 10 * share]
    tuned.generation_config.eos_token_id = stop
    stop = {*stop, tokenizer.eos_token_id}
    with lora.use_adapter(tuned, "policy"):
        expected = [stops_alone(tuned, prompt, stop, 2) for prompt, _ in pairs]
    args = Namespace(micro_batch_size=2, max_new_tokens=2, max_length=100)
    stats, *_ = sft.evaluate(tuned, "policy", tokenizer, ROWS, pairs, args)
    assert stats["stop_rate"] == pytest.approx(sum(expected) / len(ROWS))
