"""Adapters evaluated by one vLLM server, timed: `python many_adapters.py FOLDERS.json OUT.json QUESTIONS K MODEL`.

FOLDERS.json is a list of adapter folders of the smol profile. Each is sampled K times and asked greedily once.
"""

import json
import sys
import time
from pathlib import Path

began = time.time()
folders, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
questions, k = int(sys.argv[3]), int(sys.argv[4])

from runner import dataset, evaluate, parameters, policies  # noqa: E402

params = parameters.resolve("smol", model=sys.argv[5])
model, tokenizer = policies.load_policy(params, "transformers")
stop = model.generation_config.eos_token_id
del model
rows = dataset.load_split(params.data_dir, "test").select(range(questions))
prompts = [policies.format_prompt(p, params.prompt_template, tokenizer) for p in rows["problem"]]
engine = evaluate.Served([params], tokenizer, stop, seed=0)
ready = time.time()
base, seconds, greedy, changed = engine.numbers(None, prompts[0]), [], [], []
for folder in map(Path, folders):
    start = time.time()
    changed.append(engine.numbers(folder, prompts[0]) != base)
    engine.ask(folder, prompts, k, 1.0)
    greedy.append([texts[0] for texts in engine.ask(folder, prompts, 1, 0.0)])
    seconds.append(time.time() - start)
engine.close()
out.write_text(json.dumps({"until_ready": ready - began, "seconds": seconds, "total": time.time() - began,
                           "greedy": greedy, "changed": changed}))
