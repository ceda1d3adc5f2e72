"""The reward that --reward names."""

import inspect
import math
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import lora
from cli import models, tasks
from cli.flags import fail


def load(args, model, max_length):
    """What `train` takes as its reward.

    A folder that reward_model.py wrote on the same base becomes the adapter "reward" of `model`,
    and its name is returned: it scores the sampled ids. Any other folder or hub id is a decoder
    with a scalar head (AutoModelForSequenceClassification) and its own tokenizer, and becomes a
    function of texts, as file.py:function does (file.py alone: its function score)."""
    spec = args.reward
    if spec == "none":  # only the KL is left: the policy is drawn to the reference
        return lambda prompts, responses, rows: [0.0] * len(responses)
    if tasks.is_task(spec):
        return from_file(spec)
    if (Path(spec) / "adapter_config.json").is_file():
        base = models.adapter_base(spec)
        if not models.is_model(base, model):
            raise ValueError(f"--reward {spec} belongs to the model {base}, not to "
                             f"{model.name_or_path}; train one on this base")
        models.load_adapter(model, "reward", spec)
        if not lora.has_head(model, "reward"):
            raise ValueError(f"--reward {spec} has no scalar head; give what reward_model.py wrote")
        return "reward"
    if Path(spec).exists() and not (Path(spec) / "config.json").is_file():
        raise ValueError(f"--reward {spec} holds neither an adapter nor a model")
    return from_model(spec, args, model, max_length)


def from_model(spec, args, model, max_length):
    """A reward function by a sequence classifier with one score, on the device of `model`."""
    trust = {"trust_remote_code": args.trust_remote_code}
    reader = common.load_pretrained(AutoTokenizer, spec, **trust)
    other, info = common.load_pretrained(
        AutoModelForSequenceClassification, spec, dtype=model.dtype, num_labels=1,
        use_safetensors=True, output_loading_info=True, **trust)
    if info["missing_keys"]:
        raise ValueError(f"--reward {spec} lacks the weight {min(info['missing_keys'])}: it is "
                         "another kind of model")
    if not hasattr(other, "score"):
        raise ValueError(f"--reward {spec} is no decoder with a scalar head named score")
    if common.end_of_turn(reader) is None:
        raise ValueError(f"the tokenizer of --reward {spec} has no EOS token, by which it would "
                         "know an end")
    other.to(model.device).eval()
    room = models.readable(other, max_length)

    @torch.no_grad()
    def reward(prompts, responses, rows):
        texts = [common.encode_prompt(reader, row["prompt"])
                 + common.encode_response(reader, response)
                 for row, response in zip(rows, responses)]
        ids, attention = common.pad([text[-room:] for text in texts], "right", model.device)
        hidden = other.base_model(input_ids=ids, attention_mask=attention).last_hidden_state
        last = hidden[torch.arange(len(ids)), attention.sum(1) - 1]
        return other.score(last).squeeze(-1).float().tolist()

    return reward


def from_file(spec):
    """function(prompts, responses, rows) -> list of floats, of file.py[:function]."""
    file, _, name = spec.partition(":")
    name = name or "score"
    function = getattr(tasks.run(file, "--reward"), name, None)
    if not callable(function):
        raise ValueError(f"--reward {file} has no function {name}; write {file}:function")
    try:
        inspect.signature(function).bind("prompts", "responses", "rows")
    except TypeError as problem:
        raise ValueError(f"--reward {spec} must take (prompts, responses, rows): {problem}")
    return checked(spec, function)


def checked(spec, function):
    """`function`, with what it may do wrong said in one line."""
    def reward(prompts, responses, rows):
        try:
            scores = function(prompts, responses, rows)
        except Exception as problem:
            # The user's own traceback, without the frames of this repository above it.
            traceback.print_exception(problem.with_traceback(problem.__traceback__.tb_next),
                                      file=sys.__stderr__ if common.processes()[0] else None)
            fail(f"--reward {spec} raised {type(problem).__name__}: {problem}; the first of its "
                 f"{len(prompts)} prompts was {prompts[0][:60]!r}")
        try:
            scores = [s + 0.0 for s in scores]
            scores = [float(s) for s in scores]
        except (TypeError, ValueError) as problem:
            raise ValueError(f"--reward {spec} must return a list of numbers ({problem})")
        if len(scores) != len(responses):
            raise ValueError(f"--reward {spec} returned {len(scores)} scores for {len(responses)} "
                             "responses")
        for score, response in zip(scores, responses):
            if not math.isfinite(score):
                raise ValueError(f"--reward {spec} returned {score} for the response "
                                 f"{response[:60]!r}")
        return scores

    return reward
