"""The run contract: what the folder of a run holds, when it counts as done, and how it goes on after a crash."""

import fcntl
import json
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from lib.audit import replay_run
from lib.rewards import estimator
from runner import BUILT_HERE, WORK, dataset
from runner.files import SUMS, read, read_json, seal, sha256, unsealed, write_atomically
from runner.model_files import check_model
from runner.parameters import Params, _name, run_id
from runner.provenance import code, peak_memory_mb, provenance
from runner.rewardlog import drop_steps_from, logged_until, read_log

WEIGHTS = "adapter/adapter_model.safetensors"
_HELD: dict[Path, Any] = {}  # lock files that this process has open


def status(folder: Path) -> str:
    """done, damaged (it was done), running, failed, interrupted (something is there to resume from), or missing."""
    if (folder / "DONE").exists():
        return "damaged" if damage(folder) else "done"
    if (folder / ".lock").exists() and not (folder in _HELD and not _HELD[folder].closed):
        with open(folder / ".lock") as file:
            if not _flock(file, fcntl.LOCK_SH):
                return "running"
    if (folder / "FAILED").exists():
        return "failed"
    return "interrupted" if (folder / "params.json").exists() else "missing"


def damage(folder: Path) -> str | None:
    """What is wrong with a finished run, or None: it has the files that it finished with, and the name that is its own.

    Runs that finished before there were sums are judged by the hash of the adapter, which DONE holds. The weights of
    an evaluated run may be left behind (`make pack`): its tables answer all that is asked of it.
    """
    other = stranger(folder)
    if other:
        return f"params.json is that of {other}"
    wrong = unsealed(folder)
    if wrong == [WEIGHTS] and adapter_hash(folder) is None and any(folder.glob("eval-*.parquet")):
        return None
    if wrong == [SUMS] and not (folder / SUMS).exists():
        wrong = [name for name in ("params.json", "provenance.json") if not read_json(f"{folder}/{name}")]
    if not wrong and read(f"{folder}/DONE").decode(errors="replace").strip() != adapter_hash(folder):
        wrong = [f"DONE or {WEIGHTS}"]
    return f"{', '.join(wrong)}: missing, cut off or changed" if wrong else None


def stranger(folder: Path, name: str | None = None) -> str | None:
    """The run whose params.json the folder holds, if it is not `name`: the one that the folder is named after.

    The file is hashed as it stands, since 10,000 of them are read at once: what it says is checked when it is used.
    """
    try:
        there = _name(read_json(f"{folder}/params.json"))
    except (KeyError, TypeError, ValueError):  # damaged: nothing says that it is another's
        return None
    return there if there != (name or folder.name) else None


def hold(folder: Path):
    """Lock the run's folder for as long as the returned file is open, so that no second process writes into it.

    The system frees the lock when the process ends, however it ends. RuntimeError if another process holds it.
    """
    if folder in _HELD and not _HELD[folder].closed:  # a notebook's cell is executed twice in one kernel
        return _HELD[folder]
    folder.mkdir(parents=True, exist_ok=True)
    link = next((p for p in (folder, *folder.rglob("*")) if p.is_symlink()), None)
    if link:  # a run makes none, and what is written to it would end up elsewhere
        raise ValueError(f"{folder.name} holds a symbolic link ({link.name}): delete it, or the folder")
    for _ in range(10):  # `status` looks at the lock for an instant: do not take that for a run
        file = open(folder / ".lock", "w")
        if _flock(file, fcntl.LOCK_EX):
            _HELD[folder] = file
            return file
        file.close()
        time.sleep(0.02)
    raise RuntimeError(f"{folder.name} is being executed by another process: wait for it or stop it")


