"""Runs in place of a study: found by id or folder."""

import json

import pandas as pd
import pytest

from runner import dataset, parameters, plan, policies, results, targets


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A workspace; returns a function that puts a run with these parameters into it."""
    monkeypatch.setattr(parameters, "WORK", tmp_path)
    for name, folder in (("WORK", tmp_path), ("OUTPUTS", tmp_path / "outputs"), ("ROOT", tmp_path)):
        monkeypatch.setattr(targets, name, folder)

    def put(**given):
        params = parameters.resolve("tiny", **given)
        params.folder.mkdir(parents=True)
        (params.folder / "params.json").write_text(json.dumps(params.model_dump()))
        return params
    return put


def test_a_run_is_found_by_its_id_and_by_its_folder(store):
    run = store(label_flip_rate=0.25)
    for name in (run.folder.name, f"outputs/runs/{run.folder.name}", str(run.folder)):
        study, grid = targets.load(name, "tiny")
        assert grid == [run] and study.arm_and_reference(run) == ("flip 0.25", "clean")
        assert targets.folder_of(name, "smol").name == f"run-{run.folder.name}"


def test_a_mistyped_run_is_named_and_a_study_stays_a_study(store):
    run = store()
    with pytest.raises(ValueError, match="there is no run clean-s9"):
        targets.load(f"{run.folder.name}, clean-s9", "tiny")
    assert targets.load("flip", "tiny")[0].title and targets.folder_of("flip", "smol").name == "flip-smol"


def test_a_run_that_was_moved_is_not_evaluated_in_silence(store, tmp_path):
    run = store()
    run.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="elsewhere holds the run clean.*move it there"):
        targets.load(str(tmp_path / "elsewhere"), "tiny")


# --- the end of a notebook -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, following", [
    ("arithmetic", "01b_warm_start.ipynb out.ipynb --log-output"),
    ("operations", "01b_warm_start.ipynb out.ipynb --log-output -p profile smol"),
    ("sums", "02_train.ipynb out.ipynb -p data_dir sums -p model MODEL --log-output")])
def test_data_say_how_many_there_are_and_what_is_next(name, following):
    counts = {"train": 7500, "validation": 5000, "train_split": 6750, "validation_split": 750, "test": 5000}
    assert results.end_of_data(dataset.data_folder(name), counts).splitlines() == [
        f"data/{name}: 6,750 problems for training, 750 for validation, 5,000 for the test",
        f"next: papermill notebooks/{following}"]


def test_a_finished_run_says_what_went_wrong_and_what_is_next(store):
    run = store(max_completion_length=8)
    metrics = pd.DataFrame({"step": range(1, 21), "clean_mean": [i / 20 for i in range(20)],
                            "validation_greedy": [None] * 19 + [0.625]})
    log = pd.DataFrame({"completion_tokens": [8, 3, 8, 2], "format_ok": [True, True, False, True]})
    said = results.end_of_run(run, metrics, log).splitlines()
    assert said[0].endswith("clean reward 0.025 at the beginning, 0.925 at the end")
    assert said[1] == "accuracy on validation, greedy: 0.625 after 20 steps"
    assert said[2] == "2 of 4 completions reached the limit of 8 tokens (max_completion_length)"
    assert said[3] == "1 of 4 completions have no answer in a box"
    assert said[-1] == f"next: python -m runner {run.folder.name} --report"
    assert targets.load(said[-1].split()[-2], "tiny")[1] == [run]
    silent = results.end_of_run(run, metrics.drop(columns="validation_greedy"), log.iloc[[1]])
    assert "not looked at" in silent and "limit" not in silent and "box" not in silent


def test_a_dry_run_estimates_from_finished_runs_of_the_same_shape(store):
    done, waiting, other = store(), store(seed=1), parameters.resolve("tiny", max_steps=7)
    (done.folder / "DONE").write_text("")
    (done.folder / "provenance.json").write_text(json.dumps({"notebook_seconds": 600}))
    statuses = {done.folder.name: "done", waiting.folder.name: "missing", other.folder.name: "missing"}
    assert plan.estimate([done, waiting, other], statuses) == (
        "1 of the runs left take about 10 min in all, one after another, as finished runs of the same shape here did; "
        "of 1 others nothing is known")
    assert plan.estimate([done], statuses) == "" == plan.estimate([other], statuses)


# --- a model of one's own ---------------------------------------------------------------------------


def test_a_model_without_a_profile_gets_the_one_for_language_models():
    assert parameters.resolve().profile == "tiny" and parameters.resolve(model="smol").profile == "smol"
    own = parameters.resolve(model="SOMEBODY/a-model")
    assert own.profile == "own" and own.prompt_template == "chat" and own.data_dir == "math"
    assert parameters.resolve("tiny", model="a-folder").profile == "tiny"


def test_a_template_that_is_ignored_or_missing_is_said():
    tokenizer = policies.tiny_tokenizer()
    params = parameters.resolve("tiny")
    assert policies.remark_on_template(params, tokenizer) == ""
    with pytest.raises(ValueError, match="has no chat template: set prompt_template to r1-zero, or to none"):
        policies.format_prompt("1+1=", "chat", tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert "set prompt_template=chat" in policies.remark_on_template(params, tokenizer)
