"""A workspace of its own for the tests that execute notebooks: small data, a quickly built base policy."""

import os
import shutil
import subprocess
import sys

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

from runner import ROOT

settings.register_profile("project", deadline=None)  # a busy machine is not a failure
settings.load_profile("project")


def papermill(work, notebook, out, check=True, **parameters):
    """Execute a notebook of the project with papermill's own command line, in the workspace `work`."""
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(out), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # a kernel would behave otherwise for it
    done = subprocess.run(command, cwd=ROOT, env=env | {"GRPO_NOISE_WORK": str(work)}, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def processes(work):
    """All processes that were started with this workspace in their environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRPO_NOISE_WORK") == str(work) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def build_workspace(work):
    """Make small arithmetic data and a base policy of a few training steps."""
    papermill(work, "01_data", work / "01.ipynb", source="arithmetic", n_train=900, n_test=60)
    papermill(work, "01b_warm_start", work / "01b.ipynb", right_steps=150, careless_steps=20, samples=2)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, worker_id):
    """A folder with data and a base policy, used by all end-to-end tests.

    Of several workers of pytest the first builds it, and each takes a copy of its own.
    """
    work = tmp_path_factory.mktemp("work")
    if worker_id == "master":  # there is one process only
        build_workspace(work)
        return work
    shared = tmp_path_factory.getbasetemp().parent / "workspace"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            build_workspace(work)
            shutil.copytree(work, shared.with_suffix(".part"), dirs_exist_ok=True)
            shared.with_suffix(".part").rename(shared)
            return work
    return shutil.copytree(shared, work, dirs_exist_ok=True)
