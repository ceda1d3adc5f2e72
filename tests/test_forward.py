"""The forward pass: what the sampler says and what `read` says, shared or joined, against the
model's own logits of every row alone and unpadded."""

import random

import pytest
import torch
import transformers as hf
from byte_tokenizer import byte_tokenizer
from conftest import random_model, toy

import common
import lora

# Three answers to each prompt: of one token, of seven, and some between. One prompt is one token.
PROMPTS = [[5, 9, 4, 7, 30, 11], [8], [6, 50, 31, 17, 9, 12, 40, 33]]
ANSWERS = [
    [[21, 2], [3], [44, 21, 7, 60, 9, 2]],
    [[50, 31, 17, 9, 12, 40, 2], [2], [13, 5]],
    [[33], [8, 30, 2], [61, 62, 63, 1, 4, 22, 2]],
]
N, G = len(ANSWERS), len(ANSWERS[0])
PAIRS = [(prompt, y) for prompt, answers in zip(PROMPTS, ANSWERS) for y in answers]
STOP = [2, *range(40, 50)]  # so many that sampled answers end at different tokens
T = 0.7

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    # The window is shorter than two of the prompts and than the longest answers.
    "mistral": hf.MistralConfig(**SIZES, sliding_window=4, attention_dropout=0.1),
    # Of these the logits are more than an output head: scaled, divided, capped.
    "cohere": hf.CohereConfig(**SIZES, logit_scale=4.0),
    "granite": hf.GraniteConfig(**SIZES, logits_scaling=0.25),
    "gemma2": hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=1.0),
    # Every second layer has a window that its cache knows nothing of.
    "gpt_neo": hf.GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4,
                               window_size=4, attention_types=[[["global", "local"], 1]],
                               max_position_embeddings=128, bos_token_id=1, eos_token_id=2),
    # These hold a recurrent state, FalconH1 in a layer that is a DynamicLayer by inheritance.
    "lfm2": hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "falcon_h1": hf.FalconH1Config(**SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
                                   mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
}
PLAIN = ["gpt2", "llama", "mistral"]
SCALED = ["cohere", "granite", "gemma2"]
HYBRID = ["lfm2", "falcon_h1"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: folder of a saved model}, made when asked for."""
    found = {}

    def folder(family):
        if family not in found:
            model = random_model(CONFIGS[family]) if family in CONFIGS else toy(family)
            for p in model.parameters() if family not in CONFIGS else ():
                p.data.mul_(4 if p.ndim > 1 else 1)  # as random_model: logits that differ
            found[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(found[family])
            byte_tokenizer().save_pretrained(found[family])
        return found[family]

    return folder


@pytest.fixture
def load(folders):
    """A function: the model of a family as common.load_model gives it, with an adapter "policy"."""
    def loaded(family):
        model, _ = common.load_model(folders(family), "cpu", "fp32")
        lora.add_adapter(model, "policy", rank=4, alpha=8)
        lora.add_head(model, "policy")
        generator = torch.Generator().manual_seed(4)
        for p in lora.adapter_parameters(model, "policy"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        return model

    return loaded


def padded(prompts=PROMPTS, answers=None, extra=2):
    """The batch x, x_mask, y, mask, with `extra` columns more than needed on either side. What
    stands under a mask of 0 is a token like another."""
    x, x_mask = common.pad(prompts, "left", "cpu")
    y, mask = common.pad(answers or [y for _, y in PAIRS], "right", "cpu")
    x, x_mask = (torch.nn.functional.pad(t, (extra, 0)) for t in (x, x_mask))
    y, mask = (torch.nn.functional.pad(t, (0, extra)) for t in (y, mask))
    return {"x": x.masked_fill(x_mask == 0, 4), "x_mask": x_mask,
            "y": y.masked_fill(mask == 0, 5), "mask": mask.float()}


def read(model, way, states=False):
    """common.read of the padded batch. way: "shared", as it is; "joined", with a prompt to each
    answer; "checkpointed", as it is, by a model under gradient checkpointing."""
    x, x_mask, y, mask = padded().values()
    if way == "joined":
        x, x_mask = x.repeat_interleave(G, 0), x_mask.repeat_interleave(G, 0)
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return common.read(model, x, x_mask, y, mask, states)


def alone(model, prompt, y):
    """The logits [R+1, V] of one row by the model's own forward: no padding, no cache, no mask."""
    return model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 :]


