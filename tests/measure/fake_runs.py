"""A study of many finished runs that nobody trained, to time how runner plans and resumes: `make scale-sweep`.

    python tests/measure/fake_runs.py FOLDER [--cells 10000]

FOLDER becomes a workspace: real data, a base policy of random weights, params in study.yaml, and for every cell but the
last a sealed folder with the files of a finished run, each of a few bytes. Then
GRPO_NOISE_WORK=FOLDER python -m runner FOLDER/study.yaml --dry-run
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def write_study(folder: Path, cells: int) -> Path:
    """The study: 40 arms (or one, if there are fewer cells), as many seeds as it takes."""
    arms = {"label_flip_rate": [0.0, 0.1, 0.2, 0.3, 0.4], "learning_rate": [1e-4, 2e-4, 5e-4, 1e-3],
            "num_generations": [4, 8]} if cells >= 40 else {}
    study = {"title": f"{cells} cells", "arms": [arms], "seeds": list(range(cells // (40 if arms else 1))),
             "fixed": {"max_steps": 2, "save_steps": 1, "eval_interval": 0}, "use_selected": False}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def make_inputs(work: Path):
    """Generated data, and a base policy of random weights, in the workspace `work`."""
    from runner import dataset, policies

    dataset.make_dataset("arithmetic", work / "data/arithmetic", n_train=900, n_test=60)
    policy = work / "models/tiny-s0"
    policies.tiny_model(0).save_pretrained(policy)
    policies.tiny_tokenizer().save_pretrained(policy)
    (policy / "policy.json").write_text(json.dumps({"hash": policies.weights_hash(policies.tiny_model(0))}))


def sha256(text: str) -> str:
    """The sum of a file with this text."""
    return hashlib.sha256(text.encode()).hexdigest()


def finish_runs(study: Path) -> int:
    """Write the folders of all cells but the last one; how many. The study is in the workspace of this process."""
    from runner import dataset, files, studies

    _, grid = studies.load_study(str(study), "tiny")
    done = sha256("no adapter")
    record = json.dumps({"policy_hash": json.loads((study.parent / "models/tiny-s0/policy.json").read_text())["hash"],
                         "data_hash": dataset.data_hash("arithmetic"), "adapter_hash": done})
    same = {"provenance.json": record, "rewards.parquet": "no log", "metrics.parquet": "no metrics",
            "adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "no adapter"}
    for p in grid[:-1]:
        sealed = same | {"params.json": json.dumps(p.model_dump())}
        sums = "".join(f"{sha256(text)}  {name}\n" for name, text in sealed.items())  # files.seal waits for the disk
        (p.folder / "adapter").mkdir(parents=True)
        for name, text in (sealed | {files.SUMS: sums, "notebook.ipynb": "{}", "DONE": done + "\n"}).items():
            (p.folder / name).write_text(text)
    return len(grid) - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=10_000)
    args = parser.parse_args()
    work = args.folder.resolve()
    if "GRPO_NOISE_WORK" not in os.environ:  # lib reads it when it is imported
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=os.environ | {
            "GRPO_NOISE_WORK": str(work), "PYTHONPATH": str(ROOT)}))
    make_inputs(work)
    print(f"{finish_runs(write_study(work, args.cells))} finished runs in {work}")
