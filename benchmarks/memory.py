"""Peak memory of the log-probabilities of long answers in a large vocabulary, and their gradient.

    python benchmarks/memory.py

A Llama of 2 layers and width 64 with a vocabulary of 150,000: everything but the logits is small.
"pieces" is what the scripts do (common.per_token); "whole" makes the logits [B, R, V] at once, as
the textbook writes it. Each number is the peak of a process of its own above that of one which
holds the model and makes no logits. About three minutes.
"""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402

VOCABULARY = 150_000


def peak(how, tokens):
    """MB that this process has held at most after one gradient over `tokens` response tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096)).eval()
    lora.add_adapter(model, "policy", targets=("q_proj", "v_proj"))
    B, R = max(1, tokens // 512), min(tokens, 512)
    ids = torch.randint(VOCABULARY, (B, R + 8))
    attention, y = torch.ones_like(ids), ids[:, -R:]
    with lora.use_adapter(model, "policy"):
        states = common.response_states(model, ids, attention, R)
    if how == "pieces":
        logps = partial(ppo.token_logps, temperature=0.7)
        common.per_token(model, states, logps, y).sum().backward()
    elif how == "whole":
        ppo.token_logps(common.logits_of(model, states), y, 0.7).sum().backward()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return held * (1 if sys.platform == "darwin" else 1024) / 1e6


def main():
    if len(sys.argv) == 3:
        print(peak(sys.argv[1], int(sys.argv[2])))
        return

    def measured(how, tokens):
        command = [sys.executable, __file__, how, str(tokens)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print(f"{'tokens':>8} {'[B, R, V] fp32':>15} {'whole':>9} {'pieces':>9}   MB")
    for tokens in (128, 256, 512, 1024, 2048, 4096):
        nothing = measured("none", tokens)
        logits = tokens * VOCABULARY * 4 / 1e6
        whole = f"{measured('whole', tokens) - nothing:9.0f}" if tokens <= 2048 else f"{'':9}"
        pieces = measured("pieces", tokens) - nothing
        print(f"{tokens:8} {logits:15.0f} {whole} {pieces:9.0f}", flush=True)


if __name__ == "__main__":
    main()
