"""Data rows by their columns: from a hub id, a file or a folder to prompts, answers and pairs."""

import hashlib
import json
import random
import re
from pathlib import Path

import common
from cli import tasks

ACCEPTED = (
    "instruction[, context or input] with response or output; prompt, completion; messages; "
    "prompt, chosen, rejected; chosen, rejected; prompt alone"
)


def dialogue(text):
    """The messages of an Anthropic-HH string (Human: ... Assistant: ...), or None."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if len(parts) < 3 or parts[0]:
        return None
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2])]


def parse_row(row):
    """{prompt[, response][, chosen, rejected]} of a data row, by its columns; {} if unknown.

    A prompt is a string, or the list of messages before the answer."""
    row, out = {key: value for key, value in row.items() if value is not None}, {}
    if {"chosen", "rejected"} <= row.keys():
        for side in ("rejected", "chosen"):
            turns = row[side]
            if isinstance(turns, str) and "prompt" not in row:
                turns = dialogue(turns)
            if isinstance(turns, list) and turns:
                *out["prompt"], last = turns
                out[side] = last["content"]
            elif isinstance(turns, str):
                out[side] = turns
        if len(out.get("prompt", ())) < 2 or isinstance(row.get("prompt"), list):
            out["prompt"] = row.get("prompt", out.get("prompt"))  # else a text, one of the turns
    if row.get("messages"):
        *prompt, last = row["messages"]
        if last["role"] == "assistant" and prompt:
            out |= {"prompt": prompt, "response": last["content"]}
        else:
            out["prompt"] = row["messages"]
    prompt = out.get("prompt") or row.get("prompt", row.get("instruction"))
    context = row.get("context", row.get("input"))
    if prompt is not None and "messages" not in row:
        out["prompt"] = f"{prompt}\n\n{context}" if context and "instruction" in row else prompt
        for key in ("completion", "output", "response"):
            if key in row:
                text = row[key]
                out["response"] = text[-1]["content"] if isinstance(text, list) and text else text
    if isinstance(out.get("prompt"), list):  # without tool calls and the like, even empty ones
        out["prompt"] = [{"role": t["role"], "content": t["content"]} for t in out["prompt"]]
    return {key: value for key, value in out.items() if value is not None}


def is_text(value):
    """Whether a parsed value is a text, or a list of messages, and not empty."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str) for turn in value)
    return isinstance(value, str) and value != ""


def read_json(path):
    """The rows of a file with one JSON object per line, or with one list of objects.

    By the standard library: the reader of `datasets` crashes on some damaged files."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as problem:
                raise ValueError(f"line {number}: {problem.msg}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it holds no JSON objects")
    json.dumps(rows, ensure_ascii=False).encode()  # raises for half a character, as "\ud83d" is
    return rows


def read_with_datasets(spec, builder):
    """The rows of a .csv or .parquet file, of a folder that `datasets` saved, or of a hub id."""
    import datasets  # here, for it takes half a second, and most files do without it

    datasets.disable_progress_bars()
    if builder:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it also raises
        data = datasets.load_dataset(builder, data_files=spec, split="train")
        data.data.validate(full=True)  # text that is no UTF-8 would fail row by row, much later
        return data
    if Path(spec).is_dir():
        return datasets.load_from_disk(spec)
    name, _, split = spec.partition(":")
    return datasets.load_dataset(name, split=split or None)


def read_data(spec):
    """{split: rows} of a hub id[:split], a file, a task, or a folder that `datasets` saved."""
    if tasks.is_task(spec):
        return {"train": tasks.rows(spec)}  # each row says its own split
    path = Path(spec)
    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    builder = builders.get(path.suffix)
    if builder and not path.is_file():
        raise ValueError(f"--data {spec}: no such file")
    if builder and not path.stat().st_size:
        raise ValueError(f"--data {spec} is empty")
    try:
        data = read_json(path) if builder == "json" else read_with_datasets(spec, builder)
    except Exception as problem:  # datasets, pyarrow and the hub each raise their own kinds
        reason = str(problem.__cause__ or problem).strip().split("\n")[0]
        raise ValueError(f"cannot read --data {spec} ({reason}); give a hub id[:split], a .jsonl, "
                         ".json, .csv or .parquet file, or a folder that datasets saved")
    return dict(data) if isinstance(data, dict) else {"train": data}


def load_data(spec, need, need_test=True):
    """(train rows, held-out rows) of --data; each is the data row with prompt, response, chosen and
    rejected filled in where it has them. `need`: the names a script cannot do without; need_test:
    whether it needs held-out rows.

    Held out is what its split, or its column `split`, calls test, val, dev or eval (or begins so:
    validation); where nothing is, one row in twenty by the hash of its prompt, which never moves.
    """
    found, dropped, wanted = [], 0, ", ".join(need)
    for split, rows in read_data(spec).items():
        for row in rows:
            try:
                parsed = parse_row(row)
            except (KeyError, TypeError):  # messages that are none
                parsed = {}
            if all(is_text(parsed.get(key)) for key in need):
                found.append({**row, **parsed, "split": str(row.get("split") or split).lower()})
            else:
                dropped += 1
    if dropped and not found:
        columns = ", ".join(row)
        raise ValueError(f"--data {spec}: {wanted} cannot be read as text from rows with the "
                         f"columns {columns}; accepted: {ACCEPTED}")
    if dropped:
        empty = "empty (a tie or a skip)" if "chosen" in need else "empty"
        print(f"--data {spec}: {dropped} rows dropped, {wanted} missing, {empty} or no text")
    train, test = hold_out(found, need_test)
    if not train or (need_test and not test):
        both = "both are needed: " if need_test else ""
        raise ValueError(f"--data {spec}: {len(train)} rows to train on and {len(test)} held out; "
                         f"{both}give more rows, or a column `split` that says train or test")
    return train, test


def hold_out(rows, need_test=True):
    """(train rows, held-out rows) by what each row's "split" says; without any such word one row in
    twenty by the hash of its prompt, which never moves, and at least one where one is needed."""
    named = [row["split"].startswith(("test", "val", "dev", "eval")) for row in rows]
    if not any(named):
        digests = [hashlib.sha1(json.dumps(row["prompt"]).encode()).digest() for row in rows]
        named = [digest[0] * 20 < 256 for digest in digests]
        if need_test and digests and not any(named):  # few rows: the one with the smallest hash
            smallest = min(digests)
            named = [digest == smallest for digest in digests]
    return ([row for row, out in zip(rows, named) if not out],
            [row for row, out in zip(rows, named) if out])


def take(rows, n, seed=0):
    """At most n of the rows, the same ones every time."""
    return random.Random(seed).sample(rows, min(n, len(rows)))


def load(args, need):
    """(train rows, at most --eval-size held-out rows) of --data; see load_data."""
    train, test = load_data(args.data, need)
    return train, take(test, args.eval_size)


def that_fit(rows, tokenizer, answers, config):
    """The rows whose answers fit into --max-length, and differ where there are two; how many were
    dropped is printed."""
    fit = [row for row, _, _ in common.encode(tokenizer, rows, answers, config.max_length)]
    kept = [row for row in fit if len({row[key] for key in answers}) == len(answers)]
    print(f"{len(kept)} rows (dropped: {len(rows) - len(fit)} longer than {config.max_length} "
          f"tokens, {len(fit) - len(kept)} of two equal answers)")
    if not kept:
        raise ValueError(f"no row fits into --max-length {config.max_length}")
    return kept
