"""These scripts beside TRL, the library that most people use: same losses, and the cost of a step.

    pip install trl==1.16.0 peft
    pip install --no-deps --target trl-ppo trl==1.9.2       the last version that has PPO
    python benchmarks/vs_trl.py --trl-with-ppo trl-ppo      everything
    python benchmarks/vs_trl.py sft dpo                     only these tasks
    python benchmarks/vs_trl.py --model smollm2 sft         SmolLM2-135M in place of random weights

Both sides start from the same frozen model and the same adapter on its query and value layers. They
take turns, a step of ours and then a step of TRL, each in a process of its own. Every task runs
twice.

The first run compares. Both sides get the same batches, and in GRPO and PPO the same answers, which
our sampler draws. Then the loss and the norm of the gradient have to agree in each of 10 steps. TRL
logs no gradient in PPO. There the losses of policy and critic have to agree, each a mean over the
updates of a step. This takes four changes to TRL that no setting makes (see vs_trl_sides.py). The
table shows the largest difference of the 10 steps, and the largest value. The benchmark ends in an
error where a difference is above 1e-4 or, if the largest value is above 1, above 1e-4 times that
value.

The second run measures, and now each side samples for itself. A step lasts from the end of the step
before to its own end, without the wait for the other side. So everything counts: making batches,
sampling, scoring, the reference, the update, and what each side logs. Before its first step our DPO
reads all pairs with the reference, where TRL does so in each step. That time, divided by the number
of steps, is added to each of our steps. The memory is the peak of the process, above what it held
when its libraries and one model were loaded.

TRL gets our settings of the loss, the learning rate, the batch and the optimizer's epsilon, and it
computes in fp32 and without gradient checkpointing, as our scripts do. Everything else is its
default. The code of the two sides is in benchmarks/vs_trl_sides.py, and the results go to
benchmarks/vs_trl.json.
"""

import argparse
import json
import multiprocessing
import random
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
from benchmarks import vs_trl_sides  # noqa: E402
from cli import flags, models  # noqa: E402

RECORD = ROOT / "benchmarks" / "vs_trl.json"
COMPARED, WARM, ALLOWED = 10, 3, 1e-4  # steps compared, steps not timed, largest difference
# batch: answers per step, or pairs of answers; prompt and answer: their most words; group: G.
TASKS = {
    "sft": {"script": "sft", "batch": 16, "prompt": 32, "answer": 32},
    "reward_model": {"script": "reward_model", "batch": 8, "prompt": 32, "answer": 32},
    "dpo": {"script": "dpo", "batch": 8, "prompt": 32, "answer": 32},
    "grpo": {"script": "grpo", "batch": 16, "prompt": 32, "answer": 32, "group": 4},
    "grpo, long prompts": {"script": "grpo", "batch": 16, "prompt": 96, "answer": 32, "group": 8},
    "ppo": {"script": "ppo", "batch": 16, "prompt": 32, "answer": 32},
}


@dataclass(frozen=True)
class Job:
    """One run of one task, as both processes have to know it."""

    script: str
    batch: int
    prompt: int
    answer: int
    compare: bool  # else it measures
    steps: int
    threads: int
    folder: Path  # of the model, the adapters and the data that both sides load
    trl: str | None  # folder of the TRL to use in place of the installed one
    group: int = 1
    lr: float = 1e-3  # at the first step; it falls to 0 on both sides


# ------------------------------------------------------------------------------ the common start


def random_llama(tokenizer, ends):
    """A Llama of 1.4 million random weights. Its last `ends` tokens also end an answer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    # About as sure of the next token as a trained model is, and almost never of a special one.
    model.lm_head.weight.data.mul_(5.0)
    model.lm_head.weight.data[tokenizer.all_special_ids] = 0.0
    last = range(len(tokenizer) - ends, len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *last]
    return model


def make_rows(tokenizer, job):
    """As many data rows as the steps use, of random words. Each word is one token."""
    draw = random.Random(0)
    vocabulary = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    words = [word for word in vocabulary if re.fullmatch(" [a-z]{3,}", word)]

    def text(longest):
        return "".join(draw.choices(words, k=draw.randint(longest // 2, longest))).strip()

    lengths = {"prompt": job.prompt, "response": job.answer, "chosen": job.answer,
               "rejected": job.answer}
    count = job.steps * job.batch // job.group
    return [{key: text(longest) for key, longest in lengths.items()} for _ in range(count)]


def prepare(name, job):
    """Writes the model, two adapters and the data to the job's folder."""
    # GRPO is compared on answers of which some end early: there, means over tokens can differ. All
    # other sampled answers have the full length, so that neither side has less work by luck. PPO
    # cannot be compared otherwise. After an early end TRL pays the score one token later than ours,
    # and counts that token in the critic's loss. And it takes any padding token for padding.
    early = job.compare and job.script == "grpo"
    if name == "random":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "model")
        model = random_llama(tokenizer, 60 if early else 0)
    else:
        args = argparse.Namespace(device="cpu", dtype="fp32", trust_remote_code=False)
        model, tokenizer = models.open_model(args, name)
        # Two special tokens that it does not say.
        tokenizer.add_special_tokens({"pad_token": "<file_sep>"})
        if not early:
            tokenizer.add_special_tokens({"eos_token": "<repo_name>"})
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    # Without a chat template, both sides read plain text, and so exactly the same tokens.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(job.folder / "model")
    model.save_pretrained(job.folder / "model")
    torch.manual_seed(1)
    lora.add_adapter(model, "policy")
    lora.copy_adapter(model, "policy", "reward")
    lora.add_head(model, "reward")
    for adapter in ("policy", "reward"):
        lora.save_adapter(model, adapter, job.folder / adapter)
    (job.folder / "rows.json").write_text(json.dumps(make_rows(tokenizer, job)))


