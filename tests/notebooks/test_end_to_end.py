"""The real notebooks with real TRL: a small study, a failing run, and a run killed in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import TEN_STEPS
from nbclient.exceptions import CellExecutionError
from safetensors.numpy import load_file

from runner import ROOT, checkpoints, files, parameters, rewardlog, runs, studies

SIX_STEPS = dict(max_steps=6, eval_interval=3, save_steps=3, eval_problems=16)
STUDY = """
title: Three cells
arms:
  - {}
  - label_flip_rate: 0.25
  - mask_rate: 1.0
fixed: {max_steps: 6, eval_interval: 3, save_steps: 3, eval_problems: 16}
seeds: [0]
use_selected: false
eval_samples: 2
"""


def command(work, module, *args, **kwargs):
    """Run a module of the project in the workspace."""
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"GRPO_NOISE_WORK": str(work)}, **kwargs)


@pytest.fixture(scope="module")
def failing(workspace):
    """Two runs, of which one fails: its prompts are all too long. The other is also one of the study's."""
    fails = STUDY.replace("  - {}\n", "").replace("mask_rate: 1.0", "max_prompt_length: 1")
    (workspace / "fail.yaml").write_text(fails)
    return command(workspace, "runner", workspace / "fail.yaml", "--runs-only")


@pytest.fixture(scope="module")
def by_hand(kernel, workspace):
    """The study's run without a reward, executed as in JupyterLab: a folder."""
    folder = workspace / "outputs/runs" / parameters.run_id(parameters.resolve("tiny", mask_rate=1.0, **SIX_STEPS))
    kernel.execute("02_train", folder / "notebook.ipynb", mask_rate=1.0, **SIX_STEPS)
    return folder


@pytest.fixture(scope="module")
def study(workspace, failing, by_hand):
    """The study, run by the command that `make study` calls: two of its runs are done already."""
    (workspace / "three.yaml").write_text(STUDY)
    done = command(workspace, "runner", workspace / "three.yaml")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return workspace / "outputs/three", done


def folders(work, name):
    """The folders in the store of a study's runs, in the order of its arms."""
    _, grid = studies.load_study(str(work / f"{name}.yaml"), "tiny")
    return [work / "outputs/runs" / parameters.run_id(p) for p in grid]


def runs_of(folder):
    """The runs of the study, in the store beside its folder: clean, flipped, and without a reward."""
    return folders(folder.parents[1], "three")


def test_a_study_leaves_tables_figures_and_rendered_notebooks(study):
    folder, done = study
    for name in ("runs.csv", "summary.csv", "eval.parquet", "metrics.parquet", "results.csv", "replay.csv",
                 "03_eval.ipynb", "04_analysis.ipynb", "04_analysis.html"):
        assert (folder / name).exists(), name
    assert list((folder / "figures").glob("*.png"))
    assert "Next: open outputs/three/04_analysis.html" in done.stdout and "flip 0.25" in done.stdout
    evaluated = pd.read_parquet(folder / "eval.parquet")
    assert len(evaluated) == 4 * 60 * (2 + 1)  # base and three runs, 60 questions, two samples and one greedy answer
    summary = pd.read_csv(folder / "summary.csv").set_index("arm").sampled_exact
    assert list(summary.index) == ["base", "clean", "flip 0.25", "mask 1"]
    assert summary["base"] == summary["mask 1"]  # without a reward nothing is learnt


def test_executed_notebooks_keep_the_last_state_of_their_progress(workspace, study):
    for path, last in ((workspace / "01b.ipynb", "right answers: step 150 of 150"),
                       (runs_of(study[0])[0] / "notebook.ipynb", "step 6/6: clean reward 0."),
                       (study[0] / "03_eval.ipynb", "base-s0: 3 of 3 runs")):
        text = path.read_text()
        assert last in text and not re.search(r"widget-view|\d%\|", text)  # a bar would be stored as it began
        assert "application/javascript" not in text


def test_every_run_keeps_the_contract(study):
    folder, _ = study
    assert not (folder / "runs").exists()
    for run in runs_of(folder):
        params = parameters.Params(**json.loads((run / "params.json").read_text()))
        assert run.name == parameters.run_id(params)
        assert (run / "DONE").read_text().strip() == runs.adapter_hash(run)
        log = rewardlog.read_log(run)
        assert len(log) == 6 * 128 and not log.duplicated(["step", "sample_id", "rollout"]).any()
        rows, wrong = runs.prove(run)
        assert rows == len(log) and wrong.empty
        metrics = pd.read_parquet(run / "metrics.parquet")
        by_step = log.groupby("step")[["true_reward", "observed_reward"]].mean().to_numpy()
        logged = metrics.dropna(subset="clean_mean")[["clean_mean", "observed_mean"]].to_numpy()
        np.testing.assert_allclose(logged, by_step, atol=1e-6)
        record = json.loads((run / "provenance.json").read_text())
        assert record["versions"]["trl"] and record["policy_hash"] and record["resumed_from"] == []
    clean, flip, _ = runs_of(folder)
    first = [rewardlog.read_log(r).query("step == 0") for r in (clean, flip)]
    assert first[0].sample_id.tolist() == first[1].sample_id.tolist()  # same seed: same prompts in the first step


