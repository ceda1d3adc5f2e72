"""Sums of two numbers: the smallest task with an exact checker.

    python grpo.py --model smollm2 --data tasks/sums.py
    python grpo.py --model smollm2 --data tasks/sums.py:2     of two-digit numbers

What is checked: the whole answer is the right number, alone or at the end of the sum itself ("22",
"22.", "8 + 14 = 22", "The answer is 22."). Anything else scores 0. How it could be gamed: a checker
that looks for the right number anywhere can be passed by a list of many numbers, one that takes the
last number by "the answer is not 22", and one that takes the first by an answer that goes on. So the
form is checked from beginning to end. What remains is memory: where there are few sums, a model can
learn them by heart. A sum that is held out occurs in no order in the rows to train on.
"""

import random
import re

LEVELS = {"1": (2, 20), "2": (10, 99), "3": (100, 999)}  # the numbers that are added, by level
# What suits this task in every script. A checker that cannot be fooled needs no KL to hold the policy
# back, and most groups of 8 answers have a right and a wrong one.
FLAGS = {"steps": 60, "batch_size": 32, "group_size": 8, "max_new_tokens": 12, "beta": 0.0,
         "missing_eos_score": 0.0}


def rows(level="1", seed=0, train=512, test=64):
    """Data rows of at most so many sums: prompt, numbers a and b, answer, response and split."""
    if level not in LEVELS:
        raise ValueError(f"tasks/sums.py has the levels {', '.join(LEVELS)}, not {level}")
    low, high = LEVELS[level]
    generator = random.Random(seed)
    pairs = [(a, b) for a in range(low, min(high, low + 99) + 1) for b in range(a, high + 1)]
    generator.shuffle(pairs)
    found = []
    for number, pair in enumerate(pairs[: train + test]):
        a, b = generator.sample(pair, 2)
        split = "test" if number < min(test, len(pairs) // 3) else "train"
        found.append({"prompt": f"What is {a} + {b}? Answer with a number only.", "a": a, "b": b,
                      "answer": a + b, "response": str(a + b), "split": split})
    return found


def score(prompts, responses, rows):
    """1.0 for each answer that gives the right number and stops, else 0.0."""
    return [float(is_right(response, row)) for response, row in zip(responses, rows)]


def is_right(response, row):
    """Whether the whole answer is "22", "8 + 14 = 22" or "The answer is 22.", and 22 is right."""
    number = r"([+-]?\d{1,3}(?:,\d{3})+|[+-]?\d+)"
    before = rf"(?:(?:the )?answer is |{row['a']} ?\+ ?{row['b']} ?= ?)?"
    match = re.fullmatch(before + number + r"\.?", response.strip(), re.IGNORECASE | re.ASCII)
    return match is not None and int(match[1].replace(",", "")) == row["answer"]
