"""lora.py against hand-computed numbers, against merged weights and against peft."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from byte_tokenizer import ALPHABET
from conftest import ROOT, toy
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

import common
import lora
from cli import export

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
W0 = [[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]
BIAS = [0.5, -0.5]
A = [[1.0, 1.0, 1.0], [0.0, 1.0, -1.0]]
B = [[2.0, 1.0], [3.0, -1.0]]


def logits(model, name=None):
    with torch.no_grad(), lora.use_adapter(model, name):
        return model(IDS).logits


def disturb(model, name, seed=0, size=0.3):
    """Random values in every tensor of the adapter, so that it changes the logits visibly."""
    generator = torch.Generator().manual_seed(seed)
    for p in lora.adapter_parameters(model, name):
        p.data.copy_(torch.randn(p.shape, generator=generator) * size)


def trained(model, name, targets, seed=0, **options):
    lora.add_adapter(model, name, rank=4, alpha=8, targets=targets, **options)
    disturb(model, name, seed)
    return model


def by_hand(layer_kind):
    """W0, bias, A and B above in a layer with s = 0.5."""
    if layer_kind == "Conv1D":
        base = Conv1D(2, 3)
        base.weight.data = torch.tensor(W0).T.contiguous()
    else:
        base = nn.Linear(3, 2)
        base.weight.data = torch.tensor(W0)
    base.bias.data = torch.tensor(BIAS)
    layer = lora.LoRALinear(base)
    layer.add("a", rank=2, scale=0.5, dropout=0.0, trainable=True)
    return layer


# ------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("layer_kind", ["Linear", "Conv1D"])
def test_a_new_update_is_zero_and_its_A_is_not(layer_kind):
    layer = by_hand(layer_kind)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    layer.active = "a"
    assert torch.equal(layer(x), layer.base(x))
    assert (layer.delta("a") == 0).all()
    assert (layer.lora_A["a"] != 0).all()


@pytest.mark.parametrize("layer_kind", ["Linear", "Conv1D"])
def test_forward_is_W0x_plus_sBAx(layer_kind):
    """x = (1, 2, 3): W0 x + b = (-1.5, 3.5), A x = (6, -1), B A x = (11, 19), s = 0.5."""
    layer = by_hand(layer_kind)
    layer.lora_A["a"].data, layer.lora_B["a"].data = torch.tensor(A), torch.tensor(B)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert layer(x).tolist() == [[-1.5, 3.5]]
    layer.active = "a"
    assert layer(x).tolist() == [[4.0, 13.0]]


@pytest.mark.parametrize("layer_kind", ["Linear", "Conv1D"])
def test_delta_has_the_layout_of_the_base_weight(layer_kind):
    """B A = ((2, 3, 1), (3, 2, 4))."""
    layer = by_hand(layer_kind)
    layer.lora_A["a"].data, layer.lora_B["a"].data = torch.tensor(A), torch.tensor(B)
    expected = torch.tensor([[1.0, 1.5, 0.5], [1.5, 1.0, 2.0]])
    expected = expected.T if layer_kind == "Conv1D" else expected
    assert torch.equal(layer.delta("a"), expected)


def test_A_is_kaiming_uniform_with_a_sqrt_5():
    """Its bound is sqrt(6 / ((1 + 5) fan_in)) = 1 / sqrt(fan_in), its variance bound^2 / 3."""
    layer = lora.LoRALinear(nn.Linear(100, 10))
    layer.add("a", rank=64, scale=1.0, dropout=0.0, trainable=True)
    values = layer.lora_A["a"].detach()
    assert values.abs().max() <= 0.1
    assert abs(values.var().item() - 0.01 / 3) < 2e-4


def test_dropout_acts_in_training_mode_only():
    layer = lora.LoRALinear(nn.Linear(50, 3))
    layer.add("a", rank=2, scale=1.0, dropout=0.5, trainable=True)
    layer.lora_B["a"].data.fill_(1.0)
    layer.active, x = "a", torch.ones(1, 50)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


# ------------------------------------------------------------------------------ adapters


def test_a_new_adapter_changes_no_logit(model, targets):
    before = model(IDS).logits
    lora.add_adapter(model, "a", targets=targets)
    assert torch.equal(logits(model, "a"), before)


def test_no_adapter_is_the_bare_base_bit_for_bit(model, targets):
    before = model(IDS).logits
    trained(model, "a", targets)
    assert torch.equal(logits(model, None), before)
    assert torch.equal(model(IDS).logits, before)
    assert not torch.allclose(logits(model, "a"), before, atol=1e-3)


def test_adapters_do_not_disturb_one_another(model, targets):
    trained(model, "a", targets, seed=1)
    alone = logits(model, "a")
    trained(model, "b", "all-linear", seed=2)
    assert torch.equal(logits(model, "a"), alone)
    of_b = logits(model, "b")
    disturb(model, "a", seed=3)
    assert torch.equal(logits(model, "b"), of_b)
    assert not torch.allclose(of_b, alone, atol=1e-3)


def test_use_adapter_nests(model, targets):
    trained(model, "a", targets, seed=1)
    trained(model, "b", targets, seed=2)
    of_a, of_b, of_none = logits(model, "a"), logits(model, "b"), logits(model, None)
    with torch.no_grad(), lora.use_adapter(model, "a"):
        with lora.use_adapter(model, "b"):
            assert torch.equal(model(IDS).logits, of_b)
            with lora.use_adapter(model, None):
                assert torch.equal(model(IDS).logits, of_none)
            assert torch.equal(model(IDS).logits, of_b)
        assert torch.equal(model(IDS).logits, of_a)
    assert torch.equal(model(IDS).logits, of_none)


def test_use_adapter_restores_after_an_exception(model, targets):
    trained(model, "a", targets, seed=1)
    trained(model, "b", targets, seed=2)
    of_a, of_none = logits(model, "a"), logits(model, None)
    with torch.no_grad(), lora.use_adapter(model, "a"):
        with pytest.raises(ZeroDivisionError), lora.use_adapter(model, "b"):
            1 / 0
        assert torch.equal(model(IDS).logits, of_a)
    assert torch.equal(model(IDS).logits, of_none)


def test_only_the_trainable_adapter_requires_grad(model, targets):
    lora.add_adapter(model, "a", targets=targets)
    lora.add_adapter(model, "fixed", targets=targets, trainable=False)
    mine = {id(p) for p in lora.adapter_parameters(model, "a")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    assert mine


def test_training_the_policy_leaves_base_and_reference_as_they_were(model, targets):
    trained(model, "policy", targets)
    lora.copy_adapter(model, "policy", "reference")
    before = {name: logits(model, name) for name in ("policy", "reference", None)}
    parameters = lora.adapter_parameters(model, "policy")
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        with lora.use_adapter(model, "policy"):
            model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(logits(model, "reference"), before["reference"])
    assert torch.equal(logits(model, None), before[None])
    assert not torch.allclose(logits(model, "policy"), before["policy"], atol=1e-3)


# ------------------------------------------------------------------------------ merging


def test_merge_gives_the_unmerged_logits_and_no_wrapper(model, targets):
    trained(model, "a", targets, seed=1)
    trained(model, "b", "all-linear", seed=2)
    expected, names = logits(model, "b"), {n for n, _ in toy_like(model).named_parameters()}
    assert lora.merge_adapter(model, "b") is model
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert not lora.lora_layers(model)
    assert {name for name, _ in model.named_parameters()} == names


def toy_like(model):
    return toy("gpt2" if model.config.model_type == "gpt2" else "llama")


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_head_is_merged_unless_it_is_the_embedding_too(kind, targets, tied):
    """peft can be told to adapt it; here nothing does. A refusal comes before any change."""
    model = toy(kind)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    lora.add_adapter(model, "a", rank=4, targets=targets)
    lora.wrap(model, "lm_head".__eq__)["lm_head"].add("a", 4, 2.0, 0.0, True)
    disturb(model, "a")
    lora.add_head(model, "a")
    lora.add_adapter(model, "b", targets="all-linear")
    assert "b" not in lora.lora_layers(model)["lm_head"].lora_A
    expected, bare = logits(model, "a"), logits(model)
    if tied:
        with pytest.raises(ValueError, match="lm_head.*embedding"):
            lora.merge_adapter(model, "a")
        assert torch.equal(logits(model, "a"), expected)
        assert torch.equal(logits(model), bare) and lora.has_head(model, "a")
    else:
        assert torch.allclose(lora.merge_adapter(model, "a")(IDS).logits, expected, atol=1e-4)


def test_two_layers_with_one_weight_are_not_merged_and_nothing_is_changed():
    """The first layer could be merged; it must not be, when the second cannot."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[1].weight
    trained(net, "a", "0, 1")
    x = torch.randn(3, 4)
    with torch.no_grad(), lora.use_adapter(net, "a"):
        expected, bare = net(x), net[0].base.weight.clone()
    with pytest.raises(ValueError, match="1 shares its weight"):
        lora.merge_adapter(net, "a")
    with torch.no_grad(), lora.use_adapter(net, "a"):
        assert torch.equal(net(x), expected)
    assert torch.equal(net[0].base.weight, bare)


