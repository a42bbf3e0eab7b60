"""Parameters of a run: what is refused and in which words, what is hashed, what a run is called."""

import json
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lib import noise
from runner import parameters

OTHER = {"profile": "smol", "model": "smol", "data_dir": "math", "prompt_template": "chat", "engine": "vllm",
         "reward": "format", "noise_level": "group", "lr_scheduler_type": "cosine", "optim": "sgd",
         "loss_type": "grpo", "scale_rewards": "none", "output_dir": "elsewhere", "report_to": "wandb",
         "num_generations": 16, "per_device_train_batch_size": 64, "top_p": 0.5, "epsilon": 0.1,
         "label_flip_rate": 0.25, "mask_rate": 0.25, "num_iterations": 2, "mitigation": "backward",
         "train_difficulties": "1-3", "cue": "Hence", "mask_rate_by_difficulty": "0.2,0.4"}


def changed(params: parameters.Params, name: str) -> parameters.Params:
    """The same parameters but for one."""
    value = getattr(params, name)
    if name in OTHER:
        other = OTHER[name]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = value + 1
    else:
        other = value / 2 if value else 0.25
    assert other != value
    return params.model_copy(update={name: other})


# --- names


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


@pytest.mark.parametrize("name", ["label_flip_rate", "mask_rate", "abstain_rate", "grpo_beta",
                                  "assumed_false_positive_rate"])
def test_zero_has_no_sign(name):
    plus, minus = (parameters.resolve("tiny", **{name: zero}) for zero in (0.0, -0.0))
    assert parameters.run_id(plus) == parameters.run_id(minus)
    assert math.copysign(1, getattr(minus, name)) == 1


def test_the_name_of_an_arm_has_every_rate():
    assert parameters.run_id(parameters.resolve("tiny", label_flip_rate=0.2)).startswith("flip-0.2-s0-")
    both = parameters.resolve("tiny", label_flip_rate=0.2, abstain_rate=0.5, noise_level="group")
    assert parameters.run_id(both).startswith("flip-0.2-abstain-0.5-group-s0-")


# --- what is refused


@pytest.mark.parametrize("given_, words", [
    ({"label_flip_rate": 1.2}, ["label_flip_rate=1.2", "less than or equal to 1"]),
    ({"label_flip_rate": 0.2, "mask_rate": 0.3}, ["label_flip_rate and mask_rate", "false_positive_rate"]),
    ({"per_device_train_batch_size": 12}, ["12 completions", "num_generations=8"]),
    ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
    ({"engine": "vlm"}, ["engine='vlm'", "'transformers'"]),
    ({"noise_level": "promt"}, ["noise_level='promt'", "'rollout', 'group' or 'prompt'"]),
    ({"lable_flip_rate": 0.1}, ["'lable_flip_rate' is not a parameter", "did you mean 'label_flip_rate'"]),
    ({"max_steps": 0}, ["max_steps=0", "-1"]),
    ({"save_steps": 5, "num_iterations": 2}, ["save_steps=5", "num_iterations=2"]),
    ({"learning_rate": "fast"}, ["learning_rate='fast'"]),
    ({"label_flip_rate": [0.1, 0.2]}, ["label_flip_rate=[0.1, 0.2]: input should be a valid number"]),
    ({"seed": -1, "mask_rate": 2, "optm": "sgd"}, ["seed=-1", "mask_rate=2", "'optm' is not a parameter"]),
    ({"max_steps": 0, "per_device_train_batch_size": 12}, ["max_steps=0", "12 completions"]),
    ({"reward": "cue"}, ["reward='cue'", "give the phrase, such as cue='Therefore'"]),
    ({"reward": "cue", "cue": "  "}, ["give the phrase"]),
    ({"reward": "cue", "cue": ""}, ["cue='': string should have at least 1 character"]),
    ({"reward": "cue", "cue": "x" * 81}, ["at most 80 characters"]),
    ({"cue": "Hence"}, ["cue='Hence' has no effect with reward='accuracy'", "set reward='cue', or leave the cue out"]),
    ({"mask_rate_by_difficulty": "0.1,2"}, ["mask_rate_by_difficulty=2 is not a probability"]),
    ({"mask_rate_by_difficulty": "1-3"}, ["mask_rate_by_difficulty='1-3' is no list of rates", "'0.24,0.3,0.35'"]),
    ({"mask_rate_by_difficulty": 0.3}, ["mask_rate_by_difficulty=0.3", "string"]),
    ({"mask_rate_by_difficulty": "0.1,0.2", "label_flip_rate": 0.1}, ["label_flip_rate and mask_rate_by_difficulty"]),
    ({"mask_rate_by_difficulty": "0.1,0.2", "mitigation": "backward"},
     ["mitigation='backward' believes in one rate", "give assumed_false_negative_rate"]),
])
def test_bad_parameters_are_named(given_, words):
    with pytest.raises(ValueError) as error:
        parameters.resolve("tiny", **given_)
    for word in words:
        assert word in str(error.value)


