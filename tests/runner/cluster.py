# ruff: noqa: F811  (fixtures are imported and then named again)
"""Lost nodes, two sweeps at once, signals, SLURM: minutes of real runs, `make test-cluster`.

Runs are short, though long enough to be stopped on the way: a base policy of random weights, rewards mostly noise.
"""

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
from conftest import processes
from test_sweep import STUDY, command, work  # noqa: F401
from test_sweep import inputs as four_steps  # noqa: F401

from runner import ROOT, provenance, rewardlog, runs

STEPS = 24
PATIENCE = 1800  # seconds; a busy machine is not a failure


@pytest.fixture(scope="module")
def inputs(four_steps):
    """The workspace of test_sweep, with longer runs."""
    assert "max_steps: 4" in STUDY
    (four_steps / "two.yaml").write_text(STUDY.replace("max_steps: 4", f"max_steps: {STEPS}"))
    return four_steps


def until(condition, process, seconds=PATIENCE):
    """Wait until the condition holds; an AssertionError if the process ends or the time is over before."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.time() > end:
            process.kill()
            raise AssertionError("it takes too long", process.communicate())
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
        log = rewardlog.read_log(run)
        assert len(log) == STEPS * 128 and not log.duplicated(["step", "sample_id", "rollout"]).any()
        found[run.name] = done.read_text()
    return found


# --- one machine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The adapters of the study, run by two sweeps at once after a first one was stopped by Ctrl-C."""
    work = shutil.copytree(inputs, tmp_path_factory.mktemp("local") / "work")
    first = command(work, work / "two.yaml", "--cpus-per-run", "1")
    until(lambda: begun(work), first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130 and "Stopped: 0 of 2 runs are done" in out and "goes on from" in out, out + err
    assert not processes(work)
    both = [command(work, work / "two.yaml") for _ in range(2)]
    ended = [(p.communicate(timeout=PATIENCE), p.returncode) for p in both]
    assert [code for _, code in ended] == [0, 0], ended
    return work, ended, adapters(work / "outputs")


def test_two_sweeps_at_once_do_every_run_once_and_both_see_the_end(undisturbed):
    work, ended, found = undisturbed
    assert len(found) == 2
    executed = "".join(out for (out, _), _ in ended)
    assert executed.count("  done  ") - executed.count("by another process") <= 2
    records = [json.loads(p.read_text()) for p in (work / "outputs/runs").glob("*/provenance.json")]
    assert any(r["resumed_from"] for r in records)  # Ctrl-C lost no more than the steps after the checkpoint
    assert not processes(work)


def test_sigterm_as_slurm_sends_it_stops_like_ctrl_c(work):
    process = command(work, work / "two.yaml")
    until(lambda: begun(work), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "goes on from the last checkpoints" in out and not err, out + err
    assert not processes(work)


def test_a_second_signal_ends_at_once_and_leaves_no_process(work):
    process = command(work, work / "two.yaml")
    until(lambda: processes(work) and list((work / "outputs/runs").glob("*/.lock")), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (128 + signal.SIGINT, 128 + signal.SIGTERM, 130)
    end = time.time() + 60
    while processes(work) and time.time() < end:
        time.sleep(0.2)
    assert not processes(work)


# --- clusters ---------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Nodes:
    """Ray nodes on this machine, each a process of `ray start --block`."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
                    "RAY_agent_register_timeout_ms": "120000"}
        self.address = f"{self.start('--head', '--port', port := free_port(), cpus=0)}:{port}"

    def start(self, *arguments, cpus, prefix=()):
        """One more node, its command behind `prefix`; returns the address of this machine."""
        log = self.folder / f"node-{len(self.processes)}.log"
        ports = [f"--{n}={free_port()}" for n in ("dashboard-agent-grpc-port", "dashboard-agent-listen-port",
                                                  "metrics-export-port", "runtime-env-agent-port")]
        for _ in range(3):  # a busy machine may exceed the time that Ray gives its own processes
            process = subprocess.Popen(
                [*prefix, Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", str(cpus),
                 "--object-store-memory", "100000000", *ports, *map(str, arguments)], env=os.environ | self.env,
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

    def kill_all(self):
        """The head last."""
        for i in reversed(range(len(self.processes))):
            self.kill(i)


def test_a_node_is_killed_in_mid_sweep(undisturbed, work, tmp_path):
    """Every run ends done once, from its checkpoint, with the weights of an undisturbed sweep."""
    nodes = Nodes(tmp_path)
    try:
        nodes.start("--address", nodes.address, cpus=1)
        process = command(work, work / "two.yaml", "--address", nodes.address, **nodes.env)
        until(lambda: begun(work), process)
        nodes.kill(1)  # the only one that executes runs: the sweep waits for another
        nodes.start("--address", nodes.address, cpus=1)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out + err
    finally:
        nodes.kill_all()
    assert adapters(work / "outputs") == undisturbed[2]
    records = [json.loads(run.read_text()) for run in (work / "outputs/runs").glob("*/provenance.json")]
    assert {record["git_commit"] for record in records} == {provenance.commit()["git_commit"]}
    assert any(record["resumed_from"] for record in records)


def test_a_node_that_does_not_share_the_file_system_is_refused(work, tmp_path):
    """It has an empty folder where the workspace is. The sweep says so, and leaves nothing behind."""
    nodes = Nodes(tmp_path)
    own = f"mount -t tmpfs none {work} && exec \"$@\""
    apart = ["unshare", "--mount", "bash", "-c", own, "_"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    try:
        nodes.start("--address", nodes.address, cpus=1, prefix=apart)
        process = command(work, work / "two.yaml", "--address", nodes.address, **nodes.env)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        nodes.kill_all()
    assert process.returncode == 2, out + err
    assert f"does not see {work}" in err and "make pack" in err and len(err.splitlines()) == 1
    assert not list((work / "outputs/runs").glob("*/params.json"))
    assert not list((work / "outputs/runs").glob(".sweep-*"))


def test_each_node_has_a_rollout_server_of_its_own(work, tmp_path):
    """Not the head, on which no run can train. When the sweep ends, the servers are gone."""
    served = STUDY.replace("fixed: {", "fixed: {engine: server, ").replace("[0.25, 0.4]", "[0.1, 0.4]")
    (work / "served.yaml").write_text(served)
    stand_in = {"GRPO_NOISE_SERVER_MODULE": "stand_in_server",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/runner")])}
    nodes = Nodes(tmp_path)
    nodes.env |= stand_in
    try:
        for _ in range(2):
            nodes.start("--address", nodes.address, cpus=1)
        process = command(work, work / "served.yaml", "--address", nodes.address, "--gpus-per-run", 0, **nodes.env)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        nodes.kill_all()
    assert process.returncode == 0 and "Rollout servers: 2, started in" in out, out + err
    done = list((work / "outputs/runs").glob("*/DONE"))
    assert len(done) == 2 and not [p for p in processes(work) if "stand_in_server" in " ".join(p.cmdline())]


SRUN = """#!/usr/bin/env bash
# A stand-in: the options of this step, then the command, on this machine.
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


def test_the_submit_script_with_a_stand_in_for_slurm(work, tmp_path):
    """Two "nodes" on this machine: both join, the sweep runs on them, nothing is left."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho n1\necho n2\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]",
           "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(ROOT), "GRPO_NOISE_WORK": str(work),
           "VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(["scripts/slurm.sh", work / "two.yaml"], cwd=ROOT, env=os.environ | env, capture_output=True,
                          text=True, timeout=PATIENCE)
    for log in ROOT.glob(f"slurm-{os.getpid()}-*.log"):
        log.unlink()
    assert done.returncode == 0 and "2 of 2 nodes have joined" in done.stdout, done.stdout + done.stderr
    assert len(adapters(work / "outputs")) == 2 and not processes(work)
