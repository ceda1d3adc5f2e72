"""common.py: padding, forward passes, sampling, text to tokens, data, rewards."""

import argparse
import csv
import json
import random

import datasets
import pytest
import torch
from byte_tokenizer import BOS, CHAT, EOS, SIZE, START, TURN, byte_tokenizer, spell
from conftest import toy
from tokenizers import processors

import common
import lora
import sft

LEFT_ROWS = [[5, 9, 4, 7, 30, 11], [8, 3, 44, 21], [6, 50, 31, 17, 9, 12, 40, 33]]


def sharpen(model, factor=25.0):
    """Logits of a fresh toy are nearly equal; these are not."""
    model.lm_head.weight.data.mul_(factor)
    return model


def with_head(model, targets, name="critic"):
    lora.add_adapter(model, name, rank=4, alpha=8, targets=targets)
    lora.add_head(model, name)
    generator = torch.Generator().manual_seed(4)
    for layer in lora.lora_layers(model).values():
        for p in (layer.lora_A[name], layer.lora_B[name]):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


# ------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("side, ids, mask", [
    ("left", [[7, 0, 9], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]]),
    ("right", [[7, 0, 9], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
])
def test_pad_takes_its_mask_from_lengths_and_not_from_ids(side, ids, mask):
    got_ids, got_mask = common.pad([[7, 0, 9], [4]], side, "cpu")
    assert got_ids.tolist() == ids and got_mask.tolist() == mask


@pytest.mark.parametrize("attention, positions", [
    ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]),
    ([1, 1, 1, 0, 0], [0, 1, 2, 2, 2]),
    ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
])
def test_positions_count_from_the_first_real_token(attention, positions):
    got = common.inputs(torch.zeros(1, 5, dtype=torch.long), torch.tensor([attention]))
    assert got["position_ids"].tolist() == [positions]


def padded(extra):
    """LEFT_ROWS padded on the left, with `extra` more columns of junk that the mask hides."""
    ids, attention = common.pad(LEFT_ROWS, "left", "cpu")
    junk = torch.full((len(ids), extra), 13)
    return torch.cat([junk, ids], 1), torch.cat([torch.zeros_like(junk), attention], 1)


@pytest.mark.parametrize("extra", [0, 3])
@torch.no_grad()
def test_logits_of_response_states_are_those_of_each_row_alone(model, extra):
    """Against the full logits of the bare unpadded row, sliced by hand: R = 3."""
    ids, attention = padded(extra)
    got = common.logits_of(model, common.response_states(model, ids, attention, 3))
    assert got.shape == (3, 3, 64)
    for i, row in enumerate(LEFT_ROWS):
        alone = model(torch.tensor([row])).logits[0]
        for t in range(3):
            expected = alone[len(row) - 3 + t - 1]
            assert torch.allclose(got[i, t], expected, atol=1e-5)


@torch.no_grad()
def test_logits_of_response_states_equal_the_slice_of_the_full_logits(model):
    ids, attention = padded(0)
    full = model(**common.inputs(ids, attention)).logits
    got = common.logits_of(model, common.response_states(model, ids, attention, 3))
    assert torch.allclose(got, full[:, -4:-1], atol=1e-6)


def test_by_length_gives_every_row_once_the_shortest_first():
    """By the prompt and the longer answer, whatever else stands in a row."""
    tokens = ((3, 2, 1), (1, 1, 1), (1, 2, 8), (1, 0, 1))
    rows = [({}, [1] * p, [2] * w, [3] * l) for p, w, l in tokens]
    parts = list(common.by_length(rows, 3))
    assert [where.tolist() for where, _ in parts] == [[1, 3, 0], [2]]
    assert [row for _, part in parts for row in part] == [rows[1], rows[3], rows[0], rows[2]]
    assert [where.tolist() for where, _ in common.by_length([([1], [1]), ([1], [])], 2)] == [[1, 0]]


def test_micro_batches_hold_the_real_tokens_of_the_given_rows_and_little_else():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    ids, adv = torch.arange(28).view(4, 7), torch.tensor([3.0, 2.0, 1.0, 0.0])  # prompts of 3
    batch = dict(mask=mask, ids=ids, attention=ids > 0, logp=ids[:, 3:] * 1.0, adv=adv, stats={})
    pieces = list(common.micro_batches(batch, torch.tensor([0, 3, 1]), 2))
    assert [part.tolist() for part, _ in pieces] == [[1, 3], [0]]
    for (part, b), R in zip(pieces, (2, 4)):
        assert b.keys() == {"mask", "ids", "attention", "logp", "adv"}
        assert torch.equal(b["ids"], ids[part, : 3 + R])
        assert torch.equal(b["attention"], ids[part, : 3 + R] > 0)
        assert torch.equal(b["mask"], mask[part, :R]) and torch.equal(b["adv"], adv[part])
        assert torch.equal(b["logp"], ids[part, 3 : 3 + R] * 1.0)


