"""Labelling by a person: keys, order, what is written and when, a session through a terminal."""

import io
import json
import logging
import os
import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT

import common
import lora
import reward_model
from cli import chat, collect, flags
from cli.data import load_data

NEEDED = ["prompt", "chosen", "rejected"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def session(monkeypatch, keys, answers, prompts=200, goal=100):
    """The rows of collect.judge with typed keys; answers(prompt) stands in for the model."""
    def answer(model, tokenizer, prompts, *rest, G):
        return [*answers(prompts[0])], [True, True]

    monkeypatch.setattr(collect, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(key + "\n" for key in keys)))
    asked = {json.dumps(f"q{i}"): f"q{i}" for i in range(prompts)}
    args = Namespace(pairs=goal, max_new_tokens=8, temperature=0.7, max_length=64, seed=0,
                     adapter=None, data="d.jsonl")
    model, out = Namespace(name_or_path="toy"), Path("d.jsonl")
    rows = collect.read_judgements(out)
    collect.judge(model, None, asked, rows, out, args)
    if out.exists():
        assert lines(out) == rows
    return rows


def two(prompt):
    return "one", "two"


# ------------------------------------------------------------------------------ questions


@pytest.mark.parametrize("typed, key", [
    ("a", "a"), ("B", "b"), (" t ", "tie"), ("tie", "tie"), ("s", "skip"), ("SKIP", "skip"),
    ("q", "quit"), ("quit", "quit"), ("", None), ("c", None), ("ab", None), ("1", None),
    ("tied", None), ("é", None),
])
def test_a_key_or_its_first_letters_are_taken_and_all_else_is_asked_again(
        typed, key, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed}\nb\n"))
    assert collect.ask() == (key or "b")
    assert capsys.readouterr().out.count("Which is better?") == (1 if key else 2)


def test_text_fits_80_columns_and_cannot_steer_the_terminal(capsys):
    collect.show("a", "word " * 60 + "\n\n- first\n- second\x1b[2J\x07\ttab\u202e " + "x" * 200)
    out = capsys.readouterr().out
    assert all(len(line) < 80 for line in out.splitlines())
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count("word") == 60 and "\n    - first\n    - second" in out and "tab" in out


def test_which_answer_is_shown_first_is_random(monkeypatch):
    """The first sample is `one` every time; shown first it is in half of 100, sd 5."""
    rows = session(monkeypatch, ["a"] * 100, two)
    assert 30 <= sum(row["a"] == "one" for row in rows) <= 70
    assert {row["chosen"] for row in rows} == {"one", "two"}


def test_the_answer_that_was_shown_under_the_key_is_the_chosen_one(monkeypatch, capsys):
    rows = session(monkeypatch, ["a", "b"] * 10, two, goal=20)
    shown = re.findall(r"\na\n    (\w+)\n\nb\n    (\w+)\n", capsys.readouterr().out)
    for i, (row, (a, b)) in enumerate(zip(rows, shown, strict=True)):
        assert (row["a"], row["b"]) == (a, b)
        assert (row["chosen"], row["rejected"]) == ((b, a) if i % 2 else (a, b))
        assert row["judged"] == "ab"[i % 2] and row["prompt"] == f"q{i}"


def test_the_same_or_empty_answers_are_drawn_again_and_then_passed_over(monkeypatch, capsys):
    draws = {
        "q0": [("", "")] * 9,
        "q1": [("x", "x"), ("", "y"), ("x", " x\n"), ("x", "y")],
        "q2": [("z", "z")] * 9,
        "q3": [("u", "v")],
    }
    rows = session(monkeypatch, ["a", "a"], lambda prompt: draws[prompt].pop(0), goal=2)
    assert [{row["a"], row["b"]} for row in rows] == [{"x", "y"}, {"u", "v"}]
    assert capsys.readouterr().out.count("passed over") == 2


