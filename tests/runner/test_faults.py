"""What can go wrong around a run, caused for real: afterwards its weights and its log are those of a run left alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from conftest import TEN_STEPS as SETTINGS
from conftest import papermill

from runner import ROOT, checkpoints, files, parameters, provenance, rewardlog, runs

NOT_COMPARED = ("seconds/", "train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time",
                "train_loss")  # durations, and a mean that the trainer takes over the steps since it was started


@pytest.fixture(scope="module")
def whole(ten_steps):
    """The folder of a finished run that was left alone, apart from the store; checkpoints at steps 8 and 10."""
    return ten_steps


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run that may be broken."""
    return shutil.copytree(whole, tmp_path / whole.name)


@pytest.fixture
def half(copy):
    """The same run as a kill after step 9 leaves it: a checkpoint at step 8, a file a step, nothing final."""
    log = rewardlog.read_log(copy)
    for step, rows in log.groupby("step"):
        (copy / "rewards").mkdir(exist_ok=True)
        if step < 9:
            rows.to_parquet(copy / f"rewards/step-{step:06d}.parquet")
    for name in ("DONE", "SHA256SUMS", "rewards.parquet", "metrics.parquet"):
        (copy / name).unlink()
    for name in ("adapter", "checkpoints/checkpoint-10"):
        shutil.rmtree(copy / name)
    return copy


@pytest.fixture
def begin(whole):
    """`runs.begin` with the parameters, policy and data of the reference."""
    identity = {name: record(whole)[name] for name in ("policy_hash", "data_hash")}
    same = parameters.resolve("tiny", **SETTINGS)
    return lambda folder, params=same: runs.begin(folder, params, [], **identity)


def truncate(path: Path):
    """The first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
    """What is left of a file that had not reached the disk when the machine stopped."""
    os.truncate(path, 0)


def zeros(path: Path):
    """The same on other file systems: the right length, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


def same(folder, whole):
    """Assert that a run ended as the reference did: weights, log, and metrics."""
    assert runs.status(folder) == "done"
    assert runs.adapter_hash(folder) == runs.adapter_hash(whole)
    pd.testing.assert_frame_equal(rewardlog.read_log(folder), rewardlog.read_log(whole))
    metrics = [pd.read_parquet(f / "metrics.parquet") for f in (folder, whole)]
    compared = [m.loc[:, sorted(c for c in m if not c.startswith(NOT_COMPARED))] for m in metrics]
    pd.testing.assert_frame_equal(*compared)
    assert runs.prove(folder)[1].empty and not (folder / "rewards").exists()


def record(folder):
    """provenance.json."""
    return json.loads((folder / "provenance.json").read_text())


# --- damaged files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [truncate, empty, zeros, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth",
                                  "scheduler.pt", "SHA256SUMS"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over(copy, name, harm, begin):
    harm(copy / "checkpoints/checkpoint-10" / name)
    (copy / "DONE").unlink()
    started, checkpoint = begin(copy)
    assert checkpoint.name == "checkpoint-8" and started["resumed_from"] == [8]
    assert [name in text and "checkpoint-10" in text for text in started["mended"]] == [True]
    assert not (copy / "checkpoints/checkpoint-10").exists()  # its files would be mixed with those written anew
    assert rewardlog.read_log(copy).step.max() == 7


def test_without_a_whole_checkpoint_a_run_starts_again(copy, begin):
    (copy / "DONE").unlink()
    for path in (copy / "checkpoints").glob("checkpoint-*/optimizer.pt"):
        truncate(path)
    started, checkpoint = begin(copy)
    assert checkpoint is None and started["resumed_from"] == [] and len(started["mended"]) == 2
    with pytest.raises(FileNotFoundError, match="no reward log"):
        rewardlog.read_log(copy)


@pytest.mark.parametrize("harm", [truncate, empty, zeros, Path.unlink])
@pytest.mark.parametrize("step, goes_on_from", [(3, None), (7, None), (8, 8)])
def test_a_run_does_not_go_on_behind_a_step_that_its_log_lacks(half, harm, step, goes_on_from, begin):
    harm(half / f"rewards/step-{step:06d}.parquet")
    started, checkpoint = begin(half)
    assert (checkpoint and checkpoints.step_of(checkpoint)) == goes_on_from
    assert goes_on_from or f"the reward log is whole up to step {step} only" in started["mended"][0]


