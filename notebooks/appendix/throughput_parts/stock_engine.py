"""A stock trainer, timed: `python stock_engine.py trl|trl+vllm|unsloth MODEL OUT.json '{"max_steps": 3, ...}'`.

Each with its own defaults; batch, lengths, LoRA rank and learning rate are given. Rewards are coin flips, since the
weights may be random, and equal rewards would give no gradient.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

began = time.time()
kind, model_path, out, options = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if kind == "unsloth":
    from unsloth import FastLanguageModel  # before trl, which it changes

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

context = options.pop("context")
tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
parts: list[dict] = []


def now() -> float:
    """The time, once the GPU has done all work up to here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


class Clock(TrainerCallback):
    """Seconds of rollout, reward and training (forward, backward, optimiser) of each step."""

    def on_step_begin(self, *_, **__):
        self.times = [now()]

    def on_step_end(self, *_, **__):
        self.times.append(now())
        parts.append({p: b - a for p, a, b in zip(("rollout", "reward", "train"), self.times, self.times[1:],
                                                  strict=False)})


def coin(completions, **_):
    """Rewards that differ within a group."""
    clock.times.append(now())
    rewards = [float(random.random() < 0.5) for _ in completions]
    clock.times.append(now())
    return rewards


clock = Clock()
config = GRPOConfig(output_dir=str(out.with_suffix(".checkpoints")), report_to="none", save_strategy="no",
                    logging_steps=1, temperature=1.0, **options,
                    **({"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": context}
                       if kind == "trl+vllm" else {}))
if kind == "unsloth":
    model, _ = FastLanguageModel.from_pretrained(model_path, max_seq_length=context, load_in_4bit=False,
                                                 fast_inference=True, max_lora_rank=16)
    how = {"model": FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="unsloth")}
else:
    how = {"model": model_path, "peft_config": LoraConfig(r=16, lora_alpha=16, target_modules="all-linear",
                                                          task_type="CAUSAL_LM")}
questions = [f"What is {a} + {b}? Explain each step." for a in range(40) for b in range(10)]
trainer = GRPOTrainer(**how, args=config, train_dataset=Dataset.from_dict({"prompt": questions}), reward_funcs=coin,
                      processing_class=tokenizer, callbacks=[clock])
ready = time.time()
trainer.train()
sync = []
for _ in range(3 if kind == "trl+vllm" else 0):
    start = now()
    trainer.vllm_generation.sync_weights()
    sync.append(now() - start)
out.write_text(json.dumps({
    "engine": kind, "until_ready": ready - began, "parts": parts, "sync": sync,
    "completion_tokens": [h["completions/mean_length"] for h in trainer.state.log_history if "loss" in h],
    "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None}))
print(kind, "done", flush=True)
os._exit(0)  # the measurement is written; an engine's own shutdown may take minutes
