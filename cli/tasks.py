"""Python files that --data and --reward name: a task makes its prompts and checks the answers.

A task is one file with rows(argument) -> data rows, score(prompts, responses, rows) -> floats, and
FLAGS, the defaults that suit it. --data FILE.py[:ARGUMENT] takes its rows, --reward FILE.py its
score. tasks/sums.py is an example."""

import contextlib
import importlib.util
import sys
import traceback
from pathlib import Path


def is_task(spec):
    """Whether --data names a Python file, with or without an argument."""
    return spec.partition(":")[0].endswith(".py")


def run(file, flag):
    """The module that a Python file makes. What it imports may stand beside it."""
    if not Path(file).is_file():
        raise ValueError(f"{flag}: no such file {file}")
    name = f"from_{Path(file).stem}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, file))
    sys.modules[name] = module
    sys.path.append(str(Path(file).resolve().parent))
    with told(f"{flag} {file}"):
        module.__spec__.loader.exec_module(module)
    return module


@contextlib.contextmanager
def told(what):
    """Shows the traceback of whatever a file raises, and ends in one line."""
    try:
        yield
    except Exception as problem:
        if not isinstance(problem, ValueError):
            traceback.print_exception(problem.with_traceback(problem.__traceback__.tb_next))
        reason = f"{type(problem).__name__}: {problem}"
        raise ValueError(f"{what} does not run: {reason}") from None


def rows(spec):
    """The data rows of --data FILE.py[:ARGUMENT]."""
    file, colon, argument = spec.partition(":")
    make = getattr(run(file, "--data"), "rows", None)
    if not callable(make):
        raise ValueError(f"--data {file} has no function rows, which makes the data rows of a task")
    with told(f"--data {spec}"):
        found = make(*([argument] if colon else []))
    if not (isinstance(found, list) and found and all(isinstance(row, dict) for row in found)):
        raise ValueError(f"rows() of --data {file} must return a list of dictionaries")
    return found


def defaults(spec):
    """The flags that suit the task, by the names of Config's fields."""
    return getattr(run(spec.partition(":")[0], "--data"), "FLAGS", {})
