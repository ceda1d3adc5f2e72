"""A run that is stopped at any moment goes on, and ends as if nothing had happened."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_cli import EVERY, SCRIPTS, arguments, folders, house, lines  # noqa: F401

from cli import flags, runs
from cli import state as saved

STEPS = ["--steps", "7", "--batch-size", "4"]


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing catches it."""


@pytest.fixture(autouse=True)
def saved_often(monkeypatch):
    monkeypatch.setattr(runs, "SAVED", 3)


def run(script, *argv):
    SCRIPTS[script].main(arguments(script, *argv))


def fails(script, argv, capsys):
    """The one line of a run that must end with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].main(argv)
    errors = [x for x in capsys.readouterr().err.split("\n") if x.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1
    return errors[0]


def kill_at(step, monkeypatch, where="append"):
    """Lets a run die when it is about to write the row of `step`, or inside the save after it."""
    plain = getattr(runs, "append") if where == "append" else saved.os.replace

    def append(path, row):
        if row.get("step") == step and path.name == "metrics.jsonl":
            raise Killed
        plain(path, row)

    def replace(beside, path):
        if Path(path).name == saved.FILE and len(lines(Path(path).parent / "metrics.jsonl")) > step:
            Path(beside).write_bytes(Path(beside).read_bytes()[:100])
            raise Killed
        plain(beside, path)

    if where == "append":
        monkeypatch.setattr(runs, "append", append)
    else:
        monkeypatch.setattr(saved.os, "replace", replace)


def begin_and_die(script, step, monkeypatch, *more, where="append"):
    with monkeypatch.context() as patch:
        kill_at(step, patch, where)
        with pytest.raises(Killed):
            run(script, *STEPS, "--out", "cut", *more)


def check_equal(one, other):
    """All that two runs wrote is the same, but for the time that the steps took."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for name in saved.LOGS:
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in lines(folder / name)]
                for folder in (one, other)]
        assert rows[0] == rows[1]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@EVERY
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(script, monkeypatch, house, capsys):
    """Killed before the first save, between two, in the middle of one, and after the last step."""
    more = ["--kl-target", "1"] if script == "ppo" else []
    run(script, *STEPS, *more, "--out", "whole")
    begin_and_die(script, 1, monkeypatch, *more)
    resume = ["--resume", "cut"]
    for step, where in ((4, "append"), (5, "save"), (6, "save")):
        with monkeypatch.context() as patch:
            kill_at(step, patch, where)
            with pytest.raises(Killed):
                SCRIPTS[script].main(resume)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", lambda *_: exit(7))
        with pytest.raises(SystemExit):
            SCRIPTS[script].main(resume)
    SCRIPTS[script].main(resume)
    check_equal(Path("whole"), Path("cut"))
    assert "at its end" in fails(script, resume, capsys)


@EVERY
def test_ctrl_c_lets_the_step_end_and_names_what_goes_on(script, monkeypatch, house, capsys):
    run(script, *STEPS, "--out", "whole")
    plain = runs.append

    def append(path, row):
        if row.get("step") == 3 and path.name == "metrics.jsonl":  # this one is over
            signal.raise_signal(signal.SIGINT)
        plain(path, row)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(runs, "append", append)
            argv = arguments(script, *STEPS, "--out", "cut")
            assert "--resume cut" in fails(script, argv, capsys)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row["step"] for row in lines(Path("cut/metrics.jsonl"))] == [0, 1, 2, 3, 4]
    SCRIPTS[script].main(["--resume", "cut"])
    assert "goes on with step 5 of 7" in capsys.readouterr().out
    check_equal(Path("whole"), Path("cut"))


def test_the_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setitem(flags.RUN, "training", True)
    monkeypatch.setitem(flags.RUN, "stop", False)
    flags.interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        flags.interrupt(signal.SIGINT, None)


def test_kill_9_at_a_random_moment(tmp_path):
    """The process itself, on the embedded model, once; then it may end."""
    argv = [sys.executable, str(ROOT / "sft.py"), "--steps", "20", "--batch-size", "2",
            "--eval-size", "2", "--device", "cpu"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
             "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    subprocess.run([*argv, "--out", "whole"], check=True, **quiet)
    command, moments = [*argv, "--out", "cut"], random.Random()
    for kills in range(2):
        process = subprocess.Popen(command, **quiet)
        try:
            assert process.wait(None if kills == 1 else moments.uniform(3, 9)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (tmp_path / "cut" / "adapter_config.json").exists() and not (
                tmp_path / "cut" / saved.FILE).exists():
            break  # killed when it had ended
        if (tmp_path / "cut" / "config.json").exists():
            command = [*argv[:2], "--resume", "cut"]
    check_equal(tmp_path / "whole", tmp_path / "cut")


# ------------------------------------------------------------------------------ what is refused


def test_other_flags_than_the_run_began_with_are_named(monkeypatch, house, capsys):
    begin_and_die("ppo", 4, monkeypatch, "--beta", "0", "--missing-eos-score", "none")
    again = ["--resume", "cut"]
    assert "--lr 0.5 (it has 0.001)" in fails("ppo", [*again, "--lr", "0.5"], capsys)
    assert "--steps 9" in fails("ppo", [*again, "--steps", "9"], capsys)
    assert "--adapter none" in fails("ppo", [*again, "--adapter", "none"], capsys)
    assert "--device auto" in fails("ppo", [*again, "--device", "auto"], capsys)
    assert "--plot" in fails("ppo", [*again, "--plot"], capsys)
    assert "ppo.py" in fails("grpo", again, capsys)
    assert "--grad-checkpoint True (it has False)" in fails("ppo", [*again, "--grad-checkpoint"], capsys)
    # The same ones may be there.
    ppo_again = [*again, *STEPS, "--beta", "0", "--out", "./cut/", "--dtype", "auto"]
    SCRIPTS["ppo"].main(ppo_again)
    assert len(lines(Path("cut/metrics.jsonl"))) == 7


@pytest.mark.parametrize("spoil, says", [
    (lambda data: data[:-10], "cannot go on"), (lambda data: b"", "cannot go on"),
    (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "checksum"),
    (lambda data: data.replace(b'\\"step\\"', b'\\"stop\\"', 1), "checksum"),
    (lambda data: b"{" * len(data), "cannot go on"),
])
def test_a_damaged_state_is_told_and_left_as_it_is(spoil, says, monkeypatch, house, capsys):
    begin_and_die("dpo", 4, monkeypatch)
    state = Path("cut", saved.FILE)
    whole = state.read_bytes()
    state.write_bytes(spoil(whole))
    assert state.read_bytes() != whole
    found = {p: p.read_bytes() for p in Path("cut").iterdir()}
    assert says in fails("dpo", ["--resume", "cut"], capsys)
    assert {p: p.read_bytes() for p in Path("cut").iterdir()} == found


def test_a_state_of_another_adapter_and_a_shortened_log_are_told(monkeypatch, house, capsys):
    begin_and_die("sft", 4, monkeypatch, "--lora-rank", "2")
    path = Path("cut/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_rank": 3}))
    assert "another model" in fails("sft", ["--resume", "cut"], capsys)
    path.write_text(json.dumps({**config, "lora_alpha": 3.0}))
    assert "another model" in fails("sft", ["--resume", "cut"], capsys)
    path.write_text(json.dumps(config))
    os.truncate("cut/metrics.jsonl", 10)
    assert "shorter" in fails("sft", ["--resume", "cut"], capsys)


