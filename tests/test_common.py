"""common.py: loading is in test_loading.py, the forward pass and the sampler in test_forward.py;
here are padding, text to tokens and back, scores, and the order of data rows."""

import jinja2
import pytest
import torch
import transformers
from byte_tokenizer import (
    BOS, CHAT, EOS, SIZE, START, TURN, byte_tokenizer, sentencepiece_tokenizer, spell,
)
from conftest import toy
from tokenizers import processors

import common
import lora
from cli import flags

PROMPTS = [[5, 9, 4], [8], [6, 50, 31, 17, 9]]
ANSWERS = [[7, 30, 11], [3, 44, 21, 60], [33]]


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


@pytest.mark.parametrize("attention, cached, positions", [
    ([0, 0, 1, 1, 1], 0, [0, 0, 0, 1, 2]),
    ([1, 1, 1, 0, 0], 0, [0, 1, 2, 2, 2]),
    ([1, 1, 1, 1, 1], 0, [0, 1, 2, 3, 4]),
    ([0, 1, 1, 1, 1, 1, 0], 3, [2, 3, 4, 4]),
])
def test_positions_count_from_the_first_real_token(model, attention, cached, positions):
    """Of the columns that are read now, those in the cache being counted."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, _, given: seen.append(given["position_ids"].tolist()), with_kwargs=True)
    ids, attention = torch.ones(1, len(attention), dtype=torch.long), torch.tensor([attention])
    cache = transformers.DynamicCache(config=model.config) if cached else None
    if cached:
        common.forward(model, ids[:, :cached], attention[:, :cached], 1, cache=cache)
    common.forward(model, ids[:, cached:], attention, 1, cache=cache)
    assert seen[-1] == [positions]


def test_collate_puts_the_answers_of_a_row_side_by_side():
    encoded = [({}, [5, 9], [[7], [8, 3, 2]]), ({}, [4], [[6, 2], [1]])]
    batch = common.collate(encoded, "cpu")
    assert {key: value.tolist() for key, value in batch.items()} == {
        "x": [[5, 9], [0, 4]], "x_mask": [[1, 1], [0, 1]],
        "y": [[7, 0, 0], [8, 3, 2], [6, 2, 0], [1, 0, 0]],
        "mask": [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]}
    assert batch["mask"].dtype == torch.float32


# ------------------------------------------------------------------------------ prompts


def test_a_prompt_without_chat_template():
    got = common.encode_prompt(byte_tokenizer(), "Hi?")
    assert got == [BOS] + spell("User: Hi?\n\nAssistant:")


def test_messages_without_chat_template():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]
    text = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert common.encode_prompt(byte_tokenizer(), turns) == [BOS] + spell(text)


def test_a_prompt_with_chat_template():
    got = common.encode_prompt(byte_tokenizer(CHAT), "Hi?")
    question = [START] + spell("user\nHi?") + [TURN] + spell("\n")
    assert got == question + [START] + spell("assistant\n")


@pytest.mark.parametrize("prompt, text", [
    ("Hi?", "Hi?"),
    ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "a\nb"),
])
def test_a_prompt_as_one_text_is_itself_or_its_messages_below_each_other(prompt, text):
    assert common.prompt_text(prompt) == text


SYSTEM = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi?"}]
CLOSED = [TURN] + spell("\n") + [START] + spell("assistant\n")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
LEAVES_OUT = CHAT.replace("messages %}", "messages if m['role'] != 'system' %}")
STRIPS = CHAT.replace("m['content']", "m['content'] | trim")


@pytest.mark.parametrize("template, system", [
    (CHAT, "system\n Be kind. "), (STRIPS, "system\nBe kind."), (LEAVES_OUT, None),
])
def test_a_system_turn_is_the_template_s_affair(template, system):
    got = common.encode_prompt(byte_tokenizer(template), SYSTEM)
    first = [START] + spell(system) + [TURN] + spell("\n") if system else []
    assert got == first + [START] + spell("user\nHi?") + CLOSED


def test_turns_that_the_template_refuses_are_raised_and_end_a_command_in_one_line(capsys):
    with pytest.raises(jinja2.TemplateError):
        common.encode_prompt(byte_tokenizer(REFUSES), SYSTEM)
    with pytest.raises(SystemExit) as end, flags.errors():
        common.encode_prompt(byte_tokenizer(REFUSES), SYSTEM)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "refuses a prompt (no)" in error


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    assert tokenizer("a").input_ids == [BOS] + spell("a") + [EOS]
    assert common.encode_prompt(tokenizer, "q") == [BOS] + spell("User: q\n\nAssistant:")
    assert common.encode_response(tokenizer, "a") == spell(" a") + [EOS]


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("template, response", [(None, spell(" b") + [EOS]),
                                                (CHAT, spell("b") + [TURN])])
def test_end_of_turn_is_what_the_template_puts_there(template, response):
    tokenizer = byte_tokenizer(template)
    assert common.end_of_turn(tokenizer) == response[-1]
    assert common.encode_response(tokenizer, "b") == response


def test_end_of_turn_is_eos_where_the_template_closes_with_none():
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert common.end_of_turn(byte_tokenizer(template)) == EOS


def test_the_end_of_a_turn_is_looked_up_once_for_all_rows(monkeypatch):
    """Asked for every answer of a data set, it would be a third of the time the encoding takes."""
    tokenizer, calls = byte_tokenizer(CHAT), []
    template = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template",
                        lambda *a, **k: calls.append(a) or template(*a, **k))
    encoded = common.encode(tokenizer, [{"prompt": "q", "w": "a", "l": "b"}] * 3, ["w", "l"], 99)
    assert len(calls) == 3 + 1  # one a prompt
    assert [ys for _, _, ys in encoded] == [[spell("a") + [TURN], spell("b") + [TURN]]] * 3


@pytest.mark.parametrize("template, before, end", [(None, " ", EOS), (CHAT, "", TURN)])
def test_text_that_spells_a_special_token_is_text(template, before, end):
    tokenizer, text = byte_tokenizer(template), "Write <eos> or <turn> here."
    assert common.encode_response(tokenizer, text) == spell(before + text) + [end]
    if template is None:
        prompt = spell(f"User: {text}\n\nAssistant:")
        assert common.encode_prompt(tokenizer, text) == [BOS] + prompt


def test_every_end_stops_generation(model):
    model.generation_config.eos_token_id = [2, 9]
    assert common.stop_ids(model, byte_tokenizer(CHAT)) == sorted({EOS, TURN, 2, 9})
    model.generation_config.eos_token_id = None
    assert common.stop_ids(model, byte_tokenizer()) == [EOS]


@pytest.mark.parametrize("template", [None, CHAT, "<bos>" + CHAT])
@pytest.mark.parametrize("bos", [None, "<bos>", "<eos>"])
@pytest.mark.parametrize("pad", [None, "<pad>", "<eos>", "<turn>"])
def test_neither_padding_token_nor_bos_changes_what_is_learnt(template, bos, pad):
    """One BOS at most, from the template where there is one; every answer keeps its one end, also
    where the end pads and where BOS is EOS; what the mask counts is the answer and its end."""
    tokenizer = byte_tokenizer(template, bos=bos, pad=pad)
    starts = {None: [], "<bos>": [BOS], "<eos>": [EOS]}[bos]
    start = ([BOS] if template and "bos" in template else []) if template else starts
    end, space = (TURN, "") if template else (EOS, " ")
    question = [START] + spell("user\nq") + CLOSED if template else spell("User: q\n\nAssistant:")
    answers = ("yes", "no, never")
    encoded = common.encode(
        tokenizer, [{"prompt": "q", "response": answer} for answer in answers], ["response"], 99)
    assert [x for _, x, _ in encoded] == [start + question] * 2
    batch = common.collate(encoded, "cpu")
    for ids, mask, answer in zip(batch["y"], batch["mask"], answers):
        assert ids[mask == 1].tolist() == spell(space + answer) + [end]
    for ids, mask in zip(batch["x"], batch["x_mask"]):
        assert ids[mask == 1].tolist() == start + question


@pytest.mark.parametrize("template", [None, CHAT])
def test_truncation_keeps_the_whole_response(template):
    """The prompt loses its beginning, the same piece for both answers of a pair; an answer keeps
    every byte and its one end of turn."""
    tokenizer, row = byte_tokenizer(template), {"prompt": "x" * 40, "w": "answer", "l": "no"}
    whole = common.encode_prompt(tokenizer, row["prompt"])
    responses = [common.encode_response(tokenizer, row[key]) for key in "wl"]
    longest = len(responses[0])
    for max_length in range(longest + 1, 80):
        [(same, x, ys)] = common.encode(tokenizer, [row], ["w", "l"], max_length)
        assert same is row and ys == responses
        assert x == whole[-(max_length - longest) :] and len(x) + longest <= max_length


@pytest.mark.parametrize("max_length", [1, 7, 8])
def test_a_row_whose_answer_does_not_fit_is_left_out_and_no_answer_is_cut(max_length):
    rows = [{"prompt": "x", "response": "answer"}, {"prompt": "y", "response": ""}]
    encoded = common.encode(byte_tokenizer(), rows, ["response"], max_length)
    assert [row["prompt"] for row, _, _ in encoded] == (["y"] if max_length > 2 else [])


# ------------------------------------------------------------------------------ the space between

PLAIN = {"bytes": byte_tokenizer(), "merges": byte_tokenizer(merges=[("Ġ", "a")]),
         "llama": sentencepiece_tokenizer(), "metaspace": sentencepiece_tokenizer("metaspace")}
TEXTS = ["answer", "Because.", "an apple a day", "two\n\nlines ", "\nline", '"Yes," he said .',
         "1 , 2", "don 't", ": x", "éü 🐝", "a </s> or <eos>", "", " leading", "  two"]


def test_the_space_before_an_answer_belongs_to_its_first_word():
    """A prompt that ends in a bare space would never be followed by the token of space and a."""
    tokenizer = PLAIN["merges"]
    assert tokenizer("Assistant: a").input_ids[-1] == SIZE
    assert common.encode_prompt(tokenizer, "q") == [BOS] + spell("User: q\n\nAssistant:")
    assert common.encode_response(tokenizer, "a b") == [SIZE] + spell(" b") + [EOS]


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_sentencepiece_puts_one_space_before_an_answer_and_not_two(kind):
    tokenizer = PLAIN[kind]
    tokens = tokenizer.convert_ids_to_tokens(common.encode_response(tokenizer, "a b"))
    assert tokens == ["▁a", "▁", "b", "</s>"]
    tokens = tokenizer.convert_ids_to_tokens(common.encode_prompt(tokenizer, "q"))
    assert "".join(tokens[-11:]) == "<0x0A>Assistant:"


@pytest.mark.parametrize("kind", list(PLAIN))
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(kind, text):
    """As the model saw it in pretraining: split after the colon, no token is another one."""
    tokenizer = PLAIN[kind]
    whole = tokenizer(f"User: q\n\nAssistant: {text}", split_special_tokens=True).input_ids
    response = common.encode_response(tokenizer, text)
    assert common.encode_prompt(tokenizer, "q") + response[:-1] == whole
    assert response[-1] == tokenizer.eos_token_id


CHATS = {"chat": byte_tokenizer(CHAT), "llama, chat": sentencepiece_tokenizer(chat_template=CHAT)}


@pytest.mark.parametrize("kind", [*PLAIN, *CHATS])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_what_was_encoded(kind, text):
    """So a reward sees the answer as it stands in the data, without a space before it."""
    tokenizer = {**PLAIN, **CHATS}[kind]
    y, mask = common.pad([common.encode_response(tokenizer, t) for t in (text, "b" * 40)],
                         "right", "cpu")
    assert common.decode(tokenizer, y, mask) == [text, "b" * 40]


def test_decode_shows_only_real_tokens_without_specials():
    tokenizer = byte_tokenizer()
    ids = torch.tensor([spell("yes") + [EOS] + spell("no"), spell("abcdef")])
    mask = torch.tensor([[1.0] * 4 + [0.0] * 2, [1.0] * 6])
    assert common.decode(tokenizer, ids, mask) == ["yes", "abcdef"]


# ------------------------------------------------------------------------------ scores


def alone(model, name, prompt, answer):
    """The score of one row by the model's own forward, without padding."""
    with lora.use_adapter(model, name):
        out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
    return (out.hidden_states[-1][0, -1] * model.heads[name].weight[0]).sum()


