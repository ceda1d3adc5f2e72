"""Peak memory of the logits of answers in a large vocabulary, with and without gradient.

    python benchmarks/memory.py

A Llama of 2 layers and width 64 with a vocabulary of 150,000: everything but the logits is small.
One forward pass over answers of 500 tokens and their log-probabilities, as in the update of ppo.py:
in fp32 they take 3 times the size of the logits, and 5 times with their gradient. Each number is
the peak of a process of its own, above that of one which reads the states and makes no logits. A
minute or two, and up to 7 GB.
"""

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import lora  # noqa: E402
import ppo  # noqa: E402

VOCABULARY, R = 150_000, 500


def peak(how, answers):
    """MB that this process has held at most, after one pass over so many answers of R tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096)).eval()
    lora.add_adapter(model, "policy")
    x, y = (torch.randint(VOCABULARY, (answers, width)) for width in (8, R))
    x_mask, mask = torch.ones_like(x), torch.ones(answers, R)
    with lora.use_adapter(model, "policy"), (
            contextlib.nullcontext() if how == "gradient" else torch.no_grad()):
        if how == "states":
            common.read(model, x, x_mask, y, mask, states=True)
        else:
            logits = common.read(model, x, x_mask, y, mask)
            logp = ppo.token_logps(logits[:, :-1], y, 0.7)
        if how == "gradient":
            logp.sum().backward()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return held * (1 if sys.platform == "darwin" else 1024) / 1e6


def main():
    if len(sys.argv) == 3:
        print(peak(sys.argv[1], int(sys.argv[2])))
        return

    def measured(how, answers):
        command = [sys.executable, __file__, how, str(answers)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print(f"{'tokens':>8} {'logits in fp32':>15} {'no gradient':>12} {'gradient':>9}   MB")
    for answers in (1, 2, 4):
        nothing = measured("states", answers)
        found = [measured(how, answers) - nothing for how in ("logps", "gradient")]
        logits = answers * R * VOCABULARY * 4 / 1e6
        print(f"{answers * R:8} {logits:15.0f} {found[0]:12.0f} {found[1]:9.0f}", flush=True)


if __name__ == "__main__":
    main()
