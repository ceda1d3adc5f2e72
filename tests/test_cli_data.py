"""cli/data.py and cli/rewards.py: data rows by their columns, and rewards by name."""

import argparse
import csv
import json
import random

import datasets
import pytest
import torch
import transformers
from byte_tokenizer import CHAT, SIZE, byte_tokenizer
from conftest import ROOT, TARGETS, toy

import common
import lora
from cli import data, flags, rewards


def refusal(function, *given):
    """The message of a ValueError, one line."""
    with pytest.raises(ValueError) as problem:
        function(*given)
    message = str(problem.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ layouts

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
    assert data.parse_row(row) == expected


@pytest.mark.parametrize("row", [
    {"text": "a"}, {"question": "q", "answer": "a"}, {"chosen": "no dialogue", "rejected": "nor"},
    {"prompt": None},
])
def test_other_layouts_are_not_guessed(row):
    assert data.parse_row(row) == {}


def test_a_row_with_a_pair_and_messages_gives_both():
    """UltraFeedback-binarized has all of these columns."""
    got = data.parse_row({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, BAD],
                            "messages": [USER, BOT]})
    assert (got["response"], got["chosen"], got["rejected"]) == ("good", "good", "bad")
    assert common.prompt_text(got["prompt"]) == "q"


def test_an_empty_rejected_answer_is_a_pair_all_the_same():
    """Such rows stand in Anthropic-HH; one of them must not refuse the whole data set."""
    expected = {"prompt": "q", "chosen": "good", "rejected": ""}
    assert data.parse_row({"prompt": "q", "chosen": "good", "rejected": ""}) == expected
    got = data.parse_row({"chosen": HH + "good", "rejected": HH.rstrip()})
    assert got == {"prompt": HH_TURNS, "chosen": "good", "rejected": ""}


def test_conversational_prompt_and_completion():
    """The prompt and the completion as message lists, as conversational data sets have them."""
    assert data.parse_row({"prompt": [USER], "completion": [BOT]}) == {
        "prompt": [USER], "response": "good"}


def test_conversational_prompt_and_pair():
    got = data.parse_row({"prompt": [USER], "chosen": [BOT], "rejected": [BAD]})
    assert got == {"prompt": [USER], "chosen": "good", "rejected": "bad"}


# ------------------------------------------------------------------------------ files and splits


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
    train, test = data.load_data(write(tmp_path / f"d{suffix}", rows), list(expected))
    assert [r["number"] for r in train] == [0, 1, 2, 3] and [r["number"] for r in test] == [4, 5]
    for read in train + test:
        assert {key: read[key] for key in expected} == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_load_data_obeys_a_split_column(tmp_path, suffix):
    rows = [{"instruction": f"q{i}", "response": f"a{i}", "note": f"n{i}",
             "split": "test" if i % 3 == 0 else "train"} for i in range(9)]
    train, test = data.load_data(write(tmp_path / f"d{suffix}", rows), ["prompt", "response"])
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
    assert data.read_data(spec) == {"train": made} and said == [asked]


def test_load_data_holds_out_one_prompt_in_twenty_and_never_moves_it(tmp_path):
    """Another order, more rows or other answers change nothing; all rows of a prompt go together.
    Of 1000 prompts 50 are expected, with a standard deviation of 7."""
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(1000)]
    train, test = data.load_data(write(tmp_path / "one.jsonl", rows), ["prompt"])
    held = {r["prompt"] for r in test}
    assert 25 <= len(held) <= 80 and len(train) + len(test) == 1000
    more = [{"prompt": f"q{i}", "completion": f"b{j}"} for i in range(1200) for j in (0, 1)]
    random.Random(0).shuffle(more)
    train, test = data.load_data(write(tmp_path / "two.jsonl", more), ["prompt"])
    kept, left = {r["prompt"] for r in test}, {r["prompt"] for r in train}
    assert not kept & left
    assert {p for p in kept if int(p[1:]) < 1000} == held