@pytest.mark.parametrize("cap", [None, 0.7])
def test_per_token_in_pieces_equals_the_whole_and_so_does_its_gradient(model, cap, monkeypatch):
    """Two tokens at a time, in four of them an odd one left over; Gemma's capped logits too."""
    model.config.final_logit_softcapping = cap
    states = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.tensor([[5, 9, 4], [8, 3, 44], [6, 50, 31]])
    seen = []

    def logps(logits, y):
        seen.append(logits.shape)
        return logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)

    logits = model.get_output_embeddings()(states)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    weight = torch.arange(9.0).view(3, 3)
    wanted, = torch.autograd.grad((expected * weight).sum(), states)
    for limit, shapes in ((10**6, {(1, 9, 64)}), (130, {(1, 2, 64), (1, 1, 64)})):
        seen.clear()
        monkeypatch.setattr(common, "LOGITS", limit)
        got = common.per_token(model, states, logps, y)
        gradient, = torch.autograd.grad((got * weight).sum(), states)
        assert set(map(tuple, seen)) == shapes
        assert torch.allclose(got, expected, atol=1e-6)
        assert torch.allclose(gradient, wanted, atol=1e-6) and wanted.norm() > 0.1


def test_checkpointed_layers_find_their_adapter_again_in_the_backward_pass(model, targets):
    """backward() after the block of the adapter, inside that of another: the same gradient; and
    sampling, which needs its cache, is the same too."""
    with_head(with_head(model, targets, "policy"), targets, "other")
    ids, attention = common.pad(LEFT_ROWS, "left", "cpu")
    parameters = lora.adapter_parameters(model, "policy")

    def gradient():
        with lora.use_adapter(model, "policy"):
            loss = common.hidden_states(model, ids, attention).square().sum()
        with lora.use_adapter(model, "other"):
            return torch.autograd.grad(loss, parameters[:-1])

    def sampled():
        return common.sample(model, LEFT_ROWS, [2], 6, generator=torch.Generator().manual_seed(0))

    before, tokens, layers, calls = gradient(), sampled(), lora.lora_layers(model).values(), []
    common.checkpoint_layers(model)
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer.active))
    after = gradient()
    assert calls == ["policy"] * 2 * len(layers)  # forward, and again for backward
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after))
    assert torch.cat([g.flatten() for g in before]).norm() > 1e-3
    assert torch.equal(sampled()[0], tokens[0])


