"""Talk to a model, with or without an adapter.

    python -m cli.chat --adapter tiny/sft --prompt "Explain quantum computing to a 10-year-old."
    python -m cli.chat --adapter runs/ppo

With --prompt it prints the answer alone. Without, it is a conversation: the model sees all turns so
far; an empty line or Ctrl-D ends it.
"""

import torch

import common
import lora
from cli import flags, models


def answer(model, tokenizer, prompts, max_new_tokens, temperature=0.0, max_length=1024, chunk=64,
           generator=None, G=1):
    """(texts, ended by themselves: list of bool) of G answers to each prompt of a list, those to
    the same prompt next to each other; temperature 0 is greedy."""
    texts, stopped, stop = [], [], common.stop_ids(model, tokenizer)
    room = max_length - max_new_tokens
    for i in range(0, len(prompts), chunk):
        encoded = [common.encode_prompt(tokenizer, p)[-room:] for p in prompts[i : i + chunk]]
        x, x_mask = common.pad(encoded, "left", model.device)
        y, mask, _, _ = common.sample(
            model, x, x_mask, stop, max_new_tokens, temperature, generator, G)
        texts += common.decode(tokenizer, y, mask)
        stopped += common.ended(y, mask, stop).tolist()
    return texts, stopped


def converse(model, tokenizer, args, generator):
    """Asks for a turn and answers it, until the person stops."""
    turns = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        turns.append({"role": "user", "content": said})
        texts, _ = answer(model, tokenizer, [turns], args.max_new_tokens, args.temperature,
                          args.max_length, generator=generator)
        print(texts[0] + "\n")
        turns.append({"role": "assistant", "content": texts[0]})


def parse_args(argv=None):
    p = flags.parser(__doc__, "python -m cli.chat")
    flags.model_flags(p)
    p.set_defaults(model=None)  # the one that the adapter was trained on
    p.add_argument("--adapter", help="folder of an adapter (none: the bare base)")
    p.add_argument("--prompt", help="answer this and end (none: a conversation)")
    p.add_argument("--max-new-tokens", type=flags.whole,
                   help="tokens (128, or half of what the model reads)")
    p.add_argument("--temperature", type=flags.amount,
                   help="0: the likeliest token (0.7; tiny: 0.5)")
    p.add_argument("--seed", type=flags.seed, default=0, help="of the sampling (0)")
    p.add_argument("--max-length", type=flags.whole, default=1024, help="prompt + answer (1024)")
    args = p.parse_args(argv)
    args.adapter = None if args.adapter == "none" else args.adapter
    return args


def main(argv=None):
    with flags.errors():
        args = parse_args(argv)
        flags.quiet()
        if args.model is None:
            args.model = models.adapter_base(args.adapter) if args.adapter else "tiny"
        if args.temperature is None:
            args.temperature = 0.5 if args.model in ("tiny", "tiny/model") else 0.7
        model, tokenizer = models.open_model(args, args.model)
        args.max_length = models.readable(model, args.max_length)
        if args.max_new_tokens is None:
            args.max_new_tokens = min(128, args.max_length // 2)
        if args.max_new_tokens >= args.max_length:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt "
                             f"in a length of {args.max_length}")
        name = "adapter" if args.adapter else None
        if name:
            models.load_adapter(model, name, args.adapter)
        generator = torch.Generator().manual_seed(args.seed)
        with lora.use_adapter(model, name):
            if args.prompt is None:
                converse(model, tokenizer, args, generator)
            else:
                texts, _ = answer(model, tokenizer, [args.prompt], args.max_new_tokens,
                                  args.temperature, args.max_length, generator=generator)
                print(texts[0])


if __name__ == "__main__":
    main()
