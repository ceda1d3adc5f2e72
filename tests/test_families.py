"""Every family of models through every script: a random instance of a few thousand weights is made
from its config, saved to a folder and named by --model, as a real one would be."""

import functools
import json
import math
import re
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf
from byte_tokenizer import CHAT, SIZE, byte_tokenizer
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
from cli import export, rewards

SCRIPTS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "ppo": ppo, "trpo": trpo,
           "grpo": grpo}
LAYERS = dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=SIZE, hidden_size=32,
              max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(LAYERS, intermediate_size=48, num_key_value_heads=2)
GEMMA = dict(GROUPED, head_dim=8)
CAPPED = dict(GEMMA, sliding_window=8, final_logit_softcapping=3.0)
ODD_OPT = dict(word_embed_proj_dim=16, do_layer_norm_before=False)  # opt-350m
SCALED = dict(embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3,
              logits_scaling=4.0)  # Granite divides its logits, Cohere multiplies them
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
    "cohere": (hf.CohereConfig(**GROUPED, logit_scale=0.5), dict(chat_template="<bos>" + CHAT),
               QV),
    "granite": (hf.GraniteConfig(**GROUPED, **SCALED), dict(chat_template=CHAT, pad="<eos>"), QV),
}
SCORERS = [family for family in FAMILIES if family not in ("cohere", "granite")]
EVERY = pytest.mark.parametrize("family", list(FAMILIES))
WITH_SCORER = pytest.mark.parametrize("family", SCORERS)  # AutoModelForSequenceClassification's

