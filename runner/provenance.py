"""Where a run comes from: its code, the versions of packages, and the machine.

Nothing here records a user name, a host name or a path.
"""

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

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "ray", "papermill",
            "math-verify", "numpy", "vllm", "unsloth")

# The modules that decide what a run computes: 02_train imports them, directly or through others.
# Not among them: figures (plots), statistics of finished runs (stats, theory, audit, report), what
# is said of a run (progress, results), and what starts runs (sweep, __main__). A test derives this
# list again from the imports.
DECISIVE = (
    "lib/_worker.py", "lib/answers.py", "lib/noise.py", "lib/rewards.py",
    "runner/__init__.py", "runner/checkpoints.py", "runner/dataset.py", "runner/engines.py",
    "runner/execution.py", "runner/files.py", "runner/hub.py", "runner/model_files.py",
    "runner/parameters.py", "runner/parts.py", "runner/policies.py", "runner/problems.py",
    "runner/provenance.py", "runner/reading.py", "runner/rewardlog.py", "runner/rollouts.py",
    "runner/runs.py", "runner/server.py", "runner/trainer.py",
)


def provenance(**more) -> dict[str, Any]:
    """Commit, versions, machine, and whatever the run adds."""
    return {**commit(), "python": platform.python_version(), "versions": versions(),
            "cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu_name(), **more}


def versions() -> dict[str, str]:
    """The versions of those PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of this code, and whether tracked files differ from it; None without git.

    On a node of a cluster the code came through Ray, and the sweep says what it was.
    """
    if "GRPO_NOISE_COMMIT" in os.environ:
        return json.loads(os.environ["GRPO_NOISE_COMMIT"])
    head = _git("rev-parse", "HEAD")
    if not head:
        return {"git_commit": None, "git_dirty": None}
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!outputs")
    return {"git_commit": head, "git_dirty": bool(changed)}


def _git(*args: str) -> str:
    """What git says; nothing if this is no checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's name."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Name, driver and memory (MiB) of the GPUs, or None without a GPU."""
    gpus = engines.gpu_query("name,driver_version,memory.total")
    return "; ".join(", ".join(gpu) for gpu in gpus) or None


def peak_memory_mb() -> int:
    """The largest resident size of this process so far, in MB (Linux reports kB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 if platform.system() == "Linux" else 1024**2)


def code(executed: list[str]) -> dict[str, str]:
    """sha256 of the cells that led to a training and of the DECISIVE modules: the code of a run.

    executed: these cells (IPython's `In` when the training begins), not the file, which may have
    been edited meanwhile. Cells of nothing but assignments are left out: they are in params.json.
    """
    stripped = [cell.strip() for cell in executed]
    cells = [cell for cell in stripped if cell and not assignments(cell)]
    modules = {name: sha256(ROOT / name) for name in DECISIVE}
    return {"notebook": digest(cells, 64), "modules": digest(modules, 64)}


def assignments(cell: str) -> dict[str, Any]:
    """name -> value if the cell is nothing but `name = literal` lines, else {}."""
    try:
        return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell).body}
    except (AttributeError, SyntaxError, ValueError):
        return {}
