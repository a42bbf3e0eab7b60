"""A base policy from the hub: downloaded for real from a hub on loopback, and refused in time if there is none."""

import os
import shutil
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import nbformat
import pytest
from conftest import papermill
from loopback_hub import serve

from runner import ROOT, dataset, hub, parameters, policies, runs

NAME = "someone/tiny-qwen"
SHARDED = "someone/sharded-qwen"
LOAD = """
import sys
from runner import parameters, policies, runs

def load(model):
    params = parameters.resolve("tiny", model=model, data_dir=sys.argv[2])
    runs.check_inputs(params)
    return policies.weights_hash(policies.load_policy(params)[0])

for _ in range(2):
    print(*map(load, sys.argv[1].split(",")), flush=True)
    sys.stdin.readline()
"""
CHECK = """
import sys, time
from runner import parameters, runs
params = parameters.resolve("tiny", model=sys.argv[1], data_dir=sys.argv[2])
began = time.time()
try:
    runs.check_inputs(params)
finally:
    print("torch" in sys.modules, time.time() - began)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A workspace with data, so that only the model can be missing."""
    folder = tmp_path_factory.mktemp("work")
    dataset.make_dataset("arithmetic", folder / "data/arithmetic", n_train=60, n_test=15)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A policy with random weights in Hugging Face's format."""
    return save(tmp_path_factory.mktemp("model"))


def save(folder, **how):
    policies.tiny_model(seed=3).save_pretrained(folder, **how)
    policies.tiny_tokenizer().save_pretrained(folder)
    return folder


def start(code, work, cache, endpoint, model=NAME, **environment):
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
                                "HF_TOKEN": "", "NO_PROXY": "127.0.0.1"} | environment
    return subprocess.Popen([sys.executable, "-c", code, model, str(work / "data/arithmetic")], env=environment,
                            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def execute(*args, **environment):
    """`start`, and wait for the end."""
    process = start(*args, **environment)
    out, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def weights(folder):
    return policies.weights_hash(policies.load_policy(parameters.resolve("tiny", model=str(folder)))[0])


def refused(done, *parts):
    """The run stopped within seconds, without torch, with one sentence that has these parts; returns the sentence."""
    torch, seconds = done.stdout.split()
    sentence = done.stderr.strip().splitlines()[-1]
    assert torch == "False" and float(seconds) < 10  # loading alone would retry for a minute and more
    assert done.returncode == 1 and "During handling" not in done.stderr and "The above exception" not in done.stderr
    assert sentence.startswith("FileNotFoundError: model=") and all(p in sentence for p in parts), sentence
    return sentence


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory, work, saved):
    """Two models that were loaded from a hub, one of them in shards, and then again when the hub was gone.

    Returns the folders on the hub, its requests, the cache, what was loaded each time, and what was said meanwhile.
    """
    shards = save(tmp_path_factory.mktemp("shards"), max_shard_size="300KB")
    folders, requests, cache = {NAME: saved, SHARDED: shards}, [], tmp_path_factory.mktemp("cache")
    with serve({("model", name): folder for name, folder in folders.items()}, requests) as endpoint:
        process = start(LOAD, work, cache, endpoint, ",".join(folders))
        first = process.stdout.readline()
    again, errors = process.communicate("\n\n", timeout=600)
    return folders, requests, cache, first, again, errors


def test_a_model_is_downloaded_and_then_needs_no_hub(downloaded):
    folders, requests, _, first, again, errors = downloaded
    assert f"GET /{NAME}/resolve/main/model.safetensors" in requests
    assert first.split() == again.split() == [weights(folder) for folder in folders.values()], errors
    assert "Retrying" not in errors, errors


def test_a_model_in_shards(downloaded, work):
    folders, _, cache, *_ = downloaded
    shards = {f.name for f in folders[SHARDED].glob("model-*.safetensors")}
    assert len(shards) > 2
    cached = [f for f in cache.rglob("model-*.safetensors")]
    assert {f.name for f in cached} == shards
    nowhere = "http://127.0.0.1:1"
    assert execute(CHECK, work, cache, nowhere, SHARDED).returncode == 0


