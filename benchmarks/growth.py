"""How the time of a step grows with the batch, the answers, the prompts, the vocabulary, the model.

    python benchmarks/growth.py             all scripts, about ten minutes on two CPU cores
    python benchmarks/growth.py ppo grpo    only these

A Llama with random weights takes steps of a script. One size at a time is doubled, three times, and
all others stay as they are. No time should grow faster than the arithmetic does: twice the width
makes that up to four times as much, and twice of anything else makes it twice as much. (Attention
alone grows with the square of the length, but is a small part here.) Answers never end early, so
that each has the length that it is allowed. The medians go to benchmarks/growth.json, and `python
docs/draw.py` draws them.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

SCRIPTS = ("sft", "reward_model", "dpo", "ppo", "trpo", "grpo")
SIZES = {"batch": 8, "answer": 32, "prompt": 32, "vocabulary": 4096, "width": 128}
DOUBLINGS, STEPS = 4, 6  # sizes of each kind; the first step of a run is not counted


def no_score(prompts, responses, rows):
    return [float(i % 3) for i in range(len(prompts))]


def make_model(vocabulary, width):
    """A Llama of four layers that never ends an answer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=width // 32, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary), requires_grad=False)
    model.lm_head.bias[2] = -100.0  # the end has no probability
    return model


def text(tokenizer, tokens):
    """A text of about so many tokens."""
    sentence = "A bee carries pollen from one flower to the next one. "
    return sentence * (tokens // len(tokenizer(sentence).input_ids) + 1)


def seconds(script, tokenizer, batch, answer, prompt, vocabulary, width):
    """The median time of a step."""
    module = importlib.import_module(script)
    numbers = {"steps": STEPS, "batch_size": batch, "max_length": prompt + answer}
    # Long prompts are cut to what --max-length leaves them. Answers cannot be cut: they are made of
    # so many tokens, one of which is the end.
    said = tokenizer.decode(tokenizer(text(tokenizer, answer)).input_ids[1 : answer - 2])
    rows = [{"prompt": text(tokenizer, 2 * prompt), "response": said, "chosen": said,
             "rejected": said[: -8] + str(i)} for i in range(16)]
    args = [make_model(vocabulary, width), tokenizer, rows]
    if script != "reward_model":
        numbers["max_new_tokens"] = answer
    if script in ("ppo", "trpo", "grpo"):
        numbers["missing_eos_score"] = None
        args.append(no_score)
    if script == "grpo":
        numbers["group_size"] = 4
    history = module.train(*args, module.Config(**numbers))
    return median(row["seconds"] for row in history[1:])


def measure(script, tokenizer):
    """{size: [[value, seconds], ...]} with one size at a time doubled."""
    found = {}
    for size, start in SIZES.items():
        values = [start * 2**i for i in range(DOUBLINGS)]
        found[size] = [[x, seconds(script, tokenizer, **{**SIZES, size: x})] for x in values]
        shown = "  ".join(f"{x}: {s * 1e3:.0f} ms" for x, s in found[size])
        print(f"{script:12} {size:10} {shown}", flush=True)
    return found


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS)} (all)")
    record = ROOT / "benchmarks" / "growth.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    _, tokenizer = common.load_model("tiny", "cpu")
    for script in p.parse_args(argv).scripts or SCRIPTS:
        found[script] = measure(script, tokenizer)
        record.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