@pytest.mark.parametrize("extra", [0, 3])
@torch.no_grad()
def test_scores_of_an_adapter_know_nothing_of_padding_and_batch_mates(model, targets, extra):
    with_head(model, targets, "reward")
    x, x_mask = common.pad(PROMPTS, "left", "cpu")
    y, mask = common.pad(ANSWERS, "right", "cpu")
    x, x_mask = (torch.nn.functional.pad(t, (extra, 0)) for t in (x, x_mask))
    y, mask = (torch.nn.functional.pad(t, (0, extra)) for t in (y, mask))
    got = common.adapter_scores(model, "reward", x, x_mask, y, mask.float())
    expected = torch.stack([alone(model, "reward", *pair) for pair in zip(PROMPTS, ANSWERS)])
    assert torch.allclose(got, expected, atol=1e-5) and got.std() > 1e-3


@torch.no_grad()
def test_scores_of_a_group_are_those_of_each_answer(model, targets):
    """Two answers to one prompt, which is read once."""
    with_head(model, targets, "reward")
    x, x_mask = common.pad(PROMPTS[:1], "left", "cpu")
    y, mask = common.pad(ANSWERS[:2], "right", "cpu")
    got = common.adapter_scores(model, "reward", x, x_mask, y, mask.float())
    expected = torch.stack([alone(model, "reward", PROMPTS[0], y) for y in ANSWERS[:2]])
    assert torch.allclose(got, expected, atol=1e-5) and got.std() > 1e-3


