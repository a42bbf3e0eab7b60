"""Tokens a second of rollout servers on one GPU: `python server_speed.py PROFILE OUT.json OPTIONS`.

As many requests as `runs` runs of the profile send in one step, each run with an adapter of its own, and no training
beside them. OPTIONS is JSON: `runs`, a list; `servers` on the GPU, which share the runs; `seeded`, whether requests
have seeds, as those of runs do; `lora`, whether they ask an adapter or the base policy.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from peft import get_peft_model

from runner import dataset, engines, parameters, policies, server
from runner.rollouts import Client, request_seed

profile, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
servers, counts = options.get("servers", 1), options.get("runs", [1, 4, 8])
seeded, lora = options.get("seeded", True), options.get("lora", True)
params = parameters.resolve(profile)
model, tokenizer = policies.load_policy(params, "transformers")
model, stops = model.cpu(), model.generation_config.eos_token_id  # the GPU is the servers'
prompts = policies.as_prompts(dataset.load_split(params.data_dir, "train"), params, tokenizer)[0]["prompt"]


def adapter(folder: Path) -> Path:
    """An adapter whose B is not zero, but so small that completions are as long as the base policy's."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, policies.lora(params))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-4)
    adapted.save_pretrained(folder)
    return folder


def ask(run: int, prompt: int) -> int:
    """Completions of one prompt of a run: how many tokens."""
    client = clients[run % servers]
    sampling = {"n": params.num_generations, "temperature": params.temperature,
                "max_tokens": params.max_completion_length, "stop_token_ids": stops}
    if seeded:
        sampling["seed"] = request_seed(run, prompt)
    text = prompts[(run * params.prompts_per_step + prompt) % len(prompts)]
    name = f"adapter-{run}" if lora else engines.BASE
    return sum(len(c.ids) for c in client.complete(name, tokenizer(text)["input_ids"], **sampling))


def step(runs: int) -> dict:
    """One step of `runs` runs at once."""
    places = [(run, prompt) for prompt in range(params.prompts_per_step) for run in range(runs)]
    began = time.perf_counter()
    with ThreadPoolExecutor(len(places)) as threads:
        tokens = sum(threads.map(lambda place: ask(*place), places))
    return {"runs": runs, "seconds": time.perf_counter() - began, "tokens": tokens}


runs_each = -(-max(counts) // servers)
completions = min(1024, runs_each * params.prompts_per_step * params.num_generations)
serving = replace(server.Serving.of([params], 1, completions), adapters=runs_each, on_a_gpu=servers)
began = time.perf_counter()
started = [server.Server(serving, out.with_suffix(f".{i}.log"), engines.SERVER_MEMORY) for i in range(servers)]
measured = []
try:
    clients = [Client(one.wait().url, one.key) for one in started]
    start = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = adapter(Path(folder))
        for run in range(max(counts)):
            clients[run % servers].load(f"adapter-{run}", path)
        step(1)  # the first requests compile kernels
        for runs in counts:
            measured += [step(runs), step(runs)]
finally:
    for one in started:
        one.stop()
out.write_text(json.dumps({"options": options, "start": start, "steps": measured}) + "\n")
