"""Any task of the package reasoning_gym, by name, with its own scorer (pip install reasoning-gym).

    python grpo.py --model smollm2 --data tasks/reasoning_gym.py:chain_sum

What is checked is what the package's score_answer checks, which differs from task to task. Many of
its scorers give part of the score to an answer that contains the right one, so an answer that lists
many guesses earns something: read the samples.
"""

FLAGS = {"missing_eos_score": 0.0}


def package():
    """create_dataset and get_score_answer_fn of the package."""
    try:
        from reasoning_gym import create_dataset, get_score_answer_fn
    except ImportError as problem:
        raise ValueError("tasks/reasoning_gym.py needs: pip install reasoning-gym") from problem
    return create_dataset, get_score_answer_fn


def rows(name="chain_sum", seed=0, train=512, test=64):
    """Data rows of the task `name`: prompt, entry for its scorer, and split. A question that is held
    out occurs in no row to train on."""
    create_dataset, _ = package()
    entries = list(create_dataset(name, size=train + test, seed=seed))
    held_out = {entry["question"] for entry in entries[:test]}
    return [{"prompt": entry["question"], "task": name, "entry": entry,
             "split": "test" if number < test else "train"} for number, entry in enumerate(entries)
            if number < test or entry["question"] not in held_out]


def score(prompts, responses, rows):
    """What the package's scorer says of each answer, from 0 to 1."""
    _, get_score_answer_fn = package()
    return [float(get_score_answer_fn(row["task"])(answer=response, entry=row["entry"]))
            for response, row in zip(responses, rows)]
