"""A workspace of its own for the tests that execute notebooks: small data, a quickly built base policy."""

import os
import subprocess
import sys

import psutil
import pytest
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


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with small arithmetic data and a base policy of a few training steps, used by all end-to-end tests."""
    work = tmp_path_factory.mktemp("work")
    papermill(work, "01_data", work / "01.ipynb", source="arithmetic", n_train=900, n_test=60)
    papermill(work, "01b_warm_start", work / "01b.ipynb", right_steps=150, careless_steps=20, samples=2)
    return work