@pytest.mark.parametrize("token", ["", "hf_another", "hf_right"])
def test_a_gated_model_needs_the_right_token(tmp_path, work, saved, token):
    with serve({("model", NAME): saved}, gated={("model", NAME): "hf_right"}) as endpoint:
        done = execute(CHECK, work, tmp_path, endpoint, HF_TOKEN=token)
    if token == "hf_right":
        assert done.returncode == 0 and done.stdout.startswith("False"), done.stderr
    else:
        sentence = refused(done, repr(NAME), "gated")
        assert not token or token not in sentence


def test_a_model_that_the_hub_does_not_have(tmp_path, work):
    with serve({}) as endpoint:
        refused(execute(CHECK, work, tmp_path, endpoint), repr(NAME), "Repository Not Found")


def test_a_repository_without_config(tmp_path, work):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/README.md").write_text("weights follow")
    with serve({("model", NAME): tmp_path / "repository"}) as endpoint:
        refused(execute(CHECK, work, tmp_path / "cache", endpoint), repr(NAME), "Entry Not Found")


@pytest.mark.parametrize("hub", ["off", "silent", "none at all", "forbidden"])
def test_a_hub_out_of_reach(tmp_path, work, hub):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, and never answers
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if hub == "silent":
            done = execute(CHECK, work, tmp_path, endpoint, HF_HUB_ETAG_TIMEOUT="1")
    if hub != "silent":
        done = execute(CHECK, work, tmp_path, "nonsense" if hub == "none at all" else endpoint,
                       HF_HUB_OFFLINE=str(int(hub == "forbidden")))
    way = "HF_HUB_OFFLINE" if hub == "forbidden" else "HF_ENDPOINT"
    refused(done, repr(NAME), "give a local folder or file as `model` (-p model FOLDER)", way)


class Status(BaseHTTPRequestHandler):
    """Answers every request with the status that its path begins with."""

    def do_GET(self):
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()

    def log_message(self, *args):
        pass

    do_HEAD = do_GET


@pytest.mark.parametrize("status", [403, 404, 503])
def test_answers_that_are_not_the_models(tmp_path, work, status):
    with ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = execute(CHECK, work, tmp_path, f"http://127.0.0.1:{server.server_address[1]}/{status}")
        server.shutdown()
    refused(done, repr(NAME), str(status), "give a local folder")


def test_a_name_that_is_no_hub_id():
    for model in ("models/my/policy", "https://user:password@hub.example/someone/tiny-qwen"):
        with pytest.raises(FileNotFoundError, match="cannot be had from the hub .*Repo id must") as refusal:
            hub.check_hub(model)
        assert "password" not in str(refusal.value)


def test_a_local_folder_needs_no_hub(tmp_path, work, saved):
    shutil.copytree(saved, tmp_path / "copy")
    params = parameters.resolve("tiny", model=str(tmp_path / "copy"), data_dir=str(work / "data/arithmetic"))
    runs.check_inputs(params)
    (tmp_path / "copy/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a folder with config.json: give one, or a hub id"):
        runs.check_inputs(params)
    (tmp_path / "copy/weights.gguf").touch()
    with pytest.raises(FileNotFoundError, match="is not a folder with config.json: give the file in it, weights.gguf"):
        runs.check_inputs(params)


def test_the_training_notebook_stops_before_torch(tmp_path, work, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with serve({}) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        done = papermill(work, "02_train", tmp_path / "out.ipynb", check=False, model="absent/absent")
    assert done.returncode == 1
    assert "FileNotFoundError: model='absent/absent' is not here, and cannot be had from the hub" in done.stderr
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code"]
    torch = next(i for i, c in enumerate(cells) if "import torch" in c.source)
    assert all(c.execution_count is None for c in cells[torch:])