ROWS = [[5, 9, 44, 7, 30, 11], [8, 3, 144, 21], list(range(40, 61))]  # the last: beyond the windows
ENDS = [2, *range(SIZE // 2, SIZE)]  # so many that some answers end within four tokens
REWARD = "def f(prompts, responses, rows):\n    return [sum(map(ord, r)) % 7 for r in responses]\n"
RUN = ("--steps 2 --batch-size 4 --lr 0.01 --max-length 96 --eval-size 2 --lora-rank 4 "
       "--lora-alpha 8 --device cpu").split()


@functools.cache
def home(family, folder):
    """A model folder of the family; beside it two adapters, data and a reward function."""
    model = random_model(FAMILIES[family][0])
    model.generation_config.eos_token_id = ENDS
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
    if NO_SYSTEM not in FAMILIES[family][1].get("chat_template", ""):
        rows[3]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    return {family: tmp_path_factory.mktemp(family) for family in FAMILIES}


@pytest.fixture
def house(family, homes, tmp_path, monkeypatch):
    folder = home(family, homes[family])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
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


@torch.no_grad()
def perplexity(model, tokenizer, rows):
    """Row by row, without padding, by the model's own loss."""
    nll = tokens = 0
    for _, prompt, [response] in common.encode(tokenizer, rows, ["response"], 96):
        labels = torch.tensor([[-100] * len(prompt) + response])
        nll += model(torch.tensor([prompt + response]), labels=labels).loss * len(response)
        tokens += len(response)
    return math.exp(nll / tokens)


@torch.no_grad()
def preference_loss(family, house, model, tokenizer, rows):
    """Of a new reward model, pair by pair, by AutoModelForSequenceClassification where there is
    one. On average over heads it lies above ln 2 by an eighth of the variance of r_w - r_l, which
    is not small here."""
    reward_model.make_models(model, reward_model.Config(lora_rank=4))
    head, loss = model.heads["reward"].weight, 0.0
    scorer = None
    if family in SCORERS:
        scorer = hf.AutoModelForSequenceClassification.from_pretrained(
            house / "model", num_labels=1)
        scorer.score.weight.data = head
        scorer.config.get_text_config().pad_token_id = None

    def score(ids):
        ids = torch.tensor([ids])
        if scorer:
            return scorer(ids).logits.item()
        return (head @ model.base_model(ids).last_hidden_state[0, -1]).item()

    for _, prompt, answers in common.encode(tokenizer, rows, ["chosen", "rejected"], 96):
        w, l = (score(prompt + answer) for answer in answers)
        loss += math.log1p(math.exp(l - w)) / len(rows)
    return loss


def run(script, house):
    """metrics.jsonl of a run of two steps."""
    argv = ["--model", str(house / "model"), "--data", str(house / "data.jsonl"), "--out", "out"]
    reward = {"ppo": "reward", "trpo": "reward.py:f", "grpo": "reward.py:f"}.get(script)
    argv += ["--max-new-tokens", "4"] if script != "reward_model" else []
    argv += ["--group-size", "2"] if script == "grpo" else []
    argv += ["--reward", str(house / reward)] if reward else []
    SCRIPTS[script].main([*RUN, *argv])
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


@EVERY
@pytest.mark.parametrize("script", list(SCRIPTS))
def test_a_run(family, script, house, capsys):
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
        start = float(re.search(r"loss before training (\S+)", said)[1])
        other = hf.AutoModelForCausalLM.from_pretrained(house / "model")
        expected = preference_loss(family, house, other, tokenizer, test)
        assert start == pytest.approx(expected, abs=1e-3)
    elif script == "dpo":
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=5e-6)
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    else:
        assert rows[0]["log_ratio_max"] < 1e-4
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
    assert lora.has_head(model, "policy") == (script == "reward_model")


# ------------------------------------------------------------------------------ functions


def as_batch(G):
    """x, x_mask, y, mask of ROWS with G answers each: of 12 tokens, of one, and between."""
    lengths = [12, 1, 7, 3, 5, 12]
    generator = torch.Generator().manual_seed(7)
    ys = [torch.randint(3, SIZE, (lengths[i],), generator=generator).tolist()
          for i in range(len(ROWS) * G)]
    x, x_mask = common.pad(ROWS, "left", "cpu")
    y, mask = common.pad(ys, "right", "cpu")
    return x, x_mask, y, mask.float()


def alone(model, x_mask, x, y, mask, i, temperature=0.7):
    """(log-probabilities, entropies, states) of answer i, read with its prompt and nothing else."""
    n, at = int(mask[i].sum()), i // (len(y) // len(x))
    prompt, answer = x[at][x_mask[at] > 0], y[i, :n]
    ids = torch.cat([prompt, answer]).unsqueeze(0)
    logps = (model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    states = model.base_model(ids).last_hidden_state[0, len(prompt) - 1 :]
    return logps.gather(1, answer[:, None])[:, 0], -(logps.exp() * logps).sum(1), states


def adapted(house):
    """The family as it is loaded, without dropout, with an adapter that matters."""
    model, _ = common.load_model(str(house / "model"), "cpu")
    lora.add_adapter(model, "policy", rank=4, alpha=8)
    disturb(model, "policy")
    return model


def gradients(model):
    """One vector, and the gradients are gone."""
    parameters = lora.adapter_parameters(model, "policy")
    found = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return found


@EVERY
def test_shared_joined_and_checkpointed_are_each_answer_alone_with_its_states_and_gradients(
        family, house):
    """The truth is the model's own forward of one row at a time, unpadded."""
    model = adapted(house)
    x, x_mask, y, mask = as_batch(G=2)
    assert common.can_share(model, hf.DynamicCache(config=model.config))
    joined = [part.repeat_interleave(2, 0) for part in (x, x_mask)]
    with lora.use_adapter(model, "policy"):
        truth = [alone(model, x_mask, x, y, mask, i) for i in range(len(y))]
        sum(logp.sum() + states.square().mean() for logp, _, states in truth).backward()
        expected = gradients(model)
    size = max(states.abs().max().item() for _, _, states in truth)
    for prompts, checkpointing in ((x, x_mask), False), (joined, False), ((x, x_mask), True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            assert not common.can_share(model, hf.DynamicCache(config=model.config))
        with lora.use_adapter(model, "policy"):
            found = common.read(model, *prompts, y, mask)
            logp = ppo.token_logps(found[:, :-1], y, 0.7)
            loss = (logp * mask).sum()
            states = common.read(model, *prompts, y, mask, states=True)
            for i, (of_tokens, _, of_states) in enumerate(truth):
                n = len(of_tokens)
                assert (logp[i, :n] - of_tokens).abs().max() < 1e-5
                assert (states[i, : n + 1] - of_states).abs().max() < 1e-5 * max(1, size)
                loss = loss + states[i, : n + 1].square().mean()
            loss.backward()
        assert (gradients(model) - expected).norm() < 1e-5 * expected.norm()
    assert torch.cat([logp for logp, _, _ in truth]).std() > 0.1 and expected.norm() > 0.1


@EVERY
@torch.no_grad()
def test_the_sampler_reports_what_each_answer_has_alone(family, house):
    """Two answers a prompt, past the sliding windows, some of which end before the others."""
    model, stop = adapted(house), list(range(0, SIZE, 12))
    x, x_mask = common.pad(ROWS, "left", "cpu")
    with lora.use_adapter(model, "policy"):
        y, mask, logp, entropy = common.sample(
            model, x, x_mask, stop, 16, 0.7, torch.Generator().manual_seed(0), G=2)
        for i in range(len(y)):
            n = int(mask[i].sum())
            of_tokens, spread, _ = alone(model, x_mask, x, y, mask, i)
            assert (logp[i, :n] - of_tokens).abs().max() < 1e-5
            assert (entropy[i, :n] - spread).abs().max() < 1e-4
            assert logp[i, n:].abs().sum() == 0 and (y[i, n:] == 0).all()
            assert n == 16 or y[i, n - 1].item() in stop
            assert not set(y[i, : n - 1].tolist()) & set(stop)
    assert len(set(mask.sum(1).tolist())) > 1


@EVERY
def test_greedy_sampling_is_what_generate_says(family):
    """From prompts of unequal length, past the sliding windows, up to an end of turn."""
    model, n = random_model(FAMILIES[family][0]), 12
    x, x_mask = common.pad(ROWS, "left", "cpu")
    free = common.sample(model, x, x_mask, [999], n, 0)[0].tolist()
    assert len({token for row in free for token in row}) > 2
    stop = [free[0][4], free[1][7]]
    y, mask, _, _ = common.sample(model, x, x_mask, stop, n, 0)
    model.generation_config.eos_token_id = stop
    for i, row in enumerate(ROWS):
        expected = model.generate(torch.tensor([row]), max_new_tokens=n, do_sample=False,
                                  pad_token_id=0)[0, len(row) :].tolist()
        assert y[i][mask[i] > 0].tolist() == expected


@EVERY
def test_all_linear_never_adapts_the_output_head(family):
    model = random_model(FAMILIES[family][0])
    linear = {path for path, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, hf.pytorch_utils.Conv1D))}
    head = {path for path, module in model.named_modules()
            if module is model.get_output_embeddings()}
    lora.add_adapter(model, "a", targets="all-linear")
    assert len(head) == 1 and set(lora.lora_layers(model)) == linear - head != linear


# ------------------------------------------------------------------------------ merging


def command(*argv):
    export.main([*argv, "--device", "cpu"])


@EVERY
@torch.no_grad()
def test_a_merged_adapter_is_a_plain_model_that_a_pipeline_runs(family, house):
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    before = logits(model)
    lora.load_adapter(model, "policy", house / "policy")
    with lora.use_adapter(model, "policy"):
        adapted = logits(model)
        x, x_mask = common.pad(ROWS[:1], "left", "cpu")
        y, mask, _, _ = common.sample(model, x, x_mask, ENDS, 5, 0)
    command("merge", "--adapter", str(house / "policy"), "--out", "merged")
    merged = logits(hf.AutoModelForCausalLM.from_pretrained("merged"))
    assert max((a - b).abs().max() for a, b in zip(merged, adapted)) < 1e-4
    assert max((a - b).abs().max() for a, b in zip(merged, before)) > 1e-1
    pipe = hf.pipeline("text-generation", model="merged", device="cpu")
    text = pipe.tokenizer.decode(ROWS[0])
    [said] = pipe(text, max_new_tokens=5, do_sample=False, add_special_tokens=False)
    greedy = ROWS[0] + y[0][mask[0] > 0].tolist()
    assert said["generated_text"] == pipe.tokenizer.decode(greedy, skip_special_tokens=True)


def pairs_scored(model, tokenizer):
    """(data rows, ids, scores here) of two short dialogues, by the adapter "reward"."""
    rows = [{"prompt": "Who?", "response": "I."},
            {"prompt": "And why is that so?", "response": "Because."}]
    encoded = common.encode(tokenizer, rows, ["response"], 96)
    b = common.collate(encoded, "cpu")
    scores = common.adapter_scores(model, "reward", b["x"], b["x_mask"], b["y"], b["mask"])
    assert (scores[0] - scores[1]).abs() > 1e-2
    return rows, [prompt + answer for _, prompt, [answer] in encoded], scores


@WITH_SCORER
@torch.no_grad()
def test_a_merged_reward_model_scores_the_same_in_hugging_face_and_as_a_reward(family, house):
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(house / "model")
    lora.load_adapter(model, "reward", house / "reward")
    rows, ids, ours = pairs_scored(model, tokenizer)

    command("merge", "--adapter", str(house / "reward"), "--out", "scorer")
    scorer = hf.AutoModelForSequenceClassification.from_pretrained("scorer")
    reader = hf.AutoTokenizer.from_pretrained("scorer")
    assert scorer.config.num_labels == 1 and reader.pad_token_id == scorer.config.pad_token_id
    batch = reader.pad({"input_ids": ids}, return_tensors="pt")
    assert torch.allclose(scorer(**batch).logits[:, 0], ours, atol=1e-4)

    args = Namespace(reward="scorer", trust_remote_code=False)
    reward = rewards.load(args, model, 96)
    texts = [[row[key] for row in rows] for key in ("prompt", "response")]
    assert torch.allclose(torch.tensor(reward(*texts, rows)), ours, atol=1e-4)


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_where_hugging_face_has_no_scorer_a_reward_model_is_not_merged(family, house, capsys):
    """But its scores here are right: the head on the state of the last token, alone."""
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(house / "model")
    lora.load_adapter(model, "reward", house / "reward")
    _, ids, ours = pairs_scored(model, tokenizer)
    with torch.no_grad(), lora.use_adapter(model, "reward"):
        for row, score in zip(ids, ours):
            state = model.base_model(torch.tensor([row])).last_hidden_state[0, -1]
            assert model.heads["reward"](state).item() == pytest.approx(score.item(), abs=1e-5)

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command("merge", "--adapter", str(house / "reward"), "--out", "scorer")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "AutoModelForSequenceClassification" in error and not list(Path().iterdir())


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


@WITH_SCORER
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
    expected = theirs(input_ids=ids, attention_mask=attention).logits[:, 0]
    model = hf.AutoModelForCausalLM.from_pretrained(house / "model")
    lora.load_adapter(model, "reward", "theirs")
    x, x_mask = common.pad([row[:3] for row in ROWS], "left", "cpu")
    y, mask = common.pad([row[3:] for row in ROWS], "right", "cpu")
    ours = common.adapter_scores(model, "reward", x, x_mask, y, mask.float())
    assert torch.allclose(ours, expected, atol=1e-4) and ours.std() > 1e-2
