"""The grid of a study on Ray: each job is one task that executes 02_train.

Finished runs are skipped, interrupted ones go on from their last checkpoint, and a run that fails
leaves its executed notebook and does not stop the others.
"""

import json
import math
import os
import signal
import socket
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import NamedTemporaryFile

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from runner import (
    ROOT,
    WORK,
    dataset,
    engines,
    parameters,
    plan,
    provenance,
    runs,
    server,
    task,
)
from runner.parameters import Params

TRIES = 2  # of a run that was killed, crashed, or lost its node
LOOK_AGAIN = 2  # seconds between two looks at what runs here and elsewhere
SHOWN = 12  # running runs in the live table


@dataclass
class Job:
    """One run of a sweep."""

    params: Params
    status: str  # waiting, running, elsewhere (another process has it), done or failed
    tries: int = 0
    began: float = 0.0  # when its last try began, on the monotonic clock
    message: str = ""  # why it failed

    @property
    def name(self) -> str:
        """The run's id."""
        return self.params.folder.name


# --- Ray ------------------------------------------------------------------------------------------


@contextmanager
def connected(address: str | None, gpus: list[str] | None = None):
    """Ray: a cluster that is there, or one of this machine's own that ends with the sweep.

    gpus: of this machine, those on which runs may train; None for all.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    import ray

    if address:
        check_address(address)
        start_ray(ray, address=address, runtime_env=environment_of_nodes())
    else:
        start_ray(ray, address="local", include_dashboard=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str):
    """ConnectionError if nothing listens at HOST:PORT. Ray itself would take minutes to say so."""
    host, _, port = address.rpartition(":")
    if "//" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as e:
        raise ConnectionError(f"--address {address}: no Ray cluster answers ({e})") from None


def environment_of_nodes() -> dict:
    """What Ray brings to the nodes: the project's code as it is now, and where the workspace is."""
    code = ["/*", "!/lib", "!/runner", "!/notebooks", "!/params", "__pycache__"]
    variables = {"GRPO_NOISE_WORK": str(WORK), "GRPO_NOISE_COMMIT": json.dumps(provenance.commit())}
    for name in (engines.ROLLOUT_URL, engines.ROLLOUT_KEY):
        if name in os.environ:
            variables[name] = os.environ[name]
    return {"working_dir": str(ROOT), "excludes": code, "env_vars": variables}


def start_ray(ray, tries: int = 5, **arguments):
    """Start Ray, or connect to it. Its own processes may exceed their 30 s on a busy machine."""
    try:
        ray.init(log_to_driver=False, logging_level="error", **arguments)
    except Exception as e:
        ray.shutdown()
        if tries == 1 or "timed out" not in str(e):
            where = arguments["address"]
            reason = str(e).splitlines()[0]
            raise RuntimeError(f"Ray does not start or answer at {where!r}: {reason}") from None
        start_ray(ray, tries - 1, **arguments)


def living_nodes(ray) -> list[dict[str, float]]:
    """The resources of each node that is there now, such as {"CPU": 8, "GPU": 1, ...}."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: list[dict[str, float]], needs: dict[str, float]) -> int:
    """How many runs fit on the nodes at once."""
    total = 0
    for node in nodes:
        fits = [int(node.get(what, 0) / each + 1e-6) for what, each in needs.items() if each]
        total += min(fits, default=1)
    return total


def refuse_too_large(nodes: list[dict[str, float]], needs: dict[str, float]):
    """ValueError if no node can take even one run. Ray would wait for such a node for ever."""
    for what, each in needs.items():
        most = max((node.get(what, 0) for node in nodes), default=0)
        if each > most:
            raise ValueError(f"--{what.lower()}s-per-run {each:g}: the largest node that is there "
                             f"has {most:g} {what}s")


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM fills. A second signal ends the process at once, with Ray."""
    received = []

    def on_signal(number, _):
        if received:
            os._exit(128 + number)
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: Ray's, which cannot be set


# --- the sweep ------------------------------------------------------------------------------------


