"""Random and hostile files in front of each loader: a ValueError or OSError in words, never a
traceback of something else, and nothing written."""

import json
import random
from pathlib import Path

import pytest
import torch
from byte_tokenizer import CHAT, byte_tokenizer
from conftest import ROOT, TARGETS, toy
from safetensors.torch import load_file, save_file

import common
import lora
from cli import data

ROWS = [{"prompt": f"q{i}", "response": "a", "chosen": "a", "rejected": "b"} for i in range(3)]


def damaged(text, rng):
    """`text`, bytes, with some of them changed, cut out or put in twice."""
    out = bytearray(text)
    for _ in range(rng.choice([1, 2, 8, 64])):
        i = rng.randrange(len(out) + 1)
        kind = rng.randrange(4)
        if kind == 0 and out:
            out[i % len(out)] = rng.randrange(256)
        elif kind == 1:
            del out[i : i + rng.randrange(1, 20)]
        elif kind == 2:
            out[i:i] = rng.randbytes(rng.randrange(1, 8))
        else:
            out[i:i] = rng.choice([b"null", b"{", b"]", b'"', b"\xff\xfe", b"1e999", b"\x00", b"\\u"])
    return bytes(out)


def value(rng, depth=0):
    """A random JSON value."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        return [None, True, rng.randrange(-9, 9), rng.random() * 1e9, "text" * rng.randrange(3)][kind]
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["prompt", "response", "chosen", "rejected", "messages", "role", "content", "split", "x"]
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def loads_or_refuses(path, need):
    try:
        train, test = data.load_data(str(path), need)
    except (ValueError, OSError) as problem:
        assert str(problem)
        return False
    assert all(data.is_text(row[key]) for row in [*train, *test] for key in need)
    return True


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("need", [["prompt"], ["prompt", "response"],
                                  ["prompt", "chosen", "rejected"]])
def test_damaged_data_is_read_or_refused(suffix, need, tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng, path = random.Random(suffix + need[-1]), tmp_path / f"whole{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet,
     ".json": lambda p: p.write_text(json.dumps(ROWS, indent=1))}[suffix](path)
    assert loads_or_refuses(path, need)
    for i in range(8 if suffix != ".parquet" else 0):  # pyarrow itself can crash on a damaged one
        spoilt = tmp_path / f"{i}{suffix}"
        spoilt.write_bytes(damaged(path.read_bytes(), rng))
        loads_or_refuses(spoilt, need)
    noise = tmp_path / f"noise{suffix}"
    noise.write_bytes(rng.randbytes(200))
    assert not loads_or_refuses(noise, need)


def test_random_json_is_no_row_or_a_row_of_texts():
    """A prompt that is taken can be encoded, with and without a chat template."""
    rng, tokenizers, taken = random.Random(0), [byte_tokenizer(), byte_tokenizer(CHAT)], 0
    for _ in range(20000):
        row = value(rng, 0)
        if isinstance(row, dict):
            try:
                parsed = data.parse_row(row)
            except (KeyError, TypeError):  # what load_data counts as dropped
                continue
            if data.is_text(parsed.get("prompt")):
                assert all(common.encode_prompt(t, parsed["prompt"]) for t in tokenizers)
                taken += 1
    assert taken > 30


@pytest.fixture
def adapter(kind, tmp_path):
    model = toy(kind)
    lora.add_adapter(model, "policy", 4, targets=TARGETS[kind])
    lora.save_adapter(model, "policy", tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused_and_leaves_the_model_as_it_was(name, kind, adapter):
    rng, path = random.Random(name), adapter / name
    whole = path.read_bytes()
    for _ in range(60):
        model = toy(kind)
        before = {key: p.clone() for key, p in model.named_parameters()}
        path.write_bytes(damaged(whole, rng))
        try:
            lora.load_adapter(model, "policy", adapter)
        except (ValueError, OSError) as problem:
            assert str(problem)
        for key, p in model.named_parameters():
            if "lora_" not in key:
                assert torch.equal(p, before[key.replace(".base.", ".")])


@pytest.mark.parametrize("path", [
    "../../etc/passwd", "/etc/passwd", "transformer", "", "lm_head.weight", "__class__", "a" * 5000,
    "model.layers.0.self_attn.q_proj.base", "\x00", "model..layers",
])
def test_an_adapter_with_tricks_in_its_paths_is_refused(path, kind, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = {f"base_model.model.{path}.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    save_file(tensors, file)
    with pytest.raises(ValueError):
        lora.load_adapter(toy(kind), "policy", adapter)
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", file.name}


def test_a_header_that_promises_more_than_the_file_holds_costs_no_memory(kind, adapter):
    """A shape of a terabyte, in a file of some hundred bytes."""
    header = {"x": {"dtype": "F32", "shape": [2**38, 1], "data_offsets": [0, 2**40]}}
    text = json.dumps(header).encode()
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\x00" * 64)
    with pytest.raises(ValueError):
        lora.load_adapter(toy(kind), "policy", adapter)
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError):
        lora.load_adapter(toy(kind), "policy", adapter)


@pytest.mark.parametrize("config", [
    {"r": 10**9}, {"r": -1}, {"r": 0}, {"r": "x"}, {"r": None}, {"r": [4]}, {"lora_alpha": "x"},
    {"peft_type": "X"}, {"peft_type": ["LORA"]}, {"target_modules": {"a": 1}, "r": 5},
])
def test_an_adapter_of_another_rank_than_it_says_is_refused(config, kind, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ValueError):
        lora.load_adapter(toy(kind), "policy", adapter)
    assert load_file(adapter / "adapter_model.safetensors")


def test_a_damaged_model_is_refused(tmp_path, kind):
    rng = random.Random(0)
    toy(kind).save_pretrained(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_bytes()
    for text in (b"", b"{", b"[]", b"null", b'{"model_type": "nothing"}', rng.randbytes(50)):
        (tmp_path / "m" / "config.json").write_bytes(text)
        with pytest.raises(ValueError):
            common.load_model(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_bytes(config)
    with pytest.raises(ValueError):  # no tokenizer
        common.load_model(str(tmp_path / "m"))


def test_no_file_of_the_repository_is_unpickled():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("tiny/*.py")]
    for path in sources:
        text = Path(path).read_text()
        assert "torch.load(" not in text and "import pickle" not in text, path
