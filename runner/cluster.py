"""One run as a task of Ray, on this machine or on a node of a cluster, with or without a common file system.

A node that sees the marker of the sweep below its workspace works in the study's folder itself. Any other node is sent
the inputs and what there is of the run, works in a scratch folder, and sends the run's folder back. Archives go through
Ray's object store in chunks, so that neither side holds a large file in memory.

A node's workspace is the GRPO_NOISE_WORK that Ray was started with there, else the sweep's own path.
"""

import os
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from runner import BUILT_HERE, ROOT, WORK, dataset, engines, files, parameters, runs

CHUNK = 16 * 2**20  # bytes of an archive that a process holds at once
NO_RETRY = ("ValueError", "FileNotFoundError")  # the same parameters would fail in the same way
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def execute(params: dict, gpu_share: float = 0, site: dict | None = None) -> dict:
    """Execute one run: a dict of "status" ("done", "failed" or "send"), "message", "retry", "clean" and "files".

    `site` says where the sweep is (None: in this process's own workspace): "work" and "marker" are its workspace and a
    file in it, "inputs" the hash of the inputs, "parcel" None or their references and those of the run's folder.
    "send" asks for a parcel: nothing was executed. "files" are references to the run's folder if it is on this node
    only, "clean" is the mean true reward over the last tenth of the steps.
    """
    if site is None:
        return _papermill(params, parameters.Params(**params).folder, gpu_share)
    work, shared = workspace(site)
    folder = work / params["output_dir"] / "runs" / parameters.run_id(parameters.Params(**params))
    os.environ["GRPO_NOISE_WORK"] = str(work)  # for the kernel
    if shared:
        return _papermill(params, folder, gpu_share)
    if site["parcel"] is None:
        return {"status": "send"}
    inputs, begun = site["parcel"]
    if not work.exists():
        unpack(inputs, work)
    if begun and not folder.exists():  # else an earlier try on this node was cut off: go on from there
        unpack(begun, folder)
    result = _papermill(params, folder, gpu_share)
    result["files"] = pack({folder: "."}, skip=("checkpoints",) if result["status"] == "done" else ())
    shutil.rmtree(folder)
    return result


def _papermill(params: dict, folder: Path, gpu_share: float) -> dict:
    """Execute 02_train into `folder`."""
    os.environ |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "GRPO_NOISE_GPU_SHARE": str(gpu_share or 1)}
    if not gpu_share:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run without a part of a GPU leaves it alone
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(str(ROOT / "notebooks/02_train.ipynb"), str(folder / "notebook.ipynb"), params,
                                   kernel_name="python3", progress_bar=False, cwd=str(ROOT))
        import pandas as pd  # not before: the run is to begin

        clean = pd.read_parquet(folder / "metrics.parquet", columns=["clean_mean"]).clean_mean.dropna()
        return {"status": "done", "clean": float(clean.tail(max(1, len(clean) // 10)).mean())}
    except PapermillExecutionError as e:
        message, retry = f"{e.ename}: {e.evalue}", e.ename not in NO_RETRY
    except Exception as e:  # the kernel died, the disk is full, ...: this run failed, the others go on
        message, retry = f"{type(e).__name__}: {e}", True
    if any(words in message for words in engines.OUT_OF_MEMORY):
        message, retry = f"{message.splitlines()[0][:200]} ... {engines.ADVICE}", False
    if any(words in message for words in DISK_FULL):
        message, retry = (f"{message.splitlines()[0][:200]}, in {dataset.shown(folder)}. Make room and start again: "
                          "the run goes on from its last checkpoint"), False
    with suppress(OSError):  # there may be no room for this either
        files.write_atomically(folder / "FAILED", message + "\n")
    return {"status": "failed", "message": message, "retry": retry}


def workspace(site: dict) -> tuple[Path, bool]:
    """Where this node works for a sweep, and whether that is the sweep's own workspace.

    A scratch folder is named after the hash of the inputs: two sweeps with different data never meet in one.
    """
    own = WORK if WORK != ROOT else Path(site["work"])
    marker = own / site["marker"]
    if marker.parent.is_dir() and marker.name in os.listdir(marker.parent):  # NFS may remember that a file is not there
        return own, True
    scratch = WORK if WORK != ROOT else Path(tempfile.gettempdir()) / f"grpo-noise-{os.getuid()}"
    return scratch / site["inputs"], False


def input_folders(grid: list[parameters.Params]) -> dict[Path, str]:
    """Folders of the workspace that the runs read, with their names there.

    Data or a model given by an absolute path are not sent: a node has them in the same place, or the run says so.
    """
    names = {dataset.data_folder(p.data_dir) for p in grid if not Path(p.data_dir).expanduser().is_absolute()}
    names |= {WORK / f"models/{p.model}-s{p.base_seed}" for p in grid if p.model in BUILT_HERE}
    return {folder: folder.relative_to(WORK).as_posix() for folder in sorted(names)}


def pack(folders: dict[Path, str], skip: tuple[str, ...] = ()) -> list:
    """References to the chunks of a tar archive of `folders` under the given names, without entries called `skip`."""
    import ray

    def wanted(entry):
        return None if entry.name.split("/")[-1] in (".lock", *skip) else entry

    with tempfile.TemporaryFile(dir=next(iter(folders)).parent) as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as archive:
            for folder, name in folders.items():
                archive.add(folder, name, filter=wanted)
        file.seek(0)
        return [ray.put(chunk) for chunk in iter(lambda: file.read(CHUNK), b"")]


def unpack(chunks: list, target: Path):
    """Fetch and unpack an archive: `target` appears whole or not at all, and stays as it is if it is there by then."""
    import ray

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    with tempfile.TemporaryFile(dir=target.parent) as file:
        for chunk in chunks:
            file.write(ray.get(chunk))
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(part, filter="data")
    try:
        os.rename(part, target)
    except OSError:
        shutil.rmtree(part)
        if not target.exists():
            raise


def receive(chunks: list, folder: Path):
    """Put a run's folder that a node sent into the study. A run that is done by then stays as it is.

    RuntimeError if the folder says DONE and its adapter is not the one that the run recorded.
    """
    came = folder.with_name(f"{folder.name}.{os.getpid()}.came")
    shutil.rmtree(came, ignore_errors=True)
    unpack(chunks, came)
    done = came / "DONE"
    if done.exists() and done.read_text().strip() != runs.adapter_hash(came):
        raise RuntimeError(f"the folder of {folder.name} was damaged on its way from a node")
    if runs.status(folder) != "done":
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(came, folder)
    shutil.rmtree(came, ignore_errors=True)
