"""What tests that execute notebooks share: a workspace with a base policy, a finished run, and few kernels.

A kernel spends about ten seconds on its imports before it does anything.
"""

import os
import shutil
import subprocess
import sys

import nbformat
import psutil
import pytest
from filelock import FileLock
from hypothesis import settings
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from runner import ROOT

settings.register_profile("project", deadline=None)  # a busy machine is not a failure
settings.load_profile("project")


# Files with the most work, in this order: pytest begins with them, so that two workers end at about the same time.
# The first of them builds the workspace, which the second does not need.
FIRST = ("test_end_to_end.py", "test_analysis.py", "test_server.py", "test_answers.py", "test_gradient_notebook.py",
         "test_hub.py", "test_checkers.py", "test_withheld.py", "test_hostile.py", "test_faults.py")

TEN_STEPS = dict(max_steps=10, save_steps=2, eval_interval=0, label_flip_rate=0.3)


def pytest_collection_modifyitems(items):
    """Put the files of FIRST first."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def papermill(work, notebook, out, check=True, **parameters):
    """Execute a notebook of the project with papermill's own command line, in the workspace `work`."""
    given = [x for name, value in parameters.items() for x in ("-p", name, str(value))]
    return _papermill(work, f"notebooks/{notebook}.ipynb", out, given, check)


def _papermill(work, notebook, out, given=(), check=True):
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", *given]
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # a kernel would behave otherwise for it
    done = subprocess.run(command, cwd=ROOT, env=env | {"GRPO_NOISE_WORK": str(work)}, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def train_in_one_kernel(work, out, *runs):
    """Execute 02_train with each of these parameters, one after the other; returns what each of them shows, as JSON.

    That is as good as a kernel each: a run seeds everything that it draws from, and Python's imports are made once.
    """
    copies = [load_notebook_node(str(ROOT / "notebooks/02_train.ipynb")) for _ in runs]
    blocks = [parameterize_notebook(notebook, given).cells for notebook, given in zip(copies, runs, strict=True)]
    for number, block in enumerate(blocks):
        for cell in block:
            cell.id = f"{cell.id}-{number}"  # no two cells of a notebook have the same
    source = out.with_suffix(".source.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=sum(blocks, []), metadata=copies[0].metadata), source)
    _papermill(work, source, out)
    executed = nbformat.read(out, 4).cells
    for cell in executed:
        cell.id = cell.id.rpartition("-")[0]
    parts = [[executed.pop(0) for _ in block] for block in blocks]
    return [nbformat.writes(nbformat.v4.new_notebook(cells=part)) for part in parts]


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


def built_once(tmp_path_factory, worker_id, name, build):
    """A folder that `build(folder)` fills: of several workers of pytest the first, and each gets a copy of its own."""
    own = tmp_path_factory.mktemp(name)
    if worker_id == "master":  # there is one process only
        build(own)
        return own
    common = tmp_path_factory.getbasetemp().parent / name
    with FileLock(f"{common}.lock"):
        if not common.exists():
            build(own)
            shutil.copytree(own, common.with_suffix(".part"), dirs_exist_ok=True)
            common.with_suffix(".part").rename(common)
            return own
    return shutil.copytree(common, own, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, worker_id):
    """A folder with data and a base policy, used by all end-to-end tests."""
    return built_once(tmp_path_factory, worker_id, "workspace", build_workspace)


@pytest.fixture(scope="session")
def ten_steps(workspace, tmp_path_factory, worker_id):
    """The folder of a finished run of TEN_STEPS that was left alone, outside of the store.

    It has checkpoints at steps 8 and 10. Nobody changes it: break a copy.
    """
    def train(folder):
        papermill(workspace, "02_train", folder / "notebook.ipynb", output_dir="apart", **TEN_STEPS)
        shutil.move(workspace / "apart/runs", folder / "runs")

    (run,) = (built_once(tmp_path_factory, worker_id, "ten-steps", train) / "runs").iterdir()
    return run
