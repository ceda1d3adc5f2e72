"""What every script needs, whatever its algorithm: a model, its tokens, one forward pass, sampling.

Shapes: N prompts x [N, P], padded on the left; B = N G answers y [B, R], padded on the right, the G
answers to one prompt next to each other. Masks are 1 on real tokens and are made from lengths,
never from `ids == pad`: in many models the padding token is also the token that ends an answer.
"""

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig

import lora

TINY = Path(__file__).parent / "tiny"
WORTH = 100  # tokens that reading a prompt once must save, because it takes a second pass

# ------------------------------------------------------------------------------ the model


def load_pretrained(auto, name, **more):
    """auto.from_pretrained of "tiny", a hub id, a folder or a .gguf file; or a ValueError."""
    path = TINY / "model" if name in ("tiny", "tiny/model") else Path(name)
    if str(name).startswith(("/", ".", "~", "runs/", "tiny/")) and not path.exists():
        raise ValueError(f"{name}: no such file or folder")
    source = path if path.exists() else name
    if path.suffix == ".gguf":
        source, more["gguf_file"] = path.parent, path.name
    try:
        return auto.from_pretrained(source, **more)
    except Exception as problem:  # transformers, safetensors and the hub each raise their own
        reason = str(problem).strip().split("\n")[0]
        raise ValueError(f"cannot load {name} ({reason}); give tiny, a .gguf, a folder or "
                         "hub id with safetensors (with code: --trust-remote-code)") from problem


def load_model(name="tiny", device="auto", dtype="auto", trust_remote_code=False):
    """(model, tokenizer) of "tiny", a Hugging Face id, a folder, or a .gguf file, or a ValueError.

    device: auto, cpu, cuda, mps; dtype: auto (bf16 on cuda), fp32, bf16. Nothing is unpickled. All
    dropout rates become 0: two log-probabilities of a token must not differ by a dice roll."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    device = (gpu.type if gpu else "cpu") if device == "auto" else device
    if device not in ("cpu", gpu and gpu.type):
        raise ValueError(f"the device {device} is not available here; use cpu")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtypes["auto"] = dtypes["bf16" if device == "cuda" else "fp32"]
    more = {"trust_remote_code": trust_remote_code, "dtype": dtypes[dtype]}
    tokenizer = load_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    if not tokenizer("a").input_ids:  # what transformers makes where its files are missing
        raise ValueError(f"{name} has no tokenizer")
    if end_of_turn(tokenizer) is None:
        raise ValueError(f"the tokenizer of {name} has no EOS token: no answer could end")
    if str(name).endswith(".gguf"):  # unpacked to plain linear layers, which can take an adapter
        more["quantization_config"] = GgufConfig(dequantize=True)
    model, info = load_pretrained(AutoModelForCausalLM, name, use_safetensors=True,
                                  output_loading_info=True, **more)
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ValueError(f"{name} lacks the weight {min(info['missing_keys'])}")
    model.name_or_path = "tiny/model" if name == "tiny" else str(name)
    for values in map(vars, [model.config, *model.modules()]):  # nn.Dropout.p, layerdrop ...
        rates = [key for key in values if "drop" in key or key == "p"]
        values.update({key: 0.0 for key in rates if isinstance(values[key], float)})
    return model.to(device).eval(), tokenizer


# ------------------------------------------------------------------------------ text to tokens


def end_of_turn(tokenizer):
    """The token that closes an answer: what the chat template writes there, else EOS."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "@@"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("@@")[2]
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        return next((i for i in ids if i in special), tokenizer.eos_token_id)
    return tokenizer.eos_token_id


def stop_ids(model, tokenizer):
    """Every token that ends an answer: EOS, the end of a turn, and the model's own list."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *eos} - {None})


def prompt_text(prompt):
    """A prompt as one string: itself, or the contents of its messages, one below the other."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, a string or a list of messages, up to where the answer begins."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template:
        # The template writes its special tokens itself; adding them would double BOS.
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    # A model without a template reads plain turns. The first word of the answer brings its space.
    text = "".join(f"{t['role'].capitalize()}: {t['content']}\n\n" for t in turns) + "Assistant:"
    ids = tokenizer(text, split_special_tokens=True).input_ids
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def encode_response(tokenizer, response, end=None):
    """Token ids of an answer and its end of turn. A text that spells a special token, such as
    "</s>", stays text: as a token it would end the answer before its end."""
    end = end_of_turn(tokenizer) if end is None else end
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    if tokenizer.chat_template:
        return tokenizer(response, **plain).input_ids + [end]
    head = tokenizer("Assistant:", **plain).input_ids  # cut off again; its space stays
    return tokenizer("Assistant: " + response, **plain).input_ids[len(head):] + [end]


