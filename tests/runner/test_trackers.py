"""report_to: a missing tracker is refused at once, and a tracker's files stay with the run."""

import os
from importlib.util import find_spec

import pytest
from conftest import papermill

from runner import parameters, runs

TRACKERS = ("tensorboard", "trackio", "wandb")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(runs, "find_spec", lambda package: None)  # as on a machine without it
    with pytest.raises(FileNotFoundError, match=f"report_to='{name}' .* pip install {name}$"):
        runs.check_inputs(parameters.resolve("tiny", report_to=name, data_dir="nowhere"))


def test_an_unknown_tracker_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="report_to='tensorbord'.*did you mean 'tensorboard'"):
        parameters.resolve("tiny", report_to="tensorbord")


def test_trackers_write_below_the_study(monkeypatch):
    monkeypatch.setattr(os, "environ", {"TRACKIO_DIR": "/own"})
    params = parameters.resolve("tiny", report_to="trackio", output_dir="outputs/some")
    assert runs.tracking(params) == {"report_to": "trackio", "run_name": parameters.run_id(params), "project": "some"}
    assert os.environ == {"TENSORBOARD_LOGGING_DIR": str(params.folder / "tensorboard"), "TRACKIO_DIR": "/own",
                          "WANDB_DIR": str(params.folder), "WANDB_PROJECT": "some"}  # what the user set is left alone
    # the same run
    assert parameters.run_id(params) == parameters.run_id(parameters.resolve("tiny", output_dir="outputs/some"))


@pytest.mark.skipif(not find_spec("tensorboard"), reason="the extra `track` is not installed")
def test_tensorboard_has_clean_and_observed_mean(workspace):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    papermill(workspace, "02_train", workspace / "tracked.ipynb", output_dir="outputs/tracked", report_to="tensorboard",
              max_steps=3, eval_interval=0)
    run = next((workspace / "outputs/tracked/runs").iterdir())
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("clean_mean", "observed_mean"):
        assert [e.step for e in events.Scalars(f"train/{name}")] == [1, 2, 3]
