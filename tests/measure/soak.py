"""Many short runs back to back under one sweep: `make soak`. What grows, and what is left behind?

Starts `python -m runner` in a workspace of its own, looks at its processes once a second from outside, and prints
a table over time and what was there after the end. The exit status is 1 if a run failed or something was left behind.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import yaml
from conftest import processes

from runner import ROOT, WORK, runs


def workspace(parent: Path) -> Path:
    """A folder with this project's data and base policy, and a temporary folder, which a sweep may fill."""
    for needed in ("data/arithmetic/manifest.json", "models/tiny-s0/policy.json"):
        if not (WORK / needed).exists():
            raise SystemExit(f"{needed} is not there: run `make study` (or 01_data and 01b_warm_start) first")
    for name in ("data", "models"):
        (parent / name).symlink_to(WORK / name)
    (parent / "tmp").mkdir()
    return parent


def study(parent: Path, count: int, steps: int) -> Path:
    """A study of `count` cells of a few steps each; every second one flips rewards."""
    path = parent / "soak.yaml"
    seeds = list(range((count + 1) // 2))
    path.write_text(yaml.safe_dump({
        "title": f"{count} short runs", "use_selected": False, "seeds": seeds, "arms": [{}, {"label_flip_rate": 0.3}],
        "fixed": {"max_steps": steps, "save_steps": steps, "eval_interval": 0}}))
    return path


def look(driver: psutil.Process, work: Path, began: float) -> dict[str, float]:
    """One row: MB of the driver and of all its processes, how many there are, what they hold open, what is done."""
    below = processes(work)
    row = {"seconds": time.monotonic() - began, "done": len(list((work / "outputs/runs").glob("*/DONE"))),
           "driver MB": driver.memory_info().rss / 2**20, "driver files": driver.num_fds(),
           "driver threads": driver.num_threads(), "processes": len(below), "all MB": 0.0, "ports": 0}
    for process in below:
        try:
            row["all MB"] += process.memory_info().rss / 2**20
            row["ports"] += sum(c.status == psutil.CONN_LISTEN for c in process.net_connections())
        except psutil.Error:
            continue
    return row


def leftovers(folder: Path) -> list[str]:
    """Names in a temporary folder but for Ray's session folder, which stays for its logs, and torch's one cache."""
    return sorted(p.name for p in folder.iterdir() if p.name != "ray" and not p.name.startswith("torchinductor_"))


def main() -> int:
    """Run, watch, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a run")
    args, options = parser.parse_known_args()  # the rest goes to the sweep
    work = workspace(Path(tempfile.mkdtemp(prefix="soak")))
    env = os.environ | {"GRPO_NOISE_WORK": str(work), "TMPDIR": str(work / "tmp"), "RAY_TMPDIR": str(work / "tmp")}
    began, rows = time.monotonic(), []
    with open(work / "log", "w") as log:
        sweep = subprocess.Popen([sys.executable, "-m", "runner", study(work, args.runs, args.steps), "--runs-only",
                                  *options], cwd=ROOT, env=env, stdout=log, stderr=log)
    driver = psutil.Process(sweep.pid)
    while sweep.poll() is None:
        try:
            rows.append(look(driver, work, began))
        except psutil.NoSuchProcess:
            break
        time.sleep(1)
    sweep.wait()
    time.sleep(3)  # a kernel looks once a second whether its parent lives
    if not list((work / "outputs/runs").glob("*/DONE")):
        print(f"no run was finished: see {work / 'log'}\n{(work / 'log').read_text()[-2000:]}")
        return 1
    table = pd.DataFrame(rows)
    table.to_csv(work / "soak.csv", index=False)
    every = table.groupby((table["done"] * 10 // max(1, args.runs)).clip(upper=9)).last()
    print(every.round(0).astype(int).to_string(index=False))
    first = table[table["done"] >= 2].head(1)["driver MB"].mean()
    grown = every["driver MB"].iloc[-1] - first
    folders = [f for f in (work / "outputs/runs").iterdir() if not f.name.startswith(".")]
    statuses = pd.Series([runs.status(f) for f in folders]).value_counts().to_dict()
    left = {"processes": [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in processes(work)],
            "temporary files": leftovers(work / "tmp")}
    session = sum(f.lstat().st_size for f in (work / "tmp/ray").rglob("*") if f.is_file()) / 2**20
    print(f"{args.runs} runs of {args.steps} steps in {rows[-1]['seconds']:.0f} s: {statuses}. The driver grew by "
          f"{grown:.1f} MB from its second finished run on. Ray's logs: {session:.1f} MB.")
    print("left behind:", "; ".join(f"{len(v)} {k} ({', '.join(v[:5])})" for k, v in left.items() if v) or "nothing")
    if sweep.returncode or any(left.values()) or statuses != {"done": args.runs}:
        print(f"see {work / 'log'} and {work / 'soak.csv'}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