def encode(tokenizer, rows, answers, max_length):
    """[(row, prompt ids, [ids of row[key] for each key in answers])]. A long prompt loses its
    beginning. A cut answer would teach the model to stop in mid-sentence: its row is left out."""
    found, end = [], end_of_turn(tokenizer)
    for row in rows:
        x = encode_prompt(tokenizer, row["prompt"])
        ys = [encode_response(tokenizer, row[key], end) for key in answers]
        room = max_length - max(map(len, ys))
        if room > 0:
            found.append((row, x[-room:], ys))
    return found


def collate(encoded, device):
    """The batch x, x_mask, y, mask of what `encode` returns, the answers of a row side by side."""
    x, x_mask = pad([x for _, x, _ in encoded], "left", device)
    y, mask = pad([y for _, _, ys in encoded for y in ys], "right", device)
    return {"x": x, "x_mask": x_mask, "y": y, "mask": mask.float()}


def decode(tokenizer, y, mask):
    """The texts of answers y [B, R], without padding and special tokens."""
    # Without a template the space after "Assistant:" is no part of the answer: decode both at once.
    before = "" if tokenizer.chat_template else "Assistant:"
    head = tokenizer(before, add_special_tokens=False).input_ids if before else []
    rows = [head + ids[: int(n)] for ids, n in zip(y.tolist(), mask.sum(1))]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text.removeprefix(before).removeprefix(" ") if before else text for text in texts]


