"""Look into an adapter, or fold it into the model it belongs to.

    python -m cli.export inspect --adapter tiny/sft                  which layers moved, and how far
    python -m cli.export merge --adapter tiny/sft --out runs/merged  a plain Hugging Face folder
    python -m cli.export merge --adapter tiny/reward_model --out runs/scorer

A merged reward model is an AutoModelForSequenceClassification(num_labels=1), and --reward takes it.
Its scores are those here if a text ends in its end of turn and is padded on the right: Hugging Face
reads the last token that is not the padding token, and counts positions from the first column.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import common
import lora
from cli import flags, models


def inspect(model, name):
    """Prints, per adapted layer, the size of the update beside the size of the weight."""
    print(f"{'layer':44} {'rank':>5} {'parameters':>11} {'|sBA|':>9} {'|W0|':>9} {'ratio':>7}")
    total = 0
    for path, layer in lora.lora_layers(model).items():
        A, B = layer.lora_A[name], layer.lora_B[name]
        size, base = layer.delta(name).norm().item(), layer.base.weight.float().norm().item()
        count = A.numel() + B.numel()
        total += count
        print(f"{path:44} {len(A):5} {count:11,} {size:9.3f} {base:9.3f} {size / base:7.1%}")
    share = total / sum(p.numel() for p in model.parameters())
    head = " and a scalar head" if lora.has_head(model, name) else ""
    print(f"{total:,} adapter parameters{head}: {share:.2%} of the model")


def merge_scorer(model, name, pad):
    """Merges the reward model `name` into an AutoModelForSequenceClassification(num_labels=1).

    pad: the padding token's id, which must not be one that ends an answer (see above). `model` is
    used up. Raises ValueError where the architecture has no such class."""
    head = model.heads[name].weight.detach()
    lora.merge_adapter(model, name)
    model.config.num_labels, model.config.get_text_config().pad_token_id = 1, pad
    with torch.device("meta"):  # its own weights are never made: all come from `model`
        scorer = AutoModelForSequenceClassification.from_config(model.config)
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    scorer.score.weight = nn.Parameter(head.to(model.dtype))
    return scorer


def merge(model, tokenizer, name, out):
    """Writes the model with its adapter merged, and the tokenizer, to the new folder `out`."""
    if lora.has_head(model, name):
        own = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id,
               *tokenizer.added_tokens_decoder]  # an ordinary one would be cut out of every text
        fit = set(range(model.get_input_embeddings().num_embeddings))
        fit -= set(common.stop_ids(model, tokenizer))
        pad = next(i for i in [*own, *sorted(fit)] if i in fit)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(pad), "right"
        model = merge_scorer(model, name, pad)
    else:
        lora.merge_adapter(model, name)
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(f"wrote {out}")


def parse_args(argv=None):
    p = flags.parser(__doc__, "python -m cli.export")
    p.add_argument("command", choices=["inspect", "merge"])
    p.add_argument("--adapter", required=True, help="folder of the adapter")
    p.add_argument("--out", help="merge: the new folder")
    flags.model_flags(p, dtype="fp32")
    p.set_defaults(model=None)
    return p.parse_args(argv)


def main(argv=None):
    with flags.errors():
        args = parse_args(argv)
        flags.quiet()
        if args.command == "merge" and not args.out:
            raise ValueError("merge needs --out, the folder to write")
        if args.out and Path(args.out).exists():
            raise ValueError(f"{args.out} exists; name a new folder with --out")
        args.dtype = "fp32" if args.dtype == "auto" else args.dtype
        name = args.model or models.adapter_base(args.adapter)
        model, tokenizer = models.open_model(args, name)
        lora.load_adapter(model, "adapter", args.adapter)
        if args.command == "inspect":
            inspect(model, "adapter")
        else:
            merge(model, tokenizer, "adapter", Path(args.out))


if __name__ == "__main__":
    main()
