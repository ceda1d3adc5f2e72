"""LoRA by hand: several small adapters on one frozen base model (Hu et al. 2021, arXiv:2106.09685).

    (LORA.1)  h = W0 x + s B A x,   A [r, in], B [out, r]     W0 is frozen, only A and B are trained
    (LORA.2)  s = alpha / r         (rank-stabilised LoRA, `use_rslora`: alpha / sqrt(r))
    (LORA.3)  A ~ Kaiming uniform(sqrt 5), B = 0              B A = 0: training starts at W0
    (LORA.4)  W = W0 + s B A        merging

A layer holds any number of named adapters and computes with one of them, or with none. PPO's four
models (policy, reference, critic, reward) are therefore one base and four adapters. An adapter may
carry a scalar head, which makes it a reward model or a critic.

Files are in the PEFT format and need no peft to be written or read: PeftModel.from_pretrained takes
what save_adapter wrote, and load_adapter takes what peft wrote.

Left out on purpose: DoRA, per-layer ranks, embeddings, quantised bases.

    python lora.py inspect --adapter tiny/sft                    which layers moved, and how far
    python lora.py merge --adapter tiny/sft --out runs/merged    a plain Hugging Face folder
    python lora.py merge --adapter tiny/reward_model --out runs/scorer    the same of a reward model

A merged reward model is an AutoModelForSequenceClassification(num_labels=1), and --reward takes it.
Its scores are those here if a text ends in its end of turn and is padded on the right: Hugging Face
reads the last token that is not the padding token, and counts positions from the first column.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

# ------------------------------------------------------------------------------ the layer


class LoRALinear(nn.Module):
    """A frozen nn.Linear or GPT-2 Conv1D with named low-rank updates beside it. (LORA.1)"""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale, self.dropout, self.active = {}, {}, None

    def forward(self, x):
        h = self.base(x)
        name = self.active
        if name not in self.lora_A:
            return h
        # Adapters stay fp32 on a bf16 base: updates smaller than bf16's spacing would be lost.
        z = F.dropout(x.float(), self.dropout[name], self.training)
        z = F.linear(F.linear(z, self.lora_A[name]), self.lora_B[name])
        return h + (self.scale[name] * z).to(h.dtype)  # (LORA.1)

    @property
    def weight(self):
        """The base weight: what other code sees where an output head is wrapped."""
        return self.base.weight

    def sizes(self):
        """(inputs, outputs); Conv1D keeps its weight as (in, out), nn.Linear as (out, in)."""
        shape = self.base.weight.shape
        return tuple(shape) if isinstance(self.base, Conv1D) else tuple(shape[::-1])

    def add(self, name, rank, scale, dropout, trainable):
        """Adds the update `name`, zero at the start. (LORA.3)"""
        w = self.base.weight
        inside, outside = self.sizes()
        A = torch.empty(rank, inside, device=w.device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(outside, rank, device=w.device, dtype=torch.float32)
        self.lora_A[name] = nn.Parameter(A, requires_grad=trainable)
        self.lora_B[name] = nn.Parameter(B, requires_grad=trainable)
        self.scale[name], self.dropout[name] = scale, dropout

    @torch.no_grad()
    def delta(self, name):
        """The update s B A in the layout of the base weight. (LORA.4)"""
        delta = self.scale[name] * self.lora_B[name] @ self.lora_A[name]
        return delta.T if isinstance(self.base, Conv1D) else delta


def lora_layers(model):
    """{module path: LoRALinear} of `model`, in the order of its modules."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


# ------------------------------------------------------------------------------ adapters


def wrap(model, wanted):
    """Freezes `model` and puts a LoRALinear around each linear layer whose path is `wanted(path)`.

    Returns {path: LoRALinear}; layers already wrapped are returned as they are."""
    if not lora_layers(model):
        model.requires_grad_(False)
    found = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D, LoRALinear)) and wanted(path):
            if not isinstance(module, LoRALinear):
                module = LoRALinear(module).train(module.training)
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
            found[path] = module
    return found


def names(model):
    """The names of the adapters on `model`."""
    return {name for layer in lora_layers(model).values() for name in layer.lora_A}