def pad(sequences, side, device):
    """(ids, mask), both [N, T], of lists of token ids. Any padding id will do: here it is 0."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    both = ids, [torch.ones_like(row) for row in ids]
    return [pad_sequence(rows, True, padding_side=side).to(device) for rows in both]


# ------------------------------------------------------------------------------ the forward pass


def checkpointing(model):
    """Whether layers now run under checkpointing: they do once enabled, and only with gradient."""
    on = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return torch.is_grad_enabled() and any(on)


def forward(model, ids, attention, keep, states=False, cache=None):
    """Logits [B, keep, V] of the last `keep` columns of ids [B, T], or their states [B, keep, d].
    attention [B, C + T] also covers the C columns that are in the cache."""
    # Positions are counted from the first real token. Counted in columns, a prompt that is padded
    # on the left would sit at other positions than the same prompt alone.
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    # Transformers ties checkpointing to training mode. Dropout is 0, so nothing else changes.
    if model.training != checkpointing(model):
        model.train(not model.training)
    given = {"input_ids": ids, "attention_mask": attention, "position_ids": positions,
             "past_key_values": cache, "use_cache": cache is not None}
    if states:
        return model.base_model(**given).last_hidden_state[:, -keep:]
    # The model's own forward makes the logits: Gemma caps them, Cohere and Granite scale them.
    return model(**given, logits_to_keep=keep).logits


def can_share(model, cache):
    """Whether the cache of a prompt can be repeated for several answers, and passes gradients."""
    # By exact type: a layer with a recurrent state inherits from these, and its state would not be
    # repeated. Under checkpointing transformers drops the cache, and only warns.
    plain = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    exact = all(type(layer).__name__ in plain for layer in cache.layers)
    return exact and not checkpointing(model)


def read(model, x, x_mask, y, mask, states=False):
    """Logits [B, R+1, V] after the prompt and after each answer token, or the states [B, R+1, d].

    x, x_mask [N, P]: prompts; y, mask [B, R]: their B = N G answers. Column t has read the prompt
    and t answer tokens, so it predicts answer token t (counted from 0). The last column has read
    the whole answer. The G answers to a prompt share one reading of it, where that saves much."""
    G, R = len(y) // len(x), y.shape[1]
    attention = torch.cat([x_mask.repeat_interleave(G, 0), mask.long()], 1)  # [B, P+R]
    cache = DynamicCache(config=model.config)
    if (len(y) - len(x)) * x.shape[1] < WORTH or not can_share(model, cache):
        ids = torch.cat([x.repeat_interleave(G, 0), y], 1)  # [B, P+R]
        return forward(model, ids, attention, R + 1, states)
    # The prompt is read once, with gradient. Its keys and values are then repeated for the G
    # answers, and what the answers send back through them adds up there.
    first = forward(model, x, x_mask, 1, states, cache).repeat_interleave(G, 0)  # [B, 1, ...]
    cache.batch_repeat_interleave(G)
    rest = forward(model, y, attention, R, states, cache)  # [B, R, ...]
    return torch.cat([first, rest], 1)


def micro_batches(batch, size=None, groups=None):
    """(answer numbers, part of the batch), at most `size` answers at a time, of all or some groups.

    batch: tensors "x" and "x_mask" with a row per prompt, others with a row per answer. A part is
    whole groups, the shortest first and cut to what they need, or a piece of one group."""
    N, B = len(batch["x"]), len(batch["y"])
    groups, G = torch.arange(N) if groups is None else groups, B // N
    size = min(size or B, -(-len(groups) // processes()[1]) * G)  # or a process's share
    length = batch["mask"].sum(1).long().cpu()  # [B]
    longest = length.view(N, G).amax(1)[groups]  # [n]
    for some in groups[longest.argsort(stable=True)].split(max(1, size // G)):
        P = int(batch["x_mask"][some].sum(1).max())
        answers = (some.unsqueeze(1) * G + torch.arange(G)).flatten()
        for rows in answers.split(size):
            R, part = int(length[rows].max()), {}
            for key, value in batch.items():
                if key in ("x", "x_mask"):
                    part[key] = value[some][:, -P:]
                else:
                    part[key] = value[rows][:, :R] if value.dim() > 1 else value[rows]
            yield rows, part


# ------------------------------------------------------------------------------ sampling


@torch.no_grad()
def sample(model, x, x_mask, stop, max_new_tokens, temperature, generator=None, G=1):
    """G answers to each prompt x [N, P], drawn from softmax(logits / temperature) and nothing else:
    no top-p, top-k or penalty, whatever the model's generation config says. temperature 0: greedy.

    Returns y, mask, logp, entropy, all [B, R], 0 after the end. mask is 1 up to and including the
    first stop token; logp is log pi(y_t), and entropy that of what y_t was drawn from, in nats."""
    # One random number for each token, all drawn before the first is needed: so a token depends
    # neither on how many other answers still go on, nor on the process that draws it.
    shape = G * len(x), max_new_tokens  # B, T
    u = torch.rand(shape, generator=generator) if temperature > 0 else torch.zeros(shape)
    u, stop = u.to(x.device), torch.tensor(stop, device=x.device)
    y = torch.zeros(shape, dtype=x.dtype, device=x.device)
    mask, logp, entropy = (torch.zeros(shape, device=x.device) for _ in range(3))
    # Each prompt is read once, and its state repeated for its G answers. `rows` are the numbers of
    # the b answers in the batch: at first all of this process.
    mine = list(share(range(len(x))))
    rows = torch.tensor([i * G + g for i in mine for g in range(G)], dtype=torch.long)
    x, x_mask = x[mine or [0]], x_mask[mine or [0]]  # without any, one is read and nothing drawn
    cache, copies = DynamicCache(config=model.config), torch.arange(len(x)).repeat_interleave(G)
    logits = forward(model, x, x_mask, 1, cache=cache)[copies]  # [b, 1, V]
    cache.reorder_cache(copies)
    attention = x_mask[copies]  # [b, P]
    for t in range(max_new_tokens if mine else 0):
        logps = (logits[:, -1].float() / (temperature or 1.0)).log_softmax(-1)  # [b, V]
        p = logps.exp()
        if temperature == 0:
            token = logps.argmax(-1, keepdim=True)  # [b, 1]
        else:
            # The first token whose cumulated probability exceeds the random number.
            cdf = p.cumsum(-1)
            token = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True)
            token = token.clamp(max=cdf.shape[1] - 1)
        y[rows, t], mask[rows, t] = token[:, 0], 1.0
        logp[rows, t] = logps.gather(1, token)[:, 0]  # log pi_old of the token
        entropy[rows, t] = torch.special.entr(p).sum(-1)
        left = (~torch.isin(token[:, 0], stop)).nonzero()[:, 0]
        if len(left) == 0 or t + 1 == max_new_tokens:
            break
        if len(left) < len(rows):  # what has ended leaves the batch
            cache.reorder_cache(left)
            rows, token, attention = rows[left.cpu()], token[left], attention[left]
        attention = torch.cat([attention, torch.ones_like(token)], 1)
        logits = forward(model, token, attention, 1, cache=cache)  # [b, 1, V]
    y, mask, logp, entropy = map(add_up, (y, mask, logp, entropy))
    R = int(mask.sum(1).max())  # tokens of the longest answer
    return y[:, :R], mask[:, :R], logp[:, :R], entropy[:, :R]


def ended(y, mask, stop):
    """[B] bool: whether the last real token of each answer y [B, R] is a stop token."""
    last = y.gather(1, (mask.sum(1, keepdim=True) - 1).long()).squeeze(1)
    return torch.isin(last, torch.tensor(stop, device=y.device))


@torch.no_grad()
def score(model, tokenizer, rows, x, x_mask, y, mask, reward, size=None):
    """(score [B], texts) of answers y [B, R] to the prompts of B data rows. reward: an adapter with
    a head, `size` answers a pass, or (prompts, responses, rows) -> B floats, else a ValueError."""
    responses, scores = decode(tokenizer, y, mask), torch.zeros(len(y), device=y.device)
    # A reward model on this base reads the ids as they were sampled, a function reads the texts.
    if isinstance(reward, str):
        for index, b in share(micro_batches(dict(x=x, x_mask=x_mask, y=y, mask=mask), size)):
            scores[index] = adapter_scores(model, reward, **b)
        return add_up(scores), responses
    index = list(share(range(len(rows))))
    asked, said = [rows[i] for i in index], [responses[i] for i in index]
    numbers = reward([prompt_text(row["prompt"]) for row in asked], said, asked) if asked else []
    found = torch.tensor([float(number) for number in numbers], device=y.device)
    if len(found) != len(asked) or not found.isfinite().all():
        raise ValueError(f"the reward returned {numbers} for {len(asked)} responses")
    scores[index] = found
    return add_up(scores), responses


def adapter_scores(model, name, x, x_mask, y, mask):
    """The score [B] of each answer: the head of `name` reads the state after its last token."""
    with lora.use_adapter(model, name):
        states = read(model, x, x_mask, y, mask, states=True)  # [B, R+1, d]
    last = mask.sum(1).long()  # column t has read t answer tokens
    return model.heads[name](states[torch.arange(len(y)), last].float()).squeeze(-1)


# ------------------------------------------------------------------------------ data and processes


def processes():
    """(number of this process, how many there are); torchrun says, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """Every K-th item: what this one of K processes does. Without torchrun, all of them."""
    return itertools.islice(items, processes()[0], None, processes()[1])


def add_up(x, largest=False):
    """The sum of a tensor over all processes (in place) or of a float, or the largest of them."""
    if isinstance(x, float):
        return add_up(torch.tensor(x, dtype=torch.float64), largest).item()
    if processes()[1] > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


def add_gradients(parameters):
    """Sums the gradients, each of a share of the batch, over all processes."""
    if processes()[1] > 1:
        for p in parameters:
            p.grad = add_up(torch.zeros_like(p) if p.grad is None else p.grad)


def batch_rows(step, n, size, seed):
    """Row numbers of a step. Each pass over the n rows is shuffled anew."""
    generator, passes = torch.Generator().manual_seed(seed), (step + 1) * size // n + 1
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(passes)])
    return order[step * size : (step + 1) * size].tolist()


def learning_rate(step, steps, peak, warmup=0.0):
    """Linear warm-up over the share `warmup` of the steps, then linear decay to 0."""
    up = max(1, round(warmup * steps)) if warmup else 0
    return peak * ((step + 1) / up if step < up else (steps - step) / max(1, steps - up))