def test_a_damaged_step_names_its_file_and_what_to_do(half):
    truncate(half / "rewards/step-000005.parquet")
    with pytest.raises(ValueError, match=f"{half.name}/rewards/step-000005.parquet is damaged.*start the run again"):
        rewardlog.read_log(half)


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["rewards.parquet", "metrics.parquet", "adapter/adapter_model.safetensors",
                                  "adapter/adapter_config.json", "params.json", "provenance.json"])
def test_a_damaged_finished_run_is_not_counted_as_done(copy, name, harm, begin):
    assert runs.status(copy) == "done"
    harm(copy / name)
    assert runs.status(copy) == "damaged" and name in runs.damage(copy)
    started, checkpoint = begin(copy)
    assert f"it was done, but {name}" in started["mended"][0]
    whole_log = name not in ("rewards.parquet", "provenance.json")
    assert (checkpoint.name == "checkpoint-10") if whole_log else (checkpoint is None)
    assert runs.status(copy) == "interrupted" and json.loads((copy / "params.json").read_text())["max_steps"] == 10


@pytest.mark.parametrize("harm", [truncate, empty])
def test_a_damaged_done_is_not_done(copy, harm, begin):
    harm(copy / "DONE")
    assert runs.status(copy) == "damaged" and "DONE" in runs.damage(copy)
    assert begin(copy)[1].name == "checkpoint-10"


def test_a_run_without_its_sums_is_not_done(copy):
    (copy / "SHA256SUMS").unlink()
    assert runs.status(copy) == "damaged" and "SHA256SUMS" in runs.damage(copy)


def test_the_weights_of_an_evaluated_run_may_be_left_behind(copy):
    weights = copy / runs.WEIGHTS
    whole = weights.read_bytes()
    (copy / "eval-00000000.parquet").touch()
    truncate(weights)
    assert runs.status(copy) == "damaged"
    weights.unlink()
    assert runs.status(copy) == "done"
    (copy / "eval-00000000.parquet").unlink()
    assert runs.status(copy) == "damaged" and runs.WEIGHTS in runs.damage(copy)
    weights.write_bytes(whole)
    assert runs.status(copy) == "done"


@pytest.mark.parametrize("harm", [truncate, empty, zeros])
@pytest.mark.parametrize("name, goes_on_from", [("params.json", 8), ("provenance.json", None)])
def test_half_a_run_with_a_damaged_record(half, name, goes_on_from, harm, begin):
    """The name of the folder says which parameters; only provenance.json says whose policy the checkpoints are."""
    harm(half / name)
    started, checkpoint = begin(half)
    assert (checkpoint and checkpoints.step_of(checkpoint)) == goes_on_from
    assert goes_on_from or "provenance.json is missing or cut off" in started["mended"]
    assert parameters.Params(**json.loads((half / "params.json").read_text())) == parameters.resolve("tiny", **SETTINGS)


@pytest.mark.slow
def test_a_run_mended_from_an_older_checkpoint_ends_in_the_same_weights(workspace, whole):
    """Killed after its last step with a damaged newest checkpoint and a step file cut off."""
    folder = shutil.copytree(whole, workspace / "outputs/mended/runs" / whole.name)
    for name in ("DONE", "SHA256SUMS"):
        (folder / name).unlink()
    (folder / "rewards").mkdir()
    (folder / "rewards/step-000009.parquet").write_bytes(b"PAR1")
    zeros(folder / "checkpoints/checkpoint-10/optimizer.pt")
    papermill(workspace, "02_train", workspace / "mended.ipynb", output_dir="outputs/mended", **SETTINGS)
    same(folder, whole)
    assert record(folder)["resumed_from"] == [8]
    assert "optimizer.pt missing, cut off or changed" in (workspace / "mended.ipynb").read_text()


# --- copies made by hand ----------------------------------------------------------------------------------------


