"""The recipes in docs/, executed as they stand there, in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from runner import ROOT, parameters


@pytest.fixture
def follow(workspace, tmp_path):
    """A function that executes a recipe's blocks in order and returns what each printed.

    bash and python are executed, diffs are applied, a yaml block is the file that its first line names.
    """
    copy = tmp_path / "project"
    for name in ("lib", "runner", "notebooks", "params"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copytree(workspace / "data", tmp_path / "work/data")
    shutil.copytree(workspace / "models", tmp_path / "work/models")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def recipe(name: str, **environment) -> list[str]:
        env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | environment | {
            "GRPO_NOISE_WORK": str(tmp_path / "work"), "PYTHONPATH": str(copy), "PATH": path,
            "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        printed = []
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / f"docs/{name}.md").read_text(), re.M | re.S):
            if kind == "yaml":
                (copy / block.splitlines()[0].removeprefix("# ")).write_text(block)
            elif kind != "text":
                command = {"bash": ["bash", "-e"], "python": ["python", "-"], "diff": ["git", "apply", "-"]}[kind]
                done = subprocess.run(command, input=block, cwd=copy, env=env, capture_output=True, text=True)
                assert done.returncode == 0, f"{block}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
                printed.append(done.stdout)
        return printed

    recipe.work, recipe.project = tmp_path / "work", copy
    return recipe


@pytest.mark.parametrize("name, files", [
    ("recipe-channel", ["lib/noise.py"]),
    ("recipe-data", ["lib/verifiers.py", "notebooks/02_train.ipynb", "notebooks/03_eval.ipynb",
                     "runner/evaluate.py", "runner/parameters.py"])])
def test_the_diff_of_a_recipe_fits_the_code(name, files):
    diff = re.search(r"^```diff\n(.*?)^```$", (ROOT / f"docs/{name}.md").read_text(), re.M | re.S)[1]
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.M) == files
    done = subprocess.run(["git", "apply", "--check", "-"], input=diff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_channel(follow):
    *_, law, _, proof, plan = follow("recipe-channel")
    assert law.count("changed") == 2  # the block itself asserts that longer completions err more often
    run = next((follow.work / "outputs/runs").iterdir())
    log = pd.read_parquet(run / "rewards.parquet")
    assert f"all {len(log)} rows" in proof and log.changed.any()
    assert "per token 0.05" in plan and "runs: 9" in plan
    new = subprocess.run([sys.executable, "-c", "from runner.parameters import *; print(run_id(resolve('tiny')))"],
                         cwd=follow.project, env=os.environ | {"PYTHONPATH": str(follow.project)}, capture_output=True,
                         text=True)
    # runs from before the change keep their names
    assert new.stdout.strip() == parameters.run_id(parameters.resolve("tiny"))


@pytest.mark.slow
def test_a_model(follow):
    base = follow("recipe-model")[1]
    shares = re.findall(r"([\d.]+)% right.* ([\d.]+)% of groups mixed", base)
    assert len(shares) == 2 and 0 < float(shares[0][0]) < 100 and float(shares[0][1]) > 0
    run = next((follow.work / "outputs/runs").iterdir())
    given = json.loads((run / "params.json").read_text())
    assert given["model"] == "./mine" and (run / "DONE").exists()


@pytest.mark.slow
def test_a_data_set_and_a_verifier(follow):
    _, attempts = follow("recipe-data")[-3:-1]
    assert "#### 72" in attempts
    run = next((follow.work / "outputs/runs").iterdir())
    assert json.loads((run / "params.json").read_text())["verifier"] == "hash"
    log = pd.read_parquet(run / "rewards.parquet")
    assert 0 < log.true_reward.mean() < 1 and log.sample_id.str.startswith("sums:").all()
    for name in ("02_train", "03_eval"):  # the patched notebooks are notebooks
        nbformat.validate(nbformat.read(follow.project / f"notebooks/{name}.ipynb", as_version=4))


@pytest.mark.slow
def test_comparing_and_a_figure_of_ones_own(tmp_path):
    for name in ("lib", "runner", "params", "outputs/tiny", "outputs/language-model-smol"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    env = os.environ | {"GRPO_NOISE_WORK": str(tmp_path), "PYTHONPATH": str(tmp_path),
                        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    text = (ROOT / "docs/recipe-plot.md").read_text()
    printed = []
    for kind, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.M | re.S):
        command = {"bash": ["bash", "-e"], "python": ["python", "-"]}[kind]
        done = subprocess.run(command, input=block, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    assert "B - A" in printed[0] and "label_flip_rate" in printed[1]
    clean, flip, _ = (float(line.split()[-1]) for line in printed[2].splitlines()[1:])
    assert 1.5 < flip / clean < 2.5  # "about twice"
    assert (tmp_path / "entropy.png").exists() and len(pd.read_csv(tmp_path / "entropy.csv")) == 4050
