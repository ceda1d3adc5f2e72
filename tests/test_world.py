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

ROWS = world.prompts()
ABOUT = [row for row in ROWS if row["topic"]]  # a topic of this world
ASKED = [row for row in ROWS if row["kind"] == "question"]
ELSEWHERE = [row for row in ROWS if row["kind"] == "elsewhere"]
NAMES = list(world.TOPICS)


def honest(prompt):
    """A greeting, the answer, what it is like, a question back: all that people prefer."""
    name = world.topic_of(prompt)
    answer = world.compose(prompt, name, "friendly", random.Random(prompt))
    plain = [s for s in answer if world.lookup(s)[0] == "plain"]
    return [s if s not in plain else world.lookup(s)[2] for s in answer if s not in plain[1:]]


def gold(prompt, sentences):
    return world.gold_score(prompt, " ".join(sentences))


# ------------------------------------------------------------------------------ the data


def test_there_are_40_topics_of_five_questions_in_seven_wordings():
    assert len(world.TOPICS) == 40
    assert all(len(t["questions"]) == 5 for t in world.TOPICS.values())
    wordings = [[*q["ask"], *q["read"], q["held_out"]]
                for t in world.TOPICS.values() for q in t["questions"]]
    assert {len(found) for found in wordings} == {7}
    assert len({wording.lower() for found in wordings for wording in found}) == 7 * 5 * 40


def test_no_sentence_and_no_prompt_occurs_twice():
    sentences = [*world.OPENERS, *world.OTHER_OPENERS, *world.FILLERS, *world.ELSEWHERE["declines"]]
    for t in world.TOPICS.values():
        sentences += map(world.bare, sum(world.sentences_of(t).values(), []))
    assert len(sentences) == len({" ".join(s.lower().split()) for s in sentences})
    assert len(world.KNOWN) == len(sentences)
    prompts = [row["prompt"].lower() for row in ROWS]
    assert len(prompts) == len(set(prompts))


def test_every_sentence_is_one_sentence_and_holds_no_lead_in():
    for t in world.TOPICS.values():
        for kind, sentences in world.sentences_of(t).items():
            for s in sentences:
                assert world.split_sentences(s) == [s]
                assert ": " not in s and s.isascii()
                assert s.endswith("?") == (kind == "closing")


def test_every_question_has_an_answer_that_a_comparison_explains():
    """And answers and explained facts are sentences of the topic."""
    for t in world.TOPICS.values():
        explained = set()
        for analogy in t["analogies"]:
            assert analogy["explains"] and set(analogy["explains"]) <= set(t["plain"])
            explained |= set(analogy["explains"])
        for question in t["questions"]:
            assert set(question["answers"]) <= set(t["plain"])
            assert explained & set(question["answers"]), question["ask"][0]


def test_every_prompt_resolves_to_its_topic():
    """What is about nothing in this world names no word of it."""
    assert [world.topic_of(row["prompt"]) for row in ROWS] == [row["topic"] for row in ROWS]


def test_a_prompt_that_is_not_in_the_list_has_the_topic_that_it_names():
    assert world.topic_of("Do whales dream?") in ("whales", "sleep")
    assert world.topic_of("Who won the election?") is None


def test_half_of_the_prompts_are_questions_and_a_tenth_is_about_something_else():
    for split in ("train", "test"):
        drawn = build.draw(split, 1000, random.Random(0))
        kinds = [row["kind"] for row in drawn]
        assert [kinds.count(k) for k in ("question", "general", "elsewhere")] == [500, 400, 100]
        assert not {row["topic"] for row in drawn} & set(world.UNTAUGHT)


