"""Run the grid of a study: `python -m runner params/studies/flip.yaml --profile tiny`.

Each cell is one Ray task that executes 02_train with papermill. Finished runs are skipped, interrupted ones go on from
their last checkpoint, and a run that fails leaves its executed notebook and does not stop the others.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter, deque
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from runner import (
    ROOT,
    WORK,
    cluster,
    dataset,
    engines,
    files,
    parameters,
    provenance,
    runs,
    studies,
)
from runner.cluster import execute
from runner.files import read

CLAIMS = ".sweeps/claims"  # below the runs of a study
LOOK_AGAIN = 2  # seconds between two looks at runs that another process executes


# --- what there is to do ----------------------------------------------------------------------------------------


def check(grid: list[parameters.Params], address: str | None, gpus_per_run: float | None, inputs: bool = True) -> float:
    """The part of a GPU for each run. ValueError or FileNotFoundError if an engine, or one of `inputs`, is missing."""
    if gpus_per_run is None:
        here = not address and any(p.model != "tiny" for p in grid) and engines.gpu_query("name")
        gpus_per_run = float(bool(here) or any(p.engine != "transformers" for p in grid))
    for engine in sorted({p.engine for p in grid}):
        engines.check_share(engine, gpus_per_run)
        if not address:  # the nodes of a cluster are not this machine: there the run itself looks
            engines.check_engine(engine, gpus_per_run)
    for p in {inputs_of(p): p for p in grid}.values() if inputs else ():
        runs.check_inputs(p)
    return gpus_per_run


def statuses(names: list[str], study_runs: Path) -> dict[str, str]:
    """{run_id: status}; "running" is also a run that another sweep has claimed."""
    there = set(os.listdir(study_runs)) if study_runs.exists() else set()
    here = [study_runs / name for name in names if name in there]
    if len(here) < 1000 or sys.platform != "linux":
        seen = list(map(runs.status, here))
    else:  # to read and hash 90,000 small files is work for all cores
        with get_context("fork").Pool() as pool:
            seen = pool.map(runs.status, here, 250)
    found = dict.fromkeys(names, "missing") | {f.name: status for f, status in zip(here, seen, strict=True)}
    file = study_runs / CLAIMS
    if file.exists():
        with open(file) as claimed:
            for name in [n for n, s in found.items() if s not in ("done", "running")]:
                if not claim(claimed, name, fcntl.LOCK_SH):
                    found[name] = "running"
    return found


def inputs_of(p: parameters.Params) -> tuple:
    """What names the data and the base policy of a run."""
    return p.data_dir, p.model, p.base_seed


def identities(grid: list[parameters.Params]) -> dict[tuple, dict[str, str]]:
    """Today's hashes of the data and the base policies of a grid, each computed once.

    A base policy has a hash here if it was built here, since it is then known without loading it.
    """
    known, hashes = {}, {data_dir: dataset.data_hash(data_dir) for data_dir in {p.data_dir for p in grid}}
    for data_dir, model, base_seed in {inputs_of(p) for p in grid}:
        policy = WORK / f"models/{model}-s{base_seed}/policy.json"
        known[data_dir, model, base_seed] = {"data": hashes[data_dir]} | (
            {"base policy": json.loads(policy.read_text())["hash"]} if policy.exists() else {})
    return known


def stale(folder: Path, identity: dict[str, str]) -> str | None:
    """Which input a finished run does not share with today's: "base policy", "data", or None."""
    record = json.loads(read(f"{folder}/provenance.json"))
    trained_from = {"base policy": record["policy_hash"], "data": record["data_hash"]}
    return next((what for what in identity if identity[what] != trained_from[what]), None)


# --- two sweeps at once -----------------------------------------------------------------------------------------


