"""What the scripts share and what is no algorithm: models, prompts, data, sampling, rewards, runs.

    python common.py --adapter tiny/sft --prompt "Explain quantum computing to a 10-year-old."

generates, so that one can talk to what was trained.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache,
    StaticCache,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import lora

TINY = Path(__file__).parent / "tiny"
TEMPERATURE = 0.5, 0.7  # with --model tiny, else
LOGITS = 2**25  # how many logits are held at once: 128 MB of fp32
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def fail(message):
    """Ends the program with one line on stderr and exit code 2; Ctrl-C is Python's own again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------ flags


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


def parser(doc):
    """A parser whose help is `doc` as it is written, and whose errors end in one line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    p.error = lambda message: fail(f"{message}; {p.prog} --help lists the flags")
    return p


def flags(doc, steps, batch_size, lr):
    """A parser with the flags that every training script has; lr is (with --model tiny, else)."""
    p = parser(doc)
    add = p.add_argument
    add("--model", default="tiny", help="tiny, Hugging Face id, folder or file.gguf (tiny)")
    add("--adapter", help="folder of the LoRA to start from, or none (tiny: tiny/sft; sft: none)")
    add("--data", help="hub id[:split], .jsonl, .json, .csv, .parquet or folder (tiny: tiny/)")
    add("--out", help="folder of the run (runs/<script>, or the next free runs/<script>-2 ...)")
    add("--steps", type=whole, default=steps, help=f"batches to learn from ({steps})")
    add("--batch-size", type=whole, default=batch_size, help=f"rows a step ({batch_size})")
    add("--micro-batch-size", type=whole,
        help="rows a forward pass of training (tiny: 4, else all)")
    add("--lr", type=amount, default=lr, help=f"peak learning rate (tiny: {lr[0]}, else {lr[1]})")
    add("--seed", type=seed, default=0, help="of everything random (0)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on cuda")
    add("--lora-rank", type=whole, help="r of a new adapter, so without --adapter (16)")
    add("--lora-alpha", type=amount, help="alpha of a new adapter (32)")
    add("--lora-targets", help="comma-separated; all-linear; auto: query, value (auto)")
    add("--max-length", type=whole, default=1024, help="tokens of prompt + response (1024)")
    add("--eval-size", type=whole, default=128, help="held-out rows to measure on (128)")
    add("--save-every", type=whole, help="steps between saved adapters (only at the end)")
    add("--grad-checkpoint", action="store_true", help="less memory, a third more time")
    add("--plot", action="store_true", help="draw curves.png from metrics.jsonl (matplotlib)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return p


def sampling_flags(p):
    """Adds the flags of the scripts that sample answers and score them."""
    add = p.add_argument
    add("--reward", help="folder, hub id, or file.py:function (tiny: tiny/reward_model)")
    add("--max-new-tokens", type=whole, default=96, help="of a response (96)")
    add("--temperature", type=amount, default=TEMPERATURE,
        help="of sampling and log-probabilities (tiny: 0.5, else 0.7)")
    add("--missing-eos-score", type=finite, default=(-10.0, -3.0),
        help="if it does not stop; below what finished answers score (tiny: -10, else -3)")


def by_model(args):
    """Settles the defaults that are a pair: (with --model tiny, else)."""
    for flag, value in vars(args).items():
        if isinstance(value, tuple):
            setattr(args, flag, value[args.model != "tiny"])
    return args


def defaults(args, adapter, data):
    """Fills in --adapter, --data and --reward: with --model tiny the shipped ones, else none; and
    --micro-batch-size: with --model tiny 4 rows, which on a CPU saves padding, else all."""
    tiny = by_model(args).model == "tiny"
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs matplotlib: pip install matplotlib")
    if args.adapter is None and tiny and adapter:
        args.adapter = str(TINY / adapter)
    if args.adapter == "none":
        args.adapter = None
    for flag, value in {"lora_rank": 16, "lora_alpha": 32.0, "lora_targets": "auto"}.items():
        if args.adapter and getattr(args, flag) is not None:
            fail(f"--{flag.replace('_', '-')} is for a new adapter, and {args.adapter} has its "
                 "own; --adapter none starts a new one")
        if not args.adapter and getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.data is None and not tiny:
        fail(f"--model {args.model} needs --data: a hub id, a file or a folder")
    args.data = args.data or str(TINY / data)
    if "reward" in args and args.reward is None and tiny:
        args.reward = str(TINY / "reward_model")
    if "temperature" in args and args.temperature == 0:
        fail("--temperature must be above 0: at 0 all answers to a prompt are the same one")
    rows = args.micro_batch_size
    if rows and args.batch_size % min(rows, args.batch_size):
        fail(f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {rows}")
    rows = rows or (4 if tiny else args.batch_size)
    args.micro_batch_size = min(rows, args.batch_size)
    check_room(args)


def check_room(args):
    if getattr(args, "max_new_tokens", 0) >= args.max_length:
        fail(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in a length of "
             f"{args.max_length} (--max-length, or what the model can read)")


# ------------------------------------------------------------------------------ model, tokenizer


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device_and_dtype(args):
    device = args.device
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    ):
        fail(f"--device {device} is not available here; use --device cpu")
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device == "cuda")
    return device, torch.bfloat16 if bf16 else torch.float32


def load_pretrained(auto, name, args, dtype, **extra):
    """auto.from_pretrained for a hub id, a folder or a .gguf file; safetensors only, no pickle."""
    extra["trust_remote_code"], given = args.trust_remote_code, name
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            fail(f"--model {name}: no such file")
        name, extra["gguf_file"] = Path(name).parent, Path(name).name
    if auto is not AutoTokenizer:
        extra |= dict(dtype=dtype, use_safetensors=True, output_loading_info=True)
        if "gguf_file" in extra:  # unpacked: plain layers, which take an adapter and are merged
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if str(name).startswith(("runs/", "tiny/", ".", "/", "~")) and not Path(name).exists():
        fail(f"{given}: no such folder")  # and no hub id: nothing is looked for there
    try:
        loaded = auto.from_pretrained(name, **extra)
    except Exception as problem:  # transformers, safetensors and the hub each raise their own kinds
        reason = str(problem).strip().split("\n")[0]
        fail(f"cannot load the model {given} ({reason}); give tiny, a folder or hub id with "
             "safetensors, or a .gguf; --trust-remote-code runs what code comes with a model")
    if auto is AutoTokenizer:
        return loaded
    model, info = loaded
    if info["missing_keys"]:  # transformers would go on with random ones
        fail(f"{given} lacks the weight {min(info['missing_keys'])}: it is another kind of model")
    return model


def readable(model, length):
    """`length`, or as many tokens as the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length, positions or length)


