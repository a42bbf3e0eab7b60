"""Planning reads little, claims are seen by others, a wrong address is refused. Lost nodes: see cluster.py."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from runner import ROOT, dataset, files, parameters, runs, studies, sweep

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
    subprocess.run([sys.executable, "tests/measure/fake_runs.py", str(work), "--cells", "0"], cwd=ROOT, check=True,
                   env=os.environ | {"GRPO_NOISE_WORK": str(work)}, capture_output=True)
    (work / "two.yaml").write_text(STUDY)
    return work


@pytest.fixture
def work(inputs, tmp_path):
    """A copy of that workspace."""
    return shutil.copytree(inputs, tmp_path / "work")


def test_planning_reads_each_input_once(work, monkeypatch):
    """400 cells, all but one finished: the data are hashed once, and one record is read a run."""
    subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, 'tests/measure'); from pathlib import Path; "
                    "import fake_runs as f; f.finish_runs(f.write_study(Path(sys.argv[1]), 400))", str(work)],
                   cwd=ROOT, check=True, env=os.environ | {"GRPO_NOISE_WORK": str(work)})
    for module, name in ((runs, "WORK"), (parameters, "WORK"), (sweep, "WORK"), (dataset, "WORK")):
        monkeypatch.setattr(module, name, work)
    for module in (parameters, studies):
        monkeypatch.setattr(module, "OUTPUTS", work / "outputs")
    count = {}

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            count[name] = count.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    class Planned(Exception):
        """Everything before Ray is done."""

    def connected(address):
        raise Planned

    for module, name in ((dataset, "data_hash"), (runs, "check_inputs"), (runs, "status"),
                         (sweep, "stale")):
        counted(module, name)
    monkeypatch.setattr(sweep, "connected", connected)
    _, grid = studies.load_study(str(work / "study.yaml"), "tiny")
    with pytest.raises(Planned):
        sweep.run_grid(grid, console=Console(file=io.StringIO()))
    assert count == {"data_hash": 1, "check_inputs": 1, "status": 399, "stale": 399}
    record = grid[0].folder / "provenance.json"
    record.write_text(record.read_text().replace('"data_hash": "', '"data_hash": "x'))
    files.seal(grid[0].folder, "provenance.json")
    with pytest.raises(ValueError, match="was trained from another data"):
        sweep.run_grid(grid, console=Console(file=io.StringIO()))


def test_a_claim_is_seen_by_others_and_ends_with_its_process(tmp_path):
    (tmp_path / ".sweeps").mkdir()
    (tmp_path / "a-00000001").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from runner import sweep\n"
                               f"f = open({str(tmp_path / sweep.CLAIMS)!r}, 'a'); assert sweep.claim(f, 'a-00000001')\n"
                               "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    names = ["a-00000001", "b-00000002"]
    assert sweep.statuses(names, tmp_path) == {"a-00000001": "running", "b-00000002": "missing"}
    with open(tmp_path / sweep.CLAIMS, "a") as file:
        assert not sweep.claim(file, "a-00000001") and sweep.claim(file, "b-00000002")
        holder.kill()
        holder.wait()
        assert sweep.claim(file, "a-00000001")
        look = [sys.executable, "-c", "import sys; from runner import sweep; from pathlib import Path\n"
                "print(sweep.statuses(['a-00000001'], Path(sys.argv[1])))", str(tmp_path)]
        assert "running" in subprocess.run(look, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        sweep.release(file, "a-00000001")
        assert "missing" in subprocess.run(look, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_address_where_nothing_answers_is_refused_at_once(work):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        began, process = time.time(), command(work, work / "two.yaml", "--address", f"127.0.0.1:{s.getsockname()[1]}")
        assert process.wait(60) == 2 and "no Ray cluster answers" in process.stderr.read()
    assert time.time() - began < 40


def test_many_runs_are_looked_at_by_all_cores(tmp_path):
    files = ("DONE", "FAILED", "params.json", "metrics.parquet")  # each alone in its folder
    names = [f"run-{i:04d}" for i in range(1100)]
    for i, name in enumerate(names[:1050]):
        (tmp_path / name).mkdir()
        (tmp_path / name / files[i % 4]).touch()
    found = sweep.statuses(names, tmp_path)
    assert list(found) == names and found == {name: runs.status(tmp_path / name) for name in names}
    assert set(found.values()) == {"damaged", "failed", "interrupted", "missing"}


def test_a_published_archive_unpacks_into_the_store(tmp_path):
    """It was packed when each study had its own folder of runs, and the base policy no model in its name."""
    shutil.copytree(ROOT / "outputs/hyperparameters-smol", tmp_path / "outputs/hyperparameters-smol")
    unpack = [sys.executable, "-m", "runner", "hyperparameters", "--profile", "smol", "--unpack"]
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
    assert f"{half.name} is interrupted here and was left alone" in again.stdout.replace("\n", " ")
    assert "11 of 12 runs" in again.stdout and before == sorted(half.iterdir())
