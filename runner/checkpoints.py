"""The checkpoints of a run: which are kept, and from which a run can go on exactly."""

import shutil
from pathlib import Path

from runner.files import SUMS, seal, unsealed
from runner.rewardlog import logged_until


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest step first. Not by their times: a clock can be wrong."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def keep_checkpoint(folder: Path, step: int, keep: int = 2):
    """Seal the checkpoint that was just written, and delete all but the newest `keep`.

    Not left to the trainer, which takes the oldest by modification time: after a clock was set
    back, that is the newest.
    """
    path = folder / f"checkpoints/checkpoint-{step}"
    seal(path, *sorted(file.name for file in path.iterdir() if file.name != SUMS))
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def last_checkpoint(folder: Path, every: int) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed exactly, or None; and why newer ones cannot.

    It must be as it was sealed, at a multiple of `every` steps, and the reward log must be whole up
    to it. every: optimiser steps on one batch of rollouts (num_iterations), because TRL makes its
    rollouts anew when it resumes.
    """
    logged = logged_until(folder, every)
    passed_over = []
    for path in checkpoints(folder):
        if step_of(path) % every:  # the last one of a run may lie between two batches
            continue
        obstacle = _obstacle(path, logged)
        if obstacle is None:
            return path, passed_over
        passed_over.append(f"{path.name}: {obstacle}")
    return None, passed_over


def _obstacle(checkpoint: Path, logged: int) -> str | None:
    """Why a run cannot go on from this checkpoint, or None. logged: steps that have a log."""
    wrong = unsealed(checkpoint)
    if wrong:
        return f"{', '.join(wrong)} missing, cut off or changed"
    if step_of(checkpoint) > logged:
        return f"the reward log is whole up to step {logged} only"
    return None
