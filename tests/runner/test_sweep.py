"""Planning reads little, one task has a run, a wrong address is refused. Lost nodes: see cluster.py."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time

import fake_runs
import pandas as pd
import pytest
from rich.console import Console

from runner import ROOT, dataset, files, parameters, plan, results, runs, studies, sweep, task

STUDY = """
title: Two cells
arms: [{label_flip_rate: [0.25, 0.4]}]
fixed: {max_steps: 4, eval_interval: 0, save_steps: 2}
seeds: [0]
use_selected: false
"""


def command(work, *arguments, **env):
    """A sweep in the workspace `work`, started."""
    return subprocess.Popen([sys.executable, "-m", "runner", "--runs-only", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"GRPO_NOISE_WORK": str(work)} | env)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A workspace with data and a base policy of random weights."""
    work = tmp_path_factory.mktemp("inputs")
    fake_runs.make_inputs(work)
    (work / "two.yaml").write_text(STUDY)
    return work


@pytest.fixture
def work(inputs, tmp_path):
    """A copy of that workspace."""
    return shutil.copytree(inputs, tmp_path / "work")


def test_planning_reads_each_input_once(work, monkeypatch):
    """400 cells, all but one finished: the data are hashed once, and one record is read a run."""
    for module in (runs, parameters, plan, dataset):
        monkeypatch.setattr(module, "WORK", work)
    fake_runs.finish_runs(fake_runs.write_study(work, 400))
    count = {}

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            count[name] = count.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    class Planned(Exception):
        """Everything before Ray is done."""

    def connected(address, gpus=None):
        raise Planned

    for module, name in ((dataset, "data_hash"), (runs, "check_inputs"), (runs, "status"),
                         (plan, "compare_inputs")):
        counted(module, name)
    monkeypatch.setattr(sweep, "connected", connected)
    _, grid = studies.load_study(str(work / "study.yaml"), "tiny")
    with pytest.raises(Planned):
        sweep.run_grid(grid, Console(file=io.StringIO()))
    assert count == {"data_hash": 1, "check_inputs": 1, "status": 399, "compare_inputs": 399}
    record = grid[0].folder / "provenance.json"
    record.write_text(record.read_text().replace('"data_hash": "', '"data_hash": "x'))
    files.seal(grid[0].folder, "provenance.json")
    with pytest.raises(ValueError, match="was trained from another data"):
        sweep.run_grid(grid, Console(file=io.StringIO()))


def test_the_task_that_has_a_run_is_seen_by_others_and_ends_with_its_process(tmp_path):
    hold = ("import sys, time; from pathlib import Path; from runner import task\n"
            "with task.lock(Path(sys.argv[1])) as ours: print(ours, flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"True\n"
    assert task.is_taken(tmp_path) and plan.status_of(tmp_path) == "running"
    with task.lock(tmp_path) as ours:
        assert not ours
    holder.kill()
    holder.wait()
    assert not task.is_taken(tmp_path) and plan.status_of(tmp_path) == "missing"
    with task.lock(tmp_path) as ours:
        assert ours


def test_a_run_that_another_process_has_is_left_to_it(work, monkeypatch):
    """Whether a sweep has it, or somebody's notebook."""
    monkeypatch.setattr(parameters, "WORK", work)
    _, (p, _) = studies.load_study(str(work / "two.yaml"), "tiny")
    p.folder.mkdir(parents=True)
    with task.lock(p.folder):
        assert task.execute(p.model_dump()) == {"status": "elsewhere"}
    monkeypatch.setattr(runs, "status", lambda folder: "running")
    assert task.execute(p.model_dump()) == {"status": "elsewhere"}
    assert not (p.folder / "notebook.ipynb").exists()


def test_a_node_that_does_not_see_the_workspace_is_refused(tmp_path):
    refused = task.execute({}, marker=str(tmp_path / "not here"))
    assert refused["status"] == "refused" and "must share the file system of the workspace" in refused["message"]


def test_the_dry_run_names_the_cells_and_the_next_command(work):
    process = subprocess.run([sys.executable, "-m", "runner", work / "two.yaml", "--dry-run"], cwd=ROOT, text=True,
                             env=os.environ | {"GRPO_NOISE_WORK": str(work)}, capture_output=True)
    assert process.returncode == 0 and not process.stderr
    assert "runs: 2; 2 missing" in process.stdout
    assert f"Next: python -m runner {work}/two.yaml --profile tiny\n" in process.stdout


@pytest.mark.parametrize("study, part, status", [("two.yaml", "--dry-run", 0), ("nosuch", "--runs-only", 2)])
def test_a_command_for_the_end(work, study, part, status):
    name = str(work / study) if study.endswith("yaml") else study
    process = subprocess.run([sys.executable, "-m", "runner", name, part, "--on-done",
                              "echo ended: $STATUS $STUDY $FOLDER; exit 3"], cwd=ROOT, text=True,
                             env=os.environ | {"GRPO_NOISE_WORK": str(work)}, capture_output=True)
    assert process.returncode == status
    folder = work.resolve() / "outputs" / study.removesuffix(".yaml")
    assert f"ended: {status} {name} {folder}" in process.stdout.splitlines()
    assert "--on-done ended with status 3: echo ended" in process.stderr


def test_results_fit_80_columns_and_say_percent():
    for file in ROOT.glob("outputs/*/results.csv"):
        console = Console(width=80, file=io.StringIO(), soft_wrap=True)
        console.print(results.results_table(pd.read_csv(file)))
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines[:-1])) <= 80 and "…" not in "".join(lines) and "In percent" in lines[-1]


