"""The sweep: planning reads little, two sweeps share a study, nodes are lost, Ctrl-C leaves nothing behind.

Runs are real and short: four steps from a base policy of random weights, whose rewards are mostly noise.
"""

import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from lib import ROOT, data, rewards, runs, sweep

STUDY = """
title: Two cells
arms: [{label_flip_rate: [0.25, 0.4]}]
fixed: {max_steps: 4, eval_interval: 0, save_steps: 2}
seeds: [0]
use_selected: false
"""


def command(work, *arguments, **env):
    """A sweep in the workspace `work`, started."""
    return subprocess.Popen([sys.executable, "-m", "lib.sweep", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"GRPO_NOISE_WORK": str(work)} | env)


def until(condition, process, seconds=150):
    """Wait until the condition holds; an AssertionError if the process ends or the time is over before."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, "it takes too long"
        time.sleep(0.05)


def begun(folder, step=2):
    """Whether a run below `folder` has logged this step."""
    return list(Path(folder).glob(f"**/rewards/step-{step:06}.parquet"))


def adapters(folder):
    """{run_id: hash of the adapter} of finished runs, each with its contract checked."""
    found = {}
    for done in sorted((folder / "runs").glob("*/DONE")):
        run = done.parent
        assert done.read_text().strip() == runs.adapter_hash(run)
        log = rewards.read_log(run)
        assert len(log) == 4 * 128 and not log.duplicated(["step", "sample_id", "rollout"]).any()
        found[run.name] = done.read_text()
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A workspace with data and a base policy of random weights."""
    work = tmp_path_factory.mktemp("inputs")
    subprocess.run([sys.executable, "scripts/fake_runs.py", str(work), "--cells", "0"], cwd=ROOT, check=True,
                   env=os.environ | {"GRPO_NOISE_WORK": str(work)}, capture_output=True)
    (work / "two.yaml").write_text(STUDY)
    return work


@pytest.fixture
def work(inputs, tmp_path):
    """A copy of that workspace."""
    return shutil.copytree(inputs, tmp_path / "work")


# --- planning ---------------------------------------------------------------------------------------------------


