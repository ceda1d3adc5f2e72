"""LoRA: trains two thin matrices beside the weight of a layer, and leaves the weight itself frozen.

    (LORA.1)  h = W0 x + scale B A x,  A [r, in], B [out, r]   W0 is frozen, A and B are trained
    (LORA.2)  scale = alpha / r     (rank-stabilised LoRA, `use_rslora`: alpha / sqrt(r))
    (LORA.3)  A ~ Kaiming uniform(sqrt 5), B = 0              B A = 0: training starts at W0
    (LORA.4)  W = W0 + scale B A    merging: one plain weight with the same output

The A and B of all layers are an adapter. A model holds any number of adapters, each with a name,
and computes with one of them or with none. PPO's four models (policy, reference, critic, reward)
are four adapters on one base. With a scalar head an adapter is a reward model or a critic.

    lora.add_adapter(model, "policy", rank=16)     # freezes the model, adds A and B beside it
    with lora.use_adapter(model, "policy"):        # with None in place of a name: the bare base
        loss = model(**inputs).loss

It works on any nn.Module with linear layers; only a scalar head needs a language model. Files are
in the format of peft, which reads them and is not needed here. How far did each layer move?
`python -m cli.export inspect --adapter tiny/sft` shows it. Left out: DoRA, ranks that differ by
layer, embeddings, quantised bases. Source: Hu et al. 2021, arXiv:2106.09685.
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

QUERY_AND_VALUE = (["q_proj", "v_proj"], ["query_key_value"], ["qkv_proj"], ["c_attn"])
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # these leave the base as it is
HARMLESS = """auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules
fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha
lora_dropout megatron_config megatron_core modules_to_save peft_type peft_version qalora_group_size
r revision target_modules task_type use_rslora""".split()  # in a config, whatever they say

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
        z = self.scale[name] * F.linear(z, self.lora_A[name])  # [..., r]: scaled where it is small
        return h + F.linear(z, self.lora_B[name]).to(h.dtype)  # (LORA.1)

    @property
    def weight(self):
        """The base weight: what other code sees where an output head is wrapped."""
        return self.base.weight

    def sizes(self):
        """(inputs, outputs); Conv1D keeps its weight as (in, out), nn.Linear as (out, in)."""
        shape = self.base.weight.shape
        return tuple(shape) if is_conv1d(self.base) else tuple(shape[::-1])

    def add(self, name, rank, scale, dropout, trainable):
        """Adds the update `name`, zero at the start. (LORA.3)"""
        w = self.base.weight
        inside, outside = self.sizes()
        A = torch.empty(rank, inside, device=w.device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # (LORA.3)
        B = torch.zeros(outside, rank, device=w.device, dtype=torch.float32)
        self.lora_A[name] = nn.Parameter(A, requires_grad=trainable)
        self.lora_B[name] = nn.Parameter(B, requires_grad=trainable)
        self.scale[name], self.dropout[name] = scale, dropout

    @torch.no_grad()
    def delta(self, name):
        """The update scale B A in the layout of the base weight. (LORA.4)"""
        delta = self.scale[name] * self.lora_B[name] @ self.lora_A[name]
        return delta.T if is_conv1d(self.base) else delta


def is_conv1d(module):
    """Whether this is GPT-2's linear layer, told by its name: transformers is not needed here."""
    return type(module).__name__ == "Conv1D"