def load_model(args):
    """(model, tokenizer). The model is in eval mode and stays there: dropout, which GPT-2's config
    ships at .1, would make two log-probabilities of the same token differ."""
    device, dtype = device_and_dtype(args)
    name = TINY / "model" if args.model in ("tiny", "tiny/model") else args.model
    tokenizer = load_pretrained(AutoTokenizer, name, args, dtype)
    model = load_pretrained(AutoModelForCausalLM, name, args, dtype).to(device).eval()
    model.name_or_path = "tiny/model" if name == TINY / "model" else str(name)
    if getattr(args, "grad_checkpoint", False):
        checkpoint_layers(model)
    if hasattr(args, "max_length"):
        args.max_length = readable(model, args.max_length)
        check_room(args)
    end = end_of_turn(tokenizer)
    if end is None:
        fail(f"the tokenizer of {args.model} has no EOS token: an answer could not end")
    check_family(model, args.model, end)
    return model, tokenizer


@torch.no_grad()
def check_family(model, name, end):
    """Fails for a model that makes its logits as logits_of does not know (Cohere and Granite scale
    them), or samples from another distribution than it is scored by, as one would that takes no
    padding on the left, or no cache of these kinds. Greedy tokens tell: each must be the scorer's
    best too, up to rounding."""
    try:
        ids = torch.tensor([[end]], device=model.device)
        ours = logits_of(model, hidden_states(model, ids, torch.ones_like(ids)))
        theirs = model(ids).logits
        ids, attention, mask = sample(model, [[*range(7)], [*range(3)]], [end], 3, each=2,
                                      temperature=0.0)
        y = ids[:, -mask.shape[1] :]
        logits = logits_of(model, response_states(model, ids, attention, y.shape[1])).float()
    except Exception as problem:  # whatever a model's own code may raise
        fail(f"--model {name} cannot be sampled from and scored ({problem!r})")
    if (ours - theirs).abs().max() > 0.01 * theirs.abs().max():
        fail(f"{name} makes logits in a way that logits_of in common.py does not know")
    below = (logits.amax(-1) - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)) * mask
    if below.max() > 0.05 * (logits.max() - logits.min()):
        fail(f"--model {name} samples its tokens from another distribution than it scores them by; "
             "its family is not supported")