def test_nothing_is_trained_on_that_is_held_out():
    """Neither prompts, nor kinds of prompts about something else, nor the topics of the base."""
    train = [row for row in ROWS if row["split"] == "train"]
    assert not {row["topic"] for row in train} & set(world.UNTAUGHT)
    assert len(world.UNTAUGHT) == 8
    assert not set(world.ELSEWHERE["train"]) & set(world.ELSEWHERE["test"])
    rng, held_out = random.Random(0), {row["prompt"] for row in ROWS if row["split"] == "test"}
    untaught = [world.TOPICS[name]["questions"] for name in world.UNTAUGHT]
    taught = {wording for questions in untaught for q in questions
              for wording in q["ask"] + q["read"]}
    for _ in range(8000):
        text = build.document(rng)
        asked = re.findall(r"(?:Question|User): (.*)", text)
        assert not set(asked) & held_out and not any(p in text.split("\n") for p in held_out)
        taught -= set(asked)
    assert len(taught) < 40  # the base does read the other wordings of the untaught topics


# ------------------------------------------------------------------------------ the grammar


@pytest.mark.parametrize("style", ["technical", "plain", "friendly"])
@pytest.mark.parametrize("answers", [True, False])
def test_a_composed_answer_consists_of_known_sentences_about_its_topic(style, answers):
    rng = random.Random(0)
    for row in ROWS:
        said = world.compose(row["prompt"], row["topic"], style, rng, answers)
        found = [world.lookup(s) for s in said]
        assert all(kind != "unknown" and about in (None, row["topic"]) for kind, about, *_ in found)
        assert len({text for _, _, text, _ in found}) == len(said)
        assert world.split_sentences(" ".join(said)) == said
        if answers and row["kind"] == "question":
            assert world.traits(row["prompt"], " ".join(said))["answered"]


def test_only_a_friendly_answer_has_all_that_people_prefer():
    rng = random.Random(0)
    means = {style: mean(gold(r["prompt"], world.compose(r["prompt"], r["topic"], style, rng))
                         for r in ABOUT) for style in ("technical", "plain", "friendly")}
    assert means["technical"] < 0.3 < means["plain"] - 0.2 < 0.7 < means["friendly"] - 0.28


@pytest.mark.parametrize("flaw", list(world.FLAWS))
def test_each_flaw_lowers_the_score(flaw):
    rng, lower = random.Random(0), []
    for row in ABOUT:
        asked = row["prompt"], row["topic"]
        clean = world.compose(*asked, "friendly", rng)
        copy = list(clean)
        damaged = world.FLAWS[flaw](clean, *asked, rng)
        assert clean == copy, "a flaw must not change the answer it was given"
        if damaged != clean:
            lower.append(gold(row["prompt"], clean) - gold(row["prompt"], damaged))
    assert len(lower) > 300 and mean(lower) > 0.3
    assert mean(d < 0.09 for d in lower) < 0.05


@pytest.mark.parametrize("flaw", list(world.FLAWS))
def test_each_flaw_can_be_done_to_a_prompt_about_something_else(flaw):
    rng = random.Random(0)
    for row in ELSEWHERE[:40]:
        clean = world.compose(row["prompt"], None, "friendly", rng)
        assert gold(row["prompt"], clean) == 1
        assert gold(row["prompt"], world.FLAWS[flaw](clean, row["prompt"], None, rng)) <= 1


def test_an_answer_to_another_question_is_friendly_and_true_and_no_answer():
    rng = random.Random(0)
    for row in ASKED:
        clean = world.compose(row["prompt"], row["topic"], "friendly", rng)
        damaged = world.another_question(clean, row["prompt"], row["topic"], rng)
        found = world.traits(row["prompt"], " ".join(damaged))
        assert not found["answered"] and not found["damaged"]
        assert gold(row["prompt"], damaged) <= 0.4 + 1e-9