@pytest.mark.parametrize("column", ["verdict", "observed_reward", "returned"])
def test_one_tampered_row_is_found(study, tmp_path, column):
    run = runs_of(study[0])[1]
    shutil.copytree(run, tmp_path / run.name)
    log = rewardlog.read_log(run)
    log.loc[77, column] = 1 - log.loc[77, column]
    log.to_parquet(tmp_path / run.name / "rewards.parquet")
    assert runs.prove(tmp_path / run.name)[1].index.tolist() == [77]
    (tmp_path / run.name).rename(tmp_path / "flip-0.1-s0-00000000")
    with pytest.raises(ValueError, match="holds the params.json of"):
        runs.prove(tmp_path / "flip-0.1-s0-00000000")


def test_a_finished_study_is_left_alone(study):
    folder, _ = study
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    done = command(folder.parents[1], "runner", folder.parents[1] / "three.yaml")
    assert done.returncode == 0 and done.stdout.count("nothing to do") == 3
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def finished_at(folders):
    """When each run was done."""
    return [(run / "DONE").stat().st_mtime_ns for run in folders]


def test_the_same_cells_in_another_study_are_the_same_runs(study):
    """A dry run says so before, and nothing is executed twice."""
    work = study[0].parents[1]
    (work / "again.yaml").write_text(STUDY)
    before = finished_at(runs_of(study[0]))
    assert "runs: 3; 3 done" in command(work, "runner", work / "again.yaml", "--dry-run").stdout
    done = command(work, "runner", work / "again.yaml", "--runs-only")
    assert done.returncode == 0 and "All 3 runs are done: nothing to do." in done.stdout
    assert before == finished_at(runs_of(study[0]))


@pytest.mark.slow
def test_the_same_cells_in_another_study_have_the_same_results(study):
    work = study[0].parents[1]
    (work / "again.yaml").write_text(STUDY)
    before = finished_at(runs_of(study[0]))
    done = command(work, "runner", work / "again.yaml")
    assert done.returncode == 0 and "All 3 runs are done: nothing to do." in done.stdout
    assert before == finished_at(runs_of(study[0]))
    assert (work / "outputs/again/results.csv").read_text() == (study[0] / "results.csv").read_text()


def pack(work, *args):
    """`make pack` or `make unpack` in the workspace."""
    return subprocess.run([sys.executable, "scripts/pack.py", *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"GRPO_NOISE_WORK": str(work)})


def test_a_study_is_packed_without_weights_and_goes_on_elsewhere(study, tmp_path):
    work = study[0].parents[1]
    packed = pack(work, "pack", work / "three.yaml")
    assert packed.returncode == 0 and "outputs/three/runs.tar.xz" in packed.stdout, packed.stderr
    (tmp_path / "outputs/three").mkdir(parents=True)
    (study[0] / "runs.tar.xz").rename(tmp_path / "outputs/three/runs.tar.xz")
    unpacked = pack(tmp_path, "unpack", work / "three.yaml")
    assert unpacked.returncode == 0 and "3 of 3 runs" in unpacked.stdout, unpacked.stderr
    for run in runs_of(study[0]):
        there = tmp_path / "outputs/runs" / run.name
        assert runs.status(there) == "done" and not (there / runs.WEIGHTS).exists() and runs.prove(there)[1].empty
    assert list((tmp_path / "outputs/runs/base-tiny-s0").glob("eval-*.parquet"))


def test_a_failing_run_is_reported_and_does_not_stop_the_others(workspace, failing):
    assert failing.returncode == 1
    other, failed = folders(workspace, "fail")
    assert f"FAILED {failed.name}" in failing.stderr and "max_prompt_length=1" in failing.stderr
    assert runs.status(failed) == "failed" and runs.status(other) == "done"
    cells = nbformat.read(failed / "notebook.ipynb", as_version=4).cells
    assert any(o.output_type == "error" for c in cells for o in c.get("outputs", []))
    plan = command(workspace, "runner", workspace / "fail.yaml", "--dry-run").stdout
    assert "failed" in plan and "done" in plan


def test_a_run_without_a_reward_is_done(study, by_hand):
    """Which is a result, not a failure."""
    assert runs_of(study[0])[2] == by_hand and runs.status(by_hand) == "done"
    assert "nothing to learn from" in (by_hand / "notebook.ipynb").read_text()