class SameAdapter:
    """lora.use_adapter with what is active now, to be entered any number of times: TRPO goes back
    through the same graph again and again."""

    def __init__(self, model):
        self.model, self.name = model, lora.active_adapter(model)

    def __enter__(self):
        self.block = lora.use_adapter(self.model, self.name)
        self.block.__enter__()

    def __exit__(self, *problem):
        self.block.__exit__(*problem)


def checkpoint_layers(model):
    """Gradient checkpointing: what happens inside a layer is not kept but computed again in the
    backward pass, with the adapter that was active the first time."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    for layer in layers:
        if isinstance(getattr(layer, "dropout", None), float):  # OPT's, which goes by that mode too
            layer.dropout = 0.0

    def switch(*_):  # transformers ties it to training mode, which here no part inside is in
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.22 on
    enable = enable or model.gradient_checkpointing_enable
    enable(dict(
        use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), SameAdapter(model))))
    for part in (model, model.base_model):  # sft.py calls the first, hidden_states the second
        part.register_forward_pre_hook(switch)


def load_adapter(model, name, folder, trainable=False):
    """lora.load_adapter, with what is wrong with the folder said in one line. An adapter that fits
    may still belong to another model: a folder may have moved, so that is told and not refused."""
    try:
        lora.load_adapter(model, name, folder, trainable)
    except (OSError, ValueError) as problem:
        fail(f"{problem}; give a folder that a script here or peft wrote")
    base = json.loads((Path(folder) / "adapter_config.json").read_text()).get(
        "base_model_name_or_path")
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
        fail(f"{folder} names no base model: adapter_config.json cannot be read ({problem!r})")


def start_adapter(model, name, args):
    """Adds the trainable adapter `name`: --adapter if given, else a new one of the LoRA flags."""
    if args.adapter:
        load_adapter(model, name, args.adapter, trainable=True)
        if isinstance(model.get_output_embeddings(), lora.LoRALinear):
            fail(f"--adapter {args.adapter} adapts the output head, which no script here can train")
        if name == "policy" and name in getattr(model, "heads", {}):
            fail(f"--adapter {args.adapter} is a reward model; give what sft.py or a script after "
                 "it wrote")
        return
    targets = args.lora_targets
    if targets == "auto":
        leaves = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        named = (["q_proj", "v_proj"], ["query_key_value"], ["qkv_proj"], ["c_attn"])
        targets = next((t for t in named if leaves.issuperset(t)), "all-linear")
    elif targets != "all-linear":
        targets = [target.strip() for target in targets.split(",")]
    try:
        lora.add_adapter(model, name, args.lora_rank, args.lora_alpha, targets=targets)
    except ValueError as problem:
        fail(f"--lora-targets: {problem}")


def stop_ids(model, tokenizer):
    """The tokens that end a response: the tokenizer's and the generation config's."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *eos} - {None})


def end_of_turn(tokenizer):
    """The token that closes an answer: what the chat template puts there, else EOS."""
    return template_end(tokenizer, str(tokenizer.chat_template or ""))


@functools.lru_cache(maxsize=8)
def template_end(tokenizer, template):
    """end_of_turn, told once for a tokenizer and its template: asked for every answer of a data
    set, it would be most of the time that the encoding takes."""
    if template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "@@"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("@@")[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for i in tokenizer(tail, add_special_tokens=False).input_ids:
            if i in special:
                return i
    return tokenizer.eos_token_id


# ------------------------------------------------------------------------------ text to tokens


def chat_text(tokenizer, turns):
    """What the chat template makes of the turns, up to where the answer begins. Some templates
    refuse a system turn and some leave it out: it then opens the user's turn."""
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        problem = None
    except TemplateError as refusal:
        text, problem = "", refusal
    roles = [turn["role"] for turn in turns]
    if roles[:2] == ["system", "user"] and (problem or turns[0]["content"].strip() not in text):
        content = f"{turns[0]['content']}\n\n{turns[1]['content']}".lstrip("\n")
        return chat_text(tokenizer, [{"role": "user", "content": content}, *turns[2:]])
    if problem:
        fail(f"the model's chat template refuses a prompt with the turns {', '.join(roles)} "
             f"({problem}); take such rows out of --data")
    return text


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a string, or a list of messages), ready for the answer: by the
    model's chat template, or as `User: ...` and `Assistant: `."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template:
        return tokenizer(chat_text(tokenizer, turns), add_special_tokens=False).input_ids
    text = "".join(f"{t['role'].capitalize()}: {t['content']}\n\n" for t in turns) + "Assistant: "
    ids = tokenizer(text, split_special_tokens=True).input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def check_prompts(tokenizer, rows, room):
    """Encodes every prompt before the run, which one that the chat template refuses would otherwise
    end in the middle, and says how many are cut to their last `room` tokens."""
    long = sum(len(encode_prompt(tokenizer, row["prompt"])) > room for row in rows)
    if long:
        print(f"{long} of {len(rows)} prompts lose their beginning: longer than {room} tokens")