def test_load_data_takes_the_test_split_of_a_saved_folder(tmp_path):
    make = datasets.Dataset.from_list
    train = make([{"prompt": f"q{i}"} for i in range(5)])
    saved = {"train": train, "test": make([{"prompt": "t"}])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "d"))
    train, test = data.load_data(str(tmp_path / "d"), ["prompt"])
    assert [r["prompt"] for r in test] == ["t"] and len(train) == 5


@pytest.mark.parametrize("rows, need", [
    ([{"text": "a"}] * 30, ["prompt"]),
    ([{"prompt": f"q{i}"} for i in range(99)], ["prompt", "response"]),
    ([{"prompt": f"q{i}", "response": "a"} for i in range(99)], ["prompt", "chosen", "rejected"]),
])
def test_unknown_columns_are_listed_beside_the_accepted_ones(tmp_path, rows, need):
    error = refusal(data.load_data, write(tmp_path / "d.jsonl", rows), need)
    assert all(column in error for column in rows[0]) and "chosen, rejected" in error


def test_rows_whose_needed_text_is_empty_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "response": "" if i in (2, 4) else "a",
             "split": "test" if i > 6 else "train"} for i in range(9)]
    train, test = data.load_data(write(tmp_path / "d.jsonl", rows), ["prompt", "response"])
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
        patch.setattr(data, "read_data", lambda spec: mixed)
        train, test = data.load_data("mixed", ["prompt", "response"])
    assert [r["prompt"] for r in train] == ["q0", "q1", "q3", "q4", "q5", "q6"] and len(test) == 2
    assert "1 rows dropped" in capsys.readouterr().out
    path = write(tmp_path / "all.jsonl", [{**row, **ODD[odd]} for row in rows])
    error = refusal(data.load_data, path, ["prompt", "response"])
    assert "prompt, response, split" in error


@pytest.mark.parametrize("value, text", [
    ("a", True), ("", False), (None, False), (4, False), ([], False), (["a"], False), ([[]], False),
    ([{"role": "user", "content": "a"}], True), ([{"role": "user", "content": None}], False),
    ([{"role": "user"}], False), ([{"role": 5, "content": "a"}], False), ([{"content": "a"}], False),
])
def test_what_is_no_text_is_told_without_an_exception(value, text):
    assert data.is_text(value) is text


def test_messages_keep_their_role_and_content_only():
    """`datasets` fills absent columns with None, and Llama's template looks whether they exist."""
    turns = [{"role": "user", "content": "q", "tool_calls": None}, {**BOT, "tool_calls": None}]
    assert data.parse_row({"messages": turns}) == {"prompt": [USER], "response": "good"}


def test_splits_named_as_in_UltraFeedback_hold_out_the_test_one(tmp_path):
    make = datasets.Dataset.from_list
    saved = {"train_prefs": make([{"prompt": f"q{i}"} for i in range(40)]),
             "test_prefs": make([{"prompt": "t"}])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "d"))
    train, test = data.load_data(str(tmp_path / "d"), ["prompt"])
    assert [r["prompt"] for r in test] == ["t"] and len(train) == 40


@pytest.mark.parametrize("name", ["test", "val", "validation", "dev", "eval", "test_prefs",
                                  "Test", "VALIDATION"])
