"""Every family of models through every script: a random instance of a few thousand weights is made
from its config, saved to a folder and named by --model, as a real one would be."""

import functools
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from byte_tokenizer import CHAT, SIZE, TURN, byte_tokenizer
from conftest import random_model
from safetensors.torch import load_file

import common
import dpo
import grpo
import lora
import ppo
import reward_model
import sft
import trpo

SCRIPTS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "ppo": ppo, "trpo": trpo,
           "grpo": grpo}
LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=SIZE, hidden_size=32,
              max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(LAYERS, intermediate_size=48, num_key_value_heads=2)
GEMMA = dict(GROUPED, head_dim=8)
CAPPED = dict(GEMMA, sliding_window=8, final_logit_softcapping=3.0)
ODD_OPT = dict(word_embed_proj_dim=16, do_layer_norm_before=False)  # opt-350m
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT

# family: (its config, its tokenizer, what --lora-targets auto adapts)
QV = ("q_proj", "v_proj")
FAMILIES = {
    "llama": (hf.LlamaConfig(**GROUPED), dict(pad=None), QV),
    "mistral": (hf.MistralConfig(**GROUPED, sliding_window=8), dict(pad="<eos>"), QV),
    "qwen2": (hf.Qwen2Config(**GROUPED), dict(chat_template=CHAT, bos=None), QV),
    "qwen3": (hf.Qwen3Config(**GEMMA), dict(chat_template=CHAT, bos=None), QV),
    "smollm3": (hf.SmolLM3Config(**GROUPED), dict(chat_template=CHAT, pad="<turn>"), QV),
    "gpt2": (hf.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                           bos_token_id=2, eos_token_id=2), dict(pad=None, bos=None), ("c_attn",)),
    "opt": (hf.OPTConfig(**LAYERS, ffn_dim=48), dict(bos="<eos>"), QV),
    "opt-350m": (hf.OPTConfig(**LAYERS, ffn_dim=48, **ODD_OPT), dict(bos="<eos>"), QV),
    "gpt-neox": (hf.GPTNeoXConfig(**LAYERS, intermediate_size=48), dict(pad="<eos>", bos=None),
                 ("query_key_value",)),
    "gemma": (hf.GemmaConfig(**GEMMA), dict(chat_template=NO_SYSTEM), QV),
    "gemma2": (hf.Gemma2Config(**CAPPED), dict(chat_template="<bos>" + NO_SYSTEM), QV),
    "gemma3": (hf.Gemma3TextConfig(**CAPPED), dict(chat_template="<bos>" + NO_SYSTEM), QV),
    "phi": (hf.PhiConfig(**LAYERS, intermediate_size=48), dict(pad=None, bos=None), QV),
    "phi3": (hf.Phi3Config(**GROUPED), dict(chat_template=CHAT), ("qkv_proj",)),
}
EVERY = pytest.mark.parametrize("family", list(FAMILIES))

ROWS = [[5, 9, 44, 7, 30, 11], [8, 3, 144, 21], list(range(40, 61))]  # the last: beyond the windows
REWARD = "def f(prompts, responses, rows):\n    return [sum(map(ord, r)) % 7 for r in responses]\n"
RUN = ("--steps 2 --batch-size 4 --micro-batch-size 2 --lr 0.01 --max-length 96 --eval-size 2 "
       "--lora-rank 4 --lora-alpha 8 --device cpu --out out").split()