@pytest.mark.parametrize("extra", [0, 3])
@torch.no_grad()
def test_response_values_are_those_of_each_row_alone(model, targets, extra):
    with_head(model, targets)
    ids, attention = padded(extra)
    got = common.response_values(model, "critic", ids, attention, 3)
    assert got.shape == (3, 3)
    weight = model.heads["critic"].weight[0]
    for i, row in enumerate(LEFT_ROWS):
        with lora.use_adapter(model, "critic"):
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
        for t in range(3):
            expected = (hidden[len(row) - 3 + t - 1] * weight).sum()
            assert torch.allclose(got[i, t], expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sequence_scores_know_nothing_of_padding_and_batch_mates(model, targets, side):
    with_head(model, targets, "reward")
    ids, attention = common.pad(LEFT_ROWS, side, "cpu")
    got = common.sequence_scores(model, "reward", ids, attention)
    weight = model.heads["reward"].weight[0]
    for i, row in enumerate(LEFT_ROWS):
        with lora.use_adapter(model, "reward"):
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
        assert torch.allclose(got[i], (hidden[-1] * weight).sum(), atol=1e-5)
    assert got.std() > 1e-3


@torch.no_grad()
def test_the_row_scores_by_its_adapter_and_not_by_the_active_one(model, targets):
    with_head(with_head(model, targets, "reward"), targets, "policy")
    for layer in lora.lora_layers(model).values():  # another adapter than that of the reward
        layer.lora_B["policy"].data.neg_()
    ids, attention = common.pad(LEFT_ROWS, "right", "cpu")
    outside = common.sequence_scores(model, "reward", ids, attention)
    with lora.use_adapter(model, "policy"):
        assert torch.equal(common.sequence_scores(model, "reward", ids, attention), outside)


# ------------------------------------------------------------------------------ sampling


@torch.no_grad()
def greedy_by_steps(model, prompt, n):
    """n likeliest tokens, each from a fresh forward pass over the row alone."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_sampling_equals_recomputation_without_cache(model):
    sharpen(model)
    ids, attention, mask = common.sample(model, LEFT_ROWS, [999], 7, temperature=0)
    P = max(map(len, LEFT_ROWS))
    assert mask.tolist() == [[1.0] * 7] * 3
    for i, row in enumerate(LEFT_ROWS):
        assert ids[i, P:].tolist() == greedy_by_steps(model, row, 7)
        assert ids[i, P - len(row) : P].tolist() == row
        assert attention[i].tolist() == [0] * (P - len(row)) + [1] * (len(row) + 7)


def test_the_mask_ends_with_the_first_stop_token(model):
    """The stop tokens are chosen from what greedy decoding emits, so that rows end apart."""
    sharpen(model)
    free = [greedy_by_steps(model, row, 7) for row in LEFT_ROWS]
    stop = [free[0][2], 999]
    assert any(stop[0] not in row for row in free) or len({r.index(stop[0]) for r in free}) > 1
    ids, attention, mask = common.sample(model, LEFT_ROWS, stop, 7, temperature=0)
    R = mask.shape[1]
    lengths = [row.index(stop[0]) + 1 if stop[0] in row else 7 for row in free]
    assert R == max(lengths)
    for i, n in enumerate(lengths):
        assert mask[i].tolist() == [1.0] * n + [0.0] * (R - n)
        assert ids[i, -R:].tolist()[:n] == free[i][:n]
        assert attention[i, -R:].tolist() == [1] * n + [0] * (R - n)
    assert common.ended(ids[:, -R:], mask, stop).tolist() == [stop[0] in row for row in free]


def test_sampling_ends_early_when_all_rows_have_stopped(model):
    sharpen(model)
    first = greedy_by_steps(model, LEFT_ROWS[0], 1)
    _, _, mask = common.sample(model, LEFT_ROWS[:1] * 2, first, 50, temperature=0)
    assert mask.tolist() == [[1.0], [1.0]]


@torch.no_grad()
def chi_square(model, ids, n, temperature):
    """Of the first two sampled tokens of n rows against softmax(logits / temperature), exactly."""
    V, total = 6, 0.0
    first = (model(torch.tensor([[1, 3]])).logits[0, -1].double() / temperature).softmax(-1)
    for a in range(V):
        logits = model(torch.tensor([[1, 3, a]])).logits[0, -1].double()
        second = (logits / temperature).softmax(-1)
        for b in range(V):
            expected = n * (first[a] * second[b]).item()
            seen = ((ids[:, -2] == a) & (ids[:, -1] == b)).sum().item()
            total += (seen - expected) ** 2 / expected
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_softmax_of_logits_over_temperature(kind, temperature):
    """36 pairs, 35 degrees of freedom: above 76 with probability 1e-4. The next temperature
    is told apart, so the test has power."""
    model, n = sharpen(toy(kind, vocabulary=6), 10.0), 4000
    generator = torch.Generator().manual_seed(0)
    ids, _, mask = common.sample(model, [[1, 3]] * n, [999], 2, temperature, generator)
    assert mask.shape == (n, 2)
    assert chi_square(model, ids, n, temperature) < 76
    assert chi_square(model, ids, n, temperature * 1.4) > 150


def test_sampling_ignores_the_generation_config(model):
    """top_k = 1 would make every row alike, a penalty would change the ids."""
    def ids():
        generator = torch.Generator().manual_seed(3)
        return common.sample(model, [[5, 6]] * 20, [999], 5, 1.0, generator)[0]

    free = ids()
    config = model.generation_config
    config.do_sample, config.top_k, config.top_p, config.repetition_penalty = True, 1, 0.1, 5.0
    assert torch.equal(ids(), free)
    assert len({tuple(row) for row in free.tolist()}) > 10


def test_the_same_generator_seed_gives_the_same_ids(model):
    def ids(seed):
        torch.manual_seed(random.randrange(10**6))
        generator = torch.Generator().manual_seed(seed)
        return common.sample(model, LEFT_ROWS, [999], 6, 1.0, generator)[0]

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


def test_decode_shows_only_real_tokens_without_specials():
    tokenizer = byte_tokenizer()
    ids = torch.tensor([spell("yes") + [EOS] + spell("no"), spell("abcdef")])
    mask = torch.tensor([[1.0] * 4 + [0.0] * 2, [1.0] * 6])
    assert common.decode(tokenizer, ids, mask) == ["yes", "abcdef"]


# ------------------------------------------------------------------------------ text to tokens


def test_a_prompt_without_chat_template():
    got = common.encode_prompt(byte_tokenizer(), "Hi?")
    assert got == [BOS] + spell("User: Hi?\n\nAssistant: ")


def test_messages_without_chat_template():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]
    text = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: "
    assert common.encode_prompt(byte_tokenizer(), turns) == [BOS] + spell(text)


def test_a_prompt_with_chat_template():
    got = common.encode_prompt(byte_tokenizer(CHAT), "Hi?")
    question = [START] + spell("user\nHi?") + [TURN] + spell("\n")
    assert got == question + [START] + spell("assistant\n")


@pytest.mark.parametrize("template, end", [(None, EOS), (CHAT, TURN)])
def test_end_of_turn_is_what_the_template_puts_there(template, end):
    tokenizer = byte_tokenizer(template)
    assert common.end_of_turn(tokenizer) == end
    assert common.encode_pair(tokenizer, "a", "b", 99)[1] == spell("b") + [end]


def test_end_of_turn_is_eos_where_the_template_closes_with_none():
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert common.end_of_turn(byte_tokenizer(template)) == EOS


def test_the_end_of_a_turn_is_looked_up_once_for_a_template(monkeypatch):
    tokenizer, calls = byte_tokenizer(CHAT), []
    template = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template",
                        lambda *a, **k: calls.append(a) or template(*a, **k))
    assert [common.end_of_turn(tokenizer) for _ in range(3)] == [TURN] * 3 and len(calls) == 1
    tokenizer.chat_template = None
    assert common.end_of_turn(tokenizer) == EOS


SYSTEM = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi?"}]
CLOSED = [TURN] + spell("\n") + [START] + spell("assistant\n")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
LEAVES_OUT = CHAT.replace("messages %}", "messages if m['role'] != 'system' %}")
STRIPS = CHAT.replace("m['content']", "m['content'] | trim")
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT
)


def test_a_system_turn_is_the_template_s_affair():
    got = common.encode_prompt(byte_tokenizer(CHAT), SYSTEM)
    assert got == [START] + spell("system\n Be kind. ") + [TURN] + spell("\n") + [START] + spell(
        "user\nHi?") + CLOSED
    got = common.encode_prompt(byte_tokenizer(STRIPS), SYSTEM)
    assert got == [START] + spell("system\nBe kind.") + [TURN] + spell("\n") + [START] + spell(
        "user\nHi?") + CLOSED


def test_prompts_that_will_be_cut_are_counted_and_refused_ones_end_it(capsys):
    rows = [{"prompt": "a" * n} for n in (1, 50, 60)]
    common.check_prompts(byte_tokenizer(), rows, 69)
    assert capsys.readouterr().out.startswith("2 of 3 prompts")
    common.check_prompts(byte_tokenizer(), rows, 100)
    assert not capsys.readouterr().out
    rows[1]["prompt"] = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    with pytest.raises(SystemExit) as end:
        common.check_prompts(byte_tokenizer(ALTERNATES), rows, 100)
    assert end.value.code == 2 and "refuses a prompt" in capsys.readouterr().err


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT, ALTERNATES])
def test_a_system_turn_that_the_template_does_not_take_opens_the_user_s_turn(template):
    tokenizer = byte_tokenizer(template)
    question = [START] + spell("user\n Be kind. \n\nHi?") + CLOSED
    assert common.encode_prompt(tokenizer, SYSTEM) == question
    more = [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Oh"}]
    assert common.encode_prompt(tokenizer, SYSTEM + more) == (
        question + spell("Yes") + [TURN] + spell("\n") + [START] + spell("user\nOh") + CLOSED)


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT, ALTERNATES])
def test_an_empty_system_turn_is_none(template):
    turns = [{"role": "system", "content": ""}, SYSTEM[1]]
    got = common.encode_prompt(byte_tokenizer(template), turns)
    assert got == [START] + spell("user\nHi?") + CLOSED


@pytest.mark.parametrize("roles", [["user", "user"], ["system"], ["system", "assistant"]])
def test_turns_that_the_template_refuses_end_in_one_line(roles, capsys):
    turns = [{"role": role, "content": "text"} for role in roles]
    with pytest.raises(SystemExit) as end:
        common.encode_prompt(byte_tokenizer(ALTERNATES), turns)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert ", ".join(roles) in error and "roles must alternate" in error


@pytest.mark.parametrize("template", [None, CHAT, "<bos>" + CHAT])
@pytest.mark.parametrize("bos", [None, "<bos>", "<eos>"])
@pytest.mark.parametrize("pad", [None, "<pad>", "<eos>", "<turn>"])
def test_neither_padding_token_nor_bos_changes_what_is_learnt(template, bos, pad):
    """One BOS at most, from the template where there is one; every answer keeps its one end, also
    where the end pads and where BOS is EOS; the labels are the answer and its end."""
    tokenizer = byte_tokenizer(template, bos=bos, pad=pad)
    starts = {None: [], "<bos>": [BOS], "<eos>": [EOS]}[bos]
    start = ([BOS] if template and "bos" in template else []) if template else starts
    end = TURN if template else EOS
    question = [START] + spell("user\nq") + CLOSED if template else spell("User: q\n\nAssistant: ")
    pairs = [common.encode_pair(tokenizer, "q", a, 99) for a in ("yes", "no, never")]
    assert [p for p, _ in pairs] == [start + question] * 2
    _, _, labels = sft.collate(pairs, "cpu")
    for row, answer in zip(labels.tolist(), ("yes", "no, never")):
        assert [label for label in row if label != -100] == spell(answer) + [end]


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    assert tokenizer("a").input_ids == [BOS] + spell("a") + [EOS]
    p, r = common.encode_pair(tokenizer, "q", "a", 99)
    assert p == [BOS] + spell("User: q\n\nAssistant: ") and r == spell("a") + [EOS]


@pytest.mark.parametrize("template, end", [(None, EOS), (CHAT, TURN)])
def test_text_that_spells_a_special_token_is_text(template, end):
    tokenizer, text = byte_tokenizer(template), "Write <eos> or <turn> here."
    assert common.encode_response(tokenizer, text) == spell(text) + [end]
    if template is None:
        prompt = spell(f"User: {text}\n\nAssistant: ")
        assert common.encode_prompt(tokenizer, text) == [BOS] + prompt


def test_every_end_stops_generation(model):
    model.generation_config.eos_token_id = [2, 9]
    assert common.stop_ids(model, byte_tokenizer(CHAT)) == sorted({EOS, TURN, 2, 9})
    model.generation_config.eos_token_id = None
    assert common.stop_ids(model, byte_tokenizer()) == [EOS]


@pytest.mark.parametrize("template", [None, CHAT])
def test_truncation_keeps_the_whole_response(template):
    """The prompt loses its beginning; the response keeps every byte and its one end of turn."""
    tokenizer = byte_tokenizer(template)
    whole, end = common.encode_prompt(tokenizer, "x" * 40), TURN if template else EOS
    response = spell("answer") + [end]
    for max_length in range(8, 80):
        p, r = common.encode_pair(tokenizer, "x" * 40, "answer", max_length)
        assert r == response
        assert p == whole[-(max_length - 7) :] and len(p + r) <= max_length


@pytest.mark.parametrize("max_length", [1, 6, 7])
def test_a_response_that_does_not_fit_is_dropped_and_not_cut(max_length):
    assert common.encode_pair(byte_tokenizer(), "x", "answer", max_length) is None


def test_prompt_and_response_are_tokenized_apart():
    """The tokenizer merges " a" into one token, which the joined text would hold."""
    tokenizer = byte_tokenizer(merges=[("Ġ", "a")])
    assert tokenizer("Assistant: a").input_ids[-1] == SIZE
    p, r = common.encode_pair(tokenizer, "q", "a", 99)
    assert p == [BOS] + spell("User: q\n\nAssistant: ") and r == spell("a") + [EOS]


# ------------------------------------------------------------------------------ data

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
HH = "\n\nHuman: q\n\nAssistant: hm\n\nHuman: more?\n\nAssistant: "
HH_TURNS = [USER, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "more?"}]

LAYOUTS = {
    "dolly": ({"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
              {"prompt": "q", "response": "a"}),
    "dolly with context": ({"instruction": "q", "context": "ctx", "response": "a"},
                           {"prompt": "q\n\nctx", "response": "a"}),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, {"prompt": "q", "response": "a"}),
    "alpaca with input": ({"instruction": "q", "input": "in", "output": "a"},
                          {"prompt": "q\n\nin", "response": "a"}),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "response": "a"}),
    "messages": ({"messages": [USER, BOT]}, {"prompt": [USER], "response": "good"}),
    "messages, several turns": ({"messages": [*HH_TURNS, BOT]},
                                {"prompt": HH_TURNS, "response": "good"}),
    "messages without an answer": ({"messages": [USER]}, {"prompt": [USER]}),
    "prompt, chosen, rejected": ({"prompt": "q", "chosen": "good", "rejected": "bad"},
                                 {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    "HH strings": ({"chosen": HH + "good", "rejected": HH + "bad"},
                   {"prompt": HH_TURNS, "chosen": "good", "rejected": "bad"}),
    "UltraFeedback": ({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, BAD],
                       "score_chosen": 8.0, "score_rejected": 3.0},
                      {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    "several turns, the first as prompt": (
        {"prompt": "q", "chosen": [*HH_TURNS, BOT], "rejected": [*HH_TURNS, BAD]},
        {"prompt": HH_TURNS, "chosen": "good", "rejected": "bad"}),
    "a list as prompt": ({"prompt": [USER], "chosen": [BOT], "rejected": [BAD]},
                         {"prompt": [USER], "chosen": "good", "rejected": "bad"}),
    "message lists without prompt": ({"chosen": [*HH_TURNS, BOT], "rejected": [*HH_TURNS, BAD]},
                                     {"prompt": HH_TURNS, "chosen": "good", "rejected": "bad"}),
    "prompt alone": ({"prompt": "q", "topic": "t"}, {"prompt": "q"}),
    "instruction alone": ({"instruction": "q"}, {"prompt": "q"}),
    "empty columns": ({"prompt": "q", "chosen": None, "rejected": None, "completion": None},
                      {"prompt": "q"}),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_accepted_layout_is_read(layout):
    row, expected = LAYOUTS[layout]
    assert common.parse_row(row) == expected


@pytest.mark.parametrize("row", [
    {"text": "a"}, {"question": "q", "answer": "a"}, {"chosen": "no dialogue", "rejected": "nor"},
    {"prompt": None},
])
def test_other_layouts_are_not_guessed(row):
    assert common.parse_row(row) == {}


def test_a_row_with_a_pair_and_messages_gives_both():
    """UltraFeedback-binarized has all of these columns."""
    got = common.parse_row({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, BAD],
                            "messages": [USER, BOT]})
    assert (got["response"], got["chosen"], got["rejected"]) == ("good", "good", "bad")
    assert common.show(got["prompt"]) == "q"


def test_an_empty_rejected_answer_is_a_pair_all_the_same():
    """Such rows stand in Anthropic-HH; one of them must not refuse the whole data set."""
    expected = {"prompt": "q", "chosen": "good", "rejected": ""}
    assert common.parse_row({"prompt": "q", "chosen": "good", "rejected": ""}) == expected
    got = common.parse_row({"chosen": HH + "good", "rejected": HH.rstrip()})
    assert got == {"prompt": HH_TURNS, "chosen": "good", "rejected": ""}


def test_conversational_prompt_and_completion():
    """The prompt and the completion as message lists, as conversational data sets have them."""
    assert common.parse_row({"prompt": [USER], "completion": [BOT]}) == {
        "prompt": [USER], "response": "good"}


def test_conversational_prompt_and_pair():
    got = common.parse_row({"prompt": [USER], "chosen": [BOT], "rejected": [BAD]})
    assert got == {"prompt": [USER], "chosen": "good", "rejected": "bad"}


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".dataset":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    elif path.suffix == ".dict":
        splits = {s: datasets.Dataset.from_list([r for r in rows if r["split"] == s])
                  for s in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LISTS = ("messages, several turns", "UltraFeedback", "message lists without prompt")
TEXTS = ("dolly with context", "alpaca with input", "HH strings", "prompt, chosen, rejected")
KINDS = (".jsonl", ".json", ".parquet", ".dataset", ".dict")


@pytest.mark.parametrize("layout, suffix", [
    *((layout, suffix) for layout in LISTS for suffix in KINDS),
    *((layout, ".csv") for layout in TEXTS),
])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, layout, suffix):
    row, expected = LAYOUTS[layout]
    rows = [{**row, "split": "test" if i > 3 else "train", "number": i} for i in range(6)]
    train, test = common.load_data(write(tmp_path / f"d{suffix}", rows), list(expected))
    assert [r["number"] for r in train] == [0, 1, 2, 3] and [r["number"] for r in test] == [4, 5]
    for read in train + test:
        assert {key: read[key] for key in expected} == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_load_data_obeys_a_split_column(tmp_path, suffix):
    rows = [{"instruction": f"q{i}", "response": f"a{i}", "note": f"n{i}",
             "split": "test" if i % 3 == 0 else "train"} for i in range(9)]
    train, test = common.load_data(write(tmp_path / f"d{suffix}", rows), ["prompt", "response"])
    assert [r["prompt"] for r in train] == ["q1", "q2", "q4", "q5", "q7", "q8"]
    assert [(r["response"], r["note"]) for r in test] == [("a0", "n0"), ("a3", "n3"), ("a6", "n6")]


@pytest.mark.parametrize("spec, asked", [
    ("org/name", ("org/name", None)), ("org/name:train", ("org/name", "train")),
    ("org/name:train[:1000]", ("org/name", "train[:1000]")),
])
def test_a_hub_id_takes_the_split_syntax_of_datasets(monkeypatch, spec, asked):
    made = datasets.Dataset.from_list([{"prompt": "q"}])
    said = []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, split: said.append((name, split)) or made)
    assert common.read_data(spec) == {"train": made} and said == [asked]


def test_load_data_holds_out_one_prompt_in_twenty_and_never_moves_it(tmp_path):
    """Another order, more rows or other answers change nothing; all rows of a prompt go together.
    Of 1000 prompts 50 are expected, with a standard deviation of 7."""
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(1000)]
    train, test = common.load_data(write(tmp_path / "one.jsonl", rows), ["prompt"])
    held = {r["prompt"] for r in test}
    assert 25 <= len(held) <= 80 and len(train) + len(test) == 1000
    more = [{"prompt": f"q{i}", "completion": f"b{j}"} for i in range(1200) for j in (0, 1)]
    random.Random(0).shuffle(more)
    train, test = common.load_data(write(tmp_path / "two.jsonl", more), ["prompt"])
    kept, left = {r["prompt"] for r in test}, {r["prompt"] for r in train}
    assert not kept & left
    assert {p for p in kept if int(p[1:]) < 1000} == held


def test_load_data_takes_the_test_split_of_a_saved_folder(tmp_path):
    make = datasets.Dataset.from_list
    train = make([{"prompt": f"q{i}"} for i in range(5)])
    saved = {"train": train, "test": make([{"prompt": "t"}])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "d"))
    train, test = common.load_data(str(tmp_path / "d"), ["prompt"])
    assert [r["prompt"] for r in test] == ["t"] and len(train) == 5


@pytest.mark.parametrize("rows, need", [
    ([{"text": "a"}] * 30, ["prompt"]),
    ([{"prompt": f"q{i}"} for i in range(99)], ["prompt", "response"]),
    ([{"prompt": f"q{i}", "response": "a"} for i in range(99)], ["prompt", "chosen", "rejected"]),
])
def test_unknown_columns_are_listed_beside_the_accepted_ones(tmp_path, capsys, rows, need):
    with pytest.raises(SystemExit):
        common.load_data(write(tmp_path / "d.jsonl", rows), need)
    error = capsys.readouterr().err
    assert all(column in error for column in rows[0]) and "chosen, rejected" in error


def test_rows_whose_needed_text_is_empty_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "response": "" if i in (2, 4) else "a",
             "split": "test" if i > 6 else "train"} for i in range(9)]
    train, test = common.load_data(write(tmp_path / "d.jsonl", rows), ["prompt", "response"])
    assert [r["prompt"] for r in train] == ["q0", "q1", "q3", "q5", "q6"] and len(test) == 2
    assert "2 rows dropped" in capsys.readouterr().out


ODD = {
    "null": {"response": None},
    "a number": {"response": 4},
    "no role": {"prompt": [{"from": "human", "value": "q"}]},
    "messages without content": {"prompt": [{"role": "user", "content": None}]},
    "a list of words": {"prompt": ["q"]},
}


@pytest.mark.parametrize("odd", list(ODD))
def test_a_row_without_its_text_is_dropped_and_data_of_such_rows_refused(
    tmp_path, capsys, monkeypatch, odd
):
    """One of nine is dropped and counted; where all are like it, the columns are listed."""
    rows = [{"prompt": f"q{i}", "response": "a", "split": "test" if i > 6 else "train"}
            for i in range(9)]
    mixed = {"train": [*rows[:2], {**rows[2], **ODD[odd]}, *rows[3:]]}
    with monkeypatch.context() as patch:
        patch.setattr(common, "read_data", lambda spec: mixed)
        train, test = common.load_data("mixed", ["prompt", "response"])
    assert [r["prompt"] for r in train] == ["q0", "q1", "q3", "q4", "q5", "q6"] and len(test) == 2
    assert "1 rows dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.load_data(write(tmp_path / "all.jsonl", [{**r, **ODD[odd]} for r in rows]),
                         ["prompt", "response"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "prompt, response, split" in error


@pytest.mark.parametrize("value, text", [
    ("a", True), ("", False), (None, False), (4, False), ([], False), (["a"], False), ([[]], False),
    ([{"content": "a"}], True), ([{"content": None}], False), ([{"role": "user"}], False),
])
def test_what_is_no_text_is_told_without_an_exception(value, text):
    assert common.is_text(value) is text


def test_messages_keep_their_role_and_content_only():
    """`datasets` fills absent columns with None, and Llama's template looks whether they exist."""
    turns = [{"role": "user", "content": "q", "tool_calls": None}, {**BOT, "tool_calls": None}]
    assert common.parse_row({"messages": turns}) == {"prompt": [USER], "response": "good"}


def test_splits_named_as_in_UltraFeedback_hold_out_the_test_one(tmp_path):
    make = datasets.Dataset.from_list
    saved = {"train_prefs": make([{"prompt": f"q{i}"} for i in range(40)]),
             "test_prefs": make([{"prompt": "t"}])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "d"))
    train, test = common.load_data(str(tmp_path / "d"), ["prompt"])
    assert [r["prompt"] for r in test] == ["t"] and len(train) == 40