def test_a_split_of_any_usual_name_is_held_out(tmp_path, name):
    rows = [{"prompt": f"q{i}", "split": name if i > 6 else "train"} for i in range(9)]
    train, test = data.load_data(write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert [r["prompt"] for r in test] == ["q7", "q8"] and len(train) == 7


def test_a_split_column_of_numbers_says_nothing(tmp_path):
    rows = [{"prompt": f"q{i}", "split": i % 2} for i in range(300)]
    train, test = data.load_data(write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert len(train) + len(test) == 300 and 0 < len(test) < 60


def test_data_without_a_row_to_train_on_are_refused(tmp_path):
    rows = [{"prompt": f"q{i}", "split": "test"} for i in range(9)]
    error = refusal(data.load_data, write(tmp_path / "d.jsonl", rows), ["prompt"])
    assert "0 rows to train on and 9 held out" in error


@pytest.mark.parametrize("n", range(2, 8))
def test_of_few_rows_without_a_split_one_is_held_out_the_same_every_time(tmp_path, n):
    """No hash of these prompts falls into the twentieth that is held out of many rows."""
    rows = [{"prompt": f"Question {i}?", "response": "a"} for i in range(n)]
    train, test = data.load_data(write(tmp_path / "one.jsonl", rows), ["prompt", "response"])
    assert len(test) == 1 and len(train) == n - 1
    other = [{"prompt": row["prompt"], "response": f"b{i}"} for i, row in enumerate(rows[::-1])]
    again, held = data.load_data(write(tmp_path / "two.jsonl", other), ["prompt", "response"])
    assert [row["prompt"] for row in held] == [row["prompt"] for row in test]
    assert len(again) == n - 1


def test_all_rows_of_the_one_prompt_that_is_held_out_are_held_out_together(tmp_path):
    rows = [{"prompt": f"Question {i // 3}?", "response": f"a{i}"} for i in range(9)]
    train, test = data.load_data(write(tmp_path / "d.jsonl", rows), ["prompt", "response"])
    assert len(test) == 3 and len({row["prompt"] for row in test}) == 1
    assert len({row["prompt"] for row in train}) == 2


def test_one_prompt_alone_cannot_be_trained_on_and_held_out(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "response": "a"}] * 3)
    assert "0 rows to train on and 3 held out" in refusal(data.load_data, path, ["prompt"])


def test_take_is_always_the_same():
    rows = list(range(100))
    assert data.take(rows, 10) == data.take(rows, 10) and len(set(data.take(rows, 10))) == 10
    assert sorted(data.take(rows, 500)) == rows


def test_at_most_eval_size_held_out_rows_are_kept(tmp_path):
    rows = [{"prompt": f"q{i}", "split": "test" if i < 30 else "train"} for i in range(50)]
    args = argparse.Namespace(data=write(tmp_path / "d.jsonl", rows), eval_size=7)
    train, test = data.load(args, ["prompt"])
    assert len(train) == 20 and len({row["prompt"] for row in test}) == 7
    assert data.load(args, ["prompt"]) == (train, test)


@pytest.mark.parametrize("name, content, says", [
    ("none.jsonl", None, "no such file"), ("empty.jsonl", b"", "is empty"),
    ("half.jsonl", b'{"prompt": "q"', "line 1: "), ("no.parquet", b"PAR0", "cannot read"),
    ("half.json", b'[{"prompt": "q"}, {"pro', "cannot read"), ("number.json", b"3", "no JSON obj"),
    ("deep.json", b"[" * 100000, "cannot read"), ("lists.jsonl", b"[1]\n[2]\n", "cannot read"),
    ("surrogate.jsonl", b'{"prompt": "\\ud83d"}', "cannot read"),
    ("latin.csv", b"prompt\n\xe4\xf6\n", "cannot read"), ("folder", None, "cannot read"),
])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    error = refusal(data.read_data, str(tmp_path / name))
    assert says in error and f"--data {tmp_path / name}" in error


# ------------------------------------------------------------------------------ rows that fit


def test_rows_that_do_not_fit_and_pairs_of_equal_answers_are_dropped_and_counted(capsys):
    rows = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in (
        ("good", "bad"), ("good", "good"), ("a" * 90, "bad"), ("good", "b" * 90), ("yes", "no"))]
    config = argparse.Namespace(max_length=60)
    kept = data.that_fit(rows, byte_tokenizer(), ["chosen", "rejected"], config)
    assert kept == [rows[0], rows[4]]
    said = capsys.readouterr().out
    assert "2 rows (dropped: 2 longer than 60 tokens, 1 of two equal answers)" in said


def test_rows_of_which_none_fits_are_refused():
    config = argparse.Namespace(max_length=5)
    error = refusal(data.that_fit, [{"prompt": "q", "response": "an answer"}], byte_tokenizer(),
                    ["response"], config)
    assert "--max-length 5" in error


# ------------------------------------------------------------------------------ functions

TURNS = [{"role": "user", "content": "hello"}, {"role": "user", "content": "there"}]


def function(path, body, name="f"):
    """What --reward file:name becomes; body: the lines of a file, or of f, which has one line."""
    lines = body if "def " in body else f"def f(prompts, responses, rows):\n    {body}\n"
    path.write_text(lines)
    return rewards.load(argparse.Namespace(reward=f"{path}:{name}"), None, 64)