@pytest.mark.parametrize("given, words", [  # one mistake for each of the three checks; test_parameters has more
    ({"label_flip_rate": 1.2}, "label_flip_rate=1.2"),
    ({"lable_flip_rate": 0.1}, "did you mean 'label_flip_rate'"),
    ({"base_seed": 3}, "has not been built"),
])
def test_the_training_notebook_refuses_bad_parameters(kernel, workspace, tmp_path, given, words):
    with pytest.raises(CellExecutionError, match=words):
        kernel.execute("02_train", tmp_path / "out.ipynb", **given)
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    refused = next(number for number, cell in enumerate(cells) if cell.id == "resolve")
    assert not [cell.id for cell in cells[refused + 1:] if cell.get("execution_count")]  # torch would be next


def killed_run(work, folder):
    """Start the run of TEN_STEPS again, and kill -9 notebook and kernel on the way."""
    given = [x for k, v in TEN_STEPS.items() for x in ("-p", k, str(v))]
    process = subprocess.Popen(
        [sys.executable, "-m", "papermill", "notebooks/02_train.ipynb", str(work / "killed.ipynb"), "-p",
         "output_dir", "outputs/killed", *given], cwd=ROOT, env=os.environ | {"GRPO_NOISE_WORK": str(work)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 1800
    while not (folder / "rewards/step-000004.parquet").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    assert runs.status(folder) == "interrupted" and len(rewardlog.read_log(folder)) >= 5 * 128
    return folder


def without_its_end(whole, folder):
    """A copy of a finished run as a kill after its last step leaves it."""
    shutil.copytree(whole, folder)
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def gone_on(kernel, workspace, ten_steps):
    """The same run, killed and broken in three ways and then executed again, and one run with another mitigation.

    Returns their folders, what the notebook shows of each, and what was there before.
    """
    name, shown_again = ten_steps.name, workspace / "outputs/whole/runs" / ten_steps.name
    found = {"killed": killed_run(workspace, workspace / "outputs/killed/runs" / name),
             "last": without_its_end(ten_steps, workspace / "outputs/last/runs" / name),
             "again": shutil.copytree(ten_steps, shown_again)}
    whole = [path for path in checkpoints.checkpoints(found["killed"]) if not files.unsealed(path)]
    before = {"checkpoint": checkpoints.step_of(whole[0]), "done": finished_at([shown_again])}
    settings = [TEN_STEPS | {"output_dir": f"outputs/{way}"} for way in ("killed", "last", "whole")]
    corrected = SIX_STEPS | dict(label_flip_rate=0.25, mitigation="backward", output_dir="outputs/theorem")
    shown = [kernel.execute("02_train", workspace / "gone-on.ipynb", **given) for given in (*settings, corrected)]
    (found["corrected"],) = (workspace / "outputs/theorem/runs").iterdir()
    return found, dict(zip(found, shown, strict=True)), before


def assert_same(folder, whole):
    """That a run ended in the same weights, with the same log."""
    assert (folder / "DONE").read_text() == (whole / "DONE").read_text()
    assert runs.adapter_hash(folder) == runs.adapter_hash(whole)
    pd.testing.assert_frame_equal(rewardlog.read_log(folder), rewardlog.read_log(whole))


def resumed_from(folder):
    """The steps that a run's later starts went on from."""
    return json.loads((folder / "provenance.json").read_text())["resumed_from"]


def test_a_killed_run_resumes_to_the_same_weights(gone_on, ten_steps):
    """kill -9 of notebook and kernel between two checkpoints, then the same command again."""
    found, _, before = gone_on
    assert 4 <= before["checkpoint"] < 10
    assert resumed_from(found["killed"]) == [before["checkpoint"]]
    assert_same(found["killed"], ten_steps)


def test_a_run_killed_after_its_last_step_is_finished_without_another(gone_on, ten_steps):
    found, _, _ = gone_on
    assert resumed_from(found["last"]) == [10]
    assert_same(found["last"], ten_steps)


def test_showing_a_finished_run_again_trains_nothing(gone_on):
    found, shown, before = gone_on
    assert finished_at([found["again"]]) == before["done"]
    assert "is done" in shown["again"]


def adapter(folder):
    """The trained matrices of a run, as one vector."""
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_backward_correction_does_not_change_std_normalised_grpo(study, gone_on):
    """The theorem of helpers/theory, in TRL: r -> (r - a) / J cancels in (r - mean) / std, but for the 1e-4 in TRL."""
    plain, corrected = runs_of(study[0])[1], gone_on[0]["corrected"]
    first, second = rewardlog.read_log(plain), rewardlog.read_log(corrected)
    pd.testing.assert_frame_equal(first.drop(columns="returned"), second.drop(columns="returned"))
    assert set(second.returned.round(4)) == {-0.5, 1.5}  # (r - .25) / .5: the trainer did get other numbers
    trained = adapter(plain)
    difference = np.abs(adapter(corrected) - trained).max() / np.abs(trained).max()
    # TRL's epsilon: advantages differ by at most 1e-4 (1 - J) / std, relatively. AdamW divides each gradient by its own
    # size and enlarges that where gradients are small, more or less by machine: .0012 seen on one.
    assert 0 < difference < 5e-3