def test_merge_of_an_unknown_adapter_is_refused(model, targets):
    trained(model, "a", targets)
    expected = logits(model, "a")
    with pytest.raises(ValueError, match="nobody"):
        lora.merge_adapter(model, "nobody")
    assert torch.equal(logits(model, "a"), expected)


# ------------------------------------------------------------------------------ files


def test_save_and_load_give_the_same_logits_and_head(kind, targets, tmp_path):
    model = trained(toy(kind), "a", targets)
    lora.add_head(model, "a")
    expected = logits(model, "a")
    lora.save_adapter(model, "a", tmp_path / "out")
    other = toy(kind)
    lora.load_adapter(other, "b", tmp_path / "out")
    assert torch.equal(logits(other, "b"), expected)
    assert torch.equal(other.heads["b"].weight, model.heads["a"].weight)
    assert not any(p.requires_grad for p in lora.adapter_parameters(other, "b"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]


def test_load_trainable_makes_every_tensor_of_the_adapter_trainable(kind, targets, tmp_path):
    model = trained(toy(kind), "a", targets)
    lora.add_head(model, "a")
    lora.save_adapter(model, "a", tmp_path)
    other = toy(kind)
    lora.load_adapter(other, "b", tmp_path, trainable=True)
    mine = lora.adapter_parameters(other, "b")
    assert all(p.requires_grad for p in mine)
    assert sum(p.requires_grad for p in other.parameters()) == len(mine)


def test_saved_keys_and_shapes_are_those_of_peft(kind, tmp_path):
    model = toy(kind)
    target, path = {
        "gpt2": ("c_attn", "transformer.h.0.attn.c_attn"),
        "llama": ("q_proj", "model.layers.0.self_attn.q_proj"),
    }[kind]
    lora.add_adapter(model, "a", rank=4, alpha=8, targets=target)
    lora.save_adapter(model, "a", tmp_path, base="some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{path}.lora_A.weight"].shape == (4, 32)
    out = 96 if kind == "gpt2" else 32
    assert tensors[f"base_model.model.{path}.lora_B.weight"].shape == (out, 4)
    assert len(tensors) == 4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"


# ------------------------------------------------------------------------------ copies and heads


def test_copy_adapter_copies_values_and_shares_none(model, targets):
    trained(model, "a", targets)
    lora.add_head(model, "a")
    lora.copy_adapter(model, "a", "b", trainable=True)
    assert torch.equal(logits(model, "a"), logits(model, "b"))
    pairs = list(zip(lora.adapter_parameters(model, "a"), lora.adapter_parameters(model, "b")))
    assert len(pairs) == len(lora.adapter_parameters(model, "a")) > 2
    for a, b in pairs:
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and b.requires_grad
    expected = logits(model, "a")
    disturb(model, "b", seed=5)
    assert torch.equal(logits(model, "a"), expected)


def test_an_adapter_whose_config_names_no_dropout_can_be_copied(model, targets, tmp_path):
    trained(model, "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["lora_dropout"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora.load_adapter(model, "b", tmp_path)
    lora.copy_adapter(model, "b", "c")
    assert torch.equal(logits(model, "a"), logits(model, "c"))


def test_a_copy_is_frozen_unless_asked(model, targets):
    trained(model, "a", targets)
    lora.add_head(model, "a")
    lora.copy_adapter(model, "a", "b")
    assert not any(p.requires_grad for p in lora.adapter_parameters(model, "b"))


# ------------------------------------------------------------------------------ targets


def leaves(model):
    return {path.rpartition(".")[2] for path in lora.lora_layers(model)}


def test_auto_takes_query_and_value_as_the_family_names_them(model, targets):
    lora.add_adapter(model, "a")
    assert leaves(model) == set(targets)
    assert len(lora.lora_layers(model)) == 2 * len(targets)


def test_auto_takes_all_linear_layers_where_none_is_named_so():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    lora.add_adapter(net, "a", targets="auto")
    assert set(lora.lora_layers(net)) == {"0", "2"}


@pytest.mark.parametrize("form", [
    "q_proj, o_proj", "q_proj,o_proj", ["q_proj", "o_proj"], ("q_proj", "o_proj"),
    "self_attn.q_proj, self_attn.o_proj",
])
def test_targets_are_ends_of_paths_in_a_list_or_a_text_with_commas(form):
    model = toy("llama")
    lora.add_adapter(model, "a", targets=form)
    assert leaves(model) == {"q_proj", "o_proj"} and len(lora.lora_layers(model)) == 4


def test_a_whole_path_is_one_layer_and_a_part_of_a_name_is_none():
    model = toy("llama")
    with pytest.raises(ValueError, match="proj"):
        lora.add_adapter(model, "a", targets="proj")
    lora.add_adapter(model, "a", targets="model.layers.1.mlp.up_proj")
    assert list(lora.lora_layers(model)) == ["model.layers.1.mlp.up_proj"]


def test_all_linear_takes_every_layer_but_the_output_head(model):
    linear = {path for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    lora.add_adapter(model, "a", targets="all-linear")
    assert set(lora.lora_layers(model)) == linear - {"lm_head"}


def test_all_linear_again_reaches_the_same_layers_and_no_scalar_head(model):
    lora.add_adapter(model, "a", targets="all-linear")
    lora.add_head(model, "a")
    lora.add_adapter(model, "b", targets="all-linear")
    layers = lora.lora_layers(model)
    assert all("b" in layer.lora_A for layer in layers.values())
    assert not any(isinstance(layer.base, lora.LoRALinear) for layer in layers.values())
    assert isinstance(model.heads["a"], nn.Linear)


def test_adapter_parameters_hold_the_head(model, targets):
    lora.add_adapter(model, "a", targets=targets)
    without = len(lora.adapter_parameters(model, "a"))
    assert without and not lora.has_head(model, "a")
    head = lora.add_head(model, "a")
    with_head = lora.adapter_parameters(model, "a")
    assert len(with_head) == without + 1 and lora.has_head(model, "a")
    assert any(p is head.weight for p in with_head)


def test_the_head_has_spread_one_over_sqrt_d_plus_one(model):
    """d = 32: over 200 heads the standard deviation is 1 / sqrt(33), known to within 4 sigma."""
    torch.manual_seed(0)
    values = torch.cat([lora.add_head(model, str(i)).weight.detach() for i in range(200)]).flatten()
    sigma = 1 / math.sqrt(33)
    assert abs(values.std().item() - sigma) < 4 * sigma / math.sqrt(2 * len(values))


# ------------------------------------------------------------------------------ scale and dtype


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 4.0)])
def test_rslora_divides_alpha_by_the_root_of_the_rank(kind, targets, tmp_path, rslora, scale):
    """alpha = 8, r = 4: 8 / 4 = 2, or 8 / sqrt(4) = 4."""
    model = trained(toy(kind), "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    other = toy(kind)
    lora.load_adapter(other, "b", tmp_path)
    lora.save_adapter(other, "b", tmp_path / "again")
    third = toy(kind)
    lora.load_adapter(third, "c", tmp_path / "again")
    for m, name in ((other, "b"), (third, "c")):
        assert {layer.scale[name] for layer in lora.lora_layers(m).values()} == {scale}


def test_an_adapter_stays_fp32_on_a_bf16_base_and_logits_stay_bf16(kind, targets):
    model = trained(toy(kind).to(torch.bfloat16), "a", targets)
    assert {p.dtype for p in lora.adapter_parameters(model, "a")} == {torch.float32}
    assert logits(model, "a").dtype == torch.bfloat16


# ------------------------------------------------------------------------------ refusals


def test_unknown_target_is_refused_and_named(model, targets):
    for unknown in (("no_such_layer",), (*targets, "no_such_layer")):
        with pytest.raises(ValueError, match="no_such_layer"):
            lora.add_adapter(model, "a", targets=unknown)
    assert not lora.lora_layers(model)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(model, targets, rank):
    with pytest.raises(ValueError, match="rank"):
        lora.add_adapter(model, "a", rank=rank, targets=targets)


def test_a_name_with_a_dot_is_refused(model, targets):
    """torch cannot keep a parameter under it."""
    with pytest.raises(ValueError, match="dot"):
        lora.add_adapter(model, "a.b", targets=targets)


@pytest.mark.parametrize("name", ["copy", "values", "update", "train"])
def test_a_name_that_torch_has_taken_works_or_is_refused_in_words(model, targets, name):
    """Parameters and heads are kept by name in containers, which have methods of their own."""
    try:
        trained(model, name, targets)
        lora.add_head(model, name)
    except ValueError as problem:
        assert name in str(problem)
        return
    assert not torch.allclose(logits(model, name), logits(model), atol=1e-3)


def test_a_name_in_use_is_refused_by_add(model, targets):
    trained(model, "a", targets)
    expected = logits(model, "a")
    with pytest.raises(ValueError, match="in use"):
        lora.add_adapter(model, "a", targets=targets)
    assert torch.equal(logits(model, "a"), expected)


def test_a_name_in_use_is_refused_by_load_and_copy(model, targets, tmp_path):
    trained(model, "a", targets)
    lora.add_adapter(model, "b", rank=2, targets=targets)
    lora.save_adapter(model, "b", tmp_path)
    expected = logits(model, "a")
    with pytest.raises(ValueError, match="in use"):
        lora.load_adapter(model, "a", tmp_path)
    with pytest.raises(ValueError, match="in use"):
        lora.copy_adapter(model, "b", "a")
    assert torch.equal(logits(model, "a"), expected)


def test_an_unknown_adapter_is_refused(model, targets, tmp_path):
    lora.add_adapter(model, "a", targets=targets)
    with pytest.raises(ValueError, match="nobody"), lora.use_adapter(model, "nobody"):
        pass
    with pytest.raises(ValueError, match="nobody"):
        lora.save_adapter(model, "nobody", tmp_path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(model, targets, tmp_path, missing):
    lora.add_adapter(model, "a", targets=targets)
    lora.save_adapter(model, "a", tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        lora.load_adapter(model, "b", tmp_path)


def test_other_shapes_are_refused_and_leave_no_adapter(kind, targets, tmp_path):
    model = trained(toy(kind), "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    wide = {k: torch.zeros(4, 40) if "lora_A" in k else t for k, t in tensors.items()}
    save_file(wide, file)
    other = toy(kind)
    with pytest.raises(ValueError, match="does not fit"):
        lora.load_adapter(other, "b", tmp_path)
    assert not lora.adapter_parameters(other, "b")


def test_an_adapter_of_another_architecture_is_refused(kind, targets, tmp_path):
    model = trained(toy(kind), "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        lora.load_adapter(toy("llama" if kind == "gpt2" else "gpt2"), "b", tmp_path)


def test_a_layer_with_only_one_of_A_and_B_is_refused(kind, targets, tmp_path):
    model = trained(toy(kind), "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError):
        lora.load_adapter(toy(kind), "b", tmp_path)


def rewrite(folder, change):
    """Changes what adapter_config.json in the folder says."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize("change, says", [
    ({"peft_type": "IA3"}, "IA3"), ({"peft_type": None}, "None"), ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"), ({"lora_bias": True}, "lora_bias"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [0]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_parameters": ["w"]}, "target_parameters"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"an_option_of_tomorrow": True}, "an_option_of_tomorrow"),
    ({"an_option_of_tomorrow": "fast"}, "an_option_of_tomorrow"),
    ({"an_option_of_tomorrow": 2}, "an_option_of_tomorrow"),
    ({"an_option_of_tomorrow": 0.5}, "an_option_of_tomorrow"),
    *(({"init_lora_weights": init}, init) for init in (
        "lora_ga", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica", "of_tomorrow")),
])
def test_what_is_not_covered_is_refused_by_name_and_leaves_no_adapter(
        model, targets, tmp_path, change, says):
    lora.add_adapter(model, "a", targets=targets)
    lora.save_adapter(model, "a", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        lora.load_adapter(model, "b", tmp_path)
    assert lora.names(model) == {"a"}


@pytest.mark.parametrize("change", [
    {"an_option_of_tomorrow": False}, {"an_option_of_tomorrow": None},
    {"an_option_of_tomorrow": {}}, {"an_option_of_tomorrow": []}, {"peft_version": "9.9"},
    {"init_lora_weights": None}, {"use_rslora": False}, {"layers_to_transform": [0, 1]},
])
def test_an_option_that_is_off_and_one_that_says_nothing_about_the_numbers_are_accepted(
        kind, targets, tmp_path, change):
    model = trained(toy(kind), "a", targets)
    lora.save_adapter(model, "a", tmp_path)
    rewrite(tmp_path, change)
    lora.load_adapter(model, "b", tmp_path)
    assert torch.equal(logits(model, "b"), logits(model, "a"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_not_taken_over(kind, targets, tmp_path, dropout):
    """In training mode, where checkpointing puts a model, two passes must agree."""
    model = trained(toy(kind), "a", targets, dropout=dropout)
    lora.save_adapter(model, "a", tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"]
    assert said == dropout
    other = toy(kind)
    lora.load_adapter(other, "b", tmp_path)
    lora.copy_adapter(other, "b", "c")
    expected = logits(other, "b")
    for layer in lora.lora_layers(other).values():
        layer.train()  # the adapter's dropout alone: GPT-2 has one of its own
    assert torch.equal(logits(other, "b"), expected) and torch.equal(logits(other, "c"), expected)
    for layer in lora.lora_layers(model).values():
        layer.train()
    assert torch.equal(logits(model, "a"), logits(model, "a")) == (dropout == 0)


# ------------------------------------------------------------------------------ alone

ALONE = """
import sys
sys.modules["transformers"] = None  # any import of it now fails
import pathlib, torch
from torch import nn
import lora

torch.manual_seed(0)
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

net, x, goal = network(), torch.randn(40, 6), torch.randn(40, 3)
lora.add_adapter(net, "new", rank=4, alpha=8)
lora.add_adapter(net, "second", rank=2, targets=["2"])
bare, base = net(x).detach(), {k: v.clone() for k, v in network().state_dict().items()}
optimizer, losses = torch.optim.AdamW(lora.adapter_parameters(net, "new"), lr=0.02), []
for _ in range(60):
    with lora.use_adapter(net, "new"):
        loss = (net(x) - goal).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
assert torch.equal(net(x), bare)
with lora.use_adapter(net, "second"):
    assert torch.equal(net(x), bare)
with lora.use_adapter(net, "new"):
    learnt = net(x).detach()

lora.copy_adapter(net, "new", "twin")
lora.save_adapter(net, "twin", "out", base="mine")
other = network()
lora.load_adapter(other, "read", "out")
with lora.use_adapter(other, "read"):
    assert torch.equal(other(x), learnt)
merged = lora.merge_adapter(other, "read")
assert torch.allclose(merged(x), learnt, atol=1e-5)
assert [type(module) for module in merged] == [nn.Linear, nn.Tanh, nn.Linear]
assert sys.modules["transformers"] is None
assert sorted(p.name for p in pathlib.Path().iterdir() if p.name != "__pycache__") == [
    "lora.py", "out"]
"""

def test_the_file_alone_works_on_a_plain_network_without_transformers(tmp_path):
    shutil.copy(ROOT / "lora.py", tmp_path)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr


# ------------------------------------------------------------------------------ peft


@pytest.mark.parametrize("which", ["usual", "all-linear"])
def test_peft_loads_what_was_written_here(kind, targets, tmp_path, which):
    peft = pytest.importorskip("peft")
    toy(kind).save_pretrained(tmp_path / "base")
    model = trained(toy(kind), "a", targets if which == "usual" else "all-linear")
    lora.save_adapter(model, "a", tmp_path / "a", base=tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert torch.allclose(theirs(IDS).logits, logits(model, "a"), atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("which", ["usual", "all-linear"])
def test_what_peft_wrote_loads_here(kind, targets, tmp_path, which, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, use_rslora=rslora, task_type="CAUSAL_LM",
        target_modules=list(targets) if which == "usual" else which,
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(toy(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    model = toy(kind)
    lora.load_adapter(model, "a", tmp_path)
    expected = theirs(IDS).logits.detach()
    assert torch.allclose(logits(model, "a"), expected, atol=1e-4)
    assert not torch.allclose(logits(model, None), expected, atol=1e-3)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_whatever_peft_writes_by_default_and_a_harmless_start_load_here(
        kind, targets, tmp_path, init):
    """All of LoraConfig's options stand in the file. After a start the weights are trained."""
    peft = pytest.importorskip("peft")
    options = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, lora_dropout=0.1,
                             task_type="CAUSAL_LM", target_modules=list(targets), **options)
    theirs = peft.get_peft_model(toy(kind), config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == init and len(written) > 30
    model = toy(kind)
    lora.load_adapter(model, "a", tmp_path)
    expected = theirs(IDS).logits.detach()
    assert torch.allclose(logits(model, "a"), expected, atol=1e-4)
    assert not torch.allclose(logits(model, None), expected, atol=1e-3)


def scores(model, name, rows):
    """Of rows of ids, whose first three are the prompt, padded here as a batch is."""
    x, x_mask = common.pad([row[:3] for row in rows], "left", "cpu")
    y, mask = common.pad([row[3:] for row in rows], "right", "cpu")
    return common.adapter_scores(model, name, x, x_mask, y, mask.float())


def test_a_reward_model_scores_the_same_in_peft(kind, targets, tmp_path):
    """Right-padded rows of unequal length through AutoModelForSequenceClassification + peft."""
    peft = pytest.importorskip("peft")
    toy(kind).save_pretrained(tmp_path / "base")
    model = trained(toy(kind), "reward", targets)
    lora.add_head(model, "reward")
    lora.save_adapter(model, "reward", tmp_path / "reward", base=tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "reward").eval()
    rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
    ids, attention = common.pad(rows, "right", "cpu")
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=attention).logits.squeeze(-1)
        ours = scores(model, "reward", rows)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert (ours[0] - ours[1]).abs() > 1e-3


def test_a_merged_reward_model_pads_with_a_token_that_no_text_has(tmp_path):
    """Where the end pads, as in Qwen: an ordinary token would be cut out of texts once it pads."""
    tokens = {token: i for i, token in enumerate([*ALPHABET, "<end>", "<start>"])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<end>", "<start>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>",
        additional_special_tokens=["<start>"])
    model = trained(toy("llama"), "adapter", ("q_proj",))
    lora.add_head(model, "adapter")
    model.resize_token_embeddings(len(tokens))
    model.generation_config.eos_token_id = tokens["<end>"]
    export.merge(model, tokenizer, "adapter", tmp_path / "merged")
    reader = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert reader.pad_token == "<start>" and reader("!! !").input_ids == tokenizer("!! !").input_ids
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert scorer.config.pad_token_id == tokens["<start>"]


def test_a_reward_model_made_by_peft_loads_here_with_its_head(kind, targets, tmp_path):
    peft = pytest.importorskip("peft")
    toy(kind).save_pretrained(tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs.config.pad_token_id = 0
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="SEQ_CLS",
        target_modules=list(targets),
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = toy(kind)
    lora.load_adapter(model, "reward", tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits.squeeze(-1)
        ours = scores(model, "reward", IDS.tolist())
    assert torch.allclose(ours, expected, atol=1e-4)