def ended(capsys, call, *given):
    """(what stands on stderr before the last line, the last line) of a call that ends all."""
    with pytest.raises(SystemExit) as end:
        call(*given)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("error: --reward")
    assert not any(line.startswith("error:") for line in lines[:-1])
    return "\n".join(lines[:-1]), lines[-1]


def test_a_reward_function_sees_prompts_as_text_and_the_whole_rows(tmp_path):
    reward = function(tmp_path / "my_reward.py", "def length(prompts, responses, rows):\n"
                      "    assert prompts == ['q', 'hello\\nthere']\n"
                      "    return [len(r) + row['bonus'] for r, row in zip(responses, rows)]\n",
                      "length")
    rows = [{"prompt": "q", "bonus": 0.5}, {"prompt": TURNS, "bonus": -1}]
    tokenizer = byte_tokenizer()
    y, mask = common.pad([common.encode_response(tokenizer, text) for text in ("abc", "")],
                         "right", "cpu")
    score, texts = common.score(None, tokenizer, rows, None, None, y, mask, reward)
    assert score.tolist() == [3.5, -1.0] and score.dtype == torch.float32 and texts == ["abc", ""]


def test_a_reward_may_import_what_lies_beside_it_and_return_any_numbers(tmp_path):
    (tmp_path / "beside_it.py").write_text("import torch\nSCORES = torch.tensor([1.5, 2.0])\n")
    reward = function(tmp_path / "r.py", "import beside_it\n"
                      "def f(prompts, responses, rows):\n    return beside_it.SCORES\n")
    assert reward(["a", "b"], ["c", "d"], [{}, {}]) == [1.5, 2.0]
    flags = function(tmp_path / "s.py", "return [True, 3]")
    assert flags(["a", "b"], ["c", "d"], [{}, {}]) == [1.0, 3.0]


@pytest.mark.parametrize("returned", [
    "[1.0]", "[1.0, 2.0, 3.0]", "[1.0, float('nan')]", "[1.0, float('inf')]", "['good', 'bad']",
    "['1.0', '2.0']", "None", "1.0", "[[1.0, 2.0], [3.0, 4.0]]", "[None, 1.0]",
])
def test_what_is_no_list_of_one_finite_number_each_is_refused(tmp_path, returned):
    reward = function(tmp_path / "r.py", f"return {returned}")
    error = refusal(reward, ["a", "b"], ["c", "d"], [{}, {}])
    assert error.startswith(f"--reward {tmp_path}/r.py:f ")


RAISES = """
def helper(row):
    return row["no such column"]

def f(prompts, responses, rows):
    return [helper(row) for row in rows]
"""


def test_a_function_that_raises_shows_its_own_traceback_and_then_one_line(tmp_path, capsys):
    """The line names the function, what it raised, and the first prompt; the traceback begins in
    the user's file."""
    reward = function(tmp_path / "r.py", RAISES)
    before, line = ended(capsys, reward, ["Why is\nthe sky blue?", "b"], ["c", "d"], [{}, {}])
    assert f"{tmp_path}/r.py:f raised KeyError: 'no such column'" in line
    assert "2 prompts" in line and "Why is\\nthe sky blue?" in line
    assert before.startswith("Traceback") and before.endswith("KeyError: 'no such column'")
    assert 'return row["no such column"]' in before and "in helper" in before
    assert str(ROOT) not in before


def test_an_exception_of_several_lines_is_still_one_error_line(tmp_path, capsys):
    reward = function(tmp_path / "r.py", "raise RuntimeError('one\\ntwo')")
    _, line = ended(capsys, reward, ["a"], ["b"], [{}])
    assert "raised RuntimeError: one two" in line


@pytest.mark.parametrize("text, kind", [
    ("def f(:\n", "SyntaxError"), ("import no_such_module\ndef f(): pass\n", "ModuleNotFoundError"),
    ("1 / 0\ndef f(): pass\n", "ZeroDivisionError"),
])
def test_a_file_that_does_not_run_shows_its_traceback_and_then_one_line(
    tmp_path, capsys, text, kind
):
    before, line = ended(capsys, flags.errors()(function), tmp_path / "r.py", text)
    assert f"--reward {tmp_path}/r.py does not run: {kind}" in line and kind in before


