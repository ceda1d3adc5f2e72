"""The pictures: all that a page shows are there, small, well-formed and transparent; the committed
records, and smaller ones made anew, obey the equations that they illustrate; and the committed
files are what the committed records draw. The comparison: its command lines."""

import importlib
import importlib.util
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest
from conftest import ROOT

import grpo
from benchmarks import compare
from cli import flags

DOCS = ROOT / "docs"
PICTURES = ("pipeline", "ppo_step", "tokens", "four_models", "clip", "credit", "trust_region",
            "group", "implicit_reward")
COMPARISON = ("learning_curves", "frontier", "overoptimisation")  # once compare.json is there
RECORDS = {path.stem: json.loads(path.read_text()) for path in (DOCS / "records").glob("*.json")}


@pytest.fixture(scope="module")
def draw():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {"credit": {"steps": 1, "draws": 16}, "group": {}, "one_prompt": {"steps": 1},
         "trust_region": {"around": 4, "side": 3, "answers": 2},
         "implicit_reward": {"steps": 2, "every": 1, "size": 6, "batch_size": 4}}


@pytest.fixture(params=["committed", "made anew"])
def record(request):
    """A function from the name of a record to the committed one, or to a smaller one made now."""
    if request.param == "committed":
        return RECORDS.__getitem__
    draw = request.getfixturevalue("draw")
    flags.quiet()
    return lambda name: draw.RECORDS[name](**SMALL[name])


def comparison():
    """Numbers of the shape that benchmarks/compare.py writes, and records of its runs."""
    def stats(i):
        return {"score": 0.1 * i, "gold": math.sin(i / 3), "KL": 0.5 * i}

    runs = {f"{script}-{run}": stats(i + j)
            for i, script in enumerate(("dpo", "ppo", "trpo", "grpo"))
            for j, run in enumerate(("seed0", "seed1", "seed2", "beta0.03", "beta0.3"))}
    runs["ppo-long"] = {**stats(9), "steps": {f"step-{80 * i}": stats(i) for i in range(1, 6)}}
    curve = {"steps": 200, "score": [0.1, 0.2, 0.4, 0.5], "kl": [0, 1, 2, 3], "gold": [0.3, 0.4]}
    return ({"best of": {str(n): stats(n / 8) for n in (1, 4, 16, 64)}, "runs": runs},
            {script: [curve] * 3 for script in ("ppo", "trpo", "grpo")})


# ------------------------------------------------------------------------------ without matplotlib


def test_every_picture_that_a_page_shows_is_one_of_these():
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)|<img[^>]* src=\"([^\"]+)\"",
                                 page.read_text()):
            path = (page.parent / "".join(target)).resolve()
            assert path.is_file(), f"{page.name} shows {path.name}"


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_committed(name):
    assert (DOCS / f"{name}.svg").is_file()


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.svg")), ids=lambda path: path.stem)
def test_a_picture_is_small_and_transparent_and_says_nothing_of_when(path):
    assert path.stat().st_size < 60_000
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    assert "<dc:date>" not in text
    assert not re.search(r"#fff(fff)?\b|#0{3}(0{3})?\b|fill: (white|black)", text)


def test_records_are_a_few_kilobytes():
    for path in (DOCS / "records").glob("*.json"):
        assert path.stat().st_size < 12_000, path.name


# ------------------------------------------------------------------------------ what records say


def test_the_clip_takes_the_gradient_where_it_has_gained_enough_and_only_there():
    record = RECORDS["clip"]
    for name, sign in (("positive", 1), ("negative", -1)):
        for ratio, slope in zip(record["ratio"], record[name]["slope"]):
            if abs(abs(ratio - 1) - record["eps"]) > 1e-6:
                assert slope == (0 if sign * (ratio - 1) > record["eps"] else -sign)


@pytest.mark.parametrize("name", ["clip", "models"])
def test_what_no_random_number_enters_is_recorded_as_it_is_now(draw, name):
    assert draw.RECORDS[name]() == RECORDS[name]


