"""One run as a task of Ray: papermill executes 02_train into the folder of the run.

Two sweeps may reach for the same run. The task that locks `.task` in the run's folder has it; the
other one says so, and its sweep looks again later. The system frees the lock when the process of
the task ends, however it ends.
"""

import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from runner import ROOT, WORK, dataset, engines, files, parameters, runs

LOCK = ".task"
NO_RETRY = ("ValueError", "FileNotFoundError")  # the same parameters would fail in the same way
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def execute(params: dict, gpu_share: float = 0, marker: str | None = None,
            servers: dict[str, list[dict]] | None = None, place: int = 0) -> dict:
    """Execute one run; returns its "status", and what there is to say about it.

    done, failed (with "message", and whether to "retry"), elsewhere (another process has the run)
    or refused (with "message": the sweep cannot use this node).
    marker: a file in the sweep's workspace. A node that does not see it shares no file system.
    servers: the sweep's rollout servers, by the id of their node.
    place: of the run in its grid. It spreads runs over the servers of a GPU.
    """
    if marker and not is_seen(Path(marker)):
        return {"status": "refused", "message": (
            f"node {socket.gethostname()} does not see {WORK}: the nodes of a cluster must share "
            "the file system of the workspace. Where they do not, each does a study of its own, "
            "and make pack and make unpack bring the runs together")}

    folder = parameters.Params(**params).folder
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) as is_ours:
        status = runs.status(folder)
        if not is_ours or status == "running":  # running without a task: in somebody's notebook
            return {"status": "elsewhere"}
        if status != "done":
            prepare_kernel(gpu_share, servers, place)
        failure = None if status == "done" else train(params, folder)
    return failure or {"status": "done"}


def is_seen(marker: Path) -> bool:
    """Whether a file is there. Its folder is read, since NFS may remember that a file was not."""
    return marker.parent.is_dir() and marker.name in os.listdir(marker.parent)


@contextmanager
def lock(folder: Path, kind: int = fcntl.LOCK_EX):
    """Take the task's lock of a run; yields False if another process has it."""
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_taken(folder: Path) -> bool:
    """Whether the task of some sweep has this run."""
    if not (folder / LOCK).exists():
        return False
    with lock(folder, fcntl.LOCK_SH) as is_free:
        return not is_free


def prepare_kernel(gpu_share: float, servers: dict[str, list[dict]] | None, place: int):
    """Set what the run's kernel reads: its part of a GPU, and the rollout server that it asks."""
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if servers:
        server = server_for(place, servers)
        os.environ[engines.ROLLOUT_URL] = server["url"]
        os.environ[engines.ROLLOUT_KEY] = server["key"]
        if server["gpu"] in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","):
            gpu_share *= 1 - engines.SERVER_MEMORY  # the rest is the server's
    os.environ["GRPO_NOISE_GPU_SHARE"] = str(gpu_share or 1)
    if not gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run without a part of a GPU leaves it alone


def server_for(place: int, servers: dict[str, list[dict]]) -> dict:
    """A server on the run's own GPU, else one of its node. Neighbours in the grid take turns."""
    import ray

    here = servers[ray.get_runtime_context().get_node_id()]
    own_gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    beside = [server for server in here if server["gpu"] and server["gpu"] == own_gpu]
    choice = beside or here
    return choice[place % len(choice)]


def train(params: dict, folder: Path) -> dict | None:
    """Execute 02_train into `folder`; returns what `execute` does if that failed."""
    import papermill

    try:
        papermill.execute_notebook(
            str(ROOT / "notebooks/02_train.ipynb"), str(folder / "notebook.ipynb"), params,
            kernel_name="python3", progress_bar=False, cwd=str(ROOT))
        return None
    except Exception as e:  # the notebook, its kernel, the disk: this run failed, the others go on
        failure = explain(e, folder)
    with suppress(OSError):  # there may be no room for this either
        files.write_atomically(folder / "FAILED", failure["message"] + "\n")
    return {"status": "failed", **failure}


def explain(error: Exception, folder: Path) -> dict:
    """The "message" of a failure, with a remedy where one is known, and whether to "retry"."""
    name = getattr(error, "ename", type(error).__name__)  # papermill: what the notebook raised
    message = f"{name}: {getattr(error, 'evalue', error)}"
    beginning = message.splitlines()[0][:200]
    if any(words in message for words in engines.OUT_OF_MEMORY):
        return {"message": f"{beginning} ... {engines.ADVICE}", "retry": False}
    if any(words in message for words in DISK_FULL):
        return {"retry": False, "message": (
            f"{beginning}, in {dataset.shown(folder)}. Make room and start again: the run goes on "
            "from its last checkpoint")}
    return {"message": message, "retry": name not in NO_RETRY}