def test_results_without_a_comparison_name_no_reference():
    says_of = {"hyperparameters": "No arm is compared with another.", "tiny": "Differences are from 'clean'"}
    for study, says in says_of.items():
        console = Console(width=80, file=io.StringIO(), soft_wrap=True)
        console.print(results.results_table(pd.read_csv(ROOT / f"outputs/{study}/results.csv")))
        assert says in console.file.getvalue()


def test_the_published_results_are_compared_with_those_that_are_here(tmp_path):
    published = ROOT / "outputs/tiny/results.csv"
    assert "were reproduced exactly" in results.compare_with_published(published)
    other = tmp_path / "tiny/results.csv"
    other.parent.mkdir()
    table = pd.read_csv(published)
    table.loc[0, "estimate"] += 0.012
    table.to_csv(other, index=False)
    assert "differs by up to 1.2 points" in results.compare_with_published(other)
    assert results.compare_with_published(tmp_path / "unknown/results.csv") == ""


def test_progress_is_read_off_the_reward_log(work, monkeypatch):
    monkeypatch.setattr(parameters, "WORK", work)
    monkeypatch.setattr(dataset, "WORK", work)
    _, (p, _) = studies.load_study(str(work / "two.yaml"), "tiny")
    assert sweep.progress_of(p) == []
    log = p.folder / "rewards"
    log.mkdir(parents=True)
    for step in range(3):
        file = log / f"step-{step:06d}.parquet"
        pd.DataFrame({"true_reward": [0.0, float(step), 1.0, 0.0]}).to_parquet(file)
        os.utime(file, (1000 + 30 * step, 1000 + 30 * step))
    assert sweep.progress_of(p) == ["3/4", "0.750", "30.00", "0.5 min"]


def test_an_address_where_nothing_answers_is_refused_at_once(work):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        began, process = time.time(), command(work, work / "two.yaml", "--address", f"127.0.0.1:{s.getsockname()[1]}")
        assert process.wait(60) == 2 and "no Ray cluster answers" in process.stderr.read()
    assert time.time() - began < 40


def test_every_status_of_a_grid_is_found(work, monkeypatch):
    monkeypatch.setattr(parameters, "WORK", work)
    (work / "five.yaml").write_text(STUDY.replace("[0]", "[0, 1, 2]"))
    _, grid = studies.load_study(str(work / "five.yaml"), "tiny")
    left = ("DONE", "FAILED", "params.json", "metrics.parquet")  # each alone in its folder
    for p, name in zip(grid, left, strict=False):
        p.folder.mkdir(parents=True)
        (p.folder / name).touch()
    expected = ["damaged", "failed", "interrupted", "missing", "missing", "missing"]
    assert plan.statuses(grid) == dict(zip([p.folder.name for p in grid], expected, strict=True))


def test_a_published_archive_unpacks_into_the_store(tmp_path):
    """It was packed when each study had its own folder of runs, and the base policy no model in its name."""
    shutil.copytree(ROOT / "outputs/hyperparameters-smol", tmp_path / "outputs/hyperparameters-smol")
    unpack = [sys.executable, "scripts/pack.py", "unpack", "hyperparameters", "--profile", "smol"]
    done = subprocess.run(unpack, cwd=ROOT, env=os.environ | {"GRPO_NOISE_WORK": str(tmp_path)}, capture_output=True,
                          text=True)
    assert "12 of 12 runs" in done.stdout, done.stderr
    store = tmp_path / "outputs/runs"
    assert {p.name for p in store.iterdir() if not p.name.startswith("clean-")} == {"base-smol-warm-s0"}
    half = next(store.glob("clean-*"))
    for name in ("DONE", "provenance.json"):
        (half / name).unlink()
    before = sorted(half.iterdir())
    again = subprocess.run(unpack, cwd=ROOT, env=os.environ | {"GRPO_NOISE_WORK": str(tmp_path)}, capture_output=True,
                           text=True)
    assert f"{half.name} is interrupted here and was left alone" in again.stdout
    assert "11 of 12 runs" in again.stdout and before == sorted(half.iterdir())
