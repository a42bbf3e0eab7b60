"""Parameters, names and folders of runs: what is refused, what is hashed, what counts as done."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib import noise
from runner import ROOT, files, parameters, provenance, runs, studies

OTHER = {"profile": "smol", "model": "smol", "data_dir": "math", "prompt_template": "chat", "engine": "vllm",
         "reward": "format", "noise_level": "group", "lr_scheduler_type": "cosine", "optim": "sgd",
         "loss_type": "grpo", "scale_rewards": "none", "output_dir": "elsewhere", "report_to": "wandb",
         "num_generations": 16, "per_device_train_batch_size": 64, "top_p": 0.5, "epsilon": 0.1,
         "label_flip_rate": 0.25, "mask_rate": 0.25, "num_iterations": 2, "mitigation": "backward"}


def changed(params: parameters.Params, name: str) -> parameters.Params:
    """The same parameters but for one."""
    value = getattr(params, name)
    if isinstance(value, bool):
        return params.model_copy(update={name: not value})
    other = OTHER[name] if name in OTHER else value + 1 if isinstance(value, int) else value / 2 if value else 0.25
    assert other != value
    return params.model_copy(update={name: other})


@pytest.mark.parametrize("name", sorted(set(parameters.Params.model_fields) - parameters.NOT_HASHED))
def test_every_parameter_changes_the_run_id(name):
    base = parameters.resolve("tiny")
    assert parameters.run_id(changed(base, name)) != parameters.run_id(base)


def test_where_a_run_lies_does_not_change_its_id():
    base = parameters.resolve("tiny")
    for name in parameters.NOT_HASHED:
        assert parameters.run_id(changed(base, name)) == parameters.run_id(base)


def test_run_id_is_readable_and_the_same_in_another_process():
    params = parameters.resolve("tiny", label_flip_rate=0.2, seed=1)
    code = "from runner.parameters import *; print(run_id(resolve('tiny', label_flip_rate=.2, seed=1)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert parameters.run_id(params) == other
    assert other.startswith("flip-0.2-s1-") and len(other.split("-")[-1]) == 8


@pytest.mark.parametrize("given_, words", [
    ({"label_flip_rate": 1.2}, ["label_flip_rate=1.2", ">= 0 and <= 1"]),
    ({"label_flip_rate": 0.2, "mask_rate": 0.3}, ["label_flip_rate and mask_rate", "false_positive_rate"]),
    ({"per_device_train_batch_size": 12}, ["12 completions", "num_generations=8"]),
    ({"seed": -1}, ["seed=-1", ">= 0"]),
    ({"engine": "vlm"}, ["engine='vlm'", "'transformers'"]),
    ({"noise_level": "promt"}, ["noise_level='promt'", "did you mean 'prompt'"]),
    ({"lable_flip_rate": 0.1}, ["'lable_flip_rate' is not a parameter", "did you mean 'label_flip_rate'"]),
    ({"max_steps": 0}, ["max_steps=0", "-1"]),
    ({"save_steps": 5, "num_iterations": 2}, ["save_steps=5", "num_iterations=2"]),
    ({"learning_rate": "fast"}, ["learning_rate='fast'"]),
])
def test_bad_parameters_are_named(given_, words):
    with pytest.raises(ValueError) as error:
        parameters.resolve("tiny", **given_)
    for word in words:
        assert word in str(error.value)


def test_unknown_profile_and_study_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        parameters.resolve("tinny")
    with pytest.raises(ValueError, match="did you mean 'flip'"):
        studies.load_study("flp", "tiny")


def test_an_unknown_name_in_a_notebook_is_refused_and_machinery_is_not():
    cells = ["", "seed = 1  # a comment\nmask_rate = None", "import json\nsteps = 5", "gpu = False",
             "# Parameters\nseed = 2\n"]
    names = {"seed": 2, "mask_rate": None, "steps": 5, "gpu": False, "json": json, "In": cells}
    assert parameters.given_parameters(names) == {"seed": 2, "mask_rate": None}
    injected = {"In": [*cells, "# Parameters\nlabel_flip_rat = 0.1\n"], "label_flip_rat": 0.1}
    with pytest.raises(ValueError, match="'label_flip_rat' is not a parameter, did you mean 'label_flip_rate'"):
        parameters.given_parameters(names | injected)


@pytest.mark.parametrize("text, words", [
    ("title: t\narms: [{}]\nseeds: [0]\nsedes: [1]\n", ["bad.yaml", "'sedes' is not a parameter", "'seeds'"]),
    ("title: t\narms: [{lable_flip_rate: 0.1}]\nseeds: [0]\n", ["bad.yaml, arm 1", "'label_flip_rate'"]),
    ("title: t\narms: [{}, {mask_rate: [0.1, 2]}]\nseeds: [0]\n", ["bad.yaml, arm 2", "mask_rate=2"]),
    ("title: t\narms: [{}]\nseeds: []\n", ["bad.yaml", "seeds"]),
    ("title: t\narms: []\nseeds: [0]\n", ["bad.yaml", "arms"]),
    ("title: t\narms: [{mask_rate: []}]\nseeds: [0]\n", ["bad.yaml, arm 1", "mask_rate is an empty list"]),
    ("title: t\narms: [{}]\nseeds: [-3]\n", ["seed=-3"]),
    ("title: t\narms: [{}]\nseeds: [0, 0]\n", ["occur twice"]),
    ("title: t\narms: [{}\nseeds: [0]\n", ["bad.yaml:", "not valid YAML"]),
    ("title: t\narms: [{}]\nseeds: [0]\nprofiles: {smoll: {seeds: [1]}}\n", ["no profile 'smoll'", "'smol'"]),
    ("- 1\n", ["bad.yaml:1", "mapping"]),
])
def test_a_study_with_a_mistake_is_refused(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        studies.load_study(str(tmp_path / "bad.yaml"), "tiny")
    for word in words:
        assert word in str(error.value)


def test_bad_input_is_refused_in_about_a_second_by_the_command(tmp_path):
    (tmp_path / "bad.yaml").write_text("title: t\narms: [{seeed: 1}]\nseeds: [0]\n")
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "runner", str(tmp_path / "bad.yaml")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'seed'" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "trl", "ray"}  # refused before anything slow is loaded


@pytest.mark.parametrize("name", sorted(p.stem for p in studies.STUDIES.glob("*.yaml")))
def test_the_studies_are_valid_and_no_run_occurs_twice(name):
    study, grid = studies.load_study(name, "tiny")
    assert len({parameters.run_id(p) for p in grid}) == len(grid) >= len(study.seeds)


def test_a_study_may_differ_for_a_profile(tmp_path):
    (tmp_path / "s.yaml").write_text("title: t\narms: [{}]\nseeds: [0]\nprofiles: {smol: {seeds: [4, 5]}}\n")
    assert [p.seed for p in studies.load_study(str(tmp_path / "s.yaml"), "tiny")[1]] == [0]
    assert [p.seed for p in studies.load_study(str(tmp_path / "s.yaml"), "smol")[1]] == [4, 5]


@pytest.mark.parametrize("name", sorted(p.stem for p in parameters.PROFILES.glob("*.yaml")))
def test_the_profiles_are_valid(name):
    assert parameters.resolve(name).profile == name


def test_the_selected_hyperparameters_are_read_unless_given(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "OUTPUTS", tmp_path)
    parameters.selected_file("tiny").parent.mkdir(parents=True)
    parameters.selected_file("tiny").write_text(yaml.safe_dump({"selected": {"learning_rate": 0.125}}))
    assert parameters.resolve("tiny", use_selected=True).learning_rate == 0.125
    assert parameters.resolve("tiny", use_selected=True, learning_rate=0.5).learning_rate == 0.5
    assert parameters.resolve("tiny").learning_rate == 1e-3


def test_none_means_as_the_profile_says_and_noise_follows_the_seed():
    params = parameters.resolve("tiny", learning_rate=None, seed=7)
    assert (params.learning_rate, params.noise_seed) == (1e-3, 7)
    assert parameters.resolve("tiny", seed=7, noise_seed=3).noise_seed == 3


def test_a_run_is_named_after_its_arm():
    name = parameters.run_id(parameters.resolve("tiny", label_flip_rate=0.2, abstain_rate=0.5, noise_level="group"))
    assert name.startswith("flip-0.2-abstain-0.5-group-s0-")


def test_every_named_channel_is_a_parameter_with_a_range():
    for name in noise.NAMED:
        assert getattr(parameters.resolve("tiny"), name) == 0
        with pytest.raises(ValueError, match=rf"{name}=1.5: .*allowed: >= 0 and <= 1"):
            parameters.resolve("tiny", **{name: 1.5})


@given(p=st.floats(0, 1), m=st.floats(0, 1))
def test_j_of_named_channels(p, m):
    assert parameters.resolve("tiny", label_flip_rate=p).channel.J == pytest.approx(1 - 2 * p)
    assert parameters.resolve("tiny", mask_rate=m).channel.J == pytest.approx(1 - m)


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
    monkeypatch.setattr(runs, "logged_until", lambda *_: 1000)


def test_the_last_whole_aligned_checkpoint_is_found(tmp_path, logged):
    assert runs.last_checkpoint(tmp_path, 2) == (None, [])
    for step, whole in ((4, True), (6, True), (7, True), (8, False)):
        checkpoint(tmp_path, step, whole)
    found, passed_over = runs.last_checkpoint(tmp_path, 2)
    assert found.name == "checkpoint-6" and passed_over == ["checkpoint-8: SHA256SUMS missing, cut off or changed"]
    assert runs.last_checkpoint(tmp_path, 1)[0].name == "checkpoint-7"


def test_unaligned_checkpoints_alone_are_refused(tmp_path, logged):
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match=r"steps \[3\] are not multiples of 2"):
        runs.last_checkpoint(tmp_path, 2)


def test_a_checkpoint_behind_the_log_is_passed_over(tmp_path):
    checkpoint(tmp_path, 2)
    assert runs.last_checkpoint(tmp_path, 1) == (None, ["checkpoint-2: the reward log is whole up to step 0 only"])


def test_a_run_does_not_go_on_with_another_policy(tmp_path, logged):
    params = parameters.resolve("tiny")
    assert runs.begin(tmp_path, params, policy_hash="aa", data_hash="bb")[0]["resumed_from"] == []
    checkpoint(tmp_path, 50)
    record, found = runs.begin(tmp_path, params, policy_hash="aa", data_hash="bb")
    assert record["resumed_from"] == [50] and found.name == "checkpoint-50" and not record["mended"]
    assert json.loads((tmp_path / "params.json").read_text())["seed"] == 0
    with pytest.raises(ValueError, match="began with another policy"):
        runs.begin(tmp_path, params, policy_hash="cc", data_hash="bb")
    assert found.exists()


def test_status_follows_the_files(tmp_path):
    params = parameters.resolve("tiny")
    folder = tmp_path / parameters.run_id(params)
    (folder / "adapter").mkdir(parents=True)
    assert runs.status(folder) == "missing"
    record, _ = runs.begin(folder, params, policy_hash="aa")
    assert runs.status(folder) == "interrupted"
    (folder / "FAILED").touch()
    assert runs.status(folder) == "failed"
    for name in ("adapter/adapter_model.safetensors", "rewards.parquet", "metrics.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    runs.finish(folder, record, ["print(1)"])
    assert runs.status(folder) == "done" and not (folder / "FAILED").exists()
    (folder / "metrics.parquet").write_text("other")
    assert runs.status(folder) == "damaged"


def test_steps_of_a_run():
    qwen = parameters.resolve("qwen2.5-math-1.5b")
    assert parameters.steps_in(qwen, 6750) == 6750 // 4  # 32 completions a step are 4 prompts
    assert parameters.steps_in(parameters.resolve("tiny"), 5400) == 100


def test_provenance_names_no_path_or_host():
    text = json.dumps(provenance.provenance())
    import getpass
    import socket
    assert str(ROOT) not in text and socket.gethostname() not in text
    assert getpass.getuser() not in json.loads(text)