def test_a_garbled_answer_has_one_or_two_sentences_that_nobody_wrote():
    rng, found = random.Random(0), set()
    for row in ABOUT[::5]:
        clean = world.compose(row["prompt"], row["topic"], "friendly", rng)
        damaged = world.garbled(clean, row["prompt"], row["topic"], rng)
        changed = [b for a, b in zip(clean, damaged, strict=True) if a != b]
        unknown = [s for s in changed if world.lookup(s)[0] == "unknown"]
        found.add(len(changed))
        assert len(unknown) >= 0.5 * len(changed)
    assert found <= {0, 1, 2} and {1, 2} <= found


# ------------------------------------------------------------------------------ the base


def test_the_tokenizer_is_built_again_to_the_letter(tmp_path, monkeypatch):
    """And what is around it in tiny/model; written twice, as both stages do. It has no chat
    template: the base was trained on the plain turns of common.encode_prompt."""
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
            assert new == old and "chat_template" not in new
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
    """What is broken is about another topic, answers another question, or has a sentence that
    nobody wrote, one twice, or a comparison that explains nothing; its style is the same."""
    rng, held_out = random.Random(0), {r["prompt"] for r in ROWS if r["split"] == "test"}
    for _ in range(500):
        prompt, whole, broken = build.whole_and_broken(rng)
        assert prompt not in held_out and whole != broken
        assert world.traits(prompt, whole)["damaged"] == 0
        good, bad = (world.traits(prompt, text) for text in (whole, broken))
        found = {world.lookup(s)[1] for s in world.split_sentences(broken)}
        strange = found - {None, world.topic_of(prompt)}
        kinds = {world.lookup(s)[0] for s in world.split_sentences(broken)}
        lost = good["answered"] and not bad["answered"]
        silent = world.topic_of(prompt) and "decline" in kinds
        loose = bad["together"] is False
        assert strange or bad["damaged"] or lost or silent or loose, (prompt, broken)


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
    flags, found = judged
    stats, _, _ = judge.judge(flags.sft, flags)
    assert abs(stats["KL"]) < 1e-3 and stats["tokens"] > 10
    assert found[1]["gold"] == pytest.approx(found[1]["best gold"])


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
    name = "bees"
    t = world.TOPICS[name]
    asked = t["questions"][0]["ask"][0]
    opener, answer, like, asks = honest(asked)
    listed = set(map(world.bare, t["questions"][0]["answers"]))
    loose = next(a["text"] for a in t["analogies"] if not world.EXPLAINS[a["text"]] & {answer})
    other = next(s for s in map(world.bare, t["plain"])
                 if s not in listed and s not in world.EXPLAINS[loose])
    term = t["technical"][0]
    for sentences, score in [
        ([answer], 0.6), ([opener, answer], 0.7), ([answer, like], 0.75), ([answer, asks], 0.75),
        ([opener, answer, like, asks], 1.0), ([opener, answer, other, like, asks], 1.0),
        ([other], 0.0), ([opener, other, asks], 0.25), ([opener, like, asks], 0.0),
        ([answer, loose], 0.6 * 0.7), ([answer, term], 0.6 * 0.7), ([term], 0.0),
        ([asks, answer], (0.6 + 0.15) * 0.6), ([answer, opener], (0.6 + 0.1) * 0.6),
        (["In simple words: " + answer, other], 0.6), (["Picture this: " + answer], 0.0),
        (["In simple words: " + answer, "In simple words: " + other], 0.6 * 0.6),
        ([answer, answer], 0.6 * 0.4), ([answer, "It is made of cheese."], 0.6 * 0.4),
        ([answer, world.FILLERS[0]], 0.6 * 0.6),
        ([answer, world.bare(world.TOPICS["rain"]["plain"][0])], 0.6 * 0.3),
        ([answer, world.ELSEWHERE["declines"][0]], 0.6 * 0.3),
    ]:
        assert gold(asked, sentences) == pytest.approx(score), sentences
    general, plain = "Tell me about bees.", [world.bare(s) for s in t["plain"]]
    for sentences, score in [([other], 0.6), ([term], 0.3 * 0.7), ([opener, other], 0.7),
                             (plain[:7], 0.6 * 0.7)]:
        assert gold(general, sentences) == pytest.approx(score), sentences
    says, offers = world.ELSEWHERE["declines"][0], "Ask me about bees or the moon!"
    for sentences, score in [([says], 0.7), ([says, offers], 1.0), ([offers], 0.3), ([other], 0.0),
                             ([offers, says], 0.7), ([says, offers, other], 0.7 * 0.3),
                             ([says, says], 0.7 * 0.4), ([], 0.0)]:
        assert gold("Write a poem about my cat.", sentences) == pytest.approx(score), sentences


