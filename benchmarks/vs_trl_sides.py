"""The two sides of benchmarks/vs_trl.py, our scripts and TRL's trainers, in a process each.

A side loads the model, the adapter and the data of a job, and then trains. It waits for its turn
before each step, and reports after it.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback,
)

import common
import dpo
import grpo
import lora
import ppo
import reward_model
import sft

SCRIPTS = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "grpo": grpo, "ppo": ppo}
NAMES = {"sft": "SFT", "reward_model": "Reward", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}
# What makes both compute the same, first in ours and then in TRL. Where TRL has one coefficient for
# the critic's loss, it is 1: policy and critic share no weight, so it would only scale a gradient.
SETTINGS = {
    "sft": ({}, {}),
    "reward_model": ({"center": 0.001},
                     {"center_rewards_coefficient": 0.001, "adam_epsilon": 1e-5}),
    "dpo": ({"beta": 0.1}, {"beta": 0.1, "adam_epsilon": 1e-5}),
    "grpo": ({"temperature": 0.7, "missing_eos_score": None, "beta": 0.04},
             {"temperature": 0.7, "beta": 0.04, "loss_type": "grpo", "adam_epsilon": 1e-5,
              "shuffle_dataset": False}),
    "ppo": ({"temperature": 0.7, "missing_eos_score": None, "beta": 0.05, "value_clip": 1.0,
             "ppo_epochs": 2, "minibatches": 1},
            {"temperature": 0.7, "kl_coef": 0.05, "cliprange_value": 1.0, "vf_coef": 1.0,
             "num_ppo_epochs": 2, "num_mini_batches": 1, "num_sample_generations": 0}),
}
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}  # as lora.py has it
COLUMNS = {"sft": {"completion": "response"}, "grpo": {}, "ppo": {},
           "dpo": {"chosen": "chosen", "rejected": "rejected"},
           "reward_model": {"chosen": "chosen", "rejected": "rejected"}}


class Turn:
    """One end of a pipe: a side waits here for its turn, and reports the step that it made."""

    def __init__(self, pipe):
        self.pipe, self.clock, self.answers = pipe, 0.0, None

    def wait(self):
        self.answers = self.pipe.recv()
        self.clock = time.perf_counter()

    def done(self, numbers):
        self.pipe.send({"seconds": time.perf_counter() - self.clock, **numbers})
        self.wait()


def peak():
    """MB that this process has held at most."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return held * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(name, job, pipe):
    """The process of a side. It sends its version, then each step, and at last MB of memory."""
    # What libraries print would get between the rows of the table.
    log = os.open(job.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.trl:
        sys.path.insert(0, job.trl)
    torch.set_num_threads(job.threads)
    rows = json.loads((job.folder / "rows.json").read_text())
    train, found = (ours if name == "ours" else trl)(job, rows, Turn(pipe))
    # Loading may have a peak of its own, which Linux can forget.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    pipe.send(found)
    train()
    pipe.send(peak() - before)


def letters(prompts, responses, rows):
    """A reward that costs nothing: how often the letter e occurs."""
    return [response.count("e") / 10 for response in responses]


# ------------------------------------------------------------------------------ ours


def ours(job, rows, turn):
    """(function that trains our script in turns, None)."""
    script, settings = SCRIPTS[job.script], dict(SETTINGS[job.script][0])
    model, tokenizer = common.load_model(str(job.folder / "model"), "cpu", "fp32")
    lora.load_adapter(model, "policy", job.folder / "policy", trainable=True)
    lora.load_adapter(model, "reward", job.folder / "reward", job.script == "reward_model")
    if job.script in ("grpo", "ppo"):
        settings["max_new_tokens"] = job.answer
    if job.script == "grpo":
        settings["group_size"] = job.group
    config = script.Config(steps=job.steps, batch_size=job.batch, lr=job.lr, warmup=0.0, **settings)
    reward = {"grpo": [letters], "ppo": ["reward"]}.get(job.script, [])
    answers = record_answers() if job.compare else None

    def log(row, samples, state):
        turn.done({"own": row["seconds"], "loss": row.get("policy_loss", row["loss"]),
                   "grad_norm": row["grad_norm"], "value_loss": row.get("value_loss"),
                   "answers": answers})

    def train():
        turn.wait()
        script.train(model, tokenizer, rows, *reward, config, log)

    return train, None


def record_answers():
    """A dictionary that holds what our sampler drew last, from now on."""
    last, sample = {}, common.sample

    def recorded(model, x, x_mask, *more):
        drawn = sample(model, x, x_mask, *more)
        G = len(drawn[0]) // len(x)
        prompts = [ids[real.bool()].tolist() for ids, real in zip(x, x_mask)]
        last["prompt_ids"] = [ids for ids in prompts for _ in range(G)]
        last["completion_ids"] = [ids[real.bool()].tolist() for ids, real in zip(*drawn[:2])]
        return drawn

    common.sample = recorded
    return last


# ------------------------------------------------------------------------------ TRL


class Steps(TrainerCallback):
    """Makes TRL wait for its turn before each step, and reports the step after it."""

    def __init__(self, turn, compare):
        self.turn, self.compare = turn, compare

    def on_train_begin(self, args, state, control, **more):
        self.turn.wait()

    def on_step_end(self, args, state, control, **more):
        if not self.compare:
            self.turn.done({})

    def on_log(self, args, state, control, logs=None, **more):
        loss = logs.get("loss", logs.get("loss/policy_avg"))
        if self.compare and loss is not None:
            self.turn.done({"loss": loss, "grad_norm": logs.get("grad_norm"),
                            "value_loss": logs.get("loss/value_avg")})


def trl(job, rows, turn):
    """(function that trains TRL's trainer in turns, the version of TRL)."""
    library = importlib.import_module("trl.experimental.ppo" if job.script == "ppo" else "trl")
    classes = [getattr(library, NAMES[job.script] + end) for end in ("Trainer", "Config")]
    model = load(job, scorer=job.script == "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(job.folder / "model", padding_side="left")
    # The rows in the order in which our script draws them, and the plain text that it reads.
    order = [i for step in range(job.steps)
             for i in common.batch_rows(step, len(rows), job.batch // job.group, 0)]
    data = Dataset.from_list([
        {"prompt": f"User: {rows[i]['prompt']}\n\nAssistant:",
         **{column: f" {rows[i][of]}" for column, of in COLUMNS[job.script].items()}}
        for i in order])

    def train():
        make = make_ppo if job.script == "ppo" else make_trainer
        make(job, classes, model, tokenizer, data, turn).train()

    return train, version("trl")


def load(job, scorer=False):
    """The model, or the same with a scalar head in place of its output head."""
    if scorer:
        return AutoModelForSequenceClassification.from_pretrained(
            job.folder / "model", dtype=torch.float32, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32)


def start_from(model, folder):
    """Gives a model with an adapter of peft's the weights, and the head, that are in `folder`."""
    saved = load_file(folder / "adapter_model.safetensors")
    for path, p in model.named_parameters():
        path = re.sub(r"\.default|\.modules_to_save|\.original_module", "", path)
        path = "base_model.model." + path.removeprefix("base_model.model.")
        if path in saved:
            p.data.copy_(saved[path])


def arguments(job):
    """What the configurations of all trainers are given."""
    return {
        "output_dir": str(job.folder / "trl"), "max_steps": job.steps, "learning_rate": job.lr,
        "per_device_train_batch_size": job.batch, "train_sampling_strategy": "sequential",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1 if job.compare else 10,
        **SETTINGS[job.script][1]}


def make_trainer(job, classes, model, tokenizer, data, turn):
    """TRL's trainer of all scripts but PPO."""
    from peft import LoraConfig

    more, config, head = {}, arguments(job), {}
    if job.script == "reward_model":
        head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if job.script == "grpo":
        config["num_generations"], config["max_completion_length"] = job.group, job.answer
        more["reward_funcs"] = lambda completions, **rest: letters(None, completions, None)
        if job.compare:  # our answers in place of its own
            more["rollout_func"] = lambda prompts, trainer: {**turn.answers, "logprobs": None}
    trainer = classes[0](
        model=model, args=classes[1](**config), train_dataset=data, processing_class=tokenizer,
        callbacks=[Steps(turn, job.compare)], peft_config=LoraConfig(**ADAPTER, **head), **more)
    start_from(trainer.model, job.folder / ("reward" if head else "policy"))
    return trainer


def make_ppo(job, classes, model, tokenizer, data, turn):
    """TRL's PPO. Its critic has an adapter and a head, like ours; its judge is a third model."""
    from peft import LoraConfig, inject_adapter_in_model

    critic, judge = load(job, scorer=True), load(job, scorer=True)
    inject_adapter_in_model(LoraConfig(**ADAPTER), critic)
    critic.score.requires_grad_(True)
    start_from(critic, job.folder / "reward")
    start_from(judge, job.folder / "reward")
    data = data.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids},
                    remove_columns=data.column_names)
    trainer = classes[0](
        args=classes[1](total_episodes=len(data), response_length=job.answer, **arguments(job)),
        processing_class=tokenizer, model=model, ref_model=None, reward_model=judge,
        value_model=critic, train_dataset=data, callbacks=[Steps(turn, job.compare)],
        peft_config=LoraConfig(**ADAPTER))
    start_from(trainer.policy_model, job.folder / "policy")
    if job.compare:
        compute_ours(job, trainer, critic, data, turn)
    return trainer


def compute_ours(job, trainer, critic, data, turn):
    """Changes four things in TRL's PPO that no setting changes, to compare its losses with ours."""
    module = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    # 1. Its data loader always shuffles.
    trainer.dataloader = DataLoader(data, job.batch, collate_fn=trainer.data_collator)

    # 2. It samples. Here it gets our answers, and the logits that its own policy has for them.
    def answers(policy, queries, size, pad, generation):
        ids = torch.cat([queries, torch.tensor(turn.answers["completion_ids"])], 1)
        logits = module.forward(policy, ids, pad).logits[:, queries.shape[1] - 1 : -1]
        return ids, logits / generation.temperature

    module.batch_generation = answers

    # 3. It divides advantages by the unbiased standard deviation, (RL.6) by the biased one.
    variance = module.masked_var
    module.masked_var = lambda values, mask: variance(values, mask, unbiased=False)

    # 4. It does not clip gradients. Ours clips that of the policy and that of the critic.
    parts = [[p for p in part.parameters() if p.requires_grad]
             for part in (trainer.policy_model, critic)]

    def clip(*given):
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part, 1.0)

    trainer.optimizer.optimizer.register_step_pre_hook(clip)