def run_grid(grid: list[Params], console: Console, address: str | None = None,
             cpus_per_run: float = 1, gpus_per_run: float = 0,
             servers: int | None = None) -> dict[str, str]:
    """Execute all jobs of a study that are not done; returns {run_id: message} of failures.

    servers: how many GPUs of this machine have a rollout server; None is all.
    KeyboardInterrupt after Ctrl-C or SIGTERM, when the running runs have been stopped.
    """
    plan.check_resources(grid, address, gpus_per_run)
    gpus = plan.split_gpus(grid, address, servers)
    plan.check_all_inputs(grid)
    jobs = jobs_of(grid, console)
    if all(job.status == "done" for job in jobs):
        console.print(f"All {len(grid)} runs are done: nothing to do.")
        return {}
    needs = {"CPU": cpus_per_run, "GPU": gpus_per_run}
    store = grid[0].folder.parent
    store.mkdir(parents=True, exist_ok=True)
    # Ray takes SIGTERM for itself when it starts, so the signals are ours after that. A node that
    # sees the marker shares the file system.
    with (connected(address, gpus.training) as ray, stop_signals() as stop,
          NamedTemporaryFile(dir=store, prefix=".sweep-") as marker):
        refuse_too_large(living_nodes(ray), needs)
        with rollout_servers(ray, jobs, needs, gpus, console) as servers_of_nodes:
            Sweep(ray, jobs, needs, marker.name, console, servers_of_nodes).work(stop)
    return {job.name: job.message for job in jobs if job.status == "failed"}


@contextmanager
def rollout_servers(ray, jobs: list[Job], needs: dict[str, float], gpus: plan.Gpus,
                    console: Console):
    """The rollout servers of a sweep, for the time of the block; None if its runs need none."""
    waiting = [job.params for job in jobs if job.status == "waiting"]
    if not plan.need_servers(waiting):
        yield None
        return
    nodes = living_nodes(ray)
    servers = len(gpus.serving or []) or sum(node.get("GPU", 0) for node in nodes) or len(nodes)
    at_once = math.ceil(min(room(nodes, needs), len(waiting)) / servers)
    began = time.monotonic()
    console.print("Starting the rollout servers: one to three minutes")
    started = server.SweepServers(ray, waiting, needs, at_once, gpus.server_memory,
                                  gpus.serving)
    try:
        started.start_on_new_nodes()
        count = sum(map(len, started.addresses.values()))
        console.print(f"Rollout servers: {count}, started in {time.monotonic() - began:.0f} s")
        yield started
    finally:
        started.stop()


def jobs_of(grid: list[Params], console: Console) -> list[Job]:
    """The jobs of a grid, done or waiting. Damaged runs are named; stale ones are refused."""
    found = plan.statuses(grid)
    plan.refuse_stale([p for p in grid if found[p.folder.name] == "done"])
    jobs = [Job(p, found[p.folder.name]) for p in grid]
    for job in jobs:
        if job.status == "damaged":
            console.print(f"{job.name} was done, but {runs.damage(job.params.folder)}: "
                          "it is started again.")
        if job.status != "done":
            job.status = "waiting"
    return jobs