def lora_layers(model):
    """{module path: LoRALinear} of `model`, in the order of its modules."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


# ------------------------------------------------------------------------------ adapters


def wrap(model, wanted):
    """Freezes `model` and puts a LoRALinear around each linear layer whose path is `wanted(path)`,
    where there is none yet. Returns {path: LoRALinear}."""
    if not lora_layers(model):
        model.requires_grad_(False)
    found = {}
    for path, module in list(model.named_modules()):
        if (isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)) and wanted(path):
            if not isinstance(module, LoRALinear):
                module = LoRALinear(module).train(module.training)
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
            found[path] = module
    return found


def names(model):
    """The names of the adapters on `model`."""
    return {name for layer in lora_layers(model).values() for name in layer.lora_A}


def has_head(model, name):
    """Whether the adapter `name` carries a scalar head."""
    return name in getattr(model, "heads", {})


def require(model, name):
    if name not in names(model):
        raise ValueError(f"no adapter is named {name!r}; there are {sorted(names(model))}")


def forbid(model, name):
    if name in names(model) or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(f"adapter name {name!r} is in use, reserved by torch, or holds a dot")


def add_adapter(model, name, rank=16, alpha=32, dropout=0.0, targets="auto", trainable=True):
    """Adds the adapter `name`, which changes nothing until it is trained, and freezes the base.

    rank r: columns of B; alpha: scale times r (LORA.2); dropout on x, in training mode only.
    targets: "all-linear" (but the output head); "auto", query and value as the family names them,
    else all-linear; or names of layers, or their last parts, as a list or separated by commas.
    Raises ValueError for a name in use, a rank below 1, and a target that matches no layer.
    Source: arXiv:2106.09685, section 4.1."""
    forbid(model, name)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [path for path, module in model.named_modules() if module is not output
              and (isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module))
              and not re.search(r"\.base$|^heads\.", path)]
    leaves = {path.rpartition(".")[2] for path in linear}
    if targets == "auto":
        targets = next((t for t in QUERY_AND_VALUE if leaves.issuperset(t)), "all-linear")
    if targets == "all-linear":
        targets = sorted(leaves)
    elif isinstance(targets, str):
        targets = [target.strip() for target in targets.split(",")]
    # A target is the whole path of a layer or its end, as in PEFT.
    found = {t: [p for p in linear if p == t or p.endswith("." + t)] for t in targets}
    missing = [target for target, paths in found.items() if not paths]
    if missing or not found:
        raise ValueError(f"no layer is named {missing}; this model has {', '.join(sorted(leaves))}")
    wanted = {path for paths in found.values() for path in paths}
    for layer in wrap(model, wanted.__contains__).values():
        layer.add(name, rank, alpha / rank, dropout, trainable)  # (LORA.2)
    configs(model)[name] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
                            "target_modules": list(targets)}


def configs(model):
    """{adapter name: what its adapter_config.json says of rank, alpha, dropout and targets}."""
    return model.__dict__.setdefault("lora_configs", {})


@contextlib.contextmanager
def use_adapter(model, name):
    """Inside the block (LORA.1) takes the A and B of `name`; with None, `model` is the bare base.

    Afterwards the adapter of before is active again. Gradient checkpointing runs layers again in
    backward(): call that inside the block, too. Raises ValueError for a name that no layer has."""
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


def add_head(model, name):
    """Gives the adapter `name` a scalar head: nn.Linear(d, 1), no bias, N(0, 1/(d+1)).

    With states whose coordinates are about 1, the first scores then vary by about 1, too (Stiennon
    et al. 2020, arXiv:2009.01325). AutoModelForSequenceClassification has no bias either."""
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
    return found + ([model.heads[name].weight] if has_head(model, name) else [])


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
    configs(model)[name] = dict(configs(model)[source])
    if has_head(model, source):
        add_head(model, name).weight.data.copy_(model.heads[source].weight)
        model.heads[name].requires_grad_(trainable)


def merge_adapter(model, name):
    """Folds the adapter `name` into the base weights (LORA.4) and takes all wrappers off.

    Every other adapter, and every head, is gone afterwards. Returns the model. Raises ValueError
    for a name that no layer has, and for an adapted layer whose weight another module shares."""
    require(model, name)
    shared = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A and shared.count(id(layer.base.weight)) > 1:
            raise ValueError(f"{path} shares its weight with another layer, perhaps the embedding")
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            weight = layer.base.weight
            weight.data = (weight.data.float() + layer.delta(name)).to(weight.dtype)  # (LORA.4)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)
    configs(model).clear()
    model._modules.pop("heads", None)
    return model


# ------------------------------------------------------------------------------ files


def save_adapter(model, name, folder, base=None):
    """Writes A and B (LORA.1) of `name` to `folder` as peft would: adapter_config.json, and
    adapter_model.safetensors with `base_model.model.<path>.lora_A.weight` [r, in] and
    `...lora_B.weight` [out, r]; a head goes in as `base_model.model.score.weight` [1, d].

    base: the model that adapter_config.json names. A file appears complete or not at all."""
    require(model, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, head = {}, has_head(model, name)
    layers = {path: m for path, m in lora_layers(model).items() if name in m.lora_A}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A[name]
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B[name]
    if head:
        tensors["base_model.model.score.weight"] = model.heads[name].weight
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM", "bias": "none",
        "base_model_name_or_path": str(base or getattr(model, "name_or_path", "")),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": ["score"] if head else None, **configs(model)[name]}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.tmp", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.tmp", folder / "adapter_model.safetensors")
    (folder / "adapter_config.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "adapter_config.tmp", folder / "adapter_config.json")


def read_adapter(folder):
    """(config, tensors) of the adapter in `folder`. Raises FileNotFoundError where there is none,
    and ValueError for one that is damaged or uses what this file does not cover."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / file).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {file} is missing")
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        config["r"], config["lora_alpha"] = int(config["r"]), float(config["lora_alpha"])
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise ValueError(f"the adapter in {folder} is damaged: {problem!r}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {config.get('peft_type')} adapter, not LoRA")
    # Only what is known to be safe passes: PiSSA and LoRA-GA changed the base, DoRA and aLoRA
    # compute something else than (LORA.1), and an unknown option may do either.
    for key, value in config.items():
        if key not in HARMLESS and value not in (None, False, {}, [], "none"):
            raise ValueError(f"{folder} uses {key}, which lora.py does not cover")
    if config.get("init_lora_weights") not in INITS:
        raise ValueError(f"{folder} was started by init_lora_weights: "
                         f"{config['init_lora_weights']}, which lora.py does not cover")
    return config, tensors