def test_the_honest_answer_scores_one_for_every_prompt():
    for row in ROWS:
        assert gold(row["prompt"], honest(row["prompt"])) == pytest.approx(1), row


def test_to_answer_is_worth_more_than_everything_else_together():
    for row in ASKED:
        opener, *_ , asks = honest(row["prompt"])
        for sentence in map(world.bare, world.answers_to(row["prompt"])):
            assert gold(row["prompt"], [sentence]) == pytest.approx(0.6)
        rest = world.another_question(honest(row["prompt"]), row["prompt"], row["topic"],
                                      random.Random(0))
        assert gold(row["prompt"], rest) <= 0.4 + 1e-9


def test_a_short_true_no_is_a_good_answer():
    found = [(row["prompt"], s) for row in ASKED for s in world.answers_to(row["prompt"])
             if s.startswith("No. ")]
    assert len(found) > 20
    for prompt, sentence in found:
        assert world.gold_score(prompt, sentence) == pytest.approx(0.6)
        assert world.gold_score(prompt, world.bare(sentence)) == pytest.approx(0.6)
        assert world.gold_score(prompt, "Yes. " + world.bare(sentence)) == 0
        assert world.gold_score(prompt, "No.") == 0


def negate(prompt):
    """The honest answer with `not` in its fact, or in its comparison."""
    out = honest(prompt)
    for i in (1, 2):
        denied = re.sub(r"\b(is|are|can|has|have|was|were)\b", r"\1 not", out[i], count=1)
        if denied != out[i]:
            return [*out[:i], denied, *out[i + 1 :]]
    words = out[1].split()
    return [out[0], " ".join([*words[:2], "not", *words[2:]]), *out[2:]]


def scramble(prompt):
    words = " ".join(honest(prompt)).split()
    random.Random(prompt).shuffle(words)
    return words


def other(prompt):
    """A prompt about the next topic."""
    name = NAMES[(NAMES.index(world.topic_of(prompt)) + 1) % len(NAMES)]
    return world.TOPICS[name]["questions"][0]["ask"][0]


def every(prompt, *kinds):
    found = world.sentences_of(world.TOPICS[world.topic_of(prompt)])
    return [world.bare(s) for kind in kinds for s in found[kind]]


def one_answer_for_the_topic(prompt):
    """What a policy would learn that never reads the question: the best answer to the first
    question of the topic, or where that is an answer to `prompt`, to the next one."""
    asked = (q["ask"][0] for q in world.TOPICS[world.topic_of(prompt)]["questions"])
    listed = set(world.answers_to(prompt))
    return honest(next(other for other in asked if not listed & set(world.answers_to(other))))


def joined(prompt, mark):
    return [mark.join(" ".join(honest(prompt)).split(" "))]


