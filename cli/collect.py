"""Preferences from the person at the keyboard: the H in RLHF.

Samples two answers to a prompt, shows them in random order and asks which is better. Every
judgement is one line of a .jsonl file, written before the next question: stop at any time, and the
same command goes on with what was not judged. A row has

    prompt, chosen, rejected    what is trained on; chosen and rejected are "" in a tie or a skip,
                                and training leaves out rows where they are empty
    judged                      a, b, tie or skip; a skip does not count towards --pairs
    a, b                        the two answers as they were shown
    split                       test for one preference in ten, from the second on: two are enough
                                to train and measure, and what was held out once stays so
    model, adapter, seed, temperature    where the answers come from

To take a judgement back, delete its line.

    python -m cli.collect --pairs 50 --out collected.jsonl
    python reward_model.py --data collected.jsonl
"""

import json
import os
import textwrap
from pathlib import Path

import torch

import common
import lora
from cli import data, flags, models, runs
from cli.chat import answer
from cli.flags import fail

KEYS = ("a", "b", "tie", "skip", "quit")


def read_judgements(path):
    """The rows of a file written here, none if there is no file. A last line that was cut off, by a
    kill or a full disk, is taken out of the file with a word."""
    content = path.read_bytes() if path.exists() else b""
    rows, lines, start = [], content.split(b"\n"), b'{"prompt": '
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) and start[: len(line)] == line[: len(start)]:
                print(f"{path}: the last line was cut off; it is removed, its pair comes again")
                os.truncate(path, len(content) - len(line))
                return rows
            row = None
        if not isinstance(row, dict) or row.get("judged") not in KEYS or "prompt" not in row:
            fail(f"--out {path}, line {number} is not what this command writes; fix the line, "
                        "or name another file")
        rows.append(row)
    if lines[-1]:  # a whole line without its end
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def two_answers(model, tokenizer, prompt, args, tries=4):
    """[(text, stopped by itself)] of two different answers, in random order; None if no try brings
    two that differ and are not empty."""
    for _ in range(tries):
        texts, stopped = answer(model, tokenizer, [prompt], args.max_new_tokens,
                                args.temperature, args.max_length, G=2)
        one, two = (text.strip() for text in texts)
        if one and two and one != two:
            return [(texts[i], stopped[i]) for i in torch.randperm(2).tolist()]
    return None


def show(title, text):
    """Prints the text below its title, at most 79 columns wide and free of control characters,
    with which a model could steer the terminal."""
    print(f"\n{title}")
    for line in text.strip().split("\n"):
        line = "".join(c if c.isprintable() else " " for c in line)
        print(textwrap.fill(line, 79, initial_indent="    ", subsequent_indent="    "))


def ask():
    """One of KEYS, as typed or by its first letters; the end of the input is quit."""
    while True:
        print("\nWhich is better? a / b / tie / skip / quit: ", end="", flush=True)
        try:
            typed = input().strip().lower()
        except EOFError:
            return "quit"
        for key in KEYS:
            if typed and key.startswith(typed):
                return key
        print("Type one of them, or its first letter, and Enter.")


