"""What there is to do for a grid of runs: which are done, and whether the others can run here."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import TextIO

from runner import WORK, dataset, engines, runs, task
from runner.files import read, read_json
from runner.parameters import Params
from runner.studies import Study


def gpus_of_a_run(grid: list[Params], address: str | None) -> float:
    """GPUs of a run if nobody says: one if its engine needs it, or if there is one to gain from."""
    if any(p.engine != "transformers" for p in grid):
        return 1.0
    if address or all(p.model == "tiny" for p in grid):
        return 0.0
    return float(bool(engines.gpu_query("name")))


def check_resources(grid: list[Params], address: str | None, gpus_per_run: float):
    """Refuse a grid whose engine is missing or has no GPU, by ValueError or FileNotFoundError.

    The nodes of a cluster are not this machine: there each run looks by itself.
    """
    for engine in sorted({p.engine for p in grid}):
        engines.check_share(engine, gpus_per_run)
        if not address:
            engines.check_engine(engine, gpus_per_run)


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
    there = set(os.listdir(store)) if store.exists() else set()
    found = {p.folder.name: "missing" for p in grid}
    for name in there.intersection(found):
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
    record = json.loads(read(folder / "provenance.json"))
    then = {"data": record["data_hash"], "base policy": record["policy_hash"]}
    for what, now in today.items():
        if now != then[what]:
            raise ValueError(
                f"{folder.name} was trained from another {what} than the one that is there now: "
                f"restore it, or delete {dataset.shown(folder)} to run it again")


def print_plan(study: Study, grid: list[Params], out: TextIO):
    """Print the cells of a study and what is there already."""
    found = statuses(grid)
    rows = [("run", "arm", "seed", "base", "status")]
    for p in grid:
        arm, _ = study.arm_and_reference(p)
        rows.append((p.folder.name, arm, str(p.seed), str(p.base_seed), found[p.folder.name]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip(), file=out)  # rich would take seconds for 10,000 of them
    count = ", ".join(f"{n} {status}" for status, n in Counter(found.values()).most_common())
    print(f"runs: {len(grid)}; {count}", file=out)
