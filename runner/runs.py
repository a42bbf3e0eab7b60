"""The run contract: what a run's folder holds, when it counts as done, and what follows a crash."""

import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from lib.rewards import estimator, impossible_verdicts
from runner import BUILT_HERE, WORK, dataset
from runner.checkpoints import checkpoints, last_checkpoint, step_of
from runner.files import SUMS, read_json, seal, sha256, unsealed, write_atomically
from runner.model_files import check_model
from runner.parameters import Params, run_id, steps_in
from runner.provenance import code, peak_memory_mb, provenance
from runner.rewardlog import drop_steps_from, read_log

WEIGHTS = "adapter/adapter_model.safetensors"
RECORDS = ("params.json", "provenance.json")
_HELD: dict[Path, Any] = {}  # lock files that this process has open


# --- what the folder says -------------------------------------------------------------------------


def status(folder: Path) -> str:
    """done, damaged (it was done), running, failed, interrupted (it can go on), or missing."""
    if (folder / "DONE").exists():
        if damage(folder):
            return "damaged"
        return "done"
    if _held_elsewhere(folder):
        return "running"
    if (folder / "FAILED").exists():
        return "failed"
    if (folder / "params.json").exists():
        return "interrupted"
    return "missing"


def damage(folder: Path) -> str | None:
    """What is wrong with a finished run, or None if it has the files that it finished with.

    The weights of an evaluated run may be left behind (`make pack`): its tables answer all that is
    asked of it.
    """
    changed = unsealed(folder)
    if changed == [WEIGHTS] and _weights_left_behind(folder):
        return None
    if not changed and _hash_in_done(folder) != adapter_hash(folder):
        changed = [f"DONE or {WEIGHTS}"]
    if not changed:
        return None
    return f"{', '.join(changed)}: missing, cut off or changed"


def _weights_left_behind(folder: Path) -> bool:
    return adapter_hash(folder) is None and any(folder.glob("eval-*.parquet"))


def _hash_in_done(folder: Path) -> str:
    return (folder / "DONE").read_text(errors="replace").strip()


def adapter_hash(folder: Path) -> str | None:
    """sha256 of a run's final adapter weights, or None if they are not there."""
    return sha256(f"{folder}/{WEIGHTS}")


# --- one process at a time ------------------------------------------------------------------------


def hold(folder: Path):
    """Lock the run's folder for as long as the returned file is open.

    No second process can write into it then. The system frees the lock when the process ends,
    however it ends. RuntimeError if another process holds it.
    """
    if _held_here(folder):  # a notebook's cell is executed twice in one kernel
        return _HELD[folder]
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(10):  # `status` takes the lock for an instant: do not take that for a run
        file = open(folder / ".lock", "a")
        if _flock(file, fcntl.LOCK_EX):
            _HELD[folder] = file
            return file
        file.close()
        time.sleep(0.02)
    raise RuntimeError(f"{folder.name} is being executed by another process: wait for it or stop "
                       "it")


def _held_here(folder: Path) -> bool:
    return folder in _HELD and not _HELD[folder].closed


def _held_elsewhere(folder: Path) -> bool:
    lock = folder / ".lock"
    if _held_here(folder) or not lock.exists():
        return False
    with open(lock) as file:
        return not _flock(file, fcntl.LOCK_SH)


