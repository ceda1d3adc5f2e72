"""What --model takes and what it refuses: folders, .gguf files, code, pickles, damaged weights."""

import argparse
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

CODE = '''open("ran", "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
'''


def load(name, **extra):
    wanted = dict(model=str(name), device="cpu", dtype="fp32", trust_remote_code=False)
    return common.load_model(argparse.Namespace(**wanted | extra))


def refusal(capsys, name, **extra):
    """The one line of a refused model, which must name it."""
    with pytest.raises(SystemExit) as end:
        load(name, **extra)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert str(name) in error
    return error


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model that loads, for the tests to damage; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    toy("llama", SIZE).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    load("model")
    return Path("model")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_folder_with_a_pickle_only_is_refused_and_not_opened(folder, capsys):
    """Neither the weights that torch.save wrote nor something that acts when it is read."""
    weights, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, file)
    refusal(capsys, folder)
    file.write_bytes(pickle.dumps(Bomb()))
    refusal(capsys, folder)
    assert not Path("ran").exists()
    pickle.loads(file.read_bytes())  # it would have shown
    assert Path("ran").exists()


def test_an_adapter_in_a_pickle_only_is_refused(folder, capsys):
    model, _ = load(folder)
    lora.add_adapter(model, "a", rank=2)
    lora.save_adapter(model, "a", "adapter")
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    with pytest.raises(SystemExit):
        common.load_adapter(model, "b", "adapter")
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err


def test_code_that_comes_with_a_model_runs_only_if_told_so(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    config |= {"model_type": "odd", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(CODE)
    assert "--trust-remote-code" in refusal(capsys, folder)
    assert not Path("ran").exists()
    model, _ = load(folder, trust_remote_code=True)
    assert type(model).__name__ == "OddModel" and Path("ran").exists()


def test_a_damaged_weight_file_is_refused(folder, capsys):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    refusal(capsys, folder)


def test_a_weight_that_is_missing_is_not_made_up(folder, capsys):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(capsys, folder)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_logits_that_are_more_than_the_output_head_are_noticed(scale, folder, capsys):
    """Granite divides them: its log-probabilities would be those of another temperature."""
    config = hf.GraniteConfig(vocab_size=SIZE, hidden_size=32, intermediate_size=48,
                              num_hidden_layers=1, num_attention_heads=4, logits_scaling=scale)
    torch.manual_seed(0)
    hf.GraniteForCausalLM(config).save_pretrained(folder)
    if scale == 1:
        load(folder)
    else:
        assert "logits" in refusal(capsys, folder)


STATES = dict(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2)
HEADS = dict(STATES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("config, says", [
    (hf.MambaConfig(**STATES, state_size=8), "another distribution"),  # reads no cache of these
    (hf.BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4), "cannot be sampled"),
], ids=["wrong", "raises"])
def test_a_family_that_is_not_sampled_as_it_is_scored_is_refused(config, says, folder, capsys):
    random_model(config).save_pretrained(folder)
    assert says in refusal(capsys, folder)


@pytest.mark.parametrize("config", [
    hf.Lfm2Config(**HEADS, layer_types=["conv", "full_attention"]),
    hf.GPTNeoConfig(vocab_size=SIZE, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                    attention_types=[[["global", "local"], 1]]),
], ids=lambda config: config.model_type)
def test_caches_of_other_kinds_answer_as_the_library_does(config, folder):
    """Beyond the window, and with two answers to a prompt that are then the same."""
    random_model(config).save_pretrained(folder)
    model, _ = load(folder)
    prompts = [[*range(40, 61)], [8, 3, 144, 21]]
    ids, _, mask = common.sample(model, prompts, [SIZE], 12, temperature=0.0, each=2)
    assert mask.all()
    for i, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12,
                                  do_sample=False, pad_token_id=0)[0, len(prompt):]
        assert torch.equal(ids[2 * i, -12:], expected)
        assert torch.equal(ids[2 * i + 1, -12:], expected)


def test_a_model_without_a_head_of_its_own_is_no_reward(folder, capsys):
    args = argparse.Namespace(trust_remote_code=False, max_length=64)
    with pytest.raises(SystemExit):
        common.load_reward("model", *load(folder), args)
    assert "score.weight" in capsys.readouterr().err


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
    lora.main(["merge", "--adapter", "adapter", "--out", "merged", "--device", "cpu"])
    with lora.use_adapter(model, "a"):
        assert torch.allclose(load("merged")[0](ids).logits, model(ids).logits, atol=1e-4)


def test_a_file_that_is_no_gguf_is_refused(tmp_path, capsys):
    pytest.importorskip("gguf")
    (tmp_path / "no.gguf").write_text("nothing of the kind")
    refusal(capsys, tmp_path / "no.gguf")
    refusal(capsys, tmp_path / "missing.gguf")
