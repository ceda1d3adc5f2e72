"""Two toy models that every test touching a model runs through: a GPT-2 (learned positions, Conv1D,
dropout .1 in its config) and a Llama (rotary positions, nn.Linear)."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # the toys are so small that a second thread only costs time

TARGETS = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}


def toy(kind, vocabulary=64):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def random_model(config):
    """A model of any family; its weights are large enough for logits that differ."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(4)
    return model


def pytest_collection_modifyitems(items):
    """Files that start processes of their own come first: of two workers, none then waits long."""
    first = ("test_processes.py", "test_resume.py", "test_collect.py")
    items.sort(key=lambda item: item.path.name not in first)


@pytest.fixture(autouse=True)
def prompts_are_shared(monkeypatch):
    """The toys' prompts are so short that reading one once would never be worth a second pass."""
    monkeypatch.setattr("common.WORTH", 1)


@pytest.fixture(params=["gpt2", "llama"])
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return toy(kind)


@pytest.fixture
def targets(kind):
    return TARGETS[kind]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
