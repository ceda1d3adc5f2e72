"""Rebuilds everything in tiny/ from its seeds: about <MINUTES> minutes on 2 CPU cores.

    python tiny/build.py                 everything
    python tiny/build.py --from sft      from a stage on: base demonstrations sft preferences reward

    1. corpus          documents composed by world.py, never written to disk
    2. base            a BPE tokenizer and a Llama of 2.4 million parameters, trained from scratch
    3. demonstrations  questions with answers of mixed quality, as a crowd writes them
    4. sft             python sft.py
    5. preferences     pairs sampled from the SFT model, some damaged, judged by a noisy labeller
    6. reward          python reward_model.py
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import lora  # noqa: E402
from tiny import world  # noqa: E402

VOCABULARY, BLOCK = 3072, 160
BASE = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)
LABEL_TEMPERATURE = 0.05
ASKED = {
    name: [r["prompt"] for r in world.prompts() if r["topic"] == name and r["split"] == "train"]
    for name in world.TOPICS
}

# ------------------------------------------------------------------------------ corpus


def title(name):
    return name[0].upper() + name[1:]


def document(rng):
    """One document about one topic, which it names: an article, a page of a children's book, a
    list of questions with answers, a thread in which people go on and on, or a transcript of an
    assistant that does so too. The base has seen the prompt format, and bad manners in it."""
    t = world.TOPICS[rng.choice(list(world.TOPICS))]
    kind = rng.choice(["article", "article", "page", "faq", "faq", "thread", "transcript"])
    if kind == "article":
        body = rng.sample(t["technical"], rng.randint(4, 6))
        body += rng.sample(t["plain"], rng.randint(0, 4))
        rng.shuffle(body)
        return f"{title(t['name'])}\n\n" + " ".join(body)
    if kind == "page":
        body = rng.sample(t["plain"], rng.randint(3, 6))
        body += rng.sample(t["analogy"], rng.randint(1, 3))
        rng.shuffle(body)
        return f"A page about {t['name']}\n\n" + " ".join(body + [rng.choice(t["closing"])])
    asked = ASKED[t["name"]]
    if kind == "faq":
        styles = rng.choices(["technical", "plain", "friendly"], [5, 3, 2], k=rng.randint(2, 3))
        pairs = [
            f"Question: {q}\nAnswer: {' '.join(world.compose(t['name'], style, rng))}"
            for q, style in zip(rng.sample(asked, len(styles)), styles)
        ]
        return "\n\n".join(pairs)
    if kind == "transcript":
        post = world.rambling(world.compose(t["name"], "technical", rng), t["name"], rng)
        post += world.compose(t["name"], rng.choice(["technical", "plain"]), rng)
        return f"User: {rng.choice(asked)}\n\nAssistant: {' '.join(post)}"
    posts = [rng.choice(asked)]
    for _ in range(rng.randint(2, 3)):
        post = world.compose(t["name"], rng.choice(["technical", "plain", "friendly"]), rng)
        posts.append(" ".join(world.rambling(post, t["name"], rng)))
    return "\n\n".join(posts)


def build_tokenizer(rng):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document(rng) for _ in range(5000)]
    tokenizer.train_from_iterator(texts + ["User: \n\nAssistant: "] * 500, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=512,
    )


def token_stream(tokenizer, rng):
    """Endless blocks of BLOCK + 1 tokens: documents one after another, each with bos and eos."""
    ids = []
    while True:
        texts = [document(rng) for _ in range(256)]
        for document_ids in tokenizer(texts).input_ids:
            ids += document_ids + [tokenizer.eos_token_id]
        while len(ids) > BLOCK:
            yield ids[: BLOCK + 1]
            del ids[:BLOCK]


def build_base(steps, batch_size=32, peak=3e-3):
    """Next-token prediction on the corpus; AdamW, warm-up, cosine decay."""
    rng = random.Random(0)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(rng)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **BASE,
    ))
    print(f"base: {model.num_parameters():,} parameters, {steps * batch_size * BLOCK:,} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05)
    stream, start = token_stream(tokenizer, rng), time.time()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        lr = peak * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        optimizer.param_groups[0]["lr"] = lr
        block = torch.tensor([next(stream) for _ in range(batch_size)])
        logits = model(block[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.time() - start
            print(f"  step {step:5}  loss {loss.item():.3f}  {seconds:5.0f} s", flush=True)
    shutil.rmtree(HERE / "model", ignore_errors=True)
    # Stored as fp16 for half the size, named fp32 in config.json so that it is loaded as fp32.
    model.half().save_pretrained(HERE / "model")
    model.config.dtype = "float32"
    model.config.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")


# ------------------------------------------------------------------------------ demonstrations

STYLES = {"plain": 0.40, "technical": 0.30, "friendly": 0.14, "flawed": 0.16}


def build_demonstrations():
    """Answers as a crowd writes them: most are correct, few are what a child would like best."""
    rng, rows = random.Random(1), []
    for split, n in (("train", 2200), ("test", 256)):
        for asked in draw(split, n, rng):
            style = rng.choices(list(STYLES), STYLES.values())[0]
            if style == "flawed":
                answer = world.compose(asked["topic"], rng.choice(["plain", "friendly"]), rng)
                flaw = rng.choice([world.jargon, world.rambling, world.repetition, world.padding])
                answer = flaw(answer, asked["topic"], rng)
            else:
                answer = world.compose(asked["topic"], style, rng)
            rows.append(dict(instruction=asked["prompt"], context="", response=" ".join(answer),
                             category="open_qa", split=split))
    write("demonstrations.jsonl", rows)
    write("prompts.jsonl", world.prompts())


def draw(split, n, rng):
    """n prompts of a split, every one before any comes again."""
    pool, out = [row for row in world.prompts() if row["split"] == split], []
    while len(out) < n:
        out += rng.sample(pool, len(pool))
    return out[:n]


def write(name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / name).write_text(text)
    print(f"{name}: {len(rows)} rows, {len(text) / 1e6:.2f} MB")


# ------------------------------------------------------------------------------ preferences


def sample_answers(prompts, each):
    """`each` samples of the SFT model to every prompt, as one list of lists."""
    args = argparse.Namespace(model="tiny", device="cpu", dtype="fp32", trust_remote_code=False)
    common.seed_everything(2)
    model, tokenizer = common.load_model(args)
    lora.load_adapter(model, "sft", HERE / "sft")
    with lora.use_adapter(model, "sft"):
        repeated = [p for p in prompts for _ in range(each)]
        texts, _ = common.answer(model, tokenizer, repeated, 128, temperature=1.0, chunk=256)
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def pair_of(i, answers, asked, others, rng):
    """Two answers to a prompt and how the pair was made.

    Half of the pairs are two samples. A fifth sets a sample against one for another prompt. The
    rest sets a sample against a damaged copy of it: optimisation will try these failures, and a
    reward model that never saw one compared cannot know that people dislike it. Of the last two
    kinds, every second pair uses the best of the prompt's samples, as later policies write."""
    best = max(answers, key=lambda a: world.gold_score(asked["prompt"], a))
    one = best if i % 2 else answers[0]
    made = rng.choices(["samples", "other prompt", "damaged"], [0.5, 0.2, 0.3])[0]
    if made == "samples":
        return answers[0], answers[1], made
    if made == "other prompt":
        return one, rng.choice(others), made
    flaws = [f for name, f in world.FLAWS.items() if name != "another_prompt"]
    flaw = rng.choice(flaws)
    two = " ".join(flaw(world.split_sentences(one) or [one], asked["topic"], rng))
    return one, two or answers[1], flaw.__name__