def claim(file, name: str, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether this process now has the run `name` to itself: one byte of the study's file of claims is locked.

    The system frees the byte when the process ends, however it ends.
    """
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, int(name[-8:], 16))
    except (BlockingIOError, PermissionError):
        return False
    return True


def release(file, name: str):
    """Give a claim back."""
    fcntl.lockf(file, fcntl.LOCK_UN, 1, int(name[-8:], 16))


# --- the sweep --------------------------------------------------------------------------------------------------


def run_grid(grid: list[parameters.Params], address: str | None = None, cpus_per_run: float = 1,
             gpus_per_run: float | None = None, max_retries: int = 1, console: Console | None = None) -> dict[str, str]:
    """Execute all cells of a study that are not done; returns {run_id: message} of those that failed.

    gpus_per_run: None is a whole GPU for an engine that needs one, and for all but the tiny policy where there is one.
    KeyboardInterrupt after Ctrl-C or SIGTERM, when the running runs have been stopped.
    """
    console = console or Console()
    gpus_per_run = check(grid, address, gpus_per_run)
    cells, study_runs = {parameters.run_id(p): p for p in grid}, WORK / grid[0].output_dir / "runs"
    identity = identities(grid)
    board = statuses(list(cells), study_runs)
    for name in [n for n, s in board.items() if s == "done"]:
        changed = stale(study_runs / name, identity[inputs_of(cells[name])])
        if changed:
            raise ValueError(f"{name} was trained from another {changed} than the one that is there now: "
                             f"restore it, or delete {dataset.shown(study_runs / name)} to run it again")
    for name in [n for n, s in board.items() if s == "damaged"]:
        console.print(f"{name} was done, but {runs.damage(study_runs / name)}: it is started again.")
    (study_runs / CLAIMS).parent.mkdir(parents=True, exist_ok=True)
    with open(study_runs / CLAIMS, "a") as file:
        board |= {name: "waiting" for name, s in board.items() if s != "done"}
        if set(board.values()) == {"done"}:
            console.print(f"All {len(grid)} runs are done: nothing to do.")
            return {}
        sweep = Sweep(cells, board, study_runs, file, console, max_retries)
        with connected(address) as ray, stop_signals() as stop:  # Ray takes SIGTERM for itself when it starts
            sweep.work(ray, stop, address, {"CPU": cpus_per_run, "GPU": gpus_per_run})
        return sweep.failed


@contextmanager
def connected(address: str | None):
    """Ray: a cluster that is there, or one of this machine's own that ends with the sweep.

    The nodes of a cluster get this project's code, as it is now, from Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    environment = None
    if address:
        environment = {"working_dir": str(ROOT), 
                       "excludes": ["/*", "!/lib", "!/runner", "!/notebooks", "!/params", "__pycache__"],
                       "env_vars": {"GRPO_NOISE_COMMIT": json.dumps(provenance.commit())}}
    if address and address.rpartition(":")[2].isdigit() and "//" not in address:  # Ray itself takes minutes to say so
        try:
            socket.create_connection(address.rsplit(":", 1), timeout=10).close()
        except OSError as e:
            raise ConnectionError(f"--address {address}: no Ray cluster answers ({e})") from None
    for tries in (2, 1, 0):
        try:
            ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
                     logging_level="error", runtime_env=environment)
            break
        except ConnectionError as e:
            raise ConnectionError(f"--address {address}: no Ray cluster answers ({str(e).splitlines()[0]})") from None
        except Exception as e:  # Ray gives its own processes 30 s to start, which a busy machine may exceed
            ray.shutdown()
            if not tries or "timed out" not in str(e):
                raise RuntimeError(f"Ray did not start: {e}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM fills. A second signal ends the process at once, and Ray with it."""
    stop = []

    def on_signal(number, _):
        if stop:
            os._exit(128 + number)
        stop.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: Ray's, which Python cannot set again


class Sweep:
    """The cells of a study on their way from waiting to done or failed. `board` says where each of them is."""

    def __init__(self, cells, board, study_runs, file, console, max_retries):
        self.cells, self.board, self.study_runs, self.file = cells, board, study_runs, file
        self.console, self.max_retries = console, max_retries
        self.waiting = deque(name for name, s in board.items() if s == "waiting")
        self.running, self.tries, self.took, self.clean, self.failed = {}, Counter(), [], [], {}
        self.site, self.inputs, self.looked, self.began = None, None, 0.0, time.monotonic()

    def work(self, ray, stop: list, address: str | None, needs: dict[str, float]):
        """Keep as many tasks running as there is room for, until no cell is left or `stop` is filled."""
        self.ray, self.gpu_share = ray, needs["GPU"]
        task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=0)(execute)
        room(ray, needs, refuse=True)
        marker = self.study_runs / f".sweeps/{uuid.uuid4().hex}"
        self.console.print(f"To do: {len(self.waiting)}, at once: {room(ray, needs)}; a line for each run when it ends")
        if address:
            hashes = files.digest(sorted(map(str, identities(list(self.cells.values())).items())), 16)
            self.site = {"work": str(WORK), "marker": str(marker.relative_to(WORK)), "inputs": hashes}
            marker.touch()
        try:
            with Live(console=self.console, refresh_per_second=2, transient=True) as live:
                while not stop and (self.waiting or self.running or "elsewhere" in self.board.values()):
                    slots = room(ray, needs)
                    while self.waiting and len(self.running) < slots:
                        self.start(task, self.waiting.popleft())
                    if time.monotonic() - self.looked > LOOK_AGAIN:
                        self.look_elsewhere()
                    live.update(progress(self.board, self.took, self.clean, slots, self.began))
                    ready = ray.wait(list(self.running), timeout=1)[0] if self.running else time.sleep(0.5)
                    for ref in ready or ():
                        self.settle(ref)
            if stop:
                self.stop()
        finally:
            marker.unlink(missing_ok=True)
        self.console.print(f"Runs: {len(self.took)} in {time.monotonic() - self.began:.0f} s, up to {slots} at a time")

    def start(self, task, name: str):
        """Submit a run, unless another process has it."""
        p, folder = self.cells[name], self.study_runs / name
        mine = claim(self.file, name)
        now = runs.status(folder) if mine else "running"
        if now in ("done", "running"):
            self.board[name] = "done" if now == "done" else "elsewhere"
            if mine:
                release(self.file, name)
            return
        self.tries[name] += 1
        site = self.site and self.site | {"parcel": self.inputs and (
            self.inputs, cluster.pack({folder: "."}) if now != "missing" else None)}
        self.running[task.remote(p.model_dump(), self.gpu_share, site)] = name, time.monotonic()
        self.board[name] = "running"

    def settle(self, ref):
        """Take the result of a task: the run is done, is tried again, or has failed."""
        name, since = self.running.pop(ref)
        try:
            result = self.ray.get(ref)
            if "files" in result:
                cluster.receive(result["files"], self.study_runs / name)
        except Exception as e:  # the worker or its node is gone, or the folder did not arrive
            result = {"status": "failed", "message": f"{type(e).__name__}: {e}", "retry": True}
        if result["status"] == "send":  # a node without this file system: from now on, tasks bring what it needs
            self.inputs = self.inputs or cluster.pack(cluster.input_folders(list(self.cells.values())))
            self.tries[name] -= 1
        if result["status"] == "send" or (
                result["status"] == "failed" and result["retry"] and self.tries[name] <= self.max_retries):
            self.waiting.append(name)
            self.board[name] = "waiting"
            if result["status"] == "failed":
                self.console.print(f"{name}  is tried again: {result['message'].splitlines()[0][:200]}", markup=False)
            return
        self.took.append(time.monotonic() - since)
        self.clean += [result["clean"]] if "clean" in result else []
        self.end(name, result["status"], result.get("message", ""), f"{self.took[-1]:.0f} s")
        release(self.file, name)

    def end(self, name: str, status: str, message: str, remark: str):
        """Note that a run is done or has failed."""
        self.board[name] = status
        if status == "failed":
            self.failed[name] = message
        done = sum(s == "done" for s in self.board.values())
        self.console.print(f"{done:4}/{len(self.board)} done  {name}  {status}  {remark}")

    def look_elsewhere(self):
        """What has become of runs that other processes execute? One that was given up there is ours to do."""
        for name in [n for n, s in self.board.items() if s == "elsewhere"]:
            if not claim(self.file, name):
                continue
            now, folder = runs.status(self.study_runs / name), self.study_runs / name
            release(self.file, name)
            if now in ("done", "failed"):
                self.end(name, now, (folder / "FAILED").read_text() if now == "failed" else "", "by another process")
            elif now != "running":
                self.waiting.append(name)
                self.board[name] = "waiting"
        self.looked = time.monotonic()

    def stop(self):
        """Kill the running tasks and wait until their kernels are gone. KeyboardInterrupt, always."""
        names = [name for name, _ in self.running.values()]
        for ref in self.running:
            self.ray.cancel(ref, force=True)
        until = time.monotonic() + 10
        while time.monotonic() < until and any(runs.status(self.study_runs / name) == "running" for name in names):
            time.sleep(0.2)
        count = Counter(self.board.values())
        self.console.print(f"Stopped: {count['done']} of {len(self.board)} runs are done, {count['failed']} failed, "
                           f"{len(names)} were cut off, {count['waiting'] + count['elsewhere']} had not begun here. "
                           "The same command goes on from the last checkpoints.")
        raise KeyboardInterrupt


