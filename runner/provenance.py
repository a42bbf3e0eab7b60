"""Where a run comes from: its code, the versions of packages, and the machine. No user name, host name or path."""

import ast
import json
import os
import platform
import re
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runner import ROOT, engines
from runner.files import digest, sha256


def provenance(**more) -> dict[str, Any]:
    """Commit, versions, machine and whatever the run adds. No user name, host name or path."""
    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "papermill", "math-verify",
                 "numpy", "vllm", "unsloth"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**commit(), "python": platform.python_version(), "versions": versions, "cpu": cpu_name(),
            "cores": os.cpu_count(), "gpu": gpu_name(), **more}


def commit() -> dict[str, Any]:
    """The commit of this code, and whether tracked files differ from it: None where it is not a git checkout.

    On a node of a cluster the code came through Ray, and the sweep says what it was.
    """
    if "GRPO_NOISE_COMMIT" in os.environ:
        return json.loads(os.environ["GRPO_NOISE_COMMIT"])

    def git(*args):
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!outputs")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def cpu_name() -> str:
    """The processor's name."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Name, driver and memory (MiB) of the GPUs, or None without a GPU."""
    return "; ".join(", ".join(gpu) for gpu in engines.gpu_query("name,driver_version,memory.total")) or None


def peak_memory_mb() -> int:
    """The largest resident size of this process so far, in MB (Linux reports kB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 if platform.system() == "Linux" else 1024**2)


def code(executed: list[str] | None = None) -> dict[str, str]:
    """sha256 of the code cells of 02_train and of lib's modules, which tell apart runs from before and after an edit.

    executed: the cells that this kernel executed (IPython's `In`), else those that are on disk. Cells of nothing but
    assignments are left out: parameters are in params.json.
    """
    if executed is None:
        cells = json.loads((ROOT / "notebooks/02_train.ipynb").read_text())["cells"]
        executed = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    cells = [cell.strip() for cell in executed if cell.strip() and not assignments(cell)]
    modules = [*(ROOT / "lib").glob("*.py"), *(ROOT / "runner").glob("*.py")]
    return {"notebook": digest(cells, 64), "lib": digest({f"{p.parent.name}/{p.name}": sha256(p) for p in modules}, 64)}


def assignments(cell: str) -> dict[str, Any]:
    """name -> value if the cell is nothing but `name = literal` lines, else {}."""
    try:
        return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell).body}
    except (AttributeError, SyntaxError, ValueError):
        return {}