def _flock(file, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_inputs(params: Params):
    """FileNotFoundError, with the command to run, if the data or the base policy of a run are not there."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError("a run is one process: to use several GPUs, execute several runs at once with lib.sweep")
    if params.report_to != "none" and not find_spec(params.report_to):
        raise FileNotFoundError(f"report_to={params.report_to!r} needs a package that is not installed: "
                                f"pip install {params.report_to}")
    dataset.read_manifest(params.data_dir)
    built = f"models/{params.model}-s{params.base_seed}"
    if params.model in BUILT_HERE and not (WORK / built / "policy.json").exists():
        raise FileNotFoundError(
            f"the base policy {built} has not been built. Build it with: papermill notebooks/01b_warm_start.ipynb "
            f"outputs/01b_warm_start.ipynb -p profile {params.profile} -p base_seed {params.base_seed}")
    if params.model not in BUILT_HERE:
        check_model(params.model)


def tracking(params: Params) -> dict[str, str]:
    """GRPOConfig's arguments for `report_to`. TensorBoard and wandb write into the run's folder, trackio beside runs/.

    Trackers read their folders from the environment, trackio when TRL imports it: call this first. Those of wandb and
    trackio are left alone if they are set.
    """
    study = WORK / params.output_dir
    defaults = {"WANDB_DIR": params.folder, "WANDB_PROJECT": study.name, "TRACKIO_DIR": study / "trackio"}
    os.environ |= {name: str(value) for name, value in defaults.items() if name not in os.environ}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(params.folder / "tensorboard")
    return {"report_to": params.report_to, "run_name": run_id(params), "project": study.name}


def begin(folder: Path, params: Params, **identity: str) -> tuple[dict[str, Any], Path | None]:
    """Start a run, or go on with one: its provenance record, to be completed by `finish`, and the checkpoint to go on
    from (None: from the start). What is later than that is deleted.

    Damage is mended by going back to what is whole, and the record says so under `mended`. A contradiction is refused
    with ValueError: params.json of another run, or `identity` (policy_hash, data_hash) other than when the run began.
    """
    there = stranger(folder, run_id(params))
    if there:
        raise ValueError(f"{dataset.shown(folder)} holds the params.json of {there}: it was copied or renamed by hand. "
                         "Move it away or delete it, then start again")
    before, mended = read_json(folder / "provenance.json"), []
    changed = [name for name in identity if before and before.get(name) != identity[name]]
    if changed:
        raise ValueError(f"{folder.name} began with another {' and another '.join(c[:-5] for c in changed)} (hash "
                         f"{before.get(changed[0])}, now {identity[changed[0]]}): restore it, or delete the folder of "
                         "the run to start again")
    if (folder / "DONE").exists() and damage(folder):
        mended.append(f"it was done, but {damage(folder)}")
    if (folder / SUMS).exists() and "rewards.parquet" in unsealed(folder):
        (folder / "rewards.parquet").unlink(missing_ok=True)
    if before:
        checkpoint, passed_over = last_checkpoint(folder, params.num_iterations)
        mended += passed_over
    else:  # nothing says from which policy and data the checkpoints come
        checkpoint, before = None, {"resumed_from": []}
        mended += ["provenance.json is missing or cut off"] if (folder / "checkpoints").exists() else []
    resumed_from = _step(checkpoint) if checkpoint else 0
    if mended:
        print(f"{folder.name}: {'; '.join(mended)}. Going on from step {resumed_from}.")
    for file in ("DONE", SUMS, "metrics.parquet"):  # deleted, not overwritten: another study may hold a link to them
        (folder / file).unlink(missing_ok=True)
    for later in [*folder.glob("adapter"), *(p for p in _checkpoints(folder) if _step(p) > resumed_from)]:
        shutil.rmtree(later)
    drop_steps_from(folder / "rewards", resumed_from)
    record = provenance(**identity, seeds=params.model_dump(include={"seed", "noise_seed", "base_seed"}),
                        resumed_from=before["resumed_from"] + ([resumed_from] if resumed_from else []),
                        mended=before.get("mended", []) + mended,
                        code=(before.get("code", []) if resumed_from else []) + [code()])
    write_atomically(folder / "params.json", json.dumps(params.model_dump(), indent=1) + "\n")
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    return record, checkpoint


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest step first. Not by their times: a clock can be wrong."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def keep_checkpoint(folder: Path, step: int, keep: int = 2):
    """Seal the checkpoint that was just written, and delete all but the newest `keep`.

    Not left to the trainer, which takes the oldest by modification time: after a clock was set back, the newest.
    """
    path = folder / f"checkpoints/checkpoint-{step}"
    seal(path, *sorted(f.name for f in path.iterdir() if f.name != SUMS))
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def last_checkpoint(folder: Path, every: int) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed exactly, or None; and why newer ones were passed over.

    It must be as it was sealed, at a multiple of `every` steps, and the reward log must be whole up to it. `every` is
    the number of optimiser steps on one batch of rollouts (num_iterations): TRL rebuilds its rollouts when it resumes.
    ValueError if there are checkpoints and none is at such a step.
    """
    found, logged, passed_over = _checkpoints(folder), logged_until(folder, every), []
    aligned = [path for path in found if _step(path) % every == 0]
    if found and not aligned:
        raise ValueError(f"{folder.name}: checkpoints at steps {sorted(map(_step, found))} are not multiples of "
                         f"{every} (num_iterations), so none can be resumed exactly: delete the folder to start again")
    for path in aligned:
        wrong = unsealed(path)
        if not wrong and _step(path) <= logged:
            return path, passed_over
        passed_over.append(f"{path.name}: {', '.join(wrong)} missing, cut off or changed" if wrong else
                           f"{path.name}: the reward log is whole up to step {logged} only")
    return None, passed_over


def adapter_hash(folder: Path) -> str | None:
    """sha256 of a run's final adapter weights, or None if they are not there."""
    return sha256(f"{folder}/{WEIGHTS}")


def prove(folder: Path) -> "tuple[int, pd.DataFrame]":
    """Draw a run's noise again from its params.json: (rows in rewards.parquet, those that do not fit).

    What fits is what `replay_run` accepts. ValueError if params.json is not that of the folder, or the log is not
    that of a run.
    """
    params = Params(**json.loads((folder / "params.json").read_text()))
    if run_id(params) != folder.name:
        raise ValueError(f"{folder.name} holds the params.json of {run_id(params)}: each log has its own parameters")
    log = read_log(folder)
    correct = estimator(params.mitigation, *params.assumed_rates)
    return len(log), replay_run(log, params.channel, params.noise_seed, correct)


def code_note(code: "pd.Series") -> str:
    """A sentence if runs come from different code, else "". code: run_id -> what provenance records as `code`."""
    kinds: dict[tuple, list[str]] = {}
    for name, hashes in code.dropna().astype(str).str.findall(r"\b[0-9a-f]{64}\b").items():
        for pair in sorted(set(zip(hashes[::2], hashes[1::2], strict=True))):
            kinds.setdefault(pair, []).append(name)
    if len(kinds) < 2:
        return ""
    return (f"The runs come from {len(kinds)} versions of 02_train and lib, so they may differ by more than their "
            "parameters: " + "; ".join(
                f"notebook {notebook[:8]}, lib {lib[:8]}: {len(names)} runs, such as {names[0]}"
                for (notebook, lib), names in sorted(kinds.items(), key=lambda kind: -len(kind[1]))) + ".")


def finish(folder: Path, record: dict[str, Any], executed: list[str]):
    """Complete provenance.json with the executed code, the adapter's hash and peak memory, and seal the files.

    DONE is written last of all, when everything else has reached the disk. executed: see `code`.
    """
    record |= {"adapter_hash": adapter_hash(folder), "peak_memory_mb": peak_memory_mb()}
    record["code"][-1]["notebook"] = code(executed)["notebook"]  # it may have been edited while this kernel started
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1) + "\n")
    adapter = [f"adapter/{file.name}" for file in sorted((folder / "adapter").iterdir())]
    seal(folder, "params.json", "provenance.json", "rewards.parquet", "metrics.parquet", *adapter)
    (folder / "FAILED").unlink(missing_ok=True)
    write_atomically(folder / "DONE", record["adapter_hash"] + "\n")
