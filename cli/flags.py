"""Flags from a script's Config, errors in one line, Ctrl-C, and the processes of torchrun."""

import argparse
import contextlib
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
import transformers
from jinja2 import TemplateError

import common
from cli import tasks

DATA = {"sft": "demonstrations.jsonl", "reward_model": "preferences.jsonl",
        "dpo": "preferences.jsonl"}  # with --model tiny; all others: prompts.jsonl

# Of the run in this process: its folder, whether it takes steps, and whether it is to stop soon.
RUN = {"out": None, "training": False, "stop": False}

# ------------------------------------------------------------------------------ errors


def fail(message):
    """Ends the program with one line on stderr and exit code 2. Of several processes, each speaks
    for itself: it may be the only one that found something, in its share of the work."""
    rank = common.processes()[0]
    print(f"error (process {rank}):" if rank else "error:", " ".join(str(message).split()),
          file=sys.__stderr__ if rank else sys.stderr)
    raise SystemExit(2)


def join():
    """Joins the processes that torchrun started, if it did. All but the first print errors only."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= count:
                raise ValueError(f"there are {count} GPUs; give torchrun --nproc-per-node {count}")
            torch.cuda.set_device(number)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # progress bars, too


@contextlib.contextmanager
def errors():
    """Turns what a script, common or lora refuses into one line that begins with `error:`. Joins
    the processes of torchrun, and makes the first Ctrl-C let a step end."""
    RUN.update(out=None, training=False, stop=False)
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if ours and before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        join()
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except TemplateError as problem:
        fail(f"the model's chat template refuses a prompt ({problem}); take such rows out of "
             "--data")
    except (ValueError, OSError) as problem:
        fail(problem)
    except RuntimeError as problem:
        if "gloo" not in str(problem):
            raise
        fail("another process of this run has ended; see what it says, or torchrun says of it")
    except KeyboardInterrupt:
        if common.processes()[0] > 0:
            raise SystemExit(2) from None
        print(file=sys.stderr)  # below the progress bar
        more = f"python {sys.argv[0]} --resume {RUN['out']} goes on"
        fail(f"interrupted; {more if RUN['out'] else 'nothing was written'}")
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
        if common.processes()[0] > 0:
            sys.stderr = sys.__stderr__


def interrupt(number, frame):
    """The first Ctrl-C lets a step end and saves; the second, or one between runs, ends at once."""
    if not RUN["training"] or RUN["stop"]:
        raise KeyboardInterrupt
    RUN["stop"] = True
    if common.processes()[0] == 0:  # not by print: it may be the progress bar that was interrupted
        os.write(2, b"\nends after this step; Ctrl-C once more ends at once\n")


# ------------------------------------------------------------------------------ types


def whole(text):
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def amount(text):
    """argparse type: a finite number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return float(text)


def share(text):
    """argparse type: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def finite(text):
    """argparse type: a number that is not nan and not infinite."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return float(text)


def seed(text):
    """argparse type: an integer that numpy takes as a seed."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return int(text)


def or_none(kind):
    """argparse type: what `kind` takes, or the word none."""
    def parse(text):
        return None if text == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse


SPECIAL = {"seed": seed, "missing_eos_score": finite,
           "warmup": share, "gamma": share, "lam": share}
KINDS = {int: whole, float: amount, str: str}

# ------------------------------------------------------------------------------ flags


def quiet():
    """Keeps transformers from printing bars and warnings between our lines."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def parser(doc, prog=None):
    """A parser whose help is `doc` as it is written, and whose errors end in one line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=raw, allow_abbrev=False)
    p.error = lambda message: fail(f"{message}; {p.prog} --help lists the flags")
    return p


def model_flags(p, dtype="auto"):
    """Adds the flags that say which model to load, and how."""
    add = p.add_argument
    add("--model", default="tiny", help="tiny, smollm2, hub id, folder or file.gguf (tiny)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    auto = "bf16 on cuda, else fp32" if dtype == "auto" else dtype
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help=f"auto: {auto}",
        type=lambda text: dtype if text == "auto" else text)
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def config_flags(p, Config, tiny):
    """Adds a flag for every field of Config. Its help is the comment beside the field."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        kinds = [kind for kind in get_args(field.type) or (field.type,) if kind is not NoneType]
        default = "none" if field.default is None else f"{field.default:g}" if isinstance(
            field.default, float) else field.default
        if field.name in tiny:
            default = f"{default}; tiny: {tiny[field.name]:g}"
        options = {"default": argparse.SUPPRESS, "help": f"{comments[field.name]} ({default})"}
        if get_origin(field.type) is Literal:
            options["choices"] = kinds
        elif kinds == [bool]:
            options["action"] = "store_true"
        else:
            kind = SPECIAL.get(field.name, KINDS[kinds[0]])
            options["type"] = or_none(kind) if NoneType in get_args(field.type) else kind
        options["help"] = options["help"].replace("%", "%%")
        p.add_argument("--" + field.name.replace("_", "-"), **options)