def logps(logits, y, temperature=T):
    """log softmax(logits / temperature)[y] of logits [..., R, V] and ids y [..., R]."""
    return (logits / temperature).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def calls(model):
    """[(shape of the ids, whether the model was in training mode)], a line a forward pass."""
    seen = []

    def note(module, given, named):
        ids = given[0] if given else named["input_ids"]
        seen.append((list(ids.shape), module.training))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def distance(got, expected):
    """|got - expected| / |expected| of two lists of tensors."""
    got, expected = (torch.cat([g.flatten() for g in grads]) for grads in (got, expected))
    assert expected.norm() > 0.1
    return ((got - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------ reading

SHARED, JOINED = [[N, 10], [N * G, 9]], [[N * G, 19]]  # ids of the passes: prompts 8, answers 7, 4
WAYS = [(f, way) for f in PLAIN for way in ("shared", "joined", "checkpointed")]
WAYS += [(f, way) for f in HYBRID for way in ("not shared", "checkpointed")]


@pytest.mark.parametrize("family, way", [*WAYS, *((f, w) for f in SCALED
                                                 for w in ("shared", "joined"))])
def test_log_probabilities_and_gradients_are_those_of_each_row_alone(load, family, way):
    """To 1e-5 each, the gradients relative to their norm, and by the passes that are meant."""
    model, weight = load(family), torch.randn(N * G, 9, generator=torch.Generator().manual_seed(5))
    parameters = lora.adapter_parameters(model, "policy")[:-1]
    with lora.use_adapter(model, "policy"):
        expected = [logps(alone(model, x, y)[:-1], torch.tensor(y)) for x, y in PAIRS]
        loss = sum((row * w[: len(row)]).sum() for row, w in zip(expected, weight))
        wanted = torch.autograd.grad(loss, parameters)
    seen = calls(model)
    with lora.use_adapter(model, "policy"):
        logits = read(model, way)
        got = logps(logits[:, :-1], padded()["y"])
        gradient = torch.autograd.grad((got * padded()["mask"] * weight).sum(), parameters)
    assert [shape for shape, _ in seen] == (SHARED if way == "shared" else JOINED)
    assert logits.shape == (N * G, 10, 64)
    for row, e in zip(got, expected):
        assert torch.allclose(row[: len(e)], e, rtol=0, atol=1e-5)
    assert torch.cat(expected).std() > 0.05
    assert distance(gradient, wanted) < 1e-5


@pytest.mark.parametrize("family, way", WAYS)
def test_column_t_has_read_the_prompt_and_t_answer_tokens(load, family, way):
    """Logits and states of every column, the last real one included, which a reward head reads."""
    model = load(family)
    with torch.no_grad(), lora.use_adapter(model, "policy"):
        logits, states = read(model, way), read(model, way, states=True)
        assert states.shape == (N * G, 10, 32)
        for i, (x, y) in enumerate(PAIRS):
            out = model(torch.tensor([x + y]), output_hidden_states=True)
            for got, whole in ((logits, out.logits), (states, out.hidden_states[-1])):
                expected = whole[0, len(x) - 1 :]
                assert torch.allclose(got[i, : len(y) + 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, way", WAYS)
def test_gradients_through_the_states_are_those_of_each_row_alone(load, family, way):
    """Of a critic or a reward model: its head, too."""
    model, weight = load(family), torch.randn(N * G, 10, generator=torch.Generator().manual_seed(5))
    parameters = lora.adapter_parameters(model, "policy")
    with lora.use_adapter(model, "policy"):
        loss = 0.0
        for (x, y), w in zip(PAIRS, weight):
            hidden = model(torch.tensor([x + y]), output_hidden_states=True).hidden_states[-1]
            values = model.heads["policy"](hidden[0, len(x) - 1 :]).squeeze(-1)
            loss = loss + (values * w[: len(values)]).sum()
        wanted = torch.autograd.grad(loss, parameters)
        values = model.heads["policy"](read(model, way, states=True)).squeeze(-1)
        real = torch.nn.functional.pad(padded()["mask"], (1, 0), value=1.0)
        gradient = torch.autograd.grad((values * real * weight).sum(), parameters)
    assert distance(gradient, wanted) < 1e-5


@pytest.mark.parametrize("family", HYBRID)
def test_a_recurrent_state_is_never_shared(load, family):
    """Not even where its layer inherits from one that could be."""
    model = load(family)
    assert not common.can_share(model, hf.DynamicCache(config=model.config))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_answer_to_a_prompt_is_one_pass_without_a_cache(load, family):
    model = load(family)
    seen, batch = calls(model), padded(answers=[answers[0] for answers in ANSWERS])
    with torch.no_grad():
        logits = common.read(model, *batch.values())
        assert [shape for shape, _ in seen] == [[3, 10 + 9]]
        for i, (x, answers) in enumerate(zip(PROMPTS, ANSWERS)):
            y = answers[0]
            assert torch.allclose(logits[i, : len(y) + 1], alone(model, x, y), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("family", [*PLAIN, "lfm2"])
def test_checkpointed_layers_run_again_in_the_backward_pass_with_their_adapter(load, family):
    model, adapters = load(family), []
    lora.copy_adapter(model, "policy", "other")
    layers = lora.lora_layers(model).values()
    for layer in layers:
        layer.lora_B["other"].data.neg_()
        layer.register_forward_pre_hook(lambda layer, _: adapters.append(layer.active))
    with lora.use_adapter(model, "policy"):
        loss = logps(read(model, "checkpointed")[:, :-1], padded()["y"]).sum()
        assert adapters == ["policy"] * len(layers)
        loss.backward()
    assert adapters == ["policy"] * 2 * len(layers)
    assert all(layer.lora_A["policy"].grad.abs().sum() > 0 for layer in layers)


@pytest.mark.parametrize("family", PLAIN)
def test_training_mode_is_on_only_for_a_checkpointed_pass_with_gradient(load, family):
    """Also where the model was left in another mode: by hand, or by the pass before."""
    model = load(family)
    seen, (x, x_mask, y, mask) = calls(model), padded().values()

    def modes():
        seen.clear()
        common.read(model, x, x_mask, y, mask)
        common.read(model, x, x_mask, y, mask, states=True)
        with torch.no_grad():
            common.read(model, x, x_mask, y, mask)
            common.read(model, x, x_mask, y, mask, states=True)
        common.sample(model, x, x_mask, [999], 3, T)
        return [training for _, training in seen]

    assert modes() == [False] * (2 * 2 + 2 * 2 + 3)  # shared
    model.train()
    assert modes() == [False] * 11
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert modes() == [True] * 2 + [False] * (2 * 2 + 3)  # joined, and shared again
    assert modes() == [True] * 2 + [False] * 7
    assert all(module.training == model.training for module in model.modules())


@pytest.mark.parametrize("family", PLAIN)
def test_sampling_is_the_same_under_checkpointing(load, family):
    model, batch = load(family), padded()

    def sampled():
        generator = torch.Generator().manual_seed(0)
        return common.sample(model, batch["x"], batch["x_mask"], STOP, 6, T, generator, G)

    before = sampled()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    read(model, "shared").sum().backward()  # leaves the model in training mode
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(sampled(), before))


# ------------------------------------------------------------------------------ micro-batches


def random_batch(n=5, g=3, seed=1):
    """A batch of n prompts with g answers each, of all lengths, and one number per answer."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(64) for _ in range(draw.randint(1, 9))] for _ in range(n)]
    answers = [[draw.randrange(64) for _ in range(draw.randint(1, 9))] for _ in range(n * g)]
    batch = padded(prompts, answers)
    batch["logp_old"] = torch.arange(n * g * batch["y"].shape[1]).view(n * g, -1) * 1.0
    batch["adv"] = torch.arange(n * g) * 1.0
    return batch, prompts, answers


@pytest.mark.parametrize("groups", [None, torch.tensor([3, 0, 4]), torch.tensor([2])])
@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 100, None])
def test_micro_batches_hold_every_answer_of_the_groups_once_beside_its_prompt(g, size, groups):
    batch, prompts, answers = random_batch(g=g)
    parts, seen = list(common.micro_batches(batch, size, groups)), []
    for rows, part in parts:
        assert part.keys() == batch.keys() and 0 < len(rows) <= (size or 15)
        assert len(part["y"]) % len(part["x"]) == 0
        share = len(part["y"]) // len(part["x"])
        for i, row in enumerate(rows.tolist()):
            x, x_mask = part["x"][i // share], part["x_mask"][i // share]
            assert x[x_mask == 1].tolist() == prompts[row // g]
            assert part["y"][i][part["mask"][i] == 1].tolist() == answers[row]
            R = part["y"].shape[1]
            assert torch.equal(part["logp_old"][i], batch["logp_old"][row, :R])
            assert part["adv"][i] == row
        seen += rows.tolist()
    chosen = range(5) if groups is None else groups.tolist()
    assert sorted(seen) == sorted(k * g + i for k in chosen for i in range(g))
    assert size is not None or len(parts) == 1


@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 100, None])
def test_micro_batches_have_no_column_that_none_of_their_rows_needs(g, size):
    """And rows of a length together: the longest answer of a part never gets shorter."""
    batch, _, _ = random_batch(g=g)
    longest = []
    for rows, part in common.micro_batches(batch, size):
        assert part["x_mask"][:, 0].any() and part["mask"][:, -1].any()
        longest.append(max(batch["mask"].sum(1).view(-1, g).amax(1)[rows // g].tolist()))
    assert longest == sorted(longest)


@pytest.mark.parametrize("g, size, parts", [
    (4, 8, [8, 8, 4]), (4, 7, [4] * 5), (4, 3, [3, 1] * 5), (4, 1, [1] * 20), (1, 2, [2, 2, 1])])
def test_a_micro_batch_is_whole_groups_or_a_piece_of_one(g, size, parts):
    batch, _, _ = random_batch(g=g)
    assert [len(rows) for rows, _ in common.micro_batches(batch, size)] == parts


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("size", [1, 2, 3, 6, None])
def test_gradients_of_micro_batches_add_up_to_those_of_each_row_alone(load, family, size):
    """Of a mean over the tokens of the batch: each part's own mean, weighted by its tokens. Parts
    of 1 and 2 split the groups of 3."""
    model, tokens = load(family), sum(len(y) for _, y in PAIRS)
    parameters = lora.adapter_parameters(model, "policy")[:-1]
    with lora.use_adapter(model, "policy"):
        loss = sum(logps(alone(model, x, y)[:-1], torch.tensor(y)).sum() for x, y in PAIRS)
        wanted = torch.autograd.grad(loss / tokens, parameters)
        gradient = [torch.zeros_like(p) for p in parameters]
        for _, b in common.micro_batches(padded(), size):
            logits = common.read(model, b["x"], b["x_mask"], b["y"], b["mask"])
            mean = (logps(logits[:, :-1], b["y"]) * b["mask"]).sum() / b["mask"].sum()
            for total, g in zip(gradient, torch.autograd.grad(mean, parameters)):
                total += g * b["mask"].sum() / tokens
    assert distance(gradient, wanted) < 1e-5


# ------------------------------------------------------------------------------ the sampler


def drawn(model, temperature=T, each=G, seed=3, stop=STOP, n=9, prompts=PROMPTS):
    """(y, mask, logp, entropy) of a sampled batch."""
    batch = padded(prompts)
    generator = torch.Generator().manual_seed(seed)
    return common.sample(
        model, batch["x"], batch["x_mask"], stop, n, temperature, generator, each)


@pytest.mark.parametrize("family", [*PLAIN, *SCALED, "gpt_neo", *HYBRID])
@pytest.mark.parametrize("each", [1, G])
@pytest.mark.parametrize("temperature", [0, T, 1.0])
@torch.no_grad()
def test_the_sampler_s_numbers_are_those_of_each_row_alone(load, family, each, temperature):
    """log pi of the token, and the entropy of what it was drawn from; greedy at temperature 1."""
    model, scale = load(family), temperature or 1.0
    with lora.use_adapter(model, "policy"):
        y, mask, logp, entropy = drawn(model, temperature, each)
        assert y.shape == mask.shape == logp.shape == entropy.shape == (N * each, mask.shape[1])
        for i in range(N * each):
            n = int(mask[i].sum())
            logits = alone(model, PROMPTS[i // each], y[i, :n].tolist())[:-1]
            expected = logps(logits, y[i, :n], scale)
            assert torch.allclose(logp[i, :n], expected, rtol=0, atol=1e-5)
            q = (logits.double() / scale).softmax(-1)
            assert torch.allclose(entropy[i, :n].double(), -(q * q.log()).sum(-1), atol=1e-5)
            if temperature == 0:
                assert torch.equal(y[i, :n], logits.argmax(-1))
    if temperature and each == G:
        assert len(set(mask.sum(1).tolist())) > 2  # some end early, and not all at once


@pytest.mark.parametrize("family", PLAIN)
@torch.no_grad()
def test_the_scorer_agrees_with_the_sampler_on_what_it_drew(load, family):
    """log pi / pi_old is 0 before any update: read shared and joined, whole and in parts."""
    model = load(family)
    with lora.use_adapter(model, "policy"):
        y, mask, logp, _ = drawn(model)
        batch = {**padded(), "y": y, "mask": mask}
        for each in (G, 1):
            x, x_mask = (batch[key].repeat_interleave(G // each, 0) for key in ("x", "x_mask"))
            got = logps(common.read(model, x, x_mask, y, mask)[:, :-1], y) * mask
            assert torch.allclose(got, logp, rtol=0, atol=1e-5)
        for rows, b in common.micro_batches(batch, 2):
            got = logps(common.read(model, b["x"], b["x_mask"], b["y"], b["mask"])[:, :-1], b["y"])
            expected = logp[rows, : b["y"].shape[1]]
            assert torch.allclose(got * b["mask"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family, each", [
    ("gpt2", 1), ("gpt2", 4), ("llama", 1), ("llama", 4), ("tiny", 4)])
@torch.no_grad()
def test_in_bf16_the_scorer_agrees_with_the_sampler_on_average(folders, family, each):
    """Not token by token: bf16 keeps 8 bits, and the two add up in another order. The mean of
    |log pi / pi_old| stays below 2^-7, one unit in the last place of 1."""
    model, _ = common.load_model("tiny" if family == "tiny" else folders(family), "cpu", "bf16")
    assert model.dtype == torch.bfloat16
    y, mask, logp, _ = drawn(model, 1.0, each, stop=[999], n=16)
    for share in (each, 1):  # shared, then joined
        x, x_mask = (padded()[key].repeat_interleave(each // share, 0) for key in ("x", "x_mask"))
        got = logps(common.read(model, x, x_mask, y, mask)[:, :-1].float(), y, 1.0)
        assert ((got - logp) * mask).abs().sum() / mask.sum() < 2**-7
    assert logp.dtype == torch.float32 and mask.all()


@pytest.mark.parametrize("family", [*PLAIN, "lfm2"])
@pytest.mark.parametrize("temperature", [0, T])
def test_everything_is_0_after_the_first_stop_token(load, family, temperature):
    """Which itself is counted: mask 1, with its log-probability."""
    model = load(family)
    free = drawn(model, temperature, stop=[999])[0]
    stop = [free[0, 2].item(), free[4, 5].item()]
    y, mask, logp, entropy = drawn(model, temperature, stop=stop)
    for i, row in enumerate(free.tolist()):
        n = next((t + 1 for t, token in enumerate(row) if token in stop), 9)
        assert mask[i].tolist() == [1.0] * n + [0.0] * (mask.shape[1] - n)
        assert y[i, :n].tolist() == row[:n]
        assert (entropy[i, :n] > 0).all() and (logp[i, :n] < 0).all()
        for tensor in (y, mask, logp, entropy):
            assert not tensor[i, n:].any()
    assert len(set(mask.sum(1).tolist())) > 1
    ended = [bool(set(row) & set(stop)) for row in free.tolist()]
    assert common.ended(y, mask, stop).tolist() == ended and any(ended)


def test_sampling_ends_as_soon_as_all_rows_have_ended(model):
    free = drawn(model, 0, 2, stop=[999], n=1, prompts=PROMPTS[:1])[0]
    seen = calls(model)
    y, mask, _, _ = drawn(model, 0, 2, stop=free[0].tolist(), n=50, prompts=PROMPTS[:1])
    assert torch.equal(y, free) and mask.tolist() == [[1.0], [1.0]] and len(seen) == 1


@pytest.mark.parametrize("family", ["mistral", *HYBRID, "gpt_neo"])
def test_greedy_sampling_is_what_generate_says(load, family):
    """Two answers to each prompt, which are then the same, and far longer than the windows."""
    model = load(family)
    model.generation_config.eos_token_id = None
    y, mask, _, _ = drawn(model, 0, 2, stop=[999], n=12)
    assert mask.all() and len(set(y.flatten().tolist())) > 3
    for i, prompt in enumerate(PROMPTS):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                             pad_token_id=0)[0, len(prompt) :]
        assert torch.equal(y[2 * i], ids) and torch.equal(y[2 * i + 1], ids)


@pytest.mark.parametrize("family", [*PLAIN, *HYBRID])
def test_the_sampler_reads_a_prompt_once_for_its_answers(load, family):
    """A recurrent state, too: without a gradient it can be repeated."""
    model = load(family)
    seen = calls(model)
    drawn(model, stop=[999], n=3)
    assert [shape for shape, _ in seen] == [[N, 10], [N * G, 1], [N * G, 1]]


@pytest.mark.parametrize("family", [*PLAIN, *HYBRID])
def test_what_has_ended_leaves_the_batch_and_changes_no_other_answer(load, family):
    """With the commonest token as the end, against a run in which nothing ends."""
    model = load(family)
    whole, _, logp, entropy = drawn(model, stop=[999], n=10)
    stop = whole[:, 2:6].flatten().mode().values.item()
    seen = calls(model)
    y, mask, *found = drawn(model, stop=[stop], n=10)
    rows = [shape[0] for shape, _ in seen]
    assert rows[0] == N and rows[1] == N * G > min(rows[1:]) and rows[1:] == sorted(rows[1:])[::-1]
    R = y.shape[1]
    assert torch.equal(y, (whole[:, :R] * mask).long()) and 1 <= mask.sum(1).min() < R
    for part, full in zip(found, (logp, entropy)):
        torch.testing.assert_close(part, full[:, :R] * mask, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def chi_square(model, y, temperature):
    """Of the two tokens of the rows y [n, 2] against softmax(logits / temperature), exactly."""
    V, n, total = 6, len(y), 0.0
    first = (model(torch.tensor([[1, 3]])).logits[0, -1].double() / temperature).softmax(-1)
    for a in range(V):
        logits = model(torch.tensor([[1, 3, a]])).logits[0, -1].double()
        second = (logits / temperature).softmax(-1)
        for b in range(V):
            expected = n * (first[a] * second[b]).item()
            seen = ((y[:, 0] == a) & (y[:, 1] == b)).sum().item()
            total += (seen - expected) ** 2 / expected
    return total


@pytest.mark.parametrize("each", [1, 4000])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_softmax_of_logits_over_temperature(kind, temperature, each):
    """36 pairs, 35 degrees of freedom: above 76 with probability 1e-4. The next temperature
    is told apart, so the test has power."""
    model = toy(kind, vocabulary=6)
    model.lm_head.weight.data.mul_(10)
    prompts = [[1, 3]] * (4000 // each)
    y, mask, logp, entropy = drawn(model, temperature, each, 0, [999], 2, prompts)
    assert mask.shape == (4000, 2)
    assert chi_square(model, y, temperature) < 76
    assert chi_square(model, y, temperature * 1.4) > 150
    # So the mean surprise is the mean entropy, within four standard errors.
    excess = -logp - entropy
    assert abs(excess.sum()) < 4 * excess.square().sum().sqrt()


def test_sampling_ignores_the_generation_config(model):
    """top_k = 1 would make every row alike, a penalty would change the ids."""
    free = drawn(model, 1.0, 7, stop=[999])
    config = model.generation_config
    config.do_sample, config.top_k, config.top_p, config.repetition_penalty = True, 1, 0.1, 5.0
    config.temperature, config.max_new_tokens, config.eos_token_id = 0.1, 1, [*range(64)]
    assert all(torch.equal(a, b) for a, b in zip(drawn(model, 1.0, 7, stop=[999]), free))
    assert len({tuple(row) for row in free[0].tolist()}) > 10


def test_the_same_generator_seed_gives_the_same_ids_and_leaves_other_generators_alone(model):
    def ids(seed):
        torch.manual_seed(random.randrange(10**6))
        state = torch.get_rng_state()
        y = drawn(model, 1.0, seed=seed, stop=[999])[0]
        assert torch.equal(torch.get_rng_state(), state)
        return y

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


def test_what_was_sampled_can_be_kept_for_a_backward_pass(model):
    """Tensors made under inference_mode could not."""
    _, _, logp, entropy = drawn(model)
    weight = torch.ones_like(logp, requires_grad=True)
    (weight * logp * entropy).sum().backward()
    assert torch.equal(weight.grad, logp * entropy) and not logp.requires_grad