@torch.no_grad()
def test_the_reward_reads_by_its_adapter_and_not_by_the_active_one(model, targets):
    with_head(with_head(model, targets, "reward"), targets, "policy")
    for layer in lora.lora_layers(model).values():  # another adapter than that of the reward
        layer.lora_B["policy"].data.neg_()
    x, x_mask = common.pad(PROMPTS, "left", "cpu")
    y, mask = common.pad(ANSWERS, "right", "cpu")
    given = (x, x_mask, y, mask.float())
    outside = common.adapter_scores(model, "reward", *given)
    with lora.use_adapter(model, "policy"):
        assert torch.equal(common.adapter_scores(model, "reward", *given), outside)
    assert not torch.allclose(common.adapter_scores(model, "policy", *given), outside)


def scored(model, reward, rows):
    """common.score of "yes" and "no" to the prompts of two data rows, by the byte tokenizer."""
    tokenizer = byte_tokenizer()
    x, x_mask = common.pad([[5, 9], [8]], "left", "cpu")
    answers = [common.encode_response(tokenizer, text) for text in ("yes", "no")]
    y, mask = common.pad(answers, "right", "cpu")
    return common.score(model, tokenizer, rows, x, x_mask, y, mask.float(), reward), (x, x_mask, y)


TURNS = [{"role": "user", "content": "hello"}, {"role": "user", "content": "there"}]
ROWS = [{"prompt": "q", "bonus": 0.5}, {"prompt": TURNS, "bonus": -1}]