# ------------------------------------------------------------------------------ both sides


def run(job):
    """{side: what it reported of each step, its memory, and the version of TRL}."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name in ("ours", "trl"):
        pipes[name], end = context.Pipe()
        made = context.Process(target=vs_trl_sides.main, args=(name, job, end), daemon=True)
        made.start()
        processes.append(made)
        end.close()
    try:
        found = {name: {"version": pipe.recv(), "steps": []} for name, pipe in pipes.items()}
        for _ in range(job.steps):
            answers = None
            for name, pipe in pipes.items():
                pipe.send(answers)
                step = pipe.recv()
                answers = step.pop("answers", None)  # of ours, for TRL to learn from
                found[name]["steps"].append(step)
        for name, pipe in pipes.items():
            pipe.send(None)  # a turn after the last step, to end in
            found[name]["memory"] = pipe.recv()
        for process in processes:
            process.join()
    except (EOFError, OSError):
        said = [path.read_text().strip().split("\n")[-1] for path in job.folder.glob("*.log")]
        raise ValueError(f"a side of {job.script} ended early; they said last: {said}") from None
    return found


def differences(found):
    """{what both sides report: [its largest difference in a step, its largest value in a step]}."""
    result, (ours, trl) = {}, (found[name]["steps"] for name in ("ours", "trl"))
    for key in ("loss", "grad_norm", "value_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(ours, trl)]
        if all(None not in pair for pair in pairs):
            result[key] = [max(abs(a - b) for a, b in pairs), max(abs(b) for _, b in pairs)]
    return result


def cost(side):
    """Median and quartiles of the seconds per step, and MB of memory, of a side."""
    steps = side["steps"]
    # What our script does before its first step, in DPO the reference, belongs to all steps alike.
    before = (steps[0]["seconds"] - steps[0].get("own", steps[0]["seconds"])) / len(steps)
    low, middle, high = quantiles([row["seconds"] + before for row in steps[WARM:]], n=4)
    return {"seconds": middle, "quartiles": [low, high], "memory": side["memory"]}


def benchmark(task, model, steps, threads, folder):
    """The record of a task, after both of its runs."""
    record = {**TASKS[task], "steps": steps, "threads": threads, "torch": torch.__version__,
              "transformers": transformers.__version__, "peft": version("peft")}
    for compare, count in ((True, COMPARED), (False, WARM + steps)):
        with tempfile.TemporaryDirectory() as place:
            job = Job(**TASKS[task], compare=compare, steps=count, threads=threads,
                      folder=Path(place), trl=folder if task == "ppo" else None)
            prepare(model, job)
            found = run(job)
        if compare:
            record["differences"] = differences(found)
        else:
            record.update({name: cost(side) for name, side in found.items()})
    record["trl_version"] = found["trl"]["version"]
    record["ratio"] = record["ours"]["seconds"] / record["trl"]["seconds"]
    return record


# ------------------------------------------------------------------------------ command


HEAD = ("| | difference of the loss | of the gradient (PPO: critic's loss) | ours, s | TRL, s "
        "| ours / TRL | ours, MB | TRL, MB |\n|---|---|---|---|---|---|---|---|")


def table_row(task, record):
    """A row under HEAD: each difference of the largest value, each median with its quartiles."""
    found = record["differences"]
    second = found.get("grad_norm") or found["value_loss"]
    cells = [task, *(f"{off:.0e} of {largest:.2g}" for off, largest in (found["loss"], second))]
    for name in ("ours", "trl"):
        low, high = record[name]["quartiles"]
        cells.append(f"{record[name]['seconds']:.3f} ({low:.3f} to {high:.3f})")
    cells.append(f"{record['ratio']:.2f}")
    cells += [f"{record[name]['memory']:.0f}" for name in ("ours", "trl")]
    return "| " + " | ".join(cells) + " |"


def check(tasks, folder):
    """Raises ValueError for a task that is unknown, and for a library that is missing."""
    if set(tasks) - set(TASKS):
        raise ValueError(f"the tasks are {'; '.join(TASKS)}")
    if not find_spec("peft") or not (find_spec("trl") or tasks == ["ppo"]):
        raise ValueError("TRL or peft is missing: pip install trl==1.16.0 peft")
    if "ppo" in tasks and not (folder and (Path(folder) / "trl").is_dir()):
        raise ValueError("PPO needs an older TRL: pip install --no-deps --target trl-ppo "
                         "trl==1.9.2, and --trl-with-ppo trl-ppo; or name the tasks you want")


def main(argv=None):
    p = flags.parser(__doc__)
    p.add_argument("tasks", nargs="*", metavar="task", help=f"of {'; '.join(TASKS)} (all)")
    p.add_argument("--model", choices=("random", "smollm2"), default="random")
    p.add_argument("--steps", type=int, default=20, help="steps of each side that are timed (20)")
    p.add_argument("--threads", type=int, default=2, help="threads of each side (2)")
    p.add_argument("--trl-with-ppo", metavar="DIR", help="folder with TRL 1.9.2, for PPO")
    args = p.parse_args(argv)
    tasks = args.tasks or list(TASKS)
    with flags.errors():
        flags.quiet()
        check(tasks, args.trl_with_ppo)
        print(HEAD, flush=True)
        for task in tasks:
            found = benchmark(task, args.model, args.steps, args.threads, args.trl_with_ppo)
            record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
            record.setdefault(args.model, {})[task] = found
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
            print(table_row(task, found), flush=True)
            for key, (off, largest) in found["differences"].items():
                if not off <= ALLOWED * max(1.0, largest):
                    raise ValueError(f"{task}: {key} of the two sides differs by {off:g}")


if __name__ == "__main__":
    main()
