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
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from runner import ROOT

settings.register_profile("project", deadline=None)  # a busy machine is not a failure
settings.load_profile("project")


# Files with the most work, in this order: pytest begins with them, so that two workers end at about the same time.
# The first of them builds the workspace, which the second does not need.
FIRST = ("test_end_to_end.py", "test_analysis.py", "test_server.py", "test_answers.py", "test_hub.py",
         "test_gradient_notebook.py", "statistics.ipynb", "test_sweep.py", "test_theory.py", "test_stats.py",
         "test_dataset.py", "test_trainer.py", "test_hostile.py", "test_checkers.py", "test_withheld.py",
         "answers.ipynb", "theory.ipynb")

TEN_STEPS = dict(max_steps=10, save_steps=2, eval_interval=0, label_flip_rate=0.3)


def pytest_collection_modifyitems(items):
    """Put the files of FIRST first."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def outside_of_tests(work):
    """The environment of a process in the workspace `work`. A kernel that knew of a test would behave otherwise."""
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"GRPO_NOISE_WORK": str(work)}


def papermill(work, notebook, out, check=True, **parameters):
    """Execute a notebook of the project with papermill's own command line, in the workspace `work`."""
    given = [x for name, value in parameters.items() for x in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(out), "--no-progress-bar", *given]
    done = subprocess.run(command, cwd=ROOT, env=outside_of_tests(work), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


class Kernel:
    """A kernel in a workspace that executes notebooks one after the other, and imports torch and TRL once.

    That is as good as a kernel each: names are forgotten before each notebook, and a run seeds everything that it
    draws from. Where a process of its own is the point, use `papermill`.
    """

    def __init__(self, work):
        self.work = work
        self.client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3", timeout=None,
                                     shutdown_kernel="immediate")

    def execute(self, notebook, out, environment=None, **parameters):
        """Execute a notebook of the project, write it to `out`, and return it as JSON.

        environment: variables that the kernel has from now on.
        """
        source = load_notebook_node(str(ROOT / f"notebooks/{notebook}.ipynb"))
        executed = parameterize_notebook(source, parameters)
        begin = f"get_ipython().reset()\nimport os; os.environ.update({environment or {}})"
        executed.cells.insert(0, nbformat.v4.new_code_cell(begin))
        self.client.nb = executed
        try:
            self.client.execute(cleanup_kc=False, cwd=str(ROOT), env=outside_of_tests(self.work))
        finally:
            del executed.cells[0]
            nbformat.write(executed, out)
        return nbformat.writes(executed)

    def stop(self):
        """End the process, if there is one."""
        if self.client.km is not None:
            self.client.nb = nbformat.v4.new_notebook()
            self.client.execute()  # which cleans up unless it is told not to


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


def build_workspace(kernel):
    """Make small arithmetic data and a base policy of a few training steps.

    Batches of 16 leave it as good as those of 128 do: 5 % of its answers are right, and three problems in ten have
    right and wrong ones.
    """
    kernel.execute("01_data", kernel.work / "01.ipynb", source="arithmetic", n_train=900, n_test=60)
    kernel.execute("01b_warm_start", kernel.work / "01b.ipynb", right_steps=150, careless_steps=20, batch_size=16,
                   samples=2)


def built_once(own, tmp_path_factory, worker_id, build):
    """Fill the folder `own`: of several workers of pytest the first calls `build()`, and the others copy."""
    if worker_id == "master":  # there is one process only
        build()
        return own
    common = tmp_path_factory.getbasetemp().parent / own.name
    with FileLock(f"{common}.lock"):
        if not common.exists():
            build()
            shutil.copytree(own, common.with_suffix(".part"), dirs_exist_ok=True)
            common.with_suffix(".part").rename(common)
            return own
    return shutil.copytree(common, own, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """The kernel of the workspace; it starts with the first notebook."""
    started = Kernel(tmp_path_factory.mktemp("workspace"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def workspace(kernel, tmp_path_factory, worker_id):
    """A folder with data and a base policy, used by all end-to-end tests."""
    return built_once(kernel.work, tmp_path_factory, worker_id, lambda: build_workspace(kernel))


@pytest.fixture(scope="session")
def ten_steps(kernel, workspace, tmp_path_factory, worker_id):
    """The folder of a finished run of TEN_STEPS that was left alone, outside of the store.

    It has checkpoints at steps 8 and 10. Nobody changes it: break a copy.
    """
    folder = tmp_path_factory.mktemp("ten-steps")

    def train():
        kernel.execute("02_train", folder / "notebook.ipynb", output_dir="apart", **TEN_STEPS)
        shutil.move(workspace / "apart/runs", folder / "runs")

    (run,) = (built_once(folder, tmp_path_factory, worker_id, train) / "runs").iterdir()
    return run