def test_a_reward_function_sees_prompts_as_text_and_the_whole_rows():
    def reward(prompts, responses, rows):
        assert prompts == ["q", "hello\nthere"] and responses == ["yes", "no"] and rows == ROWS
        return [len(response) + row["bonus"] for response, row in zip(responses, rows)]

    (score, texts), _ = scored(None, reward, ROWS)
    assert score.tolist() == [3.5, 1.0] and score.dtype == torch.float32
    assert texts == ["yes", "no"]


@torch.no_grad()
def test_an_adapter_as_a_reward_scores_the_sampled_ids(kind, targets):
    model = with_head(toy(kind, SIZE), targets, "reward")
    (score, texts), (x, x_mask, y) = scored(model, "reward", ROWS)
    lengths = [len(" yes") + 1, len(" no") + 1]
    for i, n in enumerate(lengths):
        expected = alone(model, "reward", x[i][x_mask[i] == 1].tolist(), y[i, :n].tolist())
        assert torch.allclose(score[i], expected, atol=1e-5)
    assert texts == ["yes", "no"] and not score.requires_grad


@pytest.mark.parametrize("returned", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")],
                                      [float("-inf"), 1.0]])
def test_what_is_no_finite_number_for_each_answer_is_refused(returned):
    with pytest.raises(ValueError, match="for 2 responses"):
        scored(None, lambda prompts, responses, rows: returned, ROWS)


# ------------------------------------------------------------------------------ data and schedule


@pytest.mark.parametrize("n, size", [(10, 5), (10, 4), (3, 7), (1, 1), (2, 9), (7, 7)])
def test_batches_cover_every_row_once_a_pass(n, size):
    flat = []
    for step in range(4 * n):
        rows = common.batch_rows(step, n, size, seed=0)
        assert len(rows) == size
        flat += rows
    passes = [flat[i : i + n] for i in range(0, len(flat) - n + 1, n)]
    assert all(sorted(one) == list(range(n)) for one in passes)
    assert n < 5 or len({tuple(one) for one in passes}) > 1


def test_the_rows_of_a_step_follow_from_its_number_and_the_seed_alone():
    """So a run goes on where it was, and no other random number moves them."""
    forward = [common.batch_rows(step, 10, 4, 3) for step in range(20)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    backward = [common.batch_rows(step, 10, 4, 3) for step in reversed(range(20))]
    assert backward[::-1] == forward and torch.equal(torch.get_rng_state(), state)
    assert common.batch_rows(0, 100, 100, 0) != common.batch_rows(0, 100, 100, 1)


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


def test_prompt_and_answer_are_tokenized_apart():
    """Joined, q and a would be one token, half of it prompt and half of it answer."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = byte_tokenizer(template, merges=[("q", "a")])
    assert tokenizer("qa", add_special_tokens=False).input_ids == [SIZE]
    row = {"prompt": "q", "response": "a"}
    [(_, x, [y])] = common.encode(tokenizer, [row], ["response"], 9)
    assert x == spell("q") and y == spell("a") + [EOS]
