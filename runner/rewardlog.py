"""The reward log of a run: a row a completion, written a step at a time, and whole again after a crash."""

import shutil
from itertools import count
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib.rewards import LOG_SCHEMA
from runner.files import write_atomically


class RewardLog:
    """The log that a run's reward function writes to: one file a step in `folder`."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, table: pa.Table):
        """Write the completions of one generation step."""
        write_step(self.folder, table)


def write_step(folder: Path, table: pa.Table):
    """One generation step as one file, so a kill between steps loses nothing and a repeated step replaces itself."""
    memory = pa.BufferOutputStream()  # one system call instead of thirty small ones
    pq.write_table(table, memory, compression="none", use_dictionary=False, write_statistics=False)
    # not flushed, which would cost more than all the rest: a run does not go on behind a step that cannot be read
    write_atomically(folder / f"step-{table['step'][0].as_py():06d}.parquet", memory.getvalue(), flush=False)


def drop_steps_from(log_folder, step: int):
    """Forget the log of `step` and later: a resumed run does those steps again."""
    for file in Path(log_folder).glob("step-*.parquet"):
        if int(file.stem.split("-")[1]) >= step:
            file.unlink()
    joined = Path(log_folder).parent / "rewards.parquet"
    if step == 0:
        joined.unlink(missing_ok=True)  # not read: it may be the reason to start again
    elif joined.exists():  # the run was killed between joining its log and being done
        log = _read(joined)
        _write_log(joined, log[log.step < step])


def logged_until(run_folder, every: int = 1) -> int:
    """The first of the steps 0, every, 2 every, ... that is not in the log, or only in a file that cannot be read."""
    steps = set()
    for file in (Path(run_folder) / "rewards.parquet", *Path(run_folder).glob("rewards/step-*.parquet")):
        try:
            steps |= set(_read(file).step)
        except (FileNotFoundError, ValueError):
            continue
    return next(step for step in count(0, every) if step not in steps)


def _read(file: Path) -> "pd.DataFrame":
    try:
        return pq.read_table(file).to_pandas()
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise ValueError(f"{file} is damaged and cannot be read ({str(e).split('.')[0]}): start the run again, it "
                         "goes on from the last checkpoint before the damage") from None


def read_log(run_folder) -> "pd.DataFrame":
    """The reward log of a run, finished or not: a row a completion, in the order of steps (columns: LOG_SCHEMA).

    FileNotFoundError if there is none, ValueError if a file of it is damaged.
    """
    import pandas as pd

    whole, parts = Path(run_folder) / "rewards.parquet", sorted(Path(run_folder).glob("rewards/step-*.parquet"))
    if not whole.exists() and not parts:
        raise FileNotFoundError(f"{Path(run_folder).name} has no reward log: it stopped before its first step")
    steps = [_read(p) for p in parts]
    if whole.exists():  # with step files beside it after a kill: a step's own file is the newer one
        joined = _read(whole)
        steps.insert(0, joined[~joined.step.isin({s.step.iloc[0] for s in steps})])
    return pd.concat(steps).sort_values("step", kind="stable", ignore_index=True)


def join_log(run_folder):
    """Join the steps' files into `rewards.parquet` (atomically), then remove them."""
    _write_log(Path(run_folder) / "rewards.parquet", read_log(run_folder))
    if (Path(run_folder) / "rewards").exists():
        shutil.rmtree(Path(run_folder) / "rewards")


def _write_log(path: Path, log: "pd.DataFrame"):
    memory = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(log, LOG_SCHEMA, preserve_index=False), memory)
    write_atomically(path, memory.getvalue())
