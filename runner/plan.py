"""What there is to do for a grid of runs: which are done, and whether the others can run here."""

import json
import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

from runner import WORK, dataset, engines, runs, task
from runner.files import read_json
from runner.parameters import Params
from runner.studies import Study


def gpus_of_a_run(grid: list[Params], address: str | None) -> float:
    """GPUs of a run if nobody says: one if its engine needs it, or if there is one to gain from.

    Four runs share a GPU with their rollout server.
    """
    used, models = {p.engine for p in grid}, {p.model for p in grid}
    if not used.issubset(engines.SHARING):
        return 1.0
    if "server" in used:
        if address or engines.gpu_query("name"):
            return 0.25
        return 0.0
    if address or models == {"tiny"}:
        return 0.0
    return float(bool(engines.gpu_query("name")))


def check_resources(grid: list[Params], address: str | None, gpus_per_run: float):
    """Refuse a grid whose engine is missing or has no GPU, by ValueError or FileNotFoundError.

    The nodes of a cluster are not this machine: there each run looks by itself.
    """
    used = sorted({p.engine for p in grid})
    if "server" in used and engines.ROLLOUT_URL in os.environ:
        check_rollout_url(os.environ[engines.ROLLOUT_URL])
    for engine in used:
        engines.check_share(engine, gpus_per_run)
        if not address:
            engines.check_engine(engine, gpus_per_run)


@dataclass(frozen=True)
class Gpus:
    """Which GPUs of this machine serve and train; None where that is not ours to say."""

    serving: list[str] | None = None
    training: list[str] | None = None
    server_memory: float = engines.SERVER_MEMORY  # the part of a GPU that a server takes


def need_servers(grid: list[Params]) -> bool:
    """Whether runs of a grid ask a rollout server that the sweep has to start."""
    given = os.environ.get(engines.ROLLOUT_URL)
    return not given and any(p.engine == "server" for p in grid)


def split_gpus(grid: list[Params], address: str | None, servers: int | None) -> Gpus:
    """Which GPUs serve and which train, if `servers` of this machine's are to have a server.

    None is all: then each GPU serves and trains. Fewer serve only, and the others train only.
    """
    if not need_servers(grid):
        if servers is not None:
            raise ValueError("--engines is for runs with engine=server whose servers this command "
                             "starts: leave it out")
        return Gpus()
    if address:
        if servers is not None:
            raise ValueError("--engines goes with this machine, not with --address: on a cluster "
                             "each GPU serves and trains")
        return Gpus()
    gpus = [index for [index] in engines.gpu_query("index")]
    if not gpus:
        return Gpus()
    if servers is None or servers == len(gpus):
        return Gpus(gpus, gpus)
    if not 0 < servers < len(gpus):
        raise ValueError(f"--engines {servers}: this machine has {len(gpus)} GPUs")
    return Gpus(gpus[:servers], gpus[servers:], engines.ALONE_MEMORY)


