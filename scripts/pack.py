"""A study in pieces, on machines that do not last: its evaluated runs in one file, and back.

    make pack STUDY=flip PROFILE=smol      evaluated runs, without weights, into one file
    make unpack STUDY=flip PROFILE=smol    the runs of that file into the store

What was trained elsewhere then counts as done: `make unpack`, then the same `make study`.
"""

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runner import dataset, runs, targets  # noqa: E402
from runner.parameters import Params  # noqa: E402

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


def unpack(folder: Path, grid: list[Params]) -> list[Path]:
    """Put the runs of the archive in `folder` into the store; returns folders that were in the way.

    A file that is in the store already stays as it is, and so does a run that is not whole there.
    What is no run of the study is left out.
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
                in_the_way.append(p.folder)
            else:
                add_files(packed, p.folder)
            for name in (p.base_folder.name, f"base-s{p.base_seed}"):  # the second in older archives
                add_files(Path(scratch, "runs", name), p.base_folder)
    return in_the_way


def add_files(source: Path, target: Path):
    """Move the files below `source` that `target` does not have, DONE last of all."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "DONE"):
        there = target / path.relative_to(source)
        if not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, there)


def main() -> int:
    """Pack or unpack a study; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("study", help="name or file of a study in params/studies")
    parser.add_argument("--profile", default="tiny")
    args = parser.parse_args()
    try:
        _, grid = targets.load(args.study, args.profile)
        folder = targets.folder_of(args.study, args.profile)
        if args.what == "pack":
            archive = pack(folder, grid)
            print(f"{dataset.shown(archive)}: {archive.stat().st_size / 2**20:.1f} MB")
            return 0
        for run in unpack(folder, grid):
            print(f"{run.name} is {runs.status(run)} here and was left alone: delete its folder and unpack again")
        done = sum(runs.status(p.folder) == "done" for p in grid)
        print(f"{done} of {len(grid)} runs of {args.study} are done in {dataset.shown(grid[0].folder.parent)}")
        return 0
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