@pytest.mark.parametrize("text, name, says", [
    ("def g(): pass\n", "f", "no function f"), ("def f(prompts): pass\n", "f", "must take"),
    ("f = 3\ndef g(): pass\n", "f", "no function f"), ("def g(): pass\n", "", "no function"),
])
def test_what_is_no_function_of_prompts_responses_and_rows_is_refused(tmp_path, text, name, says):
    assert says in refusal(function, tmp_path / "r.py", text, name)


@pytest.mark.parametrize("spec, says", [
    ("none.py:f", "no such file"), ("r.py", "no such file r.py"), ("empty", "neither an adapter"),
])
def test_a_reward_that_is_not_there_is_refused(tmp_path, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert says in refusal(rewards.load, argparse.Namespace(reward=spec), None, 64)


# ------------------------------------------------------------------------------ models as rewards


@pytest.fixture
def policy(kind, tmp_path, monkeypatch):
    """A model that was loaded from tmp_path/base, with its tokenizer."""
    monkeypatch.chdir(tmp_path)
    toy(kind, SIZE).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    return common.load_model("base", "cpu", "fp32")[0]


def args(reward):
    return argparse.Namespace(reward=str(reward), trust_remote_code=False)


def test_a_reward_adapter_of_the_same_base_becomes_the_adapter_reward(policy, kind):
    lora.add_adapter(policy, "a", rank=2, targets=TARGETS[kind])
    lora.save_adapter(policy, "a", "plain")
    lora.add_head(policy, "a")
    lora.save_adapter(policy, "a", "judge")
    other, _ = common.load_model("base", "cpu", "fp32")
    assert rewards.load(args("judge"), other, 64) == "reward"
    assert torch.equal(other.heads["reward"].weight, policy.heads["a"].weight)
    assert not any(p.requires_grad for p in lora.adapter_parameters(other, "reward"))
    another, _ = common.load_model("base", "cpu", "fp32")
    assert "no scalar head" in refusal(rewards.load, args("plain"), another, 64)
    another.name_or_path = "some/other"
    assert "belongs to the model base" in refusal(rewards.load, args("judge"), another, 64)


@pytest.fixture
def judge(policy, kind):
    """A sequence classifier of one score in tmp_path/judge, with a chat model's tokenizer."""
    torch.manual_seed(3)
    made = {"gpt2": transformers.GPT2ForSequenceClassification,
            "llama": transformers.LlamaForSequenceClassification}[kind]
    config = toy(kind, SIZE).config
    config.num_labels = 1
    model = made(config).eval()
    for p in model.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)
    model.save_pretrained("judge")
    byte_tokenizer(CHAT).save_pretrained("judge")
    return model


@torch.no_grad()
def test_a_classifier_scores_texts_by_its_own_tokenizer_up_to_the_end_of_the_turn(judge, policy):
    reward, tokenizer = rewards.load(args("judge"), policy, 64), byte_tokenizer(CHAT)
    rows = [{"prompt": "Who?"}, {"prompt": TURNS}, {"prompt": "x" * 99}]
    responses = ["I.", "Because.", "A longer answer."]
    got = reward([common.prompt_text(row["prompt"]) for row in rows], responses, rows)
    for score, row, response in zip(got, rows, responses):
        ids = common.encode_prompt(tokenizer, row["prompt"])
        ids = (ids + common.encode_response(tokenizer, response))[-64:]  # the beginning is cut
        hidden = judge.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx(judge.score(hidden).item(), abs=1e-5)
    assert len({round(score, 3) for score in got}) == 3


def test_a_model_without_a_head_of_its_own_is_no_reward(policy):
    assert "score.weight" in refusal(rewards.load, args("base"), policy, 64)


def test_a_classifier_whose_tokenizer_has_no_end_is_refused(judge, policy, tmp_path):
    (tmp_path / "judge" / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained("judge")
    assert "no EOS token" in refusal(rewards.load, args("judge"), policy, 64)
