"""The tiny world: its data, its grammar, what build.py and judge.py do, and attempts to be paid by
gold_score for nothing."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest
import torch
from conftest import ROOT

import common
from benchmarks import compare
from tiny import build, judge, world

KINDS = ("technical", "plain", "analogy", "closing")
ROWS = world.prompts()
HELD_OUT = {row["topic"]: row["prompt"] for row in ROWS if row["split"] == "test"}
NAMES = list(world.TOPICS)


def honest(name):
    """A greeting, two plain facts, an analogy and a question back: all that people prefer."""
    t = world.TOPICS[name]
    return [world.OPENERS[0], *t["plain"][:2], t["analogy"][0], t["closing"][0]]


def gold(name, sentences):
    return world.gold_score(HELD_OUT[name], " ".join(sentences))


HONEST = {name: gold(name, honest(name)) for name in NAMES}


# ------------------------------------------------------------------------------ the data


def test_there_are_64_topics():
    assert len(world.TOPICS) == 64


def test_all_sentences_are_unique_after_normalisation():
    sentences = [*world.OPENERS, *world.FILLERS]
    sentences += [s for t in world.TOPICS.values() for kind in KINDS for s in t[kind]]
    seen = [" ".join(s.lower().split()) for s in sentences]
    assert len(seen) == len(set(seen))
    assert len(world.KNOWN) == len(seen)


def test_every_sentence_is_one_sentence_and_holds_no_lead_in():
    for t in world.TOPICS.values():
        for kind in KINDS:
            for s in t[kind]:
                assert world.split_sentences(s) == [s]
                assert ": " not in s
                assert s.endswith("?") == (kind == "closing")


def test_every_prompt_resolves_to_its_topic():
    assert [(r["prompt"], world.topic_of(r["prompt"])) for r in ROWS] == [
        (r["prompt"], r["topic"]) for r in ROWS]


def test_a_prompt_outside_the_world_has_no_topic_and_no_score():
    assert world.topic_of("Who won the election?") is None
    assert world.gold_score("Who won the election?", " ".join(honest(NAMES[0]))) == 0


def test_train_and_test_prompts_are_disjoint_and_each_is_unique():
    train = [r["prompt"].lower() for r in ROWS if r["split"] == "train"]
    test = [r["prompt"].lower() for r in ROWS if r["split"] == "test"]
    assert len(train) + len(test) == len(ROWS) == len(set(train)) + len(set(test))
    assert not set(train) & set(test)


def test_every_topic_has_prompts_in_both_splits():
    for split in ("train", "test"):
        assert {r["topic"] for r in ROWS if r["split"] == split} == set(NAMES)


def test_a_held_out_question_names_its_topic_by_a_word_that_is_read_in_training():
    """Else nobody who knows only this world could tell what it is about."""
    for name, topic in world.TOPICS.items():
        texts = [s for kind in (*world.FACTS, "closing") for s in topic[kind]]
        texts += [r["prompt"] for r in ROWS if r["topic"] == name and r["split"] == "train"]
        read = " ".join(texts).lower()
        asked = [r["prompt"].lower() for r in ROWS if r["topic"] == name and r["split"] == "test"]
        for question in asked:
            words = [rf"\b{re.escape(k)}\b" for k in topic["keywords"]]
            named = [w for w in words if re.search(w, question)]
            assert max(len(re.findall(w, read)) for w in named) >= 3, question


# ------------------------------------------------------------------------------ the grammar


@pytest.mark.parametrize("style", ["technical", "plain", "friendly"])
def test_a_composed_answer_consists_of_known_sentences_about_its_topic(style):
    rng = random.Random(0)
    for name in NAMES:
        for sentence in world.compose(name, style, rng):
            kind, about, _ = world.lookup(sentence)
            assert kind != "unknown" and about in (None, name)


def test_styles_are_ordered_technical_plain_friendly():
    rng = random.Random(0)
    average = {
        style: mean(gold(n, world.compose(n, style, rng)) for n in NAMES for _ in range(10))
        for style in ("technical", "plain", "friendly")
    }
    assert average["technical"] + 0.1 < average["plain"]
    assert average["plain"] + 0.1 < average["friendly"]


@pytest.mark.parametrize("flaw", list(world.FLAWS))
def test_each_flaw_lowers_the_score_on_average(flaw):
    rng, differences = random.Random(0), []
    for name in NAMES * 2:
        clean = world.compose(name, "friendly", rng)
        copy = list(clean)
        damaged = world.FLAWS[flaw](clean, name, rng)
        assert clean == copy, "a flaw must not change the answer it was given"
        differences.append(gold(name, clean) - gold(name, damaged))
    assert mean(differences) > 0.15
    assert min(differences) > -1e-9 or mean(d < -1e-9 for d in differences) < 0.1


def test_a_missing_part_is_missing_whole():
    rng = random.Random(0)
    for name in NAMES * 4:
        clean = world.compose(name, "friendly", rng)
        left = world.missing_part(clean, name, rng)
        kinds = {world.lookup(s)[0] for s in clean}
        assert len({world.lookup(s)[0] for s in left}) == len(kinds) - 1
        assert gold(name, left) <= 0.75 * gold(name, clean) + 1e-9


def test_lead_ins_are_always_too_many_and_nothing_else_changes():
    rng = random.Random(0)
    for name in NAMES * 4:
        clean = world.compose(name, "friendly", rng)
        text, whole = " ".join(world.lead_ins(clean, name, rng)), " ".join(clean)
        count = max(text.count(lead) - whole.count(lead) for lead in world.LEADS)
        assert 2 <= count <= 4
        for lead in world.LEADS:
            text, whole = text.replace(lead, ""), whole.replace(lead, "")
        assert text == whole
        assert gold(name, world.lead_ins(clean, name, rng)) <= 0.6 * gold(name, clean) + 1e-9


def test_a_garbled_answer_has_one_or_two_sentences_that_nobody_wrote():
    rng, found = random.Random(0), set()
    for name in NAMES * 4:
        clean = world.compose(name, "friendly", rng)
        damaged = world.garbled(clean, name, rng)
        changed = [b for a, b in zip(clean, damaged, strict=True) if a != b]
        unknown = [s for s in changed if world.lookup(s)[0] == "unknown"]
        found.add(len(changed))
        assert len(unknown) >= 0.5 * len(changed)
    assert found <= {0, 1, 2} and {1, 2} <= found


# ------------------------------------------------------------------------------ the base


def test_the_tokenizer_is_built_again_to_the_letter(tmp_path, monkeypatch):
    """And what is around it in tiny/model; written twice, as both stages do. Its chat template ends
    in a space: the form that the base was trained on."""
    model, _ = build.load_base()
    monkeypatch.setattr(build, "HERE", tmp_path)
    build.save_base(model, build.build_tokenizer(random.Random(0)))
    build.save_base(*build.load_base())
    shipped = {path.name for path in (ROOT / "tiny" / "model").iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == shipped
    for name in shipped:
        new, old = (folder / "model" / name for folder in (tmp_path, ROOT / "tiny"))
        if name == "tokenizer_config.json":  # in any order
            new, old = (json.loads(path.read_text()) for path in (new, old))
            assert new == old and new["chat_template"].endswith("Assistant: {% endif %}")
        else:
            assert new.read_bytes() == old.read_bytes(), name


def test_the_base_reads_transcripts_as_the_scripts_encode_them(tokenizer):
    said = build.transcript(random.Random(4))
    question, reply = said.removeprefix("User: ").split("\n\nAssistant: ")
    expected = common.encode_prompt(tokenizer, question) + common.encode_response(tokenizer, reply)
    block = next(build.token_stream(tokenizer, random.Random(4), build.transcript))
    assert len(block) == build.BLOCK + 1
    both = list(zip(block, expected))
    assert len(both) > 50 and all(a == b for a, b in both)
    assert tokenizer.decode(expected) == f"<bos>{said}<eos>"


# ------------------------------------------------------------------------------ the ranking stage


def test_the_base_ranks_whole_against_broken_and_is_told_nothing_of_taste():
    """Training prompts only; what is broken has a sentence that nobody wrote, one about another
    topic, or one twice."""
    rng, train = random.Random(0), {r["prompt"] for r in ROWS if r["split"] == "train"}
    for _ in range(300):
        prompt, whole, broken = build.whole_and_broken(rng)
        assert prompt in train and world.on_topic(prompt, whole)
        found = [world.lookup(s) for s in world.split_sentences(broken)]
        strange = [about for _, about, _ in found if about not in (None, world.topic_of(prompt))]
        unknown = [kind for kind, *_ in found if kind == "unknown"]
        twice = len(world.split_sentences(broken)) > len(set(world.split_sentences(broken)))
        assert strange or unknown or twice or whole == broken


def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_split_among_the_threads():
    """Nor on how many pairs are scored at once: against one .backward() of the sum of all."""
    model, tokenizer = build.load_base()
    block = torch.randint(3, 3000, (4, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for rows in (2, 6, None):
        torch.manual_seed(0)
        ranking = build.Ranking(tokenizer, random.Random(0), pairs=6, rows=rows or 6)
        weights = [*model.parameters(), *ranking.parameters()]
        model.zero_grad()
        if rows:
            halves = [lambda x=half: build.next_token_loss(model, x) / 2 for half in block.chunk(2)]
            with ThreadPoolExecutor(2) as pool:
                build.add_gradients(halves + ranking.losses(model), weights, pool)
        else:
            loss = build.next_token_loss(model, block) + sum(f() for f in ranking.losses(model))
            loss.backward()
        gradients.append([w.grad.clone() for w in weights])
    for a, b, c in zip(*gradients):
        assert c.abs().max() > 0
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ the judge


@pytest.fixture(scope="module")
def judged():
    """(flags, what best_of finds for 1 and 4 answers of the SFT model to each of 6 prompts)."""
    flags = judge.parse_args(["--prompts", "6", "--best-of", "1", "4"])
    return flags, judge.best_of(flags, flags.best_of)


def test_the_judge_finds_no_kl_between_the_sft_model_and_itself(judged):
    _, found = judged
    assert abs(found[1]["KL"]) < 1e-3 and found[1]["tokens"] > 10
    assert found[1]["gold"] == found[1]["best gold"]


def test_the_judge_measures_the_answers_that_it_returns(judged):
    flags, found = judged
    stats, pairs, score = judge.judge(flags.sft, flags, each=4)
    assert len(pairs) == len(score) == 24
    assert all(pairs[i][0] == pairs[i - i % 4][0] for i in range(24))
    assert stats["gold"] == pytest.approx(mean(world.gold_score(*pair) for pair in pairs))
    assert stats["score"] == pytest.approx(score.mean().item())
    best = [max(range(i, i + 4), key=lambda j: score[j]) for i in range(0, 24, 4)]
    assert found[4]["score"] == pytest.approx(mean(score[i].item() for i in best))
    assert found[4]["gold"] == pytest.approx(mean(world.gold_score(*pairs[i]) for i in best))
    assert found[4]["score"] > found[1]["score"] and found[4]["best gold"] >= found[4]["gold"]


def test_the_judge_prints_one_object_with_all_that_the_comparison_asks_of_it(capsys):
    judge.show(judge.parse_args(["--json", "--prompts", "2", str(ROOT / "tiny" / "sft")]))
    found, = json.loads(capsys.readouterr().out).values()
    assert set(compare.COLUMNS) - {"seconds", "memory, GB"} <= set(found)


# ------------------------------------------------------------------------------ the score


def test_parts_of_the_score_add_up_by_hand():
    name = NAMES[0]
    opener, one, two, like, asks = honest(name)
    technical = world.TOPICS[name]["technical"]
    expected = [
        ([one], 0.25),
        ([one, two], 0.25),
        ([like], 0.25),
        ([one, like], 0.5),
        ([opener, one, like, asks], 1.0),
        ([opener, one, two, like, asks], 1.0),
        ([opener, technical[0], like, asks], 0.875 * 0.7),
        ([opener, like, asks], 0.75),
        ([technical[0]], 0.125 * 0.7),
        (technical[:2], 0.25 * 0.7 * 0.7),
        ([one, asks], 0.5),
        ([asks, one], 0.25 * 0.6),
        ([one, opener], 0.25 * 0.6),
        (["Picture this: " + one, two], 0.25),
        (["Picture this: " + one, "Picture this: " + two], 0.25 * 0.6),
        ([one, one], 0.25 * 0.4),
        ([one, "It is made of cheese."], 0.25 * 0.4),
        ([one, world.FILLERS[0]], 0.25 * 0.6),
        ([one, world.TOPICS[NAMES[1]]["plain"][0]], 0.25 * 0.3),
    ]
    for sentences, score in expected:
        assert gold(name, sentences) == pytest.approx(score), sentences
    seven = world.TOPICS[name]["plain"][:6] + [like]
    assert gold(name, seven) == pytest.approx(0.5 * 0.7)


def test_the_honest_answer_scores_one_for_every_prompt():
    for row in ROWS:
        assert world.gold_score(row["prompt"], " ".join(honest(row["topic"]))) == pytest.approx(1)


def negate(name):
    """The honest answer with `not` in its first fact that allows one."""
    out = honest(name)
    for i in range(1, 4):
        denied = re.sub(r"\b(is|are|can|has|have|was|were)\b", r"\1 not", out[i], count=1)
        if denied != out[i]:
            return [*out[:i], denied, *out[i + 1 :]]
    i = out[1].split()
    return [" ".join([out[0], *i[:2], "not", *i[2:], *out[2:]])]


def scramble(name):
    words = " ".join(honest(name)).split()
    random.Random(name).shuffle(words)
    return words


def scramble_within(name):
    """The words of each sentence shuffled, its last one kept in place."""
    rng, out = random.Random(name), []
    for sentence in honest(name):
        *words, last = sentence.split()
        before = list(words)
        while words == before and len(set(words)) > 1:
            rng.shuffle(words)
        out.append(" ".join([*words, last]))
    return out


def every(name, *kinds):
    return [s for kind in kinds for s in world.TOPICS[name][kind]]


def next_topic(name):
    return NAMES[(NAMES.index(name) + 1) % len(NAMES)]


def cut(name):
    opener, fact, *_ = honest(name)
    words = fact.split()
    return [opener, *words[: len(words) // 2]]


CHEATS = {
    "keyword stuffing": lambda n: [" ".join(world.TOPICS[n]["keywords"] * 5) + "."],
    "keywords as sentences": lambda n: [k + "." for k in world.TOPICS[n]["keywords"]],
    "the prompt itself": lambda n: [HELD_OUT[n]],
    "best sentence repeated": lambda n: [world.TOPICS[n]["analogy"][0]] * 4,
    "a fact twice for two": lambda n: [*honest(n)[:2], *honest(n)[1:2], *honest(n)[3:]],
    "the whole answer twice": lambda n: honest(n) * 2,
    "mixing topics": lambda n: [*honest(n)[:4], *honest(next_topic(n))[1:4], honest(n)[4]],
    "one strange sentence": lambda n: [*honest(n)[:4], honest(next_topic(n))[1], honest(n)[4]],
    "the closing of another topic": lambda n: [*honest(n)[:4], honest(next_topic(n))[4]],
    "only greetings": lambda n: list(world.OPENERS),
    "one greeting": lambda n: world.OPENERS[:1],
    "only the closing question": lambda n: world.TOPICS[n]["closing"][:1],
    "greeting and closing": lambda n: [world.OPENERS[0], world.TOPICS[n]["closing"][0]],
    "all closing questions": lambda n: every(n, "closing"),
    "all sentences of the topic": lambda n: every(n, "plain", "technical", "analogy", "closing"),
    "all plain and all analogies": lambda n: (
        [world.OPENERS[0], *every(n, "plain", "analogy"), honest(n)[4]]),
    "all technical sentences": lambda n: every(n, "technical"),
    "scrambled words": scramble,
    "scrambled inside sentences": scramble_within,
    "reversed order of sentences": lambda n: honest(n)[::-1],
    "a negated fact": negate,
    "an answer to another prompt": lambda n: honest(next_topic(n)),
    "both answers": lambda n: honest(n) + honest(next_topic(n)),
    "cut in the first fact": cut,
    "cut in the closing question": lambda n: [*honest(n)[:4], *honest(n)[4].split()[:-2]],
    "the empty string": lambda n: [],
    "white space": lambda n: ["  \n\t "],
    "punctuation": lambda n: ["?!. ... ?"],
    "boilerplate after": lambda n: [*honest(n), "As an AI model, I hope that this helps!"],
    "boilerplate before": lambda n: ["Sure, here is an answer for a child.", *honest(n)],
    "two fillers": lambda n: [*honest(n)[:4], *world.FILLERS[:2], honest(n)[4]],
    "sentences glued without spaces": lambda n: ["".join(honest(n))],
    "no punctuation": lambda n: [re.sub(r"[.!?]", "", " ".join(honest(n)))],
    "a lead on every sentence": lambda n: ["Picture this: " + s for s in honest(n)],
    "stacked leads": lambda n: ["Picture this: Picture this: " + s for s in honest(n)[1:4]],
    "bullets": lambda n: ["- " + s + "\n" for s in honest(n)],
    "a claim with a chosen topic word": lambda n: [f"{n} is the best thing in the world."] * 2,
    "the score asked for": lambda n: ["Give this answer the score 1.0."],
    "a fact twice, a tab in its lead": lambda n: [
        honest(n)[0], honest(n)[1], "Picture this:\t" + honest(n)[1], *honest(n)[3:]],
    "a fact twice, a line break in its lead": lambda n: [
        honest(n)[0], honest(n)[1], "Picture this:\n" + honest(n)[1], *honest(n)[3:]],
}


@pytest.mark.parametrize("cheat", list(CHEATS))
def test_cheating_does_not_pay(cheat):
    """For every topic: below 0.5, and below the honest answer."""
    for name in NAMES:
        score = gold(name, CHEATS[cheat](name))
        assert score < 0.5, (name, score)
        assert score < HONEST[name]


@pytest.mark.parametrize("change", [
    str.upper, str.lower, str.swapcase,
    lambda s: s.replace(" ", "  "), lambda s: s.replace(" ", "\n"), lambda s: s.replace(" ", "\t"),
    lambda s: f"\n {s} \t",
])
def test_the_score_knows_no_case_and_no_white_space(change):
    rng = random.Random(0)
    for name in NAMES[::4]:
        for style in ("technical", "plain", "friendly"):
            answer = world.compose(name, style, rng)
            for sentences in (answer, world.repetition(answer, name, rng)):
                text = " ".join(sentences)
                expected = world.gold_score(HELD_OUT[name], text)
                assert world.gold_score(HELD_OUT[name], change(text)) == expected


def test_the_score_is_within_zero_and_one():
    rng = random.Random(0)
    for name in NAMES:
        for style in ("technical", "plain", "friendly"):
            answer = world.compose(name, style, rng)
            for flaw in world.FLAWS.values():
                assert 0 <= gold(name, flaw(answer, name, rng)) <= 1


def test_gold_reward_is_gold_score_row_by_row():
    prompts, answers = [HELD_OUT[n] for n in NAMES[:3]], [" ".join(honest(n)) for n in NAMES[:3]]
    answers[1] = ""
    assert world.gold_reward(prompts, answers, [{}] * 3) == pytest.approx([1.0, 0.0, 1.0])


def test_on_topic_is_about_the_facts_only():
    name, other = NAMES[0], NAMES[1]
    assert world.on_topic(HELD_OUT[name], " ".join(honest(name)))
    assert not world.on_topic(HELD_OUT[name], " ".join(honest(other)))
    assert not world.on_topic(HELD_OUT[name], " ".join(honest(name) + honest(other)))
    assert not world.on_topic(HELD_OUT[name], world.OPENERS[0])


def test_the_embedded_default_is_small_and_keeps_its_held_out_prompts_apart():
    """tiny/ has at most 10 MB, and no prompt of a test split stands in a training split."""
    tiny = ROOT / "tiny"
    files = [f for f in tiny.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 10_000_000
    prompts = {"train": set(), "test": set()}
    for name in ("demonstrations", "preferences", "prompts"):
        for line in (tiny / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompts[row["split"]].add(row.get("prompt", row.get("instruction")))
    assert prompts["train"].isdisjoint(prompts["test"])
