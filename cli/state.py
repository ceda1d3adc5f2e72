"""What a run needs, beside its flags and logs, in order to go on after it was interrupted.

state.safetensors holds the adapters, the `state` that train() gives (the step, the optimizer, the
generator, beta), and how long metrics.jsonl and samples.jsonl were. It is written beside the last
one and then takes its place, so that a run that is killed at any moment leaves a whole one."""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import lora

FILE = "state.safetensors"
LOGS = ("metrics.jsonl", "samples.jsonl")


def write(folder, model, state):
    """Saves the adapters on `model` and the `state` of train(). Raises OSError if it cannot, and
    ValueError for a number that is not finite."""
    sizes = {}
    for name in LOGS:
        with open(folder / name, "ab") as file:  # what the state says is there must be on the disk
            os.fsync(file.fileno())
            sizes[name] = file.tell()
    tensors = {}
    tree = pack({"adapters": adapters(model), "layers": layers(model), "train": state,
                 "sizes": sizes}, "", tensors)
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    check_finite(tensors.values())
    text = json.dumps(tree, allow_nan=False)
    write_file(folder / FILE, save(tensors, {"state": text, "check": check(text, tensors)}))


def check_finite(tensors):
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError("a weight or a moment of the optimizer is not a finite number; begin anew "
                         "with a lower --lr. What was saved before is kept")


def write_file(path, data):
    """Writes `data` beside `path`, then puts it in its place: a file is whole, or not there."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_adapter(folder, model, name):
    """lora.save_adapter, flushed when this returns. Raises OSError if it cannot, and ValueError for
    a number that is not finite."""
    check_finite(lora.adapter_parameters(model, name))
    try:
        lora.save_adapter(model, name, folder)
        for file in Path(folder).glob("adapter_*"):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
    except SafetensorError as problem:  # a full disk, too
        raise OSError(f"cannot save {folder}: {problem}") from problem
    finally:
        for file in Path(folder).glob("adapter_*.tmp"):
            file.unlink()


def read(folder, model):
    """The `state` that the run in `folder` goes on from, its adapters put into `model`; None where
    nothing was saved yet. Raises ValueError for a damaged file, and one that does not fit."""
    folder = Path(folder)
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            noted = file.metadata() or {}
        if noted.get("check") != check(noted.get("state", ""), tensors):
            raise ValueError("its checksum is wrong")
        saved = unpack(json.loads(noted["state"]), tensors)
        where = saved["layers"]
        sizes = {name: (folder / name).stat().st_size for name in LOGS}
        if any(sizes[name] < saved["sizes"][name] for name in LOGS):
            raise ValueError("metrics.jsonl or samples.jsonl is shorter than it was")
    except (SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"cannot go on from {folder / FILE}: {problem}") from problem
    here = adapters(model)
    shapes = ({name: [tuple(p.shape) for p in found] for name, found in part.items()}
              for part in (here, saved["adapters"]))
    if next(shapes) != next(shapes) or where != layers(model):
        raise ValueError(f"cannot go on from {folder / FILE}: it was saved with another model, "
                         "--adapter or --reward")
    with torch.no_grad():
        for name, found in saved["adapters"].items():
            for parameter, value in zip(here[name], found):
                parameter.copy_(value)
    return {**saved["train"], "sizes": saved["sizes"]}


def cut_logs(folder, state):
    """Takes the rows of steps that will be taken again out of metrics.jsonl and samples.jsonl."""
    for name in LOGS:
        os.truncate(folder / name, state["sizes"][name])


def adapters(model):
    """{name: parameters} of all adapters, the frozen ones too: their folders may have changed."""
    return {name: lora.adapter_parameters(model, name) for name in sorted(lora.names(model))}


def layers(model):
    """{name: [[path of a layer, its scale]]} of all adapters: what their parameters belong to."""
    found = lora.lora_layers(model).items()
    return {name: [[path, layer.scale[name]] for path, layer in found if name in layer.lora_A]
            for name in sorted(lora.names(model))}


def check(text, tensors):
    """A checksum of all that is saved: a bit that flipped on the disk must not be trained on."""
    total = zlib.crc32(text.encode())
    for key in sorted(tensors):
        total = zlib.crc32(tensors[key].flatten().view(torch.uint8).numpy().tobytes(), total)
    return str(total)


def pack(value, path, tensors):
    """`value` as JSON can hold it: its tensors go into `tensors`, and their keys into their places;
    a dict becomes a list of pairs, for its keys may be numbers."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, pack(x, f"{path}/{key}", tensors)] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        return [pack(x, f"{path}/{i}", tensors) for i, x in enumerate(value)]
    return value


def unpack(tree, tensors):
    """What `pack` was given, with lists in place of tuples."""
    if isinstance(tree, dict) and "tensor" in tree:
        return tensors[tree["tensor"]]
    if isinstance(tree, dict):
        return {key: unpack(x, tensors) for key, x in tree["items"]}
    if isinstance(tree, list):
        return [unpack(x, tensors) for x in tree]
    return tree