def test_one_prompt_obeys_the_equations_that_its_page_names(record):
    record = record("one_prompt")
    row, gamma, lam, beta = record["rows"][0], record["gamma"], record["lam"], record["beta"]
    n = sum(row["y_mask"])
    assert row["y_mask"] == [1] * n + [0] * (len(row["y"]) - n)
    values, adv = [*row["values_old"], 0.0], [*row["raw"], 0.0]
    for t in range(n):
        last = row["score"] if t == n - 1 else 0.0
        assert row["k"][t] == pytest.approx(row["logp_old"][t] - row["logp_ref"][t], abs=2e-3)
        assert row["rewards"][t] == pytest.approx(last - beta * row["k"][t], abs=2e-3)
        delta = row["rewards"][t] + gamma * values[t + 1] - values[t]
        assert row["delta"][t] == pytest.approx(delta, abs=5e-3)
        assert adv[t] == pytest.approx(delta + gamma * lam * adv[t + 1], abs=1e-2)
        assert row["ret"][t] == pytest.approx(adv[t] + values[t], abs=5e-3)
        clipped = min(max(row["ratio"][t], 1 - record["eps"]), 1 + record["eps"])
        loss = max(-row["adv"][t] * row["ratio"][t], -row["adv"][t] * clipped)
        assert row["loss"][t] == pytest.approx(loss, abs=5e-3)


def test_credit_is_the_critics_error_with_lambda_0_and_the_score_less_the_value_with_lambda_1(
        record):
    record = record("credit")
    values, advantages = record["values"], record["advantages"]
    assert len(record["tokens"]) == len(values)
    for t, (value, following) in enumerate(zip(values, [*values[1:], record["score"]])):
        assert advantages["0.0"][t] == pytest.approx(following - value, abs=2e-3)
        assert advantages["1.0"][t] == pytest.approx(record["score"] - value, abs=2e-3)
        fading = sum(0.95**k * delta for k, delta in enumerate(advantages["0.0"][t:]))
        assert advantages["0.95"][t] == pytest.approx(fading, abs=1e-2)


def test_both_steps_go_to_the_same_kl_and_the_natural_one_gains_more(record):
    record = record("trust_region")
    for step in record["steps"].values():
        assert step["kl"] == pytest.approx(record["max_kl"], rel=0.01)
    gains = {name: step["gain"] for name, step in record["steps"].items()}
    assert gains["natural"] > gains["gradient"] > 0
    middle = len(record["ticks"]) // 2
    assert record["gain"][middle][middle] == pytest.approx(0, abs=1e-6)  # no step, no gain
    for whole, half in zip(record["contours"]["1.0"], record["contours"]["0.25"]):
        assert half == pytest.approx([x / 2 for x in whole], rel=0.2, abs=0.01)  # about a square