def read(name, doc, Config, tiny, argv=None, reward=None, dtype="auto"):
    """(args, config): what only the command line needs to know, and the script's own Config.

    reward: "needed", "optional" or None, where a script takes no --reward. dtype: what --dtype auto
    is. Raises ValueError for flags that do not go together."""
    quiet()
    p = parser(doc)
    add = p.add_argument
    model_flags(p, dtype)
    start = "none" if name == "sft" else "tiny: tiny/sft"
    add("--adapter", help=f"folder of the LoRA to start from, or none ({start})")
    add("--data", help="hub id[:split], .jsonl, .json, .csv, .parquet, folder, or a task: "
        "FILE.py[:ARGUMENT] (tiny: tiny/)")
    if reward == "needed":
        add("--reference", help="folder of the LoRA that the KL is to (the policy at the start)")
    if reward:
        add("--reward", help="folder, hub id, file.py[:function], a task, or none: always 0 (tiny: "
            "tiny/reward_model)")
    add("--out", help=f"folder of the run (runs/{name}, or the next free runs/{name}-2 ...)")
    add("--resume", help="folder of an interrupted run to go on with, its flags included")
    add("--eval-size", type=whole, default=128, help="held-out rows to measure on (128)")
    add("--save-every", type=whole, help="steps between saved adapters (only at the end)")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more time")
    add("--plot", action="store_true", help="draw curves.png from metrics.jsonl (matplotlib)")
    config_flags(p, Config, tiny)
    given = vars(p.parse_args(argv))
    if given["resume"] is not None:
        args, config = resumed(p, Config, name, argv, given["resume"])
    else:
        args, config = begun(given, Config, name, tiny, reward)
    transformers.set_seed(config.seed)  # for tasks and rewards that draw random numbers
    return args, config


def begun(given, Config, name, tiny, reward):
    """(args, config) of a new run with the flags `given`; Config's fields are taken out of them."""
    numbers = {f.name: given.pop(f.name) for f in fields(Config) if f.name in given}
    args, is_tiny = argparse.Namespace(name=name, **given), given["model"] == "tiny"
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    settle_defaults(args, is_tiny, needs_reward=reward == "needed")
    suits = tasks.defaults(args.data) if tasks.is_task(args.data) else {}
    suits = {f.name: suits[f.name] for f in fields(Config) if f.name in suits}
    for field in ("lora_rank", "lora_alpha", "lora_targets"):
        if args.adapter and field in numbers:
            raise ValueError(f"--{field.replace('_', '-')} is for a new adapter, and "
                             f"{args.adapter} has its own; --adapter none starts a new one")
    return args, Config(**{**(tiny if is_tiny else {}), **suits, **numbers})


def resumed(p, Config, name, argv, folder):
    """(args, config) of the run in `folder`. Raises ValueError for a flag that differs from its."""
    try:
        said = json.loads((Path(folder) / "config.json").read_text())
        if said["name"] != name:
            raise ValueError(f"it is a run of {said['name']}.py")
        numbers = {field.name: said[field.name] for field in fields(Config)}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"--resume {folder} holds no run of {name}.py: {problem!r}") from problem
    words = ["--resume", folder]
    for key in (action.dest for action in p._actions if action.dest in said):
        value = "none" if said[key] is None and key in numbers else said[key]
        if value is not None and value is not False:
            flag = f"--{key.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
    then = vars(p.parse_args(words))
    now = vars(p.parse_args([*words, *(sys.argv[1:] if argv is None else argv)]))
    odd = [f"--{key.replace('_', '-')} {now[key]} (it has {then.get(key, False)})" for key in now
           if not alike(now[key], then.get(key, False))]
    if odd:
        raise ValueError(f"--resume {folder} goes on with the flags it began with: {odd[0]}")
    if not (Path(folder) / "state.safetensors").exists() and (
            Path(folder) / "adapter_config.json").exists():
        raise ValueError(f"--resume {folder}: this run is at its end")
    config = Config(**{key: then.pop(key, False) for key in numbers})
    return argparse.Namespace(name=name, **{**then, "resume": folder}), config


def alike(now, then):
    """Whether a flag has the value that it had; of a folder, runs/a/ is runs/a."""
    return Path(str(now).lower()) == Path(str(then).lower())


def check_free(out):
    """Raises ValueError for a folder --out that holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists; nothing is overwritten: name a new folder")


def settle_defaults(args, is_tiny, needs_reward):
    """Fills in --adapter, --data and --reward: with --model tiny the shipped ones, else none."""
    if args.adapter is None and is_tiny and args.name != "sft":
        args.adapter = str(common.TINY / "sft")
    if args.adapter == "none":
        args.adapter = None
    if args.data is None and not is_tiny:
        raise ValueError(f"--model {args.model} needs --data: a hub id, a file or a folder")
    args.data = args.data or str(common.TINY / DATA.get(args.name, "prompts.jsonl"))
    if hasattr(args, "reward") and args.reward is None and tasks.is_task(args.data):
        args.reward = args.data.partition(":")[0]  # a task checks the answers to its own prompts
    if hasattr(args, "reward") and args.reward is None and is_tiny:
        args.reward = str(common.TINY / "reward_model")
    if needs_reward and not args.reward:
        raise ValueError("--reward is needed: a folder, a hub id, or file.py:function")
    if args.out and common.processes()[0] == 0:
        check_free(Path(args.out))
