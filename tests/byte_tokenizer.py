"""Tokenizers of single bytes and characters, made in memory: what they return can be told without
running them."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<start>", "<turn>"]
PAD, BOS, EOS, START, TURN = range(5)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZE = len(SPECIAL) + len(ALPHABET)

CHAT = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template=None, merges=(), pad="<pad>", bos="<bos>"):
    """bos is put before a text; either may be None, or be "<eos>" as in OPT and GPT-NeoX."""
    tokens = SPECIAL + ALPHABET + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token="<eos>",
        additional_special_tokens=["<start>", "<turn>"], chat_template=chat_template,
    )


def spell(text):
    """The ids of `text`, ASCII without special tokens, by the definition of the byte alphabet."""
    shown = {" ": "Ġ", "\n": "Ċ"}
    return [len(SPECIAL) + ALPHABET.index(shown.get(c, c)) for c in text]


def sentencepiece_tokenizer(kind="llama", chat_template=None):
    """Of characters, with ▁ for a space, as SentencePiece has it, and a token for ▁a.

    It puts a space before every text and takes one off what it decodes. kind "llama" does so before
    the text is split, as the tokenizer.json of Llama 2 says; "metaspace" word by word, as newer
    files do."""
    special, space = ["<unk>", "<s>", "</s>"], "▁"
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [chr(code) for code in range(33, 127)] + [space, space + "a"]
    tokenizer = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[(space, "a")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    ))
    if kind == "llama":
        steps = [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(space, "first")
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=chat_template,
    )