@pytest.mark.parametrize("name", ["test", "val", "validation", "dev", "eval", "test_prefs",
                                  "Test", "VALIDATION"])
def test_a_split_of_any_usual_name_is_held_out(tmp_path, name):
    rows = [{"prompt": f"q{i}", "split": name if i > 6 else "train"} for i in range(9)]
    train, test = common.load_data(write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert [r["prompt"] for r in test] == ["q7", "q8"] and len(train) == 7


def test_a_split_column_of_numbers_says_nothing(tmp_path):
    rows = [{"prompt": f"q{i}", "split": i % 2} for i in range(300)]
    train, test = common.load_data(write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert len(train) + len(test) == 300 and 0 < len(test) < 60


def test_data_without_a_held_out_row_is_refused(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "split": "test"} for i in range(9)]
    with pytest.raises(SystemExit):
        common.load_data(write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert "0 rows to train on and 9 held out" in capsys.readouterr().err


@pytest.mark.parametrize("n, batch_size", [(10, 5), (10, 4), (3, 7), (1, 1)])
def test_batches_cover_every_row_once_an_epoch(n, batch_size):
    stream = common.batches(n, batch_size, seed=0)
    flat = []
    while len(flat) < 4 * n:
        batch = next(stream)
        assert len(batch) == batch_size
        flat += batch
    epochs = [flat[i : i + n] for i in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 5 or len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_follow_their_seed():
    first = [next(common.batches(100, 100, seed)) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_take_is_always_the_same():
    rows = list(range(100))
    assert common.take(rows, 10) == common.take(rows, 10) and len(set(common.take(rows, 10))) == 10
    assert sorted(common.take(rows, 500)) == rows


# ------------------------------------------------------------------------------ rewards, runs


@pytest.mark.parametrize("steps, warmup, expected", [
    (4, 0.0, [1.0, 0.75, 0.5, 0.25]),
    (10, 0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    (1, 0.0, [1.0]),
    (1, 0.5, [1.0]),
    (4, 1.0, [0.25, 0.5, 0.75, 1.0]),
])
def test_learning_rate_rises_and_falls_in_straight_lines(steps, warmup, expected):
    got = [common.learning_rate(step, steps, 3.0, warmup) for step in range(steps)]
    assert got == pytest.approx([3.0 * e for e in expected])


def test_a_reward_function_sees_prompts_as_text_and_the_whole_rows(tmp_path):
    file = tmp_path / "my_reward.py"
    file.write_text(
        "seen = []\n"
        "def length(prompts, responses, rows):\n"
        "    seen.append((prompts, responses, rows))\n"
        "    assert prompts == ['q', 'hello\\nthere']\n"
        "    return [len(r) + row['bonus'] for r, row in zip(responses, rows)]\n"
    )
    reward = common.load_reward(f"{file}:length", None, None, None)
    turns = [{"role": "user", "content": "hello"}, {"role": "user", "content": "there"}]
    ids = torch.zeros(2, 3, dtype=torch.long)
    got = reward(ids, ids, ["q", turns], ["abc", ""], [{"bonus": 0.5}, {"bonus": -1}])
    assert got.tolist() == [3.5, -1.0] and got.dtype == torch.float32


@pytest.mark.parametrize("returned", [
    "[1.0]", "[1.0, 2.0, 3.0]", "[1.0, float('nan')]", "[1.0, float('inf')]", "['good', 'bad']",
    "['1.0', '2.0']", "None", "1.0", "[[1.0, 2.0], [3.0, 4.0]]", "[None, 1.0]",
])
def test_what_is_no_list_of_one_finite_number_each_is_refused(tmp_path, capsys, returned):
    (tmp_path / "r.py").write_text(f"def f(prompts, responses, rows):\n    return {returned}\n")
    reward = common.load_reward(f"{tmp_path}/r.py:f", None, None, None)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(SystemExit) as end:
        reward(ids, ids, ["a", "b"], ["c", "d"], [{}, {}])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --reward")


def test_folders_of_runs_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = type("Args", (), {"out": None})
    assert str(common.free_folder(args, "ppo")) == "runs/ppo"
    (tmp_path / "runs/ppo").mkdir(parents=True)
    assert str(common.free_folder(args, "ppo")) == "runs/ppo-2"
    (tmp_path / "runs/ppo-2").mkdir()
    assert str(common.free_folder(args, "ppo")) == "runs/ppo-3"


def test_two_runs_started_together_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    args = argparse.Namespace(out=None, seed=3)
    chosen = [common.free_folder(args, "reward_model") for _ in range(2)]
    assert chosen[0] == chosen[1]
    made = [common.start_run(out, args) for out in chosen]
    assert [str(out) for out in made] == ["runs/reward_model", "runs/reward_model-2"]
    assert json.loads((made[1] / "config.json").read_text())["seed"] == 3


def test_a_named_folder_is_not_shared_either(tmp_path, monkeypatch, capsys):
    """Both looked while it was free."""
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    args = argparse.Namespace(out=str(tmp_path / "run"), seed=3)
    chosen = [common.free_folder(args, "ppo") for _ in range(2)]
    common.start_run(chosen[0], args)
    with pytest.raises(SystemExit) as end:
        common.start_run(chosen[1], args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and str(tmp_path / "run") in error