def test_copies_count_only_under_the_name_of_a_cell(workspace, whole):
    """In the store a copy is that run; under a name of its own it is nothing."""
    (workspace / "copied.yaml").write_text(STUDY)
    store = workspace / "outputs/runs"
    shutil.copytree(whole, store / whole.name)
    shutil.copytree(whole, store / f"{whole.name}-copy")
    done = sweep(workspace, "copied").communicate()
    assert "All 1 runs are done: nothing to do." in done[0]
    same(store / whole.name, whole)
    for copied in store.glob(f"{whole.name}*"):
        shutil.rmtree(copied)


# --- kills ------------------------------------------------------------------------------------------------------

STUDY = ("title: One cell\narms: [{label_flip_rate: 0.3}]\nfixed: {max_steps: 10, save_steps: 2, eval_interval: 0}\n"
         "seeds: [0]\nuse_selected: false\n")


def sweep(work, name):
    """Start the runs of a study in the workspace."""
    return subprocess.Popen([sys.executable, "-m", "runner", work / f"{name}.yaml", "--runs-only"], cwd=ROOT, text=True,
                            env=os.environ | {"GRPO_NOISE_WORK": str(work)}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(found, process):
    """Until `found` returns something, while the process lives."""
    deadline = time.monotonic() + 1800
    while not (there := found()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return there


@pytest.fixture
def apart(workspace, tmp_path):
    """A workspace with the same data and base policy in which no finished run can be taken over."""
    for name in ("data", "models"):
        (tmp_path / name).symlink_to(workspace / name)
    return tmp_path


@pytest.mark.slow
def test_kill_9_of_the_ray_worker_and_then_of_the_sweep(apart):
    """Both in one study: the sweep starts the run again after the first, the same command after the second.

    A kernel looks once a second whether its parent lives, so the run is longer than the others here.
    """
    papermill(apart, "02_train", apart / "whole.ipynb", output_dir="reference", **SETTINGS | {"max_steps": 40})
    whole = next((apart / "reference/runs").iterdir())
    (apart / "kills.yaml").write_text(STUDY.replace("max_steps: 10", "max_steps: 40"))
    folder = apart / "outputs/runs" / whole.name
    driver = sweep(apart, "kills")
    wait_for((folder / "rewards/step-000003.parquet").exists, driver)
    below = psutil.Process(driver.pid).children(recursive=True)
    worker = next(p for p in below if "ipykernel" in " ".join(p.cmdline())).parent()
    assert worker.name().startswith("ray::")
    worker.kill()
    wait_for((folder / "rewards/step-000007.parquet").exists, driver)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    left = psutil.wait_procs(started, timeout=120)[1]  # no kernel and no worker outlives the sweep
    assert all(p.name().startswith("ray::") and p.name().endswith("Agent") for p in left), left
    assert not psutil.wait_procs(left, timeout=240)[1]  # Ray's agents first try to reach a head node that is gone
    assert runs.status(folder) == "interrupted"
    again = sweep(apart, "kills")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"{whole.name}  done" in out
    same(folder, whole)
    first, second = record(folder)["resumed_from"]
    assert 2 <= first < second < 40


# --- disk and clock ---------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder):
    """A file system of 6 MB at `folder`; yields a function that fills it, and one that makes room again."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    filler = folder / "filler"

    def fill():
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    try:
        yield fill, filler.unlink
    finally:
        subprocess.run(["umount", folder], check=True)


RUN = ("import json, sys; from runner import parameters, task;"
       "print(json.dumps(task.execute(parameters.resolve('tiny', **json.loads(sys.argv[1])).model_dump())))")


def execute(work, env=None, **given):
    """What a Ray task of the sweep does, in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(SETTINGS | given)], cwd=ROOT, text=True,
                            env=os.environ | {"GRPO_NOISE_WORK": str(work)} | (env or {}),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process):
    """What `execute` returned."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(workspace, whole):
    with small_disk(workspace / "outputs/full") as (fill, make_room):
        folder = workspace / "outputs/full/runs" / whole.name
        process = execute(workspace, output_dir="outputs/full")
        wait_for((folder / "rewards/step-000004.parquet").exists, process)
        fill()
        failed = result(process)
        assert failed["status"] == "failed" and not failed["retry"]
        for words in ("No space left on device", whole.name, "Make room and start again"):
            assert words in failed["message"]
        assert len(rewardlog.read_log(folder)) >= 5 * 128  # whole steps only, and all of them readable
        make_room()
        assert result(execute(workspace, output_dir="outputs/full"))["status"] == "done"
        same(folder, whole)
        assert record(folder)["resumed_from"][0] >= 4


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """A limit on file size stands in for the full disk: the old file stays, nothing else is left behind."""
    code = ("import pathlib, resource, sys; from runner import files;"
            "path = pathlib.Path(sys.argv[1]) / 'provenance.json';"
            "files.write_atomically(path, 'old'); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "files.write_atomically(path, 'new' * 1000)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large (mend that and start again: a run goes on from its" in done.stderr
    assert str(tmp_path / "provenance.json") in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["provenance.json"]
    assert (tmp_path / "provenance.json").read_text() == "old"


JUMPING = """
import itertools, time
real, calls = time.time, itertools.count()
time.time = lambda: real() + (-1) ** (next(calls) // 50) * 86400 * 30
"""


@pytest.mark.slow
def test_a_jumping_clock_changes_no_result_and_no_duration(workspace, whole, tmp_path):
    """The clock of the kernel and of papermill goes a month back or forth at every 50th look."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    assert result(execute(workspace, {"PYTHONPATH": str(tmp_path)}, output_dir="outputs/clock"))["status"] == "done"
    folder = workspace / "outputs/clock/runs" / whole.name
    same(folder, whole)
    metrics = pd.read_parquet(folder / "metrics.parquet").filter(like="seconds/")
    durations = [*metrics.to_numpy().ravel(), record(folder)["train_seconds"], record(folder)["notebook_seconds"]]
    assert 0 <= min(durations) and max(durations) < 600
    assert sorted(p.name for p in (folder / "checkpoints").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]


def test_the_newest_checkpoints_are_kept_whatever_their_times(copy):
    """A clock that was set back makes the newest checkpoint look the oldest."""
    for step in (4, 6, 12):
        shutil.copytree(copy / "checkpoints/checkpoint-8", copy / f"checkpoints/checkpoint-{step}")
    for age, path in enumerate(checkpoints.checkpoints(copy)):
        os.utime(path, (1e9 + age, 1e9 + age))
    checkpoints.keep_checkpoint(copy, 12)
    assert [p.name for p in checkpoints.checkpoints(copy)] == ["checkpoint-12", "checkpoint-10"]
    assert not files.unsealed(copy / "checkpoints/checkpoint-12")


# --- which code -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_repeated_with_an_edited_notebook_says_so(workspace, whole):
    """Its log was lost, so it starts again; meanwhile somebody edited a cell."""
    folder = shutil.copytree(whole, workspace / "outputs/edited/runs" / whole.name)
    truncate(folder / "rewards.parquet")
    notebook = nbformat.read(ROOT / "notebooks/02_train.ipynb", as_version=4)
    next(c for c in notebook.cells if c.id == "channel").source += "\n# edited"
    nbformat.write(notebook, workspace / "edited-source.ipynb")
    arguments = [x for k, v in {**SETTINGS, "output_dir": "outputs/edited"}.items() for x in ("-p", k, str(v))]
    subprocess.run([sys.executable, "-m", "papermill", workspace / "edited-source.ipynb", workspace / "edited.ipynb",
                    *arguments], cwd=ROOT, env=os.environ | {"GRPO_NOISE_WORK": str(workspace)}, check=True,
                   capture_output=True)
    same(folder, whole)
    assert "rewards.parquet" in record(folder)["mended"][0] and record(folder)["resumed_from"] == []
    one, other = record(whole)["code"], record(folder)["code"]
    assert one[0]["modules"] == provenance.code([])["modules"]
    assert other[0]["modules"] == one[0]["modules"] and other[0]["notebook"] != one[0]["notebook"]
    note = runs.code_note(pd.Series({"a": one, "b": one, "c": other}))
    assert "two versions of the training code (2 and 1 runs)" in note
    assert runs.code_note(pd.Series({"a": one, "b": one, "c": None})) == ""
    resumed = pd.Series({"a": one, "b": str(one + other)})  # a table keeps the list as text
    assert "(2 and 1 runs)" in runs.code_note(resumed)
