"""A study in pieces, on machines that do not last: its evaluated runs in one file that git can hold, and back again.

What was trained elsewhere then counts as done: `make unpack`, then the same `make study`.
"""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from runner import dataset, runs
from runner.parameters import Params

ARCHIVE = "runs.tar.xz"


def pack(folder: Path, grid: list[Params]) -> Path:
    """Write the evaluated runs of a study, without weights, and the base's answers into `folder`.

    ValueError if no run of the study has been evaluated here.
    """
    evaluated = {p.folder for p in grid if any(p.folder.glob("eval-*.parquet"))}
    if not evaluated:
        raise ValueError(f"{folder.name} has no evaluated run to pack: do the study first")
    bases = {p.base_folder for p in grid if p.base_folder.exists()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:xz") as archive:
        for source in sorted(evaluated | bases):
            archive.add(source, f"runs/{source.name}", filter=without_weights)
    os.replace(part, folder / ARCHIVE)
    return folder / ARCHIVE


def without_weights(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out weights, checkpoints and hidden files, and who owned the others."""
    name = entry.name.rsplit("/", 1)[-1]
    if name == "checkpoints" or name.startswith(".") or name.endswith(".safetensors"):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def unpack(folder: Path, grid: list[Params]) -> list[str]:
    """Put the runs of the archive in `folder` into the store; returns the names of those that could not be put there.

    A file that is in the store already stays as it is, and so does a run that is not whole there. What is no run of
    the study is left out.
    """
    file = folder / ARCHIVE
    if not file.exists():
        raise FileNotFoundError(f"there is no {dataset.shown(file)} to unpack")
    store = grid[0].folder.parent
    store.mkdir(parents=True, exist_ok=True)
    in_the_way = []
    with tempfile.TemporaryDirectory(dir=store, prefix=".unpack-") as scratch:
        with tarfile.open(file) as archive:
            archive.extractall(scratch, filter="data")
        for p in grid:
            packed = Path(scratch, "runs", p.folder.name)
            if packed.exists() and runs.status(p.folder) not in ("done", "missing"):
                in_the_way.append(p.folder.name)
            else:
                add_files(packed, p.folder)
            for name in (p.base_folder.name, f"base-s{p.base_seed}"):  # the second in older archives
                add_files(Path(scratch, "runs", name), p.base_folder)
    return in_the_way


def add_files(source: Path, target: Path):
    """Move the files below `source` that `target` does not have, DONE last of all."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == "DONE")
    for path in files:
        there = target / path.relative_to(source)
        if not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, there)
