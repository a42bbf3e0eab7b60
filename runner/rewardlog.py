"""The reward log of a run: a row a completion, a file a step, and whole again after a crash."""

import shutil
from itertools import count
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib.rewards import log_schema
from runner.files import write_atomically


class RewardLog:
    """The log that a run's reward function writes to: one file a generation step in `folder`.

    A kill between two steps loses nothing, and a repeated step replaces itself.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, table: pa.Table):
        """Write the completions of one step. They may not have reached the disk when it returns.

        Waiting for the disk would cost more than all the rest. It is not needed: a resumed run
        does not go on behind a step that cannot be read.
        """
        memory = pa.BufferOutputStream()  # one system call instead of thirty small ones
        pq.write_table(table, memory, compression="none", use_dictionary=False,
                       write_statistics=False)
        name = f"step-{table['step'][0].as_py():06d}.parquet"
        write_atomically(self.folder / name, memory.getvalue(), flush=False)


def step_files(run_folder: Path | str) -> list[Path]:
    """The files of single steps in a run's folder, in the order of steps."""
    return sorted(Path(run_folder).glob("rewards/step-*.parquet"))


def drop_steps_from(run_folder: Path | str, step: int):
    """Forget the log of `step` and later: a resumed run does those steps again."""
    for file in step_files(run_folder):
        if int(file.stem.removeprefix("step-")) >= step:
            file.unlink()
    joined = Path(run_folder) / "rewards.parquet"
    if step == 0:
        joined.unlink(missing_ok=True)  # not read: it may be the reason to start again
    elif joined.exists():  # the run was killed between joining its log and being done
        log = _read_table(joined)
        _write_joined(joined, log[log["step"] < step])


def logged_until(run_folder: Path | str, every: int = 1) -> int:
    """The first of the steps 0, every, 2 every, ... of which the log has no readable row."""
    steps = set()
    for file in (Path(run_folder) / "rewards.parquet", *step_files(run_folder)):
        try:
            steps |= set(_read_table(file)["step"])
        except (FileNotFoundError, ValueError):
            continue
    return next(step for step in count(0, every) if step not in steps)


def read_log(run_folder: Path | str) -> pd.DataFrame:
    """The reward log of a run, finished or not: a row a completion, in the order of steps.

    Columns: see `lib.rewards.log_schema`. FileNotFoundError if there is none, ValueError if a file
    is damaged.
    """
    joined, parts = Path(run_folder) / "rewards.parquet", step_files(run_folder)
    if not joined.exists() and not parts:
        raise FileNotFoundError(f"{Path(run_folder).name} has no reward log: it stopped before its "
                                "first step")
    steps = [_read_table(part) for part in parts]
    if joined.exists():
        log = _read_table(joined)
        newer = {table["step"].iloc[0] for table in steps}  # left by a kill: a step's own file wins
        steps.insert(0, log[~log["step"].isin(newer)])
    return pd.concat(steps).sort_values("step", kind="stable", ignore_index=True)


def rewards_differed(run_folder: Path | str) -> bool:
    """Whether any group was given two different rewards. If none was, nothing could be learned.

    TRL's frac_reward_zero_std does not tell: a group with one reward left counts as not silent.
    """
    groups = read_log(run_folder).groupby(["step", "sample_id"])["returned"]
    return bool((groups.nunique() > 1).any())


def join_log(run_folder: Path | str):
    """Join the steps' files into `rewards.parquet` (atomically), then remove them."""
    _write_joined(Path(run_folder) / "rewards.parquet", read_log(run_folder))
    shutil.rmtree(Path(run_folder) / "rewards", ignore_errors=True)


def _read_table(file: Path) -> pd.DataFrame:
    try:
        return pq.read_table(file).to_pandas()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as e:
        reason = str(e).split(".")[0]
        raise ValueError(f"{file} is damaged and cannot be read ({reason}): start the run again, "
                         "it goes on from the last checkpoint before the damage") from None


def _write_joined(path: Path, log: pd.DataFrame):
    memory = pa.BufferOutputStream()
    table = pa.Table.from_pandas(log, log_schema(log.columns), preserve_index=False)
    pq.write_table(table, memory)
    write_atomically(path, memory.getvalue())
