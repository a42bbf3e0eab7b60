"""The folder of a run: who may write to it, from which checkpoint it goes on, when it counts as done."""

import json
import subprocess
import sys

import pytest

from runner import checkpoints, files, parameters, runs


def test_a_second_process_is_kept_out_and_a_killed_one_is_not_missed(tmp_path):
    code = ("import pathlib, sys, time; from runner import runs; f = runs.hold(pathlib.Path(sys.argv[1]));"
            "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="executed by another process"):
        runs.hold(tmp_path)
    assert runs.status(tmp_path) == "running"
    holder.kill()
    holder.wait()
    file = runs.hold(tmp_path)
    assert runs.hold(tmp_path) is file  # twice in one process: a notebook's cell is executed again
    assert runs.status(tmp_path) == "missing"
    file.close()


def checkpoint(folder, step, whole=True):
    """A checkpoint folder with a file in it, sealed or not; the reward log is taken to be whole."""
    path = folder / f"checkpoints/checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state")
    if whole:
        files.seal(path, "optimizer.pt")


@pytest.fixture
def logged(monkeypatch):
    """A reward log that has every step: these tests are about the checkpoints."""
    monkeypatch.setattr(checkpoints, "logged_until", lambda *_: 1000)


def test_the_last_whole_aligned_checkpoint_is_found(tmp_path, logged):
    assert checkpoints.last_checkpoint(tmp_path, 2) == (None, [])
    for step, whole in ((4, True), (6, True), (7, True), (8, False)):
        checkpoint(tmp_path, step, whole)
    found, passed_over = checkpoints.last_checkpoint(tmp_path, 2)
    assert found.name == "checkpoint-6" and passed_over == ["checkpoint-8: SHA256SUMS missing, cut off or changed"]
    assert checkpoints.last_checkpoint(tmp_path, 1)[0].name == "checkpoint-7"


def test_a_checkpoint_behind_the_log_is_passed_over(tmp_path):
    checkpoint(tmp_path, 2)
    found, passed_over = checkpoints.last_checkpoint(tmp_path, 1)
    assert found is None and passed_over == ["checkpoint-2: the reward log is whole up to step 0 only"]


def test_a_run_does_not_go_on_with_another_policy(tmp_path, logged):
    params = parameters.resolve("tiny")
    assert runs.begin(tmp_path, params, [], policy_hash="aa", data_hash="bb")[0]["resumed_from"] == []
    checkpoint(tmp_path, 50)
    record, found = runs.begin(tmp_path, params, [], policy_hash="aa", data_hash="bb")
    assert record["resumed_from"] == [50] and found.name == "checkpoint-50" and not record["mended"]
    assert json.loads((tmp_path / "params.json").read_text())["seed"] == 0
    with pytest.raises(ValueError, match="began with another policy"):
        runs.begin(tmp_path, params, [], policy_hash="cc", data_hash="bb")
    assert found.exists()


def test_status_follows_the_files(tmp_path):
    params = parameters.resolve("tiny")
    folder = tmp_path / parameters.run_id(params)
    (folder / "adapter").mkdir(parents=True)
    assert runs.status(folder) == "missing"
    record, _ = runs.begin(folder, params, ["print(1)"], policy_hash="aa")
    assert runs.status(folder) == "interrupted"
    (folder / "FAILED").touch()
    assert runs.status(folder) == "failed"
    for name in ("adapter/adapter_model.safetensors", "rewards.parquet", "metrics.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    runs.finish(folder, record)
    assert runs.status(folder) == "done" and not (folder / "FAILED").exists()
    (folder / "metrics.parquet").write_text("other")
    assert runs.status(folder) == "damaged"


def test_a_run_on_too_few_problems_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(runs.dataset, "read_manifest", lambda _: {"counts": {"train_split": 15}})
    with pytest.raises(ValueError, match="15 training problems are fewer than the 16 that one step takes"):
        runs.check_inputs(parameters.resolve("tiny"))
