"""A run as a block of code: nothing is DONE before its end, and a failure leaves the folder free."""

import pandas as pd
import pyarrow as pa
import pytest

from lib.noise import observe
from lib.rewards import LOG_SCHEMA
from runner import execution, parameters, runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in a workspace of its own, whose inputs are taken to be there."""
    monkeypatch.setattr(parameters, "WORK", tmp_path)
    monkeypatch.setattr(execution, "check_inputs", lambda params: None)
    return execution.Run(parameters.resolve("tiny", label_flip_rate=0.5), ["", "print(1)"])


def leave_files(run, tampered: bool):
    """What a training leaves: an adapter, metrics, and a log that the channel wrote (or not)."""
    rows = 64
    key = [0] * rows, [f"p:{i // 8}" for i in range(rows)], [i % 8 for i in range(rows)]
    verdict = [i % 2 for i in range(rows)]
    observed = observe(run.params.channel, verdict, run.params.noise_seed, *key)
    if tampered:
        observed[3] = 1 - observed[3]
    log = pd.DataFrame({
        "step": key[0], "sample_id": key[1], "rollout": key[2], "true_reward": verdict,
        "verdict": verdict, "observed_reward": observed, "returned": observed,
        "changed": observed != verdict, "format_ok": True, "completion_tokens": 3,
        "grader": "exact"})
    table = pa.Table.from_pandas(log, LOG_SCHEMA, preserve_index=False)
    pa.parquet.write_table(table, run.folder / "rewards.parquet")
    (run.folder / "metrics.parquet").write_text("metrics")
    (run.folder / "adapter").mkdir()
    (run.folder / runs.WEIGHTS).write_text("weights")


def train(run, tampered=False):
    with run.training(policy_hash="aa", data_hash="bb"):
        assert runs.status(run.folder) == "interrupted" and run.resumed_from == 0
        leave_files(run, tampered)


def test_a_run_is_done_at_the_end_of_its_block(run):
    train(run)
    assert runs.status(run.folder) == "done" and run.lock.closed
    again = execution.Run(run.params, [""])
    assert again.finished and again.lock is None and str(again).endswith(": done")


def test_a_failure_in_the_block_leaves_no_done_and_no_lock(run):
    with pytest.raises(ZeroDivisionError), run.training(policy_hash="aa", data_hash="bb"):
        1 / 0  # noqa: B018
    assert runs.status(run.folder) == "interrupted" and run.lock.closed
    assert not execution.Run(run.params, [""]).finished


def test_a_log_that_the_channel_did_not_write_is_no_run(run):
    with pytest.raises(RuntimeError, match="1 of 64 rows of the log are not what the channel draws"):
        train(run, tampered=True)
    assert runs.status(run.folder) == "interrupted" and run.lock.closed


def test_two_runs_do_not_hold_one_folder(run):
    assert execution.Run(run.params, [""]).lock is run.lock  # a cell that is executed twice