def require(model, name):
    if name not in names(model):
        raise ValueError(f"no adapter is named {name!r}; there are {sorted(names(model))}")


def forbid(model, name):
    if name in names(model) or "." in name:
        raise ValueError(f"adapter name {name!r} is in use or holds a dot")


def add_adapter(
    model, name, rank=16, alpha=32, dropout=0.0, targets=("q_proj", "v_proj"), trainable=True
):
    """Adds the adapter `name`, which changes nothing until it is trained, and freezes the base.

    rank, alpha: r and alpha of (LORA.2); dropout: on the adapter's input, while model.training.
    targets: names of the linear layers to adapt (a path, or its last parts), or "all-linear" for
      every linear layer but the output head.
    The adapter computes only inside `with use_adapter(model, name)`.
    Raises ValueError for a name in use, a rank below 1, or a target that matches no layer.
    Source: arXiv:2106.09685, section 4.1."""
    forbid(model, name)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    inner = re.compile(r"\.base$|^heads\.")
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, LoRALinear))
        and module is not model.get_output_embeddings()
        and not inner.search(path)
    ]
    if targets == "all-linear":
        found = {targets: linear}
    else:
        targets = [targets] if isinstance(targets, str) else list(targets)
        found = {t: [p for p in linear if p == t or p.endswith("." + t)] for t in targets}
    missing = [target for target, paths in found.items() if not paths]
    if missing or not found:
        names = sorted({path.rpartition(".")[2] for path in linear})
        raise ValueError(f"no layer is named {missing}; this model has {', '.join(names)}")
    wanted = {path for paths in found.values() for path in paths}
    for layer in wrap(model, wanted.__contains__).values():
        layer.add(name, rank, alpha / rank, dropout, trainable)  # (LORA.2)
    if targets == "all-linear":
        targets = sorted({path.rpartition(".")[2] for path in wanted})
    configs = model.__dict__.setdefault("lora_configs", {})
    configs[name] = dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


@contextlib.contextmanager
def use_adapter(model, name):
    """Inside the block (LORA.1) takes the A and B of `name`; with None, `model` is the bare base.

    The adapter that was active before is active again afterwards. Gradient checkpointing runs
    parts of the forward pass again during backward(): they must find the same adapter then.
    Raises ValueError for a name that no layer has."""
    if name is not None:
        require(model, name)
    layers = lora_layers(model).values()
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = name
    try:
        yield model
    finally:
        for layer, active in zip(layers, before):
            layer.active = active


def active_adapter(model):
    """The name of the adapter that `model` computes with, or None."""
    return next((layer.active for layer in lora_layers(model).values()), None)


def add_head(model, name):
    """Gives the adapter `name` a scalar head: nn.Linear(d, 1), no bias, N(0, 1/(d+1)).

    The spread is that of Stiennon et al. 2020 (arXiv:2009.01325): where the coordinates of the
    hidden state are about 1, so is the variance of the first scores. Without bias, because
    AutoModelForSequenceClassification has none."""
    out = model.get_output_embeddings().weight
    d = out.shape[1]
    if not hasattr(model, "heads"):
        model.heads = nn.ModuleDict()
    head = nn.Linear(d, 1, bias=False, device=out.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=1 / math.sqrt(d + 1))
    model.heads[name] = head
    return head


def adapter_parameters(model, name):
    """What is trained of the adapter `name`: every layer's A and B (LORA.1), then its head."""
    layers = [layer for layer in lora_layers(model).values() if name in layer.lora_A]
    found = [p for layer in layers for p in (layer.lora_A[name], layer.lora_B[name])]
    heads = getattr(model, "heads", {})
    return found + ([heads[name].weight] if name in heads else [])