def judge(model, tokenizer, prompts, rows, out, args):
    """Asks about the prompts {key: prompt} that have no row yet, until --pairs of them are judged
    or the person quits; each judgement goes to `out` and `rows` at once."""
    judged = {json.dumps(row["prompt"]) for row in rows}
    done = sum(row["judged"] != "skip" for row in rows)
    for number, (key, prompt) in enumerate(prompts.items()):
        if done >= args.pairs:
            break
        if key in judged:
            continue
        torch.manual_seed(args.seed + number)  # what was shown and not judged is shown again
        pair = two_answers(model, tokenizer, prompt, args)
        if pair is None:
            shown = common.prompt_text(prompt)[:50]
            print(f"\n(no two different answers to {shown!r}: passed over)")
            continue
        turns = prompt if isinstance(prompt, list) else []
        print(f"\n{'-' * 79}\n{done + 1} of {args.pairs}")
        show("Prompt", "\n".join(f"{t['role']}: {t['content']}" for t in turns) or prompt)
        for name, (text, stopped) in zip("ab", pair):
            show(name, text + ("" if stopped else f" [cut at {args.max_new_tokens} tokens]"))
        verdict, (a, b) = ask(), (text for text, _ in pair)
        if verdict == "quit":
            return
        chosen, rejected = {"a": (a, b), "b": (b, a)}.get(verdict, ("", ""))
        preferences = sum(row["judged"] in ("a", "b") for row in rows)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "judged": verdict,
               "a": a, "b": b, "split": "test" if preferences % 10 == 1 else "train",
               "model": model.name_or_path, "adapter": args.adapter, "seed": args.seed,
               "temperature": args.temperature}
        runs.append(out, row)
        rows.append(row)
        done += verdict != "skip"
    if done < args.pairs:
        fail(f"no prompt of --data {args.data} is left, {done} of {args.pairs} judged, "
                    f"all in {out}; give more prompts")


def session(args):
    """Asks until it has what --pairs asks for; returns the exit code, 130 after Ctrl-C."""
    out, rows, code = Path(args.out), [], 0
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {out}: this adds to a .jsonl file, name one")
    try:
        rows = read_judgements(out)
        found, _ = data.load_data(args.data, ["prompt"], need_test=False)
        found = {json.dumps(row["prompt"]): row["prompt"] for row in found}
        prompts = {key: found[key] for key in data.take(list(found), len(found), args.seed)}
        model, tokenizer = models.open_model(args, args.model)
        args.max_length = models.readable(model, args.max_length)
        name = "policy" if args.adapter else None
        if name:
            models.load_adapter(model, name, args.adapter)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()  # no question is asked whose answer could not be written
        with lora.use_adapter(model, name):
            judge(model, tokenizer, prompts, rows, out, args)
    except KeyboardInterrupt:
        code = 130
    except OSError as problem:
        raise ValueError(f"--out {out}: {problem.strerror}") from problem
    ties, skips = (sum(row["judged"] == kind for row in rows) for kind in ("tie", "skip"))
    done = len(rows) - skips
    print(f"\n\n{done} of {args.pairs} judged (ties: {ties}), skipped: {skips}; all in {out}")
    if done < args.pairs:
        print("The same command goes on from here.")
    else:
        print(f"Train on them, with the same --model and --adapter:\n"
              f"    python reward_model.py --data {out}")
    return code


def parse_args(argv=None):
    p = flags.parser(__doc__, "python -m cli.collect")
    flags.model_flags(p)
    add = p.add_argument
    add("--adapter", help="folder of the adapter that answers, or none (tiny: tiny/sft)")
    add("--data", help="the prompts: hub id[:split], file or folder (tiny: tiny/prompts.jsonl)")
    add("--out", default="collected.jsonl", help="the file to add to (collected.jsonl)")
    add("--pairs", type=flags.whole, default=50, help="judgements that it is to hold (50)")
    add("--max-new-tokens", type=flags.whole, default=96, help="of an answer (96)")
    add("--temperature", type=flags.amount, default=0.7, help="of the sampling (0.7)")
    add("--max-length", type=flags.whole, default=1024, help="prompt + answer (1024)")
    add("--seed", type=flags.seed, default=0, help="of the sampling (0)")
    args = p.parse_args(argv)
    if args.adapter is None and args.model == "tiny":
        args.adapter = str(common.TINY / "sft")
    if args.adapter == "none":
        args.adapter = None
    if args.data is None and args.model != "tiny":
        raise ValueError(f"--model {args.model} needs --data: a hub id, a file or a folder")
    args.data = args.data or str(common.TINY / "prompts.jsonl")
    if args.temperature == 0:
        raise ValueError("--temperature must be above 0: at 0 all answers to a prompt are one")
    if args.max_new_tokens >= args.max_length:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in "
                         f"--max-length {args.max_length}")
    return args


def main(argv=None):
    with flags.errors():
        args = parse_args(argv)
        flags.quiet()
        code = session(args)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
