"""Files, parameters and addresses from a stranger: they run no code, leave no folder and show no secret.

Every attack is really tried. Those that would run code would make a marker file.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys

import nbformat
import papermill
import pytest
import torch
import yaml
from conftest import papermill as execute_notebook
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loopback_hub import serve
from safetensors.torch import load_file
from test_hub import NAME, save
from transformers import TrainerState

from runner import ROOT, dataset, files, hub, parameters, policies, provenance, runs, studies

CANARY = "hf_canaryCANARYcanaryCANARYcanary01"


class Payload:
    """Unpickling it makes the file `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def marker(tmp_path):
    """Where an attack would leave its trace; the test fails if it does."""
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    dataset.make_dataset("arithmetic", folder / "data/arithmetic", n_train=200, n_test=20)
    return folder


def load(folder, **given):
    return policies.load_policy(parameters.resolve("tiny", model=str(folder), **given))


# --- models and adapters


def test_the_payload_is_real(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "made"))).close()
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_model_of_pickles_is_refused(tmp_path, marker, work, name):
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(marker), folder / name)
    for refuse in (
        lambda: load(folder),
        lambda: runs.check_inputs(
            parameters.resolve("tiny", model=str(folder), data_dir=str(work / "data/arithmetic"))),
    ):
        with pytest.raises(ValueError, match=rf"read from model.safetensors, and there is only {name}"):
            refuse()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path, marker):
    folder = save(tmp_path / "model")
    torch.save(Payload(marker), folder / "pytorch_model.bin")
    load(folder)


def test_a_pickle_called_safetensors_is_not_unpickled(tmp_path, marker):
    folder = save(tmp_path / "model")
    torch.save(Payload(marker), folder / "model.safetensors")
    with pytest.raises(Exception, match="(?i)header|safetensors"):
        load(folder)


def custom_code(folder, marker, model_type):
    """Make a saved model ask for code of its own: the code would make the marker."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text())
        classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
        classes["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        config |= {"auto_map": classes, "trust_remote_code": True}
        if name == "config.json":
            config["model_type"] = model_type
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["qwen2", "evil"])
def test_code_in_a_model_folder_is_not_run(tmp_path, marker, model_type):
    folder = custom_code(save(tmp_path / "model"), marker, model_type)
    if model_type == "qwen2":  # transformers' own class is taken
        assert type(load(folder)[0]).__module__.startswith("transformers.")
    else:
        with pytest.raises(ValueError, match="needs code of its own, and this project runs none"):
            load(folder)


def test_an_adapter_of_pickles_is_refused(tmp_path, marker):
    from peft import get_peft_model

    params = parameters.resolve("tiny")
    model = policies.tiny_model(seed=0)
    get_peft_model(model, policies.lora(params)).save_pretrained(tmp_path / "adapter")
    with policies.adapted(policies.tiny_model(seed=0), tmp_path / "adapter"):
        pass
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(Payload(marker), tmp_path / "adapter/adapter_model.bin")
    with (
        pytest.raises(ValueError, match="there is only adapter_model.bin"),
        policies.adapted(model, tmp_path / "adapter"),
    ):
        pass


# --- a run folder to be resumed


@pytest.fixture(scope="module")
def trained(workspace):
    """The folder of a run whose DONE is gone, so that it would go on from its checkpoint."""
    given = dict(max_steps=2, save_steps=1, eval_interval=0, label_flip_rate=0.3)
    execute_notebook(workspace, "02_train", workspace / "hostile.ipynb", output_dir="outputs/hostile", **given)
    (folder,) = (workspace / "outputs/hostile/runs").iterdir()
    return folder, given


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_poisoned_checkpoint_runs_no_code(trained, workspace, marker, name):
    folder, given = trained
    saved = workspace / "trained"
    if not saved.exists():
        shutil.copytree(folder, saved)
    shutil.rmtree(folder)  # a run that is refused, or goes on, leaves other checkpoints
    shutil.copytree(saved, folder)
    (folder / "DONE").unlink(missing_ok=True)
    last = max((folder / "checkpoints").glob("checkpoint-*"))
    if len(list((folder / "checkpoints").iterdir())) > 1:  # resume at step 1 of 2
        subprocess.run(["rm", "-r", str(last)], check=True)
    checkpoint = folder / "checkpoints/checkpoint-1"
    torch.save(Payload(marker), checkpoint / name)
    sealed = [line.split("  ")[1] for line in (checkpoint / files.SUMS).read_text().splitlines()]
    files.seal(checkpoint, *sealed)  # the stranger knows about the sums
    done = execute_notebook(
        workspace, "02_train", workspace / "again.ipynb", check=False, output_dir="outputs/hostile", **given
    )
    if name == "training_args.bin":  # written by the trainer, never read
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 1 and "Weights only load failed" in done.stderr, done.stderr[-2000:]


# --- parameters


def yaml_file(folder, text, name="study.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_yaml_runs_no_code(tmp_path, marker):
    for tag in ("!!python/object/apply:os.system ['touch {}']", "!!python/object/apply:builtins.open ['{}', w]"):
        with pytest.raises(ValueError, match=r"study.yaml:1: not valid YAML: could not determine a constructor"):
            studies.load_study(yaml_file(tmp_path, "title: " + tag.format(marker)), "tiny")
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(tag.format(marker))


@pytest.mark.parametrize("body, part", [
    ("fixed: {output_dir: x}", "study.yaml, arm 1: 'output_dir' cannot be set in an arm"),
    ("fixed: {profile: ../x}", "study.yaml, arm 1: 'profile' cannot be set"),
    ("eval_limit: ../../x", "study.yaml: eval_limit='../../x': input should be a valid integer"),
    ("eval_split: ../../x", "study.yaml: eval_split='../../x'"),
    ("profiles: {../../x: {}}", "profile '../../x': a name has letters"),
])  # fmt: skip
def test_a_study_cannot_leave_its_folder(tmp_path, body, part):
    arms = "arms: [{}]" if "fixed" in body else "arms: [{label_flip_rate: 0.1}]"
    with pytest.raises(ValueError) as refusal:
        studies.load_study(yaml_file(tmp_path, f"title: t\nseeds: [0]\n{arms}\n{body}\n"), "tiny")
    assert part in str(refusal.value)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "x\ny", "/etc/passwd", "...yaml", "a b.yaml"])
def test_names_of_studies_and_profiles_are_names(tmp_path, name):
    with pytest.raises(ValueError, match="a name has letters, digits"):
        studies.load_study(name, "tiny")
    with pytest.raises(ValueError, match="a name has letters, digits"):
        parameters.resolve(name)


@pytest.mark.parametrize(
    "given",
    [
        {"output_dir": "../x"},
        {"output_dir": "/tmp/x"},
        {"output_dir": "outputs/../../x"},
    ],
)
def test_parameters_cannot_leave_the_workspace(given):
    with pytest.raises(ValueError, match="leaves the workspace"):
        parameters.resolve("tiny", **given)


def test_data_hold_no_code(tmp_path, marker):
    """No loading script is looked for: rows are read by runner.dataset alone."""
    dataset.make_dataset("arithmetic", tmp_path / "d", n_train=60, n_test=15)
    for name in ("d.py", "dataset.py", "arithmetic.py"):
        (tmp_path / "d" / name).write_text(f"open({str(marker)!r}, 'w')")
    assert len(dataset.load_split(tmp_path / "d", "test")) == 15


# Values that might break out of the literal that papermill writes into the notebook.
BREAKS = [
    "'",
    '"',
    "\\",
    '\\"',
    "\\\\'",
    "\n",
    "\r",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0c",
    "#",
    '"""',
    "'''",
    "{x}",
    "%",
    "\n!",
    "$(x)",
]
text = st.lists(st.sampled_from([*BREAKS, "; open(MARK, 'w')", "\nopen(MARK, 'w')\n", "a"]), max_size=8).map("".join)
value = st.recursive(
    text | st.integers() | st.booleans() | st.none(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(value)
@example('\\"; open("x", "w") #')
@example({'a": open("x", "w"), "b': 1})
def test_a_parameter_stays_in_its_literal(given_value):
    from papermill.translators import PythonTranslator

    cell = PythonTranslator.codify({"v": given_value})
    assert provenance.assignments(cell) == {"v": given_value}  # one literal, with the value that was given
    assert cell.count("\n") == 2 and "\u2028" not in cell


def test_parameters_through_papermill(tmp_path, marker):
    """The same through a real kernel, with all of them at once."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}
    )
    notebook.cells = [
        nbformat.v4.new_code_cell("v = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import json\nprint(json.dumps(v))"),
    ]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    values = [b + f"open({str(marker)!r}, 'w')" + b for b in BREAKS] + [
        f"\n!touch {marker}\n",
        f"\n%%bash\ntouch {marker}",
    ]
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"v": values}, progress_bar=False)
    output = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0]["text"]
    assert json.loads(output) == values


def test_names_of_parameters_in_a_study_are_checked_before_papermill_sees_them(tmp_path, marker):
    name = f"x = open({str(marker)!r}, 'w') #"
    study = yaml.safe_dump({"title": "t", "seeds": [0], "arms": [{name: 1}]})
    with pytest.raises(ValueError, match="is not a parameter"):
        studies.load_study(yaml_file(tmp_path, study), "tiny")


# --- secrets


def python(code, *argv, **environment):
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    said = hub.without_secrets(f"tried https://user:pass@hub.example/x?y with Bearer {CANARY}, mail a@b.c")
    assert said == "tried https://hub.example/x?y with Bearer <HF_TOKEN>, mail a@b.c"


FAIL = """
import sys
from runner import WORK, files, parameters, policies, runs, studies
policies.load_policy(parameters.resolve("tiny", model=sys.argv[1]))
"""


def test_a_failing_load_shows_no_token(tmp_path):
    with serve({}) as endpoint:
        done = python(FAIL, NAME, HF_ENDPOINT=endpoint, HF_TOKEN=CANARY, HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "OSError" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_a_password_in_the_endpoint_is_refused_before_the_hub_is_asked(monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{CANARY}-endpoint@127.0.0.1:1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="HF_ENDPOINT holds a password") as refusal:
        load(NAME)
    assert CANARY not in str(refusal.value) + "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_run_from_a_gated_hub_leaves_no_token_behind(tmp_path, work, marker):
    saved = save(tmp_path / "model")
    given = dict(
        max_steps=1, eval_interval=0, data_dir=work / "data/arithmetic", model=NAME, label_flip_rate=0.5
    )
    with serve({("model", NAME): saved}, gated={("model", NAME): CANARY}) as endpoint:
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": CANARY,
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            good = execute_notebook(work, "02_train", work / "good.ipynb", check=False, **given)
            patch.setenv("HF_TOKEN", CANARY + "wrong")
            patch.setenv("HF_HOME", str(tmp_path / "empty"))
            bad = execute_notebook(work, "02_train", work / "bad.ipynb", check=False, **given | {"seed": 1})
    assert good.returncode == 0, good.stderr[-2000:]
    assert bad.returncode == 1 and "gated" in bad.stderr
    kept = [f for f in work.rglob("*") if f.is_file()]
    assert {"params.json", "provenance.json", "good.ipynb", "bad.ipynb"} <= {f.name for f in kept}
    for content in [good.stderr.encode(), bad.stderr.encode(), *(f.read_bytes() for f in kept)]:
        assert CANARY.encode() not in content


def test_checkpoints_are_read_without_pickle(ten_steps):
    """What 02_train itself reads of a checkpoint: numbers and JSON."""
    checkpoint = ten_steps / "checkpoints/checkpoint-8"
    load_file(checkpoint / "adapter_model.safetensors")
    TrainerState.load_from_json(checkpoint / "trainer_state.json")