def copy_adapter(model, source, name, trainable=False):
    """Adds `name` with the values of `source`, its head included. Raises as add_adapter does."""
    require(model, source)
    forbid(model, name)
    for layer in lora_layers(model).values():
        if source in layer.lora_A:
            A, scale = layer.lora_A[source], layer.scale[source]
            layer.add(name, A.shape[0], scale, layer.dropout[source], trainable)
            layer.lora_A[name].data.copy_(A)
            layer.lora_B[name].data.copy_(layer.lora_B[source])
    model.lora_configs[name] = dict(model.lora_configs[source])
    if source in getattr(model, "heads", {}):
        add_head(model, name).weight.data.copy_(model.heads[source].weight)
        model.heads[name].requires_grad_(trainable)


# ------------------------------------------------------------------------------ files


def save_adapter(model, name, folder, base=None):
    """Writes A and B (LORA.1) of `name` to `folder` as peft would: adapter_config.json, and
    adapter_model.safetensors with `base_model.model.<path>.lora_A.weight` [r, in] and
    `...lora_B.weight` [out, r]; a head goes in as `base_model.model.score.weight` [1, d].

    base: what adapter_config.json names as the model to load; default the model's own name.
    Each file appears complete or not at all."""
    require(model, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, fan = {}, False
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name]
            tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name]
            fan |= isinstance(layer.base, Conv1D)
    head = name in getattr(model, "heads", {})
    if head:
        tensors["base_model.model.score.weight"] = model.heads[name].weight
    config = dict(
        peft_type="LORA",
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        base_model_name_or_path=str(base if base is not None else model.name_or_path),
        bias="none",
        fan_in_fan_out=fan,
        inference_mode=True,
        modules_to_save=["score"] if head else None,
        **model.lora_configs[name],
    )
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.tmp", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.tmp", folder / "adapter_model.safetensors")
    (folder / "adapter_config.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "adapter_config.tmp", folder / "adapter_config.json")


def load_adapter(model, name, folder, trainable=False):
    """Adds the adapter in `folder` (PEFT format, ours or peft's own) to `model` as `name`.

    Raises FileNotFoundError for a folder without an adapter, and ValueError for one that this file
    does not cover (DoRA, PiSSA, per-layer ranks, trained biases) or that does not fit the model,
    and for a name in use."""
    forbid(model, name)
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {file} is missing")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        tensors = load_file(folder / "adapter_model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise ValueError(f"the adapter in {folder} is damaged: {problem!r}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {config.get('peft_type')} adapter, not LoRA")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(key):
            raise ValueError(f"{folder} uses {key}, which lora.py does not cover")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq")):  # B A is beside another base then
        raise ValueError(f"{folder} was started by {start}, which lora.py does not cover")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{folder} also trained biases, which lora.py does not cover")
    head = tensors.pop("base_model.model.score.weight", None)
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
    paths = {m[1] for m in map(pattern.fullmatch, tensors) if m}
    expected = {f"base_model.model.{path}.lora_{which}.weight" for path in paths for which in "AB"}
    if not tensors or set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[:1]
        raise ValueError(f"{folder} holds other weights than pairs of lora_A and lora_B: {odd}")
    layers = wrap(model, paths.__contains__)
    if paths - set(layers):
        raise ValueError(f"{folder} does not fit this model: no layer {min(paths - set(layers))}")
    for path, layer in layers.items():
        inside, outside = layer.sizes()
        A, B = (tensors[f"base_model.model.{path}.lora_{which}.weight"] for which in "AB")
        if A.shape != (rank, inside) or B.shape != (outside, rank):
            raise ValueError(f"{folder} does not fit this model: {path} has other sizes")
    if head is not None and head.shape != (1, model.get_output_embeddings().weight.shape[1]):
        raise ValueError(f"{folder} has a head of shape {list(head.shape)}, not one score a text")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank  # (LORA.2)
    for path, layer in layers.items():
        layer.add(name, rank, scale, config.get("lora_dropout", 0.0), trainable)
        for which, own in (("A", layer.lora_A[name]), ("B", layer.lora_B[name])):
            own.data.copy_(tensors[f"base_model.model.{path}.lora_{which}.weight"])
    kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    configs = model.__dict__.setdefault("lora_configs", {})
    configs[name] = {key: config[key] for key in kept if key in config}
    if head is not None:
        add_head(model, name).weight.data.copy_(head)
        model.heads[name].requires_grad_(trainable)


def merge_adapter(model, name):
    """Folds the adapter `name` into the base weights (LORA.4) and takes all wrappers off.

    Every other adapter, and every head, is gone afterwards. Returns the model. Raises ValueError
    for a name that no layer has, and for an adapted output head that is also the embedding."""
    require(model, name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if name in getattr(head, "lora_A", {}) and head.weight is embedding.weight:
        raise ValueError("the adapted output head shares its weight with the embedding")
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            weight = layer.base.weight
            weight.data = (weight.data.float() + layer.delta(name)).to(weight.dtype)  # (LORA.4)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)
    for attribute in ("lora_configs", "heads"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model


def merge_scorer(model, name, pad):
    """Merges the reward model `name` into an AutoModelForSequenceClassification(num_labels=1).

    pad: the padding token's id, which must not be one that ends an answer (see above). `model` is
    used up. Raises ValueError where the architecture has no such class."""
    head = model.heads[name].weight.detach()
    merge_adapter(model, name)
    model.config.num_labels, model.config.get_text_config().pad_token_id = 1, pad
    with torch.device("meta"):  # its own weights are never made: all come from `model`
        scorer = AutoModelForSequenceClassification.from_config(model.config)
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    scorer.score.weight = nn.Parameter(head.to(model.dtype))
    return scorer


# ------------------------------------------------------------------------------ command


def inspect(model, name):
    """Prints, per adapted layer, the size of the update beside the size of the weight."""
    print(f"{'layer':44} {'rank':>5} {'parameters':>11} {'|sBA|':>9} {'|W0|':>9} {'ratio':>7}")
    total = 0
    for path, layer in lora_layers(model).items():
        A, B = layer.lora_A[name], layer.lora_B[name]
        size, base = layer.delta(name).norm().item(), layer.base.weight.float().norm().item()
        count = A.numel() + B.numel()
        total += count
        print(f"{path:44} {len(A):5} {count:11,} {size:9.3f} {base:9.3f} {size / base:7.1%}")
    share = total / sum(p.numel() for p in model.parameters())
    head = " and a scalar head" if name in getattr(model, "heads", {}) else ""
    print(f"{total:,} adapter parameters{head}: {share:.2%} of the model")


def merge(model, tokenizer, ends, out):
    """Writes the model with its adapter merged, and the tokenizer, to the new folder `out`.

    ends: the tokens that end an answer. Raises ValueError for what cannot be merged."""
    if "adapter" in getattr(model, "heads", {}):
        own = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id,
               *tokenizer.added_tokens_decoder]  # an ordinary one would be cut out of every text
        fit = set(range(model.get_input_embeddings().num_embeddings)) - set(ends)
        pad = next(i for i in [*own, *sorted(fit)] if i in fit)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(pad), "right"
        model = merge_scorer(model, "adapter", pad)
    else:
        merge_adapter(model, "adapter")
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(f"wrote {out}")


def parse_args(argv=None):
    import common  # here and in main, so that the rest of the file can be copied without it

    p = common.parser(__doc__)
    p.add_argument("command", choices=["inspect", "merge"])
    p.add_argument("--adapter", required=True, help="folder of the adapter")
    p.add_argument("--model", help="base model; default the one that the adapter names")
    p.add_argument("--out", help="merge: the new folder")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="merged model (fp32)")
    p.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    return p.parse_args(argv)


def main(argv=None):
    import common

    args = parse_args(argv)
    if args.command == "merge" and not args.out:
        common.fail("merge needs --out, the folder to write")
    if args.out and Path(args.out).exists():
        common.fail(f"{args.out} exists; name a new folder with --out")
    if args.model is None:
        args.model = common.adapter_base(args.adapter)
    model, tokenizer = common.load_model(args)
    try:
        load_adapter(model, "adapter", args.adapter)
        if args.command == "inspect":
            inspect(model, "adapter")
        else:
            merge(model, tokenizer, common.stop_ids(model, tokenizer), Path(args.out))
    except (OSError, ValueError) as problem:
        common.fail(problem)


if __name__ == "__main__":
    main()
