"""A tokenizer of single bytes, made in memory: what it returns can be told without running it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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