def test_advantages_of_the_group_are_deviations_from_its_mean(record):
    record = record("group")
    scores = record["scores"]
    mean = sum(scores) / len(scores)
    spread = (sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5
    for score, advantage in zip(scores, record["advantages"], strict=True):
        assert advantage == pytest.approx((score - mean) / (spread + 1e-4), abs=1e-3)
    assert grpo.Config().group_size == len(scores) == len(record["answers"])


def test_implicit_rewards_start_at_0_and_their_mean_is_that_of_the_pairs(record):
    record = record("implicit_reward")
    assert record["means"][0] == [0, 0] and len(record["means"]) == len(record["steps"])
    assert all(mean != [0, 0] for mean in record["means"][1:])
    for side in (0, 1):
        mean = sum(pair[side] for pair in record["rewards"]) / len(record["rewards"])
        assert record["means"][-1][side] == pytest.approx(mean, abs=0.01)


# ------------------------------------------------------------------------------ drawing


def parts(path):
    """(what is not a number, the numbers) of an SVG file."""
    pieces = re.split(r"(-?\d+\.\d+)", path.read_text())
    return pieces[::2], [float(piece) for piece in pieces[1::2]]


def test_the_committed_pictures_are_those_of_the_committed_records(draw, tmp_path):
    measured = draw.read(ROOT / "benchmarks" / "compare.json")
    names = draw.draw(RECORDS, measured, tmp_path)
    assert set(PICTURES) <= set(names) <= {*PICTURES, *COMPARISON}
    assert ("learning_curves" in names) == bool(measured)
    for name in names:
        committed = DOCS / f"{name}.svg"
        if f"Matplotlib v{draw.matplotlib.__version__}" not in committed.read_text():
            continue  # another version draws other paths
        (text, numbers), (old, before) = parts(tmp_path / committed.name), parts(committed)
        assert text == old and numbers == pytest.approx(before, abs=0.1), (
            f"docs/{name}.svg is not what its record draws: python docs/draw.py")


def test_the_comparison_is_drawn_where_there_is_one_and_left_out_where_not(draw, tmp_path, capsys):
    measured, curves = comparison()
    assert set(COMPARISON) <= set(draw.draw(RECORDS | {"curves": curves}, measured, tmp_path))
    for name in COMPARISON:
        text = "".join(ElementTree.parse(tmp_path / f"{name}.svg").getroot().itertext())
        assert "KL to the SFT model" in text
    assert not capsys.readouterr().out
    assert set(draw.draw(RECORDS, None, tmp_path)) == set(PICTURES)
    assert capsys.readouterr().out.count("\n") == 1


def test_curves_are_means_over_stretches_of_the_runs(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "ROOT", tmp_path)
    assert draw.record_curves() is None
    out = tmp_path / "runs" / "compare" / "ppo-seed0"
    out.mkdir(parents=True)
    steps = [{"step": i, "score": i, "kl": 2 * i} for i in range(40)]
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    good = "Rain is water that falls from the sky in drops."
    held_out = [{"step": 0, "prompt": "What is rain?", "response": ""}] * 3
    samples = [{"step": i, "prompt": "What is rain?", "response": good} for i in range(40)]
    (out / "samples.jsonl").write_text("\n".join(map(json.dumps, held_out + samples)))
    run, = draw.record_curves(bins=4, gold_bins=2)["ppo"]
    assert run["steps"] == 40 and run["score"] == [4.5, 14.5, 24.5, 34.5]
    assert run["kl"] == [9, 29, 49, 69]
    gold = draw.world.gold_score("What is rain?", good)
    assert gold > 0 and run["gold"] == pytest.approx([gold, gold], rel=1e-3)


# ------------------------------------------------------------------------------ the comparison


@pytest.mark.parametrize("argv, answers", [([], 1600), (["--quick"], 112)])
def test_runs_of_the_comparison_differ_from_the_defaults_in_what_it_says_they_do(
        argv, answers, tmp_path):
    """Each is a command line that its script takes, and looks at as many answers as the others."""
    runs = compare.plan(compare.parse_args(argv), tmp_path)
    assert len(runs) == (18 if answers == 1600 else 6)
    for name, (file, *line) in runs.items():
        script = importlib.import_module(file.removesuffix(".py"))
        reward = None if file == "dpo.py" else "needed"
        _, config = flags.read(
            script.__name__, script.__doc__, script.Config, script.TINY, line, reward)
        default = asdict(script.Config(**script.TINY))
        changed = {key for key, value in asdict(config).items() if value != default[key]}
        allowed = {"beta"} if "beta" in name else {"seed"}
        if name == "sft-good":  # as tiny/sft was made, from other demonstrations
            assert line == ["--data", os.path.relpath(tmp_path / "good.jsonl", ROOT)]
            continue
        if name == "ppo-long":
            answers_here, allowed = 2 * answers, {"beta"}
        else:
            answers_here = answers
        assert changed - {"steps", "batch_size"} <= allowed, name
        assert config.steps * config.batch_size == answers_here, name


# ------------------------------------------------------------------------------ details


def test_colours_of_credit_are_opposite_and_fade_to_nothing(draw):
    assert draw.signed(0.0, 2.0)[3] == 0
    assert draw.signed(1.0, 2.0)[3] == draw.signed(-1.0, 2.0)[3] == 0.5
    assert draw.signed(1.0, 2.0)[:3] != draw.signed(-1.0, 2.0)[:3]


def test_lines_break_before_a_word_and_lose_no_token(draw):
    tokens = ["Str", "ange", " rul", "es", " of", " t", "iny", " things", ".", "<eos>"]
    lines = draw.break_lines(tokens, 14)
    assert [i for line in lines for _, i in line] == list(range(len(tokens)))
    assert lines[0][0] == (0, 0) and len(lines) == 3
    for line in lines[1:]:
        assert line[0][0] == -1 and tokens[line[0][1]].startswith(" ")
    for line in lines:
        for (column, i), (after, _) in zip(line, line[1:]):
            assert after == column + len(tokens[i])
        column, last = line[-1]
        assert column + len(tokens[last]) <= 14
