"""The training part of a step, timed under one choice of options: `python training_step.py MODEL OUT.json OPTIONS`.

OPTIONS is JSON for GRPOConfig, such as '{"per_device_train_batch_size": 32}'. It may also hold `trainer`: "trl" (as it
is) or "arranged" (`runner.trainer`), with its `width_step`. `cudnn` says whether its attention may be used. `signal` is
the share of groups whose rewards differ. Completions are made up: 128 of random lengths around those of MATH. So no
engine takes part, and what is timed is forward passes, loss, backward passes and the optimiser. The loss is TRL's own.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in 02_train

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import runner.trainer

PROMPTS, GROUP = 16, 8  # prompts of a step, and completions of each
PROMPT_TOKENS, COMPLETION_TOKENS = (60, 300), (120, 512)  # shortest and longest

folder, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
steps = options.pop("max_steps", 4)
longest = options.pop("longest", COMPLETION_TOKENS[1])
kind = {"trl": GRPOTrainer, "arranged": runner.trainer.Trainer}[options.pop("trainer", "trl")]
signal = options.pop("signal", 1.0)
runner.trainer.WIDTH_STEP = options.pop("width_step", runner.trainer.WIDTH_STEP)
torch.backends.cuda.enable_cudnn_sdp(options.pop("cudnn", True))
on_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
draw = random.Random(0)


def tokens(shortest: int, most: int) -> list[int]:
    """A sequence of random tokens and of random length."""
    return [draw.randrange(model.config.vocab_size) for _ in range(draw.randint(min(shortest, most), most))]


def rollout(prompts, trainer):
    """Made-up completions for prompts, each of which stands GROUP times in a row."""
    prompt_ids = [tokens(*PROMPT_TOKENS) for _ in prompts[::GROUP]]
    completion_ids = [tokens(COMPLETION_TOKENS[0], longest) for _ in prompts]
    return {"prompt_ids": [ids for ids in prompt_ids for _ in range(GROUP)], "completion_ids": completion_ids,
            "logprobs": None}


def coin(completions, **_):
    """Rewards that differ within a share of the groups, and are 0 in the others; then the training part begins."""
    clock.begin()
    groups = len(completions) // GROUP
    taught = [i < round(signal * groups) for i in range(groups)]
    return [float(taught[i // GROUP] and i % 2) for i in range(len(completions))]


class Clock(TrainerCallback):
    """Seconds from the rewards to the end of the optimiser's step."""

    seconds: list[float] = []

    def begin(self):
        """The rewards are there."""
        self.began = self.now()

    def on_step_end(self, *_, **__):
        self.seconds.append(self.now() - self.began)

    def now(self) -> float:
        """The time, once the GPU has done all work up to here."""
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


clock = Clock()
batch = options.pop("per_device_train_batch_size", 8)
config = GRPOConfig(output_dir=str(out.with_suffix(".checkpoints")), report_to="none", save_strategy="no",
                    max_steps=steps, per_device_train_batch_size=batch, num_generations=GROUP,
                    gradient_accumulation_steps=PROMPTS * GROUP // batch, max_completion_length=longest,
                    bf16=on_gpu, use_cpu=not on_gpu, learning_rate=1e-5,
                    **({"gradient_checkpointing": False} | options))
trainer = kind(model=model.to("cuda" if on_gpu else "cpu"), args=config, reward_funcs=coin,
               train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 64}), processing_class=tokenizer,
               peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
               callbacks=[clock], rollout_func=rollout)
trainer.train()
peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
out.write_text(json.dumps({"options": json.loads(sys.argv[3]), "seconds": clock.seconds, "peak_memory_gib": peak}))