def test_an_answer_that_did_not_stop_is_marked_on_the_screen_only(monkeypatch, capsys):
    monkeypatch.setattr(collect, "answer", lambda *rest, G: (["whole", "half"], [True, False]))
    pair = collect.two_answers(None, None, "q", Namespace(
        max_new_tokens=8, temperature=1.0, max_length=64))
    assert dict(pair) == {"whole": True, "half": False}
    monkeypatch.setattr(collect, "two_answers", lambda *rest: [("whole", True), ("half", False)])
    rows = session(monkeypatch, ["a"], two, goal=1)
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("whole", "half")
    assert "half [cut at 8 tokens]" in capsys.readouterr().out


# ------------------------------------------------------------------------------ the file


def test_a_judgement_is_on_the_disk_before_the_next_question(monkeypatch):
    keys, written = iter(["a", "tie", "skip", "b", "quit"]), []

    def ask():
        written.append(len(lines("d.jsonl")) if Path("d.jsonl").exists() else 0)
        return next(keys)

    monkeypatch.setattr(collect, "ask", ask)
    session(monkeypatch, [], two)
    assert written == [0, 1, 2, 3, 4]


def test_a_second_session_goes_on_and_asks_nothing_twice(monkeypatch, capsys):
    session(monkeypatch, ["a", "skip", "tie", "quit"], two, goal=4)
    before = Path("d.jsonl").read_bytes()
    capsys.readouterr()
    rows = session(monkeypatch, ["b", "b"], two, goal=4)
    assert Path("d.jsonl").read_bytes().startswith(before)
    assert [row["prompt"] for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert [row["judged"] for row in rows] == ["a", "skip", "tie", "b", "b"]
    assert re.findall(r"\d of 4", capsys.readouterr().out) == ["3 of 4", "4 of 4"]
    assert len(session(monkeypatch, ["a"], two, goal=4)) == 5


def test_ties_and_skips_are_kept_and_not_trained_on(monkeypatch, capsys):
    session(monkeypatch, ["a", "tie", "skip", "b", "q"], two)
    kept = {row["judged"]: {row["a"], row["b"]} for row in lines("d.jsonl")}
    assert kept == dict.fromkeys(["a", "tie", "skip", "b"], {"one", "two"})
    train, test = load_data("d.jsonl", NEEDED)
    assert [row["prompt"] for row in train] == ["q0"] and [row["prompt"] for row in test] == ["q3"]
    out = capsys.readouterr().out
    assert "2 rows dropped" in out and "a tie or a skip" in out


def test_one_preference_in_ten_is_held_out_from_the_second_on(monkeypatch):
    """Ties and skips do not count, and neither does where a session was left."""
    session(monkeypatch, ["skip", "a", "tie", "q"], two)
    rows = session(monkeypatch, ["b", "tie"] + ["a"] * 22 + ["q"], two)
    split = [row["split"] for row in rows if row["judged"] in ("a", "b")]
    assert [i for i, s in enumerate(split) if s == "test"] == [1, 11, 21] and len(split) == 24


def test_one_preference_is_too_few_to_train_on_and_that_is_said(monkeypatch, capsys):
    session(monkeypatch, ["a", "q"], two)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        reward_model.main(["--data", "d.jsonl", "--out", "out"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "0 rows to train on and 1 held out" in error and not Path("out").exists()


def test_a_line_cut_anywhere_is_mended_and_costs_only_itself(monkeypatch, capsys):
    rows = session(monkeypatch, ["a", "b", "q"], two)
    whole = Path("d.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        Path("cut.jsonl").write_bytes(whole[:end])
        kept = rows if end >= len(whole) - 1 else rows[:1]
        assert collect.read_judgements(Path("cut.jsonl")) == kept
        assert lines("cut.jsonl") == kept
        assert Path("cut.jsonl").read_bytes() == whole[: len(whole) if kept == rows else first]
        said = "cut off" in capsys.readouterr().out
        assert said == (first < end < len(whole) - 1)


def test_training_on_a_file_with_a_cut_line_names_the_line(monkeypatch, capsys):
    session(monkeypatch, ["a", "b", "b", "q"], two)
    whole = Path("d.jsonl").read_bytes()
    Path("d.jsonl").write_bytes(whole[:-30])
    logged, handler = [], logging.Handler()
    handler.emit = logged.append
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    datasets.logging.set_verbosity_warning()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        reward_model.main(["--data", "d.jsonl", "--out", "out"])
    error = capsys.readouterr().err
    assert not logged  # `datasets` would print what it logs
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "d.jsonl" in error and "line 3: " in error
    assert Path("d.jsonl").read_bytes() == whole[:-30] and not Path("out").exists()


def test_a_deleted_line_is_asked_again(monkeypatch):
    session(monkeypatch, ["a", "a", "a", "q"], two)
    one, _, three = Path("d.jsonl").read_text().splitlines(keepends=True)
    Path("d.jsonl").write_text(one + "\n" + three)
    assert [r["prompt"] for r in collect.read_judgements(Path("d.jsonl"))] == ["q0", "q2"]
    Path("d.jsonl").write_text(one + three)
    rows = session(monkeypatch, ["b"], two, goal=3)
    assert [row["prompt"] for row in rows] == ["q0", "q2", "q1"]


GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b", "judged": "a"}\n'


@pytest.mark.parametrize("content", [
    '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', "my notes", "[1, 2]\n", '"judged"\n',
    "\x00\x01\n", GOOD + '{"prompt": "q\n' + GOOD, GOOD + "more notes",
    GOOD.replace('"a"}', '"perhaps"}'),
])
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(content, capsys):
    Path("mine.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        collect.main(["--pairs", "3", "--out", "mine.jsonl"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "mine.jsonl, line" in error
    assert Path("mine.jsonl").read_text() == content


# ------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("argv, says", [
    (["--pairs", "0"], "--pairs"),
    (["--pairs", "three"], "--pairs"),
    (["--collect", "3"], "--collect"),
    (["--model", "some/model"], "--data"),
    (["--model", "./no/such/folder", "--data", "p.csv"], "p.csv"),
    (["--pairs", "3", "--temperature", "0", "--data", "missing.jsonl"], "--temperature"),
    (["--pairs", "3", "--max-new-tokens", "64", "--max-length", "64"], "--max-new-tokens"),
    (["--pairs", "3", "--out", "runs/mine"], ".jsonl"),
    (["--pairs", "3", "--out", "folder.jsonl"], "folder.jsonl"),
    (["--pairs", "3", "--out", "file/under.jsonl"], "file/under.jsonl"),
    (["--pairs", "3", "--data", "missing.jsonl"], "missing.jsonl"),
    (["--pairs", "3", "--adapter", "nowhere"], "nowhere"),
])
def test_bad_input_ends_in_one_line_and_writes_nothing(argv, says, capsys):
    Path("folder.jsonl").mkdir()
    Path("file").write_text("")
    with pytest.raises(SystemExit) as end:
        collect.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert says in error
    assert {p.name for p in Path.cwd().iterdir()} - {"cache"} == {"folder.jsonl", "file"}


def test_a_file_that_cannot_be_written_is_found_before_the_first_question(monkeypatch, capsys):
    Path("link.jsonl").symlink_to("nowhere/d.jsonl")
    argv = ["2", "--data", prompts_file(), "--out", "link.jsonl"]
    assert run(monkeypatch, io.StringIO("a\nb\n"), *argv) == 2
    out, error = capsys.readouterr()
    assert "Which" not in out and "link.jsonl" in error and error.count("\n") == 1


def run(monkeypatch, stdin, *argv):
    """The exit code of a session with the shipped model that reads from stdin."""
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(SystemExit) as end:
        collect.main(["--device", "cpu", "--max-new-tokens", "12", "--pairs", *argv])
    return end.value.code


PROMPTS = ["What is rain?", "Tell me about bees.", "Explain echoes to a child."]


def prompts_file(rows=None):
    rows = rows or [{"prompt": prompt} for prompt in PROMPTS]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "p.jsonl"


def test_tiny_collects_for_its_prompts_and_trains_on_its_preferences():
    assert Path(collect.parse_args([]).data) == ROOT / "tiny" / "prompts.jsonl"
    assert collect.parse_args(["--data", "mine.csv"]).data == "mine.csv"
    args, _ = flags.read("reward_model", "", reward_model.Config, reward_model.TINY, [])
    assert Path(args.data) == ROOT / "tiny" / "preferences.jsonl"


@pytest.mark.parametrize("adapter", [None, "none"])
def test_answers_are_samples_of_the_adapter(adapter, monkeypatch):
    """The SFT adapter that tiny/ ships, unless told otherwise; drawn here once more."""
    argv = ["1", "--data", prompts_file([{"prompt": PROMPTS[0]}]), "--temperature", "1.5"]
    argv += ["--seed", "5"] + (["--adapter", adapter] if adapter else [])
    assert run(monkeypatch, io.StringIO("a\n"), *argv) == 0
    model, tokenizer = common.load_model("tiny", "cpu")
    lora.load_adapter(model, "sft", ROOT / "tiny" / "sft")
    torch.manual_seed(5)
    with lora.use_adapter(model, None if adapter else "sft"):
        texts, _ = chat.answer(model, tokenizer, [PROMPTS[0]] * 2, 12, 1.5)
    [row] = lines("collected.jsonl")
    assert {row["a"], row["b"]} == set(texts) and row["adapter"] == (
        None if adapter else str(ROOT / "tiny" / "sft"))
    assert (row["model"], row["seed"], row["temperature"]) == ("tiny/model", 5, 1.5)


def test_only_prompts_of_the_train_split_are_asked_each_once_until_none_is_left(
        monkeypatch, capsys):
    """Three prompts, of which one comes twice and one is held out, cannot make 5 pairs."""
    rows = [{"prompt": p, "split": s} for p, s in zip(PROMPTS, ("train", "test", "train"))]
    data = prompts_file(rows + rows[:1])
    assert run(monkeypatch, io.StringIO("a\nb\n"), "5", "--data", data, "--out", "new/d.jsonl") == 2
    error = capsys.readouterr().err
    assert "no prompt" in error and "2 of 5" in error and error.count("\n") == 1
    asked = [row["prompt"] for row in lines("new/d.jsonl")]
    assert sorted(asked) == sorted([PROMPTS[0], PROMPTS[2]])


def test_a_goal_that_is_just_reached_by_the_last_prompt_is_no_error(monkeypatch, capsys):
    data = prompts_file()
    assert run(monkeypatch, io.StringIO("a\nb\nt\n"), "3", "--data", data) == 0
    assert "3 of 3 judged (ties: 1)" in capsys.readouterr().out
    assert run(monkeypatch, io.StringIO(""), "3", "--data", data) == 0
    assert "Which" not in capsys.readouterr().out


def test_without_a_terminal_it_reads_lines_and_their_end_is_quit(monkeypatch, capsys):
    assert run(monkeypatch, io.StringIO("zzz\na"), "3", "--data", prompts_file()) == 0
    out = capsys.readouterr().out
    assert "1 of 3 judged" in out and "goes on from here" in out
    assert len(lines("collected.jsonl")) == 1


def test_a_prompt_of_messages_is_shown_with_its_roles_and_can_be_trained_on(monkeypatch, capsys):
    def turns(i):
        said = ("user", f"Hello {i}."), ("assistant", "Yes?"), ("user", "What is rain?")
        return [{"role": role, "content": text} for role, text in said]

    data = prompts_file([{"prompt": turns(i)} for i in range(3)])
    assert run(monkeypatch, io.StringIO("a\nb\n"), "2", "--data", data) == 0
    assert "    assistant: Yes?\n    user: What is rain?" in capsys.readouterr().out
    train, test = load_data("collected.jsonl", NEEDED)
    assert {json.dumps(row["prompt"]) for row in train + test} <= {
        json.dumps(turns(i)) for i in range(3)}
    assert len(train) == len(test) == 1
    assert run(monkeypatch, io.StringIO("a\n"), "3", "--data", data) == 0
    assert len({json.dumps(row["prompt"]) for row in lines("collected.jsonl")}) == 3


# ------------------------------------------------------------------------------ a terminal


def start(*argv):
    """(process id, terminal) of cli.collect in a pseudo-terminal of its own."""
    import pty  # not on Windows

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"HF_DATASETS_CACHE": str(Path.cwd() / "cache"), "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": str(ROOT)}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # children of a background job ignore it
        command = [sys.executable, "-m", "cli.collect", "--max-new-tokens", "24", *argv]
        os.execv(sys.executable, command)
    return pid, terminal


def screen(terminal, until=None, seconds=300):
    """What the terminal shows up to the text `until`, or up to the end of the program."""
    import select

    shown, deadline = b"", time.time() + seconds
    while until is None or until.encode() not in shown:
        assert time.time() < deadline, shown.decode()
        if select.select([terminal], [], [], 1)[0]:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # Linux: the other side is closed
                piece = b""
            if not piece:
                assert until is None, shown.decode()
                break
            shown += piece
    return shown.decode().replace("\r\n", "\n")


def pair(text):
    """(prompt, a, b) of the last question on the screen."""
    found = re.findall(r"\nPrompt\n(.*?)\n\na\n(.*?)\n\nb\n(.*?)\n\nWhich", text, re.S)[-1]
    return [re.sub(r" \[cut at \d+ tokens\]", "", " ".join(part.split())) for part in found]


def code(pid, terminal):
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


QUESTION = "quit: "


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_session_is_killed_gone_on_with_interrupted_finished_and_trained_on():
    """Through a real terminal, with the shipped model: SIGKILL, a half-written line, Ctrl-C."""
    argv = ["--pairs", "4", "--out", "mine.jsonl"]
    pid, terminal = start(*argv)
    first = screen(terminal, QUESTION)
    os.write(terminal, b"a\n")
    second = screen(terminal, QUESTION)
    os.write(terminal, b"what?\n")
    assert "Type one of them" in screen(terminal, QUESTION)
    os.write(terminal, b"b\n")
    third = screen(terminal, QUESTION)
    os.kill(pid, signal.SIGKILL)
    assert code(pid, terminal) == -signal.SIGKILL
    assert "1 of 4" in first and "2 of 4" in second and "3 of 4" in third
    shown = [pair(text) for text in (first, second)]
    rows = lines("mine.jsonl")
    assert [[" ".join(row[k].split()) for k in ("prompt", "a", "b")] for row in rows] == shown
    assert rows[0]["chosen"] == rows[0]["a"] and rows[1]["chosen"] == rows[1]["b"]

    with open("mine.jsonl", "a") as file:
        file.write('{"prompt": "What is')
    pid, terminal = start(*argv)
    again = screen(terminal, QUESTION)
    assert "cut off" in again and "3 of 4" in again and pair(again) == pair(third)
    os.write(terminal, b"\x03")
    end = screen(terminal)
    assert code(pid, terminal) == 130
    assert "2 of 4 judged" in end and "goes on from here" in end and "Traceback" not in end
    assert lines("mine.jsonl") == rows

    pid, terminal = start(*argv)
    assert pair(screen(terminal, QUESTION)) == pair(third)
    for key in (b"tie\n", b"skip\n"):
        os.write(terminal, key)
        assert "4 of 4" in screen(terminal, QUESTION)
    os.write(terminal, b"a\n")
    end = screen(terminal)
    assert code(pid, terminal) == 0
    assert "4 of 4 judged (ties: 1), skipped: 1" in end and "--data mine.jsonl" in end
    assert [row["judged"] for row in lines("mine.jsonl")] == ["a", "b", "tie", "skip", "a"]
    assert len({row["prompt"] for row in lines("mine.jsonl")}) == 5

    reward_model.main(["--data", "mine.jsonl", "--steps", "2", "--out", "out", "--device", "cpu"])
    trained = lines("out/metrics.jsonl")
    assert len(trained) == 2 and trained[0]["grad_norm"] > 0
    shown = [(row["step"], row["prompt"]) for row in lines("out/samples.jsonl")]
    assert shown == [(0, rows[1]["prompt"]), (2, rows[1]["prompt"])]
    assert (Path("out") / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_d_in_a_terminal_ends_as_quit_does(monkeypatch, capsys):
    import pty

    master, slave = pty.openpty()
    os.write(master, b"b\n\x04")
    with os.fdopen(slave) as keyboard:
        assert keyboard.isatty()
        assert run(monkeypatch, keyboard, "3", "--data", prompts_file()) == 0
    os.close(master)
    out, error = capsys.readouterr()
    assert "1 of 3 judged" in out and "goes on from here" in out and not error
    assert [row["judged"] for row in lines("collected.jsonl")] == ["b"]