def check_rollout_url(url: str):
    """ConnectionError if no server answers there. A run would wait for it for minutes."""
    try:
        httpx.get(f"{url}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ConnectionError(f"--rollout-url {url}: no rollout server answers ({e})") from None


def by_inputs(grid: list[Params]) -> list[list[Params]]:
    """The runs of a grid, grouped by the data and the base policy that they share."""
    groups: dict[tuple, list[Params]] = {}
    for p in grid:
        groups.setdefault((p.data_dir, p.model, p.base_seed), []).append(p)
    return list(groups.values())


def check_all_inputs(grid: list[Params]):
    """FileNotFoundError, with the command to run, if data or a base policy are not there."""
    for alike in by_inputs(grid):
        runs.check_inputs(alike[0])


def status_of(folder: Path) -> str:
    """The status of a run; "running" as soon as the task of a sweep has it."""
    return "running" if task.is_taken(folder) else runs.status(folder)


def statuses(grid: list[Params]) -> dict[str, str]:
    """{run_id: status} of a grid. Folders that are not there are not looked into."""
    store = grid[0].folder.parent
    found = {p.folder.name: "missing" for p in grid}
    if not store.exists():
        return found
    for name in found.keys() & os.listdir(store):
        found[name] = status_of(store / name)
    return found


def inputs_today(p: Params) -> dict[str, str]:
    """Today's hash of a run's data, and of its base policy if that was built here."""
    hashes = {"data": dataset.data_hash(p.data_dir)}
    policy = read_json(WORK / f"models/{p.model}-s{p.base_seed}/policy.json")
    if policy:
        hashes["base policy"] = policy["hash"]
    return hashes


def refuse_stale(finished: list[Params]):
    """ValueError if a finished run was trained from other inputs than those that are there now."""
    for alike in by_inputs(finished):
        today = inputs_today(alike[0])
        for p in alike:
            compare_inputs(p.folder, today)


def compare_inputs(folder: Path, today: dict[str, str]):
    """ValueError if the run in `folder` began with other hashes than those of `today`."""
    record = json.loads((folder / "provenance.json").read_text())
    then = {"data": record["data_hash"], "base policy": record["policy_hash"]}
    for what, now in today.items():
        if now != then[what]:
            raise ValueError(
                f"{folder.name} was trained from another {what} than the one that is there now: "
                f"restore it, or delete {dataset.shown(folder)} to run it again")


SHAPE = ("profile", "model", "data_dir", "engine", "max_completion_length", "max_steps",
         "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
         "num_generations", "num_iterations", "grpo_beta")  # what decides how long a run takes
LOOKED_AT = 300  # folders of runs, the newest first


def shape_of(values: dict) -> tuple:
    """The part of a run's parameters that decides how long it takes."""
    return tuple(values.get(name) for name in SHAPE)


def seconds_of_shapes(store: Path) -> dict[tuple, list[float]]:
    """Shape -> seconds of each finished run of that shape in the store."""
    folders = sorted(store.glob("*/DONE"), key=lambda done: done.stat().st_mtime, reverse=True)
    found: dict[tuple, list[float]] = {}
    for done in folders[:LOOKED_AT]:
        record = read_json(done.parent / "provenance.json") or {}
        params = read_json(done.parent / "params.json") or {}
        if "notebook_seconds" in record:
            found.setdefault(shape_of(params), []).append(record["notebook_seconds"])
    return found


def estimate(grid: list[Params], found: dict[str, str]) -> str:
    """How long the runs that are not done will take, from finished ones of the same shape.

    found: run id -> status. "" if nothing is left, or if no such run is finished.
    """
    waiting = [p for p in grid if found[p.folder.name] != "done"]
    seconds = seconds_of_shapes(grid[0].folder.parent) if waiting else {}
    known = [seconds[shape_of(vars(p))] for p in waiting if shape_of(vars(p)) in seconds]
    if not known:
        return ""
    minutes = sum(statistics.mean(of_shape) for of_shape in known) / 60
    unlike = len(waiting) - len(known)
    rest = f"; of {unlike} others nothing is known" if unlike else ""
    return (f"{len(known)} of the runs left take about {minutes:.0f} min in all, one after "
            f"another, as finished runs of the same shape here did{rest}")


def print_plan(study: Study, grid: list[Params], out: TextIO):
    """Print the cells of a study and what is there already."""
    found = statuses(grid)
    rows = [("run", "arm", "seed", "base", "status")]
    for p in grid:
        arm, _ = study.arm_and_reference(p)
        rows.append((p.folder.name, arm, str(p.seed), str(p.base_seed), found[p.folder.name]))
    _print_columns(rows, out)
    count = ", ".join(f"{n} {status}" for status, n in Counter(found.values()).most_common())
    print(f"runs: {len(grid)}; {count}", file=out)
    if remark := estimate(grid, found):
        print(remark, file=out)


def _print_columns(rows: list[tuple[str, ...]], out: TextIO):
    """Print a table of texts. (rich would take seconds for 10,000 rows.)"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = map(str.ljust, row, widths)
        print("  ".join(cells).rstrip(), file=out)
