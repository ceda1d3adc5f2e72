"""Rebuilds everything in tiny/ from its seeds, in some 70 minutes on 2 CPU cores.

    python tiny/build.py                 everything
    python tiny/build.py --from sft      from a stage on

    1. base            a BPE tokenizer and a Llama of 2.3 million parameters, from scratch, on
                       documents that are composed from world.py as they are read
    2. ranking         more of it, with more transcripts of an assistant, and which of two answers
                       is whole and which is broken
    3. demonstrations  questions with answers of mixed quality, as a crowd writes them
    4. sft             python sft.py
    5. preferences     pairs of answers of the SFT model, half of them with a damaged
                       copy, judged by a noisy labeller
    6. reward          python reward_model.py
"""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import lora  # noqa: E402
import reward_model  # noqa: E402
from cli import flags  # noqa: E402
from cli.chat import answer  # noqa: E402
from tiny import world  # noqa: E402

VOCABULARY, BLOCK = 3072, 160
BASE = dict(hidden_size=224, intermediate_size=512, num_hidden_layers=3, num_attention_heads=7)
LABEL_TEMPERATURE = 0.12

# ------------------------------------------------------------------------------ corpus


def title(name):
    return name[0].upper() + name[1:]


def question(name, rng):
    """One of a topic's questions, in a wording that the base may read."""
    found = rng.choice(world.TOPICS[name]["questions"])
    return rng.choice(found["ask"] + found["read"])


def ask(name, rng):
    """A prompt about a topic, of those that the base may read; half of them are questions."""
    return question(name, rng) if rng.random() < 0.5 else rng.choice(world.general_prompts(name)[0])


def careless(prompt, rng):
    """A prompt as somebody in a hurry types it: with words left out, in small letters, without the
    mark at its end. A base that has read only whole questions learns them by heart, and understands
    no others."""
    words = prompt.split()
    if rng.random() < 0.5:
        words = [word for word in words if rng.random() > 0.15] or words
    prompt = " ".join(words)
    prompt = prompt.lower() if rng.random() < 0.5 else prompt
    return prompt.rstrip(".?") if rng.random() < 0.5 else prompt


def ask_elsewhere(rng):
    """A prompt about something that no topic is about, with one of some 300 things in it: the base
    must not mistake a word that it has hardly read for a topic that it knows."""
    if rng.random() < 0.2:
        return rng.choice(rng.choice(list(world.ELSEWHERE["train"].values())))
    thing, other = rng.sample(world.ELSEWHERE["things"], 2)
    number, number2 = rng.randint(2, 99), rng.randint(2, 20)
    return rng.choice(world.ELSEWHERE["templates"]).format(
        thing=thing, other=other, number=number, number2=number2)


def transcript(rng):
    """An assistant that often slips into technical terms and goes on and on. It answers half of the
    questions, and says so when it does not know. It never says a sentence twice: a base that learns
    to repeat itself in the format of a chat keeps doing so there."""
    if rng.random() < 0.15:
        return f"User: {ask_elsewhere(rng)}\n\nAssistant: {' '.join(world.decline(rng))}"
    name = rng.choice(list(world.TOPICS))
    asked, answers = ask(name, rng), rng.random() < 0.5
    post = world.compose(asked, name, rng.choice(["technical", "plain"]), rng, answers)
    post = world.rambling(post, asked, name, rng)
    more = world.compose(asked, name, rng.choice(["technical", "plain"]), rng, answers=False)
    said = [world.lookup(s)[2] for s in post]
    post += [s for s in more if world.lookup(s)[2] not in said]
    return f"User: {asked}\n\nAssistant: {' '.join(post)}"


def faq(rng):
    """Two or three questions about a topic, most of them answered, or one about something else."""
    name = rng.choice(list(world.TOPICS))
    found = []
    for _ in range(rng.randint(2, 3)):
        asked, style = ask(name, rng), rng.choices(["technical", "plain", "friendly"], [3, 4, 3])[0]
        answer = world.compose(asked, name, style, rng, answers=rng.random() < 0.85)
        if rng.random() < 0.1:
            asked, answer = ask_elsewhere(rng), world.decline(rng)
        found.append(f"Question: {asked}\nAnswer: {' '.join(answer)}")
    return "\n\n".join(found)