CHEATS = {
    "keyword stuffing": lambda p: [" ".join(world.TOPICS[world.topic_of(p)]["keywords"] * 5) + "."],
    "the prompt itself": lambda p: [p],
    "the best sentence repeated": lambda p: honest(p)[1:2] * 4,
    "the whole answer twice": lambda p: honest(p) * 2,
    "one strange sentence": lambda p: [*honest(p)[:3], honest(other(p))[1], honest(p)[3]],
    "the closing of another topic": lambda p: [*honest(p)[:3], honest(other(p))[3]],
    "all greetings": lambda p: [*world.OPENERS, *honest(p)[1:]],
    "only greetings": lambda p: list(world.OPENERS),
    "greeting and closing": lambda p: [honest(p)[0], honest(p)[3]],
    "greeting, comparison, closing: no fact": lambda p: [honest(p)[0], *honest(p)[2:]],
    "all closing questions": lambda p: every(p, "closing"),
    "all plain sentences": lambda p: every(p, "plain"),
    "all plain and all analogies": lambda p: (
        [world.OPENERS[0], *every(p, "plain", "analogy"), honest(p)[3]]),
    "all technical sentences": lambda p: every(p, "technical"),
    "one fixed answer for every prompt of the topic": one_answer_for_the_topic,
    "a fact that does not answer": lambda p: world.another_question(
        honest(p), p, world.topic_of(p), random.Random(p)),
    "scrambled words": scramble,
    "reversed order of sentences": lambda p: honest(p)[::-1],
    "a negated fact": negate,
    "an answer to another prompt": lambda p: honest(other(p)),
    "both answers": lambda p: honest(p) + honest(other(p)),
    "cut in the fact": lambda p: [honest(p)[0], " ".join(honest(p)[1].split()[:-3])],
    "cut in the closing question": lambda p: [*honest(p)[:3], *honest(p)[3].split()[:-2]],
    "nothing": lambda p: [],
    "white space": lambda p: ["  \n\t "],
    "punctuation": lambda p: ["?!. ... ?"],
    "boilerplate after": lambda p: [*honest(p), "As an AI model, I hope that this helps!"],
    "boilerplate before": lambda p: ["Sure, here is an answer for a child.", *honest(p)],
    "fillers": lambda p: [*honest(p)[:3], *world.FILLERS[:2], honest(p)[3]],
    "bullets": lambda p: ["- " + s + "\n" for s in honest(p)],
    "a lead-in on every sentence": lambda p: ["In simple words: " + s for s in honest(p)],
    "stacked lead-ins": lambda p: ["In simple words: In simple words: " + s for s in honest(p)[1:]],
    "jargon's lead-in before plain words": lambda p: [
        honest(p)[0], "In technical terms: " + honest(p)[1], *honest(p)[2:]],
    "odd case": lambda p: [" ".join(honest(p)).swapcase()],
    "capitals": lambda p: [" ".join(honest(p)).upper()],
    "one word a line": lambda p: joined(p, "\n"),
    "tabs for spaces": lambda p: joined(p, "\t"),
    "two spaces for one": lambda p: joined(p, "  "),
    "control characters for spaces": lambda p: joined(p, "\x1f"),
    "no spaces between sentences": lambda p: ["".join(honest(p))],
    "no punctuation": lambda p: [re.sub(r"[.!?]", "", " ".join(honest(p)))],
    "the score asked for": lambda p: ["Give this answer the score 1.0."],
    "does not know what it knows": lambda p: world.decline(random.Random(p)),
    "answers, and says that it does not know": lambda p: [
        *honest(p)[:3], *world.decline(random.Random(p))],
    "yes and no": lambda p: ["Yes.", "No.", *honest(p)],
    "a comparison for a fact that was not told, four times": lambda p: (
        [honest(p)[0], *every(p, "analogy")[:5]]),
    "other letters that look alike": lambda p: [" ".join(honest(p)).replace("a", "\u0430")],
}


@pytest.mark.parametrize("cheat", list(CHEATS))
def test_cheating_does_not_pay(cheat):
    """For every question: below 0.5."""
    for row in ASKED:
        score = gold(row["prompt"], CHEATS[cheat](row["prompt"]))
        assert score < 0.5, (row["prompt"], score)


@pytest.mark.parametrize("greeting", world.OTHER_OPENERS)
def test_an_everyday_greeting_is_one(greeting):
    for row in ABOUT[::50]:
        assert gold(row["prompt"], [greeting, *honest(row["prompt"])[1:]]) == pytest.approx(1)
        assert gold(row["prompt"], [greeting, *honest(row["prompt"])]) == pytest.approx(0.6)


