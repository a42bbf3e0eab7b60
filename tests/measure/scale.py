"""A study of many runs through the real 03_eval and 04_analysis: seconds and memory of every cell. `make scale`.

Runs, reward logs and graded answers are made from a logistic model and lie where 02_train and 03_eval would have left
them, so the notebooks find every answer there and do the rest of their work. Memory is the resident size of a
notebook's kernel and its children, read ten times a second.
"""
import argparse
import json
import os
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

STUDY = "scale"


def write_workspace(runs: int, seeds: int, questions: int, k: int, steps: int):
    """Data, an untrained base policy, a study file of `runs` runs and their folders, all in WORK."""
    from synthetic_study import graded, reward_log

    from lib import rewards
    from runner import WORK, dataset, files, policies, studies
    from runner import runs as contract

    dataset.make_dataset("arithmetic", n_train=1000, n_test=questions)
    policy = policies.tiny_model(0)
    for part in (policy, policies.tiny_tokenizer()):
        part.save_pretrained(WORK / "models/tiny-s0")
    arms = runs // seeds - 1
    rates = [np.linspace(0.01, 0.6, n).round(4).tolist() for n in np.diff(np.linspace(0, arms, 5).round().astype(int))]
    names = ("label_flip_rate", "mask_rate", "false_positive_rate", "false_negative_rate")
    file = WORK / f"{STUDY}.yaml"
    file.write_text(yaml.safe_dump({
        "title": "Scale", "arms": [{}, *({name: values} for name, values in zip(names, rates, strict=True) if values)],
        "seeds": list(range(seeds)), "eval_samples": k, "use_selected": False,
        "fixed": {"max_steps": steps, "eval_interval": steps}}))
    design, grid = studies.load_study(str(file), "tiny")
    asked = dataset.load_split("arithmetic", design.eval_split).to_pandas()[["sample_id", "level", "type"]]
    prompts = grid[0].per_device_train_batch_size // grid[0].num_generations
    practised = np.resize(dataset.load_split("arithmetic", "train")["sample_id"], steps * prompts)
    difficulty = np.random.default_rng(0).normal(0, 1.3, len(asked))
    identity = policies.weights_hash(policies.load_policy(grid[0])[0])
    settings = [design.eval_split, k, 1234, design.eval_limit, dataset.data_hash("arithmetic"),
                identity]  # as in 03_eval

    def keep(run: Path, skill: float, seed: int, *done: str):
        name = f"eval-{files.digest([*settings, *done])}.parquet"
        graded(asked, difficulty + skill, k, np.random.default_rng(seed)).to_parquet(run / name, index=False)

    grid[0].base_folder.mkdir(parents=True)
    keep(grid[0].base_folder, -0.8, 0)
    for i, p in enumerate(grid):
        (p.folder / "adapter").mkdir(parents=True)
        (p.folder / "adapter/adapter_model.safetensors").write_text(str(i))
        (p.folder / "DONE").write_text(contract.adapter_hash(p.folder) + "\n")
        (p.folder / "params.json").write_text(json.dumps(p.model_dump()))
        (p.folder / "provenance.json").write_text(json.dumps({"policy_hash": identity, "steps": steps}))
        keep(p.folder, -0.8 + 3.2 * max(p.channel.J, 0) ** 0.5, i, (p.folder / "DONE").read_text())
        log, _ = reward_log(p.channel, p.noise_seed, steps, p.num_generations, prompts, practised)
        log = log.assign(returned=log["observed_reward"], changed=log["observed_reward"] != log["verdict"],
                         completion_tokens=4, grader="exact")
        table = pa.Table.from_pandas(log, rewards.LOG_SCHEMA, preserve_index=False)
        pq.write_table(table, p.folder / "rewards.parquet")
        means = log.groupby("step", as_index=False)[["true_reward", "observed_reward"]].mean()
        means.columns = ["step", "clean_mean", "observed_mean"]
        means.to_parquet(p.folder / "metrics.parquet")
        files.seal(p.folder, "params.json", "provenance.json", "rewards.parquet", "metrics.parquet",
                      "adapter/adapter_model.safetensors")


def watch(found: list, stop: threading.Event):
    """Append (time, CPU seconds, resident bytes) of all processes below this one, ten times a second."""
    me, used = psutil.Process(), {}
    while not stop.wait(0.1):
        size = 0
        for child in me.children(recursive=True):
            try:
                size += child.memory_info().rss
                used[child.pid] = sum(child.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        found.append((time.time(), sum(used.values()), size))


def execute(name: str, folder: Path, **parameters) -> pd.DataFrame:
    """Execute a notebook into `folder`; a row a code cell: notebook, cell, seconds, CPU s, GiB (the most so far)."""
    import papermill

    from runner import ROOT

    found, stop = [], threading.Event()
    watcher = threading.Thread(target=watch, args=(found, stop))
    watcher.start()
    try:
        notebook = papermill.execute_notebook(ROOT / f"notebooks/{name}.ipynb", folder / f"{name}.ipynb", parameters,
                                              progress_bar=False, cwd=ROOT)
    finally:
        stop.set()
        watcher.join()
    at, cpu, size = np.array(found).T
    rows = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            times = (cell.metadata.papermill[t] for t in ("start_time", "end_time"))
            start, end = (datetime.fromisoformat(t).replace(tzinfo=UTC).timestamp() for t in times)
            rows.append((name, cell.id, end - start, np.diff(np.interp([start, end], at, cpu))[0],
                         size[at <= end + 0.1].max(initial=0) / 2**30))
    return pd.DataFrame(rows, columns=["notebook", "cell", "seconds", "CPU s", "GiB"])


def main() -> int:
    """Make the study, execute both notebooks, print a row a cell; 1 if tables and analysis take more than allowed."""
    parser = argparse.ArgumentParser(prog="make scale", description=__doc__.splitlines()[0])
    for name, default in (("runs", 1000), ("seeds", 10), ("questions", 5000), ("samples", 4), ("steps", 150)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="where the study is made and kept, to repeat with it; temporary if not given")
    parser.add_argument("--max-seconds", type=float, default=180, help="of the tables of 03_eval and of 04_analysis")
    parser.add_argument("--max-gib", type=float, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["GRPO_NOISE_WORK"] = work = args.folder or temporary
        study = Path(work) / f"{STUDY}.yaml"
        if not study.exists():
            write_workspace(args.runs, args.seeds, args.questions, args.samples, args.steps)
        folder = Path(work) / "outputs" / STUDY
        folder.mkdir(parents=True, exist_ok=True)
        cells = pd.concat([execute("03_eval", folder, study=str(study)), execute("04_analysis", folder, study=STUDY)])
    asked = cells["notebook"].eq("04_analysis") | cells["cell"].isin(["tables", "summary"])
    total = cells[asked].agg({"seconds": "sum", "CPU s": "sum", "GiB": "max"})
    print(cells[cells["CPU s"] >= 0.5].round(2).to_string(index=False))
    rest = cells[~asked].sum(numeric_only=True)
    for what, part in (("the rest of 03_eval: start, replay of the noise, signals", rest),
                       ("the tables of 03_eval and all of 04_analysis", total)):
        print(f"{part['seconds']:.0f} s, {part['CPU s']:.0f} s of CPU: {what}")
    print(f"{total['GiB']:.2f} GiB at most")
    return int(total["seconds"] > args.max_seconds or total["GiB"] > args.max_gib)


if __name__ == "__main__":
    sys.exit(main())