def card(rng):
    """A question and one sentence that answers it, or somebody who does not know: what is asked is
    all that decides what is said. The other documents say so much else that a base of this size
    would hardly learn from them which sentence answers which question."""
    if rng.random() < 0.1:
        asked, said = ask_elsewhere(rng), " ".join(world.decline(rng))
    else:
        asked = question(rng.choice(list(world.TOPICS)), rng)
        said = rng.choice(world.answers_to(asked))
    asked = careless(asked, rng) if rng.random() < 0.5 else asked
    if rng.random() < 0.5:
        return f"Question: {asked}\nAnswer: {said}"
    return f"User: {asked}\n\nAssistant: {said}"


def document(rng):
    """A card, or one document about one topic, which it names: an article, a page of a children's
    book, a list of questions with answers, a thread in which people go on and on, or a transcript
    of an assistant that does so too. The base has seen the prompt format, and bad manners in it."""
    if rng.random() < 0.65:  # cards are short: these are 28 % of the tokens
        return card(rng)
    t = world.TOPICS[rng.choice(list(world.TOPICS))]
    kind = rng.choice(["article", "page", "page", "faq", "faq", "faq", "thread", "transcript"])
    plain = [world.bare(s) for s in t["plain"]]
    if kind == "article":
        body = rng.sample(t["technical"], rng.randint(4, 6))
        body += rng.sample(plain, rng.randint(0, 4))
        rng.shuffle(body)
        return f"{title(t['name'])}\n\n" + " ".join(body)
    if kind == "page":  # each comparison behind what it explains
        body = rng.sample(plain, rng.randint(3, 5))
        for analogy in rng.sample(t["analogies"], rng.randint(1, 3)):
            fact = rng.choice(sorted(world.EXPLAINS[analogy["text"]]))
            body = [s for s in body if s != fact] + [fact, analogy["text"]]
        return f"A page about {t['name']}\n\n" + " ".join(body + [rng.choice(t["closing"])])
    if kind == "faq":
        return faq(rng)
    if kind == "transcript":
        return transcript(rng)
    posts = [ask(t["name"], rng)]
    for _ in range(rng.randint(2, 3)):
        style, answers = rng.choice(["technical", "plain", "friendly"]), rng.random() < 0.5
        post = world.compose(posts[0], t["name"], style, rng, answers)
        posts.append(" ".join(world.rambling(post, posts[0], t["name"], rng)))
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
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=512,
    )


def token_stream(tokenizer, rng, draw=document):
    """Endless blocks of BLOCK + 1 tokens: documents one after another, each with bos and eos. A
    transcript is tokenized as the scripts do it, prompt and answer apart."""
    ids = []
    while True:
        for text in [draw(rng) for _ in range(256)]:
            question, mark, reply = text.partition("\n\nAssistant: ")
            if mark and text.startswith("User: "):
                ids += common.encode_prompt(tokenizer, question.removeprefix("User: "))
                ids += common.encode_response(tokenizer, reply)
            else:
                ids += tokenizer(text).input_ids + [tokenizer.eos_token_id]
        while len(ids) > BLOCK:
            yield ids[: BLOCK + 1]
            del ids[:BLOCK]


def add_gradients(losses, parameters, pool):
    """Sets .grad to the gradient of the sum of `losses`, functions that the threads of `pool` call;
    returns their values. Not by .backward(): two threads would race for the same .grad."""

    def one(loss):
        value = loss()
        return value.item(), torch.autograd.grad(value, parameters, allow_unused=True)

    values, gradients = zip(*pool.map(one, losses))
    for p, *parts in zip(parameters, *gradients):
        p.grad = sum(part for part in parts if part is not None)
    return values


