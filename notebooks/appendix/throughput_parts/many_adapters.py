"""Adapters evaluated by one vLLM engine, timed: `python many_adapters.py FOLDERS.json OUT.json QUESTIONS K MODEL`.

FOLDERS.json is a list of adapter folders of the smol profile. Each is sampled K times and asked greedily once.
"""

import json
import os
import sys
import time
from pathlib import Path

began = time.time()
folders, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
questions, k = int(sys.argv[3]), int(sys.argv[4])

from runner import dataset, engines, parameters, policies  # noqa: E402

params = parameters.resolve("smol", model=sys.argv[5])
engines.prepare_environment("vllm")
model, tokenizer = policies.load_policy(params, "transformers")
stop = model.generation_config.eos_token_id
del model
rows = dataset.load_split(params.data_dir, "test").select(range(questions))
prompts = [policies.format_prompt(p, params.prompt_template, tokenizer) for p in rows["problem"]]
llm = engines.vllm_engine(policies.policy_source(params), params, len(folders))
ready = time.time()
base, seconds, greedy, changed = engines.vllm_logprobs(llm, prompts[0]), [], [], []
for number, folder in enumerate(folders, 1):
    start = time.time()
    adapter = (number, folder)
    changed.append(engines.vllm_logprobs(llm, prompts[0], adapter) != base)
    engines.vllm_sample(llm, prompts, params.max_completion_length, k, 1.0, 0, stop, adapter)
    texts = engines.vllm_sample(llm, prompts, params.max_completion_length, 1, 0.0, 0, stop, adapter)
    greedy.append([t[0] for t in texts])
    seconds.append(time.time() - start)
out.write_text(json.dumps({"until_ready": ready - began, "seconds": seconds, "total": time.time() - began,
                           "greedy": greedy, "changed": changed}))
os._exit(0)