def load_adapter(model, name, folder, trainable=False):
    """Adds the adapter in `folder` (PEFT format, ours or peft's own) to `model` as `name`.

    Its dropout is not taken over: a probability ratio needs two passes that agree. Raises what
    read_adapter raises, and ValueError for one that does not fit the model and a name in use."""
    forbid(model, name)
    config, tensors = read_adapter(folder)
    rank, root = config["r"], math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    head = tensors.pop("base_model.model.score.weight", None)
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
    paths = {m[1] for m in map(pattern.fullmatch, tensors) if m}
    expected = {f"base_model.model.{path}.lora_{which}.weight" for path in paths for which in "AB"}
    if not tensors or set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[:1]
        raise ValueError(f"{folder} holds other weights than pairs of lora_A and lora_B: {odd}")
    # All is checked before anything is added.
    layers = wrap(model, paths.__contains__)
    if paths - set(layers):
        raise ValueError(f"{folder} does not fit this model: no layer {min(paths - set(layers))}")
    pairs = {path: [tensors[f"base_model.model.{path}.lora_{which}.weight"] for which in "AB"]
             for path in layers}
    for path, (A, B) in pairs.items():
        inside, outside = layers[path].sizes()
        if A.shape != (rank, inside) or B.shape != (outside, rank):
            raise ValueError(f"{folder} does not fit this model: {path} has other sizes")
    if head is not None and head.shape != (1, model.get_output_embeddings().weight.shape[1]):
        raise ValueError(f"{folder} has a head of shape {list(head.shape)}, not one score per text")
    for path, (A, B) in pairs.items():
        layers[path].add(name, rank, config["lora_alpha"] / root, 0.0, trainable)  # (LORA.2)
        layers[path].lora_A[name].data.copy_(A)
        layers[path].lora_B[name].data.copy_(B)
    kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    configs(model)[name] = {key: config[key] for key in kept if key in config}
    if head is not None:
        add_head(model, name).weight.data.copy_(head)
        model.heads[name].requires_grad_(trainable)
