"""Answers of exactly n sentences: an instruction that any chat model can follow, checked by counting.

    python grpo.py --model smollm2 --data tasks/sentences.py

What is checked: how many sentences there are, and that each ends in . ! or ?. How it could be gamed:
by sentences without content ("Yes. Yes. Yes."). So a sentence needs at least three words, none may
come twice, and one more than asked for is as wrong as one too few. What remains: nothing here looks
at whether the answer is true or to the point. A KL penalty keeps the model near answers that are; in
a run without one, read the samples.
"""

import random
import re

TOPICS = """ants bees bread bridges caves clocks clouds coffee comets deserts dolphins earthquakes
echoes eclipses fire fog forests glaciers gold gravity honey horses ice islands kites lakes leaves
lightning maps mirrors mountains music oceans owls paper planets rain rainbows rivers robots salt
sand ships shadows sleep snow soap spiders stars steam storms sugar sunlight tea tides time trees
tunnels volcanoes water whales wheels wind winter wolves""".split()
NUMBERS = {1: "one sentence", 2: "two sentences", 3: "three sentences"}
FLAGS = {"max_new_tokens": 96, "missing_eos_score": 0.0}


def rows(argument="", seed=0, test=16):
    """Data rows: for each topic and number a prompt, and the number n of sentences. Held-out topics
    occur in no row to train on."""
    if argument:
        raise ValueError(f"tasks/sentences.py takes no argument, and was given {argument}")
    topics = random.Random(seed).sample(TOPICS, len(TOPICS))
    return [{"prompt": f"Tell me about {topic} in exactly {words}.", "n": n,
             "split": "test" if number < test else "train"}
            for number, topic in enumerate(topics) for n, words in NUMBERS.items()]


def sentences(text):
    """The sentences of a text: what . ! or ? ends; a rest without such an end counts as one."""
    parts = re.split(r"(?<=[.!?])[\"')]*\s+", text.strip())
    return [part for part in parts if re.search(r"\w", part)]


def score(prompts, responses, rows):
    """1.0 for each answer of exactly row["n"] different sentences of three words or more."""
    found = []
    for response, row in zip(responses, rows):
        parts = sentences(response)
        different = {" ".join(re.findall(r"\w+", part.lower())) for part in parts}
        long = all(len(re.findall(r"\w+", part)) >= 3 for part in parts)
        ended = response.strip().endswith((".", "!", "?", '."', '!"', '?"'))
        found.append(float(len(parts) == len(different) == row["n"] and long and ended))
    return found