class Sweep:
    """The jobs of a study on their way from waiting to done or failed."""

    def __init__(self, ray, jobs: list[Job], needs: dict[str, float], marker: str,
                 console: Console, servers=None):
        self.ray, self.jobs, self.needs = ray, jobs, needs
        self.marker, self.console, self.servers = marker, console, servers
        self.task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=0)(
            task.execute)
        self.running: dict = {}  # Ray's reference -> job
        self.took: list[float] = []  # seconds of each run that ended here
        self.slots = room(living_nodes(ray), needs)
        self.began = self.looked = time.monotonic()

    def those(self, *statuses: str) -> list[Job]:
        """The jobs that have one of these statuses."""
        return [job for job in self.jobs if job.status in statuses]

    def work(self, stop: list):
        """Keep as many tasks running as there is room for, until no job is left.

        KeyboardInterrupt as soon as `stop` is filled.
        """
        self.console.print(f"To do: {len(self.those('waiting'))}, at once: {self.slots}; "
                           "a line for each run when it ends")
        try:
            with Live(console=self.console, refresh_per_second=2, transient=True) as live:
                while not stop and self.those("waiting", "running", "elsewhere"):
                    self.start_waiting()
                    self.settle_finished()
                    if time.monotonic() - self.looked > LOOK_AGAIN:
                        self.look_elsewhere()
                        live.update(self.progress())
                        self.looked = time.monotonic()
        finally:
            self.cancel_running()
        if stop:
            self.say_what_is_left()
            raise KeyboardInterrupt
        self.console.print(f"Runs: {len(self.took)} in {time.monotonic() - self.began:.0f} s, "
                           f"up to {self.slots} at a time")

    def start_waiting(self):
        """Submit as many runs as there is room for; nodes may have come or gone."""
        self.slots = room(living_nodes(self.ray), self.needs)
        free = max(0, self.slots - len(self.running))
        if self.servers:
            self.servers.start_on_new_nodes()
        for job in self.those("waiting")[:free]:
            place = self.jobs.index(job)
            job.status, job.began = "running", time.monotonic()
            job.tries += 1
            reference = self.task.remote(
                job.params.model_dump(), self.needs["GPU"], self.marker,
                self.servers and self.servers.addresses, place)
            self.running[reference] = job

    def settle_finished(self):
        """Wait up to a second for tasks to end, and settle those that did."""
        if not self.running:
            time.sleep(0.5)
            return
        ended, _ = self.ray.wait(list(self.running), timeout=1)
        for reference in ended:
            job = self.running.pop(reference)
            try:
                result = self.ray.get(reference)
            except Exception as e:  # the worker or its node is gone
                result = {"status": "failed", "message": f"{type(e).__name__}: {e}", "retry": True}
            self.settle(job, result)

    def settle(self, job: Job, result: dict):
        """Take the result of a task: the run is done, failed, waits for another try or process."""
        status, message = result["status"], result.get("message", "")
        if status == "refused":
            raise ValueError(message)
        if status == "elsewhere":
            job.status = status
            job.tries -= 1
        elif status == "failed" and result["retry"] and job.tries < TRIES:
            job.status = "waiting"
            self.console.print(f"{job.name}  is tried again: {message.splitlines()[0][:200]}",
                               markup=False)
        else:
            job.message = message
            self.took.append(time.monotonic() - job.began)
            self.end(job, status, f"{self.took[-1]:.0f} s")

    def end(self, job: Job, status: str, remark: str):
        """Note that a run is done or has failed."""
        job.status = status
        done = len(self.those("done"))
        self.console.print(f"{done:4}/{len(self.jobs)} done  {job.name}  {status}  {remark}")

    def look_elsewhere(self):
        """See what became of runs that other processes have. What they gave up is ours to do."""
        for job in self.those("elsewhere"):
            now = plan.status_of(job.params.folder)
            if now == "done":
                self.end(job, "done", "by another process")
            elif now != "running":
                job.status = "waiting"

    def cancel_running(self):
        """Kill the tasks that are left, and wait until their kernels are gone."""
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        until = time.monotonic() + 10
        for job in self.running.values():
            while plan.status_of(job.params.folder) == "running" and time.monotonic() < until:
                time.sleep(0.2)

    def say_what_is_left(self):
        """After a stop: how many runs are done, and how to go on."""
        count = Counter(job.status for job in self.jobs)
        self.console.print(
            f"Stopped: {count['done']} of {len(self.jobs)} runs are done, {count['failed']} "
            f"failed, {count['running']} were cut off, {count['waiting'] + count['elsewhere']} had "
            "not begun here. The same command goes on from the last checkpoints.")

    def progress(self) -> Group:
        """The live table: a row for each running run, and a line about all."""
        table = Table("run", "step", "clean reward", "s a step", "left", box=None, pad_edge=False)
        for job in self.those("running")[:SHOWN]:
            table.add_row(job.name, *(progress_of(job.params) or ["starting"]))
        count = Counter(job.status for job in self.jobs)
        line = ", ".join(f"{n} {status}" for status, n in sorted(count.items()))
        line += f"; {(time.monotonic() - self.began) / 60:.0f} min since the start"
        if self.took:
            mean = sum(self.took) / len(self.took)
            left = mean * len(self.those("waiting", "running")) / max(1, self.slots)
            line += f", about {left / 60:.0f} min left"
        return Group(table, line)


def progress_of(params: Params) -> list[str]:
    """Step, clean reward of that step, seconds a step and time left, from the log of a run."""
    files = sorted((params.folder / "rewards").glob("step-*.parquet"))[-10:]
    try:
        newest, earlier = files[-1], files[0]
        reward = pd.read_parquet(newest, columns=["true_reward"]).true_reward.mean()
        seconds = newest.stat().st_mtime - earlier.stat().st_mtime
    except (IndexError, OSError):  # nothing is logged yet, or the log is just being joined
        return []
    step, since = (int(file.stem.removeprefix("step-")) for file in (newest, earlier))
    problems = dataset.read_manifest(params.data_dir)["counts"]["train"]
    steps = parameters.steps_in(params, problems)
    shown = [f"{step + 1}/{steps}", f"{reward:.3f}"]
    if step > since:
        a_step = seconds / (step - since)
        shown += [f"{a_step:.2f}", f"{a_step * (steps - step - 1) / 60:.1f} min"]
    return shown