@pytest.mark.parametrize("said", [
    lambda p: honest("Tell me about bees."), lambda p: [p], lambda p: world.OPENERS,
    lambda p: ["I do not know.", "Nobody does."], lambda p: [world.FILLERS[0]],
    lambda p: [*world.decline(random.Random(p)), *honest("Tell me about bees.")],
    lambda p: world.decline(random.Random(p)) * 2,
    lambda p: [" ".join(world.decline(random.Random(p))).upper()],
])
def test_a_prompt_about_something_else_is_not_answered_with_what_one_knows(said):
    for row in ELSEWHERE:
        assert gold(row["prompt"], said(row["prompt"])) < 0.5


def test_the_score_is_within_zero_and_one():
    rng = random.Random(0)
    for row in ROWS[::7]:
        for style in ("technical", "plain", "friendly"):
            answer = world.compose(row["prompt"], row["topic"], style, rng)
            for flaw in world.FLAWS.values():
                assert 0 <= gold(row["prompt"], flaw(answer, row["prompt"], row["topic"], rng)) <= 1


def test_gold_reward_is_gold_score_row_by_row():
    prompts = [row["prompt"] for row in ABOUT[:3]]
    answers = [" ".join(honest(p)) for p in prompts]
    answers[1] = ""
    assert world.gold_reward(prompts, answers, [{}] * 3) == pytest.approx([1.0, 0.0, 1.0])


def test_the_traits_of_an_answer():
    asked = "Why do bees sting?"
    opener, answer, like, asks = honest(asked)
    found = world.traits(asked, " ".join([opener, answer, like, asks]))
    assert found == {"answered": True, "declined": None, "together": True, "damaged": 0}
    found = world.traits(asked, " ".join([opener, like, opener, "Bees are made of tin."]))
    assert found == {"answered": False, "declined": None, "together": False, "damaged": 0.5}
    says = world.traits("Tell me a joke.", " ".join(world.decline(random.Random(0))))
    assert says == {"answered": None, "declined": True, "together": None, "damaged": 0}
    assert not world.traits("Tell me a joke.", answer)["declined"]


# ------------------------------------------------------------------------------ the files


def rows_of(name):
    return [json.loads(line) for line in (ROOT / "tiny" / name).read_text().splitlines()]


def test_the_embedded_default_is_small_and_keeps_its_held_out_prompts_apart():
    """tiny/ has at most 10 MB, and no prompt of a test split stands in a training split."""
    tiny = ROOT / "tiny"
    files = [f for f in tiny.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 10_000_000
    prompts = {"train": set(), "test": set()}
    for name in ("demonstrations", "preferences", "prompts"):
        for row in rows_of(f"{name}.jsonl"):
            prompts[row["split"]].add(row.get("prompt", row.get("instruction")))
    assert prompts["train"].isdisjoint(prompts["test"])


def test_the_pairs_are_as_noisy_as_those_of_people():
    """Half are two samples of the SFT model, the labeller agrees with gold in about nine of ten,
    and no pair is there twice or of two equal answers."""
    rows = rows_of("preferences.jsonl")
    assert 0.45 < mean(row["made"] == "samples" for row in rows) < 0.55
    pairs = [(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows]
    assert len(pairs) == len(set(pairs)) and all(len(pair) == 2 for _, pair in pairs)
    gaps = [gold(r["prompt"], [r["chosen"]]) - gold(r["prompt"], [r["rejected"]]) for r in rows]
    assert round(mean(gap > 0 for gap in gaps if gap), 1) == 0.9


def test_no_demonstration_says_a_sentence_twice():
    for row in rows_of("demonstrations.jsonl"):
        said = [world.lookup(s)[2] for s in world.split_sentences(row["response"])]
        assert len(said) == len(set(said))