def test_every_named_channel_is_a_parameter_with_a_range():
    for name, named in noise.NAMED.items():
        assert not getattr(parameters.resolve("tiny"), name)
        out_of_range, words = 1.5, "input should be less than or equal to 1"
        if named.by_difficulty:
            out_of_range, words = "0.1,1.5", "is not a probability"
        with pytest.raises(ValueError, match=rf"{name}=1.5:? {words}"):
            parameters.resolve("tiny", **{name: out_of_range})


def test_rates_by_difficulty_are_one_run_however_they_are_written():
    one, other = (parameters.resolve("tiny", mask_rate_by_difficulty=text) for text in ("0.24,0.3", "0.240, .30"))
    assert parameters.run_id(one) == parameters.run_id(other)
    assert parameters.run_id(one).startswith("mask-by-difficulty-0.24-0.3-s0-")
    assert one.channel.false_negative_rate == (0.24, 0.3)
    given = {"mitigation": "backward", "assumed_false_negative_rate": 0.27}
    assert parameters.resolve("tiny", mask_rate_by_difficulty="0.24,0.3", **given).assumed_rates == (0, 0.27)


def test_a_cue_names_its_run():
    run_id = parameters.run_id(parameters.resolve("tiny", reward="cue", cue="It follows that"))
    assert run_id.startswith("cue-it-follows-that-s0-")


NUMBERS = sorted(name for name, field in parameters.Params.model_fields.items()
                 if field.annotation in (float, int) or "float" in str(field.annotation))


def test_a_truth_value_is_no_rate():
    with pytest.raises(ValueError, match="label_flip_rate=True: input should be a number"):
        parameters.resolve("tiny", label_flip_rate=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "nan"])
@pytest.mark.parametrize("name", NUMBERS)
def test_infinities_and_nan_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"profile tiny: {name}=.*(inf|nan).*number|{name}=.* valid integer"):
        parameters.resolve("tiny", **{name: value})


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        parameters.resolve("tinny")


def test_bad_input_is_refused_in_about_a_second_by_the_command(tmp_path):
    (tmp_path / "bad.yaml").write_text("title: t\narms: [{seeed: 1}]\nseeds: [0]\n")
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "runner", str(tmp_path / "bad.yaml")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'seed'" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "trl", "ray"}  # refused before anything slow is loaded


# --- from a notebook


CELLS = ["", "seed = 1  # a comment\nmask_rate = None", "import json\nsteps = 5", "gpu = False",
         "# Parameters\nseed = 2\n"]
NAMES = {"seed": 2, "mask_rate": None, "steps": 5, "gpu": False, "json": json, "In": CELLS}


def inserted(text, **values):
    """A notebook's names when papermill inserted a cell with this text."""
    return NAMES | values | {"In": [*CELLS, f"# Parameters\n{text}\n"]}


def test_an_unknown_name_in_a_notebook_is_refused_and_machinery_is_not():
    assert parameters.given_parameters(NAMES) == {"seed": 2, "mask_rate": None}
    with pytest.raises(ValueError, match="'label_flip_rat' is not a parameter, did you mean 'label_flip_rate'"):
        parameters.given_parameters(inserted("label_flip_rat = 0.1", label_flip_rat=0.1))


def test_an_infinity_does_not_hide_the_parameters_beside_it():
    """papermill writes it as a call, so the cell is not one of literals."""
    found = parameters.given_parameters(inserted("mask_rate = float('inf')\nseed = 7", mask_rate=math.inf, seed=7))
    assert found == {"seed": 7, "mask_rate": math.inf}


def test_a_list_is_refused_unless_the_notebook_s_own_default_is_one():
    names = inserted("study = ['tiny', 'flip']", study=["tiny", "flip"]) | {"In": [
        "study = 'tiny'\nsizes = [1, 2]", "# Parameters\nstudy = ['tiny', 'flip']\nsizes = [3]\n"], "sizes": [3]}
    with pytest.raises(ValueError, match=r"^study=\['tiny', 'flip'\] is a list: give one value") as error:
        parameters.given_parameters(names, known=("study", "sizes"))
    assert "sizes" not in str(error.value)


# --- where values come from


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


@given(p=st.floats(0, 1), m=st.floats(0, 1))
def test_j_of_named_channels(p, m):
    assert parameters.resolve("tiny", label_flip_rate=p).channel.J == pytest.approx(1 - 2 * p)
    assert parameters.resolve("tiny", mask_rate=m).channel.J == pytest.approx(1 - m)


# --- how long a run is


def test_steps_of_a_run():
    qwen = parameters.resolve("qwen2.5-math-1.5b")
    assert parameters.steps_in(qwen, 6750) == 6750 // 4  # 32 completions a step are 4 prompts
    assert parameters.steps_in(parameters.resolve("tiny"), 5400) == 100


def test_fewer_problems_than_a_step_takes_are_refused():
    tiny = parameters.resolve("tiny")
    assert parameters.steps_in(tiny, 16) == 100
    with pytest.raises(ValueError, match="15 training problems are fewer than the 16 that one step takes: lower"):
        parameters.steps_in(tiny, 15)