@functools.cache
def home(family, folder):
    """A model folder of the family; beside it two adapters, data and a reward function.

    Its generation_config names many ends of a turn, so that some answers end within four tokens."""
    model = random_model(FAMILIES[family][0])
    model.generation_config.eos_token_id = [2, *range(SIZE // 2, SIZE)]
    model.save_pretrained(folder / "model")
    byte_tokenizer(**FAMILIES[family][1]).save_pretrained(folder / "model")
    for name in ("reward", "policy"):
        lora.add_adapter(model, name, rank=4, alpha=8, targets=FAMILIES[family][2])
        disturb(model, name)
    lora.add_head(model, "reward")
    for name in ("reward", "policy"):
        lora.save_adapter(model, name, folder / name, base=folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": [{"role": "user", "content": f"Say {i * 97}"}], "response": f"yes {i}",
             "chosen": f"good {i}", "rejected": f"no, {i}", "split": "train" if i < 12 else "test"}
            for i in range(14)]
    rows[3]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    return {family: tmp_path_factory.mktemp(family) for family in FAMILIES}


@pytest.fixture
def house(family, homes, tmp_path, monkeypatch):
    folder = home(family, homes[family])
    monkeypatch.setattr(common.datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.chdir(tmp_path)
    return folder


def disturb(model, name, size=0.3):
    generator = torch.Generator().manual_seed(4)
    for layer in lora.lora_layers(model).values():
        for p in (layer.lora_A[name], layer.lora_B[name]):
            p.data.copy_(torch.randn(p.shape, generator=generator) * size)


@torch.no_grad()
def logits(model, rows=ROWS):
    """Of each row alone, unpadded, by the model's own forward."""
    return [model(torch.tensor([row])).logits[0] for row in rows]


# ------------------------------------------------------------------------------ scripts


def ratio_of_trpo(model, parameters, old, batch, args):
    """natural_step, and before it what ppo and grpo print themselves."""
    mask = batch["mask"]
    with torch.no_grad():
        scaled = trpo.policy_logits(model, batch, args)
    logp = trpo.token_logps(scaled, batch["ids"][:, -mask.shape[1] :])
    error = (((logp - batch["logp"]) * mask).exp() - 1).abs().max().item()
    print(f"|ratio - 1| {error},")
    return natural_step(model, parameters, old, batch, args)


natural_step = trpo.natural_step


@torch.no_grad()
def perplexity(model, tokenizer, rows):
    """Row by row, without padding, by the model's own loss."""
    nll = tokens = 0
    for row in rows:
        prompt, response = common.encode_pair(tokenizer, row["prompt"], row["response"], 96)
        labels = torch.tensor([[-100] * len(prompt) + response])
        nll += model(torch.tensor([prompt + response]), labels=labels).loss * len(response)
        tokens += len(response)
    return math.exp(nll / tokens)


def preference_loss(house, adapter, tokenizer, rows):
    """Of a new reward model, pair by pair, by AutoModelForSequenceClassification. On average over
    heads it lies above ln 2 by an eighth of the variance of r_w - r_l, which is not small here."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(house / "model", num_labels=1)
    head = load_file(Path(adapter, "adapter_model.safetensors"))["base_model.model.score.weight"]
    model.score.weight.data = head
    model.config.get_text_config().pad_token_id, loss = None, 0.0
    for row in rows:
        w, l = (model(torch.tensor([sum(common.encode_pair(tokenizer, row["prompt"], row[side], 96),
                                        [])])).logits.item() for side in ("chosen", "rejected"))
        loss += math.log1p(math.exp(l - w)) / len(rows)
    return loss


def run(script, house, *argv):
    """A run of two steps; returns metrics.jsonl."""
    reward = {"ppo": "reward", "trpo": "reward.py:f", "grpo": "reward.py:f"}.get(script)
    argv = ["--model", str(house / "model"), "--data", str(house / "data.jsonl"), *argv]
    argv += ["--max-new-tokens", "4"] if script != "reward_model" else []
    argv += ["--group-size", "2"] if script == "grpo" else []
    argv += ["--reward", str(house / reward)] if reward else []
    SCRIPTS[script].main([*RUN, *argv])
    out = argv[argv.index("--out") + 1] if "--out" in argv else "out"
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@EVERY
@pytest.mark.parametrize("script", list(SCRIPTS))
def test_a_run(family, script, house, capsys, monkeypatch):
    monkeypatch.setattr(trpo, "natural_step", ratio_of_trpo)
    rows = run(script, house)
    said = capsys.readouterr().out
    assert len(rows) == 2 and all(math.isfinite(x) for row in rows for x in row.values())
    assert rows[0]["grad_norm"] > 0

    # what must hold at the start
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(house / "model")
    test = [json.loads(line) for line in open(house / "data.jsonl")][12:]
    if script == "sft":
        assert rows[0]["perplexity"] == pytest.approx(perplexity(model, tokenizer, test), rel=1e-4)
        assert rows[1]["perplexity"] < rows[0]["perplexity"]
    elif script == "reward_model":
        run(script, house, "--steps", "1", "--lr", "0", "--out", "start")
        said = float(re.search(r"loss before training (\S+)", said)[1])
        assert said == pytest.approx(preference_loss(house, "start", tokenizer, test), abs=1e-3)
    elif script == "dpo":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=5e-6)
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    else:
        assert float(re.search(r"\|ratio - 1\| ([^,]+),", said)[1]) < 1e-4
        assert 0 < rows[0]["eos_rate"] <= 1 and rows[0]["score_std"] > 0

    # the adapter that was saved is the one that was trained: where auto puts it, and it does work
    paths = {key.split(".lora_")[0].rpartition(".")[2]
             for key in load_file("out/adapter_model.safetensors") if "lora_" in key}
    assert paths == set(FAMILIES[family][2])
    before = logits(model)
    lora.load_adapter(model, "policy", "out")
    with lora.use_adapter(model, "policy"):
        after = logits(model)
    assert max((a - b).abs().max() for a, b in zip(after, before)) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(logits(model), before))
    assert ("policy" in getattr(model, "heads", {})) == (script == "reward_model")


@EVERY
@pytest.mark.parametrize("script", ["ppo", "dpo"])
def test_gradient_checkpointing_changes_no_number(family, script, house):
    one, two = run(script, house), run(script, house, "--out", "again", "--grad-checkpoint")
    for a, b in zip(one, two):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-3, abs=1e-4)


# ------------------------------------------------------------------------------ functions


@EVERY
@torch.no_grad()
def test_log_probabilities_of_padded_rows_are_those_of_each_row_alone(family):
    model = random_model(FAMILIES[family][0])
    ids, attention = common.pad(ROWS, "left", "cpu")
    states = common.response_states(model, ids, attention, 3)
    got = common.per_token(model, states, partial(ppo.token_logps, temperature=0.7), ids[:, -3:])
    for i, (row, alone) in enumerate(zip(ROWS, logits(model))):
        for t in (-3, -2, -1):
            expected = (alone[t - 1].double() / 0.7).log_softmax(-1)[row[t]]
            assert got[i, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert got.std() > 0.1


@EVERY
@pytest.mark.parametrize("each", [1, 2])
def test_greedy_sampling_is_what_generate_says(family, each):
    """From prompts of unequal length, past the sliding windows, up to an end of turn."""
    model, n = random_model(FAMILIES[family][0]), 12
    free = common.sample(model, ROWS, [999], n, temperature=0)[0][:, -n:].tolist()
    assert len({token for row in free for token in row}) > 2
    stop = [free[0][4], free[1][7]]
    ids, _, mask = common.sample(model, ROWS, stop, n, temperature=0, each=each)
    model.generation_config.eos_token_id = stop
    for i, row in enumerate(r for r in ROWS for _ in range(each)):
        expected = model.generate(torch.tensor([row]), max_new_tokens=n, do_sample=False,
                                  pad_token_id=0)[0, len(row) :].tolist()
        assert ids[i, -mask.shape[1] :][mask[i] > 0].tolist() == expected


@EVERY
def test_all_linear_never_adapts_the_output_head(family):
    model = random_model(FAMILIES[family][0])
    linear = {path for path, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, hf.pytorch_utils.Conv1D))}
    lora.add_adapter(model, "a", targets="all-linear")
    assert set(lora.lora_layers(model)) == linear - {"lm_head"} != linear


def command(*argv):
    lora.main([*argv, "--device", "cpu"])


@EVERY
@torch.no_grad()
def test_a_merged_adapter_is_a_plain_model_that_a_pipeline_runs(family, house):
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    before = logits(model)
    lora.load_adapter(model, "policy", house / "policy")
    with lora.use_adapter(model, "policy"):
        adapted = logits(model)
        greedy = common.sample(model, ROWS[:1], [2, *range(SIZE // 2, SIZE)], 5, temperature=0)[0]
    command("merge", "--adapter", str(house / "policy"), "--out", "merged")
    merged = logits(hf.AutoModelForCausalLM.from_pretrained("merged"))
    assert max((a - b).abs().max() for a, b in zip(merged, adapted)) < 1e-4
    assert max((a - b).abs().max() for a, b in zip(merged, before)) > 1e-1
    pipe = hf.pipeline("text-generation", model="merged", device="cpu")
    text = pipe.tokenizer.decode(ROWS[0])
    [said] = pipe(text, max_new_tokens=5, do_sample=False, add_special_tokens=False)
    assert said["generated_text"] == pipe.tokenizer.decode(greedy[0], skip_special_tokens=True)


@EVERY
@torch.no_grad()
def test_a_merged_reward_model_scores_the_same_in_hugging_face_and_as_a_reward(family, house):
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(house / "model")
    prompts, answers = ["Who?", "And why is that so?"], ["I.", "Because."]
    rows = [sum(common.encode_pair(tokenizer, p, a, 96), []) for p, a in zip(prompts, answers)]
    ids, attention = common.pad(rows, "right", "cpu")
    lora.load_adapter(model, "reward", house / "reward")
    ours = common.sequence_scores(model, "reward", ids, attention)
    assert (ours[0] - ours[1]).abs() > 1e-2

    command("merge", "--adapter", str(house / "reward"), "--out", "scorer")
    scorer = hf.AutoModelForSequenceClassification.from_pretrained("scorer")
    reader = hf.AutoTokenizer.from_pretrained("scorer")
    assert scorer.config.num_labels == 1 and reader.pad_token_id == scorer.config.pad_token_id
    batch = reader.pad({"input_ids": rows}, return_tensors="pt")
    assert torch.allclose(scorer(**batch).logits[:, 0], ours, atol=1e-4)

    args = reward_model.parse_args([*RUN, "--model", "unused", "--data", "unused"])
    reward = common.load_reward("scorer", model, tokenizer, args)
    assert torch.allclose(reward(None, None, prompts, answers, None), ours, atol=1e-4)


# ------------------------------------------------------------------------------ peft


@EVERY
@torch.no_grad()
def test_a_policy_saved_here_computes_the_same_in_peft(family, house):
    peft = pytest.importorskip("peft")
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    lora.load_adapter(model, "policy", house / "policy")
    with lora.use_adapter(model, "policy"):
        ours = logits(model)
    theirs = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    theirs = peft.PeftModel.from_pretrained(theirs, house / "policy").eval()
    assert max((a - b).abs().max() for a, b in zip(logits(theirs), ours)) < 1e-4


@EVERY
@torch.no_grad()
def test_a_reward_model_trained_with_peft_scores_the_same_here(family, house):
    """As TRL makes them: all linear layers, rank-stabilised, the head as a module to save."""
    peft = pytest.importorskip("peft")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(house / "model", num_labels=1)
    theirs.config.get_text_config().pad_token_id = 0
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False,
                             target_modules="all-linear", task_type="SEQ_CLS")
    torch.manual_seed(2)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained("theirs")
    ids, attention = common.pad(ROWS, "right", "cpu")
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    lora.load_adapter(model, "reward", "theirs")
    ours = common.sequence_scores(model, "reward", ids, attention)
    expected = theirs(input_ids=ids, attention_mask=attention).logits[:, 0]
    assert torch.allclose(ours, expected, atol=1e-4) and ours.std() > 1e-2