def test_planning_reads_each_input_once(work, monkeypatch):
    """400 cells, all but one finished: the profile is read once, the data hashed once, one record read a run."""
    subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, 'scripts'); from pathlib import Path; "
                    "import fake_runs as f; f.finish_runs(f.write_study(Path(sys.argv[1]), 400))", str(work)],
                   cwd=ROOT, check=True, env=os.environ | {"GRPO_NOISE_WORK": str(work)})
    for module, name in ((runs, "WORK"), (data, "WORK")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(runs, "OUTPUTS", work / "outputs")
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

    for module, name in ((data, "data_hash"), (runs, "load_yaml"), (runs, "check_inputs"), (runs, "status"),
                         (sweep, "stale")):
        counted(module, name)
    monkeypatch.setattr(sweep, "connected", connected)
    _, grid = runs.load_study(str(work / "study.yaml"), "tiny")
    with pytest.raises(Planned):
        sweep.run_grid(grid, console=Console(file=io.StringIO()))
    assert count == {"data_hash": 1, "load_yaml": 2, "check_inputs": 1, "status": 399, "stale": 399}
    record = grid[0].folder / "provenance.json"
    record.write_text(record.read_text().replace('"data_hash": "', '"data_hash": "x'))
    with pytest.raises(ValueError, match="was trained from another data"):
        sweep.run_grid(grid, console=Console(file=io.StringIO()))


def test_a_claim_is_seen_by_others_and_ends_with_its_process(tmp_path):
    (tmp_path / ".sweeps").mkdir()
    (tmp_path / "a-00000001").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from lib import sweep\n"
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


def test_an_address_where_nothing_answers_is_refused_at_once(work):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        began, process = time.time(), command(work, work / "two.yaml", "--address", f"127.0.0.1:{s.getsockname()[1]}")
        assert process.wait(60) == 2 and "no Ray cluster answers" in process.stderr.read()
    assert time.time() - began < 40


# --- one machine ------------------------------------------------------------------------------------------------


def leftovers(work):
    """Processes that work in the workspace."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRPO_NOISE_WORK") == str(work) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The adapters of the study, run by two sweeps at once after a first one was stopped by Ctrl-C."""
    work = shutil.copytree(inputs, tmp_path_factory.mktemp("local") / "work")
    first = command(work, work / "two.yaml", "--cpus-per-run", "1")
    until(lambda: begun(work), first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "Stopped: 0 of 2 runs are done" in out and "goes on from" in out, out + err
    assert not leftovers(work)
    both = [command(work, work / "two.yaml") for _ in range(2)]
    ended = [(p.communicate(timeout=300), p.returncode) for p in both]
    assert [code for _, code in ended] == [0, 0], ended
    return work, ended, adapters(work / "outputs/two")


def test_two_sweeps_at_once_do_every_run_once_and_both_see_the_end(undisturbed):
    work, ended, found = undisturbed
    assert len(found) == 2
    executed = "".join(out for (out, _), _ in ended)
    assert executed.count("  done  ") - executed.count("by another process") <= 2
    records = [json.loads(p.read_text()) for p in (work / "outputs/two/runs").glob("*/provenance.json")]
    assert [2] in [r["resumed_from"] for r in records]  # Ctrl-C lost no more than the steps after the checkpoint
    assert not leftovers(work)


def test_a_second_signal_ends_at_once_and_leaves_no_process(work):
    process = command(work, work / "two.yaml")
    until(lambda: leftovers(work) and list((work / "outputs/two/runs").glob("*/.lock")), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) in (128 + signal.SIGINT, 128 + signal.SIGTERM, 130)
    end = time.time() + 20
    while leftovers(work) and time.time() < end:
        time.sleep(0.2)
    assert not leftovers(work)


# --- clusters ---------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Nodes:
    """Ray nodes on this machine, each a process of `ray start --block` with its own environment."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
                    "RAY_agent_register_timeout_ms": "120000"}
        self.address = f"{self.start('--head', '--port', port := free_port(), cpus=0)}:{port}"

    def start(self, *arguments, cpus, **env):
        """One more node; returns the address of this machine."""
        log = self.folder / f"node-{len(self.processes)}.log"
        ports = [f"--{n}={free_port()}" for n in ("dashboard-agent-grpc-port", "dashboard-agent-listen-port",
                                                  "metrics-export-port", "runtime-env-agent-port")]
        for _ in range(3):  # a busy machine may exceed the time that Ray gives its own processes
            process = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", str(cpus),
                 "--object-store-memory", "100000000", *ports, *map(str, arguments)], env=os.environ | self.env | env,
                stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
            while process.poll() is None and "--block" not in log.read_text():
                time.sleep(0.2)
            if process.poll() is None:
                self.processes.append(process)
                return next(line.split()[-1] for line in log.read_text().splitlines() if "Local node IP" in line)
        raise AssertionError(log.read_text())

    def kill(self, i):
        """kill -9 of a node: raylet, agents, workers and kernels."""
        if self.processes[i].poll() is None:
            top = psutil.Process(self.processes[i].pid)
            for process in [top, *top.children(recursive=True)]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            self.processes[i].wait()


@pytest.mark.parametrize("shared", [False, True], ids=["own file systems", "shared file system"])
def test_a_node_is_killed_in_mid_sweep(undisturbed, work, tmp_path, shared):
    """Every run ends done once, with the weights of an undisturbed sweep, wherever its node kept its files."""
    nodes = Nodes(tmp_path)
    places = [work / "outputs", work / "outputs"] if shared else [tmp_path / "node1", tmp_path / "node2"]
    try:
        nodes.start("--address", nodes.address, cpus=1, **({} if shared else {"GRPO_NOISE_WORK": str(places[0])}))
        process = command(work, work / "two.yaml", "--address", nodes.address, **nodes.env)
        until(lambda: begun(places[0]), process)
        nodes.start("--address", nodes.address, cpus=1, **({} if shared else {"GRPO_NOISE_WORK": str(places[1])}))
        nodes.kill(1)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    finally:
        for i in reversed(range(len(nodes.processes))):
            nodes.kill(i)
    assert adapters(work / "outputs/two") == undisturbed[2]
    for run in (work / "outputs/two/runs").glob("*/provenance.json"):
        record = json.loads(run.read_text())
        assert record["git_commit"] == runs.commit()["git_commit"]
    resumed = [json.loads(p.read_text())["resumed_from"] for p in (work / "outputs/two/runs").glob("*/provenance.json")]
    assert ([2] in resumed) == shared  # without a common file system, what was on the node is lost
    assert not list(places[1].glob("*/outputs/two/runs/*/DONE"))  # what was sent does not stay on the node
