"""Small files that are whole or not there, and sums that tell whether they are what they were."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"  # in each checkpoint and finished run: what its files were when they were whole


def write_atomically(path: Path, content: str | bytes, flush: bool = True):
    """Write a small file so that a reader sees the old one or the new one, never half of it.

    flush: wait for the disk. Without, a crash of the machine (not of the process) can leave an
    empty file. OSError names the file, also where the system does not, such as on a full disk.
    """
    if isinstance(content, str):
        content = content.encode()
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        advice = "mend that and start again: a run goes on from its last checkpoint"
        raise OSError(e.errno, f"{e.strerror} ({advice})", str(path)) from None


def seal(folder: Path, *names: str):
    """Write SHA256SUMS of files in `folder`, as `sha256sum -c` reads it, once they are on disk."""
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    write_atomically(folder / SUMS, "".join(lines))


def unsealed(folder: Path) -> list[str]:
    """Names of files that are not as `seal` found them, or SHA256SUMS if it is missing or empty."""
    try:
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    if not lines:
        return [SUMS]
    changed = []
    for line in lines:
        expected, _, name = line.partition("  ")
        if not name:  # the line is cut off
            changed.append(SUMS)
        elif sha256(f"{folder}/{name}") != expected:
            changed.append(name)
    return changed


def sha256(path: Path | str) -> str | None:
    """sha256 of a file, or None if it is not there. A process reads each content only once."""
    try:
        about = os.stat(path)
        return _sha256_of(path, about.st_ino, about.st_mtime_ns, about.st_size)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


@cache
def _sha256_of(path: Path | str, *_) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_json(path: Path | str) -> dict | None:
    """The mapping in a file, or None if there is no such file or it is damaged."""
    try:
        values = json.loads(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def digest(values: Any, length: int = 8) -> str:
    """First hex digits of the sha256 of JSON-serialisable values, independent of key order."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
