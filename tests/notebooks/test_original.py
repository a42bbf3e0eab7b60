"""The command lines of the original experiment, with the tiny profile."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from runner import ROOT

SCRIPTS = ("merge_math_datasets", "split_math_train_set", "train_baseline_hyperparameter", "train_with_reward_flips",
           "train_with_reward_masking", "evaluate_selected_hyperparameters_more_seeds",
           "evaluate_random_flips_rewards", "evaluate_masked_rewards")
PAGE = (ROOT / "docs/original.md").read_text()


def call(work, script, *options):
    """Call a script of the original in the workspace `work`."""
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"GRPO_NOISE_WORK": str(work)}
    command = [sys.executable, str(ROOT / f"scripts/{script}.py"), *options]
    return subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_are_parameters_of_the_notebook_and_the_page_has_the_command(script, tmp_path):
    source = (ROOT / f"scripts/{script}.py").read_text()
    notebook = re.search(r'execute\("(\w+)"', source)[1]
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", 4).cells
    parameters = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    options = set(re.findall(r"--(\w+) VALUE", call(tmp_path, script, "--help").stdout))
    assert options and options <= set(re.findall(r"^(\w+) =", parameters, re.M))
    row = next(line for line in PAGE.splitlines() if f"`python scripts/{script}.py" in line)
    assert set(re.findall(r"--(\w+)", row)) <= options and f"`{notebook}`" in row


def test_all_scripts_together_are_short():
    lines = [(ROOT / f"scripts/{name}.py").read_text().count("\n") for name in (*SCRIPTS, "notebook")]
    assert sum(lines) <= 120


def test_a_mistyped_option_is_refused(tmp_path):
    done = call(tmp_path, "train_with_reward_flips", "--label_flip", "0.2")
    assert done.returncode == 2 and "unrecognized arguments: --label_flip" in done.stderr


@pytest.mark.slow
def test_the_whole_experiment_at_a_small_size(workspace, tmp_path):
    shutil.copytree(workspace / "models", tmp_path / "models")
    made = call(tmp_path, "merge_math_datasets", "--source", "arithmetic")
    assert made.returncode == 0 and "data/arithmetic is new" in made.stdout + made.stderr
    again = call(tmp_path, "split_math_train_set", "--source", "arithmetic")
    assert again.returncode == 0 and "nothing to do" in again.stdout + again.stderr

    shared = ("--profile", "tiny", "--learning_rate", "1e-3", "--per_device_train_batch_size", "64",
              "--gradient_accumulation_steps", "2", "--grpo_beta", "0.0", "--num_train_epochs", "0.02")
    commands = {"train_baseline_hyperparameter": (), "train_with_reward_flips": ("--label_flip_rate", "0.5"),
                "train_with_reward_masking": ("--mask_rate", "0.6")}
    for script, rate in commands.items():
        done = call(tmp_path, script, *shared, *rate, "--seed", "0")
        assert done.returncode == 0, done.stderr[-2000:]

    fixed = ("{learning_rate: 1.0e-3, per_device_train_batch_size: 64, gradient_accumulation_steps: 2, "
             "num_train_epochs: 0.02, max_steps: -1}")
    evaluations = {"evaluate_selected_hyperparameters_more_seeds": ("own-seeds", "{}"),
                   "evaluate_random_flips_rewards": ("own-flip", "{label_flip_rate: 0.5}"),
                   "evaluate_masked_rewards": ("own-mask", "{mask_rate: 0.6}")}
    for script, (study, arm) in evaluations.items():
        file = tmp_path / f"{study}.yaml"
        file.write_text(f"title: {study}\narms: [{arm}]\nseeds: [0]\nfixed: {fixed}\nuse_selected: false\n"
                        "eval_limit: 20\n")
        done = call(tmp_path, script, "--profile", "tiny", "--study", str(file))
        assert done.returncode == 0, done.stderr[-2000:]
        runs = pd.read_csv(tmp_path / f"outputs/{study}/runs.csv")
        assert runs.status.tolist() == ["done"]  # the run of the script is the run of the study