def room(ray, needs: dict[str, float], refuse: bool = False) -> int:
    """How many runs fit on the nodes that are there now. ValueError if `refuse` and no node can take even one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for what, each in needs.items():
        most = max((node.get(what, 0) for node in nodes), default=0)
        if refuse and each > most:  # Ray would wait for such a node for ever
            raise ValueError(f"--{what.lower()}s-per-run {each:g}: there are {most:g} {what}s "
                             f"{'here' if len(nodes) == 1 else 'on the largest node'}")
    fits = [min((int(node.get(what, 0) / each + 1e-6) for what, each in needs.items() if each), default=1)
            for node in nodes]
    return sum(fits)


def progress(board: dict[str, str], took: list[float], clean: list[float], slots: int, began: float) -> Table:
    """The live table: how many runs are done, running, failed and waiting, and when the rest should be done."""
    count = Counter(board.values())
    left = count["waiting"] + count["running"]
    eta = f"{sum(took) / len(took) * left / max(1, slots) / 60:.0f} min" if took else "?"
    shown = ("done", "running", "failed", "waiting", *(["elsewhere"] if count["elsewhere"] else []))
    table = Table(*shown, "elapsed", "left (estimate)", "clean reward, mean of these")
    table.add_row(*(str(count[s]) for s in shown), f"{(time.monotonic() - began) / 60:.0f} min", eta,
                  f"{sum(clean) / len(clean):.3f} ({len(clean)} runs)" if clean else "?")
    return table


# --- the command ------------------------------------------------------------------------------------------------


def plan(study: studies.Study, grid: list[parameters.Params], console: Console):
    """Print the cells of a study and what is there already."""
    study_runs = WORK / grid[0].output_dir / "runs"
    names = [parameters.run_id(p) for p in grid]
    rows = [("run", "arm", "seed", "base", "status")]
    for name, p, status in zip(names, grid, statuses(names, study_runs).values(), strict=True):
        rows.append((name, study.arm_and_reference(p)[0], str(p.seed), str(p.base_seed), status))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = ", ".join(f"{n} {s}" for s, n in Counter(row[-1] for row in rows[1:]).most_common())
    print("\n".join([*lines, f"runs: {len(grid)}; {count}"]), file=console.file)  # rich is slow


def add_options(parser: argparse.ArgumentParser):
    """Options that decide where and how many runs execute."""
    where = parser.add_argument_group("where and how many")
    where.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster that is there (auto: this node's own); "
                       "without it, Ray starts on this machine and ends with the sweep")
    where.add_argument("--cpus-per-run", type=float, default=1, metavar="N", help="CPU cores of a run (1)")
    where.add_argument("--gpus-per-run", type=float, metavar="N", help="0.25 lets four runs share a GPU; by default a "
                       "whole one where there is one, none for the tiny policy")
    where.add_argument("--max-retries", type=int, default=1, metavar="N",
                       help="tries after the first of a run that was killed, crashed, or lost its node (1)")


def options(args: argparse.Namespace) -> dict:
    """Those options as keyword arguments of run_grid."""
    return {name: getattr(args, name) for name in ("address", "cpus_per_run", "gpus_per_run", "max_retries")}


def announce(name: str, study: studies.Study, grid: list[parameters.Params], console: Console):
    """Say what is going to run, where, and with whose hyperparameters."""
    folder = dataset.shown(studies.folder_of(name, grid[0].profile))
    console.print(f"{study.title}. Runs: {len(grid)}, profile: {grid[0].profile}, folder: {folder}")
    if grid[0].model != "tiny" and not engines.gpu_query("name"):
        console.print("nvidia-smi shows no GPU here: on a CPU, a run of this model can take hours.")
    chosen = parameters.selected(grid[0].profile) if study.use_selected else {}
    if chosen:
        console.print("chosen by the hyperparameter study: " + ", ".join(f"{k}={v}" for k, v in chosen.items()))


def report(failed: dict[str, str], grid: list[parameters.Params]) -> int:
    """Say which runs failed and where their notebooks are; returns the exit status."""
    for name, message in failed.items():
        print(f"FAILED {name}: {(message.splitlines() or ['?'])[0][:300]}\n"
              f"       see {grid[0].output_dir}/runs/{name}/notebook.ipynb", file=sys.stderr)
    return 1 if failed else 0


MANUAL = """
examples:
  python -m runner flip --dry-run                    the cells of params/studies/flip.yaml, and what is done
  python -m runner flip                              run them, as many at once as there are CPU cores
  python -m runner flip --profile smol --gpus-per-run 0.25
  python -m runner flip --address 10.0.0.7:6379      on a Ray cluster; inside one: --address auto
  python -m runner flip --report                     tables and analysis of what is finished so far
  sbatch scripts/slurm.sh flip --profile smol           in a SLURM allocation

what a run leaves:
  <workspace>/outputs/runs/<run_id>/, with DONE when it is whole. The same cell in two studies is one run. The command
  can be repeated at any time, and twice at once: finished runs are skipped, interrupted ones go on from their last
  checkpoint, and a run that another process executes is left to it and waited for. A failed run is tried again by the
  next sweep.

clusters:
  Nodes need the same Python and packages, not the project: they get lib, notebooks and params from Ray. A node that
  does not see the workspace is sent data, base policies and begun runs, and sends finished folders back, without their
  checkpoints. If such a node is lost, its runs begin again; with a common file system they go on.

signals:
  Ctrl-C or SIGTERM stops the running runs (they go on from their last checkpoints next time) and says what is left;
  a second one ends at once.

exit status:
  0  all runs are done    1  a run failed    2  something was refused before a run began    130  stopped by a signal

environment:
  GRPO_NOISE_WORK  the workspace: where data/, models/ and outputs/ are (the project). A node of a cluster may have its
                   own, in the environment of `ray start`: then it works there.
  RAY_AUTH_MODE=token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH  of a cluster that asks for a token
  HF_ENDPOINT, HF_TOKEN  hub of models, on every node that loads one
"""
