"""Run the grid of a study: `python -m lib.sweep params/studies/flip.yaml --profile tiny`.

Each cell is one Ray task that executes 02_train with papermill. Finished runs are skipped, interrupted ones go on from
their last checkpoint, and a run that fails leaves its executed notebook and does not stop the others.
"""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lib import BUILT_HERE, data, engines, runs

NO_RETRY = ("ValueError", "FileNotFoundError")  # the same parameters would fail in the same way
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def execute(params: dict, gpu_share: float = 0) -> dict:
    """Execute one run in this process: {"status": "done" | "failed", "message": ..., "retry": ...}."""
    os.environ |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "GRPO_NOISE_GPU_SHARE": str(gpu_share or 1)}
    if not gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run without a part of a GPU leaves it alone
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder = runs.Params(**params).folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(str(runs.ROOT / "notebooks/02_train.ipynb"), str(folder / "notebook.ipynb"), params,
                                   kernel_name="python3", progress_bar=False, cwd=str(runs.ROOT))
        return {"status": "done"}
    except PapermillExecutionError as e:
        message, retry = f"{e.ename}: {e.evalue}", e.ename not in NO_RETRY
    except Exception as e:  # the kernel died, the disk is full, ...: this run failed, the others go on
        message, retry = f"{type(e).__name__}: {e}", True
    if any(words in message for words in engines.OUT_OF_MEMORY):
        message, retry = f"{message.splitlines()[0][:200]} ... {engines.ADVICE}", False
    if any(words in message for words in DISK_FULL):
        message, retry = (f"{message.splitlines()[0][:200]}, in {data.shown(folder)}. Make room and start again: the "
                          "run goes on from its last checkpoint"), False
    with suppress(OSError):  # there may be no room for this either
        runs.write_atomically(folder / "FAILED", message + "\n")
    return {"status": "failed", "message": message, "retry": retry}