def encode_response(tokenizer, response):
    """Token ids of a response, with the end of turn. Text that spells a special token, like "</s>",
    stays text: it would end the answer before its end."""
    plain = tokenizer(response, add_special_tokens=False, split_special_tokens=True)
    return plain.input_ids + [end_of_turn(tokenizer)]


def encode_pair(tokenizer, prompt, response, max_length):
    """(prompt ids, response ids with the end of turn), tokenized apart so that no token spans the
    boundary. A long prompt loses its beginning; None where the response alone does not fit: cut
    short, it would teach stopping in mid-sentence."""
    p, r = encode_prompt(tokenizer, prompt), encode_response(tokenizer, response)
    room = max_length - len(r)
    return (p[-room:], r) if room > 0 else None


def encode_preferences(tokenizer, rows, max_length, which="training"):
    """[(row, prompt ids, chosen ids, rejected ids)] of the pairs that can teach something; what is
    dropped is counted and printed: answers that do not fit, and pairs of identical answers."""
    kept, long, same = [], 0, 0
    for row in rows:
        x = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = (encode_response(tokenizer, row[k]) for k in ("chosen", "rejected"))
        room = max_length - max(len(chosen), len(rejected))
        if room <= 0:
            long += 1
        elif chosen == rejected:
            same += 1
        else:  # both answers to the same piece of a cut prompt
            kept.append((row, x[-room:], chosen, rejected))
    print(f"{len(kept)} {which} pairs (dropped: {long} longer than {max_length} tokens, "
          f"{same} identical)")
    return kept


def by_length(rows, size):
    """(row numbers, rows), `size` at a time and the shortest first, so that little is padding. A
    row is a tuple that holds the ids of a prompt and then those of its answers."""
    lengths = []
    for row in rows:
        prompt, *answers = (ids for ids in row if isinstance(ids, list))
        lengths.append(len(prompt) + max(map(len, answers)))
    for part in torch.tensor(lengths).argsort(stable=True).split(size):
        yield part, [rows[i] for i in part]


