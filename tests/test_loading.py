"""What load_model takes and what it refuses: folders, .gguf files, code, pickles, damaged weights;
and that a loaded model rolls no dice."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf
from byte_tokenizer import ALPHABET, CHAT, SIZE, SPECIAL, START, TURN, byte_tokenizer, spell
from conftest import random_model, toy
from safetensors.torch import load_file, save_file

import common
import lora
from cli import export, models

CODE = '''open("ran", "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
'''


def load(name, **more):
    return common.load_model(str(name), "cpu", "fp32", **more)


def refusal(name, **more):
    """The message of a refused model, one line that names it."""
    with pytest.raises(ValueError) as problem:
        load(name, **more)
    message = str(problem.value)
    assert str(name) in message and "\n" not in message, message
    return message


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model that loads, for the tests to damage; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    toy("llama", SIZE).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    load("model")
    return Path("model")


# ------------------------------------------------------------------------------ safety


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_folder_with_a_pickle_only_is_refused_and_not_opened(folder):
    """Neither the weights that torch.save wrote nor something that acts when it is read."""
    weights, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, file)
    refusal(folder)
    file.write_bytes(pickle.dumps(Bomb()))
    refusal(folder)
    assert not Path("ran").exists()
    pickle.loads(file.read_bytes())  # it would have shown
    assert Path("ran").exists()


def test_an_adapter_in_a_pickle_only_is_refused(folder):
    model, _ = load(folder)
    lora.add_adapter(model, "a", rank=2)
    lora.save_adapter(model, "a", "adapter")
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    for load_adapter in (models.load_adapter, lora.load_adapter):
        with pytest.raises((ValueError, OSError), match="adapter_model.safetensors is missing"):
            load_adapter(model, "b", "adapter")
    assert lora.names(model) == {"a"}


def test_code_that_comes_with_a_model_runs_only_if_told_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    config |= {"model_type": "odd", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(CODE)
    assert "--trust-remote-code" in refusal(folder)
    assert not Path("ran").exists()
    model, _ = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OddModel" and Path("ran").exists()


# ------------------------------------------------------------------------------ refusals


def test_a_damaged_weight_file_is_refused(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    refusal(folder)


def test_a_weight_that_is_missing_is_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(folder)


@pytest.mark.parametrize("name", ["./missing", "runs/missing", "tiny/missing", "/missing/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, folder, monkeypatch):
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *_, **__: 1 / 0)
    assert "no such file or folder" in refusal(name)


def test_a_folder_that_holds_no_model_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refusal(folder)


def test_a_tokenizer_without_an_end_is_refused(folder):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "no EOS token" in refusal(folder)


def test_a_device_that_is_not_here_is_refused(folder):
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    absent = [name for name in ("cuda", "mps") if not accelerator or accelerator.type != name]
    for device in absent:
        with pytest.raises(ValueError, match=f"{device} is not available here"):
            common.load_model(folder, device)


# ------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("dtype, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_model_is_loaded_as_it_was_saved_in_the_type_that_is_asked_for(folder, dtype, expected):
    model, tokenizer = common.load_model(folder, "cpu", dtype)
    assert model.dtype == expected and not model.training and model.name_or_path == "model"
    weights = load_file(folder / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key].to(expected))
    assert tokenizer("a").input_ids == byte_tokenizer()("a").input_ids


def test_auto_is_fp32_on_a_cpu(folder):
    model, _ = common.load_model(folder, "cpu")
    assert model.dtype == torch.float32 and model.device.type == "cpu"


def test_tiny_is_the_embedded_model_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny/model"):
        model, tokenizer = load(name)
        assert model.name_or_path == "tiny/model"
        text = tokenizer.decode(common.encode_prompt(tokenizer, "Why?"))
        assert text == "<bos>User: Why?\n\nAssistant:"


LAYERS = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**LAYERS, "intermediate_size": 48}
RATES = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
DICE = [
    hf.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                  resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
    hf.LlamaConfig(**WIDE, attention_dropout=0.2),
    hf.OPTConfig(**LAYERS, ffn_dim=48, dropout=0.2, attention_dropout=0.2, layerdrop=0.5),
    hf.GPTNeoXConfig(**WIDE, **RATES),
    hf.PhiConfig(**WIDE, attention_dropout=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    hf.FalconConfig(**LAYERS, **RATES),
    hf.PersimmonConfig(**WIDE, **RATES),
]


@pytest.mark.parametrize("config", DICE, ids=lambda config: config.model_type)
@torch.no_grad()
def test_no_dropout_is_left_in_a_loaded_model(config, folder):
    """Under gradient checkpointing a pass is in training mode, and must say the same."""
    random_model(config).save_pretrained(folder)
    model, _ = load(folder)
    ids = torch.tensor([[9, 44, 7, 30, 111, 8, 12, 13]])
    expected = model(ids).logits
    model.train()
    for _ in range(3):
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    rolls = hf.AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.allclose(rolls(ids).logits, expected, atol=1e-2)  # the rates were there


# ------------------------------------------------------------------------------ gguf


def write_gguf(gguf, model, path):
    """The model, a Qwen2, with the byte tokenizer and one merge, in the words of llama.cpp."""
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*SPECIAL, *ALPHABET, "Ġa"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(ALPHABET) + 1))  # control, normal
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_with_its_tokenizer_template_and_adapters(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = hf.Qwen2Config(
        vocab_size=SIZE + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2)
    made = hf.Qwen2ForCausalLM(config).eval()
    write_gguf(gguf, made, "tiny.gguf")
    model, tokenizer = load("tiny.gguf")
    ids = torch.tensor([[9, 44, 7, 30, 111]])
    assert torch.allclose(model(ids).logits, made(ids).logits, atol=1e-5)
    assert common.encode_prompt(tokenizer, "Hi a") == [
        START, *spell("user\nHi"), SIZE, TURN, *spell("\n"), START, *spell("assistant\n")]
    assert common.stop_ids(model, tokenizer) == [2, TURN]
    lora.add_adapter(model, "a", rank=2)
    for p in lora.adapter_parameters(model, "a"):
        p.data.normal_()
    lora.save_adapter(model, "a", "adapter")
    export.main(["merge", "--adapter", "adapter", "--out", "merged", "--device", "cpu"])
    with lora.use_adapter(model, "a"):
        assert torch.allclose(load("merged")[0](ids).logits, model(ids).logits, atol=1e-4)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "no.gguf").write_text("nothing of the kind")
    refusal(tmp_path / "no.gguf")
    refusal(tmp_path / "missing.gguf")