def _flock(file, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- before anything is loaded --------------------------------------------------------------------


def check_inputs(params: Params):
    """Refuse a run whose data, base policy or packages are not there.

    FileNotFoundError says how to get them; ValueError if there are too few problems.
    """
    if params.report_to != "none" and not find_spec(params.report_to):
        raise FileNotFoundError(f"report_to={params.report_to!r} needs a package that is not "
                                f"installed: pip install {params.report_to}")
    if params.model not in BUILT_HERE:
        check_model(params.model)
    manifest = dataset.read_manifest(params.data_dir)
    steps_in(params, manifest["counts"]["train_split"])
    if params.channel.by_difficulty:
        dataset.check_rates(params.data_dir, len(params.channel.false_negative_rate))
    if params.model in BUILT_HERE:
        _check_built(params)


def _check_built(params: Params):
    built = f"models/{params.model}-s{params.base_seed}"
    if not (WORK / built / "policy.json").exists():
        raise FileNotFoundError(
            f"the base policy {built} has not been built. Build it with: papermill "
            "notebooks/01b_warm_start.ipynb out.ipynb --log-output "
            f"-p profile {params.profile} -p base_seed {params.base_seed}")


def tracking(params: Params) -> dict[str, str]:
    """GRPOConfig's arguments for `report_to`. TensorBoard and wandb write into the run's folder.

    trackio writes beside runs/. Trackers read their folders from the environment, trackio when TRL
    imports it: call this first. Those of wandb and trackio are left alone if they are set.
    """
    study = WORK / params.output_dir
    os.environ.setdefault("WANDB_DIR", str(params.folder))
    os.environ.setdefault("WANDB_PROJECT", study.name)
    os.environ.setdefault("TRACKIO_DIR", str(study / "trackio"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(params.folder / "tensorboard")
    return {"report_to": params.report_to, "run_name": run_id(params), "project": study.name}


# --- start, or go on ------------------------------------------------------------------------------


def begin(folder: Path, params: Params, executed: list[str],
          **identity: str) -> tuple[dict[str, Any], Path | None]:
    """Start a run, or go on with one. What is later than the checkpoint it goes on from is deleted.

    executed: the cells that led here, see `code`. identity: policy_hash and data_hash of today.
    Returns the provenance record, to be completed by `finish`, and the checkpoint (None: from the
    start). Damage is mended by going back to what is whole, and the record says so under `mended`.
    ValueError if the run began with another policy or other data.
    """
    before = read_json(folder / "provenance.json")
    _refuse_other_inputs(folder, before, identity)

    checkpoint, mended = _where_to_go_on(folder, params, before)
    step = step_of(checkpoint) if checkpoint else 0
    if mended:
        print(f"{folder.name}: {'; '.join(mended)}. Going on from step {step}.")
    _forget_from(folder, step)

    seeds = params.model_dump(include={"seed", "noise_seed", "base_seed"})
    record = provenance(**identity, seeds=seeds, code=[code(executed)])
    _add_history(record, before or {}, step, mended)
    _write_json(folder / "params.json", params.model_dump())
    _write_json(folder / "provenance.json", record)
    return record, checkpoint


def _add_history(record: dict[str, Any], before: dict, step: int, mended: list[str]):
    """Put what earlier starts recorded before what this one does, which goes on from `step`."""
    record["mended"] = before.get("mended", []) + mended
    record["resumed_from"] = before.get("resumed_from", [])
    if step:  # what an earlier start did is a part of the run
        record["resumed_from"] = [*record["resumed_from"], step]
        record["code"] = before.get("code", []) + record["code"]


def _refuse_other_inputs(folder: Path, before: dict | None, identity: dict[str, str]):
    if not before:
        return
    for name, now in identity.items():
        if before.get(name) != now:
            what = name.removesuffix("_hash")
            raise ValueError(f"{folder.name} began with another {what} (hash {before.get(name)}, "
                             f"now {now}): restore it, or delete the folder of the run to start "
                             "again")


def _where_to_go_on(folder: Path, params: Params,
                    before: dict | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None; and what was found to be damaged."""
    mended = []
    if (folder / "DONE").exists():
        wrong = damage(folder)
        if wrong:
            mended.append(f"it was done, but {wrong}")
    log_was_sealed = (folder / SUMS).exists()
    if log_was_sealed and "rewards.parquet" in unsealed(folder):
        (folder / "rewards.parquet").unlink(missing_ok=True)
    if before:
        checkpoint, passed_over = last_checkpoint(folder, params.num_iterations)
        return checkpoint, mended + passed_over
    if (folder / "checkpoints").exists():  # nothing says from which policy and data they come
        mended.append("provenance.json is missing or cut off")
    return None, mended


def _forget_from(folder: Path, step: int):
    """Delete what is later than `step`, and all that only a finished run has."""
    for file in ("DONE", SUMS, "metrics.parquet"):
        (folder / file).unlink(missing_ok=True)
    later = [path for path in checkpoints(folder) if step_of(path) > step]
    for path in [*folder.glob("adapter"), *later]:
        shutil.rmtree(path)
    drop_steps_from(folder, step)


def _write_json(path: Path, values: dict[str, Any]):
    write_atomically(path, json.dumps(values, indent=1) + "\n")


# --- the end --------------------------------------------------------------------------------------


def finish(folder: Path, record: dict[str, Any]):
    """Complete provenance.json with the adapter's hash and peak memory, and seal the files.

    DONE is written last, when everything else has reached the disk.
    """
    record |= {"adapter_hash": adapter_hash(folder), "peak_memory_mb": peak_memory_mb()}
    _write_json(folder / "provenance.json", record)
    adapter = [f"adapter/{file.name}" for file in sorted((folder / "adapter").iterdir())]
    seal(folder, *RECORDS, "rewards.parquet", "metrics.parquet", *adapter)
    (folder / "FAILED").unlink(missing_ok=True)
    write_atomically(folder / "DONE", record["adapter_hash"] + "\n")


def prove(folder: Path) -> tuple[int, pd.DataFrame]:
    """Draw a run's noise again from its params.json: (rows in its log, those that do not fit).

    Nor does a row fit whose verdict the run's reward never gives. ValueError if params.json is not
    that of the folder, or the log is not that of a run.
    """
    from lib.audit import replay_run  # here, since a run that only starts has no need of it

    params = Params(**json.loads((folder / "params.json").read_text()))
    if run_id(params) != folder.name:
        raise ValueError(f"{folder.name} holds the params.json of {run_id(params)}: each log has "
                         "its own parameters")
    log = read_log(folder)
    correct = estimator(params.mitigation, *params.assumed_rates)
    wrong = replay_run(log, params.channel, params.noise_seed, correct)
    fits = ~log.index.isin(wrong.index) & ~impossible_verdicts(log, params.reward)
    return len(log), log[~fits]


def code_note(code: pd.Series) -> str:
    """A sentence if runs were made with different code, else "".

    code: run id -> what provenance records as `code`. Runs from before it was recorded have none.
    """
    runs_of: Counter[tuple[str, str]] = Counter()
    for text in code.dropna().astype(str):
        hashes = re.findall(r"\b[0-9a-f]{64}\b", text)  # notebook, modules, notebook, modules, ...
        runs_of.update(set(zip(hashes[::2], hashes[1::2], strict=True)))
    if len(runs_of) < 2:
        return ""
    number = {2: "two", 3: "three", 4: "four"}.get(len(runs_of), len(runs_of))
    *counts, last = [str(n) for _, n in runs_of.most_common()]
    return (f"The runs were made with {number} versions of the training code "
            f"({', '.join(counts)} and {last} runs). So they may differ by more than their "
            "parameters. The column `code` of provenance.csv says which run has which version.")