def test_what_is_missing_is_told_and_nothing_is_emptied(monkeypatch, house, capsys):
    begin_and_die("dpo", 6, monkeypatch)
    found = {p: p.read_bytes() for p in Path("cut").iterdir()}
    assert "--length-normalised" in fails(
        "dpo", ["--resume", "cut", "--length-normalised"], capsys)
    Path("cut", saved.FILE).unlink()
    assert "state.safetensors is missing" in fails("dpo", ["--resume", "cut"], capsys)
    Path("cut/before.json").write_text("{")
    assert "before.json is damaged" in fails("dpo", ["--resume", "cut"], capsys)
    assert "holds no run" in fails("dpo", ["--resume", ""], capsys)
    kept = "metrics.jsonl", "samples.jsonl", "config.json"
    assert all(Path("cut", name).read_bytes() == found[Path("cut", name)] for name in kept)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '{"name": "sft"}', '{"name": "sft", "lr": "much"}',
    '{"name": "sft", "steps": [1]}', '{"name": "sft", "model": {"a": 1}}',
    '{"name": "sft", "steps": 7, "data": "nowhere.jsonl"}', '{"name": "sft", "seed": -1}',
])
def test_a_damaged_config_is_told(text, house, capsys):
    Path("cut").mkdir()
    Path("cut/config.json").write_text(text)
    fails("sft", ["--resume", "cut"], capsys)
    assert not Path("runs").exists()


def test_random_bytes_in_place_of_a_state_end_in_one_line(monkeypatch, house, capsys):
    begin_and_die("sft", 4, monkeypatch)
    state, rng = Path("cut", saved.FILE), random.Random(0)
    whole = state.read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 100])):
            data[rng.randrange(rng.choice([16, 400, len(data)]))] = rng.randrange(256)
        if bytes(data) != whole:
            state.write_bytes(data)
            with pytest.raises(ValueError, match="cannot go on"):
                saved.read(Path("cut"), None)


@EVERY
def test_a_full_disk_is_told_and_keeps_the_last_save(script, monkeypatch, house, capsys):
    run(script, *STEPS, "--out", "whole")
    plain, log = os.fsync, Path("cut/metrics.jsonl")

    def fsync(number):
        if log.exists() and len(lines(log)) == 6 and Path("cut/state.tmp").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(number)

    with monkeypatch.context() as patch:
        patch.setattr(saved.os, "fsync", fsync)
        argv = arguments(script, *STEPS, "--out", "cut")
        assert "No space left" in fails(script, argv, capsys)
    assert not list(Path("cut").glob("*.tmp"))
    SCRIPTS[script].main(["--resume", "cut"])
    check_equal(Path("whole"), Path("cut"))


@EVERY
def test_a_number_that_is_not_finite_ends_the_run_with_its_name(script, monkeypatch, house, capsys):
    plain = SCRIPTS[script].train

    def train(*args):
        *first, log, state = args
        return plain(*first, lambda row, *more: log(
            {**row, "loss": float("nan")} if row["step"] == 4 else row, *more), state)

    monkeypatch.setattr(SCRIPTS[script], "train", train)
    said = fails(script, arguments(script, *STEPS, "--out", "cut"), capsys)
    assert "step 4: loss is not a finite number" in said
    assert [row["step"] for row in lines(Path("cut/metrics.jsonl"))] == [0, 1, 2, 3]
    state = load_file(Path("cut", saved.FILE))
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_what_is_packed_comes_out_again():
    value = {"a": {0: torch.ones(2), 1: [1.5, None, True]}, "b": torch.tensor(3.0), "c": "text"}
    tensors = {}
    tree = json.loads(json.dumps(saved.pack(value, "", tensors)))
    again = saved.unpack(tree, tensors)
    assert again["a"][0] is tensors["/a/0"] and again["a"][1] == [1.5, None, True]
    assert again["b"] == 3 and again["c"] == "text"