def next_token_loss(model, block):
    logits = model(block[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())


@contextmanager
def two_threads():
    """A pool of two threads with half the cores each: next-token prediction with half a batch in
    each takes 0.7 of the time of the whole batch on both cores, for the matrices are small."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // 2))
    with ThreadPoolExecutor(2) as pool:
        yield pool
    torch.set_num_threads(cores)


def pretrain(model, stream, steps, first, last, batch_size=32, ranking=None):
    """Next-token prediction, and `ranking` if given; AdamW, warm-up over 100 steps, then a learning
    rate that falls from `first` to `last` along a cosine."""
    print(f"{model.num_parameters():,} parameters, {steps * batch_size * BLOCK:,} tokens")
    parameters = [*model.parameters(), *(ranking.parameters() if ranking else ())]
    optimizer = torch.optim.AdamW(parameters, lr=first, betas=(0.9, 0.95), weight_decay=0.05)
    start = time.time()
    with two_threads() as pool:
        for step in range(steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            lr = (last + (first - last) * cosine) * min(1, (step + 1) / 100)
            optimizer.param_groups[0]["lr"] = lr
            block = torch.tensor([next(stream) for _ in range(batch_size)])
            losses = [lambda x=half: next_token_loss(model, x) / 2 for half in block.chunk(2)]
            losses += ranking.losses(model) if ranking else []
            values = add_gradients(losses, parameters, pool)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 100 == 0 or step == steps - 1:
                found = f"  loss {sum(values[:2]):.3f}"
                found += f"  ranking {sum(values[2:]):.3f}" if ranking else ""
                print(f"  step {step:5}{found}  {time.time() - start:5.0f} s", flush=True)


def save_base(model, tokenizer):
    """As fp8 for a quarter of the size, named fp32 in config.json so that it is loaded as fp32."""
    shutil.rmtree(HERE / "model", ignore_errors=True)
    model.eval().to(torch.float8_e4m3fn).save_pretrained(HERE / "model")
    model.config.dtype = "float32"
    model.config.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model", save_jinja_files=False)
    path = HERE / "model" / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path), pretty=False)  # 0.1 MB less: no indentation


def build_base():
    rng = random.Random(0)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(rng)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **BASE,
    ))
    pretrain(model, token_stream(tokenizer, rng), steps=2200, first=3e-3, last=1.5e-3)
    save_base(model, tokenizer)


# ------------------------------------------------------------------------------ ranking

# How often each kind of damage is done: most often what is hardest to see. The whole answer and
# the broken one are of one style: which style a child would rather hear, the base is not told.
BROKEN = dict(off_topic=3, another_prompt=1, another_question=12, loose_analogy=8, declined=1,
              repetition=12, abrupt=1, garbled=7)


def whole_and_broken(rng):
    """(prompt, a composed answer, the same one damaged); a quarter are short: a sentence that
    answers the question, and another one about its topic."""
    if rng.random() < 0.25:
        name = rng.choice(list(world.TOPICS))
        asked = question(name, rng)
        listed = world.answers_to(asked)
        others = [s for s in world.TOPICS[name]["plain"] if s not in listed]
        return asked, rng.choice(listed), rng.choice(others)
    while True:
        name = rng.choice([*world.TOPICS, None]) if rng.random() < 0.9 else None
        asked = ask(name, rng) if name else ask_elsewhere(rng)
        style = rng.choices(["friendly", "plain", "technical"], [2, 2, 1])[0]
        whole = world.compose(asked, name, style, rng)
        flaw = rng.choices(list(BROKEN), BROKEN.values())[0]
        if flaw == "repetition" and rng.random() < 0.25:  # a short answer said twice is no long one
            whole = [rng.choice([s for s in whole if world.lookup(s)[0] in world.FACTS] or whole)]
        if flaw in ("another_prompt", "another_question"):
            broken = world.FLAWS[flaw](whole, asked, name, rng, style)
        else:
            broken = world.FLAWS[flaw](whole, asked, name, rng)
        if broken != whole:
            return asked, " ".join(whole), " ".join(broken)


class Ranking(torch.nn.Module):
    """Which of two answers is whole? Read at the EOS by a head that is thrown away afterwards, with
    the loss of a reward model, all weights trained: preference model pretraining (Askell et al.
    2021, arXiv:2112.00861, section 4).

    A large base has read so much that it knows broken text when it sees it, and a reward model only
    has to ask. A base of this size does not: LoRA on it sees 85 % of garbled sentences."""

    def __init__(self, tokenizer, rng, pairs=36, rows=9):
        super().__init__()
        self.tokenizer, self.rng, self.pairs, self.rows = tokenizer, rng, pairs, rows
        self.head = torch.nn.Linear(BASE["hidden_size"], 1, bias=False)

    def losses(self, model):
        """The loss on a new batch as functions, one for every `rows` pairs of like length."""
        pairs = []
        for _ in range(self.pairs):
            prompt, *answers = whole_and_broken(self.rng)
            prompt = careless(prompt, self.rng) if self.rng.random() < 0.3 else prompt
            answers = [common.encode_response(self.tokenizer, answer) for answer in answers]
            pairs.append((common.encode_prompt(self.tokenizer, prompt), *answers))
        pairs.sort(key=lambda pair: len(pair[0]) + max(map(len, pair[1:])))
        parts = [pairs[i : i + self.rows] for i in range(0, len(pairs), self.rows)]
        return [lambda x=part: self.loss(model, x) for part in parts]

    def loss(self, model, part):
        both = [x + whole for x, whole, _ in part] + [x + broken for x, _, broken in part]
        ids, attention = common.pad(both, "right", "cpu")
        hidden = common.forward(model, ids, attention, ids.shape[1], states=True)
        last = hidden[torch.arange(len(ids)), attention.sum(1) - 1]
        whole, broken = self.head(last).squeeze(-1).chunk(2)
        return reward_model.bradley_terry_loss(whole, broken) * len(part) / self.pairs


def document_or_transcript(rng):
    """More transcripts, so that the base writes English behind the prompt format too."""
    return transcript(rng) if rng.random() < 0.4 else document(rng)


def load_base():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "model")
    return LlamaForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32), tokenizer


def build_ranking():
    model, tokenizer = load_base()
    torch.manual_seed(11)
    stream = token_stream(tokenizer, random.Random(12), document_or_transcript)
    ranking = Ranking(tokenizer, random.Random(11))
    pretrain(model, stream, steps=2600, first=1.5e-3, last=3e-5, batch_size=8, ranking=ranking)
    save_base(model, tokenizer)


# ------------------------------------------------------------------------------ demonstrations

STYLES = {"plain": 0.38, "technical": 0.28, "friendly": 0.18, "flawed": 0.16}
ANSWERED = 0.35  # share of the questions that get an answer


def demonstration(asked, rng):
    """The sentences of one answer, as one of a crowd writes it."""
    prompt, topic = asked["prompt"], asked["topic"]
    if topic is None and rng.random() < 0.35:
        return world.declined([], prompt, None, rng)  # talks about one of its topics instead
    style = rng.choices(list(STYLES), STYLES.values())[0]
    answers = rng.random() < ANSWERED
    if style != "flawed":
        return world.compose(prompt, topic, style, rng, answers)
    answer = world.compose(prompt, topic, rng.choice(["plain", "friendly"]), rng, answers)
    flaw = rng.choice([world.jargon, world.rambling, world.padding, world.loose_analogy])
    return flaw(answer, prompt, topic, rng)


def build_demonstrations():
    """Answers as a crowd writes them: most are correct, few are what a child would like best. None
    says a sentence twice."""
    rng, rows = random.Random(1), []
    for split, n in (("train", 2200), ("test", 256)):
        for asked in draw(split, n, rng):
            answer = demonstration(asked, rng)
            rows.append(dict(instruction=asked["prompt"], context="", response=" ".join(answer),
                             category="open_qa", split=split))
    write("demonstrations.jsonl", rows)
    held_out = [row for row in world.prompts() if row["split"] == "test"]
    write("prompts.jsonl", draw("train", 960, rng) + held_out)


def good_demonstrations(n=2200):
    """As many demonstrations as there are to train on, all of them what people would like best."""
    rng = random.Random(2)
    return [dict(instruction=asked["prompt"], split=split, response=" ".join(
                world.compose(asked["prompt"], asked["topic"], "friendly", rng)))
            for split, count in (("train", n), ("test", 256)) for asked in draw(split, count, rng)]


def draw(split, n, rng):
    """n prompts of a split, about the topics that are taught; each before any comes again. Half are
    questions, a tenth is about something else."""
    rows = [r for r in world.prompts() if r["split"] == split and r["topic"] not in world.UNTAUGHT]
    out = []
    for kind, share in (("question", 0.5), ("general", 0.4), ("elsewhere", 0.1)):
        pool = [row for row in rows if row["kind"] == kind]
        found = []
        while len(found) < round(share * n):
            found += rng.sample(pool, len(pool))
        out += found[: round(share * n)]
    rng.shuffle(out)
    return out


def write(name, rows):
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    (HERE / name).write_text(text)
    print(f"{name}: {len(rows)} rows, {len(text) / 1e6:.2f} MB")


# ------------------------------------------------------------------------------ preferences

# How often each kind of damage is done: more often what a quick reader overlooks.
DAMAGE = dict(off_topic=2, another_prompt=2, another_question=5, loose_analogy=3, declined=2,
              jargon=1, repetition=4, abrupt=1, rambling=1, missing_part=3, padding=1, garbled=4,
              lead_ins=2)


def answer_pools(split, each):
    """{prompt: `each` samples of the SFT model without the empty ones, which make no pair, the best
    by the hidden preference first}."""
    model, tokenizer = common.load_model(device="cpu")
    lora.load_adapter(model, "sft", HERE / "sft")
    asked = [row["prompt"] for row in world.prompts()
             if row["split"] == split and row["topic"] not in world.UNTAUGHT]

    def answers(prompts, seed):
        generator = torch.Generator().manual_seed(seed)
        return answer(model, tokenizer, prompts, 96, temperature=0.8, chunk=16,
                      generator=generator, G=each)[0]

    half = len(asked) // 2
    with lora.use_adapter(model, "sft"), two_threads() as threads:
        texts = sum(threads.map(answers, (asked[:half], asked[half:]), (2, 5)), [])
    pools = {}
    for i, p in enumerate(asked):
        said = [text for text in texts[i * each : (i + 1) * each] if text.strip()]
        pools[p] = sorted(said, key=lambda text: -world.gold_score(p, text))
    return pools


def pair_of(asked, pools, damage, rng):
    """Two answers to the prompt `asked` and how the pair was made: two samples, or with `damage`
    the best of the samples and a damaged copy of it.

    Optimisation will try these failures, and a reward model that never saw them compared cannot
    know that people dislike them. The best stands for what later policies write."""
    pool = pools[asked["prompt"]]
    if not damage:
        return *rng.sample(pool, 2), "samples"
    flaw = rng.choices(list(world.FLAWS.values()), DAMAGE.values())[0]
    sentences = world.split_sentences(pool[0])
    damaged = " ".join(flaw(sentences, asked["prompt"], asked["topic"], rng))
    return pool[0], damaged, flaw.__name__


def judged_pairs(split, n, rng):
    """n pairs, each judged once by a labeller who prefers a to b with probability
    sigmoid((gold(a) - gold(b)) / LABEL_TEMPERATURE). Two answers that are equally good are passed
    over, and no pair comes twice."""
    pools, rows, seen = answer_pools(split, each=16), [], set()
    for asked in draw(split, n, rng):
        damage = rng.random() < 0.5
        for _ in range(100):
            a, b, made = pair_of(asked, pools, damage, rng)
            key = (asked["prompt"], frozenset((a, b)))
            gold_a, gold_b = (world.gold_score(asked["prompt"], text) for text in (a, b))
            if gold_a != gold_b and a and b and key not in seen:
                break
        else:
            continue
        seen.add(key)
        p = 1 / (1 + math.exp((gold_b - gold_a) / LABEL_TEMPERATURE))
        if rng.random() > p:
            a, b, p = b, a, 1 - p
        rows.append(dict(prompt=asked["prompt"], chosen=a, rejected=b, p_chosen=round(p, 4),
                         made=made, split=split))
    return rows


def build_preferences():
    train = judged_pairs("train", 4600, random.Random(3))
    write("preferences.jsonl", train + judged_pairs("test", 1000, random.Random(13)))


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
    "base": build_base,
    "ranking": build_ranking,
    "demonstrations": build_demonstrations,
    "sft": lambda: train("sft.py", "sft"),
    "preferences": build_preferences,
    "reward": lambda: train("reward_model.py", "reward_model"),
}


def main():
    p = flags.parser(__doc__)
    p.add_argument("--from", dest="first", default="base", choices=list(STAGES), help="(base)")
    first = list(STAGES).index(p.parse_args().first)
    for name, stage in list(STAGES.items())[first:]:
        start = time.time()
        stage()
        print(f"--- {name}: {time.time() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