def pad(sequences, side, device):
    """(ids, attention mask), both [B, T]. The mask comes from the lengths, so the padding id is
    never looked at and any will do."""
    T = max(map(len, sequences))
    ids = torch.zeros(len(sequences), T, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        where = slice(T - len(s), T) if side == "left" else slice(0, len(s))
        ids[i, where], mask[i, where] = torch.tensor(s), 1
    return ids.to(device), mask.to(device)


def show(prompt):
    """A prompt as one string: itself, or the text of its messages."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


# ------------------------------------------------------------------------------ forward passes


def inputs(ids, attention):
    """Arguments of a forward pass. With left padding the positions must be counted from the first
    real token: models with learned positions (GPT-2) would otherwise shift by the padding."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)


def hidden_states(model, ids, attention):
    """What the output head and the scalar heads read: [B, T, d]."""
    return model.base_model(**inputs(ids, attention)).last_hidden_state


def response_states(model, ids, attention, R):
    """The states before each of the last R tokens of ids [B, T]: position t-1 predicts token t.
    [B, R, d]"""
    return hidden_states(model, ids, attention)[:, -R - 1 : -1]


def micro_batches(batch, rows, size):
    """The given rows of a rollout, `size` at a time, the shortest answers first: (row numbers,
    {name: tensor of these rows}), without the padding that none of them needs."""
    length = batch["mask"].sum(1).long().cpu()
    P = batch["ids"].shape[1] - batch["mask"].shape[1]
    for part in rows[length[rows].argsort(stable=True)].split(size):
        R = int(length[part].max())
        ends = {"ids": P + R, "attention": P + R}
        yield part, {
            key: x[part, : ends.get(key, R)] if x.dim() > 1 else x[part]
            for key, x in batch.items() if torch.is_tensor(x)}


def logits_of(model, states):
    """Logits [B, R, V] of states [B, R, d]."""
    logits = model.get_output_embeddings()(states)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def per_token(model, states, function, *given):
    """function(logits [1, n, V], *given [1, n]) of all tokens, n at a time: [B, R], or [B, R, k] of
    one that returns k numbers a token, from states [B, R, d] and what is given for each, [B, R].

    In a large vocabulary the logits are by far the largest tensor. At most LOGITS of them are there
    at any time; a gradient computes them again, piece by piece."""
    def piece(states, *given):
        return function(logits_of(model, states), *given)

    n = max(1, LOGITS // len(model.get_output_embeddings().weight))
    flat = [x.flatten(0, 1).unsqueeze(0) for x in (states, *given)]
    if flat[0].shape[1] <= n:
        out = piece(*flat)
    else:
        pieces = zip(*(x.split(n, 1) for x in flat))
        out = torch.cat([checkpoint(piece, *p, use_reentrant=False) for p in pieces], 1)
    return out.unflatten(1, states.shape[:2]).squeeze(0)


def response_logps(model, name, b, logps):
    """logps(logits, ids) of the answers in some rows b of a rollout, under adapter `name`, and the
    states that the logits come from: [rows, R] and [rows, R, d]."""
    R = b["mask"].shape[1]
    with lora.use_adapter(model, name):
        states = response_states(model, b["ids"], b["attention"], R)
    return per_token(model, states, logps, b["ids"][:, -R:]), states


def response_values(model, name, ids, attention, R):
    """V_t [B, R] by the head of adapter `name`, read at the state before each of the R tokens."""
    with lora.use_adapter(model, name):
        states = response_states(model, ids, attention, R)
    return model.heads[name](states.float()).squeeze(-1)


def sequence_scores(model, name, ids, attention):
    """The score [B] of each sequence by the head of adapter `name`, read at the last real token."""
    with lora.use_adapter(model, name):
        hidden = hidden_states(model, ids, attention)
    last = (attention * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
    hidden = hidden[torch.arange(len(ids), device=ids.device), last]
    return model.heads[name](hidden.float()).squeeze(-1)


# ------------------------------------------------------------------------------ sampling


@torch.no_grad()
def sample(model, prompts, stop, max_new_tokens, temperature=1.0, generator=None, each=1):
    """Samples `each` responses to every list of prompt ids, from softmax(logits / temperature) and
    nothing else: no top-k, top-p or penalty, whatever the model's generation_config says, because
    the log-probabilities computed later know of none. temperature 0 is greedy.

    Returns ids [B, P+R] (prompts padded on the left), attention [B, P+R], and mask [B, R]: 1.0 on
    the response up to and including its first stop token. B is len(prompts) * each, the responses
    to one prompt one after another."""
    ids, attention = pad(prompts, "left", model.device)
    P, tokens = ids.shape[1], ids
    if model._can_compile_fullgraph:  # as transformers tells who can read a StaticCache
        # Allocated once: a cache that grows by concatenation spends its time copying itself.
        cache = StaticCache(config=model.config, max_cache_len=P + max_new_tokens)
    else:
        cache = DynamicCache(config=model.config)
    if each > 1 and not all(hasattr(layer, "keys") for layer in cache.layers):
        # Linear attention keeps a state that cannot be repeated afterwards.
        prompts = [prompt for prompt in prompts for _ in range(each)]
        return sample(model, prompts, stop, max_new_tokens, temperature, generator)
    stop = torch.tensor(stop, device=ids.device)
    alive = torch.ones(len(prompts) * each, 1, dtype=torch.bool, device=ids.device)
    for step in range(max_new_tokens):
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with torch.inference_mode():  # on a small model up to a tenth faster than no_grad
            out = model(input_ids=tokens, attention_mask=attention, position_ids=positions,
                        past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float()
        if step == 0 and each > 1:  # the prompt was read once for all its responses
            for layer in cache.layers:
                if layer.keys is not None:  # None where a layer reads those of another
                    layer.keys = layer.keys.repeat_interleave(each, 0)
                    layer.values = layer.values.repeat_interleave(each, 0)
            ids, attention, logits = (
                x.repeat_interleave(each, 0) for x in (ids, attention, logits))
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            # The first token whose cumulated probability exceeds a uniform number: what multinomial
            # does, without a random number for every token of the vocabulary.
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            u = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
            tokens = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)
        tokens = tokens.masked_fill(~alive, 0)
        ids = torch.cat([ids, tokens], 1)
        attention = torch.cat([attention, alive.long()], 1)
        alive = alive & ~torch.isin(tokens, stop)
        if not alive.any():
            break
    return ids, attention, attention[:, P:].float()


def decode(tokenizer, ids, mask):
    """The texts of responses ids [B, R], without padding and without special tokens."""
    rows = [row[: int(n)] for row, n in zip(ids.tolist(), mask.sum(1))]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def answer(model, tokenizer, prompts, max_new_tokens, temperature=0.0, max_length=1024, chunk=64,
           generator=None):
    """(texts, stopped by themselves: list of bool) for a list of prompts."""
    texts, stopped, stop = [], [], stop_ids(model, tokenizer)
    room = max_length - max_new_tokens
    for i in range(0, len(prompts), chunk):
        encoded = [encode_prompt(tokenizer, p)[-room:] for p in prompts[i : i + chunk]]
        ids, _, mask = sample(model, encoded, stop, max_new_tokens, temperature, generator)
        ids = ids[:, -mask.shape[1] :]
        texts += decode(tokenizer, ids, mask)
        stopped += ended(ids, mask, stop).tolist()
    return texts, stopped


def ended(ids, mask, stop):
    """[B] bool: whether the last real token of each response ids [B, R] is a stop token."""
    last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).long()).squeeze(1)
    return torch.isin(last, torch.tensor(stop, device=ids.device))


# ------------------------------------------------------------------------------ data

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
        turns = [turn.get("content") if isinstance(turn, dict) else None for turn in value]
        return bool(turns) and all(isinstance(text, str) for text in turns)
    return isinstance(value, str) and value != ""


def read_data(spec):
    """{split: rows} of a hub id[:split], a data file, or a folder that `datasets` saved."""
    path = Path(spec)
    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    builder = builders.get(path.suffix)
    if builder and not path.is_file():
        fail(f"--data {spec}: no such file")
    if builder and not path.stat().st_size:
        fail(f"--data {spec} is empty")
    try:
        if builder:
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it also raises
            data = datasets.load_dataset(builder, data_files=str(path), split="train")
            data.data.validate(full=True)  # text that is no UTF-8 would fail row by row, much later
        elif path.is_dir():
            data = datasets.load_from_disk(str(path))
        else:
            name, _, split = spec.partition(":")
            data = datasets.load_dataset(name, split=split or None)
    except Exception as problem:  # datasets, pyarrow and the hub each raise their own kinds
        reason = str(problem.__cause__ or problem).strip().split("\n")[0]
        fail(f"cannot read --data {spec} ({reason}); give a hub id[:split], a .jsonl, .json, .csv "
             "or .parquet file, or a folder that datasets saved")
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
        columns = ", ".join(rows.column_names)
        fail(f"--data {spec}: {wanted} cannot be read as text from rows with the columns "
             f"{columns}; accepted: {ACCEPTED}")
    if dropped:
        empty = "empty (a tie or a skip)" if "chosen" in need else "empty"
        print(f"--data {spec}: {dropped} rows dropped, {wanted} missing, {empty} or no text")
    held_out = ("test", "val", "dev", "eval")
    if not any(row["split"].startswith(held_out) for row in found):
        for row in found:
            digest = hashlib.sha1(json.dumps(row["prompt"]).encode()).digest()
            row["split"] = "test" if digest[0] * 20 < 256 else "train"
    train = [row for row in found if not row["split"].startswith(held_out)]
    test = [row for row in found if row["split"].startswith(held_out)]
    if not train or (need_test and not test):
        both = "both are needed: " if need_test else ""
        fail(f"--data {spec}: {len(train)} rows to train on and {len(test)} held out; {both}"
             "give more rows, or a column `split` that says train or test")
    return train, test


def take(rows, n, seed=0):
    """At most n of the rows, the same ones every time."""
    return random.Random(seed).sample(rows, min(n, len(rows)))


def batches(n, batch_size, seed):
    """Endless lists of batch_size row numbers below n, shuffled anew each time through."""
    generator = torch.Generator().manual_seed(seed)
    queue = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(n, generator=generator).tolist()
        yield queue[:batch_size]
        del queue[:batch_size]


# ------------------------------------------------------------------------------ rewards


def load_reward(spec, model, tokenizer, args):
    """The reward of --reward as a function of (ids, attention, prompts, responses, rows) -> [B].

    A folder that reward_model.py wrote on the same base becomes the adapter "reward" of `model` and
    scores the sampled ids; any other folder or hub id is a decoder with a scalar head `score`
    (AutoModelForSequenceClassification) and its own tokenizer; file.py:function sees the texts."""
    if ".py:" in spec:
        return function_reward(spec)
    if spec.endswith(".py"):
        fail(f"--reward {spec} names no function; write {spec}:function")
    config = Path(spec) / "adapter_config.json"
    if config.is_file():
        base = adapter_base(spec)
        if not is_model(base, model):
            fail(f"--reward {spec} belongs to the model {base}, not to {model.name_or_path}; "
                 "train one on this base")
        load_adapter(model, "reward", spec)
        if "reward" not in getattr(model, "heads", {}):
            fail(f"--reward {spec} has no scalar head; give what reward_model.py wrote")
        return lambda ids, attention, prompts, responses, rows: sequence_scores(
            model, "reward", ids, attention)
    if Path(spec).exists() and not (Path(spec) / "config.json").is_file():
        fail(f"--reward {spec} holds neither an adapter nor a model")
    reader = load_pretrained(AutoTokenizer, spec, args, None)
    kind = AutoModelForSequenceClassification
    other = load_pretrained(kind, spec, args, model.dtype, num_labels=1)
    if not hasattr(other, "score"):
        fail(f"--reward {spec} is no decoder with a scalar head named score")
    other.to(model.device).eval()
    room = readable(other, args.max_length)
    if end_of_turn(reader) is None:
        fail(f"the tokenizer of --reward {spec} has no EOS token, by which it would know an end")

    def reward(ids, attention, prompts, responses, rows):
        pairs = []
        for prompt, response in zip(prompts, responses):
            text = encode_prompt(reader, prompt) + encode_response(reader, response)
            pairs.append(text[-room:])
        ids, attention = pad(pairs, "right", model.device)
        hidden = other.base_model(**inputs(ids, attention)).last_hidden_state
        return other.score(hidden[torch.arange(len(ids)), attention.sum(1) - 1]).squeeze(-1).float()

    return reward


def function_reward(spec):
    """function(prompts, responses, rows) -> list of floats, of file.py:function."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        fail(f"--reward {spec}: no such file {file}")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("reward", file))
    sys.modules["reward"] = module
    sys.path.insert(0, str(Path(file).resolve().parent))  # what the file imports beside it
    try:
        module.__spec__.loader.exec_module(module)
    except Exception as problem:
        fail(f"--reward {file} does not run: {type(problem).__name__}: {problem}")
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"--reward {file} has no function {name}")
    try:
        inspect.signature(function).bind("prompts", "responses", "rows")
    except TypeError as problem:
        fail(f"--reward {spec} must take (prompts, responses, rows): {problem}")

    def reward(ids, attention, prompts, responses, rows):
        scores = function([show(p) for p in prompts], responses, rows)
        try:
            scores = torch.tensor([s + 0.0 for s in scores], dtype=torch.float32, device=ids.device)
        except (TypeError, ValueError) as problem:
            fail(f"--reward {spec} must return a list of numbers ({problem})")
        if len(scores) != len(responses):
            fail(f"--reward {spec} returned {len(scores)} scores for {len(responses)} responses")
        if not scores.isfinite().all():
            at = (~scores.isfinite()).nonzero()[0].item()
            fail(f"--reward {spec} returned {scores[at]} for the response {responses[at][:60]!r}")
        return scores

    return reward


# ------------------------------------------------------------------------------ runs


def free_folder(args, script):
    """The folder of the run, not made yet: --out, or the next free runs/<script>. Until it is,
    Ctrl-C ends in one line."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted; nothing was written"))
    if args.out:
        out = Path(args.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail(f"--out {out} exists; nothing is overwritten: name a new folder")
        return out
    names = (f"runs/{script}" + (f"-{i}" if i > 1 else "") for i in range(1, sys.maxsize))
    return next(Path(name) for name in names if not Path(name).exists())


def start_run(out, args):
    """Makes the folder of the run, writes config.json, all flags and the versions, and returns the
    folder. From here to finish() Ctrl-C ends in one line that names it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    config = {**vars(args), "python": sys.version.split()[0], **versions}
    try:
        out.mkdir(parents=True, exist_ok=bool(args.out))
        with open(out / "config.json", "x") as file:  # "x": not where another run has begun
            file.write(json.dumps(config, indent=2) + "\n")
    except OSError as problem:
        if isinstance(problem, FileExistsError) and not args.out:
            # a run that was started beside this one was faster
            return start_run(free_folder(args, out.name.partition("-")[0]), args)
        fail(f"cannot make --out {out}: {problem.strerror}")

    def stop(*_):
        print(file=sys.stderr)  # below the progress bar
        fail(f"interrupted; {out} keeps what was written (adapters: --save-every, or at the end)")

    signal.signal(signal.SIGINT, stop)
    return out


def save_samples(out, step, rows, responses, scores):
    """Adds responses with their scores to samples.jsonl; step counts the updates made before."""
    for row, response, score in zip(rows, responses, scores):
        sample = {"step": step, "prompt": row["prompt"], "response": response, "score": score}
        append(out / "samples.jsonl", sample)


def append(path, row):
    """Adds one JSON object to a .jsonl file, its numbers to six digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def learning_rate(step, steps, peak, warmup=0.0):
    """Linear warm-up over the share `warmup` of the steps, then linear decay to 0."""
    up = max(1, round(warmup * steps)) if warmup else 0
    return peak * ((step + 1) / up if step < up else (steps - step) / max(1, steps - up))


def print_table(title, before, after):
    """Prints two dictionaries of numbers with the same keys side by side."""
    print(f"\n{title:28} {'before':>10} {'after':>10}")
    for key in before:
        print(f"{key:28} {before[key]:10.3f} {after[key]:10.3f}")


def print_ceiling(rows, accuracy):
    """Prints how often always guessing the likelier answer agrees with a fresh label, where the
    data rows state how sure the labeller was: no judge does better."""
    sure = [row["p_chosen"] for row in rows if isinstance(row.get("p_chosen"), (int, float))]
    if len(sure) == len(rows):
        ceiling = sum(max(p, 1 - p) for p in sure) / len(sure)
        reached = f"reached: {accuracy / ceiling:.1%}"
        print(f"{'the best possible judge':28} {'':10} {ceiling:10.3f}   {reached}")


def plot_curves(out):
    """Draws the numbers that each row of metrics.jsonl has, against the steps: curves.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = [key for key in rows[len(rows) // 2] if key not in ("step", "seconds")]
    figure, panels = plt.subplots(-(-len(keys) // 3), 3, figsize=(12, 2 * -(-len(keys) // 3)))
    for panel in panels.flat[len(keys):]:
        panel.axis("off")
    for key, panel in zip(keys, panels.flat):
        panel.plot([row["step"] for row in rows], [row[key] for row in rows], lw=1)
        panel.set_title(key, fontsize=9)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=100)


def finish(out, args):
    """The last lines of a run; Ctrl-C is Python's own again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.plot:
        plot_curves(out)
    print(f"\nsaved {out}")


def print_samples(rows, before, after, n=4):
    """Prints the first n prompts with the responses before and after training."""
    for row, b, a in list(zip(rows, before, after))[:n]:
        print(f"\n> {show(row['prompt'])}\n  before   {b}\n  after    {a}")


# ------------------------------------------------------------------------------ command


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument("--model", default="tiny", help="tiny, hub id, folder or file.gguf (tiny)")
    p.add_argument("--adapter", help="folder of an adapter (none: the bare base)")
    p.add_argument("--prompt", required=True)
    p.add_argument("--max-new-tokens", type=whole, default=128, help="tokens (128)")
    p.add_argument("--temperature", type=amount, default=TEMPERATURE,
                   help="0: the likeliest token (tiny: 0.5, else 0.7)")
    p.add_argument("--seed", type=seed, default=0, help="of the sampling (0)")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    p.add_argument("--trust-remote-code", action="store_true")
    p.add_argument("--max-length", type=whole, default=1024, help="prompt + answer (1024)")
    return by_model(p.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    seed_everything(args.seed)
    model, tokenizer = load_model(args)
    name = None
    if args.adapter and args.adapter != "none":
        name = "adapter"
        load_adapter(model, name, args.adapter)
    with lora.use_adapter(model, name):
        texts, _ = answer(model, tokenizer, [args.prompt], args.max_new_tokens, args.temperature,
                          max_length=args.max_length)
    print(texts[0])


if __name__ == "__main__":
    main()