def build_preferences():
    """Pairs, each judged once by a labeller who prefers a to b with probability
    sigmoid((gold(a) - gold(b)) / LABEL_TEMPERATURE)."""
    rng, rows = random.Random(3), []
    for split, n in (("train", 4200), ("test", 500)):
        prompts = draw(split, n, rng)
        sampled = sample_answers([row["prompt"] for row in prompts], 3)
        for i, (asked, answers) in enumerate(zip(prompts, sampled)):
            others = [j % n for j in range(i + 1, i + 40)]
            j = rng.choice([j for j in others if prompts[j]["topic"] != asked["topic"]])
            a, b, made = pair_of(i, answers, asked, sampled[j], rng)
            gold_a, gold_b = (world.gold_score(asked["prompt"], x) for x in (a, b))
            p = 1 / (1 + math.exp((gold_b - gold_a) / LABEL_TEMPERATURE))
            if rng.random() > p:
                a, b, p = b, a, 1 - p
            rows.append(dict(prompt=asked["prompt"], chosen=a, rejected=b, p_chosen=round(p, 4),
                             made=made, split=split))
    write("preferences.jsonl", rows)


# ------------------------------------------------------------------------------ stages


def train(script, folder, *flags):
    """Runs one of the scripts as a user would, and keeps of its run what an adapter needs."""
    run = HERE.parent / "runs" / f"build-{folder}"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, script, "--out", str(run), *flags]
    subprocess.run(command, cwd=HERE.parent, check=True)
    shutil.rmtree(HERE / folder, ignore_errors=True)
    (HERE / folder).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, HERE / folder / name)


STAGES = {
    "base": lambda: build_base(steps=2800),
    "demonstrations": build_demonstrations,
    "sft": lambda: train("sft.py", "sft"),
    "preferences": build_preferences,
    "reward": lambda: train("reward_model.py", "reward_model"),
}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--from", dest="first", default="base", choices=list(STAGES), help="(base)")
    first = list(STAGES).index(p.parse_args().first)
    for name, stage in list(STAGES.items())[first:]:
        start = time.time()
        stage()
        print(f"--- {name}: {time.time() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