def reuse(params: runs.Params) -> bool:
    """Take over the same finished run from another study: same parameters, same base policy, same data.

    Only for policies that were built here, whose hash is known without loading them. Files are hard links.
    """
    if params.model not in BUILT_HERE or runs.status(params.folder) == "running" or runs.stranger(params.folder):
        return False
    for done in runs.OUTPUTS.glob(f"*/runs/{runs.run_id(params)}/DONE"):
        if done.parent != params.folder and runs.status(done.parent) == "done" and not stale(done.parent, params):
            part = params.folder.with_name(params.folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(done.parent, part, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
            shutil.rmtree(params.folder, ignore_errors=True)
            os.replace(part, params.folder)
            return True
    return False


def stale(folder: Path, params: runs.Params) -> str | None:
    """Which input a finished run does not share with today's: "base policy", "data", or None.

    The base policy is compared if it was built here, since its hash is then known without loading it.
    """
    record = json.loads((folder / "provenance.json").read_text())
    policy = runs.WORK / f"models/{params.model}-s{params.base_seed}/policy.json"
    if policy.exists() and record["policy_hash"] != json.loads(policy.read_text())["hash"]:
        return "base policy"
    return "data" if record["data_hash"] != data.data_hash(params.data_dir) else None


def run_grid(grid: list[runs.Params], address: str | None = None, cpus_per_run: float = 1,
             gpus_per_run: float | None = None, max_retries: int = 1, console: Console | None = None) -> dict[str, str]:
    """Execute all cells that are not done; returns {run_id: message} of those that failed.

    gpus_per_run: None is a whole GPU for an engine that needs one, and for all but the tiny policy where there is one.
    """
    console = console or Console()
    if gpus_per_run is None:
        here = not address and engines.gpu_query("name") and any(p.model != "tiny" for p in grid)
        gpus_per_run = float(bool(here) or any(p.engine != "transformers" for p in grid))
    for engine in sorted({p.engine for p in grid}):
        if not address:  # the nodes of a cluster are not this machine: there the run itself looks
            engines.check(engine, min(1.0, gpus_per_run))
        if engine != "transformers" and not gpus_per_run:
            raise ValueError(f"engine={engine!r} needs a part of a GPU: give --gpus-per-run, such as 0.25")
    for p in {(p.data_dir, p.model, p.base_seed): p for p in grid}.values():
        runs.check_inputs(p)
    for p in grid:
        changed = runs.status(p.folder) == "done" and stale(p.folder, p)
        if changed:
            raise ValueError(f"{runs.run_id(p)} was trained from another {changed} than the one that is there now: "
                             f"restore it, or delete {p.output_dir}/runs to run the study again")
    todo = [p for p in grid if runs.status(p.folder) != "done"]
    for p in todo:
        if runs.status(p.folder) == "damaged":
            console.print(f"{runs.run_id(p)} was done, but {runs.damage(p.folder)}: it is started again.")
    reused = [p for p in todo if reuse(p)]
    todo = [p for p in todo if p not in reused]
    if reused:
        console.print(f"{len(reused)} runs were finished in another study and are taken over from there.")
    board = {runs.run_id(p): "waiting" if p in todo else "done" for p in grid}
    if not todo:
        console.print(f"All {len(grid)} runs are done: nothing to do.")
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    task = ray.remote(num_cpus=cpus_per_run, num_gpus=gpus_per_run, max_retries=0)(execute)
    has, needs = ray.cluster_resources(), {"CPU": cpus_per_run, "GPU": gpus_per_run}
    for what, each in needs.items():
        if each > has.get(what, 0):  # Ray would wait for such a node for ever
            ray.shutdown()
            raise ValueError(f"--{what.lower()}s-per-run {each:g}: there are {has.get(what, 0):g} {what}s here")
    slots = max(1, int(min((has[what] / each for what, each in needs.items() if each), default=len(todo))))
    began, took, failed, tries = time.monotonic(), [], {}, {}
    waiting, running = list(todo), {}
    try:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            while waiting or running:
                while waiting and len(running) < slots:
                    p = waiting.pop(0)
                    tries[runs.run_id(p)] = tries.get(runs.run_id(p), 0) + 1
                    running[task.remote(p.model_dump(), gpus_per_run)] = (p, time.monotonic())
                    board[runs.run_id(p)] = "running"
                live.update(progress(board, took, len(waiting) + len(running), slots, began))
                ready, _ = ray.wait(list(running), timeout=1)
                for ref in ready:
                    p, since = running.pop(ref)
                    name = runs.run_id(p)
                    try:
                        result = ray.get(ref)
                    except Exception as e:  # the worker process itself was killed
                        result = {"status": "failed", "message": f"{type(e).__name__}: {e}", "retry": True}
                    if result["status"] == "failed" and result["retry"] and tries[name] <= max_retries:
                        waiting.append(p)
                        board[name] = "waiting"
                        continue
                    took.append(time.monotonic() - since)
                    board[name] = result["status"]
                    if result["status"] == "failed":
                        failed[name] = result["message"]
                    done = sum(s == "done" for s in board.values())
                    console.print(f"{done:4}/{len(grid)} done  {name}  {result['status']}  {took[-1]:.0f} s")
    finally:
        ray.shutdown()
    console.print(f"{len(took)} runs in {time.monotonic() - began:.0f} s, {slots} at a time")
    return failed


def progress(board: dict[str, str], took: list[float], left: int, slots: int, began: float) -> Table:
    """The live table: how many runs are done, running, failed and waiting, and when the rest should be done."""
    count = {s: sum(v == s for v in board.values()) for s in ("done", "running", "failed", "waiting")}
    eta = f"{sum(took) / len(took) * left / slots / 60:.0f} min" if took else "?"
    table = Table(*count, "elapsed", "left (estimate)")
    table.add_row(*map(str, count.values()), f"{(time.monotonic() - began) / 60:.0f} min", eta)
    return table


def plan(study: runs.Study, grid: list[runs.Params]) -> Table:
    """The cells of a study and what is there already."""
    table = Table("run", "arm", "seed", "base", "status")
    for p in grid:
        arm, _ = study.arm_and_reference(p)
        table.add_row(runs.run_id(p), arm, str(p.seed), str(p.base_seed), runs.status(p.folder))
    return table


def add_options(parser: argparse.ArgumentParser):
    """Options that decide where and how many runs execute."""
    parser.add_argument("--address", help="address of a running Ray cluster that shares this folder")
    parser.add_argument("--cpus-per-run", type=float, default=1)
    parser.add_argument("--gpus-per-run", type=float, help="0.25 lets four runs share a GPU; a whole one by default")
    parser.add_argument("--max-retries", type=int, default=1, help="of a run that was killed or crashed")


def options(args: argparse.Namespace) -> dict:
    """Those options as keyword arguments of run_grid."""
    return {name: getattr(args, name) for name in ("address", "cpus_per_run", "gpus_per_run", "max_retries")}


def announce(study: runs.Study, grid: list[runs.Params], console: Console):
    """Say what is going to run, where, and with whose hyperparameters."""
    console.print(f"{study.title}: {len(grid)} runs, profile {grid[0].profile}, in {grid[0].output_dir}")
    chosen = runs.selected(grid[0].profile) if study.use_selected else {}
    if chosen:
        console.print("chosen by the hyperparameter study: " + ", ".join(f"{k}={v}" for k, v in chosen.items()))


def report(failed: dict[str, str], grid: list[runs.Params]) -> int:
    """Say which runs failed and where their notebooks are; returns the exit status."""
    for name, message in failed.items():
        print(f"FAILED {name}: {message.splitlines()[0][:300]}\n"
              f"       see {grid[0].output_dir}/runs/{name}/notebook.ipynb", file=sys.stderr)
    return 1 if failed else 0


def main(argv=None) -> int:
    """Command line; the exit status is 1 if a run failed and 2 if the parameters were refused."""
    parser = argparse.ArgumentParser(prog="python -m lib.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name or file of a study in params/studies")
    parser.add_argument("--profile", default="tiny", help="name of a profile in params/profiles")
    add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the cells and what is done")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        study, grid = runs.load_study(args.study, args.profile)
        announce(study, grid, console)
        if args.dry_run:
            console.print(plan(study, grid))
            return 0
        return report(run_grid(grid, console=console, **options(args)), grid)
    except (ValueError, OSError, RuntimeError) as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
